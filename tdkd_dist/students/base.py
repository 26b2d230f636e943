"""The contract of every spiking student: shapes in and out, timesteps, classifier, timm's interface; its registration.

Shapes: T timesteps, B images, C channels, H, W pixels, K classes. Between the layers x is `[T*B, ...]`, T-major.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from tdkd_dist.first_timestep import KnowsFirst
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])
Net = TypeVar("Net", bound=nn.Module)
State = dict[str, Tensor]
"""Between two timesteps: every neuron layer's membrane by its name; under `INPUT` what the image gives each time.

In graphs that are the same for all timesteps there is a membrane before the first one too, and under `FIRST` `[B, 1]`,
1 before the first timestep and 0 after it.
"""
INPUT = "input"
FIRST = "first"


class SpikingNet(nn.Module):
    """A spiking classifier: `[B, C, H, W]` images or `[T, B, C, H, W]` frames to logits `[T, B, K]`.

    Every forward pass starts anew and leaves nothing behind. A subclass builds its layers of `make_neuron()`'s
    neurons, calls `make_classifier`, and defines `forward_features`.
    """

    operations_in_layers: ClassVar[bool] = False
    """Whether every multiplication is that of an `nn.Conv2d` or `nn.Linear`, so that the energy can be estimated."""
    fc: nn.Module
    num_features: int
    head_hidden_size: int
    default_cfg: dict[str, Any]

    def __init__(self, num_classes: int, in_chans: int, num_timesteps: int, neuron: NeuronConfig | None) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_timesteps = num_timesteps
        self.neuron = neuron or NeuronConfig()
        self.recomputed: frozenset[int] = frozenset()

    def make_neuron(self, channels: int | None = None) -> SpikingNeuron:
        """A layer of this student's neurons for currents `[T*B, channels, ...]`; `v_init=learned` must know them."""
        return SpikingNeuron(self.neuron, self.num_timesteps, channels)

    def make_classifier(self, features: int, hidden: int | None = None) -> None:
        """Add `fc` on `features` channels, or on the `hidden` ones between them and `fc`."""
        self.num_features, self.head_hidden_size = features, hidden or features
        self.reset_classifier(self.num_classes)

    @property
    def stages(self) -> Iterable[nn.Module]:
        """Sequences of blocks that `recompute` can choose from; none unless a subclass says so."""
        return ()

    def set_num_timesteps(self, num_timesteps: int) -> None:
        """Run so many timesteps from now on; more than in training is fine. Raises `ValueError` below 1.

        Every module inside that has `num_timesteps` is told.
        """
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
        for module in self.modules():
            if hasattr(module, "num_timesteps"):
                module.num_timesteps = num_timesteps  # type: ignore[assignment]

    def recompute(self, stages: Iterable[int]) -> None:
        """In training, keep only the inputs of these stages' blocks (1 is the first stage) for the backward pass.

        It computes the rest again: less memory, more time, the same gradients. Raises `ValueError` for other stages.
        """
        self.recomputed, count = frozenset(stages), len(tuple(self.stages))
        unknown = self.recomputed - set(range(1, count + 1))
        if unknown:
            there_are = f"there are 1 to {count}" if count else "there are none"
            raise ValueError(f"no stage {', '.join(map(str, sorted(unknown)))}: {there_are}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for `recompute`, of all stages or none."""
        self.recompute(range(1, len(tuple(self.stages)) + 1) if enable else ())

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[T, B, K]` for images `[B, C, H, W]` or frames `[T, B, C, H, W]`; features for `num_classes=0`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps `[T, B, C, H, W]`, before pooling."""
        raise NotImplementedError

    def step(self, images: Tensor, state: State | None = None, *, frame: bool | None = None) -> tuple[Tensor, State]:
        """One timestep: logits `[B, K]` and the state after it, for images `[B, C, H, W]`; `state` None: the start.

        T steps give what `forward` gives in eval mode. What is the same at every step is computed in the first and
        kept in the state, so that later steps look at `state` alone; with `frame`, `images` is this step's frame (None:
        if the student's file says that it was trained on frames). The state is a dict of tensors `[B, ...]`, whose rows
        can be selected.
        """
        frame = "frames" in getattr(self, "default_cfg", {}) if frame is None else frame
        neurons = {name: m for name, m in self.named_modules() if isinstance(m, SpikingNeuron)}
        after = {} if frame else {INPUT: self.prepare(images) if state is None else state[INPUT]}
        first = None if state is None else state.get(FIRST)
        timesteps = self.num_timesteps
        self.set_num_timesteps(1)
        try:
            for name, neuron in neurons.items():
                neuron.carries, neuron.membrane = True, None if state is None else state[name]
                neuron.first = first
            for layer in self._know_first():
                layer.is_first = state is None if first is None else first
            x = self.forward_features(images.unsqueeze(0)) if frame else self.forward_prepared(after[INPUT])
            logits_BK = self.forward_head(x)[0]
            after |= {name: n.membrane for name, n in neurons.items() if n.membrane is not None}
        finally:
            for neuron in neurons.values():
                neuron.carries, neuron.membrane, neuron.first = False, None, None
            for layer in self._know_first():
                layer.is_first = None
            self.set_num_timesteps(timesteps)
        return logits_BK, after if first is None else {**after, FIRST: torch.zeros_like(first)}

    @property
    def differs_at_first(self) -> bool:
        """Whether the first timestep is computed otherwise than the others, from the same membranes."""
        neurons = [m for m in self.modules() if isinstance(m, SpikingNeuron)]
        return bool(self._know_first()) or any(neuron.scales_first for neuron in neurons)

    def _know_first(self) -> list[KnowsFirst]:
        return [m for m in self.modules() if isinstance(m, KnowsFirst)]

    def prepare(self, images: Tensor) -> Tensor:
        """What of a static image's pass is the same at every timestep, `[B, ...]`: the image, unless one knows more."""
        return images

    def forward_prepared(self, x: Tensor) -> Tensor:
        """`forward_features` of what `prepare` gave."""
        return self.forward_features(x)

    def fold(self, x: Tensor) -> Tensor:
        """`[T*B, C, H, W]` of frames `[T, B, C, H, W]`, or of images `[B, C, H, W]`, each at every timestep."""
        T = self.num_timesteps
        if x.ndim == 4:
            return torch.cat([x] * T)  # unlike repeat, it keeps channels_last
        if x.ndim != 5:
            raise ValueError(f"input of shape {list(x.shape)}: must be [B, C, H, W] or [T, B, C, H, W]")
        if x.shape[0] != T:
            raise ValueError(f"{x.shape[0]} frames, but num_timesteps={T}: call set_num_timesteps({x.shape[0]})")
        return x.flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """`[T, B, ...]` of `[T*B, ...]`."""
        return x.view(self.num_timesteps, -1, *x.shape[1:])

    def forward_head(self, x_TBCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[T, B, K]` of `forward_features`' maps, or with `pre_logits` what `fc` reads, `[T, B, C]`."""
        x_TBC = x_TBCHW.mean((3, 4))
        return x_TBC if pre_logits else self.classify(x_TBC)

    def classify(self, x_TBC: Tensor) -> Tensor:
        """Logits `[T, B, K]` of what `fc` reads."""
        logits_TBK: Tensor = self.fc(x_TBC)
        return logits_TBK

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes`; 0: none, the student gives features `[T, B, C]`."""
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool={global_pool}: must be avg")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser builders must not decay: what neurons learn."""
        neurons = {name: m for name, m in self.named_modules() if isinstance(m, SpikingNeuron)}
        return {f"{name}.{own}" for name, m in neurons.items() for own, _ in m.named_parameters()}


@dataclass(frozen=True)
class Declaration:
    """What a registered network takes of a recipe's `student:` section besides classes and channels."""

    family: str
    """The file it is in."""
    options: frozenset[str]
    spiking: bool
    """Whether it is a `SpikingNet`, which takes `num_timesteps` and `neuron`."""


DECLARED: dict[str, Declaration] = {}
"""Every registered network by name."""


def register(*options: str, spiking: bool = True) -> Callable[[EntryPoint], EntryPoint]:
    """Give timm a network under its function's name, and declare which of the section's options it takes."""

    def decorate(entry_point: EntryPoint) -> EntryPoint:
        family = entry_point.__module__.rpartition(".")[2]
        DECLARED[entry_point.__name__] = Declaration(family, frozenset(options), spiking)
        register_model(entry_point)
        return entry_point

    return decorate


def build(cls: type[Net], name: str, pretrained: bool, **kwargs: Any) -> Net:
    """Build a registered network as timm does: default configuration attached, timm's own arguments understood."""
    net = build_model_with_cfg(cls, name, pretrained, **kwargs)
    assert isinstance(net, cls)
    return net

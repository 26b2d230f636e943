"""What every student shares: folding over time, the stem of a static image, stages, classifier, timm's interface.

Shapes: T timesteps, B images, C channels, H, W pixels, K classes. Between the layers x is `[T*B, C, H, W]`, T-major.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdkd_dist import batch_norm  # the module: it imports timm, which may be what imports us
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron

Block = Callable[[int, int, int, float], "ResidualBlock"]
"""Builds a block from input channels, width, stride and drop-path rate."""
EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])
Net = TypeVar("Net", bound=nn.Module)

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "num_classes": 10}
"""What timm's `default_cfg` says of the networks for CIFAR-10."""


class ResidualBlock(nn.Module):
    """A block of a stage, `[T*B, C, H, W]` in and out."""

    out_channels: int

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The residual branch's last batch norm."""
        raise NotImplementedError


class SpikingNet(nn.Module):
    """A spiking classifier: `[B, C, H, W]` images or `[T, B, C, H, W]` frames to logits `[T, B, K]`.

    Every forward pass starts at rest and leaves nothing behind. The parts are a stem (`conv1`, `bn1`, then the neuron
    `sn1` where there is one, then `maxpool`), the stages `layer1`, `layer2`, ..., the neuron `sn_head` where there is
    one, and `fc` on the spatial mean. Subclasses build them.
    """

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    sn1: SpikingNeuron | None
    maxpool: nn.Module
    sn_head: SpikingNeuron | None
    fc: nn.Module
    num_features: int
    head_hidden_size: int
    default_cfg: dict[str, Any]

    def __init__(self, num_classes: int, in_chans: int, num_timesteps: int, neuron: NeuronConfig | None) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_timesteps = num_timesteps
        self.neuron = neuron or NeuronConfig()
        self.sn1 = self.sn_head = None
        self.recomputed: frozenset[int] = frozenset()

    def make_neuron(self) -> SpikingNeuron:
        """A layer of this student's neurons."""
        return SpikingNeuron(self.neuron, self.num_timesteps)

    def make_stages(
        self, block: Block, widths: Sequence[int], depths: Sequence[int], first_stride: int, drop_path_rate: float
    ) -> int:
        """Add `layer1`, ..., of stride 2 from the second on, drop-path growing linearly; returns the channels."""
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        channels = self.conv1.out_channels
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = nn.Sequential()
            for i in range(depth):
                stride = 1 if i > 0 else first_stride if stage == 0 else 2
                built = block(channels, width, stride, rates.pop(0))
                channels = built.out_channels
                blocks.append(built)
            setattr(self, f"layer{stage + 1}", blocks)
        self.num_stages = len(depths)
        return channels

    def make_classifier(self, features: int, hidden: int | None = None) -> None:
        """Add `fc` on `features` channels, or on the `hidden` ones between them and `fc`."""
        self.num_features, self.head_hidden_size = features, hidden or features
        self.reset_classifier(self.num_classes)

    def init_weights(self, zero_init_last: bool) -> None:
        """Initialise what differs from PyTorch's default: the last BN weight of each block at 0, if wanted."""
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, ResidualBlock):
                    nn.init.zeros_(module.last_bn.weight)

    @property
    def stages(self) -> Iterator[nn.Module]:
        """`layer1`, `layer2`, ..."""
        return (getattr(self, f"layer{i + 1}") for i in range(self.num_stages))

    def set_num_timesteps(self, num_timesteps: int) -> None:
        """Run so many timesteps from now on; more than in training is fine. Raises `ValueError` below 1."""
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
        self.num_timesteps = num_timesteps
        for module in self.modules():
            if isinstance(module, SpikingNeuron | TemporalDropPath):
                module.num_timesteps = num_timesteps

    def recompute(self, stages: Iterable[int]) -> None:
        """In training, keep only the inputs of these stages' blocks (1 is the first stage) for the backward pass.

        It computes the rest again: less memory, more time, the same gradients. Raises `ValueError` for other stages.
        """
        self.recomputed = frozenset(stages)
        unknown = self.recomputed - set(range(1, self.num_stages + 1))
        if unknown:
            raise ValueError(f"no stage {', '.join(map(str, sorted(unknown)))}: there are 1 to {self.num_stages}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for `recompute`, of all stages or none."""
        self.recompute(range(1, self.num_stages + 1) if enable else ())

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[T, B, K]` for images `[B, C, H, W]` or frames `[T, B, C, H, W]`; features for `num_classes=0`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps `[T, B, C, H, W]`, before pooling."""
        x = self.forward_stem(x)
        for number, stage in enumerate(self.stages, start=1):
            x = run_keeping_inputs(stage, x) if self.training and number in self.recomputed else stage(x)
        if self.sn_head is not None:
            x = self.sn_head(x)
        return x.view(self.num_timesteps, -1, *x.shape[1:])

    def forward_head(self, x_TBCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[T, B, K]` of `forward_features`' maps, or with `pre_logits` what `fc` reads, `[T, B, C]`."""
        x_TBC = x_TBCHW.mean((3, 4))
        return x_TBC if pre_logits else self.classify(x_TBC)

    def classify(self, x_TBC: Tensor) -> Tensor:
        """Logits `[T, B, K]` of what `fc` reads."""
        logits_TBK: Tensor = self.fc(x_TBC)
        return logits_TBK

    def forward_stem(self, x: Tensor) -> Tensor:
        """What the first block reads, `[T*B, C, H, W]`; a static image passes convolution and batch norm once."""
        T = self.num_timesteps
        if x.ndim == 5:
            if x.shape[0] != T:
                raise ValueError(f"{x.shape[0]} frames, but num_timesteps={T}: call set_num_timesteps({x.shape[0]})")
            x = self.bn1(self.conv1(x.flatten(0, 1)))
            x = self.maxpool(x if self.sn1 is None else self.sn1(x))
        elif x.ndim == 4:
            x = batch_norm.batch_norm_repeated(self.bn1, self.conv1(x), T)
            # Unlike repeat, cat keeps channels_last.
            x = torch.cat([self.maxpool(x)] * T) if self.sn1 is None else self.maxpool(self.sn1(x, constant=True))
        else:
            raise ValueError(f"input of shape {list(x.shape)}: must be [B, C, H, W] or [T, B, C, H, W]")
        return x

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
        """Parameters that timm's optimiser builders must not decay: the learned leaks of PLIF."""
        names = {name for name, m in self.named_modules() if isinstance(m, SpikingNeuron) and m.config.kind == "plif"}
        return {f"{name}.w" for name in names}


def run_keeping_inputs(blocks: nn.Module, x: Tensor) -> Tensor:
    """`blocks(x)`, of which autograd keeps each block's input alone; statistics move once, not again in recomputing."""
    for block in blocks.children():
        if torch.compiler.is_compiling():  # the second pass is a part of the backward graph, which changes no buffer
            x = checkpoint(_with_an_end, block, x, use_reentrant=False)
        else:
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_again, block))
    return x


def _with_an_end(block: nn.Module, x: Tensor) -> Tensor:
    # The partitioner keeps a block's output for the next one only if it is no view, and Inductor takes out a clone.
    # Without this all blocks would be computed again at once, from the first one's input.
    y: Tensor = block(x)
    return y.clamp(max=math.inf)


def _again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a block is run in first, and when it is computed again."""
    return nullcontext(), _put_back_buffers(block)


@contextmanager
def _put_back_buffers(block: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield  # left by an exception as soon as all that is needed has been computed
    finally:
        for buffer, copied in before:
            buffer.data.copy_(copied)  # .data: as in `batch_norm.batch_norm_repeated`


class TemporalDropPath(nn.Module):
    """Stochastic depth with one decision a sample, the same at every timestep (Huang et al. 2016)."""

    def __init__(self, rate: float, num_timesteps: int) -> None:
        super().__init__()
        self.rate, self.num_timesteps = rate, num_timesteps

    @property
    def drops(self) -> bool:
        """Whether it does anything: in training, at a rate above 0."""
        return self.training and self.rate > 0

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, H, W]`, dropped samples zeroed, the others scaled by 1 / (1 - rate); the identity in eval mode."""
        if not self.drops:
            return x
        mask = x.new_empty(x.shape[0] // self.num_timesteps, 1, 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)
        return x * torch.cat([mask] * self.num_timesteps)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rate={self.rate:g}"


def downsample(in_channels: int, out_channels: int, stride: int, bias: bool = False) -> nn.Sequential | None:
    """A shortcut's 1x1 convolution and batch norm, or None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias), nn.BatchNorm2d(out_channels))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A padded 3x3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias)


def init_kaiming(net: nn.Module) -> None:
    """He initialisation (fan-out) of every convolution (He et al. 2015)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def register(entry_point: EntryPoint) -> EntryPoint:
    """Give timm a network under its function's name."""
    register_model(entry_point)
    return entry_point


def build(cls: type[Net], name: str, pretrained: bool, **kwargs: Any) -> Net:
    """Build a registered network as timm does: default configuration attached, timm's own arguments understood."""
    net = build_model_with_cfg(cls, name, pretrained, **kwargs)
    assert isinstance(net, cls)
    return net

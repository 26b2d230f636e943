"""A student as other programs know it: batch norms folded, a whole pass or one timestep, plain tensors in and out.

Shapes: T timesteps, B images, K classes.
"""

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tdkd_dist.batch_norm import FirstStatistics
from tdkd_dist.first_timestep import KnowsFirst
from tdkd_dist.neurons import SpikingNeuron
from tdkd_dist.students.base import FIRST, SpikingNet


@torch.no_grad()
def fold_batch_norms(model: SpikingNet) -> SpikingNet:
    """A copy in eval mode whose batch norms are a part of the convolutions before them (Jacob et al. 2018, 3.2).

    A batch norm that reads anything but one convolution's output stays as it is. Folding is done in float64. Nothing
    else may read that output: so it is in the package's students; of others, comparing what was written would tell.
    Where the first timestep has statistics of its own, a scale and an offset of its channels are left.
    """
    folded = copy.deepcopy(model).eval()
    names = {module: name for name, module in folded.named_modules()}
    for conv, bn in _pairs(folded):
        dtype = conv.weight.dtype
        fused: nn.Conv2d = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
        folded.set_submodule(names[conv], fused.to(dtype))
        folded.set_submodule(names[bn], FirstAffine(bn) if isinstance(bn, FirstStatistics) else nn.Identity())
    return folded


class FirstAffine(KnowsFirst):
    """What folding leaves of a batch norm with statistics of its own for the first timestep: scale and offset there."""

    scale_C: Tensor
    offset_C: Tensor

    def __init__(self, bn: FirstStatistics) -> None:
        super().__init__()
        self.num_timesteps, self.is_first = bn.num_timesteps, None
        bn64 = copy.deepcopy(bn).double()
        assert bn64.running_mean is not None
        assert bn64.running_var is not None
        # With y = w (x - m) / d + b later, w (x - m1) / d1 + b at first is s (y - b) + w (m - m1) / d1 + b, s = d / d1.
        spread_C, first_C = (torch.sqrt(var + bn.eps) for var in (bn64.running_var, bn64.first_running_var))
        scale_C = spread_C / first_C
        moved_C = bn64.weight * (bn64.running_mean - bn64.first_running_mean) / first_C
        self.register_buffer("scale_C", scale_C.to(bn.weight))
        self.register_buffer("offset_C", (moved_C + bn64.bias * (1 - scale_C)).to(bn.weight))

    def at_first(self, x: Tensor) -> Tensor:
        """By the first timestep's statistics, of what those of the others have normalised."""
        return x * self.scale_C.view(-1, 1, 1) + self.offset_C.view(-1, 1, 1)

    def later(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


def _pairs(model: SpikingNet) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Every batch norm with the convolution whose output it read in one timestep."""
    made_by: dict[int, nn.Conv2d] = {}
    kept: list[Tensor] = []  # while tensors live, their ids are their own
    pairs: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def after_convolution(conv: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        made_by[id(output)] = conv
        kept.append(output)

    def before_batch_norm(bn: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(bn, _BatchNorm)
        conv = made_by.pop(id(inputs[0]), None)
        if conv is not None:
            pairs.append((conv, bn))

    hooks = [m.register_forward_hook(after_convolution) for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_batch_norm) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        model.step(example(model, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def example(model: SpikingNet, batch: int, frames: int | None = None) -> Tensor:
    """Normalised images `[B, C, H, W]`, or frames `[T, B, C, H, W]`, of the student's size, on its device: noise."""
    weight = next(model.parameters())
    shape = (batch, model.in_chans, *model.default_cfg["input_size"][1:])
    noise = torch.randn(shape if frames is None else (frames, *shape), generator=torch.Generator().manual_seed(0))
    return noise.to(weight)


class OneStep(nn.Module):
    """One timestep of plain tensors: images `[B, C, H, W]` and membranes to logits `[B, K]` and membranes.

    The images are those of any other timestep, or this timestep's frame; membranes are measured from the reset value,
    and at first what `starts` says. Where the first timestep is computed otherwise there is one more state, `FIRST`.
    """

    def __init__(self, model: SpikingNet) -> None:
        super().__init__()
        self.model = model
        self.neurons = {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeuron)}
        self.names = [*self.neurons, *([FIRST] if model.differs_at_first else [])]

    def forward(self, images: Tensor, *membranes: Tensor) -> tuple[Tensor, ...]:
        """Logits and the membranes after the timestep, in the order of `names`."""
        logits, state = self.model.step(images, dict(zip(self.names, membranes, strict=True)), frame=True)
        return logits, *(state[name] for name in self.names)

    @torch.no_grad()
    def at_first(self, images: Tensor) -> tuple[Tensor, ...]:
        """The membranes before the first timestep of such images."""
        _, state = self.model.step(images, frame=True)
        state[FIRST] = images.new_zeros(len(images), 1)
        return tuple(torch.zeros_like(state[name]) + self._start(name, state[name]) for name in self.names)

    @torch.no_grad()
    def starts(self) -> str:
        """The membranes before the first timestep, as JSON: by neuron, in order, a number a channel or one for all."""
        like = torch.zeros(1, 1, dtype=torch.float64)
        return json.dumps({name: self._start(name, like).flatten().tolist() for name in self.names})

    def _start(self, name: str, state: Tensor) -> Tensor:
        if name == FIRST:
            return state.new_ones(1)
        start = self.neurons[name].initial(state)
        return state.new_zeros(1) if start is None else start

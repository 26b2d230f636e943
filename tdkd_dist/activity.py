"""What fires and what it costs: firing rates, synaptic operations and an estimate of energy, after every timestep.

Synaptic operations are input values times fan-out (MACs, not 2 x MACs), with the true fan-out at borders. A layer that
reads whole numbers (spikes, or the sums of SEW's ADD) accumulates: a 3 counts as three. A layer that reads real numbers
multiplies and accumulates, each of its inputs at every timestep; the stem of a static image once. A linear layer on
pooled spikes accumulates the spikes before pooling. Batch norm is folded into the convolutions, and the neurons' own
updates are left out.

Shapes: T timesteps, B images, C channels, H, W pixels.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdkd_dist import distributed
from tdkd_dist.neurons import SpikingNeuron
from tdkd_dist.students.base import SpikingNet
from tdkd_dist.students.resnet import ResidualBlock

PJ_PER_MAC, PJ_PER_AC = 4.6, 0.9
"""Energy of a 32-bit floating-point multiply-accumulate and of an accumulate at 45 nm, in pJ (Horowitz, ISSCC 2014)."""

Split = Callable[[Tensor], Tensor]
"""Unfolds `[T*B, ...]` and keeps the images that count."""


class ActivityMeter:
    """Counts what a spiking student does with the first images it is given, at most `max_images` on this rank.

    Operations and energy only where they all are in layers that it can count (`SpikingNet.operations_in_layers`).

    Every rank must build it for the same student; `summary` adds up all ranks' sums, which are exact.
    """

    def __init__(self, model: SpikingNet, max_images: int, device: torch.device) -> None:
        self._model, self._T, self._left = model, model.num_timesteps, max_images
        modules = dict(model.named_modules())
        self._neurons = [name for name, m in modules.items() if isinstance(m, SpikingNeuron)]
        self._blocks = [name for name, m in modules.items() if isinstance(m, ResidualBlock)]
        layers = [name for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
        self._layers = layers if model.operations_in_layers else []

        def zeros(names: list[str], columns: int) -> Tensor:
            return torch.zeros(len(names), self._T, columns, dtype=torch.float64, device=device)

        self._spikes = zeros(self._neurons, 2)  # spikes, neurons
        self._outputs = zeros(self._blocks, 3)  # sum of values, of them not 0, values
        self._operations = zeros(self._layers, 3)  # accumulates, multiply-accumulates, a dense layer's
        self._images = torch.zeros(1, dtype=torch.float64, device=device)
        self._fan_outs: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._whole: dict[str, bool] = {}
        self._pooled_TBC: Tensor | None = None
        self._frames: Tensor | None = None

    @property
    def wants_more(self) -> bool:
        """Whether images are still to be counted."""
        return self._left > 0

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits `[T, B, K]` of `[B, C, H, W]` or `[T, B, C, H, W]`, counting on the way.

        Not through the compiled forward pass, in which hooks would not run.
        """
        B, T = images.shape[-4], self._T
        n = min(B, self._left)

        def split(x: Tensor) -> Tensor:
            """`[T, n, ...]`, or `[1, n, ...]` of what is computed once for all timesteps."""
            x_TB = x if x.shape[:2] == (T, B) and x.ndim == 3 else x.view(len(x) // B, B, *x.shape[1:])
            return x_TB[:, :n]

        self._frames = images.flatten(0, 1) if images.ndim == 5 else None
        with ExitStack() as hooks:
            for i, name in enumerate(self._neurons):
                self._hook(hooks, name, partial(self._count_spikes, i, split))
            for i, name in enumerate(self._blocks):
                self._hook(hooks, name, partial(self._count_output, i, split))
            for i, name in enumerate(self._layers):
                self._hook(hooks, name, partial(self._count_operations, i, split))
            if self._layers:
                features_TBCHW = self._model.forward_features(images)
                whole = self._reads_whole("the head", features_TBCHW)
                self._pooled_TBC = features_TBCHW.sum((3, 4), dtype=torch.float64)[:, :n] if whole else None
                logits_TBK = self._model.forward_head(features_TBCHW)
            else:
                logits_TBK = self._model.forward(images)
        self._left -= n
        self._images += n
        return logits_TBK

    def summary(self) -> dict[str, Any] | None:
        """What was counted on all ranks, or None if nothing was; every rank must call it.

        - Lists over t: `firing_rate`, spikes a neuron at step t, over all neurons; `synops`, accumulates, and `macs`,
          multiply-accumulates an image up to t; `energy_mj`, their energy in mJ an image.
        - `macs_relu`, `energy_mj_relu`: one pass of the ReLU network of the same shape. These and all operations are
          left out where they could not all be counted.
        - `firing_rates`, `block_outputs`, `block_nonzero`: for each layer, a list over t. A block's output is its mean
          value, which may exceed 1, and the share that is not 0.
        - `activity_images`: how many images were counted.
        """
        spikes, outputs, operations, images = (
            distributed.sum_over_ranks(x).cpu() for x in (self._spikes, self._outputs, self._operations, self._images)
        )
        if images == 0:
            return None
        row: dict[str, Any] = {"activity_images": int(images)}
        curves = {"firing_rate": spikes[..., 0].sum(0) / spikes[..., 1].sum(0)} if self._neurons else {}
        if self._layers:
            synops_T, macs_T = (operations.sum(0).cumsum(0) / images)[:, :2].unbind(1)
            curves |= {"synops": synops_T, "macs": macs_T, "energy_mj": energy_mj(synops_T, macs_T)}
            dense = (operations[:, 0, 2].sum() / images).item()
            row |= {"macs_relu": dense, "energy_mj_relu": energy_mj(0.0, dense)}
        row |= {name: values_T.tolist() for name, values_T in curves.items()}
        row["firing_rates"] = dict(zip(self._neurons, (spikes[..., 0] / spikes[..., 1]).tolist(), strict=True))
        row["block_outputs"] = dict(zip(self._blocks, (outputs[..., 0] / outputs[..., 2]).tolist(), strict=True))
        row["block_nonzero"] = dict(zip(self._blocks, (outputs[..., 1] / outputs[..., 2]).tolist(), strict=True))
        return row

    def _hook(self, hooks: ExitStack, name: str, count: Callable[[Tensor, Tensor], None]) -> None:
        module = self._model.get_submodule(name)
        handle = module.register_forward_hook(lambda _, inputs, output: count(inputs[0], output))
        hooks.callback(handle.remove)

    def _count_spikes(self, i: int, split: Split, _: Tensor, output: Tensor) -> None:
        spikes_TB = split(output)
        self._spikes[i, :, 0] += _sum_over_images(spikes_TB)
        self._spikes[i, :, 1] += spikes_TB[0].numel()

    def _count_output(self, i: int, split: Split, _: Tensor, output: Tensor) -> None:
        output_TB = split(output)
        self._outputs[i, :, 0] += _sum_over_images(output_TB)
        self._outputs[i, :, 1] += _sum_over_images(output_TB != 0)
        self._outputs[i, :, 2] += output_TB[0].numel()

    def _count_operations(self, i: int, split: Split, x: Tensor, _: Tensor) -> None:
        x_TB = split(x)
        name, n = self._layers[i], x_TB.shape[1]
        layer = self._model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        whole = self._reads_whole(name, x_TB) and not self._is_input(x)
        if isinstance(layer, nn.Linear) and not whole and self._pooled_TBC is not None:
            x_TB, whole = self._pooled_TBC, True
        fan_out = self._fan_out(name, layer, tuple(x_TB.shape[2:]))
        dense = fan_out.sum() * n
        self._operations[i, : len(x_TB), 0 if whole else 1] += (
            (x_TB.sum(1, dtype=torch.float64) * fan_out).flatten(1).sum(1) if whole else dense
        )
        self._operations[i, 0, 2] += dense

    def _reads_whole(self, key: str, x: Tensor) -> bool:
        """Whether a layer's inputs are whole numbers, as its first batch shows."""
        if key not in self._whole:
            self._whole[key] = bool((x == x.round()).all())
        return self._whole[key]

    def _is_input(self, x: Tensor) -> bool:
        """Whether x are the frames themselves: counts of events, which are multiplied."""
        return self._frames is not None and x.shape == self._frames.shape and torch.equal(x, self._frames)

    def _fan_out(self, name: str, layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> Tensor:
        """How many products each input takes part in: `[C, H, W]` or `[C]`."""
        key = (name, shape)
        if key not in self._fan_outs:
            weight = layer.weight
            if isinstance(layer, nn.Linear):
                fan_out = torch.full(shape, layer.out_features, dtype=torch.float64, device=weight.device)
            else:
                ones = torch.ones(1, *shape, dtype=torch.float64, device=weight.device, requires_grad=True)
                with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
                    kernel = torch.ones_like(weight, dtype=torch.float64)
                    y = F.conv2d(ones, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                    (fan_out,) = torch.autograd.grad(y.sum(), ones)
                fan_out = fan_out[0]
            self._fan_outs[key] = fan_out
        return self._fan_outs[key]


def energy_mj(accumulates: Any, macs: Any) -> Any:
    """Energy in mJ of so many operations at 45 nm."""
    return (PJ_PER_AC * accumulates + PJ_PER_MAC * macs) * 1e-9


def _sum_over_images(x_TB: Tensor) -> Tensor:
    return x_TB.flatten(1).sum(1, dtype=torch.float64)

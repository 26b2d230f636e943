"""What the spiking ResNets share: the stem of a static image, stages of residual blocks, recomputation, drop-path.

Shapes: T timesteps, B images, C channels, H, W pixels. Between the layers x is `[T*B, C, H, W]`, T-major.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.checkpoint import checkpoint

from tdkd_dist import batch_norm  # the module: it imports timm, which may be what imports us
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students.base import SpikingNet

Block = Callable[[int, int, int, float], "ResidualBlock"]
"""Builds a block from input channels, width, stride and drop-path rate."""

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "crop_pct": 1.0, "num_classes": 10}
"""What timm's `default_cfg` says of the networks for CIFAR-10."""
CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
"""What it would say of them for CIFAR-100 (Yu et al. 2025, released code)."""

NARROW = 8
"""Channels that a shortcut's convolution must read more of to be torch's own."""


class ResidualBlock(nn.Module):
    """A block of a stage, `[T*B, C, H, W]` in and out."""

    out_channels: int

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The residual branch's last batch norm."""
        raise NotImplementedError


class SpikingResNetBase(SpikingNet):
    """A spiking ResNet, whose parts its subclasses build.

    A stem (`conv1`, `bn1`, then the neuron `sn1` where there is one, then `maxpool`), the stages `layer1`, `layer2`,
    ..., the neuron `sn_head` where there is one, and `fc` on the spatial mean. With `first_statistics` the stages'
    batch norms have statistics of their own for the first timestep; the stem reads the same at every one.
    """

    operations_in_layers: ClassVar[bool] = True
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    sn1: SpikingNeuron | None
    maxpool: nn.Module
    sn_head: SpikingNeuron | None

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        num_timesteps: int,
        neuron: NeuronConfig | None,
        first_statistics: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, num_timesteps, neuron)
        self.first_statistics = first_statistics
        self.sn1 = self.sn_head = None

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
            if self.first_statistics:
                batch_norm.give_first_statistics(blocks, self.num_timesteps)
            setattr(self, f"layer{stage + 1}", blocks)
        self.num_stages = len(depths)
        return channels

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

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps `[T, B, C, H, W]`, before pooling; a static image passes convolution and batch norm once."""
        if x.ndim == 4:
            return self.forward_prepared(self.prepare(x))
        x = self.bn1(self.conv1(self.fold(x)))
        return self.forward_stages(self.maxpool(x if self.sn1 is None else self.sn1(x)))

    def prepare(self, images: Tensor) -> Tensor:
        """The stem up to its neuron or, where it has none, to its end."""
        x = batch_norm.batch_norm_repeated(self.bn1, self.conv1(images), self.num_timesteps)
        return self.maxpool(x) if self.sn1 is None else x

    def forward_prepared(self, x: Tensor) -> Tensor:
        """Feature maps of what `prepare` gave."""
        x = self.fold(x) if self.sn1 is None else self.maxpool(self.sn1(x, constant=True))
        return self.forward_stages(x)

    def forward_stages(self, x: Tensor) -> Tensor:
        """Feature maps `[T, B, C, H, W]` of what the first block reads, `[T*B, C, H, W]`."""
        for number, stage in enumerate(self.stages, start=1):
            x = run_keeping_inputs(stage, x) if self.training and number in self.recomputed else stage(x)
        return self.unfold(x if self.sn_head is None else self.sn_head(x))


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
    kind = NarrowConv1x1 if in_channels <= NARROW and stride > 1 else nn.Conv2d
    return nn.Sequential(kind(in_channels, out_channels, 1, stride, bias=bias), nn.BatchNorm2d(out_channels))


class NarrowConv1x1(nn.Conv2d):
    """A 1x1 convolution that is given the pixels its stride keeps.

    From so few channels, and 46 pixels and more, torch 2.15's own writes past its memory in a CPU's backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` in; out the `[N, C', H', W']` of the plain one."""
        down, right = self.stride
        return conv2d(input[..., ::down, ::right], self.weight, self.bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A padded 3x3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias)


def init_kaiming(net: nn.Module) -> None:
    """He initialisation (fan-out) of every convolution (He et al. 2015)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

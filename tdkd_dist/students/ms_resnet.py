"""Residual nets whose shortcut carries membrane input, not spikes: MS-ResNet, and the paper's ImageNet backbone.

MS-ResNet: Hu et al. 2021, arXiv:2112.08954. preact_resnet34: Yu et al. 2025 (the released code's). Both have blocks
neuron - conv - BN - neuron - conv - BN, plus the block's real-valued input; they differ in stem, biases, strides,
initialisation and in the neuron before pooling, which only MS-ResNet has.

Shapes: x is `[T*B, C, H, W]`, T-major.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students import base, resnet
from tdkd_dist.students.resnet import conv3x3


class PreactBlock(resnet.ResidualBlock):
    """Twice neuron - conv3x3 - BN, plus the input, which a 1x1 convolution reads before any neuron does."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        drop_path: float,
        *,
        bias: bool,
        make_neuron: Callable[[int], SpikingNeuron],
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.sn1, self.conv1 = make_neuron(in_channels), conv3x3(in_channels, width, stride, bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.sn2, self.conv2, self.bn2 = make_neuron(width), conv3x3(width, width, 1, bias), nn.BatchNorm2d(width)
        self.downsample = resnet.downsample(in_channels, width, stride, bias)
        self.drop_path = resnet.TemporalDropPath(drop_path, self.sn1.num_timesteps)

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, H, W]` in and out."""
        out: Tensor = self.bn1(self.conv1(self.sn1(x)))
        out = self.drop_path(self.bn2(self.conv2(self.sn2(out))))
        return out + x if self.downsample is None else out + self.downsample(x)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The residual branch's last batch norm."""
        return self.bn2


class MembraneResNet(resnet.SpikingResNetBase):
    """Stem conv7x7/2 - BN, optionally a max-pool, no neuron; then `PreactBlock`s.

    `width` is the first stage's; `bias` gives the convolutions biases; `stem_pool` adds the max-pool and leaves the
    first stage at stride 1; `head_neuron` puts a neuron before pooling. `zero_init_last` starts each block's last BN
    weight at 0, `drop_path_rate` is the last block's.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bias: bool,
        stem_pool: bool,
        head_neuron: bool,
        num_classes: int = 1000,
        in_chans: int = 3,
        num_timesteps: int = 4,
        neuron: NeuronConfig | None = None,
        width: int = 64,
        zero_init_last: bool = False,
        drop_path_rate: float = 0.0,
        first_statistics: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, num_timesteps, neuron, first_statistics)
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        block = partial(PreactBlock, bias=bias, make_neuron=self.make_neuron)
        widths = [width * 2**stage for stage in range(len(depths))]
        features = self.make_stages(block, widths, depths, 1 if stem_pool else 2, drop_path_rate)
        self.sn_head = self.make_neuron(features) if head_neuron else None
        self.make_classifier(features)
        self.init_weights(zero_init_last)


class MSResNet(MembraneResNet):
    """MS-ResNet: no convolution bias, no max-pool, a neuron before pooling."""

    def __init__(self, depths: Sequence[int], *, zero_init_last: bool = True, **kwargs: Any) -> None:
        kwargs |= {"bias": False, "stem_pool": False, "head_neuron": True}
        super().__init__(depths, zero_init_last=zero_init_last, **kwargs)

    def init_weights(self, zero_init_last: bool) -> None:
        """BN weights start at the threshold, so that its scale changes nothing; then as every student."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, self.neuron.threshold)
        super().init_weights(zero_init_last)


class PreactResNet(MembraneResNet):
    """The paper's ImageNet backbone: torchvision's stem and names, biases everywhere, pooling of real values."""

    def __init__(self, depths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(depths, bias=True, stem_pool=True, head_neuron=False, **kwargs)

    def init_weights(self, zero_init_last: bool) -> None:
        """He initialisation of the convolutions, then as every student."""
        resnet.init_kaiming(self)
        super().init_weights(zero_init_last)


default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 224, 224), "first_conv": "conv1", "classifier": "fc"}
        for name in ("ms_resnet18", "ms_resnet34", "preact_resnet34")
    }
)
register = base.register("width", "drop_path", "zero_init_last", "first_statistics")


@register
def ms_resnet18(pretrained: bool = False, **kwargs: Any) -> MSResNet:
    """MS-ResNet-18; see `MembraneResNet` for the arguments."""
    return base.build(MSResNet, "ms_resnet18", pretrained, depths=(2, 2, 2, 2), **kwargs)


@register
def ms_resnet34(pretrained: bool = False, **kwargs: Any) -> MSResNet:
    """MS-ResNet-34; see `MembraneResNet` for the arguments."""
    return base.build(MSResNet, "ms_resnet34", pretrained, depths=(3, 4, 6, 3), **kwargs)


@register
def preact_resnet34(pretrained: bool = False, **kwargs: Any) -> PreactResNet:
    """The backbone of the paper's ImageNet row; see `MembraneResNet` for the arguments."""
    return base.build(PreactResNet, "preact_resnet34", pretrained, depths=(3, 4, 6, 3), **kwargs)

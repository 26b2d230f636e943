"""SEW-ResNet: residual blocks that join spikes element by element (Fang et al. 2021, arXiv:2102.04159).

Shapes: x is `[T*B, C, H, W]`, T-major.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tdkd_dist.mistakes import Mistake
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students import base, resnet
from tdkd_dist.students.resnet import conv3x3

Connect = Literal["ADD", "AND", "IAND"]
MakeNeuron = Callable[[int], SpikingNeuron]


def join(a: Tensor, b: Tensor, connect: Connect) -> Tensor:
    """a + b, a * b or a * (1 - b): Fang et al. 2021, table 1."""
    if connect == "ADD":
        return a + b
    return a * b if connect == "AND" else a * (1 - b)


class BasicBlock(resnet.ResidualBlock):
    """Twice conv3x3 - BN - neuron, joined with the identity; IAND is identity * (1 - out)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        drop_path: float,
        *,
        connect: Connect,
        make_neuron: MakeNeuron,
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.connect: Connect = connect
        self.conv1, self.bn1, self.sn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width), make_neuron(width)
        self.conv2, self.bn2, self.sn2 = conv3x3(width, width), nn.BatchNorm2d(width), make_neuron(width)
        self.downsample = resnet.downsample(in_channels, width, stride)
        self.downsample_sn = None if self.downsample is None else make_neuron(width)
        self.drop_path = resnet.TemporalDropPath(drop_path, self.sn1.num_timesteps)

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, H, W]` in and out."""
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None and self.downsample_sn is not None:
            x = self.downsample_sn(self.downsample(x))
        if self.connect == "ADD" and not self.drop_path.drops:
            return self.sn2.add_spikes(out, x, identity=self.downsample is None)
        return join(x, self.drop_path(self.sn2(out)), self.connect)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The residual branch's last batch norm."""
        return self.bn2


class Bottleneck(resnet.ResidualBlock):
    """conv1x1, conv3x3 with the stride, conv1x1, each - BN - neuron; IAND is out * (1 - identity)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        drop_path: float,
        *,
        connect: Connect,
        make_neuron: MakeNeuron,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels = width * self.expansion
        self.connect: Connect = connect
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.sn1 = make_neuron(width)
        self.conv2, self.bn2, self.sn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width), make_neuron(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.sn3 = make_neuron(out_channels)
        self.downsample = resnet.downsample(in_channels, out_channels, stride)
        self.downsample_sn = None if self.downsample is None else make_neuron(out_channels)
        self.drop_path = resnet.TemporalDropPath(drop_path, self.sn1.num_timesteps)

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, H, W]` in and out."""
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.sn2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None and self.downsample_sn is not None:
            x = self.downsample_sn(self.downsample(x))
        if self.connect == "ADD" and not self.drop_path.drops:
            return self.sn3.add_spikes(out, x, identity=self.downsample is None)
        return join(self.drop_path(self.sn3(out)), x, self.connect)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The residual branch's last batch norm."""
        return self.bn3


class SEWResNet(resnet.SpikingResNetBase):
    """Stem conv - BN - neuron - max-pool, then SEW blocks.

    `width` is the first stage's; `small_stem` is a 3x3 convolution of stride 2 without a pool, for images of about
    32 pixels. `zero_init_last` starts each block's last BN weight at 0, `drop_path_rate` is the last block's.
    Raises `Mistake` for an unknown `connect`, and for drop-path where a silent branch would silence the block.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        num_timesteps: int = 4,
        neuron: NeuronConfig | None = None,
        connect: Connect = "ADD",
        width: int = 64,
        small_stem: bool = False,
        zero_init_last: bool = False,
        drop_path_rate: float = 0.0,
        first_statistics: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, num_timesteps, neuron, first_statistics)
        if connect not in get_args(Connect):
            raise Mistake(f"student.connect={connect}: must be one of {', '.join(get_args(Connect))}")
        if drop_path_rate > 0 and connect != "ADD":
            raise Mistake(f"student.drop_path={drop_path_rate} needs student.connect=ADD, not {connect}")
        kernel = 3 if small_stem else 7
        self.conv1 = nn.Conv2d(in_chans, width, kernel, 2, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.sn1 = self.make_neuron(width)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        make_block = partial(block, connect=connect, make_neuron=self.make_neuron)
        widths = [width * 2**stage for stage in range(len(depths))]
        self.make_classifier(self.make_stages(make_block, widths, depths, 1, drop_path_rate))
        self.init_weights(zero_init_last)

    def init_weights(self, zero_init_last: bool) -> None:
        """He initialisation of the convolutions, then as every student."""
        resnet.init_kaiming(self)
        super().init_weights(zero_init_last)


def _cfg(input_size: tuple[int, int, int] = (3, 224, 224)) -> dict[str, Any]:
    return {"input_size": input_size, "first_conv": "conv1", "classifier": "fc"}


default_cfgs = generate_default_cfgs(
    {f"sew_resnet{depth}": _cfg() for depth in (18, 34, 50, 101, 152)} | {"sew_resnet8": _cfg((3, 32, 32))}
)
register = base.register("connect", "width", "drop_path", "zero_init_last", "first_statistics")


@register
def sew_resnet8(pretrained: bool = False, **kwargs: Any) -> SEWResNet:
    """Three blocks of widths w, 2w, 4w (w = 24) behind a 3x3 stem of stride 2: for images of 28 or 32 pixels."""
    kwargs = {"width": 24, "small_stem": True} | kwargs
    return base.build(SEWResNet, "sew_resnet8", pretrained, block=BasicBlock, depths=(1, 1, 1), **kwargs)


@register
def sew_resnet18(pretrained: bool = False, **kwargs: Any) -> SEWResNet:
    """SEW-ResNet-18; see `SEWResNet` for the arguments."""
    return base.build(SEWResNet, "sew_resnet18", pretrained, block=BasicBlock, depths=(2, 2, 2, 2), **kwargs)


@register
def sew_resnet34(pretrained: bool = False, **kwargs: Any) -> SEWResNet:
    """SEW-ResNet-34; see `SEWResNet` for the arguments."""
    return base.build(SEWResNet, "sew_resnet34", pretrained, block=BasicBlock, depths=(3, 4, 6, 3), **kwargs)


@register
def sew_resnet50(pretrained: bool = False, **kwargs: Any) -> SEWResNet:
    """SEW-ResNet-50; see `SEWResNet` for the arguments."""
    return base.build(SEWResNet, "sew_resnet50", pretrained, block=Bottleneck, depths=(3, 4, 6, 3), **kwargs)


@register
def sew_resnet101(pretrained: bool = False, **kwargs: Any) -> SEWResNet:
    """SEW-ResNet-101; see `SEWResNet` for the arguments."""
    return base.build(SEWResNet, "sew_resnet101", pretrained, block=Bottleneck, depths=(3, 4, 23, 3), **kwargs)


@register
def sew_resnet152(pretrained: bool = False, **kwargs: Any) -> SEWResNet:
    """SEW-ResNet-152; see `SEWResNet` for the arguments."""
    return base.build(SEWResNet, "sew_resnet152", pretrained, block=Bottleneck, depths=(3, 8, 36, 3), **kwargs)

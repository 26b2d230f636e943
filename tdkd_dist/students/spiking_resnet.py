"""The paper's CIFAR and CIFAR10-DVS students: ResNets with a spiking neuron for every ReLU (Yu et al. 2025).

Shapes: x is `[T*B, C, H, W]`, T-major; x_TBC the pooled features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students import base, resnet
from tdkd_dist.students.resnet import conv3x3


class PostactBlock(resnet.ResidualBlock):
    """conv3x3 - BN - neuron - conv3x3 - BN, plus the shortcut, then a neuron."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        drop_path: float,
        *,
        make_neuron: Callable[[int], SpikingNeuron],
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.conv1, self.bn1, self.sn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width), make_neuron(width)
        self.conv2, self.bn2, self.sn2 = conv3x3(width, width), nn.BatchNorm2d(width), make_neuron(width)
        self.downsample = resnet.downsample(in_channels, width, stride)
        self.drop_path = resnet.TemporalDropPath(drop_path, self.sn1.num_timesteps)

    def forward(self, x: Tensor) -> Tensor:
        """Spikes `[T*B, C, H, W]` in and out."""
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        spikes: Tensor = self.sn2(out + (x if self.downsample is None else self.downsample(x)))
        return spikes

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The residual branch's last batch norm."""
        return self.bn2


class SpikingResNet(resnet.SpikingResNetBase):
    """Stem conv3x3 - BN - neuron at full resolution, then `PostactBlock`s.

    `hidden` puts a linear layer of so many units and a neuron before the classifier; `width` is the first stage's.
    Initialisation is PyTorch's default, as in the released code. `zero_init_last` starts each block's last BN weight
    at 0, `drop_path_rate` is the last block's.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        hidden: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        num_timesteps: int = 4,
        neuron: NeuronConfig | None = None,
        width: int = 64,
        zero_init_last: bool = False,
        drop_path_rate: float = 0.0,
        first_statistics: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, num_timesteps, neuron, first_statistics)
        self.conv1 = conv3x3(in_chans, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.sn1 = self.make_neuron(width)
        self.maxpool = nn.Identity()
        block = partial(PostactBlock, make_neuron=self.make_neuron)
        widths = [width * 2**stage for stage in range(len(depths))]
        features = self.make_stages(block, widths, depths, 1, drop_path_rate)
        self.fc1 = nn.Linear(features, hidden) if hidden else None
        self.sn_fc1 = self.make_neuron(hidden) if hidden else None
        self.make_classifier(features, hidden)
        self.init_weights(zero_init_last)

    def forward_head(self, x_TBCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[T, B, K]` of `forward_features`' maps, or with `pre_logits` what the last linear layer reads."""
        x_TBC = x_TBCHW.mean((3, 4))
        if self.fc1 is not None and self.sn_fc1 is not None:
            x_TBC = self.sn_fc1(self.fc1(x_TBC).flatten(0, 1)).view(*x_TBC.shape[:2], -1)
        return x_TBC if pre_logits else self.classify(x_TBC)


default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc", **resnet.CIFAR10}
        for name in ("spiking_resnet18", "spiking_resnet19")
    }
)
register = base.register("width", "drop_path", "zero_init_last", "first_statistics")


@register
def spiking_resnet18(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """2, 2, 2, 2 blocks of widths 64 to 512; see `SpikingResNet` for the arguments."""
    return base.build(SpikingResNet, "spiking_resnet18", pretrained, depths=(2, 2, 2, 2), **kwargs)


@register
def spiking_resnet19(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """3, 3, 2 blocks of widths 128 to 512 and a hidden layer of 256; see `SpikingResNet` for the arguments."""
    kwargs = {"width": 128, "hidden": 256} | kwargs
    return base.build(SpikingResNet, "spiking_resnet19", pretrained, depths=(3, 3, 2), **kwargs)

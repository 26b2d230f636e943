"""The ReLU networks that taught the paper's CIFAR and CIFAR10-DVS students: ResNets for small images (Yu et al. 2025).

timm has no ResNet with a 3x3 stem at full resolution, nor one that is as narrow or as short as a student that it is
compared with. Names of the parameters are torchvision's.

Shapes: x is `[B, C, H, W]`.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import relu

from tdkd_dist.students import base, resnet
from tdkd_dist.students.resnet import conv3x3


class ReluBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, plus the shortcut, then a ReLU."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = resnet.downsample(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` in and out."""
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + (x if self.downsample is None else self.downsample(x)))


class ReluResNet(nn.Module):
    """Stem conv3x3 - BN - ReLU, `ReluBlock`s, spatial mean, classifier behind an optional hidden layer.

    `stem_stride` is that convolution's. `small_stem=False`: a 7x7 one of stride 2 and a max-pool, for 224 pixels.
    """

    default_cfg: dict[str, Any]

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 64,
        hidden: int | None = None,
        small_stem: bool = True,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if small_stem:
            self.conv1 = conv3x3(in_chans, width, stem_stride)
        else:
            self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        channels = width
        self.stages = [f"layer{stage + 1}" for stage in range(len(depths))]
        for stage, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(ReluBlock(channels, width * 2**stage, 2 if i == 0 and stage > 0 else 1))
                channels = width * 2**stage
            setattr(self, name, blocks)
        self.num_features, self.head_hidden_size = channels, hidden or channels
        self.fc1 = nn.Linear(channels, hidden) if hidden else None
        self.reset_classifier(num_classes)
        resnet.init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` for images `[B, C, H, W]`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps, before pooling."""
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`' maps, or with `pre_logits` what `fc` reads."""
        x = x.mean((2, 3))
        if self.fc1 is not None:
            x = relu(self.fc1(x))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes`; 0: none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()


default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc", **resnet.CIFAR10}
        for name in ("cifar_resnet18", "cifar_resnet19", "cifar_resnet34")
    }
    | {
        name: {"input_size": (3, size, size), "first_conv": "conv1", "classifier": "fc"}
        for name, size in (("relu_resnet8", 32), ("relu_resnet18", 224))
    }
)
register = base.register("width", spiking=False)


@register
def relu_resnet8(pretrained: bool = False, **kwargs: Any) -> ReluResNet:
    """Three blocks of widths 24, 48, 96 and a stem of stride 2: the ordinary network beside `sew_resnet8`."""
    kwargs = {"width": 24} | kwargs
    return base.build(ReluResNet, "relu_resnet8", pretrained, depths=(1, 1, 1), stem_stride=2, **kwargs)


@register
def relu_resnet18(pretrained: bool = False, **kwargs: Any) -> ReluResNet:
    """torchvision's ResNet-18 with a choice of width: the ordinary network beside `sew_resnet18`."""
    return base.build(ReluResNet, "relu_resnet18", pretrained, depths=(2, 2, 2, 2), small_stem=False, **kwargs)


@register
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> ReluResNet:
    """2, 2, 2, 2 blocks of widths 64 to 512."""
    return base.build(ReluResNet, "cifar_resnet18", pretrained, depths=(2, 2, 2, 2), **kwargs)


@register
def cifar_resnet34(pretrained: bool = False, **kwargs: Any) -> ReluResNet:
    """3, 4, 6, 3 blocks of widths 64 to 512: the paper's CIFAR teacher."""
    return base.build(ReluResNet, "cifar_resnet34", pretrained, depths=(3, 4, 6, 3), **kwargs)


@register
def cifar_resnet19(pretrained: bool = False, **kwargs: Any) -> ReluResNet:
    """3, 3, 2 blocks of widths 128 to 512 and a hidden layer of 256: the paper's CIFAR10-DVS teacher."""
    kwargs = {"width": 128, "hidden": 256} | kwargs
    return base.build(ReluResNet, "cifar_resnet19", pretrained, depths=(3, 3, 2), **kwargs)

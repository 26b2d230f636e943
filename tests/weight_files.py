"""Students with statistics that are not the ones they start with, and what their files say of images."""

import torch
from torch import nn

from tdkd_dist.config import StudentConfig
from tdkd_dist.students import create_student

SMALL = {"num_classes": 5, "num_timesteps": 3, "width": 8}
SHOWN = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def trained(config: StudentConfig) -> nn.Module:
    """A student whose batch norms are not the ones it starts with."""
    torch.manual_seed(0)
    net = create_student(config)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.8, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0.3, 0.2)
    return net.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

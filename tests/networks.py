"""Small students in float64 for the tests, and all that a pass through one computes."""

import timm
import torch
from torch import nn

T, B, K = 3, 2, 5


def student(name: str, **kwargs: object) -> nn.Module:
    """A narrow one in float64, with batch norms that are not the identity and make every stage fire."""
    torch.manual_seed(0)
    net = timm.create_model(name, **{"num_classes": K, "num_timesteps": T, "width": 8} | kwargs).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.6)
                module.bias.normal_(0.4, 0.2)
                module.momentum = 1.0  # the first batch's statistics
        net.train()(images(net.in_chans))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return net.eval()


def images(channels: int = 3, seed: int = 1, batch: int = B, frames: int | None = None) -> torch.Tensor:
    shape = (batch, channels, 32, 32) if frames is None else (frames, batch, channels, 32, 32)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits, gradients of input and parameters, and buffers after the pass."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    logits = net(x)
    weights = torch.randn(logits.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    (logits * weights).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [logits.detach(), x.grad, *gradients, *(b.clone() for b in net.buffers())]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        scale = max(other.abs().max().item(), 1.0)
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)

"""Colour jitter of whole batches, on the device, the same for every file format.

Shapes: B pictures, C = 3 channels, H and W pixels.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tdkd_dist.data.crops import EXTRA_DRAWS, Ints, uniform_draws

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and Pillow


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation of each picture times a factor in [1 - strength, 1 + strength].

    What torchvision's `ColorJitter(strength, strength, strength)` does, the random order of the three included, with
    draws that are a function of (seed, epoch, sample index).
    """

    strength: float
    seed: int

    def __call__(self, images_BCHW: Tensor, epoch: int, indices_B: Ints) -> Tensor:
        """The jittered pictures, uint8 in and out; `indices_B` are their samples."""
        draws_BD = torch.from_numpy(uniform_draws(self.seed, epoch, indices_B, EXTRA_DRAWS + 6)[:, EXTRA_DRAWS:])
        factors_B3 = 1 + self.strength * (2 * draws_BD[:, :3] - 1)
        orders_B3 = draws_BD[:, 3:].argsort(dim=1)
        return jitter(images_BCHW, factors_B3, orders_B3)


def jitter(images_BCHW: Tensor, factors_B3: Tensor, orders_B3: Tensor) -> Tensor:
    """uint8 pictures with brightness, contrast and saturation times `factors_B3`, in the order of `orders_B3`.

    Each of the three moves a picture away from or towards a reference: black, its mean luma, its luma.
    """
    B = len(images_BCHW)
    factors_B3 = _sent(factors_B3.float(), images_BCHW.device)
    orders_B3 = _sent(orders_B3, images_BCHW.device)
    luma_C11 = _luma(images_BCHW.device).view(3, 1, 1)
    x_BCHW = images_BCHW.float()
    for k in range(3):
        which_B111 = orders_B3[:, k].view(B, 1, 1, 1)
        factor_B111 = factors_B3.gather(1, orders_B3[:, k : k + 1]).view(B, 1, 1, 1)
        grey_B1HW = (x_BCHW * luma_C11).sum(1, keepdim=True)
        mean_B111 = grey_B1HW.mean((2, 3), keepdim=True)
        reference_B1HW = torch.where(which_B111 == 0, 0.0, torch.where(which_B111 == 1, mean_B111, grey_B1HW))
        x_BCHW = (factor_B111 * x_BCHW + (1 - factor_B111) * reference_B1HW).clamp_(0, 255)
    return x_BCHW.round_().to(torch.uint8)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device, without waiting for the work queued there, which a copy from pageable memory does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@cache
def _luma(device: torch.device) -> Tensor:
    return torch.tensor(_LUMA, device=device)


def augment_seed(seed: int, epoch: int, index: int) -> int:
    """A seed for libraries that draw for themselves, a function of (seed, epoch, sample index)."""
    draw = uniform_draws(seed, epoch, np.array([index]), EXTRA_DRAWS + 7)[0, EXTRA_DRAWS + 6]
    return int(draw * 2**53)

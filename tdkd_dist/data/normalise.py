"""From the loaders' bytes to a network's input, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 images `[B, 3, H, W]` to float32 with the given mean and standard deviation (of intensities in 0..1)."""

    scale_C: Tensor
    shift_C: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        std_C = torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale_C", (1 / (255 * std_C)).float())
        self.register_buffer("shift_C", (-torch.tensor(mean, dtype=torch.float64) / std_C).float())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The normalised images, in the memory format they came in."""
        return images_BCHW.float() * self.scale_C[:, None, None] + self.shift_C[:, None, None]

"""From the loaders' bytes to a network's input, on the device.

Shapes: T frames, B batch, C channels, H and W pixels.
"""

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
        """The normalised images, in the memory format they came in; frames, which are float, as they are."""
        if images_BCHW.is_floating_point():
            return images_BCHW
        return images_BCHW.float() * self.scale_C[:, None, None] + self.shift_C[:, None, None]


def as_input(x: Tensor, num_timesteps: int | None) -> Tensor:
    """What a network is given of normalised images `[B, C, H, W]`, or of frames `[B, T, C, H, W]`.

    A spiking one sees the first `num_timesteps` frames, `[T, B, C, H, W]`; an ordinary one (None) their mean.
    """
    if x.ndim == 4:
        return x
    return x.mean(1) if num_timesteps is None else x[:, :num_timesteps].transpose(0, 1).contiguous()

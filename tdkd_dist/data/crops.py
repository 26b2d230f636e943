"""What is cut out of each picture, as a function of (seed, epoch, sample index) alone.

All of it is decided here, with numpy, before a pixel is read; FFCV's compiled loop and the ImageFolder reader only
carry the plan out. Hence the same crops for any world size, batch, number of threads and file format.

Shapes: B pictures, D uniform draws, P columns of a plan.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOP, LEFT, HEIGHT, WIDTH, DOWN, RIGHT, FLIP, ERASE_TOP, ERASE_LEFT, ERASE_HEIGHT, ERASE_WIDTH = range(11)
"""Columns of a plan, in the order of its steps: the source box, which is resized to the output; a move of the output by
(DOWN, RIGHT) over black; a flip; a box of the output to fill with one colour."""
PLAN_COLUMNS = 11

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ATTEMPTS = 10
EXTRA_DRAWS = 6 + 4 * _ATTEMPTS
"""The draws of a sample from this one on are left to other augmentations."""
_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ERASE_SCALE = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 3.3)


@dataclass(frozen=True)
class CropRule:
    """How pictures become squares of `size` pixels, or smaller ones in the first epochs."""

    size: int
    crop: Literal["random_resized", "shift", "none", "center"]
    flip: bool = False
    crop_pct: float = 1.0
    """`center`: side of the crop over the picture's shorter side."""
    seed: int = 0
    cutout: int = 0
    """Side of the square that is filled around a random pixel."""
    erasing: float = 0.0
    """Probability of filling a random box of 0.02 to 0.33 of the area (timm's random erasing)."""
    fill: tuple[int, int, int] = (0, 0, 0)
    start_size: int | None = None
    """Size in epoch 0; it grows in steps of 32 to `size` at epoch `full_size_epoch`."""
    full_size_epoch: int = 0

    def size_at(self, epoch: int) -> int:
        """Side of an epoch's pictures."""
        if self.start_size is None or epoch >= self.full_size_epoch:
            return self.size
        grown = self.start_size + (self.size - self.start_size) * epoch / self.full_size_epoch
        return min(self.size, max(self.start_size, 32 * round(grown / 32)))

    def plan(self, epoch: int, indices_B: Ints, heights_B: Ints, widths_B: Ints) -> Ints:
        """The plan [B, P] of the pictures `indices_B`, whose sizes are `heights_B` and `widths_B`."""
        plan_BP = np.zeros((len(indices_B), PLAN_COLUMNS), dtype=np.int64)
        plan_BP[:, HEIGHT], plan_BP[:, WIDTH] = heights_B, widths_B
        if self.crop == "center":
            plan_BP[:, TOP : WIDTH + 1] = center_boxes(heights_B, widths_B, self.crop_pct)
            return plan_BP
        draws_BD = uniform_draws(self.seed, epoch, indices_B, EXTRA_DRAWS)
        size = self.size_at(epoch)
        if self.flip:
            plan_BP[:, FLIP] = draws_BD[:, 0] < 0.5
        if self.crop == "random_resized":
            plan_BP[:, TOP : WIDTH + 1] = random_resized_boxes(heights_B, widths_B, draws_BD[:, 6:])
        elif self.crop == "shift":
            pad = size // 8
            plan_BP[:, DOWN : RIGHT + 1] = np.floor(draws_BD[:, 6:8] * (2 * pad + 1)) - pad
        if self.cutout:
            plan_BP[:, ERASE_TOP:] = cutout_boxes(size, self.cutout, draws_BD[:, 1:3])
        elif self.erasing:
            erase_B = draws_BD[:, 1] < self.erasing
            plan_BP[erase_B, ERASE_TOP:] = erased_boxes(size, draws_BD[erase_B, 2:6])
        return plan_BP


def uniform_draws(seed: int, epoch: int, indices_B: Ints, count: int) -> Floats:
    """Uniform numbers in [0, 1), [B, count]: row i depends on (seed, epoch, indices_B[i]) only.

    A counter-based generator (splitmix64): seeding numpy's own for every picture would cost more than cropping it.
    """
    key_B = np.full(len(indices_B), seed, dtype=np.int64).view(np.uint64)
    for part in (np.int64(epoch), indices_B.astype(np.int64)):
        key_B = _mix(key_B + _GOLDEN) ^ np.asarray(part).view(np.uint64)
    counter_D = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits_BD = _mix(_mix(key_B + _GOLDEN)[:, None] + counter_D) >> np.uint64(11)
    return bits_BD.astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def center_boxes(heights_B: Ints, widths_B: Ints, crop_pct: float) -> Ints:
    """(top, left, side, side) of the centre squares whose side is `crop_pct` of the shorter side, [B, 4]."""
    side_B = np.maximum(1, np.rint(crop_pct * np.minimum(heights_B, widths_B)).astype(np.int64))
    return np.stack([(heights_B - side_B) // 2, (widths_B - side_B) // 2, side_B, side_B], axis=1)


def random_resized_boxes(heights_B: Ints, widths_B: Ints, draws_BD: Floats) -> Ints:
    """(top, left, height, width) as torchvision's RandomResizedCrop draws them, [B, 4]: ten attempts, or the centre."""
    height_B1, width_B1 = heights_B[:, None], widths_B[:, None]
    area_BA, ratio_BA, top_BA, left_BA = np.split(draws_BD, 4, axis=1)
    area_BA = height_B1 * width_B1 * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * area_BA)
    low, high = np.log(_RATIO)
    ratio_BA = np.exp(low + (high - low) * ratio_BA)
    w_BA = np.rint(np.sqrt(area_BA * ratio_BA)).astype(np.int64)
    h_BA = np.rint(np.sqrt(area_BA / ratio_BA)).astype(np.int64)
    fits_BA = (w_BA > 0) & (w_BA <= width_B1) & (h_BA > 0) & (h_BA <= height_B1)
    top_BA = np.floor(top_BA * (height_B1 - h_BA + 1)).astype(np.int64)
    left_BA = np.floor(left_BA * (width_B1 - w_BA + 1)).astype(np.int64)
    first_B = fits_BA.argmax(axis=1)
    boxes_BA4 = np.stack([top_BA, left_BA, h_BA, w_BA], axis=2)
    boxes_B4 = boxes_BA4[np.arange(len(first_B)), first_B]
    return np.where(fits_BA.any(axis=1)[:, None], boxes_B4, _widest_boxes(heights_B, widths_B))


def cutout_boxes(size: int, side: int, draws_B2: Floats) -> Ints:
    """(top, left, height, width) of squares around a random pixel, clipped at the border, [B, 4]."""
    centre_B2 = np.floor(draws_B2 * size).astype(np.int64)
    first_B2 = np.maximum(0, centre_B2 - side // 2)
    last_B2 = np.minimum(size, centre_B2 - side // 2 + side)
    return np.concatenate([first_B2, last_B2 - first_B2], axis=1)


def erased_boxes(size: int, draws_B4: Floats) -> Ints:
    """(top, left, height, width) of boxes with timm's areas and ratios, [B, 4]."""
    area_B = size**2 * (_ERASE_SCALE[0] + (_ERASE_SCALE[1] - _ERASE_SCALE[0]) * draws_B4[:, 0])
    low, high = np.log(_ERASE_RATIO)
    ratio_B = np.exp(low + (high - low) * draws_B4[:, 1])
    sides_B2 = np.rint(np.sqrt(np.stack([area_B * ratio_B, area_B / ratio_B], axis=1))).astype(np.int64)
    sides_B2 = np.clip(sides_B2, 1, size)
    return np.concatenate([np.floor(draws_B4[:, 2:] * (size - sides_B2 + 1)).astype(np.int64), sides_B2], axis=1)


def _widest_boxes(heights_B: Ints, widths_B: Ints) -> Ints:
    h_B = np.where(widths_B < _RATIO[0] * heights_B, np.rint(widths_B / _RATIO[0]).astype(np.int64), heights_B)
    w_B = np.where(widths_B > _RATIO[1] * heights_B, np.rint(heights_B * _RATIO[1]).astype(np.int64), widths_B)
    return np.stack([(heights_B - h_B) // 2, (widths_B - w_B) // 2, h_B, w_B], axis=1)

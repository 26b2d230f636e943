"""From the frames of event recordings as stored to what a network sees, a function of (seed, epoch, sample).

As on CIFAR10-DVS (Li et al. 2022, "Neuromorphic data augmentation"; the released code of Yu et al. 2025): frames are
resized bilinearly, mirrored with probability 1/2, and then exactly one of three things is done to all frames of a
sample alike: a roll of up to 5 pixels each way, a rotation of up to 30 degrees, or a square of 16 pixels set to 0.
All but the resize only moves or drops pixels, so that it is one gather. FFCV's compiled loop does both at once
(`frame_decoder`); what is here serves who has the counts at hand, on any device.

Shapes: B samples, T frames, S of them stored, C channels (polarities), H, W pixels, N = H * W.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tdkd_dist.data.crops import Floats, Ints, uniform_draws

ROLL, ROTATE, CUTOUT = 5, 30.0, 16
"""Pixels, degrees, pixels: at a side of 48."""
DRAWS = 4


@dataclass(frozen=True)
class FrameRule:
    """What becomes of stored frames."""

    frames: int
    """T: how many the network sees."""
    choice: Literal["first", "regroup"]
    """Of more than T stored frames: the first T, or sums of groups of as equal a number of frames as may be."""
    size: int
    """Side of the frames that the network sees."""
    flip: bool = False
    events: bool = False
    """Whether to roll, rotate or cut out."""
    seed: int = 0

    def __call__(self, frames_BSCHW: Tensor, epoch: int, indices_B: Ints) -> Tensor:
        """Float32 frames `[B, T, C, size, size]` of stored counts `[B, S, C, H, W]`, on their device."""
        x_BTCHW = self._resize(choose(frames_BSCHW, self.frames, self.choice))
        if not (self.flip or self.events):
            return x_BTCHW
        from_BN = torch.from_numpy(self.sources(epoch, indices_B)).to(x_BTCHW.device, non_blocking=True)
        kept_BN = from_BN >= 0
        T, C = x_BTCHW.shape[1:3]
        index_BTCN = from_BN.clamp(min=0)[:, None, None].expand(-1, T, C, -1)
        moved_BTCN = x_BTCHW.flatten(-2).gather(-1, index_BTCN) * kept_BN[:, None, None]
        return moved_BTCN.view_as(x_BTCHW)

    def _resize(self, x_BTCHW: Tensor) -> Tensor:
        if x_BTCHW.shape[-2:] == (self.size, self.size):
            return x_BTCHW.contiguous()
        resized = F.interpolate(x_BTCHW.flatten(0, 1), (self.size, self.size), mode="bilinear", align_corners=False)
        return resized.view(*x_BTCHW.shape[:3], self.size, self.size)

    def sources(self, epoch: int, indices_B: Ints) -> Ints:
        """Which pixel each pixel is taken from, [B, N], row-major; -1: none, it is 0."""
        draws_BD = uniform_draws(self.seed, epoch, indices_B, DRAWS)
        y_BHW, x_BHW = (
            np.broadcast_to(a, (len(indices_B), self.size, self.size)) for a in np.indices((self.size,) * 2)
        )
        kept_BHW = np.ones(y_BHW.shape, bool)
        if self.events:
            y_BHW, x_BHW, kept_BHW = self._one_of_three(draws_BD, y_BHW, x_BHW)
        if self.flip:
            x_BHW = np.where((draws_BD[:, 0] < 0.5)[:, None, None], self.size - 1 - x_BHW, x_BHW)
        return np.where(kept_BHW, y_BHW * self.size + x_BHW, -1).reshape(len(indices_B), -1).astype(np.int64)

    def _one_of_three(self, draws_BD: Floats, y_BHW: Ints, x_BHW: Ints) -> tuple[Ints, Ints, Ints]:
        """Where each pixel comes from in the mirrored frames, and whether it does."""
        which_B11 = np.floor(3 * draws_BD[:, 1]).astype(np.int64)[:, None, None]
        a_B11, b_B11 = draws_BD[:, 2, None, None], draws_BD[:, 3, None, None]
        down_B11, right_B11 = (np.floor((2 * ROLL + 1) * d).astype(np.int64) - ROLL for d in (a_B11, b_B11))
        rolled = (y_BHW - down_B11) % self.size, (x_BHW - right_B11) % self.size
        turned = _rotated(np.deg2rad(ROTATE * (2 * a_B11 - 1)), y_BHW, x_BHW, self.size)
        inside_BHW = (np.minimum(*turned) >= 0) & (np.maximum(*turned) < self.size)
        top_B11, left_B11 = (np.floor(self.size * d).astype(np.int64) - CUTOUT // 2 for d in (a_B11, b_B11))
        box_BHW = (y_BHW >= top_B11) & (y_BHW < top_B11 + CUTOUT) & (x_BHW >= left_B11) & (x_BHW < left_B11 + CUTOUT)
        y, x = (
            np.where(which_B11 == 0, r, np.where(which_B11 == 1, t, own))
            for r, t, own in zip(rolled, turned, (y_BHW, x_BHW), strict=True)
        )
        kept_BHW = np.where(which_B11 == 1, inside_BHW, np.where(which_B11 == 2, ~box_BHW, True))
        return np.where(kept_BHW, y, 0), np.where(kept_BHW, x, 0), kept_BHW


def bilinear(old: int, new: int) -> tuple[Ints, Ints, NDArray[np.float32]]:
    """Of a side resized from `old` to `new` pixels: the two that each new one lies between, and the second's weight.

    As `torch.nn.functional.interpolate` places them with `align_corners=False`.
    """
    at = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
    first = np.minimum(at.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (at - first).astype(np.float32)


def groups(stored: int, count: int, choice: str) -> Ints:
    """Where the stored frames that make each of `count` frames begin and end, [count, 2]."""
    if choice == "first":
        return np.stack([np.arange(count), np.arange(1, count + 1)], axis=1)
    ends = np.arange(count + 1) * stored // count
    return np.stack([ends[:-1], ends[1:]], axis=1)


def choose(frames_BSCHW: Tensor, count: int, choice: str) -> Tensor:
    """Float32 `[B, count, C, H, W]`: the first of the stored frames, or sums of groups of them."""
    stored = frames_BSCHW.shape[1]
    if choice == "first" or count == stored:
        return frames_BSCHW[:, :count].float()
    parts = groups(stored, count, choice)
    return torch.stack([frames_BSCHW[:, start:end].sum(1, dtype=torch.float32) for start, end in parts], dim=1)


def _rotated(angle_B11: Floats, y_BHW: Ints, x_BHW: Ints, size: int) -> tuple[Ints, Ints]:
    """The pixel that a rotation about the centre, counter-clockwise as one looks at it, brings to each; the nearest."""
    centre = (size - 1) / 2
    dy, dx = y_BHW - centre, x_BHW - centre
    cos, sin = np.cos(angle_B11), np.sin(angle_B11)
    return (
        np.rint(dy * cos + dx * sin + centre).astype(np.int64),
        np.rint(dx * cos - dy * sin + centre).astype(np.int64),
    )

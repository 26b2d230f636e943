"""What becomes of the frames of event recordings: against loops over pixels, and torchvision.

Shapes: B samples, T frames, S of them stored, C channels, H, W pixels.
"""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from tdkd_dist.data import frames
from tdkd_dist.data.crops import uniform_draws
from tdkd_dist.data.frames import CUTOUT, ROLL, ROTATE, FrameRule, choose


def counts(batch: int = 12, stored: int = 3, size: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (batch, stored, 2, size, size), dtype=torch.uint8, generator=generator)


def slowly(picture_TCHW: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Mirrored, then one of the three, a pixel at a time."""
    size, (flip, which, a, b) = picture_TCHW.shape[-1], draws
    old = picture_TCHW.flip(-1) if flip < 0.5 else picture_TCHW
    new = torch.zeros_like(old)
    down, right = int((2 * ROLL + 1) * a) - ROLL, int((2 * ROLL + 1) * b) - ROLL
    angle, centre = np.deg2rad(ROTATE * (2 * a - 1)), (size - 1) / 2
    top, left = int(size * a) - CUTOUT // 2, int(size * b) - CUTOUT // 2
    for y in range(size):
        for x in range(size):
            if which < 1 / 3:
                new[..., (y + down) % size, (x + right) % size] = old[..., y, x]
            elif which < 2 / 3:
                dy, dx = y - centre, x - centre
                from_y = round(dy * np.cos(angle) + dx * np.sin(angle) + centre)
                from_x = round(dx * np.cos(angle) - dy * np.sin(angle) + centre)
                if 0 <= from_y < size and 0 <= from_x < size:
                    new[..., y, x] = old[..., from_y, from_x]
            elif not (top <= y < top + CUTOUT and left <= x < left + CUTOUT):
                new[..., y, x] = old[..., y, x]
    return new


def test_every_pixel_is_the_slow_reference_s():
    x, indices = counts(), np.arange(100, 112)
    rule = FrameRule(3, "first", 48, flip=True, events=True, seed=7)
    draws = uniform_draws(7, 2, indices, frames.DRAWS)
    assert len({int(3 * which) for which in draws[:, 1]}) == 3
    want = torch.stack([slowly(x[k].float(), draws[k]) for k in range(len(x))])
    assert torch.equal(rule(x, 2, indices), want)


def test_a_rotation_is_torchvision_s():
    x, indices = counts(40, 1), np.arange(40)
    rule = FrameRule(1, "first", 48, events=True)
    draws = uniform_draws(0, 0, indices, frames.DRAWS)
    turned = [k for k in range(40) if 1 / 3 <= draws[k, 1] < 2 / 3]
    assert len(turned) > 5
    ours = rule(x, 0, indices)
    for k in turned:
        theirs = TF.rotate(x[k].float(), ROTATE * (2 * draws[k, 2] - 1))
        assert (ours[k] == theirs).float().mean() > 0.99  # a pixel halfway between two is rounded either way


def test_a_sample_s_draw_depends_on_nothing_else():
    x = counts(8)
    rule = FrameRule(3, "first", 48, flip=True, events=True, seed=3)
    together = rule(x, 5, np.arange(8))
    order = np.array([6, 1, 3])
    assert torch.equal(rule(x[order], 5, order), together[order])
    assert not torch.equal(rule(x, 6, np.arange(8)), together)


def test_frames_are_resized_bilinearly():
    x = counts(2, 3, 128)
    got = FrameRule(3, "first", 48)(x, 0, np.arange(2))
    want = torch.stack([TF.resize(sample.float(), [48, 48], antialias=False) for sample in x])
    assert got.shape == (2, 3, 2, 48, 48)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("stored", "wanted"), [(10, 4), (10, 10), (10, 1), (7, 3)])
def test_fewer_frames_than_stored(stored, wanted):
    x = counts(2, stored, 6)
    assert torch.equal(choose(x, wanted, "first"), x[:, :wanted].float())
    grouped = choose(x, wanted, "regroup")
    assert grouped.shape[1] == wanted
    assert torch.equal(grouped.sum(1), x.float().sum(1))  # no event is lost
    sizes = [stored * (k + 1) // wanted - stored * k // wanted for k in range(wanted)]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(grouped[:, 0], x[:, : sizes[0]].float().sum(1))

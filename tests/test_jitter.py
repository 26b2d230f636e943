"""Colour jitter against torchvision's own functions, one picture at a time."""

from collections.abc import Generator

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from tdkd_dist.data.batch import Batch
from tdkd_dist.data.crops import Ints
from tdkd_dist.data.jitter import ColorJitter, jitter
from tdkd_dist.data.loaders import TrainLoader

STEPS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)


def pictures(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 9, 7), dtype=np.uint8))


def test_jitter_is_torchvisions_in_any_order() -> None:
    images, generator = pictures(24), torch.Generator().manual_seed(1)
    factors = 2 * torch.rand(24, 3, generator=generator)
    orders = torch.rand(24, 3, generator=generator).argsort(1)
    assert len({tuple(order) for order in orders.tolist()}) == 6
    for image, factor, order, ours in zip(images, factors, orders, jitter(images, factors, orders), strict=True):
        expected = image.double() / 255
        for k in order.tolist():
            expected = STEPS[k](expected, float(factor[k]))
        # Half for rounding, the rest because torchvision's first luma weight is .2989.
        assert (ours.double() - 255 * expected).abs().max() <= 0.55


def test_factors_fill_the_interval_and_0_changes_nothing() -> None:
    images = pictures(200)
    assert torch.equal(ColorJitter(0.0, 3)(images, 0, np.arange(200)), images)
    grey = torch.full((2000, 3, 2, 2), 100, dtype=torch.uint8)
    # Contrast and saturation leave a grey picture alone.
    brightness = ColorJitter(0.4, 3)(grey, 0, np.arange(2000))[:, 0, 0, 0].double() / 100
    assert brightness.min() < 0.61
    assert brightness.max() > 1.39
    assert brightness.mean().item() == pytest.approx(1, abs=0.02)


class Bare:
    """A reader whose pictures are a function of the index alone."""

    def batches(self, order: Ints, epoch: int) -> Generator[Batch]:
        images = pictures(40)
        for start in range(0, len(order), 4):
            part = torch.from_numpy(order[start : start + 4])
            yield images[part], part

    def close(self) -> None: ...


def test_a_sample_is_jittered_alike_at_any_world_size_and_after_continuing() -> None:
    def seen(rank: int, world: int, epoch: int = 2, start: int = 0) -> dict[int, bytes]:
        loader = TrainLoader(
            Bare(), 40, None, batch_size=8, rank=rank, world_size=world, seed=5, jitter=ColorJitter(0.4, 5)
        )
        batches = loader.epoch(epoch, start)
        return {int(y): x.numpy().tobytes() for images, labels in batches for x, y in zip(images, labels, strict=True)}

    whole = seen(0, 1)
    assert len(whole) == 40
    assert seen(0, 2) | seen(1, 2) == whole
    assert seen(0, 1, start=3).items() <= whole.items()
    other = seen(0, 1, epoch=3)
    assert sum(whole[i] == other[i] for i in whole) < 4

"""With which pixels a sample comes. Oracles: torchvision's transforms, OpenCV's and Pillow's resizing of the source."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import CPU, SIZE, Numbered, config, seen
from PIL import Image

from tdkd_dist.config import DataConfig
from tdkd_dist.data import crops
from tdkd_dist.data.beton.manifest import WriteOptions
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.crops import CropRule
from tdkd_dist.data.loaders import (
    TrainLoader,
    ValLoader,
    make_train_loader,
    make_val_loader,
    train_rule,
)
from tdkd_dist.data.sources.source import Image as Pixels


def picture_and_batch(data: DataConfig, epoch: int | None) -> Iterator[tuple[Pixels, crops.Ints, Pixels]]:
    """(source picture, its plan, what the loader made of it) of every sample."""
    kwargs = {"batch_size": 50, "rank": 0, "world_size": 1, "device": CPU, "workers": 2}
    if epoch is None:
        loader: TrainLoader | ValLoader = make_val_loader(data, **kwargs)  # type: ignore[arg-type]
        rule, batches = CropRule(data.image_size, "center", crop_pct=data.crop_pct), iter(loader)  # type: ignore[arg-type]
    else:
        loader = make_train_loader(data, micro_batch=50, seed=5, **kwargs)  # type: ignore[arg-type]
        rule, batches = train_rule(data, 5), loader.epoch(epoch)
    source = Numbered(203)
    for images, labels in batches:
        for image, label in zip(images.numpy().copy(), labels.tolist(), strict=True):
            pixels = source.read(label)
            index, height, width = (np.array([n]) for n in (label, *pixels.shape[:2]))
            yield pixels, rule.plan(epoch or 0, index, height, width)[0], image.transpose(1, 2, 0)
    loader.close()


def resized(pixels: Pixels, box: crops.Ints, size: int, format: str) -> Pixels:
    top, left, height, width = (int(n) for n in box)
    part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    if format == "ffcv":
        cv2 = pytest.importorskip("cv2")
        return np.asarray(cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA))
    return np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
@pytest.mark.parametrize("crop", ["random_resized", "none"])
def test_training_pixels(folder: Path, format: str, crop: str) -> None:
    flips = 0
    for pixels, plan, image in picture_and_batch(config(folder, 203, format, crop=crop), epoch=4):
        expected = resized(pixels, plan[:4], SIZE, format)
        expected = expected[:, ::-1] if plan[crops.FLIP] else expected
        assert np.abs(image.astype(int) - expected).max() <= 1
        flips += int(plan[crops.FLIP])
    assert 70 < flips < 130


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_shifted_pixels_are_torchvisions_padded_crop(folder: Path, format: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    moves = set()
    for pixels, plan, image in picture_and_batch(config(folder, 203, format, crop="shift"), epoch=0):
        whole = np.array([0, 0, *pixels.shape[:2]])
        padded = functional.pad(Image.fromarray(resized(pixels, whole, SIZE, format)), SIZE // 8)
        down, right = int(plan[crops.DOWN]), int(plan[crops.RIGHT])
        expected = functional.crop(padded, SIZE // 8 - down, SIZE // 8 - right, SIZE, SIZE)
        expected = functional.hflip(expected) if plan[crops.FLIP] else expected
        assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1
        moves.add((down, right))
    assert {d for d, _ in moves} == {r for _, r in moves} == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_cutout_is_a_black_square_around_any_pixel(folder: Path, format: str) -> None:
    centres = set()
    for pixels, plan, image in picture_and_batch(config(folder, 203, format, crop="none", cutout=6), epoch=0):
        expected = resized(pixels, np.array([0, 0, *pixels.shape[:2]]), SIZE, format)
        expected = (expected[:, ::-1] if plan[crops.FLIP] else expected).astype(int)
        top, left, height, width = plan[crops.ERASE_TOP :]
        assert 3 <= height <= 6
        assert 3 <= width <= 6
        # Less than six pixels only at a border.
        assert height == 6 or top == 0 or top + height == SIZE
        expected[top : top + height, left : left + width] = 0
        assert np.abs(image.astype(int) - expected).max() <= 1
        centres |= {(top, 0), (left, 1)}
    assert len(centres) > 20


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_random_erasing(folder: Path, format: str) -> None:
    erased = []
    data = config(folder, 203, format, crop="none", erasing=0.5, mean=(0.5, 0.25, 1.0), flip=False)
    for pixels, plan, image in picture_and_batch(data, epoch=0):
        expected = resized(pixels, np.array([0, 0, *pixels.shape[:2]]), SIZE, format).astype(int)
        top, left, height, width = plan[crops.ERASE_TOP :]
        expected[top : top + height, left : left + width] = (128, 64, 255)
        assert np.abs(image.astype(int) - expected).max() <= 1
        erased.append(height * width / SIZE**2)
    areas = np.array([area for area in erased if area])
    assert 70 < len(areas) < 130
    assert areas.min() > 0.01
    assert areas.max() < 0.38
    assert 0.13 < areas.mean() < 0.22


def test_crops_grow_with_the_epochs(folder: Path) -> None:
    data = DataConfig(train=str(folder / "203.beton"), image_size=224, start_size=128, full_size_epoch=10)
    rule = train_rule(data, 0)
    assert [rule.size_at(epoch) for epoch in range(12)] == [128] * 2 + [160] * 3 + [192] * 4 + [224] * 3
    for format in ("ffcv", "imagefolder"):
        data = config(folder, 203, format, start_size=8, full_size_epoch=1)
        kwargs = {"batch_size": 100, "micro_batch": 100, "rank": 0, "world_size": 1}
        loader = make_train_loader(data, seed=0, device=CPU, workers=1, **kwargs)
        fixed = make_train_loader(config(folder, 203, format), seed=0, device=CPU, workers=1, **kwargs)
        assert [images.shape[-1] for images, _ in loader.epoch(0)] == [8, 8]
        assert seen(loader.epoch(1)) == seen(fixed.epoch(1))
        loader.close()
        fixed.close()


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_validation_pixels(folder: Path, format: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    for pixels, _, image in picture_and_batch(config(folder, 203, format, crop_pct=0.5), epoch=None):
        side = round(0.5 * min(pixels.shape[:2]))
        height, width = pixels.shape[:2]
        box = np.array([(height - side) // 2, (width - side) // 2, side, side])
        assert np.abs(image.astype(int) - resized(pixels, box, SIZE, format)).max() <= 1
        if side == SIZE and (height - side) % 2 == (width - side) % 2 == 0:
            assert np.array_equal(image, functional.center_crop(Image.fromarray(pixels), [SIZE, SIZE]))


def test_pictures_of_the_right_size_come_through_unchanged(tmp_path: Path) -> None:
    class Fixed(Numbered):
        def read(self, index: int) -> Pixels:
            return np.random.default_rng(index).integers(0, 256, (28, 28, 3), dtype=np.uint8)

    pytest.importorskip("ffcv")
    write(Fixed(9), tmp_path / "x.beton")
    data = DataConfig(val=str(tmp_path / "x.beton"), image_size=28, crop_pct=1.0)
    loader = make_val_loader(data, batch_size=4, rank=0, world_size=1, device=CPU, workers=1)
    assert seen(loader) == [(i, Fixed(9).read(i).transpose(2, 0, 1).tobytes()) for i in range(9)]


def test_jpegs_and_raw_pictures_agree(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    found = []
    for share in (0.0, 1.0):
        path = tmp_path / f"{share}.beton"
        write(Numbered(40, lossless=False), path, WriteOptions(jpeg_share=share, quality=95))
        data = DataConfig(train=str(path), image_size=24)
        loader = make_train_loader(
            data, batch_size=40, micro_batch=40, rank=0, world_size=1, seed=0, device=CPU, workers=2
        )
        [(images, labels)] = [(x.clone(), y.clone()) for x, y in loader.epoch(0)]
        found.append((images.float(), labels))
    assert torch.equal(found[0][1], found[1][1])
    error = (found[0][0] - found[1][0]).abs()
    assert 0 < error.mean() < 6


# ---- the draws ----


def test_boxes_are_distributed_as_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    stats = pytest.importorskip("scipy.stats")
    count, height, width = 4000, 375, 500
    sizes = np.full(count, height), np.full(count, width)
    draws = crops.uniform_draws(0, 0, np.arange(count), 40)
    ours = crops.random_resized_boxes(*sizes, draws).astype(float)
    picture = torch.empty(3, height, width)
    torch.manual_seed(0)
    params = transforms.RandomResizedCrop.get_params
    theirs = np.array([params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float)
    for ours_column, theirs_column in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(ours_column, theirs_column).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20000), st.integers(1, 20000)), min_size=1, max_size=20),
    epoch=st.integers(0, 1000),
    crop=st.sampled_from(["random_resized", "shift", "none", "center"]),
)
@settings(max_examples=200, deadline=None)
def test_boxes_lie_inside_their_pictures(sizes: list[tuple[int, int]], epoch: int, crop: str) -> None:
    heights, widths = np.array(sizes).T
    rule = CropRule(32, crop, flip=True, crop_pct=0.875, seed=epoch)  # type: ignore[arg-type]
    plan = rule.plan(epoch, np.arange(len(sizes)), heights, widths)
    top, left, height, width = plan[:, :4].T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(height, width) >= 1).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()
    # A sample's plan does not depend on its neighbours in the batch.
    alone = [rule.plan(epoch, np.array([i]), heights[i : i + 1], widths[i : i + 1])[0] for i in range(len(sizes))]
    assert np.array_equal(plan, alone)


def test_draws_are_uniform_and_independent() -> None:
    stats = pytest.importorskip("scipy.stats")
    draws = crops.uniform_draws(7, 3, np.arange(20000), 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    neighbours = [draws[1:, 0], crops.uniform_draws(7, 4, np.arange(1, 20000), 1)[:, 0], draws[1:, 1]]
    neighbours.append(crops.uniform_draws(8, 3, np.arange(1, 20000), 1)[:, 0])
    correlation = np.corrcoef([draws[:-1, 0], *neighbours])
    assert np.abs(correlation - np.eye(5)).max() < 0.03
    assert np.array_equal(draws[[5, 3]], crops.uniform_draws(7, 3, np.array([5, 3]), 8))

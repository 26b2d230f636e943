"""Who sees which sample, with which pixels. Every sample's label is its own index, so that batches tell who is in them.

Oracles: brute force over the permutation, torchvision's transforms, OpenCV's and Pillow's resizing of the source.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdkd_dist.config import DataConfig
from tdkd_dist.data import crops, layout, staging
from tdkd_dist.data.beton import WriteOptions, check_beton, write
from tdkd_dist.data.crops import CropRule
from tdkd_dist.data.loaders import (
    Batch,
    Reader,
    TrainLoader,
    ValLoader,
    default_workers,
    make_train_loader,
    make_val_loader,
    train_rule,
)
from tdkd_dist.data.sources import FolderSource
from tdkd_dist.data.sources import Image as Pixels
from tdkd_dist.data.staging import staged

SIZE = 16
CPU = torch.device("cpu")
COUNTS = (1, 2, 7, 203)
WORLDS = (1, 2, 3, 5)


class Numbered:
    """`count` pictures of several sizes; the label of each is its index."""

    kind, path, class_names = "numbered", Path("numbered"), None

    def __init__(self, count: int, lossless: bool = True):
        self.labels, self.lossless = np.arange(count), lossless

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Pixels:
        rng = np.random.default_rng(index)
        height, width = rng.integers(20, 60, 2)
        small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        return np.asarray(small.resize((int(width), int(height)), Image.Resampling.BICUBIC))

    def signature(self) -> str:
        return str(len(self.labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`N.beton` and the ImageFolder tree `N` of the same pictures, one class each, for every count."""
    root = tmp_path_factory.mktemp("data")
    for count in COUNTS:
        source = Numbered(count)
        write(source, root / f"{count}.beton")
        for i in range(count):
            (root / str(count) / f"{i:04d}").mkdir(parents=True)
            Image.fromarray(source.read(i)).save(root / str(count) / f"{i:04d}" / "x.png")
    return root


def config(folder: Path, count: int, format: str = "ffcv", **kwargs: object) -> DataConfig:
    path = str(folder / (f"{count}.beton" if format == "ffcv" else str(count)))
    return DataConfig(train=path, val=path, format=format, image_size=SIZE, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["ffcv", "imagefolder"])
def readers(request: pytest.FixtureRequest, folder: Path) -> Iterator[dict[int, Reader]]:
    """One reader a set, shared between ranks and world sizes: FFCV compiles each."""
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    made = {}
    for count in COUNTS:
        data = config(folder, count, request.param)
        loader = make_train_loader(
            data, batch_size=1, micro_batch=1, rank=0, world_size=1, seed=5, device=CPU, workers=2
        )
        made[count] = loader._reader
    yield made
    for reader in made.values():
        reader.close()


def train(reader: Reader, count: int, batch_size: int, rank: int, world: int) -> TrainLoader:
    return TrainLoader(reader, count, None, batch_size=batch_size, rank=rank, world_size=world, seed=5)


def seen(batches: Iterable[Batch]) -> list[tuple[int, bytes]]:
    """(index, pixels) of each sample, in order."""
    return [(int(y), x.numpy().tobytes()) for images, labels in batches for x, y in zip(images, labels, strict=True)]


# ---- who sees what ----


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", COUNTS)
def test_validation_sees_each_sample_exactly_once(readers: dict[int, Reader], count: int, world: int) -> None:
    parts = [seen(ValLoader(readers[count], count, None, rank=r, world_size=world)) for r in range(world)]
    assert sorted(index for part in parts for index, _ in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("count", "world"), [(n, w) for n in COUNTS for w in WORLDS if n >= w])
def test_training_epochs(readers: dict[int, Reader], count: int, world: int) -> None:
    batch_size = world * (3 if count == 203 else 1)
    epochs = []
    for epoch in (0, 1, 0):
        parts = [seen(train(readers[count], count, batch_size, r, world).epoch(epoch)) for r in range(world)]
        indices = [index for part in parts for index, _ in part]
        assert len(set(indices)) == len(indices) == count // batch_size * batch_size
        assert {len(part) for part in parts} == {count // batch_size * batch_size // world}
        epochs.append(parts)
    assert epochs[0] == epochs[2]
    if count == 203:
        order = [[index for part in parts for index, _ in part] for parts in epochs]
        assert order[0] != order[1]
        pixels = [dict(sample for part in parts for sample in part) for parts in epochs[:2]]
        both = pixels[0].keys() & pixels[1].keys()
        assert sum(pixels[0][i] == pixels[1][i] for i in both) < len(both) / 10


def test_a_step_is_the_same_samples_and_pixels_at_any_world_size(readers: dict[int, Reader]) -> None:
    batch_size = 30
    permutation = np.random.default_rng([5, 3]).permutation(203)
    whole = seen(train(readers[203], 203, batch_size, 0, 1).epoch(3))
    assert [index for index, _ in whole] == permutation[:180].tolist()
    for world in WORLDS:
        parts = [seen(train(readers[203], 203, batch_size, r, world).epoch(3)) for r in range(world)]
        share = batch_size // world
        for step in range(203 // batch_size):
            joined = [sample for part in parts for sample in part[step * share : (step + 1) * share]]
            assert joined == whole[step * batch_size : (step + 1) * batch_size]


@pytest.mark.parametrize("start", [1, 4, 6])
def test_continuing_in_mid_epoch_at_another_world_size(readers: dict[int, Reader], start: int) -> None:
    whole = seen(train(readers[203], 203, 30, 0, 1).epoch(2))
    for world in (1, 3):
        parts = [seen(train(readers[203], 203, 30, r, world).epoch(2, start_step=start)) for r in range(world)]
        share = 30 // world
        joined = [s for step in range(6 - start) for part in parts for s in part[step * share : (step + 1) * share]]
        assert joined == whole[start * 30 :]


def micro_batches(
    folder: Path, format: str, rank: int, world: int, micro: int, workers: int
) -> list[tuple[list[int], bytes]]:
    loader = make_train_loader(
        config(folder, 203, format),
        batch_size=16,
        micro_batch=micro,
        rank=rank,
        world_size=world,
        seed=5,
        device=CPU,
        workers=workers,
    )
    assert (loader.num_samples, loader.steps_per_epoch, loader.num_classes) == (203, 12, 203)
    found = [(y.tolist(), x.numpy().tobytes()) for x, y in loader.epoch(1)]
    loader.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_two_ranks_see_the_micro_batches_of_one_with_accumulation(folder: Path, format: str) -> None:
    """Also: micro-batches and numbers of threads do not matter."""
    # In a process of its own, since one that has compiled FFCV's code for two threads goes on with two.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        one = pool.submit(micro_batches, folder, format, 0, 1, 8, workers=1).result()
    two = [micro_batches(folder, format, rank, 2, 8, workers=2) for rank in (0, 1)]
    assert one[0::2] == two[0]
    assert one[1::2] == two[1]
    small = micro_batches(folder, format, 0, 1, 4, workers=2)
    assert [i for indices, _ in small for i in indices] == [i for indices, _ in one for i in indices]
    assert b"".join(pixels for _, pixels in small) == b"".join(pixels for _, pixels in one)


def test_batches_are_what_the_training_code_expects(folder: Path) -> None:
    for format in ("ffcv", "imagefolder"):
        loader = make_val_loader(
            config(folder, 203, format), batch_size=101, rank=0, world_size=1, device=CPU, workers=1
        )
        shapes = []
        for images, labels in loader:
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert images.is_contiguous(memory_format=torch.channels_last)
            shapes.append((tuple(images.shape), tuple(labels.shape)))
        assert shapes == [((101, 3, SIZE, SIZE), (101,))] * 2 + [((1, 3, SIZE, SIZE), (1,))]
        loader.close()


def test_a_batch_stays_valid_while_the_loader_runs_ahead(readers: dict[int, Reader]) -> None:
    loader = train(readers[203], 203, 1, 0, 1)
    expected = seen(loader.epoch(0))
    for i, (images, _) in enumerate(loader.epoch(0)):
        if i % 40 == 0:
            time.sleep(0.3)
        assert images.numpy()[0].tobytes() == expected[i][1]


# ---- which pixels ----


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


# ---- what goes wrong ----


def test_a_sample_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    path = tmp_path / "x.beton"
    write(Numbered(20, lossless=False), path, WriteOptions(jpeg_share=1))
    ptr, _ = layout.read_tables(path).place(13)
    content = bytearray(path.read_bytes())
    content[ptr : ptr + 20] = bytes(20)
    path.write_bytes(content)
    loader = make_val_loader(
        DataConfig(val=str(path), image_size=SIZE), batch_size=3, rank=0, world_size=1, device=CPU, workers=2
    )
    found, start = [], time.monotonic()

    def collect() -> None:
        for _, labels in loader:
            found.extend(labels.tolist())

    with pytest.raises(ValueError, match=rf"{path}: sample 13 cannot be decoded"):
        collect()
    assert found == list(range(12))
    assert time.monotonic() - start < 60
    assert loader_threads() == 0


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "a" / f"{i}.JPEG")
    (tmp_path / "a" / "4.JPEG").write_text("not a picture")
    data = DataConfig(val=str(tmp_path), image_size=SIZE, format="imagefolder")
    loader = make_val_loader(data, batch_size=2, rank=0, world_size=1, device=CPU, workers=1)
    with pytest.raises(ValueError, match=r"^[^\n]*a/4\.JPEG: not a readable picture[^\n]*$"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("readers", ["ffcv"], indirect=True)
def test_an_error_in_the_loader_thread_ends_the_iteration(readers: dict[int, Reader], monkeypatch: object) -> None:
    reader = readers[203]

    def fail(indices: object) -> None:
        raise MemoryError("no memory for the plan")

    monkeypatch.setattr(reader, "_plan_for", lambda epoch: fail)  # type: ignore[attr-defined]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"203\.beton: no memory for the plan"):
        next(reader.batches(np.arange(20), 0))
    assert time.monotonic() - start < 60


def loader_threads() -> int:
    return sum(type(thread).__name__ == "GuardedIterator" for thread in threading.enumerate())


def test_leaving_epochs_early_leaves_no_thread_behind(readers: dict[int, Reader]) -> None:
    loader = train(readers[203], 203, 1, 0, 1)
    for taken in (0, 1, 5, 199, 202):
        epoch = loader.epoch(0)
        for _ in range(taken):
            next(epoch)
        del epoch
        assert loader_threads() == 0
    assert len(seen(loader.epoch(1))) == 203
    assert loader_threads() == 0


def test_a_new_epoch_ends_the_one_before(readers: dict[int, Reader]) -> None:
    loader = train(readers[203], 203, 1, 0, 1)
    abandoned = loader.epoch(0)
    next(abandoned)
    assert len(seen(loader.epoch(1))) == 203
    assert loader_threads() == 0


def test_torchs_thread_count_is_the_callers(folder: Path) -> None:
    pytest.importorskip("ffcv")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = make_val_loader(config(folder, 7), batch_size=2, rank=0, world_size=1, device=CPU, workers=1)
        assert torch.get_num_threads() == 3
        for _ in loader:
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_users_mistakes_name_the_key(folder: Path, tmp_path: Path) -> None:
    kwargs = {"rank": 0, "world_size": 1, "seed": 0, "device": CPU, "workers": 1}

    def fails(data: DataConfig, message: str, batch_size: int = 2, micro_batch: int = 1) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            make_train_loader(data, batch_size=batch_size, micro_batch=micro_batch, **kwargs)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    for format in ("ffcv", "imagefolder"):
        fails(config(folder, 7, format), r"train\.batch_size=8: .* only 7 samples", batch_size=8)
        fails(config(folder, 7, format), r"train\.batch_size=6 does not divide", batch_size=6, micro_batch=4)
        fails(DataConfig(format=format), r"^data\.train is not set")  # type: ignore[arg-type]
        fails(DataConfig(train="/nonexistent", format=format), r"^data\.train=/nonexistent: no such")  # type: ignore[arg-type]
    fails(DataConfig(train=str(tmp_path), format="imagefolder"), "no class folders")
    (tmp_path / "a").mkdir()
    fails(DataConfig(train=str(tmp_path), format="imagefolder"), "no pictures in this class folder")


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_classes_must_agree_between_the_sets(tmp_path: Path, format: str) -> None:
    """A class that the validation set lacks would shift the labels of all after it."""
    for split, names in (("train", "abc"), ("val", "ac"), ("other", "abd"), ("same", "abc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / split / name / "x.png")
        write(FolderSource(tmp_path / split), tmp_path / f"{split}.beton")

    def open_val(split: str) -> None:
        train, val = (str(tmp_path / (s + (".beton" if format == "ffcv" else ""))) for s in ("train", split))
        data = DataConfig(train=train, val=val, format=format)  # type: ignore[arg-type]
        make_val_loader(data, batch_size=1, rank=0, world_size=1, device=CPU, workers=1).close()

    with pytest.raises(ValueError, match=r"^data\.val=.*: 2 classes, not 3 \(see b\), unlike data\.train's$"):
        open_val("val")
    with pytest.raises(ValueError, match=r"^data\.val=.*: class 2 is d, not c, unlike data\.train's$"):
        open_val("other")
    open_val("same")


def test_a_beton_without_a_manifest_is_taken_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ffcv")
    (tmp_path / "x.beton").write_bytes((folder / "7.beton").read_bytes())
    data = DataConfig(val=str(tmp_path / "x.beton"), image_size=SIZE)
    loader = make_val_loader(data, batch_size=7, rank=0, world_size=1, device=CPU, workers=1)
    assert loader.num_classes is None
    assert "has no manifest" in caplog.text


def test_staging_copies_once_a_node(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path))
    with ProcessPoolExecutor(3) as pool:
        copies = list(pool.map(staged, [folder / "203.beton"] * 6, ["$LOCAL_DISK/cache"] * 6))
    assert len(set(copies)) == 1
    assert copies[0].parent == tmp_path / "cache"
    assert copies[0].read_bytes() == (folder / "203.beton").read_bytes()
    assert check_beton(copies[0], "data.train").manifest == check_beton(folder / "203.beton", "data.train").manifest
    before = copies[0].stat().st_mtime_ns
    assert staged(folder / "203.beton", "$LOCAL_DISK/cache").stat().st_mtime_ns == before
    assert staged(folder / "7.beton", str(tmp_path / "cache")) != copies[0]
    assert not list((tmp_path / "cache").glob("*.partial"))
    pytest.importorskip("ffcv")
    data = config(folder, 7, stage_to=str(tmp_path / "cache"))
    loader = make_val_loader(data, batch_size=7, rank=0, world_size=1, device=CPU, workers=1)
    assert [index for index, _ in seen(loader)] == list(range(7))


def test_staging_tells_what_is_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^data\.stage_to=/proc/x: "):
        staged(folder / "7.beton", "/proc/x")
    monkeypatch.setattr(staging, "_checksum", lambda path: 0)
    with pytest.raises(ValueError, match=r"the copy of .* differs from it"):
        staged(folder / "7.beton", str(tmp_path))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"^data\.stage_to=.*: 0\.0 GB free"):
        staged(folder / "7.beton", str(tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.slow
def test_a_machine_without_ffcv_can_use_imagefolder(folder: Path) -> None:
    code = f"""
import sys
for name in ("ffcv", "numba", "cv2", "torchvision"):
    sys.modules[name] = None
import torch
import tdkd_dist.data.beton, tdkd_dist.data.sources, tdkd_dist.data.verify
from tdkd_dist.config import DataConfig
from tdkd_dist.data.loaders import make_train_loader, make_val_loader
kwargs = dict(rank=0, world_size=1, device=torch.device("cpu"), workers=1)
data = DataConfig(train={str(folder / "7")!r}, val={str(folder / "7")!r}, format="imagefolder", image_size=8)
print(len(list(make_train_loader(data, batch_size=2, micro_batch=2, seed=0, **kwargs).epoch(0))))
try:
    make_val_loader(DataConfig(val={str(folder / "7.beton")!r}), batch_size=2, **kwargs)
except ValueError as error:
    print(error)
"""
    # timm needs torchvision; the package registers its students there.
    code = code.replace(', "torchvision"', "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "3"
    assert "data.format=imagefolder" in lines[1]


def test_workers_follow_the_affinity() -> None:
    cores = os.sched_getaffinity(0)
    assert default_workers(1) == len(cores)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert default_workers(1) == default_workers(4) == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_the_folder_reader_reads_any_source(folder: Path) -> None:
    source = FolderSource(folder / "7")
    assert source.labels.tolist() == list(range(7))
    assert np.array_equal(source.read(3), Numbered(7).read(3))

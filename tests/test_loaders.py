"""Who sees which sample, on any number of ranks; every sample's label is its own index. Oracle: brute force."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import COUNTS, CPU, SIZE, config, seen, train

from tdkd_dist.data.loaders import (
    Reader,
    ValLoader,
    make_train_loader,
    make_val_loader,
)

WORLDS = (1, 2, 3, 5)


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

"""AutoAugment in the DataLoader path, on a CIFAR archive: torchvision's own transform is the oracle."""

import io
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from tdkd_dist.config import DataConfig
from tdkd_dist.data.crops import ERASE_TOP, FLIP
from tdkd_dist.data.folder_reader import follow
from tdkd_dist.data.jitter import augment_seed
from tdkd_dist.data.loaders import make_train_loader, make_val_loader, train_rule

CPU = torch.device("cpu")
PER_FILE = 8


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """`cifar-10-python.tar.gz` in the real layout, with few pictures: 5 x 8 to train on, 8 to test."""
    rng = np.random.default_rng(0)
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            small = rng.integers(0, 256, (PER_FILE, 4, 4, 3), dtype=np.uint8)
            images = [np.asarray(Image.fromarray(s).resize((32, 32), Image.Resampling.BICUBIC)) for s in small]
            data = np.stack(images).transpose(0, 3, 1, 2).reshape(PER_FILE, -1)
            _add(tar, name, {b"data": data, b"labels": rng.integers(0, 10, PER_FILE).tolist()})
        _add(tar, "batches.meta", {b"label_names": [f"class{i}".encode() for i in range(10)]})
    return path


def _add(tar: tarfile.TarFile, name: str, content: dict[bytes, object]) -> None:
    data = pickle.dumps(content, protocol=2)
    info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def cifar(archive: Path, **kwargs: object) -> DataConfig:
    return DataConfig(
        train=str(archive),
        val=str(archive),
        format="imagefolder",
        image_size=32,
        crop="shift",
        crop_pct=1.0,
        auto_augment="cifar10",
        cutout=16,
        **kwargs,  # type: ignore[arg-type]
    )


def epoch_of(data: DataConfig, epoch: int, rank: int = 0, world: int = 1, workers: int = 2) -> list[bytes]:
    loader = make_train_loader(
        data, batch_size=8, micro_batch=4, rank=rank, world_size=world, seed=7, device=CPU, workers=workers
    )
    assert (loader.num_samples, loader.num_classes) == (40, 10)
    found = [image.numpy().tobytes() for images, _ in loader.epoch(epoch) for image in images]
    loader.close()
    return found


def test_an_epoch_repeats_at_any_number_of_ranks_and_processes(archive: Path) -> None:
    whole = epoch_of(cifar(archive), 1)
    assert len(set(whole)) == 40
    assert sorted(epoch_of(cifar(archive), 1, 0, 2, 1) + epoch_of(cifar(archive), 1, 1, 2, 1)) == sorted(whole)
    assert len({*whole} & {*epoch_of(cifar(archive), 2)}) < 4


def test_the_policy_is_torchvisions_between_flip_and_cutout(archive: Path) -> None:
    from tdkd_dist.data.folder_reader import _Pictures
    from tdkd_dist.data.sources import open_source

    data = cifar(archive)
    rule, source = train_rule(data, 7), open_source(archive, "train")
    plain = train_rule(cifar(archive), 7)
    augmented = _Pictures(source, rule, "cifar10")
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[128.0, 128.0, 128.0])
    changed = 0
    for index in range(40):
        one = np.array([index]), np.array([32]), np.array([32])
        plan = plain.plan(3, *one)[0]
        box = plan[ERASE_TOP:].copy()
        plan[ERASE_TOP:] = 0
        flipped = follow(plan, source.read(index), 32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(augment_seed(7, 3, index))
            expected = np.array(policy(Image.fromarray(flipped)))
        changed += not np.array_equal(expected, flipped)
        top, left, height, width = box
        expected[top : top + height, left : left + width] = 0
        assert np.array_equal(augmented[3, index][0], expected), f"sample {index}, flip {plan[FLIP]}"
    assert changed > 20


def test_validation_is_left_as_it_is(archive: Path) -> None:
    loader = make_val_loader(cifar(archive), batch_size=8, rank=0, world_size=1, device=CPU, workers=1)
    (images, _), *rest = list(loader)
    loader.close()
    assert not rest
    with tarfile.open(archive) as tar:
        member = tar.extractfile("cifar-10-batches-py/test_batch")
        assert member is not None
        stored = pickle.loads(member.read(), encoding="bytes")[b"data"].reshape(PER_FILE, 3, 32, 32)
    assert np.array_equal(images.numpy(), stored)


def test_auto_augment_with_ffcv_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data.auto_augment=cifar10: FFCV has none; set data.format=imagefolder$"):
        DataConfig(auto_augment="cifar10")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_rank_loses_no_batch(archive, number):
    loader = make_train_loader(
        cifar(archive), batch_size=4, micro_batch=4, rank=0, world_size=1, seed=0, device=CPU, workers=2
    )
    batches = loader.epoch(0)
    for _ in range(2):  # a batch of each worker: both have begun, whose handlers until then are pytest's
        next(batches)
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, number)
    time.sleep(0.5)
    left = sum(1 for _ in batches)
    loader.close()
    assert left == loader.steps_per_epoch - 2

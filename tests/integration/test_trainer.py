"""The trainer's loop: real betons, loader, engine and record, in a process of its own.

DeepSpeed keeps the first process group it sees, so that two test files can't both have one in pytest's process.
"""

import gc
import itertools
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch
from numbered import CPU
from pictures import picture
from ranks import run_ranks
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tdkd_dist.config import Config
from tdkd_dist.data.beton.manifest import WriteOptions
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources.folder import FolderSource
from tdkd_dist.recipe import load_config
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Heartbeat
from tdkd_dist.run.record import read_rows


@pytest.fixture(scope="module")
def small_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pictures of three classes."""
    root = tmp_path_factory.mktemp("small")
    for i in range(96):
        path = root / "tree" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 24, 24).save(path)
    write(FolderSource(root / "tree"), root / "small.beton", WriteOptions())
    return root / "small.beton"


def small_config(beton: Path, folder: Path, *overrides: str) -> Config:
    settings = {
        "data.train": beton,
        "data.val": beton,
        "data.image_size": 16,
        "student.num_classes": 3,
        "student.width": 8,
        "student.num_timesteps": 2,
        "launcher.tasks_per_node": 1,
        "loss.alpha": 0,
        "train.log_every": 1,
        "wandb.mode": "disabled",
        "run.dir": folder,
    }
    return load_config("fashion_sew", [*(f"{key}={value}" for key, value in settings.items()), *overrides])


def go(config: Config, stops: set[int] = frozenset()) -> bool:
    """The run on this rank, to its end, or told to stop (False) when it asks for the n-th time."""
    from tdkd_dist.training.rank import Place
    from tdkd_dist.training.trainer import run

    folder, asked = RunFolder(config.run.folder), itertools.count(1)
    folder.create(config)
    place = Place(device=CPU, rank=0, world_size=1, workers=1)
    with Heartbeat(folder.heartbeat, rank=0, timeout_s=300) as heartbeat:
        return run(config, folder, place, heartbeat, lambda: next(asked) in stops)


def train(config: Config) -> list[dict[str, float]]:
    """The record of a run on this rank."""
    assert go(config)
    return [row for row in read_rows(RunFolder(config.run.folder).metrics_file) if "train/loss" in row]


def stop_at_the_end_of_an_epoch(rank: int, world_size: int, small_beton: Path, tmp_path: Path) -> None:
    """Two steps an epoch. There may be no time to validate: it is done by the run that goes on."""
    whole, cut = (
        small_config(small_beton, tmp_path / name, "train.batch_size=48", "train.epochs=2") for name in ("whole", "cut")
    )
    assert go(whole)
    folder = RunFolder(tmp_path / "cut")
    assert not go(cut, {2})
    assert "stopped at step 2; " in folder.log_file.read_text()
    assert not [row for row in read_rows(folder.metrics_file) if "val/top1_t1" in row]
    assert not go(cut, {2})
    assert [row["epoch"] for row in read_rows(folder.metrics_file) if "val/top1_t1" in row] == [1]
    assert go(cut)
    ours, theirs = (
        [
            {k: v for k, v in row.items() if k.startswith("val/") or k in ("epoch", "global_step", "train/loss")}
            for row in read_rows(RunFolder(tmp_path / name).metrics_file)
        ]
        for name in ("cut", "whole")
    )
    assert ours == theirs
    weights = [load_file(RunFolder(tmp_path / name).student_file) for name in ("cut", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_run_told_to_stop_at_the_end_of_an_epoch_saves_at_once_and_validates_later(small_beton, tmp_path):
    run_ranks(stop_at_the_end_of_an_epoch, 1, small_beton, tmp_path)


def leave_no_process(rank: int, world_size: int, tree: Path, tmp_path: Path) -> None:
    gc.disable()  # whose run at the right moment hid it
    settings = ["data.format=imagefolder", "data.workers=2", "train.batch_size=48", "train.epochs=1"]
    assert go(small_config(tree, tmp_path / "trained", *settings))
    student = f"student.checkpoint={tmp_path}/trained/student.safetensors"
    assert go(small_config(tree, tmp_path / "evaluated", *settings, "train.epochs=0", student))
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_run_that_has_ended_leaves_no_loaders_process_behind(small_beton, tmp_path):
    """They take their time to end when Python's exit asks them to, and a finished job waited for minutes."""
    run_ranks(leave_no_process, 1, small_beton.parent / "tree", tmp_path)


def record_losses(rank: int, world_size: int, small_beton: Path, tmp_path: Path) -> None:
    """Accumulation over more micro-batches than FFCV has buffers.

    With the ensemble as target the cross-entropy, computed at once, is the loss of the last timestep's ensemble, which
    was once computed at the end of the step from labels that FFCV had overwritten.
    """
    rows = train(
        small_config(
            small_beton,
            tmp_path / "run",
            "train.batch_size=48",
            "train.micro_batch=4",
            "train.max_steps=4",
            "loss.target=ensemble",
            "loss.beta=0",
            "optim.lr=0.3",
        )
    )
    assert len(rows) == 4
    for row in rows:
        assert row["train/loss_t2"] == pytest.approx(row["train/ce"], rel=1e-5)
    assert len({row["train/ce"] for row in rows}) == 4


def ask_for_bf16(rank: int, world_size: int, small_beton: Path, tmp_path: Path) -> None:
    """On a CPU that has it, and on one that does not; at fp32 on the latter."""
    from tdkd_dist.training import engine, trainer

    def losses(name: str, precision: str, device_has_it: bool) -> tuple[list[float], str]:
        engine.has_bf16 = trainer.has_bf16 = lambda device: device_has_it
        settings = ("train.batch_size=48", "train.max_steps=2", f"train.precision={precision}")
        config = small_config(small_beton, tmp_path / name, *settings)
        return [row["train/loss"] for row in train(config)], RunFolder(config.run.folder).log_file.read_text()

    exact, _ = losses("exact", "fp32", device_has_it=False)
    rounded, log = losses("rounded", "bf16", device_has_it=True)
    assert rounded != exact
    assert "train.precision" not in log
    fallen_back, log = losses("fallen_back", "bf16", device_has_it=False)
    assert fallen_back == exact
    assert "train.precision=bf16: fp32, since this CPU has no bf16 and would emulate it" in log


class Waits(TorchDispatchMode):
    """Counts, by the heartbeat's phase, the operations for which the host would wait on a GPU."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if str(function).startswith(self.WAITING):
            self.seen[self.phase] += 1
        return function(*arguments, **keywords or {})


def count_waits(rank: int, world_size: int, small_beton: Path, tmp_path: Path) -> None:
    """Only when all ranks agree on the step, and when a row is due."""
    waits = Waits()

    def beat(self: Heartbeat, phase: str, step: int) -> None:
        waits.phase = phase
        real(self, phase, step)

    real = Heartbeat.beat
    Heartbeat.beat = beat  # type: ignore[method-assign]
    config = small_config(
        small_beton,
        tmp_path / "run",
        "train.batch_size=48",
        "train.micro_batch=12",
        "train.max_steps=3",
        "train.random_timesteps=true",
        "train.ema_decay=0.9",
        "data.mixup=0.2",
        "data.color_jitter=0.3",
        "loss.alpha=0.2",
        "loss.self_target=correct_only",
        "loss.consistency=0.3",
        "teacher.name=resnet10t",
        "teacher.checkpoint=null",
        "teacher.pretrained=false",
        "teacher.min_top1=0",
        "optim.schedule_on=step",
    )
    with waits:
        rows = train(config)
    assert len(rows) == 3
    assert waits.seen.pop("agreeing") >= 3
    assert waits.seen.pop("validating") > 0
    assert set(waits.seen) <= {"opening data", "building networks", "restoring", "starting W&B", "saving"}, waits.seen


@pytest.mark.slow
def test_recorded_losses_are_those_of_the_batch_they_were_computed_from(small_beton, tmp_path):
    run_ranks(record_losses, 1, small_beton, tmp_path)


@pytest.mark.slow
def test_where_bf16_would_be_emulated_the_run_is_in_fp32_and_says_so(small_beton, tmp_path):
    run_ranks(ask_for_bf16, 1, small_beton, tmp_path)


@pytest.mark.slow
def test_the_host_waits_for_nothing_between_micro_batches(small_beton, tmp_path):
    run_ranks(count_waits, 1, small_beton, tmp_path)

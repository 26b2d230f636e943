"""Checkpoints of a real engine: atomic, checked, the newest valid one restored."""

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ranks import run_ranks

from tdkd_dist import distributed
from tdkd_dist.config import Config, LauncherConfig, StudentConfig
from tdkd_dist.students import create_student
from tdkd_dist.training import checkpoint
from tdkd_dist.training.checkpoint import Progress, best_checkpoint, find_damage, list_checkpoints

if TYPE_CHECKING:
    from tdkd_dist.training.engine import Engine

CPU = torch.device("cpu")


def small_engine(world_size: int) -> "Engine":
    from tdkd_dist.training.engine import Engine

    config = Config(
        student=StudentConfig(model="sew_resnet8", num_classes=3, num_timesteps=2, width=8),
        launcher=LauncherConfig(tasks_per_node=world_size),
    )
    config.train.batch_size = 2 * world_size
    return Engine(create_student(config.student), config, device=CPU, steps_per_epoch=10, compiled=False)


def flip_a_byte(path: Path) -> None:
    file = next(path.glob("engine/*.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(path: Path) -> None:
    file = next(path.glob("engine/*.pt"))
    file.write_bytes(file.read_bytes()[:-10])


def lose_a_file(path: Path) -> None:
    (path / "rank-0.pt").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def save_and_damage(rank: int, world_size: int, folder: Path) -> None:
    engine = small_engine(world_size)
    said: list[str] = []

    def train_to(step: int) -> None:
        while engine.global_step < step:
            engine.backward(engine.forward(torch.randn(2, 3, 16, 16)).square().mean())
            engine.update()

    def save(progress: Progress, *, best: bool = False) -> bool:
        return checkpoint.save(folder, engine, progress, keep=2, best=best, say=said.append)

    def weight() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in engine.student.parameters()]).clone()

    assert checkpoint.restore(folder, engine, said.append) is None
    weights, draws = {}, {}
    for step in (1, 2, 3):
        train_to(step)
        weights[step] = weight()
        assert save(Progress(epoch=1, global_step=step, wandb_id="abc"))
        draws[step] = draw()
        assert find_damage(folder / f"step-{step:08d}") is None
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000003", "step-00000002"]
    assert (folder / "latest").read_text() == "step-00000003\n"
    assert not list(folder.glob("*.tmp"))

    train_to(5)
    (folder / "step-00000009.tmp").mkdir()
    restored = checkpoint.restore(folder, engine, said.append)
    assert restored == Progress(epoch=1, global_step=3, wandb_id="abc")
    assert draw() == draws[3]
    assert torch.equal(weight(), weights[3])
    assert said == []

    for damage in (flip_a_byte, truncate, lose_a_file, lose_the_manifest):
        engine.global_step = 3
        assert save(Progress(global_step=3))
        damage(folder / "step-00000003")
        train_to(4)
        restored = checkpoint.restore(folder, engine, said.append)
        assert restored is not None
        assert restored.global_step == 2, damage
        assert torch.equal(weight(), weights[2])
        assert "step-00000003 is damaged" in said.pop()


@pytest.mark.slow
def test_the_newest_valid_checkpoint_is_restored(tmp_path):
    run_ranks(save_and_damage, 1, tmp_path)


def keep_the_best(rank: int, world_size: int, folder: Path) -> None:
    engine = small_engine(world_size)
    for step in range(1, 6):
        assert checkpoint.save(folder, engine, Progress(global_step=step), keep=2, best=step in (1, 2), say=print)
    assert [p.name for p in list_checkpoints(folder)] == [f"step-{step:08d}" for step in (5, 4, 2)]
    assert best_checkpoint(folder) == folder / "step-00000002"


@pytest.mark.slow
def test_the_best_stays_beside_the_newest(tmp_path):
    run_ranks(keep_the_best, 1, tmp_path)


def fill_the_disk(rank: int, world_size: int, folder: Path) -> None:
    """Two ranks; rank 0's disk fills up during a save, and has room again for the next."""
    engine = small_engine(world_size)
    said: list[str] = []

    def save(step: int) -> bool:
        return checkpoint.save(folder, engine, Progress(global_step=step), keep=2, best=False, say=said.append)

    assert save(1)
    ballast = folder / "ballast"
    if rank == 0:
        room = shutil.disk_usage(folder).free - 100_000
        ballast.write_bytes(b"x" * room)
    assert not save(2)
    assert [p.name for p in folder.glob("step-*")] == ["step-00000001"]
    assert "the checkpoint at step 2 could not be written (" in said[0]
    assert len(said) == 1
    distributed.barrier()
    if rank == 0:
        ballast.unlink()
    assert save(3)
    assert checkpoint.restore(folder, engine, said.append) == Progress(global_step=3)


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(small_disk):
    run_ranks(fill_the_disk, 2, small_disk)


def restore_from_another_gpu(rank: int, world_size: int, folder: Path) -> None:
    """A checkpoint whose tensors all say that they were on GPU 5, which is not here."""
    engine = small_engine(world_size)
    engine.backward(engine.forward(torch.randn(2, 3, 16, 16)).square().mean())
    engine.update()
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    location_tag = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: "cuda:5"
    try:
        assert checkpoint.save(folder, engine, Progress(global_step=1), keep=2, best=False, say=print)
    finally:
        torch.serialization.location_tag = location_tag
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(folder / "step-00000001" / f"rank-{rank}.pt", weights_only=False)
    again = small_engine(world_size)
    with torch.no_grad():
        for value in again.student.state_dict().values():
            value.zero_()
    assert checkpoint.restore(folder, again, print) == Progress(global_step=1)
    for name, value in again.student.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_a_checkpoint_of_a_gpu_is_restored_where_that_gpu_is_not(tmp_path):
    """One node of eight GPUs, then two of four; or a CPU."""
    run_ranks(restore_from_another_gpu, 2, tmp_path)

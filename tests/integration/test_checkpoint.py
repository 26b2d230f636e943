"""Checkpoints of a real engine: atomic, checked, the newest valid one restored."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from tdkd_dist import checkpoint
from tdkd_dist.checkpoint import Progress, find_damage, list_checkpoints
from tdkd_dist.config import Config, LauncherConfig, StudentConfig
from tdkd_dist.students import create_student


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
    from tdkd_dist.engine import Engine

    config = Config(
        student=StudentConfig(model="sew_resnet8", num_classes=3, num_timesteps=2, width=8),
        launcher=LauncherConfig(tasks_per_node=world_size),
    )
    config.train.batch_size = 2
    engine = Engine(
        create_student(config.student), config, device=torch.device("cpu"), steps_per_epoch=10, compiled=False
    )
    said: list[str] = []

    def train_to(step: int) -> None:
        while engine.global_step < step:
            engine.backward(engine.forward(torch.randn(2, 3, 16, 16)).square().mean())

    def weight() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in engine.student.parameters()]).clone()

    assert checkpoint.restore(folder, engine, said.append) is None
    weights, draws = {}, {}
    for step in (1, 2, 3):
        train_to(step)
        weights[step] = weight()
        path = checkpoint.save(folder, engine, Progress(epoch=1, global_step=step, wandb_id="abc"), keep=2)
        draws[step] = draw()
        assert find_damage(path) is None
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000003", "step-00000002"]
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
        path = checkpoint.save(folder, engine, Progress(global_step=3), keep=2)
        damage(path)
        train_to(4)
        restored = checkpoint.restore(folder, engine, said.append)
        assert restored is not None
        assert restored.global_step == 2, damage
        assert torch.equal(weight(), weights[2])
        assert "step-00000003 is damaged" in said.pop()


@pytest.mark.slow
def test_the_newest_valid_checkpoint_is_restored(tmp_path):
    run_ranks(save_and_damage, 1, tmp_path)

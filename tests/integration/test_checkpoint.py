"""Checkpoints of a real engine: atomic, checked, the newest valid one restored."""

import hashlib
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from ranks import run_ranks

from tdkd_dist import distributed
from tdkd_dist.config import Config, LauncherConfig, StudentConfig
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.progress import Progress, list_checkpoints
from tdkd_dist.students import create_student
from tdkd_dist.training import checkpoint
from tdkd_dist.training.checkpoint import best_checkpoint, find_damage

if TYPE_CHECKING:
    from tdkd_dist.training.engine import Engine

CPU = torch.device("cpu")


def small_engine(world_size: int, zero_stage: Literal[0, 1, 2] = 0) -> "Engine":
    from tdkd_dist.training.engine import Engine

    config = Config(
        student=StudentConfig(model="sew_resnet8", num_classes=3, num_timesteps=2, width=8),
        launcher=LauncherConfig(tasks_per_node=world_size),
    )
    config.train.batch_size = 2 * world_size
    config.train.zero_stage = zero_stage
    return Engine(create_student(config.student), config, device=CPU, steps_per_epoch=10, compiled=False)


def flip_a_byte(path: Path) -> None:
    file = path / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(path: Path) -> None:
    file = path / "state.pt"
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
        torch.load(folder / "step-00000001" / f"rank-{rank}.pt", weights_only=True)
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


class Payload:
    """What a hostile pickle does: it leaves a mark where it was read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def seal(path: Path) -> None:
    """As somebody would who changed a file of the checkpoint: a manifest that fits."""
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir() if f.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps(sums))
    assert find_damage(path) is None


def step(engine: "Engine") -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(engine.global_step))
    engine.backward(engine.forward(images).square().mean())
    engine.update()


def refuse_what_was_changed(rank: int, world_size: int, folder: Path) -> None:
    engine = small_engine(world_size)
    step(engine)
    assert checkpoint.save(folder, engine, Progress(global_step=1, wandb_id="abc"), keep=2, best=False, say=print)
    (folder / "step-old").mkdir()
    (folder / "step-00000002").write_text("a file")
    path, mark = folder / "step-00000001", folder / "mark"
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    state, own = (torch.load(path / name, weights_only=True) for name in ("state.pt", "rank-0.pt"))
    weight = next(iter(state["student"]))
    group = state["optimizer"]["param_groups"][0]
    other = small_engine(world_size)
    untouched = [p.clone() for p in other.student.parameters()]
    for file, content, words in (
        ("state.pt", state | {"global_step": Payload(mark)}, "not of our writing"),
        ("rank-0.pt", own | {"python": Payload(mark)}, "not of our writing"),
        ("state.pt", [state], "no state of a run"),
        ("state.pt", {k: v for k, v in state.items() if k != "optimizer"}, "no state of this run"),
        ("state.pt", state | {"student": {}}, "its student has other tensors"),
        (
            "state.pt",
            state | {"student": state["student"] | {weight: torch.zeros(2)}},
            f"has {weight} in another shape",
        ),
        ("state.pt", state | {"student": state["student"] | {weight: 3}}, f"has {weight} in another shape"),
        (
            "state.pt",
            state
            | {
                "optimizer": state["optimizer"]
                | {"param_groups": [group | {"lr": "x"}, *state["optimizer"]["param_groups"][1:]]}
            },
            "other settings",
        ),
        (
            "state.pt",
            state | {"optimizer": state["optimizer"] | {"state": {0: {"momentum_buffer": "x"}}}},
            "odd momentum",
        ),
        ("rank-0.pt", own | {"buffers": {"x": torch.ones(1)}}, "its batch norms has other tensors"),
        ("progress.json", {"epoch": 0}, "none of this version"),
        ("progress.json", json.loads(before["progress.json"]) | {"global_step": -1}, "where a run stands"),
        ("progress.json", json.loads(before["progress.json"]) | {"wandb_id": "../x"}, "where a run stands"),
        ("progress.json", asdict(Progress()), "older tdkd-dist"),
    ):
        if file.endswith(".json"):
            (path / file).write_text(json.dumps(content))
        else:
            torch.save(content, path / file)
        seal(path)
        with pytest.raises(Mistake, match=words) as refused:
            checkpoint.restore(folder, other, print)
        assert len(refused.value.lines) == 1
        assert str(folder) in str(refused.value)
        assert not mark.exists()
        assert all(torch.equal(one, two) for one, two in zip(untouched, other.student.parameters(), strict=True))
        (path / file).write_bytes(before[file])
    seal(path)
    assert checkpoint.restore(folder, other, print) == Progress(global_step=1, wandb_id="abc")


@pytest.mark.slow
def test_a_changed_checkpoint_runs_no_code_and_is_refused_in_a_line(tmp_path):
    run_ranks(refuse_what_was_changed, 1, tmp_path)


def partitions_are_cut_anew(rank: int, world_size: int, folder: Path, stage: Literal[1, 2]) -> None:
    """Saved by two ranks or restored by one: a step later the weights are those of ranks that never stopped."""
    torch.manual_seed(1)
    engine = small_engine(world_size, stage)
    if not list_checkpoints(folder):
        for _ in range(3):
            step(engine)
        assert checkpoint.save(folder, engine, Progress(global_step=3), keep=2, best=False, say=print)
        for _ in range(2):
            step(engine)
    else:
        assert checkpoint.restore(folder, engine, print) == Progress(global_step=3)
        for _ in range(2):
            step(engine)
    if rank == 0:
        torch.save([p.detach() for p in engine.student.parameters()], folder.parent / f"weights-{world_size}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimiser_that_two_ranks_share_goes_on_as_ones(tmp_path, stage):
    """Every rank has the same images here, so that the number of ranks changes nothing."""
    run_ranks(partitions_are_cut_anew, 2, tmp_path / "two", stage)
    run_ranks(partitions_are_cut_anew, 1, tmp_path / "two", stage)
    one, two = (torch.load(tmp_path / f"weights-{n}.pt", weights_only=True) for n in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)

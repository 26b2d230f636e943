"""The agreement before each step, on one rank; several ranks are in the integration tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tdkd_dist.config import TrainConfig
from tdkd_dist.training.guard import StepGuard

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def make(tmp_path: Path, stop: bool = False, **train: object) -> StepGuard:
    return StepGuard(TrainConfig(**train), tmp_path / "skipped.jsonl", lambda: stop)  # type: ignore[arg-type]


def agree(guard: StepGuard, losses: list[torch.Tensor], *arguments) -> bool:
    for loss in losses:
        guard.watch(loss)
    return guard.agree(*arguments)


def test_a_loss_that_is_not_finite_is_skipped_and_its_samples_recorded(tmp_path: Path) -> None:
    guard = make(tmp_path)
    assert not agree(guard, [GOOD, GOOD], 0, lambda: np.arange(2))
    assert agree(guard, [GOOD, BAD], 1, lambda: np.arange(4, 8))
    assert agree(guard, [torch.tensor(float("inf"))], 2, lambda: np.arange(8, 10))
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert rows == [
        {"global_step": 1, "samples": {"0": [4, 5, 6, 7]}},
        {"global_step": 2, "samples": {"0": [8, 9]}},
    ]
    assert guard.skipped == 2


def test_too_many_in_a_row_end_the_run_with_advice(tmp_path: Path) -> None:
    guard = make(tmp_path, max_skipped=2)
    for step, loss in enumerate([BAD, BAD, GOOD, BAD, BAD]):
        agree(guard, [loss], step, lambda: np.arange(1))
    with pytest.raises(ValueError, match=r"^the loss was not finite in 3 steps in a row, up to step 6: try a lower"):
        agree(guard, [BAD], 5, lambda: np.arange(1))


def test_saves_by_step_and_by_time(tmp_path: Path) -> None:
    guard = make(tmp_path, save_every_steps=3)
    due = []
    for step in range(7):
        agree(guard, [GOOD], step, lambda: np.arange(1))
        due.append(guard.save)
    assert due == [False, False, True, False, False, True, False]
    guard = make(tmp_path, save_every_min=1e-9)
    agree(guard, [GOOD], 0, lambda: np.arange(1))
    assert guard.save
    assert make(tmp_path).stop is False


def test_the_wish_to_stop_is_asked_for(tmp_path: Path) -> None:
    guard = make(tmp_path, stop=True)
    agree(guard, [GOOD], 0, lambda: np.arange(1))
    assert guard.stop

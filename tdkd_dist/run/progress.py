"""How far the checkpoints of a run have come, read without torch.

A checkpoint is a folder `step-00001234`; `progress.json` in it says where the run stood, and in which form the
checkpoint is written.
"""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.reading import read_json

FORM = 2
"""Of checkpoints: 1 was DeepSpeed's pickle, which could run code when it was read."""
PROGRESS = "progress.json"


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    epoch: int = 0
    """The epoch in hand; equal to `train.epochs` when all are done."""
    step_in_epoch: int = 0
    """Optimiser steps of it already taken."""
    global_step: int = 0
    best: float = -1.0
    """Best validation so far: mean over t of top-1, in per cent."""
    wandb_id: str | None = None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{8,15}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def write_progress(checkpoint: Path, progress: Progress, world_size: int) -> None:
    """Say in a checkpoint where the run stands, and how many ranks wrote it."""
    content = {"form": FORM, "world_size": world_size, **asdict(progress)}
    (checkpoint / PROGRESS).write_text(json.dumps(content))


def read_progress(checkpoint: Path) -> tuple[Progress, int]:
    """Where the run stood, and the number of ranks. Raises `Mistake` for a checkpoint of another form."""
    content: Any = None
    with suppress(Mistake):
        content = read_json(checkpoint / PROGRESS)
    names = [f.name for f in fields(Progress)]
    if isinstance(content, dict) and "form" not in content and set(content) == set(names):
        raise Mistake(
            f"{checkpoint} was written by an older tdkd-dist, in a form that could run code when read: finish the run"
            f" with that version, or remove {checkpoint.parent} to start anew (train.epochs=0 evaluates its weights)"
        )
    if not isinstance(content, dict) or content.get("form") != FORM or not set(names) < set(content):
        raise Mistake(f"{checkpoint}: its {PROGRESS} is none of this version; remove {checkpoint}")
    epoch, step_in_epoch, global_step, best, wandb_id = (content[name] for name in names)
    counts = (epoch, step_in_epoch, global_step, content.get("world_size"))
    fits = all(type(n) is int and 0 <= n < 2**53 for n in counts) and type(best) in (int, float)
    if not fits or not (wandb_id is None or (isinstance(wandb_id, str) and wandb_id.isalnum())):
        raise Mistake(f"{checkpoint}: its {PROGRESS} does not say where a run stands; remove {checkpoint}")
    return Progress(epoch, step_in_epoch, global_step, float(best), wandb_id), content["world_size"]


def newest_progress(folder: Path) -> Progress | None:
    """Where the newest checkpoint in `folder` that says so stands; None if there is none.

    A damaged one is passed over, as in restoring. Raises `Mistake` as `read_progress` if all are.
    """
    first: Mistake | None = None
    for checkpoint in list_checkpoints(folder):
        try:
            return read_progress(checkpoint)[0]
        except Mistake as mistake:
            first = first or mistake
    if first is not None:
        raise first
    return None

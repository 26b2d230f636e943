"""Atomic checkpoints of a run's whole state, and restoring the newest valid one.

A checkpoint is a folder `step-00001234` with the state that all ranks share, one file a rank with its random
generators, batch-norm statistics and share of a partitioned optimiser, the run's own facts, and a manifest of
checksums. It is written under another name and renamed when it is complete. Nothing in it can run code when it is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from tdkd_dist import distributed
from tdkd_dist.files import write_text
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.progress import Progress, list_checkpoints, read_progress, write_progress
from tdkd_dist.run.reading import read_json
from tdkd_dist.training.engine import Engine
from tdkd_dist.training.state import generator_states, read_state, set_generator_states, understanding

MANIFEST, STATE = "manifest.json", "state.pt"
LATEST, BEST = "latest", "best"
"""Files in the folder that name a checkpoint."""


def save(
    folder: Path, engine: Engine, progress: Progress, *, keep: int, best: bool, say: Callable[[str], None]
) -> bool:
    """Write a checkpoint of the engine, this process's generators and `progress`; every rank must call it.

    The newest `keep` checkpoints stay, and the one last saved with `best`; older ones are removed. If it cannot be
    written, on a full disk for instance, that is said, what was there stays, and False is returned on all ranks.
    """
    name = f"step-{progress.global_step:08d}"
    temporary = folder / f"{name}.tmp"
    failure: Exception | None = None
    if distributed.rank() == 0:
        failure = _attempt(lambda: _make_empty(temporary))
    distributed.barrier()
    if distributed.rank() == 0:
        failure = failure or _attempt(lambda: torch.save(engine.state(), temporary / STATE))
    own = temporary / _of_rank(distributed.rank())
    failure = failure or _attempt(lambda: torch.save(engine.rank_state() | generator_states(), own))
    (failed,) = distributed.any_rank(failure is not None)
    if not failed and distributed.rank() == 0:
        failure = _attempt(lambda: _complete(folder, temporary, name, progress, best))
    (failed,) = distributed.any_rank(failure is not None)
    if failed:
        reasons = distributed.from_every_rank(None if failure is None else str(failure) or type(failure).__name__)
        reason = next(reason for reason in reasons if reason is not None).splitlines()[0]
        say(f"the checkpoint at step {progress.global_step} could not be written ({reason}); the last one stays")
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        if not failed:
            _remove_old(folder, keep)
    distributed.barrier()
    return not failed


def restore(folder: Path, engine: Engine, say: Callable[[str], None]) -> Progress | None:
    """Take up the newest valid checkpoint in `folder`; None if there is none. Every rank must call it.

    Raises `Mistake` for a checkpoint that is none of this version's, or of another run.
    """
    name = distributed.from_rank_0(_newest_valid(folder, say) if distributed.rank() == 0 else None)
    if name is None:
        return None
    path = folder / name
    progress, world_size = read_progress(path)
    state, own, parts = read_state(path / STATE), None, []
    if world_size == distributed.world_size():
        own = read_state(path / _of_rank(distributed.rank()))
    elif engine.partitioned:
        parts = [read_state(path / _of_rank(rank)) for rank in range(world_size)]
    with understanding(path):
        engine.load(state, own, parts)
        if own is not None:
            set_generator_states(own)
    return progress


def warn_of_short_notice(save_s: float, notice_s: float) -> str | None:
    """What to say in a Slurm job if a checkpoint that took `save_s` may take longer than the notice before the end."""
    if "SLURM_JOB_ID" not in os.environ or 2 * save_s <= notice_s:
        return None
    return (
        f"warning: saving took {save_s:.0f} s; launcher.signal_delay_s={notice_s} should be {max(120, 3 * save_s):.0f}"
        " or more, or a preempted job may lose the steps since its last checkpoint"
    )


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the best validation, if one is there."""
    try:
        name = (folder / BEST).read_text().strip()
    except (OSError, ValueError):
        return None
    return next((path for path in list_checkpoints(folder) if path.name == name), None)


def find_damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None if every file is there and matches its checksum."""
    checksums = None
    with suppress(Mistake):
        checksums = read_json(path / MANIFEST)
    if checksums is None:
        return "its manifest is missing or unreadable"
    for name, checksum in checksums.items():
        file = path / name
        if "/" in name or not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != checksum:
            return f"{name} does not match its checksum"
    return None


def _attempt(action: Callable[[], None]) -> Exception | None:
    """What kept `action` from writing; torch raises `RuntimeError` when the disk is full."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return error
    return None


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _complete(folder: Path, temporary: Path, name: str, progress: Progress, best: bool) -> None:
    write_progress(temporary, progress, distributed.world_size())
    checksums = {str(f.relative_to(temporary)): _sha256(f) for f in sorted(temporary.rglob("*")) if f.is_file()}
    (temporary / MANIFEST).write_text(json.dumps(checksums, indent=1))
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    for pointer in [BEST, LATEST] if best else [LATEST]:
        write_text(folder / pointer, f"{name}\n")


def _remove_old(folder: Path, keep: int) -> None:
    best = best_checkpoint(folder)
    for old in list_checkpoints(folder)[keep:]:
        if old != best:
            shutil.rmtree(old, ignore_errors=True)


def _newest_valid(folder: Path, say: Callable[[str], None]) -> str | None:
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            return path.name
        say(f"checkpoint {path} is damaged ({damage}); trying the one before")
    return None


def _of_rank(rank: int) -> str:
    return f"rank-{rank}.pt"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

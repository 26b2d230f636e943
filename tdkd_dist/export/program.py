"""PyTorch's own format: a graph of standard operations that runs where this package is not installed.

Shapes: T timesteps, B images, K classes.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdkd_dist.export.plain import OneStep, example
from tdkd_dist.files import whole
from tdkd_dist.students.base import SpikingNet

READ_BACK = """
import json, sys, numpy, torch
path, folder, num_timesteps = sys.argv[1:]
extra = {"start.json": ""}
program = torch.export.load(path, extra_files=extra)
starts = list(json.loads(extra["start.json"] or "{}").values())
images = numpy.load(f"{folder}/images.npz", allow_pickle=False)

def steps(x):
    count = x.shape[-4]
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    state = []
    for m, start in zip(inputs[1:], starts, strict=True):
        start = torch.tensor(start, dtype=m.dtype).view(-1, *[1] * (m.ndim - 2))
        state.append(torch.zeros(count, *m.shape[1:], dtype=m.dtype) + start)
    for t in range(int(num_timesteps)):
        logits, *state = run(x if x.ndim == 4 else x[t], *state)
        yield logits

run = program.module()
with torch.no_grad():
    for k, name in enumerate(sorted(images.files)):
        x = torch.from_numpy(images[name])
        numpy.save(f"{folder}/{k}.npy", torch.stack(list(steps(x))) if int(num_timesteps) else run(x))
assert "tdkd_dist" not in sys.modules
"""
"""What a stranger's process does with a program, or, of a number of timesteps, with that of one."""


@torch.no_grad()
def export_whole(model: SpikingNet, frames: int | None = None) -> torch.export.ExportedProgram:
    """The graph of all timesteps: images `[B, C, H, W]`, or frames `[T, B, C, H, W]`, to logits `[T, B, K]`; any B."""
    batch = {0 if frames is None else 1: torch.export.Dim("B")}
    return torch.export.export(model, (example(model, 2, frames),), dynamic_shapes={"x": batch})


@torch.no_grad()
def export_step(step: OneStep) -> torch.export.ExportedProgram:
    """The graph of one timestep, see `OneStep`; any B."""
    images = example(step.model, 2)
    membranes = step.at_first(images)
    batch = {0: torch.export.Dim("B")}
    return torch.export.export(step, (images, *membranes), dynamic_shapes=(batch, tuple(batch for _ in membranes)))


def write(model: SpikingNet, path: Path, frames: int | None = None) -> None:
    """Write the student, whose batch norms are folded, as a program of all its timesteps (`torch.export.load`).

    `frames`: it reads so many frames `[T, B, C, H, W]`, and not an image.
    """
    write_program(export_whole(model, frames), path)


def write_step(model: SpikingNet, path: Path) -> None:
    """Write one timestep of the student as a program; its extra file `start.json` says the membranes at first."""
    step = OneStep(model)
    write_program(export_step(step), path, {"start.json": step.starts()})


def write_program(program: torch.export.ExportedProgram, path: Path, extra: dict[str, str] | None = None) -> None:
    """Save a program with further texts, whole or not at all."""
    with whole(path) as partial:
        named = partial.with_name(partial.name + ".pt2")  # torch warns of other suffixes
        try:
            torch.export.save(program, named, extra_files=extra)
            named.replace(partial)
        finally:
            named.unlink(missing_ok=True)


def read_back(path: Path, batches: Iterable[Tensor]) -> Tensor:
    """The logits `[T, sum of B, K]` of a written program for batches of images or frames, in a process of strangers.

    Raises `RuntimeError` with what that process said if it fails.
    """
    return read_back_step(path, batches, 0)


def read_back_step(path: Path, batches: Iterable[Tensor], num_timesteps: int) -> Tensor:
    """The same of a written timestep, run `num_timesteps` times."""
    with tempfile.TemporaryDirectory() as folder:
        images = {f"{k:06}": batch.numpy() for k, batch in enumerate(batches)}
        np.savez(f"{folder}/images.npz", **images)  # type: ignore[arg-type]
        command = [sys.executable, "-I", "-c", READ_BACK, str(path), folder, str(num_timesteps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path} could not be read back: {done.stderr.strip()[-500:]}")
        logits = [torch.from_numpy(np.load(f"{folder}/{k}.npy", allow_pickle=False)) for k in range(len(images))]
    return torch.cat(logits, dim=1)

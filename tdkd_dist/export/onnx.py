"""ONNX: all timesteps in one graph, and one timestep with its state, read back by onnxruntime or ONNX's reference.

Shapes: T timesteps, B images, K classes.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdkd_dist.export.plain import OneStep
from tdkd_dist.export.program import export_step, export_whole
from tdkd_dist.files import whole
from tdkd_dist.students.base import SpikingNet

Run = Callable[[dict[str, Any]], list[Any]]
"""Outputs of a graph for arrays by the names of its inputs."""


def write(model: SpikingNet, path: Path, frames: int | None = None) -> None:
    """Write all timesteps of the student: `images` `[B, C, H, W]`, normalised, to `logits` `[T, B, K]`; any B.

    `frames`: `images` are so many frames, `[T, B, C, H, W]`.
    """
    _write(export_whole(model, frames), path, ["images"], ["logits"], describe(model))


def write_step(model: SpikingNet, path: Path) -> None:
    """Write one timestep: `images` and `before.NEURON` to `logits` `[B, K]` and `after.NEURON`.

    What `before` is at first is in the metadata, under `start`.
    """
    step = OneStep(model)
    inputs, outputs = ([f"{when}.{name}" for name in step.names] for when in ("before", "after"))
    _write(
        export_step(step), path, ["images", *inputs], ["logits", *outputs], describe(model) | {"start": step.starts()}
    )


def describe(model: SpikingNet) -> dict[str, str]:
    """What a user of the graph must know: how pictures become images, T, and the classes' names if they are known."""
    shown = model.default_cfg
    found = {key: shown.get(key) for key in ("input_size", "mean", "std", "crop_pct", "label_names", "frames")}
    return {"num_timesteps": str(model.num_timesteps)} | {k: json.dumps(v) for k, v in found.items() if v is not None}


def _write(
    program: torch.export.ExportedProgram, path: Path, inputs: list[str], outputs: list[str], about: dict[str, str]
) -> None:
    import onnx

    with _quiet():
        made = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    assert made is not None
    graph = made.model_proto
    onnx.helper.set_model_props(graph, about)
    with whole(path) as partial:
        onnx.save(graph, partial)
        onnx.checker.check_model(partial)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's advice to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def open_graph(path: Path) -> Run:
    """A written graph, run by onnxruntime; float64, whose convolutions that lacks, by ONNX's reference evaluator."""
    import onnx
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(path)
    if graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
        reference = ReferenceEvaluator(graph)
        return lambda arrays: list(reference.run(None, arrays))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda arrays: list(session.run(None, arrays))


def read_back(path: Path, batches: Iterable[Tensor]) -> Tensor:
    """The logits `[T, sum of B, K]` of a written graph of all timesteps, for batches of images."""
    run = open_graph(path)
    return torch.cat([torch.from_numpy(run({"images": images.numpy()})[0]) for images in batches], dim=1)


def read_back_step(path: Path, batches: Iterable[Tensor], num_timesteps: int) -> Tensor:
    """The same of a written timestep, run `num_timesteps` times."""
    import onnx

    run, model = open_graph(path), onnx.load(path, load_external_data=False)
    starts = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "start"))
    inputs = model.graph.input[1:]
    return torch.cat([_run_steps(run, inputs, starts, images.numpy(), num_timesteps) for images in batches], dim=1)


def _run_steps(
    run: Run, inputs: Sequence[Any], starts: dict[str, list[float]], images: Any, num_timesteps: int
) -> Tensor:
    state = {}
    for x in inputs:
        channels, *rest = (d.dim_value for d in x.type.tensor_type.shape.dim[1:])
        start = np.array(starts[x.name.removeprefix("before.")], images.dtype).reshape(-1, *[1] * len(rest))
        state[x.name] = np.zeros((images.shape[-4], channels, *rest), images.dtype) + start
    logits = []
    for t in range(num_timesteps):
        answer, *after = run({"images": images if images.ndim == 4 else images[t], **state})
        logits.append(torch.from_numpy(answer))
        state = dict(zip(state, after, strict=True))
    return torch.stack(logits)

"""Where the time of our full training step goes, by class of kernel, and how near each is to the machine's peak.

Time is what each operation takes itself, by torch.profiler: on the processor, or of the kernels it starts on a GPU.
FLOPs are counted in convolutions and matrix products; bytes are what Inductor's fused kernels read and write at least,
the few of a compiled teacher included.

Shapes: B images, C channels, H and W pixels.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
import torch._inductor.metrics
from step_contestants import full, inputs, make_config
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from tdkd_dist.students import create_student
from tdkd_dist.teachers import create_teacher

STEPS = 5
RANGES = ("teacher", "loss", "optimiser")
COPIES = ("copy", "clone", "contiguous", "zero", "fill", "memset", "memcpy", "accumulategrad", "::cat", "flatten")


@dataclass
class Row:
    """A class of kernels."""

    name: str
    seconds: float
    """Of a step."""
    work: str
    """FLOPs or bytes a step, and what share of the peak that is."""


def profile(options: argparse.Namespace) -> list[Row]:
    """The classes of a full step, the longest first. Compiles anew, with markers in the kernels."""
    cuda = options.device == "cuda"
    torch._inductor.config.cpp.enable_kernel_profile = True
    torch._inductor.config.fx_graph_cache = False
    # Inductor counts bytes for this log alone.
    log = torch._logging.getArtifactLogger("torch._inductor.compile_fx", "inductor_metrics")  # type: ignore[attr-defined]
    log.setLevel(logging.INFO)
    log.propagate = False
    torch._inductor.metrics.reset()
    step, (x_BCHW, labels_B) = full(options), inputs("full", options)
    for _ in range(3):
        step(x_BCHW, labels_B)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(STEPS):
            step(x_BCHW, labels_B)
        if cuda:
            torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    for event in found.events() or []:
        micro = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        name = classify(event)
        seconds[name] = seconds.get(name, 0.0) + 1e-6 * micro / STEPS
    work = describe_work(options, seconds)
    rows = [Row(name, s, work.get(name, "-")) for name, s in seconds.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def classify(event: Any) -> str:
    """The class of an operation, by what it is inside of and by its name."""
    inside = [parent.name for parent in ancestors(event)]
    for name in RANGES:
        if name in inside or event.name == name:
            return name
    name = event.name.lower()
    if "conv" in name:
        return "convolution"
    if "fused" in name or "norm" in name or "pool" in name:
        return "norm + neuron"
    if any(word in name for word in COPIES):
        return "copy"
    compiled = any("CompiledFunction" in parent for parent in [event.name, *inside])
    backward = any("evaluate_function" in parent for parent in [event.name, *inside])
    if backward and not compiled and not any("Neuron" in parent for parent in inside):
        return "loss"  # all of the student's own backward pass is one compiled function
    return "linear" if "mm" in name else "other"


def ancestors(event: Any) -> Iterator[Any]:
    """What an operation was called from."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def describe_work(options: argparse.Namespace, seconds: dict[str, float]) -> dict[str, str]:
    """FLOPs of the convolutions and the teacher, and bytes of the fused kernels, as shares of the measured peaks."""
    flop_s, byte_s = peaks(options)
    config = make_config(options)
    x_BCHW, _ = inputs("full", options)
    student = create_student(config.student).to(options.device)
    with FlopCounterMode(display=False) as of_student:
        student(x_BCHW).sum().backward()
    flops = {"convolution": of_student.get_total_flops()}
    if config.loss.alpha:
        classes, channels = config.student.num_classes, config.student.in_chans
        teacher = create_teacher(config.teacher, config.data, num_classes=classes, in_chans=channels)
        with FlopCounterMode(display=False) as of_teacher:
            teacher.to(options.device)(x_BCHW)
        flops["teacher"] = of_teacher.get_total_flops()
    work = {
        name: f"{count / 1e9:.1f} GFLOP, {count / seconds[name] / flop_s:.0%} of {flop_s / 1e9:,.0f} GFLOP/s"
        for name, count in flops.items()
        if seconds.get(name)
    }
    nodes = torch._inductor.metrics.nodes_num_elem
    size = sum(4 * elements for node, elements in nodes if not isinstance(node, ExternKernelSchedulerNode))
    if size and seconds.get("norm + neuron"):
        share = size / seconds["norm + neuron"] / byte_s
        work["norm + neuron"] = f"{size / 1e9:.2f} GB, {share:.0%} of {byte_s / 1e9:,.0f} GB/s"
    return work


def peaks(options: argparse.Namespace) -> tuple[float, float]:
    """FLOPs a second of a large matrix product, and bytes a second (read and written) of a large copy."""
    device, cuda = torch.device(options.device), options.device == "cuda"
    n, m = (8192, 2**28) if cuda else (2048, 2**26)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32)
    source, target = torch.zeros(m, device=device), torch.zeros(m, device=device)
    return 2 * n**3 / best_of(lambda: a @ a, cuda), 8 * m / best_of(lambda: target.copy_(source), cuda)


def best_of(action: Any, cuda: bool) -> float:
    """Seconds of the fastest of seven."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        action()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def as_markdown(rows: list[Row]) -> str:
    """The table."""
    whole = sum(row.seconds for row in rows)
    lines = ["| full step | ms | share | work |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {1000 * r.seconds:.1f} | {r.seconds / whole:.1%} | {r.work} |" for r in rows]
    return "\n".join([*lines, f"| all | {1000 * whole:.1f} | | |"])

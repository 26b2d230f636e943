"""Steps: that the engine takes them compiled, and how long they are beside a plain ResNet's and others'.

Shapes: B images, C channels, H and W pixels, K classes.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
import torch.nn.functional as F
from step import timed
from step_contestants import CONTESTANTS, inputs
from torch import Tensor, nn

from acceptance.found import Found
from acceptance.scale import Scale, Size, count_breaks, count_graphs
from tdkd_dist.students import create_student
from tdkd_dist.training.compilation import compile_training
from tdkd_dist.training.engine import use_bf16
from tdkd_dist.training.step import build_untrained

STEPS = 6
"""More than the third, in which DeepSpeed's timer would have begun to wait for the device."""
THEIRS = {"loop": "full", "spikingjelly": "student"}
"""Others' steps, and which of ours does the same."""
RATIO = 1.10
"""The most that the student's step may take of a plain ResNet's on T*B images."""


def engine(scale: Scale) -> Found:
    """Six compiled steps of the engine with student, teacher and losses, two micro-batches each: graphs, ms, memory."""
    scale.spare_code_generation()
    found, config = Found(), scale.config(scale.whole)
    scale.start_group()
    step = build_untrained(config, scale.device, compiled=True)
    batches = [scale.batch(scale.whole)] * config.accumulation
    losses, seconds = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        losses.append(float(step(batches)))
        seconds.append(time.perf_counter() - started)
    found.figures |= {
        "micro-batches a step": config.accumulation,
        "first step, s": seconds[0],
        "ms a step": 1000 * statistics.median(seconds[3:]),
        "peak, MiB": scale.peak_mib(lambda: step(batches)),
        "graphs": count_graphs(),
        "graph breaks": count_breaks(),
        "first loss": losses[0],
        "last loss": losses[-1],
    }
    found.holds("losses finite", all(torch.isfinite(torch.tensor(losses)).tolist()))
    found.at_most("graphs", 2)  # the student's and the teacher's
    found.at_most("graph breaks", 0)
    if scale.on_gpu:
        found.at_most("peak, MiB", scale.memory_mib)
    return found


def neuron(scale: Scale) -> Found:
    """The student's step with Inductor's own thresholds and with those that a run sets: ms, peak memory, kernels."""
    scale.spare_code_generation()
    found, size = Found(), scale.whole
    images_BCHW, labels_B = scale.batch(size)
    before = torch._inductor.config.get_config_copy()
    ways: dict[str, Callable[[nn.Module], None]] = {
        "torch's": lambda net: net.compile(dynamic=False),
        "a run's": compile_training,
    }
    steps: dict[str, Callable[[], None]] = {}
    with patch.object(nn.Module, "compile", autospec=True, side_effect=nn.Module.compile) as compile_:
        for title, compile_it in ways.items():  # torch's first: what a run sets may hold for the whole process
            steps[title] = _student_step(scale, size, compile_it, images_BCHW, labels_B)
            for _ in range(3):
                steps[title]()
    changed = dict(compile_.call_args.kwargs.get("options") or {})
    changed |= {k: v for k, v in torch._inductor.config.get_config_copy().items() if before.get(k) != v}
    seconds = _in_turns(scale, steps)
    for title, step in steps.items():
        found.figures |= {
            f"{title}: ms": 1000 * statistics.median(seconds[title]),
            f"{title}: peak, MiB": scale.peak_mib(step),
            f"{title}: kernels": scale.kernels(step),
        }
    found.figures["a run sets"] = ", ".join(f"{key}={value}" for key, value in changed.items()) or "nothing"
    found.figures["a run's / torch's"] = _ratio(seconds["a run's"], seconds["torch's"])
    found.at_most("a run's / torch's", 1.02, enforced=scale.on_gpu)
    found.at_most("a run's: kernels", float(found.figures["torch's: kernels"]))
    return found


def resnet(scale: Scale) -> Found:
    """The whole step and the student's alone beside a plain ResNet's of the same depth on T*B images."""
    scale.spare_code_generation()
    found, seconds = _compete(scale, {"resnet": "", "student": "", "full": ""}, compiled=True)
    for name in ("student", "full"):
        found.figures[f"{name} / resnet"] = _ratio(seconds[name], seconds["resnet"])
    found.at_most("student / resnet", RATIO, enforced=scale.on_gpu)
    return found


def others(scale: Scale) -> Found:
    """spikingjelly's step and one as research code has it, beside ours."""
    scale.spare_code_generation()
    variants = {"full": "", "loop": "", "student": ""}
    variants["spikingjelly"] = "compiled channels_last" if scale.on_gpu else "eager channels_last"
    found, seconds = _compete(scale, variants, compiled=scale.on_gpu)
    for theirs, ours in THEIRS.items():
        if theirs in seconds:
            found.figures[f"{theirs} / {ours}"] = _ratio(seconds[theirs], seconds[ours])
    return found


def _compete(scale: Scale, variants: dict[str, str], *, compiled: bool) -> tuple[Found, dict[str, list[float]]]:
    """Contestants of `bench/step.py` in turns: ms and kernels of each; and the seconds of every round."""
    found, steps = Found(), {}
    for name, variant in variants.items():
        options = scale.options(scale.plain, variant, compiled=compiled)
        try:
            step, (x_BCHW, labels_B) = CONTESTANTS[name](options), inputs(name, options)
            call = _bound(step, x_BCHW, labels_B)
            for _ in range(3):
                call()
        except Exception as error:
            if name not in THEIRS:
                raise
            why = f"skipped: no {error.name}" if isinstance(error, ImportError) else f"failed: {type(error).__name__}"
            found.figures[name] = why
            continue
        steps[name] = call
    seconds = _in_turns(scale, steps)
    for name, call in steps.items():
        found.figures |= {f"{name}: ms": 1000 * statistics.median(seconds[name])}
        if name != "student":  # part of the whole
            found.figures[f"{name}: kernels"] = scale.kernels(call)
    return found, seconds


def _student_step(
    scale: Scale, size: Size, compile_it: Callable[[nn.Module], None], images_BCHW: Tensor, labels_B: Tensor
) -> Callable[[], None]:
    """Forward, cross-entropy of the mean logits, backward, in a run's precision."""
    torch.manual_seed(0)
    config = scale.config(size)
    net = create_student(config.student).train().to(scale.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compile_it(net)
    autocast = torch.autocast(scale.device.type, torch.bfloat16, enabled=use_bf16(config, scale.device))

    def step() -> None:
        net.zero_grad()
        with autocast:
            logits_BK = net(images_BCHW).mean(0)
        F.cross_entropy(logits_BK.float(), labels_B).backward()  # type: ignore[no-untyped-call]

    return step


def _bound(step: Callable[[Tensor, Tensor], Any], x_BCHW: Tensor, labels_B: Tensor) -> Callable[[], None]:
    def call() -> None:
        step(x_BCHW, labels_B)

    return call


def _in_turns(scale: Scale, steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds a step of each, a list over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    nothing = torch.empty(0)
    for _ in range(scale.rounds):
        for name, step in steps.items():
            step()  # takes back the caches
            seconds[name].append(timed(lambda *_, s=step: s(), nothing, nothing, scale.steps // 2, scale.on_gpu))
    return seconds


def _ratio(seconds: list[float], other: list[float]) -> float:
    """The median over rounds of a round's ratio."""
    return statistics.median(a / b for a, b in zip(seconds, other, strict=True))

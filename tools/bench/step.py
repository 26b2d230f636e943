"""How far a training step is from its limit: ours, a plain ResNet on T*B images, and others' spiking steps.

    python tools/bench_step.py                                             # this machine: T=4, 4 images of 96 px, fp32
    python tools/bench_step.py --device cuda --batch 64 --size 224 --precision bf16
    python tools/bench_step.py --only full,resnet --profile                # and where the time goes

The contestants are in `step_contestants.py`. Each lives in a process of its own, and a round goes through all of them,
so that a machine that slows down slows all of them; a ratio is the median over rounds of a round's ratio. spikingjelly
takes part in the fastest of its variants here. `loop` is always fp32. Peak memory is the allocator's: on a GPU of all
that is there, on a CPU of what a step adds to it.

Shapes: B images, C channels, H and W pixels.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step_profile
import timm
import torch
from arguments import check_counts, check_device, check_outputs
from rounds import Worker, compete, ratio, say
from step_contestants import CONTESTANTS, inputs, make_config

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.files import write_json
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.students import choose_recomputed, create_student, is_spiking

VARIANTS = ("eager", "eager channels_last", "compiled", "compiled channels_last")
"""Ways to run spikingjelly."""
PEERS = tuple(f"sew_resnet{depth}" for depth in (18, 34, 50, 101, 152))
"""The students that timm and spikingjelly have the like of."""


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 1 a contestant failed, 2 a user's mistake, told in one line."""
    return run_tool(lambda: measure(argv))


def measure(argv: list[str]) -> int:
    """The measurement; the exit status. Raises `Mistake`."""
    options = parse(argv)
    if options.worker:
        return work(options)
    check_networks(options, options.only.split(","))
    results = contest(options, argv)
    publish(as_markdown(options, results), options.markdown)
    if options.json:
        write_json(options.json, {"options": describe(options), "results": results})
    if options.profile:
        publish("\n" + step_profile.as_markdown(step_profile.profile(options)), options.markdown)
    return 0 if all("error" not in result for result in results.values()) else 1


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--student", default="sew_resnet34", help="an SEW-ResNet that timm and spikingjelly have the like of"
    )
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--layout", default="channels_last", choices=("channels_last", "contiguous"), help="of the full step's tensors"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a contestant takes in a round")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our student's recipe")
    parser.add_argument("--profile", action="store_true", help="also show where the full step's time goes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="eager", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = set(options.only.split(",")) - set(CONTESTANTS)
    if unknown:
        raise Mistake(f"--only {','.join(sorted(unknown))}: choose from {', '.join(CONTESTANTS)}")
    check_counts(options, "timesteps", "batch", "size", "rounds", "steps")
    check_device(options.device)
    check_outputs(options, "json", "markdown")
    return options


def check_networks(options: argparse.Namespace, contestants: list[str]) -> None:
    """Raise `Mistake`, before any process starts, where these contestants have no such network or setting."""
    config = make_config(options)
    student = create_student(config.student)
    require(is_spiking(student), f"--student {options.student}: is no spiking network")
    choose_recomputed(student, config)
    lacking = [name for name in ("resnet", "spikingjelly") if name in contestants and options.student not in PEERS]
    require(
        not lacking,
        f"--student {options.student}: nothing like it for {' and '.join(lacking)}; choose from {', '.join(PEERS)},"
        " or other contestants with --only",
    )
    require(timm.is_model(options.teacher.partition(".")[0]), f"--teacher {options.teacher}: timm has no such model")


def contest(options: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, Any]]:
    """What `compete` finds of the contestants that `--only` names."""
    names = options.only.split(",")
    variants, failed = dict.fromkeys(names, "eager"), {}
    if "spikingjelly" in names:
        try:
            variants["spikingjelly"] = fastest("spikingjelly", options, argv)
        except RuntimeError as error:
            failed["spikingjelly"] = {"error": str(error)}
    workers = {name: Worker(argv, name, variants[name]) for name in names if name not in failed}
    found = compete(workers, options.rounds) | failed
    return {name: found[name] for name in names}


def fastest(name: str, options: argparse.Namespace, argv: list[str]) -> str:
    """The variant that is the fastest in a first round. Raises `RuntimeError` if it runs in none."""
    took = {}
    for variant in VARIANTS if options.compile else VARIANTS[:2]:
        found = compete({f"{name} ({variant})": Worker(argv, name, variant)}, rounds=1)
        for title, result in found.items():
            if "error" in result:
                say(result["error"])
            else:
                took[variant] = result["seconds"][0]
                say(f"{title}: {1000 * took[variant]:.0f} ms a step")
    if not took:
        raise RuntimeError(f"{name} runs in none of its variants")
    return min(took, key=lambda variant: took[variant])


def work(options: argparse.Namespace) -> int:
    """A contestant: build and warm up at `start`, take steps at each `round`, tell the peak memory at `end`."""
    torch.manual_seed(0)
    name, cuda = options.worker, options.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
    x_BCHW, labels_B = inputs(name, options)
    started = time.monotonic()
    step = CONTESTANTS[name](options)
    peak = 0.0
    for line in sys.stdin:
        question = line.strip()
        if question == "start":
            for _ in range(3):
                step(x_BCHW, labels_B)
            answer = time.monotonic() - started
        elif question == "round":
            step(x_BCHW, labels_B)  # takes back the memory and the caches
            if cuda:
                torch.cuda.reset_peak_memory_stats()  # forgets what compilation took
            answer = timed(step, x_BCHW, labels_B, options.steps, cuda)
            if cuda:
                peak = max(peak, torch.cuda.max_memory_allocated() / 2**20)
                torch.cuda.empty_cache()
        else:
            answer = peak if cuda else allocated_mib(lambda: step(x_BCHW, labels_B))
        print("answer", json.dumps(answer), flush=True)
    return 0


def timed(step: Any, x_BCHW: torch.Tensor, labels_B: torch.Tensor, steps: int, cuda: bool) -> float:
    """Seconds a step takes, the mean of `steps` of them."""
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step(x_BCHW, labels_B)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def allocated_mib(step: Callable[[], object]) -> float:
    """The most that tensors allocated within a step take up on the processor, beyond what was there before.

    By the allocator: resident memory also counts what malloc keeps, which varies by a third from run to run.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = most = 0
    for _, change in changes:
        total += change
        most = max(most, total)
    return most / 2**20


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what."""
    keys = (
        "student",
        "teacher",
        "timesteps",
        "batch",
        "size",
        "precision",
        "compile",
        "layout",
        "set",
        "rounds",
        "steps",
        "device",
    )
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores, {processor()}"
    return {key: getattr(options, key) for key in keys} | {"hardware": device, "torch": torch.__version__}


def processor() -> str:
    """The processor's name."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def as_markdown(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """The table."""
    facts = describe(options)
    lines = [
        f"{facts['student']}, T = {facts['timesteps']}, {facts['batch']} images of {facts['size']} px,"
        f" {facts['precision']}, {'compiled' if facts['compile'] else 'eager'}, teacher {facts['teacher']};"
        f" {facts['hardware']}, torch {facts['torch']}; {facts['rounds']} rounds of {facts['steps']} steps.",
        "",
        "| step | ms, median (least to most) | images/s | peak memory, MiB | time / resnet (least to most) |",
        "|---|---|---|---|---|",
    ]
    limit = results.get("resnet", {}).get("seconds")
    for name, result in results.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error']} | - | - | - |")
            continue
        seconds = result["seconds"]
        layout = [options.layout] if options.layout != "channels_last" else []
        kinds = {"spikingjelly": [result["variant"]], "full": [*layout, *options.set], "student": options.set}.get(name)
        title = f"{name} ({', '.join(kinds)})" if kinds else name
        cells = [
            title,
            f"{1000 * statistics.median(seconds):.0f} ({1000 * min(seconds):.0f} to {1000 * max(seconds):.0f})",
            f"{options.batch / statistics.median(seconds):.2f}",
            f"{result['peak_mib']:.0f}",
            ratio(seconds, limit) if limit else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

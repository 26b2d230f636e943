"""What full-range validation costs: python tools/bench/validation.py [--model sew_resnet18] [--size 64] ...

In each round, over the same images: the bare forward passes of T timesteps; `validate` with all accuracy, calibration
and early-exit metrics; the same with firing rates and operations counted on a share of the images; and T passes, one
for each t = 1..T. Prints medians over rounds of the ratios to the bare pass, as Markdown.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from arguments import check_counts, check_device

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.mistakes import require
from tdkd_dist.students import spiking_names
from tdkd_dist.validate import validate


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: compare(parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default="sew_resnet18", choices=spiking_names(), metavar="STUDENT")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.05, help="of the images whose activity is counted")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    check_counts(options, "size", "batch", "batches", "timesteps", "rounds")
    require(0 <= options.share <= 1, f"--share {options.share}: must be in 0 to 1")
    check_device(options.device)
    return options


def compare(options: argparse.Namespace) -> None:
    """Measure and print the table."""
    times = measure(options)
    bare = times["bare forward passes"]
    print(
        f"{options.model}, T = {options.timesteps}, {options.batches} batches of {options.batch} images of"
        f" {options.size} px, {options.device}, {len(os.sched_getaffinity(0))} cores, {platform.machine()},"
        f" torch {torch.__version__}; {options.rounds} rounds\n"
    )
    print("| | s | ratio to the bare passes (lowest, highest) |\n|---|---|---|")
    for name, seconds in times.items():
        ratios = [own / base for own, base in zip(seconds, bare, strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"| {name} | {statistics.median(seconds):.2f} | {middle:.3f} ({low:.3f}, {high:.3f}) |")


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way of validating, a list over rounds; the ways are interleaved."""
    torch.manual_seed(0)
    device, T = torch.device(options.device), options.timesteps
    model: Any = timm.create_model(options.model, num_timesteps=T).to(device, memory_format=torch.channels_last).eval()
    normalise = Normalise((0.5,) * 3, (0.25,) * 3).to(device)
    shape = (options.batch, 3, options.size, options.size)
    batches = [
        (torch.randint(256, shape, dtype=torch.uint8, device=device), torch.randint(1000, shape[:1], device=device))
        for _ in range(options.batches)
    ]
    counted = round(options.share * options.batch * options.batches)

    def bare() -> None:
        with torch.no_grad():
            for images, _ in batches:
                model(normalise(images))

    def full(num_timesteps: int = T, activity_images: int = 0) -> None:
        validate(model, batches, normalise, num_timesteps=num_timesteps, device=device, activity_images=activity_images)

    def one_pass_a_timestep() -> None:
        for t in range(1, T + 1):
            full(t)

    ways: dict[str, Callable[[], None]] = {
        "bare forward passes": bare,
        "validate": full,
        f"validate, activity on {100 * options.share:g} % of the images": lambda: full(activity_images=counted),
        "a pass for each t": one_pass_a_timestep,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for measured in [False] + [True] * options.rounds:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if measured:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

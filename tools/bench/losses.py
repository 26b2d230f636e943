"""What each objective costs, as a share of the training step that it belongs to.

    python tools/bench/losses.py RECIPE [--rounds 7] [--images N] [--markdown FILE] [key=value ...]

Of every variant's loss the forward and backward pass from given logits, and in the same round the student's forward
and backward pass under the recipe's own loss, on random pictures of the recipe's size: uncompiled, in fp32, on one
thread, without the teacher, which would only make the share smaller. The share is the median over rounds of loss /
step.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from arguments import check_counts, check_outputs

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.config import Config
from tdkd_dist.losses import TemporalDistillationLoss
from tdkd_dist.recipe import VARIANTS, load_config
from tdkd_dist.students import create_student

CALLS = 10
"""Of each loss in a round."""


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: measure(parse(argv)), "losses")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, help="a forward pass; otherwise the recipe's micro-batch")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_intermixed_args(argv)
    check_counts(args, "rounds", "images")
    check_outputs(args, "markdown")
    return args


def measure(args: argparse.Namespace) -> None:
    """Measure, and print the table. Raises `Mistake`."""
    config = load_config(args.recipe, args.settings)
    losses = distinct_losses(args.recipe, args.settings)
    images = args.images or config.micro_batch
    T, K, size = config.student.num_timesteps, config.student.num_classes, config.data.image_size
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pictures = torch.randn(images, config.student.in_chans, size, size).contiguous(memory_format=torch.channels_last)
    labels, teacher = torch.randint(K, (images,)), torch.randn(images, K)
    logits = torch.randn(T, images, K, requires_grad=True)
    step = training_step(config, pictures, teacher, labels)
    calls = {name: loss_call(loss, logits, teacher, labels) for name, loss in losses.items()}
    for call in (step, *calls.values()):
        call()
    shares: dict[str, list[float]] = {name: [] for name in calls}
    steps = []
    for _ in range(args.rounds):
        steps.append(seconds(step))
        for name, call in calls.items():
            shares[name].append(seconds(call, CALLS) / steps[-1])
    lines = [
        f"{config.student.model} of {args.recipe}, T = {T}, {images} images of {size} px, K = {K};"
        f" {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds;"
        f" a step of the student alone: {1000 * statistics.median(steps):.0f} ms",
        "",
        "| loss | share of the step, % | least to most |",
        "|---|---|---|",
    ]
    for name, found in sorted(shares.items(), key=lambda item: statistics.median(item[1])):
        low, middle, high = (100 * value for value in (min(found), statistics.median(found), max(found)))
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    publish("\n".join(lines), args.markdown)


def distinct_losses(recipe: str, settings: list[str]) -> dict[str, TemporalDistillationLoss]:
    """The variants' losses by name; equal ones under the shortest of their names."""
    found: dict[str, tuple[str, TemporalDistillationLoss]] = {}
    for name in sorted((path.stem for path in VARIANTS.glob("*.yaml")), key=lambda stem: (len(stem), stem)):
        options = asdict(load_config(recipe, [f"variant={name}", *settings]).loss)
        found.setdefault(str(options), (name, TemporalDistillationLoss(**options)))
    return dict(found.values())


def training_step(
    config: Config, pictures: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """The student's forward and backward pass."""
    student = create_student(config.student).train().to(memory_format=torch.channels_last)
    loss = TemporalDistillationLoss(**asdict(config.loss))

    def step() -> None:
        loss(student(pictures), teacher, labels).total.backward()

    return step


def loss_call(
    loss: TemporalDistillationLoss, logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """A loss's forward and backward pass."""

    def call() -> None:
        loss(logits, teacher, labels).total.backward()

    return call


def seconds(call: Callable[[], None], times: int = 1) -> float:
    """How long a call takes, the mean of so many."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

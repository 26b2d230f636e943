"""What each option of the training step costs or saves, against the step with every option at its default.

    python tools/bench/options.py [--rounds 7] [--markdown FILE] [step.py's --device, --batch, --size, ...]

Our full step of tools/bench/step.py (student, teacher, losses, backward, optimiser), each variant in a process of its
own, and a round goes through all of them; a ratio is the median over rounds of a round's ratio.
"""

import statistics
import sys

from rounds import Worker, compete, ratio
from step import check_networks, describe, parse

from tdkd_dist.command_line import publish, run_tool
from tdkd_dist.mistakes import Mistake

VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "train.compile=false": ["--no-compile"],
    "default layout instead of channels_last": ["--layout=contiguous"],
    "train.activation_budget=0.7": ["--set=train.activation_budget=0.7"],
    "train.activation_budget=0.4": ["--set=train.activation_budget=0.4"],
    "train.recompute_stages=[1]": ["--set=train.recompute_stages=[1]"],
    "train.recompute_stages=[1,2,3,4]": ["--set=train.recompute_stages=[1,2,3,4]"],
    "train.zero_stage=1": ["--set=train.zero_stage=1"],
    "train.zero_stage=2": ["--set=train.zero_stage=2"],
    "train.ema_decay=0.9999": ["--set=train.ema_decay=0.9999"],
    "loss.beta=0": ["--set=loss.beta=0"],
    "loss.alpha=0": ["--set=loss.alpha=0"],
}
"""The first is what the others are compared with."""


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: compare(argv))


def compare(argv: list[str]) -> None:
    """Measure, and print the table. Raises `Mistake`."""
    options = parse(argv)
    check_networks(options, ["full"])
    workers = {title: Worker([*argv, *extra], "full") for title, extra in VARIANTS.items()}
    results = compete(workers, options.rounds)
    facts = describe(options)
    lines = [
        f"{facts['student']}, T = {facts['timesteps']}, {facts['batch']} images of {facts['size']} px,"
        f" {facts['precision']}, teacher {facts['teacher']}; {facts['hardware']}, torch {facts['torch']};"
        f" {facts['rounds']} rounds of {facts['steps']} steps.",
        "",
        "| full step | ms, median | time / defaults (least to most) | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    first = results[next(iter(VARIANTS))]
    if "error" in first:
        raise Mistake(f"the step with every option at its default: {first['error']}")
    for title, result in results.items():
        if "error" in result:
            lines.append(f"| {title} | {result['error']} | | |")
            continue
        own = result["seconds"]
        cells = [f"{1000 * statistics.median(own):.0f}", ratio(own, first["seconds"]), f"{result['peak_mib']:.0f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    publish("\n".join(lines), options.markdown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

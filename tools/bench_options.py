"""What each option of the training step costs or saves, against the step with every option at its default.

    python tools/bench_options.py [--rounds 7] [--markdown FILE] [bench_step's --device, --batch, --size, ...]

Our full step of tools/bench_step.py (student, teacher, losses, backward, optimiser), each variant in a process of its
own, and a round goes through all of them; a ratio is the median over rounds of a round's ratio.
"""

import statistics
import sys

from bench_step import Worker, describe, parse, say

from tdkd_dist.command_line import publish, run_tool

VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "train.compile=false": ["--no-compile"],
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
    """Measure, and print the table. Raises `ValueError`."""
    options = parse(argv)
    workers = {title: Worker([*argv, *extra], "full", title) for title, extra in VARIANTS.items()}
    seconds: dict[str, list[float]] = {title: [] for title in workers}
    failed: dict[str, str] = {}
    peaks: dict[str, float] = {}
    try:
        for question in ("start", *["round"] * options.rounds, "end"):
            for title, worker in workers.items():
                if title in failed:
                    continue
                try:
                    answer = worker.ask(question)
                except RuntimeError as error:
                    failed[title] = str(error)
                    continue
                if question == "round":
                    seconds[title].append(answer)
                elif question == "end":
                    peaks[title] = answer
            say(f"{question}: done")
    finally:
        for worker in workers.values():
            worker.close()
    facts = describe(options)
    lines = [
        f"{facts['student']}, T = {facts['timesteps']}, {facts['batch']} images of {facts['size']} px,"
        f" {facts['precision']}, teacher {facts['teacher']}; {facts['hardware']}, torch {facts['torch']};"
        f" {facts['rounds']} rounds of {facts['steps']} steps.",
        "",
        "| full step | ms, median | time / defaults (least to most) | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    first = seconds[next(iter(VARIANTS))]
    for title, own in seconds.items():
        if title in failed:
            lines.append(f"| {title} | {failed[title]} | | |")
            continue
        ratios = [s / d for s, d in zip(own, first, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        lines.append(f"| {title} | {1000 * statistics.median(own):.0f} | {spread} | {peaks[title]:.0f} |")
    publish("\n".join(lines), options.markdown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Peak memory of the student's training pass against the number of timesteps, and what each option saves.

    python tools/bench/memory.py                                                     # this machine: 16 images of 96 px
    python tools/bench/memory.py --device cuda --batch 64 --size 224 --precision bf16

Forward, cross-entropy and backward of our student alone, in a process of its own for each figure; on a CPU without what
was there before (weights, old gradients); `resnet` is timm's plain one on T*B images. The slope is that of a straight
line through the timesteps, a timestep's memory for one image.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from arguments import check_outputs
from rounds import Worker, compete
from step import check_networks, describe, parse
from step_contestants import make_config

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.students import create_student
from tdkd_dist.students.resnet import SpikingResNetBase


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: compare(argv))


def compare(argv: list[str]) -> None:
    """Measure, and print the table. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--student", default="sew_resnet34")
    parser.add_argument("--timesteps", default="1,2,4,8", help="numbers of timesteps, separated by commas")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--size", default="96")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args(argv)
    check_outputs(args, "markdown")
    publish(measure(args), args.markdown)


def measure(args: argparse.Namespace) -> str:
    """The table, in Markdown. Raises `Mistake`."""
    common = [f"--{name}={getattr(args, name)}" for name in ("device", "student", "batch", "size", "precision")]
    options = parse(common)
    try:
        timesteps = [int(text) for text in args.timesteps.split(",")]
    except ValueError as error:
        raise Mistake(f"--timesteps {args.timesteps}: give numbers separated by commas") from error
    require(min(timesteps) >= 1, f"--timesteps {args.timesteps}: must be at least 1")
    check_networks(options, ["resnet", "student"])
    student = create_student(make_config(options).student)
    assert isinstance(student, SpikingResNetBase)
    stages = list(range(1, student.num_stages + 1))
    variants: dict[str, tuple[str, list[str]]] = {
        "resnet": ("resnet", []),
        "student": ("student", []),
        "student, eager": ("student", ["--no-compile"]),
        "student, train.activation_budget=0.7": ("student", ["--set=train.activation_budget=0.7"]),
        "student, stage 1 recomputed": ("student", ["--set=train.recompute_stages=[1]"]),
        "student, all stages recomputed": ("student", [f"--set=train.recompute_stages={stages}".replace(" ", "")]),
    }
    if args.precision == "bf16":
        variants["student, fp32"] = ("student", ["--precision=fp32"])
    facts = describe(options)
    lines = [
        f"{facts['student']}, {facts['batch']} images of {facts['size']} px, {facts['precision']}; {facts['hardware']},"
        f" torch {facts['torch']}; peak memory in MiB.",
        "",
        f"| | {' | '.join(f'T = {T}' for T in timesteps)} | a timestep and image |",
        "|---" * (len(timesteps) + 2) + "|",
    ]
    for title, (contestant, extra) in variants.items():
        mib = [peak([*common, *extra, f"--timesteps={T}"], contestant) for T in timesteps]
        slope = np.polyfit(timesteps, mib, 1)[0] / options.batch if len(timesteps) > 1 else float("nan")
        lines.append(f"| {title} | {' | '.join(f'{m:.0f}' for m in mib)} | {slope:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def peak(argv: list[str], contestant: str) -> float:
    """Peak memory in MiB. Raises `Mistake` if the process fails."""
    result = compete({contestant: Worker(argv, contestant)}, rounds=1)[contestant]
    if "error" in result:
        raise Mistake(f"{' '.join(argv)}: {result['error']}")
    mib: float = result["peak_mib"]
    return mib


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

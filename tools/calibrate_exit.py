"""Choose when a student may stop, on pictures that it was neither trained nor is reported on.

    python tools/calibrate_exit.py STUDENT HELDOUT --rule confidence --max-drop 0.2 --out exit.json
    python tools/calibrate_exit.py STUDENT HELDOUT --rule margin --mean-timesteps 1.5 --out exit.json

HELDOUT is a beton (`tools/write_beton.py --holdout` sets one apart) or whatever that tool reads. With --max-drop the
rule with the fewest timesteps is taken whose accuracy is, with 95 % confidence, at most so many points below that of
all T; with --mean-timesteps the most accurate one that needs no more on average.
"""

import sys
from pathlib import Path
from typing import Any, get_args

from tdkd_dist.command_line import Parser, check_input, check_output, check_timesteps, run_tool
from tdkd_dist.memory import keep_freed_memory
from tdkd_dist.mistakes import Mistakes


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    return run_tool(lambda: choose(argv))


def choose(argv: list[str]) -> None:
    """Write the rule. Raises `Mistake`."""
    kinds = ("confidence", "entropy", "margin", "patience")
    parser = Parser(__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--rule", choices=kinds, default="confidence")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--max-drop", type=float, metavar="POINTS")
    aim.add_argument("--mean-timesteps", type=float, metavar="X")
    parser.add_argument(
        "--fall", type=float, default=0.85, metavar="F", help="of thresholds, a timestep; 1: one for all"
    )
    parser.add_argument("--timesteps", type=int, metavar="T", help="the most that are run (default: the student's own)")
    parser.add_argument("--split", choices=("train", "val"), help="of a source that holds both")
    parser.add_argument("--out", type=Path, required=True, metavar="RULE.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    found = Mistakes()
    found.gather(check_input, args.student)
    found.gather(check_input, args.heldout)
    found.gather(check_output, args.out, "--out")
    found.require(0 < args.fall <= 1, f"--fall {args.fall}: must be above 0 and at most 1")
    found.require(args.workers >= 1, f"--workers {args.workers}: must be at least 1")
    found.gather(check_timesteps, args.timesteps)
    found.tell()

    from tdkd_dist.anytime import AnytimeStudent, Kind
    from tdkd_dist.calibration import FALL, calibrate, read_logits

    assert (get_args(Kind), parser.get_default("fall")) == (kinds, FALL)
    keep_freed_memory()
    student = AnytimeStudent.load(args.student, num_timesteps=args.timesteps, device=args.device)
    logits_TBK, labels_B, signature = read_logits(student, args.heldout, split=args.split, workers=args.workers)
    rule = calibrate(
        logits_TBK, labels_B, args.rule, max_drop=args.max_drop, mean_timesteps=args.mean_timesteps, fall=args.fall
    )
    rule.calibration.update({"data": str(args.heldout), "signature": signature, "student": str(args.student)})
    rule.save(args.out)
    print(describe(rule, args.out))


def describe(rule: Any, path: Path) -> str:
    """The rule and what it costs, in three lines."""
    found = rule.calibration
    thresholds = rule.threshold if isinstance(rule.threshold, tuple) else (rule.threshold,)
    asked = ", ".join(f"{threshold:.4g}" for threshold in thresholds[: max(1, rule.num_timesteps - 1)])
    shares = ", ".join(f"{share:.1f} % at {t}" for t, share in enumerate(found["histogram"], start=1))
    return (
        f"{path}: {rule.kind} {asked}, at most {rule.num_timesteps} timesteps\n"
        f"on {found['samples']} held-out pictures: {found['mean_timesteps']:.2f} timesteps on average ({shares})\n"
        f"top-1 {found['top1']:.2f} %, after all timesteps {found['top1_at_T']:.2f} %;"
        f" with 95 % confidence at most {found['drop_bound']:.2f} points are lost"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

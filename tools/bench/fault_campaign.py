"""Try hostile files and nonsense settings by the thousand: each must be read, or refused in a line that says why.

    python tools/bench/fault_campaign.py [--cases 10000] [--seed 0] [--area NAME ...] [--markdown FILE]

The cases are spread over the areas of `tools/bench/faults/`. A fault is an exception other than `Mistake`, a line
with control characters, or more than `LIMIT_S`; it is printed with the seed that repeats it: `--repeat AREA SEED`.
"""

import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

from arguments import check_counts, check_outputs
from faults import Case, areas

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.run.log import format_seconds

LIMIT_S = 20
"""A reader that takes longer hangs: all files here are small."""
SHOWN = 5


class FaultError(Exception):
    """What must not happen."""


class LateError(BaseException):
    """No `Exception`, which a reader's own boundary would take for a damaged file."""


def attempt(case: Case, seed: str) -> bool:
    """Try one case in an empty folder: whether the input was taken (True) or refused. Raises `FaultError`."""

    def late(number: int, frame: FrameType | None) -> None:
        raise LateError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        with tempfile.TemporaryDirectory() as folder:
            case(random.Random(seed), Path(folder))
        return True
    except Mistake as mistake:
        if not mistake.lines or not all(line.isprintable() and line.strip() for line in mistake.lines):
            raise FaultError(f"not a line: {str(mistake)!r}") from mistake
        return False
    except (Exception, LateError) as error:
        raise FaultError("".join(traceback.format_exception(error)[-6:])) from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(argv: list[str]) -> int:
    """Run the campaign; the exit status: 0 no fault, 1 there was one, 2 a user's mistake, told in one line."""
    return run_tool(lambda: campaign(argv))


def campaign(argv: list[str]) -> int:
    """The campaign; the exit status. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", action="append", choices=sorted(areas()), help="only these")
    parser.add_argument("--repeat", nargs=2, metavar=("AREA", "SEED"), help="one case again, with its traceback")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args(argv)
    check_counts(args, "cases")
    check_outputs(args, "markdown")
    if args.repeat:
        area = args.repeat[0]
        require(area in areas(), f"--repeat {area}: no such area; choose from {', '.join(sorted(areas()))}")
        print("taken" if attempt(areas()[args.repeat[0]], args.repeat[1]) else "refused")
        return 0
    chosen = {name: case for name, case in areas().items() if not args.area or name in args.area}
    lines = ["| area | cases | taken | refused in a line | faults |", "|---|---|---|---|---|"]
    began, faults = time.monotonic(), 0
    for number, (name, case) in enumerate(chosen.items(), start=1):
        found = try_area(name, case, -(-args.cases // len(chosen)), args.seed)
        faults += found["fault"]
        lines.append(f"| {name} | {found.total()} | {found['taken']} | {found['refused']} | {found['fault']} |")
        took = time.monotonic() - began
        left = format_seconds(took / number * (len(chosen) - number))
        print(
            f"{number}/{len(chosen)} {name}: {found.total()} cases, {found['fault']} faults; about {left} left",
            flush=True,
        )
    publish("\n".join(lines), args.markdown)
    return 1 if faults else 0


def try_area(name: str, case: Case, cases: int, seed: int) -> Counter[str]:
    """How many of an area's cases were taken, refused, or showed a fault; the first faults are printed."""
    found: Counter[str] = Counter(taken=0, refused=0, fault=0)
    for k in range(cases):
        try:
            found["taken" if attempt(case, f"{seed}-{k}") else "refused"] += 1
        except FaultError as fault:
            found["fault"] += 1
            if found["fault"] <= SHOWN:
                print(f"FAULT: --repeat {name!r} {seed}-{k}\n{fault}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

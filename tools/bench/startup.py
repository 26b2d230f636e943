"""How long a run takes from the command to its first step, by part.

    python tools/bench/startup.py recipe=fashion_sew [--rounds 5] [--markdown FILE]

Runs the recipe for one step, once to fill the caches and then `--rounds` times, each time in a folder of its own.
`command` is what the launcher does before the job's processes start, and what its output takes to appear; the check of
the teacher is left out of the total.
"""

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import check_counts, check_outputs

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.mistakes import Mistake

ROOT = Path(__file__).resolve().parent.parent.parent
LINE = re.compile(r"first step after ([\d.]+) s \((.*)\)")
CHECK = "validating"


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: measure(argv))


def measure(argv: list[str]) -> None:
    """Start again and again, and print the table. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="recipe=NAME and overrides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_intermixed_args(argv)
    check_counts(args, "rounds")
    check_outputs(args, "markdown")
    found = [start_once(args.settings) for _ in range(args.rounds + 1)][1:]
    publish(as_markdown(args.settings, found), args.markdown)


def start_once(settings: list[str]) -> dict[str, float]:
    """Seconds by part, of a run that ends after one step. Raises `Mistake` with what a run that fails said."""
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"run.dir={folder}/run", "train.max_steps=1", "launcher.cluster=local", "eval.activity_images=0"]
        command = [sys.executable, "launch/submit.py", *settings, *extra]
        began, said = time.monotonic(), ""
        parts: dict[str, float] = {}
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if match := LINE.search(line):
                    elapsed_s = time.monotonic() - began
                    pairs = [part.rsplit(" ", 1) for part in match[2].split(", ")]
                    parts = {"command": elapsed_s - float(match[1])} | {name: float(s) for name, s in pairs}
        if not parts:
            raise Mistake(f"{' '.join(command)} took no step:\n{said}")
        print(", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()), file=sys.stderr, flush=True)
        return parts


def as_markdown(settings: list[str], found: list[dict[str, float]]) -> str:
    """The table, in seconds."""
    totals = [sum(seconds for name, seconds in parts.items() if name != CHECK) for parts in found]
    names = list(found[0])
    columns = {name: [parts.get(name, 0.0) for parts in found] for name in names} | {"total": totals}
    heads = [f"({name})" if name == CHECK else name for name in columns]
    return "\n".join(
        [
            f"{' '.join(settings)}; {os.cpu_count()} cores, {platform.machine()}; {len(found)} starts, warm caches;"
            " seconds, median (least to most).",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            "| "
            + " | ".join(f"{statistics.median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns.values())
            + " |",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

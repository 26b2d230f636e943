"""Whether the GPU path holds on this machine: one command, nine minutes on one GPU at most.

    python tools/gpu_acceptance.py                      # on a GPU: writes docs/results/gpu.md too
    python tools/gpu_acceptance.py --only engine,loop   # some checks
    python tools/gpu_acceptance.py --device cpu         # the reduced form, as CI runs it

Each check (`tools/acceptance/`) has a process and a time limit of its own, so that one that crashes, hangs or runs out
of memory leaves the others. Standard output gets one JSON object a line as each check ends, then the table. Neither
ffcv, nor a network, nor trained weights are needed. On a processor the same checks run on small networks, and bounds on
a GPU's time, memory and idleness are told without being enforced. Exit status: 0 all bounds are met, 1 one is missed or
a check failed, 2 a user's mistake, told in one line.
"""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tdkd_dist.command_line import Parser, check_output, run_tool
from tdkd_dist.files import write_text
from tdkd_dist.mistakes import Mistakes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "gpu.md"
SECONDS = 540.0
"""Of the whole run on a GPU."""
PATIENCE = 4.0
"""On a processor, which other work may share, a check may take so many times its limit."""
PACKAGES = ("torch", "triton", "timm", "deepspeed", "numpy", "spikingjelly", "tdkd-dist")


@dataclass(frozen=True)
class Check:
    """Where a check is, and what it may take."""

    function: str
    """`module:name`."""
    limit_s: float
    """Seconds on a GPU, imports left out."""


CHECKS: dict[str, Check] = {
    "engine": Check("acceptance.steps:engine", 150),
    "neuron": Check("acceptance.steps:neuron", 120),
    "resnet": Check("acceptance.steps:resnet", 90),
    "float64": Check("acceptance.numerics:float64", 60),
    "ranks": Check("acceptance.numerics:ranks", 75),
    "loop": Check("acceptance.loop:loop", 90),
    "teacher": Check("acceptance.numerics:teacher", 75),
    "shapes": Check("acceptance.loop:shapes", 60),
    "restore": Check("acceptance.loop:restore", 60),
    "recipes": Check("acceptance.capacity:recipes", 120),
    "validation": Check("acceptance.capacity:validation", 75),
    "others": Check("acceptance.steps:others", 150),
}
"""In the order of what one wants to know first: a run that is cut off at `SECONDS` leaves out the last."""


def main(argv: list[str]) -> int:
    """Check and tell; the exit status."""
    return run_tool(lambda: act(parse(argv)))


def act(options: argparse.Namespace) -> int:
    """All the checks or, in a process of its own, one; the exit status."""
    return work(options.worker, options.device) if options.worker else accept(options)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is a GPU, else cpu")
    parser.add_argument("--only", default=",".join(CHECKS), help=f"checks, separated by commas: {', '.join(CHECKS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="on a GPU: what the whole run may take")
    parser.add_argument(
        "--markdown", type=Path, help="write the table to this file; docs/results/gpu.md if all checks run on a GPU"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return options
    names = options.only.split(",")
    unknown, found = set(names) - set(CHECKS), Mistakes()
    found.require(not unknown, f"--only {','.join(sorted(unknown))}: choose from {', '.join(CHECKS)}")
    options.names = [name for name in CHECKS if name in names]
    found.require(options.seconds > 0, f"--seconds {options.seconds:g}: must be positive")  # nor NaN
    for name in ("markdown", "json"):
        path = getattr(options, name)
        if path is not None:
            found.gather(check_output, path, f"--{name}")
    if options.device != "cpu":
        import torch

        here = torch.cuda.is_available()
        lacks = options.device == "cuda" and not here
        found.require(not lacks, "--device cuda: no GPU here; --device cpu runs the reduced form")
        options.device = "cuda" if here else "cpu"
    found.tell()
    if options.markdown is None and options.device == "cuda" and len(options.names) == len(CHECKS):
        options.markdown = RESULTS
        check_output(RESULTS, "--markdown")
    return options


def accept(options: argparse.Namespace) -> int:
    """Run the checks, print a line for each and the table; the exit status."""
    started, rows = time.monotonic(), []
    facts = describe(options.device)
    for row in run_checks(options.names, options.device, options.seconds):
        print(json.dumps(row), flush=True)
        rows.append(row)
        table = as_markdown(facts, rows, time.monotonic() - started)
        if options.markdown:  # after every check, in case somebody ends us
            write_text(options.markdown, table)
    print(table, flush=True)
    if options.json:
        write_text(options.json, json.dumps({"facts": facts, "checks": rows}, indent=1) + "\n")
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1


def run_checks(names: list[str], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The row of every check, in order.

    While one runs, the next one's process imports what it needs; on a processor it also begins.
    """
    deadline = time.monotonic() + seconds
    workers: dict[str, Worker] = {}
    try:
        for k, name in enumerate(names):
            for near in names[k : k + 2]:
                if near not in workers:
                    workers[near] = Worker(near, device)
                    if device == "cpu":
                        workers[near].go()
            limit_s = CHECKS[name].limit_s * (1 if device == "cuda" else PATIENCE)
            if device == "cuda":
                limit_s = min(limit_s, deadline - time.monotonic())
            yield workers[name].finish(limit_s)
    finally:
        for worker in workers.values():
            worker.end()


class Worker:
    """A check in a process of its own."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        # The program that was started, which a test may have given other checks.
        command = [sys.executable, os.path.abspath(sys.argv[0]), "--worker", name, "--device", device]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, start_new_session=True
        )
        self._started: float | None = None

    def go(self) -> None:
        """Begin, once the imports are done."""
        assert self._process.stdin is not None
        self._started = time.monotonic()
        with suppress(BrokenPipeError):  # it died importing: `finish` tells
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def finish(self, limit_s: float) -> dict[str, Any]:
        """The check's row, which says so if it failed or took longer than `limit_s` seconds from now; ends it."""
        row: dict[str, Any] = {"check": self.name, "status": "failed", "seconds": 0.0, "figures": {}, "bounds": []}
        if limit_s <= 0:
            self.end()
            return row | {"status": "left out", "error": "the time of the whole run is over"}
        if self._started is None:
            self.go()
        try:
            told, _ = self._process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            told = (error.stdout or b"").decode()  # bytes, whatever the pipe was opened as
            row["error"] = f"not done after {limit_s:.0f} s"
        row["seconds"] = self._elapsed
        answers = [
            line for line in told.splitlines(keepends=True) if line.startswith("answer ") and line.endswith("\n")
        ]
        if answers:
            row |= json.loads(answers[-1].removeprefix("answer "))
        if row["status"] == "failed" and "error" not in row:
            row["error"] = f"ended with exit status {self._process.returncode}: {self._last_words()}"
        if row["status"] == "failed":
            self._said.seek(0)
            sys.stderr.write(self._said.read())
        self.end()
        return row

    @property
    def _elapsed(self) -> float:
        assert self._started is not None
        return round(time.monotonic() - self._started, 1)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        """End the process, and those that it started."""
        if self._said.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._said.close()


def work(name: str, device: str) -> int:
    """A check in this process: import, wait for `go`, and print its answer."""
    module, _, function = CHECKS[name].function.partition(":")
    answer: dict[str, Any]
    try:
        check = getattr(importlib.import_module(module), function)
        scale = make_scale(device)
        if sys.stdin.readline() != "go\n":
            return 1  # nobody waits any more
        started = time.monotonic()
        prepare(device)
        found = check(scale)
        seconds = round(time.monotonic() - started, 1)
        answer = {"status": "ok" if found.ok else "missed", "seconds": seconds, **found.as_json()}
    except Exception as error:
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines()
        answer = {"status": "failed", "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    print("answer", json.dumps(answer), flush=True)
    return 0


def make_scale(device: str) -> Any:
    """The full form's scale on a GPU, the reduced form's on a processor."""
    from acceptance.scale import full_scale, reduced_scale

    return full_scale() if device == "cuda" else reduced_scale()


def prepare(device: str) -> None:
    """What every check relies on."""
    import torch

    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(1)  # two checks run at a time


def describe(device: str) -> dict[str, str]:
    """Card, driver and versions."""
    facts = {"device": card() if device == "cuda" else f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"}
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    return facts


def card() -> str:
    """The GPU's name and memory, and the driver."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "a GPU that nvidia-smi does not describe"
    name, memory, driver = told.splitlines()[0].split(", ")
    return f"{name}, {memory}, driver {driver}"


def as_markdown(facts: dict[str, str], rows: list[dict[str, Any]], seconds: float) -> str:
    """The summary: what was measured where, a row a check, and what was missed."""
    versions = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "device")
    lines = [
        "# What holds on a GPU" if "driver" in facts["device"] else "# The GPU path's checks, reduced",
        "",
        "    python tools/gpu_acceptance.py",
        "",
        f"{facts['device']}; {versions}. {len(rows)} checks in {seconds:.0f} s.",
        "",
        "| check | result | s | figures | bounds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [f"{name} {shown(value)}" for name, value in row["figures"].items()]
        told = "; ".join([row["error"], *figures] if "error" in row else figures)
        cells = [row["check"], row["status"], f"{row['seconds']:.0f}", told or "-", bounds_of(row)]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def bounds_of(row: dict[str, Any]) -> str:
    """A check's bounds, each with what came of it."""
    said = []
    for bound in row["bounds"]:
        outcome = "met" if bound["ok"] else "missed"
        enforced = "" if bound["enforced"] else ", not enforced here"
        said.append(f"{bound['figure']} {bound['limit']}: {outcome}{enforced}")
    return "; ".join(said) or "-"


def shown(value: float | int | str) -> str:
    """A figure with as many digits as it is worth."""
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

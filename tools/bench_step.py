"""How far a training step is from its limit: ours, a plain ResNet on T*B images, and others' spiking steps.

    python tools/bench_step.py                                             # this machine: T=4, 4 images of 96 px, fp32
    python tools/bench_step.py --device cuda --batch 64 --size 224 --precision bf16
    python tools/bench_step.py --only full,resnet --profile                # and where the time goes

The contestants are in `step_contestants.py`. Each lives in a process of its own, and a round goes through all of them,
so that a machine that slows down slows all of them; a ratio is the median over rounds of a round's ratio. spikingjelly
takes part in the fastest of its variants here. `loop` is always fp32.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import step_profile
import torch
from step_contestants import CONTESTANTS, inputs

from tdkd_dist.command_line import Parser, publish
from tdkd_dist.run_folder import write_json

VARIANTS = ("eager", "eager channels_last", "compiled", "compiled channels_last")
"""Ways to run spikingjelly."""


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 1 a contestant failed, 2 a user's mistake, told in one line."""
    try:
        options = parse(argv)
        if options.worker:
            return work(options)
        contest = Contest(options, argv)
        try:
            results = contest.run()
        finally:
            contest.close()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = as_markdown(options, results)
    if options.profile:
        table += "\n\n" + step_profile.as_markdown(step_profile.profile(options))
    publish(table, options.markdown)
    if options.json:
        write_json(options.json, {"options": describe(options), "results": results})
    return 0 if all("error" not in result for result in results.values()) else 1


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `ValueError`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        raise ValueError(f"--only {','.join(sorted(unknown))}: choose from {', '.join(CONTESTANTS)}")
    for name in ("timesteps", "batch", "size", "rounds", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU here")
    return options


class Worker:
    """A contestant in its own process."""

    def __init__(self, argv: list[str], name: str, variant: str) -> None:
        self.name, self.variant = name, variant
        command = [sys.executable, __file__, *argv, "--worker", name, "--variant", variant]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> Any:
        """The answer to `start`, `round` or `end`. Raises `RuntimeError` if the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{self.name} ({self.variant}) ended with exit status {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Contest:
    """All contestants, and their times."""

    def __init__(self, options: argparse.Namespace, argv: list[str]) -> None:
        self._options, self._argv = options, argv
        self._workers: list[Worker] = []

    def run(self) -> dict[str, dict[str, Any]]:
        """Each contestant's variant, seconds of every round, peak memory in MiB, or what it failed of."""
        results: dict[str, dict[str, Any]] = {}
        for name in self._options.only.split(","):
            try:
                worker = self._fastest() if name == "spikingjelly" else self._start(name, "eager")
                results[name] = {"variant": worker.variant, "seconds": []}
                self._workers.append(worker)
            except RuntimeError as error:
                results[name] = {"error": str(error)}
        for k in range(self._options.rounds):
            for worker in list(self._workers):
                try:
                    results[worker.name]["seconds"].append(worker.ask("round"))
                except RuntimeError as error:
                    results[worker.name] = {"error": str(error)}
                    self._workers.remove(worker)
            say(f"round {k + 1} of {self._options.rounds}")
        for worker in self._workers:
            try:
                results[worker.name]["peak_mib"] = worker.ask("end")
            except RuntimeError as error:
                results[worker.name] = {"error": str(error)}
        return results

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.close()

    def _start(self, name: str, variant: str) -> Worker:
        worker = Worker(self._argv, name, variant)
        try:
            say(f"{name} ({variant}): ready after {worker.ask('start'):.0f} s")
        except RuntimeError:
            worker.close()
            raise
        return worker

    def _fastest(self) -> Worker:
        """spikingjelly in the variant that is the fastest in a first round."""
        best: tuple[float, Worker] | None = None
        for variant in VARIANTS if self._options.compile else VARIANTS[:2]:
            try:
                worker = self._start("spikingjelly", variant)
                took = first_round(worker)
            except RuntimeError as error:
                say(str(error))
                continue
            say(f"spikingjelly ({variant}): {1000 * took:.0f} ms a step")
            if best is None or took < best[0]:
                if best is not None:
                    best[1].close()
                best = took, worker
            else:
                worker.close()
        if best is None:
            raise RuntimeError("spikingjelly runs in none of its variants")
        return best[1]


def first_round(worker: Worker) -> float:
    """Seconds of a step; a worker that dies of it is ended."""
    try:
        seconds: float = worker.ask("round")
        return seconds
    except RuntimeError:
        worker.close()
        raise


def work(options: argparse.Namespace) -> int:
    """A contestant: build and warm up at `start`, take steps at each `round`, tell the peak memory at `end`."""
    torch.manual_seed(0)
    name, cuda = options.worker, options.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
    x_BCHW, labels_B = inputs(name, options)
    started = time.monotonic()
    before = resident_mib("VmRSS")
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
            reset_peak(cuda)
            answer = timed(step, x_BCHW, labels_B, options.steps, cuda)
            peak = max(peak, torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_mib("VmHWM") - before)
            if cuda:
                torch.cuda.empty_cache()
        else:
            answer = peak
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


def reset_peak(cuda: bool) -> None:
    """Forget what compilation took."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident_mib(field: str) -> float:
    """This process's resident memory now (`VmRSS`), or at most since the last reset (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


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
        ratios = [s / c for s, c in zip(seconds, limit, strict=True)] if limit else []
        title = f"{name} ({result['variant']})" if name == "spikingjelly" else name
        cells = [
            title,
            f"{1000 * statistics.median(seconds):.0f} ({1000 * min(seconds):.0f} to {1000 * max(seconds):.0f})",
            f"{options.batch / statistics.median(seconds):.2f}",
            f"{result['peak_mib']:.0f}",
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

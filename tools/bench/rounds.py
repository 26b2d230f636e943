"""Training steps measured in turns: each in a process of its own, and a round goes through all of them.

So a machine that slows down slows all of them, and the ratio of two times of the same round means something.
"""

import json
import statistics
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

STEP = Path(__file__).resolve().with_name("step.py")


class Worker:
    """A contestant of `step.py` in its own process."""

    def __init__(self, argv: list[str], name: str, variant: str = "eager") -> None:
        self.name, self.variant = name, variant
        command = [sys.executable, str(STEP), *argv, "--worker", name, "--variant", variant]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, text=True)

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


def compete(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Start all, take the rounds, end all.

    Returns each one's `variant`, `seconds` of a step in every round and `peak_mib`, or the `error` it failed of.
    """
    results: dict[str, dict[str, Any]] = {t: {"variant": w.variant, "seconds": []} for t, w in workers.items()}
    try:
        for k, question in enumerate(["start", *["round"] * rounds, "end"]):
            for title, worker in workers.items():
                if "error" in results[title]:
                    continue
                try:
                    answer = worker.ask(question)
                except RuntimeError as error:
                    results[title] = {"error": str(error)}
                    continue
                if question == "start":
                    say(f"{title}: ready")
                elif question == "round":
                    results[title]["seconds"].append(answer)
                else:
                    results[title]["peak_mib"] = answer
            if question == "round":
                say(f"round {k} of {rounds}")
    finally:
        for worker in workers.values():
            worker.close()
    return results


def ratio(seconds: list[float], other: list[float]) -> str:
    """The median over rounds of the ratio of two times, with its spread."""
    ratios = [a / b for a, b in zip(seconds, other, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)

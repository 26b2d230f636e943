"""Signs of life of every rank, and an end for a job in which one of them hangs.

Each rank writes `heartbeat/rank-00000.json` in the run folder every few seconds: what it is doing, at which step, on
which host. A rank whose training loop has not moved for `launcher.hang_timeout_min` ends its process; the scheduler or
the launcher then ends the others, and what each rank did last tells which one the others were waiting for.
"""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from tdkd_dist.files import write_json
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.reading import read_json

WRITE_EVERY_S = 5.0
EXIT_STATUS = 75
START_UP = ("importing", "joining the other ranks", "opening data", "building networks", "restoring", "starting W&B")
PHASES = (*START_UP, "waiting for data", "training", "agreeing", "validating", "saving")
"""What a rank does, in order: once, and within a step."""


@dataclass
class Sign:
    """What a rank was last seen doing."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    moved: float
    """When it last moved, seconds since the epoch."""
    hung: bool = False
    silent: bool = False
    """Long before others gave up it had stopped writing: it did not get to say that it hung."""
    written: float = 0.0
    """When the sign was written, by the clock of the file system."""


def outlasting(timeout_s: float) -> timedelta:
    """A limit for collectives that lets the heartbeat's, `timeout_s`, come first: theirs would name no rank."""
    return timedelta(seconds=2 * timeout_s + 60)


class Heartbeat:
    """This rank's signs of life, written by a thread of its own. Use it as a context manager."""

    def __init__(self, folder: Path, *, rank: int, timeout_s: float) -> None:
        self._path = folder / f"rank-{rank:05d}.json"
        self._timeout_s = timeout_s
        self._sign = Sign(rank, socket.gethostname(), os.getpid(), PHASES[0], 0, time.time())
        self._moved = time.monotonic()
        self._spent = {PHASES[0]: time.time() - psutil.Process().create_time()}
        """Seconds in every phase, from the start of the process on."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        self._thread.join()
        self._write()

    def beat(self, phase: str, step: int) -> None:
        """Say that this rank goes on, and with what."""
        now = time.monotonic()
        self._spent[self._sign.phase] = self._spent.get(self._sign.phase, 0.0) + now - self._moved
        self._sign.phase, self._sign.step = phase, step
        self._sign.moved, self._moved = time.time(), now

    def describe_time(self) -> str:
        """Seconds since the start of the process, all of them and by phase, up to the last beat."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._spent.items())
        return f"{sum(self._spent.values()):.1f} s ({parts})"

    def _watch(self) -> None:
        written = time.monotonic()
        while not self._end.wait(min(1.0, self._timeout_s / 4)):
            now = time.monotonic()
            if now - self._moved > self._timeout_s:
                self._give_up()
            if now - written >= WRITE_EVERY_S:
                self._write()
                written = now

    def _give_up(self) -> None:
        self._sign.hung = True
        self._write()
        print(
            f"rank {self._sign.rank} on {self._sign.host} has not moved for {self._timeout_s:.0f} s"
            f" ({self._sign.phase}, step {self._sign.step}): ending it",
            file=sys.stderr,
            flush=True,
        )
        # Nothing gentler ends a process whose main thread hangs in a collective.
        os._exit(EXIT_STATUS)

    def _write(self) -> None:
        with suppress(OSError):  # a full disk must not end the run; the next sign may get through
            write_json(self._path, asdict(self._sign))


def read_signs(folder: Path) -> list[Sign]:
    """The last sign of every rank, in order; damaged ones are left out."""
    types: dict[str, Any] = {f.name: f.type for f in fields(Sign) if f.name not in ("silent", "written")}
    signs = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(Mistake, OSError):
            found = read_json(path, **types)
            if found is not None:
                written = path.stat().st_mtime
                signs.append(Sign(**{name: found[name] for name in types}, written=written))
    gave_up = max((sign.written for sign in signs if sign.hung), default=0.0)
    for sign in signs:
        sign.silent = not sign.hung and sign.written < gave_up - 3 * WRITE_EVERY_S
    return signs


def find_laggard(signs: list[Sign]) -> Sign | None:
    """The rank that the others were waiting for, if any rank gave up: one that fell silent, or the least far."""
    if not any(sign.hung for sign in signs):
        return None

    def progress(sign: Sign) -> tuple[bool, int, int]:
        return not sign.silent, sign.step, PHASES.index(sign.phase) if sign.phase in PHASES else -1

    return min(signs, key=progress)


def describe_laggard(sign: Sign) -> str:
    """What kept the others waiting, in words."""
    what = "it stopped answering (a stopped process, or a node that is gone)" if sign.silent else "it hung"
    return f"{what}: last seen {sign.phase}, after step {sign.step}, on {sign.host}"

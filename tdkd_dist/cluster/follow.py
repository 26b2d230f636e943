"""A job's log as it grows, and its ranks' outcomes as an exit status."""

import codecs
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tdkd_dist.cluster import scheduler, slurm
from tdkd_dist.cluster.endings import count_memory_kills, ended_badly, find_first, outcome_of
from tdkd_dist.cluster.job import Outcome
from tdkd_dist.mistakes import printable
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Sign, describe_laggard, find_laggard, read_signs
from tdkd_dist.run.log import PROGRESS_PREFIX
from tdkd_dist.run.reading import LONGEST_LINE, opened

FINISHED, CRASHED, USERS_MISTAKE, HUNG_UP, STOPPED = 0, 1, 2, 129, 130
POLL_S = 0.5
QUEUE_POLL_S = 5.0
"""Slurm's controller serves everybody: ask it less often than a file."""
GRACE_S = 30.0
"""How long ranks may go on after one of them has ended in error."""


class Follower:
    """Shows a job's log as it grows and turns the ranks' outcomes into an exit status."""

    def __init__(self, job: Any, folder: RunFolder, cluster: str) -> None:
        self._job, self._folder, self._cluster = job, folder, cluster
        self._tasks = [job.task(k) for k in range(job.num_tasks)]
        self._log = LogTail(folder.log_file)
        self._interrupts = 0
        self._error_since: float | None = None
        self._began = time.time()
        self._memory_kills = count_memory_kills()
        self._asked = time.monotonic()
        self._state: scheduler.State | None = None
        self._hindrance: str | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the user asked for the end."""
        return self._interrupts > 0

    def follow(self) -> int:
        """Until the job is gone, requeued or restarted as it may be in between; its exit status.

        Raises `SystemExit` if the terminal hangs up: the job goes on.
        """
        with _calling(self._interrupt, signal.SIGINT, signal.SIGTERM), _calling(self._hang_up, *_hang_ups()):
            while not (self._left_slurm() if self._cluster == "slurm" else self._done_here()):
                self._log.show()
                time.sleep(POLL_S)
            self._log.show()
            self._log.end()
            return self._status()

    def _left_slurm(self) -> bool:
        now = time.monotonic()
        if now - self._asked < QUEUE_POLL_S:
            return False
        self._asked = now
        state, reason = scheduler.standing("slurm", str(self._job.job_id))
        if state != self._state and state != "gone":
            again = " again" if self._state == "running" else ""
            print(f"job {self._job.job_id} is {state}{again}", flush=True)
        self._state = state
        hindrance = slurm.explain(reason)
        if hindrance is not None and hindrance != self._hindrance:
            print(printable(f"job {self._job.job_id} waits, {hindrance}"), flush=True)
        self._hindrance = hindrance
        return state == "gone"

    def _done_here(self) -> bool:
        if self._error_since is None:
            signs = {sign.rank: sign for sign in self._signs()}
            if any(ended_badly(task, signs.get(rank)) for rank, task in enumerate(self._tasks)):
                self._error_since = time.monotonic()
        if self._error_since is not None and time.monotonic() - self._error_since > GRACE_S:
            scheduler.kill(self._cluster, str(self._job.job_id))
        return bool(self._job.done())

    def _signs(self) -> list[Sign]:
        """Of this job's ranks: a start before this one, which crashed, has left its own."""
        signs = read_signs(self._folder.heartbeat)
        return [sign for sign in signs if sign.written >= self._began and 0 <= sign.rank < len(self._tasks)]

    def _status(self) -> int:
        time.sleep(POLL_S)  # a result may take a moment to be seen on another machine's disk
        outcomes = [outcome_of(task) for task in self._tasks]
        refused = [o.message for o in outcomes if isinstance(o, Outcome) and o.state == "refused"]
        if refused:
            print("\n".join(f"error: {printable(line)}" for line in refused[0].splitlines()), file=sys.stderr)
            return USERS_MISTAKE
        signs, no_memory = self._signs(), count_memory_kills() > self._memory_kills
        first = find_first(self._tasks, signs, no_memory=no_memory and self._cluster == "local")
        if first is not None:
            return self._report_crash(first.rank, first.reason, find_laggard(signs))
        return STOPPED if any(isinstance(o, Outcome) and o.state == "stopped" for o in outcomes) else FINISHED

    def _report_crash(self, rank: int, reason: str, laggard: Sign | None) -> int:
        if laggard is not None:
            rank, reason = laggard.rank, describe_laggard(laggard)
        elif self._cluster == "slurm":
            reason = slurm.how_it_ended(str(self._job.job_id)) or reason
        if not self.interrupted:
            print(printable(f"error: rank {rank} crashed: {reason}"), file=sys.stderr)
            print(f"its output: {self._tasks[rank].paths.stdout}", file=sys.stderr)
        return STOPPED if self.interrupted else CRASHED

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            print("killing the job", file=sys.stderr)
            scheduler.kill(self._cluster, str(self._job.job_id))
            return
        print("stopping the job at its next step; again to kill it", file=sys.stderr)
        scheduler.ask_to_stop(self._cluster, str(self._job.job_id))

    def _hang_up(self) -> None:
        with suppress(OSError):  # that terminal is gone, unless what we say goes elsewhere
            print(f"hung up; the job goes on: python launch/submit.py logs {self._folder.path}", file=sys.stderr)
        raise SystemExit(HUNG_UP)


def show_log(folder: RunFolder) -> None:
    """Print a run's log, and what is added to it while its job is there."""
    tail, job = LogTail(folder.log_file, from_start=True), folder.read_job()
    tail.show()
    while job is not None and scheduler.state_of(job["cluster"], job["job_id"]) != "gone":
        time.sleep(POLL_S if job["cluster"] == "local" else QUEUE_POLL_S)
        tail.show()
    tail.end()


class LogTail:
    """Prints what is appended to a log; on a terminal, progress lines replace each other."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = 0 if from_start else self._size()
        # What was read last may end within a character, or within a line.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._half = ""
        self._on_progress = False

    def show(self) -> None:
        """Print the whole lines that are new. Raises `Mistake` if the log can't be read."""
        while new := self._read():
            *lines, self._half = (self._half + self._decoder.decode(new)).split("\n")
            if len(self._half) > LONGEST_LINE:
                lines, self._half = [*lines, self._half], ""
            for line in lines:
                self._print(printable(line))

    def end(self) -> None:
        """Leave a progress line that stands."""
        if self._on_progress:
            print(flush=True)
            self._on_progress = False

    def _size(self) -> int:
        try:
            with opened(self._path) as stream:
                return stream.seek(0, os.SEEK_END)
        except FileNotFoundError:
            return 0

    def _read(self) -> bytes:
        try:
            with opened(self._path) as stream:
                stream.seek(self._offset)
                new = stream.read(LONGEST_LINE)
        except FileNotFoundError:
            return b""
        self._offset += len(new)
        return new

    def _print(self, line: str) -> None:
        bar = _bar(line) if sys.stdout.isatty() else None
        progress = bar is not None
        start = "\r\x1b[K" if self._on_progress else ""
        if bar is not None:
            line = (bar + line)[: shutil.get_terminal_size().columns - 1]
        print(start + line, end="" if progress else "\n", flush=True)
        self._on_progress = progress


def _bar(line: str, width: int = 20) -> str | None:
    """A bar for the `done/total` that a progress line starts with; None if `line` is none."""
    found = re.match(re.escape(PROGRESS_PREFIX) + r"([0-9]{1,12})/([0-9]{1,12}) ", line)
    if found is None:
        return None
    full = width * int(found[1]) // max(int(found[2]), 1)
    return f"[{'#' * min(full, width)}{'.' * (width - full)}]"


def _hang_ups() -> list[signal.Signals]:
    """What a terminal sends that closes; nothing under nohup."""
    return [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]


@contextmanager
def _calling(action: Any, *numbers: signal.Signals) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda *_: action()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

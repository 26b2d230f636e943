"""A job's log as it grows, and its ranks' outcomes as an exit status."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdkd_dist.cluster import scheduler, slurm
from tdkd_dist.cluster.endings import count_memory_kills, ended_badly, find_first, outcome_of
from tdkd_dist.cluster.job import Outcome
from tdkd_dist.mistakes import printable
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Sign, describe_laggard, find_laggard, read_signs
from tdkd_dist.run.log import PROGRESS_PREFIX

FINISHED, CRASHED, USERS_MISTAKE, STOPPED = 0, 1, 2, 130
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
        self._memory_kills = count_memory_kills()
        self._asked = time.monotonic()
        self._state: scheduler.State | None = None
        self._hindrance: str | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the user asked for the end."""
        return self._interrupts > 0

    def follow(self) -> int:
        """Until the job is gone, requeued or restarted as it may be in between; its exit status."""
        with _calling(self._interrupt, signal.SIGINT, signal.SIGTERM):
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
            print(f"job {self._job.job_id} waits, {hindrance}", flush=True)
        self._hindrance = hindrance
        return state == "gone"

    def _done_here(self) -> bool:
        if self._error_since is None:
            signs = {sign.rank: sign for sign in read_signs(self._folder.heartbeat)}
            if any(ended_badly(task, signs.get(rank)) for rank, task in enumerate(self._tasks)):
                self._error_since = time.monotonic()
        if self._error_since is not None and time.monotonic() - self._error_since > GRACE_S:
            scheduler.kill(self._cluster, str(self._job.job_id))
        return bool(self._job.done())

    def _status(self) -> int:
        time.sleep(POLL_S)  # a result may take a moment to be seen on another machine's disk
        outcomes = [outcome_of(task) for task in self._tasks]
        refused = [o.message for o in outcomes if isinstance(o, Outcome) and o.state == "refused"]
        if refused:
            print("\n".join(f"error: {line}" for line in refused[0].splitlines()), file=sys.stderr)
            return USERS_MISTAKE
        signs, no_memory = read_signs(self._folder.heartbeat), count_memory_kills() > self._memory_kills
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
            print(f"error: rank {rank} crashed: {printable(reason)}", file=sys.stderr)
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
        self._offset = path.stat().st_size if path.exists() and not from_start else 0
        self._on_progress = False

    def show(self) -> None:
        """Print the whole lines that are new."""
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8") as stream:
            stream.seek(self._offset)
            text = stream.read()
        text = text[: text.rfind("\n") + 1]
        self._offset += len(text.encode())
        for line in text.splitlines():
            self._print(line)

    def end(self) -> None:
        """Leave a progress line that stands."""
        if self._on_progress:
            print(flush=True)
            self._on_progress = False

    def _print(self, line: str) -> None:
        progress = line.startswith(PROGRESS_PREFIX) and sys.stdout.isatty()
        start = "\r\x1b[K" if self._on_progress else ""
        if progress:
            line = (_bar(line) + line)[: shutil.get_terminal_size().columns - 1]
        print(start + line, end="" if progress else "\n", flush=True)
        self._on_progress = progress


def _bar(line: str, width: int = 20) -> str:
    """A bar for the `done/total` that a progress line starts with."""
    done, total = line.removeprefix(PROGRESS_PREFIX).split(" ")[0].split("/")
    full = width * int(done) // int(total)
    return f"[{'#' * full}{'.' * (width - full)}]"


@contextmanager
def _calling(action: Any, *numbers: signal.Signals) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda *_: action()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

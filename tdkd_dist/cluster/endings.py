"""How each rank of a job ended, and which of them brought down the others."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tdkd_dist.cluster.job import Outcome
from tdkd_dist.run.heartbeat import Sign

KILLED = "killed, or ended without a result"
NO_MEMORY = (
    "killed, while the kernel ended a process for want of memory: lower data.workers or train.micro_batch, or use a"
    " machine with more"
)
NEIGHBOURS = (
    "closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process", "ncclremoteerror",
    "communicator was aborted", "socket timeout", "timed out waiting", "failed to connect",
)  # fmt: skip
"""Words of errors that a rank dies of because another one has."""


@dataclass
class Ending:
    """A rank that ended badly."""

    rank: int
    reason: str
    at: float
    """When it ended, or was last seen; seconds since the epoch."""
    killed: bool

    @property
    def of_another(self) -> bool:
        """Whether it is what a rank dies of when another has died."""
        return not self.killed and any(words in self.reason.lower() for words in NEIGHBOURS)


def outcome_of(task: Any) -> Outcome | str | None:
    """A rank's outcome, or the last line of what it died of; None if it has left no result.

    submitit's own readers wait for the whole job, and a rank that another one's death leaves waiting never ends.
    """
    from submitit.core.utils import pickle_load

    try:
        kind, found = pickle_load(task.paths.result_pickle)
    except (FileNotFoundError, EOFError):
        return None
    if kind == "success":
        assert isinstance(found, Outcome)
        return found
    lines = [line for line in str(found).splitlines() if line and not line.startswith(" ")]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines or ["unknown"])[-1]


def ended_badly(task: Any, sign: Sign | None) -> bool:
    """Whether a rank on this machine has crashed, was refused, or is gone without a result."""
    gone = sign is not None and sign.host == socket.gethostname() and not psutil.pid_exists(sign.pid)
    outcome = outcome_of(task)
    return gone if outcome is None else not isinstance(outcome, Outcome) or outcome.state == "refused"


def find_first(tasks: list[Any], signs: list[Sign], *, no_memory: bool) -> Ending | None:
    """The rank that ended badly first, by its own fault rather than another's; None if none did.

    A launcher kills the ranks that a crash leaves behind, and neighbours of a killed rank report lost connections: so
    an error of one's own comes first, then a rank without a result, then the rest, each by time.
    """
    last_seen = {sign.rank: sign.written for sign in signs}
    endings = []
    for rank, task in enumerate(tasks):
        outcome = outcome_of(task)
        if outcome is None:
            reason = NO_MEMORY if no_memory else KILLED
            endings.append(Ending(rank, reason, last_seen.get(rank, float("inf")), killed=True))
        elif isinstance(outcome, str):
            at = Path(task.paths.result_pickle).stat().st_mtime
            endings.append(Ending(rank, outcome, at, killed=False))
    return min(endings, key=lambda e: (e.of_another, e.killed, e.at), default=None)


def count_memory_kills() -> int:
    """How many processes this machine's kernel has killed for want of memory since it started."""
    try:
        rows = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("oom_kill ")), 0)

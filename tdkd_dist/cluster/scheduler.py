"""Where a submitted job stands, on Slurm or on this machine, and how to end it."""

import os
import shutil
import signal
import subprocess
from typing import Any, Literal

from tdkd_dist.mistakes import Mistake

State = Literal["pending", "running", "gone"]


def sbatch_answers() -> bool:
    """Whether Slurm can take a job: its programs are here and its controller answers."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def state_of(cluster: str, job_id: str) -> State:
    """Where a job stands; a requeued one is pending. A controller that doesn't answer leaves it running."""
    return standing(cluster, job_id)[0]


def standing(cluster: str, job_id: str) -> tuple[State, str]:
    """`state_of` a job and, if it is pending, why, in Slurm's words."""
    if cluster != "slurm":
        return "gone" if _controller(job_id) is None else "running", ""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-j", job_id, "-o", "%T|%r"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "running", ""
    if done.returncode != 0:
        return "gone" if "Invalid job id" in done.stderr else "running", ""
    rows = [line.split("|", 1) for line in done.stdout.splitlines() if "|" in line]
    if not rows:
        return "gone", ""
    if all(row[0] in ("PENDING", "REQUEUED", "SPECIAL_EXIT") for row in rows):
        return "pending", rows[0][1].strip()
    return "running", ""


def ask_to_stop(cluster: str, job_id: str) -> None:
    """Let the job save a checkpoint and end; a job that only waits is taken out of the queue."""
    if cluster == "slurm":
        _scancel("--state=PENDING", job_id)
        # Not TERM, which is what Slurm itself sends when it ends a step.
        _scancel("--signal=INT", "--state=RUNNING", job_id)
    else:
        # submitit's controller passes TERM on to every rank.
        _send(int(job_id), signal.SIGTERM)


def kill(cluster: str, job_id: str) -> None:
    """End the job at once."""
    if cluster == "slurm":
        _scancel(job_id)
    else:
        for pid in _local_ranks(job_id):
            _send(pid, signal.SIGKILL)


def _scancel(*arguments: str) -> None:
    try:
        subprocess.run(["scancel", *arguments], check=False)
    except OSError as error:
        raise Mistake(f"scancel cannot be run here ({error.strerror}); use a machine of the cluster") from error


def _controller(job_id: str) -> Any:
    """submitit's process for a job on this machine; None once it has ended."""
    import psutil

    try:
        controller = psutil.Process(int(job_id))
        # The number may be another process's by now.
        alive = controller.status() != psutil.STATUS_ZOMBIE and "submitit" in " ".join(controller.cmdline())
        return controller if alive else None
    except (psutil.Error, ValueError):
        return None


def _local_ranks(job_id: str) -> list[int]:
    controller = _controller(job_id)
    return [] if controller is None else [rank.pid for rank in controller.children(recursive=True)]


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise Mistake(f"process {pid} is another user's, who alone may end it") from error

"""From a checked configuration to a job on this machine or on Slurm, followed to its end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdkd_dist.config import Config
from tdkd_dist.job import Job, Outcome
from tdkd_dist.run_folder import RunFolder
from tdkd_dist.tracking import PROGRESS_PREFIX

FINISHED, CRASHED, USERS_MISTAKE, STOPPED = 0, 1, 2, 130
POLL_S = 0.5
GRACE_S = 30.0
"""How long ranks may go on after one of them has ended in error."""


def find_cluster(config: Config) -> str:
    """`local` or `slurm`, with `auto` resolved: Slurm if `sbatch` answers.

    Raises `ValueError` if Slurm is asked for and isn't there.
    """
    answers = _sbatch_answers()
    if config.launcher.cluster == "slurm" and not answers:
        raise ValueError("launcher.cluster=slurm: sbatch does not answer here; launcher.cluster=local runs here")
    if config.launcher.cluster == "auto":
        return "slurm" if answers else "local"
    return config.launcher.cluster


def describe(config: Config, cluster: str) -> str:
    """The job in one line."""
    launcher = config.launcher
    where = "Slurm" if cluster == "slurm" else "this machine"
    gpus = f"{launcher.gpus_per_node} GPUs" if launcher.gpus_per_node else "no GPU"
    return (
        f"{where}: {launcher.nodes} node(s) x {launcher.ranks_per_node} rank(s), {gpus} a node,"
        f" {launcher.time_min} minutes at most"
    )


def make_executor(config: Config, folder: RunFolder, cluster: str) -> Any:
    """submitit's executor with all that `launcher` says."""
    import submitit

    launcher = config.launcher
    executor = submitit.AutoExecutor(folder=folder.jobs, cluster=cluster)
    parameters: dict[str, Any] = {
        "name": config.run.name,
        "nodes": launcher.nodes,
        "tasks_per_node": launcher.ranks_per_node,
        "timeout_min": launcher.time_min,
        "stderr_to_stdout": True,
    }
    if cluster == "slurm":
        parameters |= {
            "gpus_per_node": launcher.gpus_per_node or None,
            "cpus_per_task": launcher.cpus_per_task,
            "mem_gb": launcher.mem_gb,
            "slurm_partition": launcher.partition,
            "slurm_account": launcher.account,
            "slurm_qos": launcher.qos,
            "slurm_constraint": launcher.constraint,
            "slurm_setup": launcher.setup or None,
            "slurm_srun_args": launcher.srun_args or None,
            "slurm_additional_parameters": dict(launcher.sbatch) or None,
            "slurm_signal_delay_s": launcher.signal_delay_s,
        }
        parameters = {key: value for key, value in parameters.items() if value is not None}
    else:
        parameters["gpus_per_node"] = launcher.gpus_per_node
    executor.update_parameters(**parameters)
    return executor


def batch_script(config: Config, folder: RunFolder) -> str:
    """The script that sbatch would be given."""
    executor = make_executor(config, folder, "slurm")._executor
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "ID")
    return text


def submit(config: Config, folder: RunFolder, cluster: str, teacher_weights: str | None) -> Any:
    """Start the run's job with submitit and return submitit's handle.

    Raises `ValueError` with Slurm's own message if it refuses the job.
    """
    from submitit.core.utils import FailedJobError

    executor = make_executor(config, folder, cluster)
    try:
        with _ignoring(signal.SIGINT):
            return executor.submit(Job(config, teacher_weights))
    except FailedJobError as error:
        raise ValueError(f"Slurm refused the job: {' '.join(str(error).split())}") from error


def run_to_end(config: Config, folder: RunFolder, cluster: str, teacher_weights: str | None) -> int:
    """Submit, follow the log until the end, and return the exit status.

    Ctrl-C or TERM stops the job at its next step boundary, with a checkpoint; a second one kills it. On this machine
    a job that crashed is started again up to `launcher.max_restarts` times.
    """
    restarts = 0
    while True:
        job = submit(config, folder, cluster, teacher_weights)
        status = _Follower(job, folder, cluster).follow()
        if status != CRASHED or cluster == "slurm" or restarts >= config.launcher.max_restarts:
            return status
        restarts += 1
        print(f"starting again ({restarts} of {config.launcher.max_restarts} restarts)", file=sys.stderr)


class _Follower:
    """Shows a job's log as it grows and turns the ranks' outcomes into an exit status."""

    def __init__(self, job: Any, folder: RunFolder, cluster: str) -> None:
        self._job, self._folder, self._cluster = job, folder, cluster
        self._tasks = [job.task(k) for k in range(job.num_tasks)]
        self._log = _LogTail(folder.log_file)
        self._interrupts = 0

    def follow(self) -> int:
        with _calling(self._interrupt, signal.SIGINT, signal.SIGTERM):
            error_since: float | None = None
            while not self._job.done():
                self._log.show()
                if error_since is None and any(self._ended_badly(task) for task in self._tasks):
                    error_since = time.monotonic()
                if error_since is not None and time.monotonic() - error_since > GRACE_S:
                    self._kill()
                time.sleep(POLL_S)
            self._log.show()
            self._log.end()
            return self._status()

    def _status(self) -> int:
        outcomes = [self._outcome(task) for task in self._tasks]
        refused = [o.message for o in outcomes if isinstance(o, Outcome) and o.state == "refused"]
        if refused:
            print(f"error: {refused[0]}", file=sys.stderr)
            return USERS_MISTAKE
        crashed = [(k, o) for k, o in enumerate(outcomes) if not isinstance(o, Outcome)]
        if crashed:
            return self._report_crash(*crashed[0])
        return STOPPED if any(isinstance(o, Outcome) and o.state == "stopped" for o in outcomes) else FINISHED

    def _report_crash(self, rank: int, reason: str) -> int:
        print(f"error: rank {rank} crashed: {reason}", file=sys.stderr)
        print(f"its output: {self._tasks[rank].paths.stdout}", file=sys.stderr)
        return STOPPED if self._interrupts else CRASHED

    def _outcome(self, task: Any) -> Outcome | str:
        """The rank's outcome, or the last line of what it died of."""
        if not task.paths.result_pickle.exists():
            time.sleep(POLL_S)
        if not task.paths.result_pickle.exists():
            return "killed, or ended without a result"
        error = task.exception()
        if error is None:
            outcome: Outcome = task.result()
            return outcome
        lines = [line for line in str(error).splitlines() if line and not line.startswith(" ")]
        errors = [line for line in lines if "Error" in line or "Exception" in line]
        return (errors or lines or ["unknown"])[-1]

    def _ended_badly(self, task: Any) -> bool:
        if not task.paths.result_pickle.exists():
            return False
        outcome = self._outcome(task)
        return not isinstance(outcome, Outcome) or outcome.state == "refused"

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            print("killing the job", file=sys.stderr)
            self._kill()
            return
        print("stopping the job at its next step; again to kill it", file=sys.stderr)
        if self._cluster == "slurm":
            subprocess.run(["scancel", "--signal=TERM", str(self._job.job_id)], check=False)
        else:
            # submitit's controller passes TERM on to every rank.
            _send(int(self._job.job_id), signal.SIGTERM)

    def _kill(self) -> None:
        if self._cluster == "slurm":
            subprocess.run(["scancel", str(self._job.job_id)], check=False)
            return
        import psutil

        try:
            ranks = psutil.Process(int(self._job.job_id)).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for rank in ranks:
            _send(rank.pid, signal.SIGKILL)


class _LogTail:
    """Prints what is appended to a log; on a terminal, progress lines replace each other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._on_progress = False

    def show(self) -> None:
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


def _sbatch_answers() -> bool:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        return False
    try:
        # The controller must answer, not only the program be there.
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    """Children started inside inherit the deafness: the terminal's Ctrl-C reaches only us, who stop the job cleanly."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)


@contextmanager
def _calling(action: Any, *numbers: signal.Signals) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda *_: action()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

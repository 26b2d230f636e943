"""From a checked configuration to a job on this machine or on Slurm, followed to its end."""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdkd_dist.cluster import scheduler, slurm
from tdkd_dist.cluster.follow import CRASHED, Follower
from tdkd_dist.cluster.job import PACKAGE, PREEMPTED_FILE, Job
from tdkd_dist.config import Config
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.students import outside


def find_cluster(config: Config) -> str:
    """`local` or `slurm`, with `auto` resolved: Slurm if `sbatch` answers.

    Raises `Mistake` if Slurm is asked for and isn't there.
    """
    answers = scheduler.sbatch_answers()
    if config.launcher.cluster == "slurm" and not answers:
        raise Mistake("launcher.cluster=slurm: sbatch does not answer here; launcher.cluster=local runs here")
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


def make_executor(config: Config, folder: RunFolder, cluster: str, code: Path | None = None) -> Any:
    """submitit's executor with all that `launcher` says; Slurm's jobs run `code`, or else a snapshot taken now."""
    import submitit

    launcher = config.launcher
    # Preemptions and time limits are no failures. Unless told otherwise, submitit requeues after no more than three
    # time-outs, and with a limit of ten minutes or less it takes every preemption for one.
    executor = submitit.AutoExecutor(
        folder=folder.jobs, cluster=cluster, slurm_max_num_timeout=sys.maxsize, local_max_num_timeout=sys.maxsize
    )
    parameters: dict[str, Any] = {
        "name": config.run.name,
        "nodes": launcher.nodes,
        "tasks_per_node": launcher.ranks_per_node,
        "timeout_min": launcher.time_min,
        "stderr_to_stdout": True,
    }
    if cluster == "slurm":
        code = code or snapshot(folder, [config])
        options = slurm.options(launcher)
        cpus = slurm.cpus_per_task(launcher, slurm.partitions(launcher))
        parameters |= {
            # Many clusters want their own way, such as launcher.sbatch.gres=gpu:a100:4, and refuse both together.
            "gpus_per_node": None if set(slurm.GPU_OPTIONS) & options.keys() else launcher.gpus_per_node or None,
            "cpus_per_task": cpus,
            "mem_gb": launcher.mem_gb,
            "slurm_partition": launcher.partition,
            "slurm_account": launcher.account,
            "slurm_qos": launcher.qos,
            "slurm_constraint": launcher.constraint,
            "slurm_setup": [
                f'export PYTHONPATH={shlex.quote(f"{code}:")}"$PYTHONPATH" PYTHONSAFEPATH=1',
                *_count_from(folder),
                *launcher.setup,
            ],
            "slurm_teardown": _requeue(launcher.max_restarts),
            # One dead rank ends the others, which would wait for it.
            "slurm_srun_args": [
                "--kill-on-bad-exit=1",
                # From 22.05 to 23.02 srun does not inherit it from sbatch.
                *([f"--cpus-per-task={cpus}"] if cpus is not None else []),
                *launcher.srun_args,
            ],
            "slurm_additional_parameters": options,
            "slurm_signal_delay_s": launcher.signal_delay_s,
        }
        parameters = {key: value for key, value in parameters.items() if value is not None}
    else:
        parameters["gpus_per_node"] = launcher.gpus_per_node
    executor.update_parameters(**parameters)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cluster == "local" and chosen is not None:
        # submitit would number GPUs from 0 instead, and its own `visible_gpus` knows neither UUIDs nor MIG's names.
        executor._executor.parameters["visible_gpus"] = (chosen,)
    return executor


def batch_script(config: Config, folder: RunFolder) -> str:
    """The script that sbatch would be given."""
    executor = make_executor(config, folder, "slurm", folder.jobs.absolute() / "code")._executor
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "ID")
    return text


def submit(config: Config, folder: RunFolder, cluster: str, teacher_weights: str | None) -> Any:
    """Start the run's job with submitit and return submitit's handle.

    Raises `Mistake` with Slurm's own message if it refuses the job.
    """
    job = _submitted(make_executor(config, folder, cluster), [Job(config, teacher_weights)])[0]
    folder.write_job(cluster, str(job.job_id), _restarts(folder))
    return job


def submit_array(configs: list[Config], weights: list[str | None], home: Path) -> list[Any]:
    """Start a sweep on Slurm as one job array, in one call of sbatch; the members' handles.

    `home` holds submitit's files of all members. Raises `Mistake` if the members differ in `launcher`, or with
    Slurm's own message.
    """
    for config in configs[1:]:
        if config.launcher != configs[0].launcher:
            raise Mistake("a sweep on Slurm is one job array: sweep.launcher is not possible")
    shared = RunFolder(home)
    members = [Job(config, own) for config, own in zip(configs, weights, strict=True)]
    jobs = _submitted(make_executor(configs[0], shared, "slurm", snapshot(shared, configs)), members)
    for config, job in zip(configs, jobs, strict=True):
        RunFolder(config.run.folder).write_job("slurm", str(job.job_id), _restarts(shared))
    return jobs


def refuse_if_alive(folder: RunFolder) -> None:
    """Raise `Mistake` if a job of this run is still waiting or running: two would spoil each other's files."""
    job = folder.read_job()
    if job is not None and scheduler.state_of(job["cluster"], job["job_id"]) != "gone":
        raise Mistake(
            f"{folder.path}: its job {job['job_id']} is still there; python launch/submit.py logs {folder.path} follows"
            f" it, python launch/submit.py cancel {folder.path} stops it"
        )


def run_to_end(config: Config, folder: RunFolder, cluster: str, teacher_weights: str | None) -> int:
    """Submit, follow the log until the end, and return the exit status.

    Ctrl-C or TERM stops the job at its next step boundary, with a checkpoint; a second one kills it. A job that crashed
    is started again up to `launcher.max_restarts` times: here by us, on Slurm by its own batch script.
    """
    restarts = 0
    while True:
        status = Follower(submit(config, folder, cluster, teacher_weights), folder, cluster).follow()
        if status != CRASHED or cluster == "slurm" or restarts >= config.launcher.max_restarts:
            return status
        restarts += 1
        print(f"starting again ({restarts} of {config.launcher.max_restarts} restarts)", file=sys.stderr)


def _submitted(executor: Any, jobs: list[Job]) -> list[Any]:
    from submitit.core.utils import FailedJobError

    try:
        with _ignoring(signal.SIGINT), _ignoring(signal.SIGHUP), _outside_any_job():
            if len(jobs) == 1:
                return [executor.submit(jobs[0])]
            with executor.batch():
                return [executor.submit(job) for job in jobs]
    except FailedJobError as error:
        raise Mistake(f"Slurm refused the job: {' '.join(str(error).split())}") from error


def snapshot(folder: RunFolder, configs: list[Config]) -> Path:
    """A copy of the package, so that edits after submission do not reach a job that still waits.

    And of the modules or packages that students from outside are in, without hidden files and the run's folder.
    """
    code = folder.jobs / f"code-{time.strftime('%Y%m%d-%H%M%S')}"
    code.mkdir(parents=True, exist_ok=True)
    models = {config.student.model for config in configs if outside.is_outside(config.student.model)}

    def unwanted(parent: str, names: list[str]) -> list[str]:
        own = folder.path.absolute()
        return [n for n in names if n == "__pycache__" or n.startswith(".") or (Path(parent) / n).absolute() == own]

    for source in {PACKAGE, *map(outside.find_source, models)}:
        if source is not None and source.is_dir():
            shutil.copytree(source, code / source.name, ignore=unwanted, dirs_exist_ok=True)
        elif source is not None:
            shutil.copy2(source, code)
    return code.absolute()


def _restarts(folder: RunFolder) -> Path:
    """Where the batch scripts count their restarts, a file a job."""
    return folder.jobs.absolute() / "restarts"


def _count_from(folder: RunFolder) -> list[str]:
    """Lines for the start of the batch script: where restarts are counted, and where a rank says it is no crash."""
    return [
        "tdkd_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}",
        "tdkd_job=${tdkd_job:-$SLURM_JOB_ID}",
        f'tdkd_count={shlex.quote(str(_restarts(folder)))}/"$tdkd_job"',
        f'export {PREEMPTED_FILE}="$tdkd_count.preempted"',
        f'mkdir -p "$(dirname "$tdkd_count")" && rm -f "${PREEMPTED_FILE}"',
    ]


def _requeue(max_restarts: int) -> list[str]:
    """Lines for the end of the batch script: nobody else requeues a job that crashed, which alone counts.

    Nor one that was preempted with a period of grace, and used it to save and end: Slurm calls that failed.
    """
    return [
        "status=$?",
        "again=no",
        "if [ $status -ne 0 ]; then",
        f'    if [ -e "${PREEMPTED_FILE}" ] || scontrol -o show job "$tdkd_job" | grep -q " PreemptTime=[0-9]"; then',
        "        again=yes",
        f'    elif [ "$(cat "$tdkd_count" 2>/dev/null || echo 0)" -lt {max_restarts} ]; then',
        '        again=yes && echo $(($(cat "$tdkd_count" 2>/dev/null || echo 0) + 1)) >"$tdkd_count"',
        "    fi",
        "fi",
        '[ $again = no ] || { scontrol requeue "$tdkd_job" && sleep 60; }',
        "exit $status",
    ]


@contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    """Children started inside inherit the deafness.

    The terminal's Ctrl-C reaches only us, who stop the job cleanly, and its hang-up ends only us: the job goes on.
    """
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """Without the variables of a job that we are run in: sbatch would hand them on, and srun obeys them.

    submitit's `clean_env` takes SLURM_CONF and the user's defaults for sbatch too.
    """
    inside = "SLURM_JOB_ID" in os.environ
    names = [n for n in os.environ if inside and n.startswith(("SLURM_", "SRUN_")) and n != "SLURM_CONF"]
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(taken)

"""Where a run is, in a few lines, read from its folder and from the scheduler."""

import os
import time
from pathlib import Path

from tdkd_dist.cluster import scheduler, slurm
from tdkd_dist.config import Config
from tdkd_dist.curves import format_curve, read_curve
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.recipe import read_config
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import find_laggard, read_signs
from tdkd_dist.run.log import PROGRESS_PREFIX, format_seconds
from tdkd_dist.run.reading import is_there, opened
from tdkd_dist.run.record import last_row


def open_run(path: str) -> RunFolder:
    """The run in a folder, or `runs/` with a run's name. Raises `Mistake` if there is none."""
    for folder in (RunFolder(Path(path)), RunFolder(Path("runs") / path)):
        if is_there(folder.config_file):
            return folder
    raise Mistake(f"{path}: no run is here (no config.yaml)")


def describe_run(folder: RunFolder) -> str:
    """State, place in the training, speed, time left, accuracy after every timestep, restarts.

    Raises `Mistake` if one of its files is damaged.
    """
    config = read_config(folder.config_file)
    job = folder.read_job()
    lines = [f"{folder.path}: {_state(folder, config)}"]
    last = last_row(folder.metrics_file, "train/images_per_s", "train/loss")
    if last is not None:
        of = f" of {config.train.max_steps}" if config.train.max_steps else ""
        lines.append(
            f"epoch {last['epoch'] + 1}/{config.train.epochs}, step {last['global_step']}{of},"
            f" {last['train/images_per_s']:.0f} images/s, loss {last['train/loss']:.4f}"
        )
    progress = _last_progress(folder)
    if progress and not lines[0].endswith("finished"):
        lines.append(progress)
    row = last_row(folder.metrics_file, "val/top1_t1")
    if row is not None:
        lines.append(f"top-1 after each timestep, epoch {row['epoch']}: {format_curve(read_curve(row, 'val/top1'))} %")
    restarts = count_restarts(job) if job is not None else 0
    if restarts:
        lines.append(f"restarts after a crash: {restarts} of {config.launcher.max_restarts}")
    return "\n".join(lines)


def count_restarts(job: dict[str, str]) -> int:
    """How often the job's batch script has requeued it after a crash."""
    try:
        with opened(Path(job["restarts"]) / job["job_id"]) as stream:
            return int(stream.read(20))
    except (FileNotFoundError, ValueError):  # there was none, or a `Mistake`
        return 0


def cancel(folder: RunFolder) -> str:
    """Ask the run's job to save and end; what was done, in a line. Raises `Mistake` if it has none to end."""
    job = folder.read_job()
    require(job is not None, f"{folder.path}: no job was ever submitted for it")
    assert job is not None
    state = scheduler.state_of(job["cluster"], job["job_id"])
    require(state != "gone", f"{folder.path}: its job {job['job_id']} has ended already")
    scheduler.ask_to_stop(job["cluster"], job["job_id"])
    if state == "pending":
        return f"job {job['job_id']} is taken out of the queue"
    return f"job {job['job_id']} saves a checkpoint and stops; the run's command goes on from there"


def _state(folder: RunFolder, config: Config) -> str:
    job, signs = folder.read_job(), read_signs(folder.heartbeat)
    state, reason = scheduler.standing(job["cluster"], job["job_id"]) if job is not None else ("gone", "")
    if job is not None and state != "gone":
        where = f"Slurm job {job['job_id']}" if job["cluster"] == "slurm" else f"process {job['job_id']} here"
        if state == "pending":
            return f"waiting in the queue, {where}, {slurm.explain(reason) or reason}"
        if signs:
            seen = format_seconds(max(0.0, time.time() - min(sign.moved for sign in signs)))
            return f"{signs[0].phase}, {where}, {len(signs)} rank(s), each has moved in the last {seen}"
        return f"starting, {where}"
    if folder.read_summary(config) is not None:
        return "finished"
    laggard = find_laggard(signs)
    if laggard is not None:
        return f"ended because rank {laggard.rank} on {laggard.host} hung ({laggard.phase}, step {laggard.step})"
    return "stopped or crashed; the run's command goes on from its last checkpoint"


def _last_progress(folder: RunFolder) -> str | None:
    """The last progress line of the log."""
    try:
        with opened(folder.log_file) as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 10_000))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    found = [line.strip() for line in lines if line.startswith(PROGRESS_PREFIX)]
    return found[-1] if found else None

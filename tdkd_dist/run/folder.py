"""The layout of a run on disk.

config.yaml               the resolved configuration
data.json                 what was trained and validated on, by signature
environment.json          git revision, versions and hardware of the latest start
log.txt                   what rank 0 said
metrics.jsonl             one object a row
validation.json           the last validation in full: early-exit curves, every layer's firing rates
checkpoints/              whole states, to resume from
figures/                  accuracy against timestep
student.safetensors       the last epoch's weights; student_best.safetensors the best's
summary.json              the outcome; there once the run is finished
job.json                  the job that was last submitted
heartbeat/                every rank's last sign of life
skipped.jsonl             the samples of steps that were skipped because their loss was not finite
submitit/, wandb/         each rank's own output; the W&B record
"""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tdkd_dist.config import Config, flatten
from tdkd_dist.files import write_json
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.recipe import read_config, save_config
from tdkd_dist.run.progress import newest_progress
from tdkd_dist.run.reading import read_json

MAY_DIFFER = ("train.epochs", "train.max_steps", "train.save_", "train.keep_", "launcher.", "wandb.timeout_s", "run.")
"""Keys that may change when a run is resumed: its length and where it runs (`run.` is checked on its own)."""
OURS = {"checkpoints", "figures", "heartbeat", "submitit", "wandb", ".writable", "job.json", "log.txt"}
"""What a run may have left that ended before its configuration was written."""
PACKAGES = ("torch", "timm", "deepspeed", "ffcv", "submitit", "wandb", "numpy", "safetensors", "tdkd-dist")


class RunFolder:
    """Paths of one run, see above, and what is read from and written to them whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.data_file = path / "data.json"
        self.log_file = path / "log.txt"
        self.metrics_file = path / "metrics.jsonl"
        self.validation_file = path / "validation.json"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.student_file = path / "student.safetensors"
        self.best_student_file = path / "student_best.safetensors"
        self.summary_file = path / "summary.json"
        self.job_file = path / "job.json"
        self.heartbeat = path / "heartbeat"
        self.skipped_file = path / "skipped.jsonl"
        self.jobs = path / "submitit"

    def write_job(self, cluster: str, job_id: str, restarts: Path) -> None:
        """Record the job submitted for this run, and the folder in which its restarts are counted."""
        content = {"cluster": cluster, "job_id": job_id, "host": platform.node(), "restarts": str(restarts)}
        write_json(self.job_file, content)

    def read_job(self) -> dict[str, str] | None:
        """What `write_job` recorded; None if there was no job, or it is another machine's process.

        Raises `Mistake` if that is damaged: whether a job is alive can't be told.
        """
        job = read_json(self.job_file, cluster=str, job_id=str, host=str, restarts=str)
        if job is None:
            return None
        # It is handed to programs and to kill(2): `-1` would be every process.
        is_job = job["cluster"] in ("local", "slurm") and re.fullmatch(r"[0-9]{1,10}(_[0-9]{1,10})?", job["job_id"])
        require(bool(is_job), f"{self.job_file}: names no job ({job['cluster']} {job['job_id']}); delete it")
        return job if job["cluster"] == "slurm" or job["host"] == platform.node() else None

    def create(self, config: Config, data: dict[str, str] | None = None) -> None:
        """Make the folder for a run on the `data` (signature of each split), or check that it holds the same run.

        Raises `Mistake` naming `run.dir` if the folder can't be written, or as `check` and `check_data` do.
        """
        self.check(config)
        changed = self.check_data(config, data or {})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            # The signs of an earlier job's ranks, of which there may have been more.
            shutil.rmtree(self.heartbeat, ignore_errors=True)
            for folder in (self.checkpoints, self.figures):
                folder.mkdir(exist_ok=True)
            save_config(config, self.config_file)
            write_json(self.path / "environment.json", environment())
            if data:
                write_json(self.data_file, data | {"changed": changed})
        except OSError as error:
            raise Mistake(f"run.dir={self.path}: cannot be written ({error.strerror}); choose another") from error

    def check(self, config: Config) -> None:
        """Raise `Mistake` unless the folder is free for the run that `config` describes, or holds it.

        It may hold another run, its evaluation, more of it than is asked for now, checkpoints of another form, or
        somebody's files: whatever is there would be lost. A run that never came to anything may be mended.
        """
        if not self.config_file.exists():
            self._check_free()
            return
        results = (self.metrics_file, self.summary_file, self.student_file)
        if newest_progress(self.checkpoints) is None and not any(file.exists() for file in results):
            return
        there = read_config(self.config_file)
        self._check_same(there, config)
        trained = there.train.epochs > 0
        if trained != (config.train.epochs > 0):
            was, now, name = ("a training", "an evaluation", f"{self.path.name}-eval")
            if not trained:
                was, now, name = now, was, f"{self.path.name}-train"
            raise Mistake(f"{self.path} holds {was}, whose record {now} would overwrite: set run.name={name}")
        done, train = newest_progress(self.checkpoints), config.train
        if done is not None and (done.epoch > train.epochs or done.global_step > (train.max_steps or done.global_step)):
            raise Mistake(
                f"{self.path} has gone {done.epoch} epochs, {done.global_step} steps, more than now are asked for"
                f" (train.epochs={train.epochs}, train.max_steps={train.max_steps}): ask for as many, or give the"
                " shorter run another run.name"
            )

    def check_data(self, config: Config, data: dict[str, str]) -> list[dict[str, Any]]:
        """The changes of data so far and now, which `run.allow_other_data` must allow. Raises `Mistake`."""
        newest = newest_progress(self.checkpoints)
        before = None if newest is None else read_json(self.data_file)
        if newest is None or before is None:
            return []
        changes = list(before.get("changed") or [])
        for split, now in data.items():
            if before.get(split, now) != now:
                what = f"data.{split}={getattr(config.data, split)}"
                if not config.run.allow_other_data:
                    raise Mistake(
                        f"{what}: {self.path} was trained on other data (signature {str(before[split])[:12]} there,"
                        f" {now[:12]} now): give that again, or another run.name, or run.allow_other_data=true"
                    )
                changes.append({"global_step": newest.global_step, "note": f"{what}: other data from here on"})
        return changes

    def notes_at(self, global_step: int) -> list[str]:
        """What the record must say of a run that goes on from this step."""
        changes = (read_json(self.data_file) or {}).get("changed") or []
        return [change["note"] for change in changes if change["global_step"] == global_step]

    def _check_free(self) -> None:
        nearest = next(path for path in self.path.absolute().parents if path.exists())
        if not nearest.is_dir():
            raise Mistake(f"run.dir={self.path}: cannot be written ({nearest} is a file); choose another")
        if self.path.exists() and not self.path.is_dir():
            raise Mistake(f"run.dir={self.path}: a file, not a folder; choose another")
        try:
            foreign = sorted(p.name for p in self.path.iterdir() if p.name not in OURS) if self.path.exists() else []
        except OSError as error:
            raise Mistake(f"run.dir={self.path}: cannot be read ({error.strerror}); choose another") from error
        if foreign:
            raise Mistake(f"run.dir={self.path}: holds {foreign[0]}, which is no run's; choose an empty or new folder")

    def _check_same(self, there: Config, config: Config) -> None:
        before, now = flatten(there), flatten(config)
        differing = [key for key in now if before[key] != now[key] and not key.startswith(MAY_DIFFER)]
        if before["run.seed"] != now["run.seed"]:
            differing.append("run.seed")
        if differing:
            changes = ", ".join(f"{key} ({before[key]} there, {now[key]} now)" for key in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise Mistake(
                f"{self.path} holds a run that differs in {changes}{more};"
                " give this one another run.name or run.dir, or delete the folder"
            )

    def read_summary(self, config: Config) -> dict[str, Any] | None:
        """The outcome if the run that `config` describes has finished here, at its full length.

        Raises `Mistake` if it is damaged.
        """
        summary = read_json(self.summary_file, epochs=int, max_steps=int | None, table=str, figure=str)
        if summary is None:
            return None
        same_length = (summary["epochs"], summary["max_steps"]) == (config.train.epochs, config.train.max_steps)
        return summary if same_length else None


def environment() -> dict[str, Any]:
    """Git revision, versions of the packages that matter, and the machine."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "git": _git_revision(),
        "python": platform.python_version(),
        "versions": versions,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

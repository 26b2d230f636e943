"""What ranks are given by submitit on this machine, and what the batch script says."""

import os
import subprocess
from functools import partial

import pytest

from tdkd_dist.cluster.submission import batch_script, make_executor
from tdkd_dist.config import Config, LauncherConfig
from tdkd_dist.recipe import load_config
from tdkd_dist.run.folder import RunFolder


@pytest.mark.parametrize(
    ("chosen", "gpus", "seen"),
    [
        ("3", 1, "3"),
        ("2,3", 2, "2,3"),
        ("GPU-8f6f2c1a-5d2e", 1, "GPU-8f6f2c1a-5d2e"),
        ("MIG-41b36413-58d4", 1, "MIG-41b36413-58d4"),
        (None, 2, "0,1"),
        ("2,3", 0, ""),
    ],
)
def test_the_ranks_here_see_the_gpus_that_the_user_chose(chosen, gpus, seen, tmp_path, monkeypatch):
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    config = Config(launcher=LauncherConfig(gpus_per_node=gpus, time_min=5))
    executor = make_executor(config, RunFolder(tmp_path), "local")
    job = executor.submit(partial(os.getenv, "CUDA_VISIBLE_DEVICES"))
    assert job.results() == [seen] * config.launcher.ranks_per_node


def test_a_folders_name_is_no_shell(tmp_path, monkeypatch):
    """Of the batch script all but submitit's srun and scontrol is run, in a folder whose name is a command."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / 'a"$(touch hacked)`touch hacked` b'
    config = load_config("fashion_sew", [f"run.dir='{place}'", "run.name=x y", "launcher.partition=$(touch hacked)"])
    script = batch_script(config, RunFolder(config.run.folder))
    lines = [line for line in script.splitlines() if not line.startswith("srun") and "scontrol" not in line]
    script = "\n".join(lines).replace("sleep 60", "true")
    subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_JOB_ID": "1"}, capture_output=True, timeout=60)
    assert (place / "submitit" / "restarts").is_dir()
    assert not list(tmp_path.rglob("hacked"))


def test_nothing_of_the_environment_is_written(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SECRET"):
        monkeypatch.setenv(name, "s3cr3t")
    config = load_config("fashion_sew", [f"run.dir={tmp_path}/run"])
    folder = RunFolder(config.run.folder)
    folder.create(config)
    assert "s3cr3t" not in batch_script(config, folder)
    make_executor(Config(launcher=LauncherConfig(time_min=5)), folder, "local").submit(
        partial(os.getenv, "X")
    ).results()
    written = [path for path in folder.path.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert not [path for path in written if b"s3cr3t" in path.read_bytes()]

"""What ranks are given by submitit on this machine."""

import os
from functools import partial

import pytest

from tdkd_dist.cluster.submission import make_executor
from tdkd_dist.config import Config, LauncherConfig
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

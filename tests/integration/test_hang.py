"""A rank that hangs in a real job of several ranks: which limit ends it, and whether the right one is named."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdkd_dist import distributed
from tdkd_dist.cluster.job import Job
from tdkd_dist.recipe import load_config
from tdkd_dist.run import heartbeat
from tdkd_dist.run.heartbeat import EXIT_STATUS, describe_laggard, find_laggard, outlasting, read_signs

RANK = """
import os, signal, sys, time
from pathlib import Path
import torch
from tdkd_dist import distributed
from tdkd_dist.run import heartbeat as module
from tdkd_dist.run.heartbeat import Heartbeat, outlasting

module.WRITE_EVERY_S = 0.5
rank, port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
distributed.start_here(rank, 2, port, torch.device("cpu"), timeout=outlasting(4))
with Heartbeat(folder, rank=rank, timeout_s=4) as heartbeat:
    for step in range(3):
        heartbeat.beat("waiting for data", step)
        if rank == 1 and step == 2:
            {hang}
        heartbeat.beat("training", step)
        distributed.sum_over_ranks(torch.ones(1))
        heartbeat.beat("agreeing", step)
        distributed.any_rank(False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hang", "words"),
    [
        ("time.sleep(600)", "it hung: last seen "),
        ("(time.sleep(2.5), os.kill(os.getpid(), signal.SIGSTOP))", "it stopped answering ("),
    ],
)
def test_the_rank_that_sleeps_or_is_stopped_is_named(tmp_path: Path, monkeypatch, hang: str, words: str) -> None:
    monkeypatch.setattr(heartbeat, "WRITE_EVERY_S", 0.5)
    port = str(distributed.free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("{hang}", hang), str(rank), port, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [ranks[0].communicate(timeout=120)[1]]
    if "SIGSTOP" in hang:
        ranks[1].kill()  # as the follower does after a while
    said.append(ranks[1].communicate(timeout=120)[1])
    assert [rank.returncode for rank in ranks].count(EXIT_STATUS) >= 1, said  # the other one may lose its peer first
    laggard = find_laggard(read_signs(tmp_path))
    assert laggard is not None
    assert (laggard.rank, laggard.phase, laggard.step) == (1, "waiting for data", 2)
    assert describe_laggard(laggard).startswith(words)


@given(st.floats(min_value=0.01, max_value=10_000_000))
def test_a_collective_outlasts_the_heartbeat(timeout_s: float) -> None:
    assert outlasting(timeout_s) > timedelta(seconds=timeout_s)


@pytest.mark.parametrize("minutes", [1, 20, 600])
def test_a_jobs_collectives_outlast_its_heartbeat(
    minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the defaults, collectives once gave up after 10 minutes, and the heartbeat after 20."""
    waits: list[timedelta] = []

    def start(device: torch.device, timeout: timedelta) -> None:
        waits.append(timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "start", start)
    config = load_config("fashion_sew", [f"launcher.hang_timeout_min={minutes}", f"run.dir={tmp_path}"])
    environment = type("Environment", (), {"local_world_size": 1, "local_rank": 0, "rank": 0, "world_size": 1})
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(KeyboardInterrupt):
        Job(config)._run(environment, None)  # type: ignore[arg-type]
    assert waits[0] > timedelta(minutes=minutes)

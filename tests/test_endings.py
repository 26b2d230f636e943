"""Which rank of a job died first, and of what."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdkd_dist.cluster import follow
from tdkd_dist.cluster.endings import KILLED, NO_MEMORY, count_memory_kills, ended_badly, find_first, outcome_of
from tdkd_dist.cluster.job import Outcome
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Heartbeat, Sign, read_signs

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:5"
NCCL = "torch.distributed.DistBackendError: NCCL error in: x.cpp:9, remote process exited or there was a network error"
OWN = "Traceback:\n  File x\nValueError: images of another size\n"


def make_task(folder: Path, rank: int, result: object, at: float = 0.0) -> SimpleNamespace:
    """A rank as submitit knows it; None: it left no result."""
    file = folder / f"1_{rank}_result.pkl"
    if result is not None:
        file.write_bytes(pickle.dumps(("success" if isinstance(result, Outcome) else "error", result)))
        os.utime(file, (at, at))
    return SimpleNamespace(paths=SimpleNamespace(result_pickle=file, stdout=folder / f"{rank}.out"))


@pytest.mark.parametrize(
    ("results", "first", "reason"),
    [
        ([Outcome("finished"), Outcome("finished")], None, ""),
        ([(LOST, 5), None, (NCCL, 6)], 1, KILLED),
        ([(LOST, 5), (OWN, 6), None], 1, "ValueError: images of another size"),
        ([("KeyError: 1", 7), ("KeyError: 2", 6), (LOST, 5)], 1, "KeyError: 2"),
        ([(LOST, 6), (NCCL, 5)], 1, NCCL),
        ([None, None, None], 2, KILLED),  # the one whose last sign is oldest
    ],
)
def test_the_rank_that_died_first_is_named(tmp_path, results, first, reason):
    tasks = [
        make_task(tmp_path, rank, *(result if isinstance(result, tuple) else (result,)))
        for rank, result in enumerate(results)
    ]
    signs = [Sign(rank, "host", 1, "training", 3, 0.0, written=9.0 - rank) for rank in range(len(tasks))]
    found = find_first(tasks, signs, no_memory=False)
    assert (found and (found.rank, found.reason)) == (None if first is None else (first, reason))


def test_the_kernels_memory_killer_is_named(tmp_path):
    assert count_memory_kills() >= 0
    tasks = [make_task(tmp_path, 0, LOST), make_task(tmp_path, 1, None)]
    found = find_first(tasks, [], no_memory=True)
    assert found is not None
    assert (found.rank, found.reason) == (1, NO_MEMORY)


def test_a_rank_that_is_gone_is_missed_and_one_that_lives_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid, bad in ((gone.pid, True), (os.getpid(), False)):
        sign = Sign(0, socket.gethostname(), pid, "training", 0, 0.0)
        assert ended_badly(make_task(tmp_path, 0, None), sign) is bad
    assert not ended_badly(make_task(tmp_path, 0, None), Sign(0, "another-host", gone.pid, "training", 0, 0.0))
    assert not ended_badly(make_task(tmp_path, 1, None), None)
    assert ended_badly(make_task(tmp_path, 2, OWN), None)
    assert ended_badly(make_task(tmp_path, 3, Outcome("refused", "x")), None)
    assert not ended_badly(make_task(tmp_path, 4, Outcome("finished")), None)
    (tmp_path / "1_5_result.pkl").write_bytes(b"")
    assert outcome_of(make_task(tmp_path, 5, None)) is None


def test_a_crash_ends_the_ranks_that_would_wait_for_ever(tmp_path, monkeypatch, capsys):
    """submitit's reader of a result waits for the whole job: the follower never came to kill the others."""
    killed: list[str] = []
    monkeypatch.setattr(follow, "GRACE_S", 0.2)
    monkeypatch.setattr(follow, "POLL_S", 0.05)
    monkeypatch.setattr(follow.scheduler, "kill", lambda cluster, job_id: killed.append(job_id))
    tasks = [make_task(tmp_path, 0, OWN), make_task(tmp_path, 1, None)]
    for task in tasks:
        task.exception = lambda: time.sleep(600)
    job = SimpleNamespace(job_id="77", num_tasks=2, task=tasks.__getitem__, done=lambda: bool(killed))
    began = time.monotonic()
    assert follow.Follower(job, RunFolder(tmp_path), "local").follow() == follow.CRASHED
    assert time.monotonic() - began < 30
    assert set(killed) == {"77"}
    assert capsys.readouterr().err.startswith("error: rank 0 crashed: ValueError: images of another size\n")


def test_a_restarted_job_is_not_judged_by_the_signs_of_the_one_that_crashed(tmp_path, monkeypatch):
    """Their processes are gone, and the new job's have not yet said anything."""
    killed: list[str] = []
    monkeypatch.setattr(follow, "GRACE_S", 0.1)
    monkeypatch.setattr(follow, "POLL_S", 0.05)
    monkeypatch.setattr(follow.scheduler, "kill", lambda cluster, job_id: killed.append(job_id))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = RunFolder(tmp_path)
    folder.heartbeat.mkdir()
    sign = Sign(0, socket.gethostname(), gone.pid, "training", 5, 0.0, hung=True)
    old = folder.heartbeat / "rank-00000.json"
    old.write_text(json.dumps(asdict(sign)))
    os.utime(old, (time.time() - 60,) * 2)
    task, polls = make_task(tmp_path, 0, None), iter(range(20))

    def done() -> bool:
        if next(polls) < 10:
            return False
        make_task(tmp_path, 0, Outcome("finished"))
        return True

    job = SimpleNamespace(job_id="77", num_tasks=1, task=lambda k: task, done=done)
    assert follow.Follower(job, folder, "local").follow() == follow.FINISHED
    assert killed == []


def test_a_heartbeat_says_who_it_is(tmp_path):
    with Heartbeat(tmp_path, rank=3, timeout_s=60):
        (sign,) = read_signs(tmp_path)
    assert (sign.pid, sign.host) == (os.getpid(), socket.gethostname())
    assert abs(sign.written - time.time()) < 60

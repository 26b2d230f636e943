"""A real Slurm of two nodes on this machine (tools/slurm_sandbox.sh): preemption, cancelling, crashes, job arrays."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import kill_campaign
import psutil
import pytest
import submit

from tdkd_dist.cluster.follow import QUEUE_POLL_S
from tdkd_dist.cluster.status import cancel, describe_run
from tdkd_dist.cluster.submission import _submitted, make_executor, refuse_if_alive
from tdkd_dist.config import Config, LauncherConfig
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.record import read_rows

ROOT = Path(__file__).resolve().parent.parent.parent
SANDBOX = str(ROOT / "tools" / "slurm_sandbox.sh")
EPOCHS = 30
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[dict[str, str]]:
    """The environment in which sbatch talks to the sandbox."""
    was_up = subprocess.run([SANDBOX, "status"], capture_output=True).returncode == 0
    up = subprocess.run([SANDBOX, "up"], capture_output=True, text=True)
    if up.returncode != 0:
        pytest.skip(up.stderr.strip())
    name, _, value = up.stdout.strip().removeprefix("export ").partition("=")
    yield os.environ | {name: value}
    if not was_up:
        subprocess.run([SANDBOX, "down"], check=True)


@pytest.fixture(autouse=True)
def idle_nodes(sandbox: dict[str, str]) -> None:
    """Both nodes are free: a test must not wait for what the one before it left behind."""

    def are_idle() -> bool:
        states = subprocess.run(["sinfo", "-hN", "-p", "main", "-o", "%T"], env=sandbox, capture_output=True, text=True)
        if "down" in states.stdout:  # on a busy machine a daemon may answer too late
            resume = ["scontrol", "update", "nodename=tdkd-n[1-2]", "state=resume"]
            subprocess.run(resume, env=sandbox, capture_output=True)
        return states.stdout.split() == ["idle", "idle"]

    wait_for(are_idle, "idle nodes", say=lambda: describe_queue(sandbox))


@pytest.fixture
def in_sandbox(sandbox: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's programs that this process starts talk to the sandbox."""
    monkeypatch.setenv("SLURM_CONF", sandbox["SLURM_CONF"])


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of three steps an epoch on both nodes, without FFCV, which generates code at every start."""
    tree = kill_campaign.make_tree(tmp_path_factory.mktemp("slurm"))
    return (
        f"recipe=fashion_sew site=sandbox data.format=imagefolder data.train={tree} data.val={tree} data.image_size=16"
        " data.crop=random_resized student.num_classes=3 student.width=8 student.num_timesteps=2 loss.alpha=0"
        f" train.epochs={EPOCHS} train.batch_size=16 train.log_every=1 wandb.mode=disabled"
    ).split()


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/submit.py", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out + err


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = 200, say: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{say()}"
        time.sleep(0.3)


def describe_queue(sandbox: dict[str, str]) -> str:
    """What Slurm has and waits for."""
    asked = (["squeue", "-o", "%i %T %r %C %b"], ["sinfo", "-N", "-o", "%N %T %C %E"], ["scontrol", "show", "job"])
    return "\n".join(subprocess.run(command, env=sandbox, capture_output=True, text=True).stdout for command in asked)


def epochs_done(folder: RunFolder) -> int:
    return max((row["epoch"] for row in read_rows(folder.metrics_file) if "val/top1_t1" in row), default=0)


def test_a_run_requeued_cancelled_and_crashed_ends_as_the_uninterrupted_one(sandbox, command, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", sandbox["SLURM_CONF"])
    whole, hurt = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "hurt")
    code, said = finish(start(sandbox, *command, f"run.dir={whole.path}"))
    assert code == 0, said
    assert "Slurm: 2 node(s) x 1 rank(s)" in said
    assert f"epoch {EPOCHS}/{EPOCHS}" in said
    assert "mean over timesteps" in said

    arguments = [*command, f"run.dir={hurt.path}"]
    first = start(sandbox, *arguments)
    wait_for(lambda: epochs_done(hurt) >= 3, "three epochs")
    with pytest.raises(ValueError, match=r"its job \d+ is still there"):
        refuse_if_alive(hurt)
    job = hurt.read_job()
    assert job is not None
    subprocess.run(["scancel", "--signal=USR2", job["job_id"]], env=sandbox, check=True)
    wait_for(lambda: "resumed after epoch" in hurt.log_file.read_text(), "the requeued job")
    assert "saves a checkpoint and stops" in cancel(hurt)
    code, said = finish(first)
    assert code == 130, said
    assert f"job {job['job_id']} is pending again" in said
    assert epochs_done(hurt) < EPOCHS

    third = start(sandbox, *arguments, "launcher.max_restarts=2")
    wait_for(lambda: hurt.log_file.read_text().count("resumed after epoch") == 2, "the second resumption")
    job = hurt.read_job()
    assert job is not None
    # As Slurm does when a node has not answered for a while.
    subprocess.run(["scancel", "--signal=TERM", job["job_id"]], env=sandbox, check=True)
    wait_for(lambda: hurt.log_file.read_text().count("resumed after epoch") == 3, "the third resumption")
    ranks = [p for p in psutil.process_iter(["cmdline"]) if str(hurt.jobs) in " ".join(p.info["cmdline"] or [])]
    assert ranks
    ranks[-1].send_signal(signal.SIGKILL)
    code, said = finish(third)
    assert code == 0, said
    status = describe_run(hurt)
    assert f"{hurt.path}: finished" in status
    assert "restarts after a crash: 2 of 2" in status
    assert kill_campaign.same_weights(whole, hurt)
    assert [row["epoch"] for row in read_rows(hurt.metrics_file) if "val/top1_t1" in row] == [*range(1, EPOCHS + 1)]


def test_preemptions_and_time_outs_do_not_count(sandbox, command, tmp_path, monkeypatch):
    """More of both than submitit's three, under a limit so short that it takes every preemption for a time-out."""
    monkeypatch.setenv("SLURM_CONF", sandbox["SLURM_CONF"])
    folder = RunFolder(tmp_path / "cut")
    options = ["launcher.nodes=1", "launcher.partition=low", "launcher.time_min=10", "launcher.max_restarts=1",
               "train.epochs=150", "eval.every=150", f"run.dir={folder.path}"]  # fmt: skip
    process = start(sandbox, *command, *options)
    wait_for(lambda: folder.metrics_file.exists() and read_rows(folder.metrics_file), "the first step")
    job = folder.read_job()
    assert job is not None
    for cut in range(1, 6):
        if cut == 3:  # the scheduler preempts it, and sends TERM
            higher = ["sbatch", "--partition=main", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
            subprocess.run(higher, env=sandbox, check=True, capture_output=True)
        else:
            subprocess.run(["scancel", "--signal=USR2", job["job_id"]], env=sandbox, check=True)
        wait_for(
            lambda: process.poll() is not None or folder.log_file.read_text().count("resumed after epoch") == cut,  # noqa: B023
            f"the job after cut {cut}",
        )
        assert process.poll() is None, finish(process)
    code, said = finish(process)
    assert code == 0, said
    assert "restarts after a crash" not in describe_run(folder)


@pytest.mark.timeout(2400)
def test_three_kills_leave_no_trace(sandbox, tmp_path, monkeypatch):
    """CI's share of the kill campaign: a rank, all ranks and a node's daemon, at random moments of one run."""
    monkeypatch.setenv("SLURM_CONF", sandbox["SLURM_CONF"])
    data = kill_campaign.prepare(tmp_path)
    reference = kill_campaign.run_reference(tmp_path, data, kill_campaign.SHORT)
    rows = kill_campaign.hurt_run(RunFolder(tmp_path / "hurt"), data, reference, random.Random(0), kill_campaign.SHORT)
    for row in rows:
        assert row["hurt"]
        assert row["survived"]
        assert row["steps_lost"] is not None
        assert 0 <= row["steps_lost"] <= 4  # saved at every step


def test_a_sweep_is_one_job_array_of_the_code_as_it_was(sandbox, command, tmp_path):
    sweep = [*command, f"run.dir={tmp_path}", "run.name=s", "launcher.nodes=1", "train.epochs=1",
             "sweep.run.seed=[0,1]", "sweep.loss.beta=[0,0.5]"]  # fmt: skip
    code, said = finish(start(sandbox, *sweep))
    assert code == 0, said
    assert "4 of 4 runs submitted as one job array" in said
    assert said.count(": finished") == 4
    members = [RunFolder(tmp_path / f"s-seed{seed}-beta{beta}") for seed in (0, 1) for beta in ("0", "0.5")]
    jobs = [member.read_job() for member in members]
    assert len({job["job_id"].split("_")[0] for job in jobs if job}) == 1
    assert all(epochs_done(member) == 1 for member in members)
    (snapshot,) = (tmp_path / "sweep" / "submitit").glob("code-*")
    assert (snapshot / "tdkd_dist/training/trainer.py").read_bytes() == (
        ROOT / "tdkd_dist/training/trainer.py"
    ).read_bytes()


def test_a_hundred_members_take_one_call_of_sbatch(sandbox, command, tmp_path):
    calls, wrapper = tmp_path / "calls", tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\necho called >>{calls}\nexec {shutil.which("sbatch")} "$@"\n')
    wrapper.chmod(0o755)
    seeds = ",".join(map(str, range(100)))
    sweep = [*command, f"run.dir={tmp_path}/runs", f"sweep.run.seed=[{seeds}]", "launcher.sbatch.begin=now+1hour"]
    environment = sandbox | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    process = start(environment, *sweep)
    wait_for(lambda: calls.exists() and len(list((tmp_path / "runs").glob("*/job.json"))) == 100, "the submission")
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert "100 of 100 runs submitted as one job array" in said
    assert "crashed" not in said
    assert said.count(": stopped") == 100
    assert calls.read_text().split() == ["called"]
    waiting = subprocess.run(["squeue", "--noheader"], env=sandbox, capture_output=True, text=True).stdout
    assert waiting == ""


def test_ranks_are_given_their_gpus_and_their_share_of_the_cpus(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", sandbox["SLURM_CONF"])
    # As in an interactive job of one GPU a task.
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")

    def submit(name: str, launcher: LauncherConfig, variable: str):
        executor = make_executor(Config(launcher=launcher), RunFolder(tmp_path / name), "slurm")
        return _submitted(executor, [partial(os.getenv, variable)])[0]

    gpus = LauncherConfig(gpus_per_node=2, nodes=2, time_min=5, sbatch={"gres": "gpu:2"})
    seen = submit("gpus", gpus, "CUDA_VISIBLE_DEVICES")
    cpus = submit("cpus", LauncherConfig(time_min=5), "SLURM_CPUS_PER_TASK")
    assert os.environ["SLURM_GPUS_PER_TASK"] == "1"
    wait_for(lambda: seen.done() and cpus.done(), "both jobs", say=lambda: describe_queue(sandbox))
    assert seen.results() == ["0,1"] * 4
    assert cpus.results() == [str(min(16, os.cpu_count() or 1))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["launcher.partition=none"], "sbatch: error: invalid partition specified: none"),
        (["launcher.constraint=h100"], "Invalid feature specification"),
    ],
)
def test_slurms_own_words_reach_the_user(in_sandbox, command, tmp_path, capsys, options, words):
    assert submit.main([*command, f"run.dir={tmp_path}/x", *options]) == 2
    said = capsys.readouterr().err
    assert "error: Slurm refused the job: sbatch: error: " in said
    assert words in said


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("launcher.time_min=9999", "launcher.time_min=9999: partition main allows 1440; set launcher.time_min=1440"),
        ("launcher.nodes=4", "launcher.nodes=4: partition main has 2"),
    ],
)
def test_a_job_that_could_never_start_is_not_submitted(in_sandbox, command, tmp_path, capsys, option, words):
    assert submit.main([*command, f"run.dir={tmp_path}/x", option]) == 2
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line.startswith(f"error: {words}")
    assert line.endswith("Slurm could never start this job")
    assert not (tmp_path / "x").exists()
    assert submit.main([*command, "--dry-run", option, "launcher.network_interface=null"]) == 0
    said = capsys.readouterr().out
    assert f"note: Slurm could never start this job: {words}" in said
    assert "note: launcher.network_interface is not set" in said


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        (
            ["launcher.sbatch.time=2-00:00:00"],
            "PartitionTimeLimit: it can never start as it is; cancel it and set a smaller launcher.time_min",
        ),
        (
            ["launcher.partition=closed", "launcher.account=mine"],
            "Job's account not known, so it can't use this partition (closed allows nobody): it can never start as it"
            " is; cancel it and change launcher.account",
        ),
    ],
)
def test_a_job_that_waits_in_vain_says_why_and_what_to_change(sandbox, command, tmp_path, monkeypatch, options, mend):
    monkeypatch.setenv("SLURM_CONF", sandbox["SLURM_CONF"])
    folder = RunFolder(tmp_path / "x")
    # Slurm takes it: by default it enforces no limit of a partition at submission.
    process = start(sandbox, *command, f"run.dir={folder.path}", *options)
    wait_for(lambda: folder.read_job() is not None and mend in describe_run(folder), "Slurm's reason")
    time.sleep(2 * QUEUE_POLL_S)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    job = folder.read_job()
    assert job is not None
    assert said.count(f"job {job['job_id']} waits, {mend}") == 1


def test_the_batch_script_is_shown_without_leaving_anything(in_sandbox, command, tmp_path, capsys):
    options = ["launcher.qos=high", "launcher.constraint=h100", "launcher.setup=[module load cuda]",
               "launcher.sbatch.reservation=mine", "launcher.srun_args=[--mpi=none]"]  # fmt: skip
    assert submit.main([*command, f"run.dir={tmp_path}/x", "--dry-run", *options]) == 0
    said = capsys.readouterr().out
    for line in ("#SBATCH --nodes=2", "#SBATCH --partition=main", "#SBATCH --qos=high", "#SBATCH --constraint=h100",
                 "#SBATCH --reservation=mine", "#SBATCH --signal=USR2@30", "module load cuda", "--mpi=none",
                 "--kill-on-bad-exit=1", "scontrol requeue"):  # fmt: skip
        assert line in said, line
    assert not (tmp_path / "x").exists()

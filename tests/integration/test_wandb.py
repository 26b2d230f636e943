"""The record with a W&B server that is away at the start, in the middle or at the end: the real client."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_server import Server, serve

from tdkd_dist.run.record import read_rows

ROWS, TIMEOUT_S, SLOW_S = 40, 4.0, 15.0
SCRIPT = """
import sys, time
from pathlib import Path
from tdkd_dist.recipe import load_config
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.log import Log
from tdkd_dist.run.record import Record

folder = RunFolder(Path(sys.argv[1]))
config = load_config("fashion_sew", ["wandb.mode=online", f"wandb.timeout_s={sys.argv[2]}", f"run.dir={sys.argv[1]}"])
folder.create(config)
log = Log(folder.log_file)

def timed(name, action):
    started = time.monotonic()
    result = action()
    print(name, time.monotonic() - started, flush=True)
    return result

record = timed("start", lambda: Record(folder, config, log, wandb_id=None, global_step=-1))
def write(first, last):
    for k in range(first, last):
        record.write({"epoch": 0, "global_step": k, "train/loss": float(k)})
timed("first", lambda: write(0, 20))
sys.stdin.readline()
timed("second", lambda: write(20, 40))
sys.stdin.readline()
timed("end", record.close)
"""


def run_record(folder: Path, server: Server, silent: str) -> tuple[dict[str, float], str]:
    """Write a record of `ROWS` rows, the server falling silent at `silent`; what each part took, and the log."""
    if silent == "start":
        server.talks.clear()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(TIMEOUT_S if silent == "start" else SLOW_S)],
        env=os.environ | server.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    if silent != "start":
        assert server.received.wait(120)
    if silent == "middle":
        server.talks.clear()
    process.stdin.write("\n")
    process.stdin.flush()
    if silent == "end":
        deadline = time.monotonic() + 120
        while len(server.history) < ROWS and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(server.history) == ROWS
        server.talks.clear()
    output, _ = process.communicate("\n", timeout=300)
    assert process.returncode == 0
    took = {name: float(seconds) for name, seconds in (line.split() for line in output.splitlines())}
    log = folder / "log.txt"
    return took, log.read_text() if log.exists() else ""


@pytest.mark.parametrize("silent", ["start", "middle", "end"])
def test_a_silent_server_costs_little_time_and_no_rows(tmp_path, silent):
    with serve() as server:
        took, log = run_record(tmp_path / "run", server, silent)
        # Beyond the bound: to start and end W&B's own process.
        assert took["start"] < TIMEOUT_S + 20
        assert took["first"] < 1
        assert took["second"] < 1
        assert took["end"] < SLOW_S + 20
        rows = read_rows(tmp_path / "run" / "metrics.jsonl")
        assert [row["global_step"] for row in rows] == list(range(ROWS))

        (command,) = [line for line in log.splitlines() if "wandb sync" in line]
        server.talks.set()
        server.history.clear()
        done = subprocess.run(
            [Path(sys.executable).parent / "wandb", *command.split("wandb ")[1].split()],
            env=os.environ | server.environment | {"WANDB_MODE": "online"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        losses = [row["train/loss"] for _, row in sorted(server.history.items())]
        assert losses == [float(k) for k in range(ROWS)], done.stderr


def test_a_server_that_is_not_there_makes_the_run_offline(tmp_path):
    with serve() as server:
        environment = server.environment
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(TIMEOUT_S)],
        env=os.environ | environment,
        input="\n\n",
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "recording offline" in (tmp_path / "run" / "log.txt").read_text()
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == ROWS

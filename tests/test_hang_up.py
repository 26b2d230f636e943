"""A terminal that closes ends the command that follows a job, and not the job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

FOLLOW = """
import sys, time
from functools import partial
from pathlib import Path
from tdkd_dist.cluster.follow import Follower
from tdkd_dist.cluster.submission import _submitted, make_executor
from tdkd_dist.config import Config, LauncherConfig
from tdkd_dist.run.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
executor = make_executor(Config(launcher=LauncherConfig(gpus_per_node=0, time_min=5)), folder, "local")
(job,) = _submitted(executor, [partial(time.sleep, 3600)])
follower = Follower(job, folder, "local")
folder.log_file.write_text(f"{job.job_id}\\n")
follower.follow()
"""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_hangs_up_ends_the_follower_alone(tmp_path: Path, nohup: bool) -> None:
    command = [*(["nohup"] if nohup else []), sys.executable, "-c", FOLLOW, str(tmp_path)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    controller = psutil.Process(int(process.stdout.readline()))
    try:
        wait_for(lambda: controller.children() and list(tmp_path.glob("submitit/*_log.out")))
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal does
        if nohup:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        else:
            process.wait(timeout=200)
            assert process.returncode == 129
            assert process.stderr is not None
            said = process.stderr.readline()  # the job holds it open
            assert said == f"hung up; the job goes on: python launch/submit.py logs {tmp_path}\n"
        time.sleep(1)
        assert controller.is_running()
        assert len(controller.children()) == 1
    finally:
        ended = [*controller.children(recursive=True), controller]
        for member in ended:
            member.kill()
        psutil.wait_procs(ended, timeout=200)
        process.kill()
        process.communicate()

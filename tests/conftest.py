"""What holds for every test: no account is used, and in CI nothing is skipped but for want of a GPU."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["numbered", "pictures"]
os.environ["WANDB_MODE"] = "offline"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in a script's background, we ignore it, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # Started under nohup, likewise.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores; threads of each would spin while they wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# No deadline: how long an example takes is the machine's affair.
settings.register_profile("patient", derandomize=IN_CI, deadline=None)
settings.load_profile("patient")


LONGEST = ["test_slurm", "test_launch", "test_batch_norm", "test_fast_path", "test_engine", "test_gpu_acceptance"]
"""Modules that are started first, since a worker runs a module whole: what they share is then made once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only GPU tests may be: {report.longrepr}"
    return report


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors of the size that most tests have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB, which a test may fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed tars are unpacked there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))

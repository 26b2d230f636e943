"""tools/write_beton.py as a user calls it: again, with mistakes, interrupted, on a full disk."""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import write_beton
from in_process import call
from pictures import picture, stored

from tdkd_dist.data.beton import layout
from tdkd_dist.data.beton.layout import read_tables
from tdkd_dist.data.beton.manifest import WriteOptions, check_beton, read_manifest
from tdkd_dist.data.beton.writing import up_to_date, write
from tdkd_dist.data.sources import open_source
from tdkd_dist.data.sources.folder import FolderSource
from tdkd_dist.data.sources.source import Source

pytest.importorskip("ffcv")
TOOL = Path(__file__).resolve().parent.parent / "tools" / "write_beton.py"


def run(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)  # type: ignore[call-overload]


def test_writing_twice_writes_once(tree: Path, tmp_path: Path) -> None:
    dest = tmp_path / "deep" / "x.beton"
    assert run(tree, dest).returncode == 0
    before = dest.stat().st_mtime_ns
    again = run(tree, dest)
    assert again.returncode == 0
    assert "already there" in again.stdout
    other = run(tree, dest, "--quality", 50)
    assert other.returncode == 2
    assert "--force" in other.stderr
    assert dest.stat().st_mtime_ns == before
    assert run(tree, dest, "--quality", 50, "--force").returncode == 0
    manifest = read_manifest(dest)
    assert manifest is not None
    assert manifest.options.quality == 50
    assert sorted(p.name for p in dest.parent.iterdir()) == ["x.beton", "x.beton.json"]


def test_up_to_date_notices_a_changed_source(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    options = WriteOptions()
    write(FolderSource(tmp_path / "tree"), tmp_path / "x.beton", options)
    assert up_to_date(FolderSource(tmp_path / "tree"), tmp_path / "x.beton", options)
    assert not up_to_date(FolderSource(tmp_path / "tree"), tmp_path / "x.beton", replace(options, quality=3))
    picture(5, 20, 20).save(tmp_path / "tree" / "cat" / "00.JPEG")
    assert not up_to_date(FolderSource(tmp_path / "tree"), tmp_path / "x.beton", options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage"),
        (["/nonexistent", "x.beton"], "/nonexistent: no such"),
        (["."], "say SOURCE and DEST"),
        ([TOOL, "x.beton"], "write_beton.py: neither"),
        (["TREE", "x.beton", "--quality", "0"], "--quality 0"),
        (["TREE", "x.beton", "--quality", "good"], "--quality: invalid int"),
        (["TREE", "x.beton", "--jpeg-share", "2"], "--jpeg-share"),
        (["TREE", "x.beton", "--workers", "0"], "--workers 0"),
        (["TREE", "x.beton", "--subset", "1.5"], "--subset"),
        (["TREE", "x.beton", "--compress"], "--compress"),
        (["TREE", "/proc/x.beton"], "/proc/x.beton: "),
        (["--verify", "/nonexistent"], "--verify=/nonexistent: no such file"),
    ],
)
def test_a_users_mistake_is_told_in_few_lines(args: list[object], message: str, tree: Path, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        done = call(write_beton.main, *(tree if arg == "TREE" else arg for arg in args))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= (1 if args else 6)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_picture_stops_or_is_skipped(workers: int, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "dog" / "03.JPEG").write_text("not a picture")
    dest = tmp_path / "out" / "x.beton"
    stopped = call(write_beton.main, tmp_path / "tree", dest, "--workers", workers)
    assert stopped.returncode == 2
    assert "dog/03.JPEG: not a readable picture" in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
    assert list(dest.parent.iterdir()) == []
    skipped = call(write_beton.main, tmp_path / "tree", dest, "--workers", workers, "--on-error", "skip")
    assert skipped.returncode == 0
    manifest = read_manifest(dest)
    assert manifest is not None
    assert manifest.class_histogram == [6, 11, 18]
    assert "dog/03.JPEG" in manifest.skipped[0]
    labels = [label for _, label, _ in stored(dest)]
    assert labels == [0] * 6 + [1] * 11 + [2] * 18
    assert call(write_beton.main, "--verify", dest).returncode == 0


def test_verify_names_the_sample_and_exits_1(copy: Path) -> None:
    ptr, _ = layout.read_tables(copy).place(9)
    content = bytearray(copy.read_bytes())
    content[ptr + 50] ^= 0x80
    copy.write_bytes(content)
    done = call(write_beton.main, "--verify", copy)
    assert done.returncode == 1
    assert "sample 9: " in done.stdout


def test_no_space_left(tree: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(15 * 2**20))
    for workers in (1, 2):
        done = call(write_beton.main, tree, small_disk / "x.beton", "--workers", workers, "--jpeg-share", 0)
        assert done.returncode == 2
        assert "x.beton: No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert list(small_disk.iterdir()) == [ballast]


def test_a_full_quota(tree: Path, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, 9_000_000))

    done = run(tree, tmp_path / "x.beton", "--jpeg-share", 0, preexec_fn=limit)
    assert done.returncode == 2
    assert "x.beton: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_write_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    data = io.BytesIO()
    picture(0, 700, 700).save(data, "PNG")
    for i in range(400):
        (tmp_path / "tree" / "a" / f"{i}.png").write_bytes(data.getvalue())
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(TOOL), str(tmp_path / "tree"), str(tmp_path / "out" / "x.beton"), "--workers", "2"],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for _ in range(600):
        if any(p.stat().st_size > 0 for p in (tmp_path / "out").iterdir()):
            break
        time.sleep(0.1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, 143), stderr
    assert b"Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_writer_process_ends_the_write(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for i in range(100):
        picture(i, 30, 30).save(tmp_path / "tree" / "a" / f"{i}.png")
    with pytest.raises(ValueError, match="a process that encodes pictures was killed"):
        write(Deadly(tmp_path / "tree"), tmp_path / "x.beton", workers=2)
    assert not (tmp_path / "x.beton").exists()


class Deadly(FolderSource):
    """A source whose reader is killed half-way, as the kernel does when memory runs out."""

    def read(self, index: int) -> np.ndarray:
        if index == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


@pytest.mark.timeout(60)
def test_a_killed_writer_process_takes_the_busy_ones_with_it(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for i in range(100):
        picture(i, 30, 30).save(tmp_path / "tree" / "a" / f"{i}.png")
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(ValueError, match="a process that encodes pictures was killed"):
            write(DeadlyBesideABusyOne(tmp_path / "tree"), tmp_path / "x.beton", workers=2)
    finally:
        signal.signal(signal.SIGTERM, previous)


class DeadlyBesideABusyOne(Deadly):
    """The first chunk's process is still reading when the second's is killed."""

    def read(self, index: int) -> np.ndarray:
        if index == 0:
            time.sleep(1)
        return super().read(index)


def test_an_empty_source(tmp_path: Path) -> None:
    source: Source = open_source_of_nothing(tmp_path)
    with pytest.raises(ValueError, match="no pictures"):
        write(source, tmp_path / "x.beton")


def open_source_of_nothing(root: Path) -> Source:
    for part, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        (root / f"t10k-{part}-ubyte").write_bytes(bytes([0, 0, 8, dimensions]) + bytes(4 * dimensions))
    return open_source(root)


def test_some_of_every_class_are_set_apart(tmp_path):
    for k in range(24):
        path = tmp_path / "tree" / "abc"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k, 12, 12).save(path)
    done = call(write_beton.main, tmp_path / "tree", tmp_path / "x.beton", "--holdout", 6)
    assert done.returncode == 0, done.stderr
    kept, apart = (check_beton(tmp_path / name, "DEST") for name in ("x.beton", "x_heldout.beton"))
    assert (kept.manifest.class_histogram, apart.manifest.class_histogram) == ([6, 6, 6], [2, 2, 2])
    sums = [set(read_tables(tmp_path / name).checksums.tolist()) for name in ("x.beton", "x_heldout.beton")]
    assert len(sums[0] | sums[1]) == 24
    assert kept.signature != apart.signature
    again = call(write_beton.main, tmp_path / "tree", tmp_path / "x.beton", "--holdout", 6)
    assert again.stdout.count("is already there") == 2
    refused = call(write_beton.main, tmp_path / "tree", tmp_path / "y.beton", "--holdout", 24)
    assert refused.returncode == 2
    assert refused.stderr.startswith("write_beton: --holdout 24: there are only 24 pictures")

"""What goes wrong with a set, a sample or a thread, and what loading needs of the machine."""

import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numbered import CPU, SIZE, Numbered, config, seen, train
from PIL import Image

from tdkd_dist.config import DataConfig
from tdkd_dist.data.beton import layout, staging
from tdkd_dist.data.beton.manifest import WriteOptions, check_beton
from tdkd_dist.data.beton.staging import staged
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.loaders import (
    Reader,
    make_train_loader,
    make_val_loader,
)
from tdkd_dist.data.sources.folder import FolderSource


def test_a_sample_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    path = tmp_path / "x.beton"
    write(Numbered(20, lossless=False), path, WriteOptions(jpeg_share=1))
    ptr, _ = layout.read_tables(path).place(13)
    content = bytearray(path.read_bytes())
    content[ptr : ptr + 20] = bytes(20)
    path.write_bytes(content)
    loader = make_val_loader(
        DataConfig(val=str(path), image_size=SIZE), batch_size=3, rank=0, world_size=1, device=CPU, workers=2
    )
    found, start = [], time.monotonic()

    def collect() -> None:
        for _, labels in loader:
            found.extend(labels.tolist())

    with pytest.raises(ValueError, match=rf"{path}: sample 13 cannot be decoded"):
        collect()
    assert found == list(range(12))
    assert time.monotonic() - start < 60
    assert loader_threads() == 0


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "a" / f"{i}.JPEG")
    (tmp_path / "a" / "4.JPEG").write_text("not a picture")
    data = DataConfig(val=str(tmp_path), image_size=SIZE, format="imagefolder")
    loader = make_val_loader(data, batch_size=2, rank=0, world_size=1, device=CPU, workers=1)
    with pytest.raises(ValueError, match=r"^[^\n]*a/4\.JPEG: not a readable picture[^\n]*$"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("readers", ["ffcv"], indirect=True)
def test_an_error_in_the_loader_thread_ends_the_iteration(readers: dict[int, Reader], monkeypatch: object) -> None:
    reader = readers[203]

    def fail(indices: object) -> None:
        raise MemoryError("no memory for the plan")

    monkeypatch.setattr(reader, "_plan_for", lambda rule, epoch: fail)  # type: ignore[attr-defined]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"203\.beton: no memory for the plan"):
        next(reader.batches(np.arange(20), 0))
    assert time.monotonic() - start < 60


def loader_threads() -> int:
    return sum(type(thread).__name__ == "GuardedIterator" for thread in threading.enumerate())


def test_leaving_epochs_early_leaves_no_thread_behind(readers: dict[int, Reader]) -> None:
    loader = train(readers[203], 203, 1, 0, 1)
    for taken in (0, 1, 5, 199, 202):
        epoch = loader.epoch(0)
        for _ in range(taken):
            next(epoch)
        del epoch
        assert loader_threads() == 0
    assert len(seen(loader.epoch(1))) == 203
    assert loader_threads() == 0


def test_a_new_epoch_ends_the_one_before(readers: dict[int, Reader]) -> None:
    loader = train(readers[203], 203, 1, 0, 1)
    abandoned = loader.epoch(0)
    next(abandoned)
    assert len(seen(loader.epoch(1))) == 203
    assert loader_threads() == 0


def test_torchs_thread_count_is_the_callers(folder: Path) -> None:
    pytest.importorskip("ffcv")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = make_val_loader(config(folder, 7), batch_size=2, rank=0, world_size=1, device=CPU, workers=1)
        assert torch.get_num_threads() == 3
        for _ in loader:
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_importing_ffcv_leaves_torchs_thread_count_alone() -> None:
    pytest.importorskip("ffcv")
    code = """if True:
        import torch
        from tdkd_dist.data.ffcv_reader import _import_ffcv
        torch.set_num_threads(3)
        _import_ffcv()
        print(torch.get_num_threads())"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["3"]


def test_users_mistakes_name_the_key(folder: Path, tmp_path: Path) -> None:
    kwargs = {"rank": 0, "world_size": 1, "seed": 0, "device": CPU, "workers": 1}

    def fails(data: DataConfig, message: str, batch_size: int = 2, micro_batch: int = 1) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            make_train_loader(data, batch_size=batch_size, micro_batch=micro_batch, **kwargs)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    for format in ("ffcv", "imagefolder"):
        fails(config(folder, 7, format), r"train\.batch_size=8: .* only 7 samples", batch_size=8)
        fails(config(folder, 7, format), r"train\.batch_size=6 does not divide", batch_size=6, micro_batch=4)
        fails(DataConfig(format=format), r"^data\.train is not set")  # type: ignore[arg-type]
        fails(DataConfig(train="/nonexistent", format=format), r"^data\.train=/nonexistent: no such")  # type: ignore[arg-type]
    fails(DataConfig(train=str(tmp_path), format="imagefolder"), "no class folders")
    (tmp_path / "a").mkdir()
    fails(DataConfig(train=str(tmp_path), format="imagefolder"), "no pictures in this class folder")


@pytest.mark.parametrize("format", ["ffcv", "imagefolder"])
def test_classes_must_agree_between_the_sets(tmp_path: Path, format: str) -> None:
    """A class that the validation set lacks would shift the labels of all after it."""
    for split, names in (("train", "abc"), ("val", "ac"), ("other", "abd"), ("same", "abc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / split / name / "x.png")
        write(FolderSource(tmp_path / split), tmp_path / f"{split}.beton")

    def open_val(split: str) -> None:
        train, val = (str(tmp_path / (s + (".beton" if format == "ffcv" else ""))) for s in ("train", split))
        data = DataConfig(train=train, val=val, format=format)  # type: ignore[arg-type]
        make_val_loader(data, batch_size=1, rank=0, world_size=1, device=CPU, workers=1).close()

    with pytest.raises(ValueError, match=r"^data\.val=.*: 2 classes, not 3 \(see b\), unlike data\.train's$"):
        open_val("val")
    with pytest.raises(ValueError, match=r"^data\.val=.*: class 2 is d, not c, unlike data\.train's$"):
        open_val("other")
    open_val("same")


def test_a_beton_without_a_manifest_is_taken_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ffcv")
    (tmp_path / "x.beton").write_bytes((folder / "7.beton").read_bytes())
    data = DataConfig(val=str(tmp_path / "x.beton"), image_size=SIZE)
    loader = make_val_loader(data, batch_size=7, rank=0, world_size=1, device=CPU, workers=1)
    assert loader.num_classes is None
    assert "has no manifest" in caplog.text


def test_staging_copies_once_a_node(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path))
    with ProcessPoolExecutor(3) as pool:
        copies = list(pool.map(staged, [folder / "203.beton"] * 6, ["$LOCAL_DISK/cache"] * 6))
    assert len(set(copies)) == 1
    assert copies[0].parent == tmp_path / "cache"
    assert copies[0].read_bytes() == (folder / "203.beton").read_bytes()
    assert check_beton(copies[0], "data.train").manifest == check_beton(folder / "203.beton", "data.train").manifest
    before = copies[0].stat().st_mtime_ns
    assert staged(folder / "203.beton", "$LOCAL_DISK/cache").stat().st_mtime_ns == before
    assert staged(folder / "7.beton", str(tmp_path / "cache")) != copies[0]
    assert not list((tmp_path / "cache").glob("*.partial"))
    pytest.importorskip("ffcv")
    data = config(folder, 7, stage_to=str(tmp_path / "cache"))
    loader = make_val_loader(data, batch_size=7, rank=0, world_size=1, device=CPU, workers=1)
    assert [index for index, _ in seen(loader)] == list(range(7))


def test_staging_tells_what_is_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^data\.stage_to=/proc/x: "):
        staged(folder / "7.beton", "/proc/x")
    monkeypatch.setattr(staging, "_checksum", lambda path, beat: 0)
    with pytest.raises(ValueError, match=r"the copy of .* differs from it"):
        staged(folder / "7.beton", str(tmp_path))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"^data\.stage_to=.*: 0\.0 GB free"):
        staged(folder / "7.beton", str(tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.slow
def test_a_machine_without_ffcv_can_use_imagefolder(folder: Path) -> None:
    code = f"""
import sys
for name in ("ffcv", "numba", "cv2", "torchvision"):
    sys.modules[name] = None
import torch
import tdkd_dist.data.beton.writing, tdkd_dist.data.sources, tdkd_dist.data.beton.verify
from tdkd_dist.config import DataConfig
from tdkd_dist.data.loaders import make_train_loader, make_val_loader
kwargs = dict(rank=0, world_size=1, device=torch.device("cpu"), workers=1)
data = DataConfig(train={str(folder / "7")!r}, val={str(folder / "7")!r}, format="imagefolder", image_size=8)
print(len(list(make_train_loader(data, batch_size=2, micro_batch=2, seed=0, **kwargs).epoch(0))))
try:
    make_val_loader(DataConfig(val={str(folder / "7.beton")!r}), batch_size=2, **kwargs)
except ValueError as error:
    print(error)
"""
    # timm needs torchvision; the package registers its students there.
    code = code.replace(', "torchvision"', "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "3"
    assert "data.format=imagefolder" in lines[1]


def test_the_folder_reader_reads_any_source(folder: Path) -> None:
    source = FolderSource(folder / "7")
    assert source.labels.tolist() == list(range(7))
    assert np.array_equal(source.read(3), Numbered(7).read(3))


class OneGpu:
    """Stands in for `torch.cuda` as FFCV sees it: every call must come from a thread that has chosen its device."""

    def __init__(self, mine: int) -> None:
        self._mine, self._chosen = mine, threading.local()
        self._chosen.index = mine  # the main thread's, by `torch.cuda.set_device` at the rank's start
        self.calls = 0

    def set_device(self, device: torch.device) -> None:
        self._chosen.index = device.index

    def _use(self, *_: object, **__: object) -> "OneGpu":
        index = getattr(self._chosen, "index", 0)
        assert index == self._mine, f"opens a context on device {index}"
        self.calls += 1
        return self

    current_stream = Stream = stream = Event = synchronize = wait_stream = record = wait = __enter__ = _use

    def __exit__(self, *_: object) -> None:
        self._use()


@pytest.mark.slow
def test_ffcvs_thread_uses_the_ranks_gpu_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ffcv")
    from ffcv.loader import epoch_iterator

    loader = make_val_loader(config(folder, 203), batch_size=7, rank=0, world_size=1, device=CPU, workers=2)
    gpu = OneGpu(3)
    monkeypatch.setattr(epoch_iterator, "IS_CUDA", True)
    monkeypatch.setattr(epoch_iterator, "ch", SimpleNamespace(cuda=gpu))
    monkeypatch.setattr(torch.cuda, "set_device", gpu.set_device)
    monkeypatch.setattr(loader._reader, "_device", torch.device("cuda", 3), raising=False)
    assert [index for index, _ in seen(loader)] == list(range(203))
    assert gpu.calls > 4 * 29
    loader.close()


SLOW_COPY = """
import sys, time, zlib
from functools import partial
from pathlib import Path
from tdkd_dist.data.beton import staging
from tdkd_dist.run.heartbeat import Heartbeat

def slow(chunk, checksum, crc32=zlib.crc32):
    time.sleep(0.4)
    return crc32(chunk, checksum)

beton, cache = map(Path, sys.argv[1:])
staging.CHUNK = beton.stat().st_size // 6
staging.zlib.crc32 = slow
with Heartbeat(cache / "signs", rank=0, timeout_s=1.5) as heartbeat:
    staging.staged(beton, str(cache), partial(heartbeat.beat, "opening data", 0))
"""


@pytest.mark.slow
def test_a_copy_may_take_longer_than_a_rank_may_stand_still(folder: Path, tmp_path: Path) -> None:
    """Both the rank that copies and the one that waits for it; the copy takes 2.4 s at the least."""
    command = [sys.executable, "-c", SLOW_COPY, str(folder / "203.beton"), str(tmp_path)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said

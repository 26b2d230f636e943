"""Recordings that are damaged, hostile or none at all: each is told in a line that names it, and nothing dies of it."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from recordings import (
    LABELS,
    as_aedat2,
    as_aedat3,
    as_aedat4,
    as_bin,
    as_npz,
    draw,
    make_cache,
    make_folders,
    make_tar,
    make_zips,
)

from tdkd_dist.data.events import aedat3, apart, hdf5, npz, open_events, places
from tdkd_dist.data.events.recording import Broken
from tdkd_dist.mistakes import Mistake

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def broken(path: Path, content: bytes | None) -> str:
    """What is said about class folders of which one file is `content`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Mistake) as caught:
        open_events(path.parent.parent, sensor=None).read(0)
    assert len(caught.value.lines) == 1
    return str(caught.value)


PACKET = as_aedat3(draw(0, 0))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.aedat", as_aedat2(draw(0))[:-3], "truncated"),
        ("a.aedat", b"#!AER-DAT2.0\r\n# and no end", "header does not end"),
        ("a.aedat", b"what is this", "begins with"),
        ("a.aedat", b"", "begins with"),
        ("a.aedat", as_aedat2(draw(0))[:-8] + b"\xff" * 8, "0xffffffff"),
        ("a.aedat", as_aedat2(draw(0)).replace(b"DAT2.0", b"DAT1.0"), "begins with"),
        ("a.aedat4", as_aedat4(draw(0))[:-5], "a.aedat4"),
        ("a.aedat4", b"#!AER-DAT4.0\r\n" + bytes(40), "a.aedat4"),
        ("a.aedat4", as_aedat4(draw(0), 20, 20), "outside of the sensor"),
        ("1/a.bin", as_bin(draw(0, 9, 34, 34))[:-1], "truncated"),
        ("1/a.bin", as_bin(draw(0)), "outside of the sensor"),
        ("a.npz", b"PK nothing", "damaged"),
        ("a.npz", as_npz(draw(0)), "say its height and width"),
        ("a.hdf5", b"\x89HDF\r\n\x1a\n", "INDEX_0"),
        ("0_0.hdf5", b"\x89HDF\r\n\x1a\n", "0_0.hdf5"),
    ],
)
def test_a_damaged_recording_is_a_line_that_names_it(name, content, says, tmp_path):
    assert says in broken(tmp_path / "class" / name if "/" not in name else tmp_path / name, content)


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        ((1, 1, 8, 4, 0, -1, 0, 0), "claims"),
        ((1, 1, -8, 4, 0, 1, 1, 0), "claims"),
        ((1, 1, 8, 4, -1, 1, 1, 0), "claims"),
        ((1, 1, 8, 4, 0, 1, 2, 0), "claims"),
        ((1, 1, 8, 4, 0, 1 << 30, 1, 0), "truncated"),
        ((1, 1, 12, 4, 0, 0, 0, 0), "events of 12 bytes"),
    ],
)
def test_a_lying_packet_is_told(packet, says):
    with pytest.raises(Broken, match=says):
        aedat3.read(PACKET + aedat3.PACKET.pack(*packet))
    with pytest.raises(Broken, match="truncated"):
        aedat3.read(PACKET + aedat3.PACKET.pack(*packet)[:20])
    with pytest.raises(Broken, match="header does not end"):
        aedat3.read(PACKET[:30])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"t": [1, 2], "x": [1, 2], "y": [1, 2], "p": [0, 2]}, "its p goes from 0 to 2"),
        ({"t": [1, 2], "x": [1, 2], "y": [1, 2], "p": [0]}, "one integer for each event"),
        ({"t": [1, 2], "x": [-1, 2], "y": [1, 2], "p": [0, 1]}, "its x goes from -1"),
        ({"t": [1.5, 2], "x": [1, 2], "y": [1, 2], "p": [0, 1]}, "its t is float64"),
        ({"t": [1], "x": [1], "y": [1]}, "neither t, x, y, p nor frames"),
        ({"frames": np.zeros((3, 1, 4, 4))}, "not counts"),
        ({"frames": np.full((3, 2, 4, 4), 0.5)}, "whole numbers"),
        ({"frames": np.full((3, 2, 4, 4), -1)}, "no counts"),
        ({"frames": np.full((3, 2, 4, 4), np.nan)}, "no counts"),
        ({"frames": np.array([{}], dtype=object)}, "allow_pickle"),
    ],
)
def test_arrays_that_are_no_recording_are_told(arrays, says, tmp_path):
    (tmp_path / "class").mkdir()
    np.savez(tmp_path / "class" / "a.npz", **arrays)
    with pytest.raises(Mistake, match=says):
        open_events(tmp_path).read(0)


def test_frames_of_different_sizes_are_told(tmp_path):
    (tmp_path / "class").mkdir()
    for i, side in enumerate((4, 5)):
        np.savez(tmp_path / "class" / f"{i}.npz", frames=np.zeros((3, 2, side, side)))
    with pytest.raises(Mistake, match=r"1\.npz: its sensor is \(5, 5\)"):
        open_events(tmp_path).read(1)


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    (tmp_path / "npz" / "class").mkdir(parents=True)
    np.savez_compressed(tmp_path / "npz" / "class" / "a.npz", frames=np.zeros((1, 2, 500, 500)))
    make_zips(tmp_path / "zips")
    make_cache(tmp_path / "hdf5", LABELS.tolist())
    for module in (places, npz, hdf5):
        monkeypatch.setattr(module, "MOST_BYTES", 10_000 if module is places else 700)
    with pytest.raises(Mistake, match=r"a\.npz: unpacks to more than 700"):
        open_events(tmp_path / "npz", sensor=(128, 128)).read(0)
    with pytest.raises(Mistake, match=r"0_0\.hdf5: data/0 unpacks to 780 bytes"):
        open_events(tmp_path / "hdf5", sensor=(128, 128)).read(0)
    monkeypatch.setattr(places, "MOST_BYTES", 400)
    with pytest.raises(Mistake, match=r"bird_0\.aedat: 5\d\d bytes; at most 400 are read"):
        open_events(tmp_path / "zips").read(0)


def test_pipes_and_strange_places_are_told(tmp_path):
    (tmp_path / "class").mkdir()
    os.mkfifo(tmp_path / "class" / "a.aedat")
    assert "no regular file" in broken(tmp_path / "class" / "a.aedat", None)
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "neither"), (tmp_path / "none", "no such")):
        with pytest.raises(Mistake, match=says):
            open_events(path)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "b.bin").write_bytes(b"")
    with pytest.raises(Mistake, match="no class folder"):
        open_events(tmp_path / "loose")
    with pytest.raises(Mistake, match=r"holds 1 \.aedat, 1 \.bin"):
        open_events(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match="no recordings in it"):
        open_events(tmp_path / "empty")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_a_damaged_archive_is_named(suffix, tmp_path):
    folder = tmp_path / "data"
    good = make_tar(folder / f"a{suffix}") if "tar" in suffix else make_zips(folder) / "bird.zip"
    content = good.read_bytes()
    for damaged in (content[: len(content) // 2], b"nothing" * 100, b""):
        good.write_bytes(damaged)
        with pytest.raises(Mistake, match=good.name) as caught:
            open_events(folder if suffix == ".zip" else good).read(11)
        assert len(caught.value.lines) == 1


def test_a_missing_package_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aedat", None)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(Mistake, match="pip install aedat"):
        open_events(make_folders(tmp_path / "a", ".aedat4", as_aedat4)).read(0)
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "0_0.hdf5").write_bytes(b"")
    with pytest.raises(Mistake, match="pip install h5py"):
        print(open_events(tmp_path / "h").labels)


def test_what_dies_or_hangs_apart_harms_nobody(monkeypatch):
    assert apart.apart(lambda: np.arange(1 << 20)).sum() == (1 << 19) * ((1 << 20) - 1)
    with pytest.raises(Broken, match="failed over it"):
        apart.apart(os.abort)
    with pytest.raises(Broken, match="failed over it"):
        apart.apart(lambda: os._exit(3))
    with pytest.raises(Broken, match="ZeroDivisionError"):
        apart.apart(lambda: 1 // 0)
    with pytest.raises(Broken, match="MemoryError"):
        apart.apart(lambda: np.ones(apart.MEMORY, dtype=np.int64))
    monkeypatch.setattr(apart, "SECONDS", 0.2)
    with pytest.raises(Broken, match="not read within"):
        apart.apart(lambda: __import__("time").sleep(60))


def cache_bytes(tmp_path: Path) -> bytes:
    content = (make_cache(tmp_path / "cache", LABELS.tolist()) / "0_0.hdf5").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    return content


@pytest.mark.parametrize("form", ["aedat2", "aedat3", "atis", "npz", "aedat4", "hdf5"])
def test_damaged_bytes_are_read_or_told(form, tmp_path, monkeypatch):
    """Flipped, cut and repeated bytes: events within bounds, or a `Mistake`; no other exception, and no death."""
    monkeypatch.setattr(apart, "SECONDS", 3)
    write = {
        "aedat2": as_aedat2,
        "aedat3": as_aedat3,
        "aedat4": as_aedat4,
        "atis": as_bin,
        "npz": as_npz,
        "hdf5": lambda events: cache_bytes(tmp_path),
    }[form]
    good, rng = write(draw(0, 100)), np.random.default_rng(0)
    suffix = {"aedat2": ".aedat", "aedat3": ".aedat", "atis": ".bin"}.get(form, f".{form}")
    path = tmp_path / "class" / f"0_0{suffix}"
    path.parent.mkdir()
    told = []
    for i in range(45 if form in ("aedat4", "hdf5") else 400):
        content = bytearray(good)
        if i % 3 == 0:
            content = content[: rng.integers(len(content))]
        else:
            for at in rng.integers(0, len(content), rng.integers(1, 8)):
                content[at : at + i % 3] = rng.integers(0, 256, i % 3, dtype=np.uint8).tobytes()
        path.write_bytes(content)
        try:
            recording = open_events(tmp_path, sensor=(128, 128)).read(0)
            assert len(recording.t) == 0 or recording.x.max() < 128
        except Mistake as mistake:
            told.append(mistake)
    assert all(len(mistake.lines) == 1 and "0_0" in str(mistake) for mistake in told)
    assert len(told) > 10

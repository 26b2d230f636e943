"""Recordings in every form that data sets of event cameras come in. Oracles: tonic, spikingjelly, aedat, torch."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recordings import (
    CLASSES,
    LABELS,
    RECORDINGS,
    as_aedat2,
    as_aedat3,
    as_aedat4,
    as_bin,
    as_npz,
    by_name,
    draw,
    make_cache,
    make_folders,
    make_tar,
    make_zips,
)

from tdkd_dist.data.events import aedat2, aedat3, aedat4, atis, npz, open_events
from tdkd_dist.data.events.recording import Events
from tdkd_dist.data.events.splits import SplitRule
from tdkd_dist.mistakes import Mistake

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def equal(ours: object, theirs: object) -> bool:
    assert isinstance(ours, Events)
    assert [column.dtype for column in ours] == [np.int64, np.int16, np.int16, np.uint8]
    return all(np.array_equal(getattr(ours, name), theirs[name]) for name in "txyp")


FORMS = {
    "aedat2": lambda root: open_events(make_folders(root, ".aedat", as_aedat2)),
    "aedat2 in zips": lambda root: open_events(make_zips(root)),
    "aedat2 in a tar": lambda root: open_events(make_tar(root / "data.tar").parent),
    "aedat2 in a tar.gz": lambda root: open_events(make_tar(root / "data.tar.gz")),
    "aedat2 in a tar.xz": lambda root: open_events(make_tar(root / "data.tar.xz")),
    "aedat3": lambda root: open_events(make_folders(root, ".aedat", as_aedat3), sensor=(128, 128)),
    "aedat4": lambda root: open_events(make_folders(root, ".aedat4", as_aedat4)),
    "aedat4 called aedat": lambda root: open_events(make_folders(root, ".aedat", as_aedat4)),
    "bin": lambda root: open_events(make_folders(root, ".bin", as_bin), sensor=(128, 128)),
    "npz": lambda root: open_events(make_folders(root, ".npz", as_npz), sensor=(128, 128)),
    "hdf5": lambda root: open_events(make_cache(root, LABELS.tolist(), copies=2), sensor=(128, 128)),
    "hdf5 with names": lambda root: open_events(make_cache(root, [row[0] for row in RECORDINGS]), sensor=(128, 128)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_recordings(form, tmp_path):
    source = FORMS[form](tmp_path / "data")
    assert np.array_equal(source.labels, LABELS)
    assert source.sensor == (128, 128)
    assert source.class_names == (None if form == "hdf5" else CLASSES)
    copy = pickle.loads(pickle.dumps(source))
    for i, (_, _, events) in enumerate(RECORDINGS):
        assert equal(source.read(i), by_name(events))
        assert equal(copy.read(i), by_name(events))
    assert copy.signature() == source.signature()


@pytest.mark.parametrize("form", FORMS)
def test_a_signature_changes_with_the_source(form, tmp_path):
    path = FORMS[form](tmp_path / "data").path
    before = open_events(path, sensor=(128, 128)).signature()
    assert open_events(path, sensor=(128, 128)).signature() == before
    file = min(file for file in [path, *path.rglob("*.*")] if file.is_file())
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("bird/more_1.aedat", b"")
    elif ".tar" in file.name:
        make_tar(file, "others")
    else:
        file.write_bytes(file.read_bytes() + b"12345678")
    assert open_events(path, sensor=(128, 128)).signature() != before


def test_aedat2_is_read_as_spikingjelly_and_tonic_do(tmp_path):
    from spikingjelly.datasets.cifar10_dvs import _load_origin_data
    from tonic.io import get_aer_events_from_file

    path = tmp_path / "a.aedat"
    rng = np.random.default_rng(0)
    content = (
        as_aedat2(draw(0, 0)) + np.stack([rng.integers(0, 1 << 15, 900), np.arange(900)], 1).astype(">u4").tobytes()
    )
    path.write_bytes(content)
    ours, sensor = aedat2.read(content)
    assert sensor == (128, 128)
    assert equal(ours, _load_origin_data(path))
    raw = get_aer_events_from_file(path, 2.0, len(as_aedat2(draw(0, 0))))["address"]
    # tonic's read_dvs_128 gives the address' fields as they are.
    assert np.array_equal(ours.x, 127 - (raw >> 8 & 127))
    assert np.array_equal(ours.y, 127 - (raw >> 1 & 127))
    assert np.array_equal(ours.p, 1 - (raw & 1))


def test_aedat2_leaves_out_what_no_pixel_sent():
    events = draw(1, 3)
    header, rows = as_aedat2(draw(0, 0)), as_aedat2(events)[-24:]
    sync = np.array([0x8000, 7], dtype=">u4").tobytes()
    assert equal(aedat2.read(header + rows[:8] + sync + rows[8:])[0], by_name(events))


def test_bin_is_read_as_tonic_and_spikingjelly_do(tmp_path):
    from spikingjelly.datasets.utils import load_ATIS_bin
    from tonic.io import read_mnist_file

    dtype = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    path = tmp_path / "a.bin"
    path.write_bytes(as_bin(draw(0, 900, 34, 34)))
    assert equal(atis.read(path.read_bytes())[0], load_ATIS_bin(path))
    assert equal(atis.read(path.read_bytes())[0], read_mnist_file(path, dtype))
    # With overflows, which spikingjelly reads as events.
    content = np.frombuffer(as_bin(draw(1, 900, 180, 240)), dtype=np.uint8).reshape(-1, 5).copy()
    content[[0, 17, 18, 500, 899], 1] = 240
    path.write_bytes(content.tobytes())
    ours = atis.read(path.read_bytes())[0]
    assert len(ours.t) == 895
    assert equal(ours, read_mnist_file(path, dtype))


def test_aedat3_is_read_as_spikingjelly_does(tmp_path):
    from spikingjelly.datasets.utils import load_aedat_v3

    events = draw(0, 500, duration=1 << 33)
    path = tmp_path / "a.aedat"
    path.write_bytes(as_aedat3(events, each=1))
    assert equal(aedat3.read(path.read_bytes())[0], load_aedat_v3(path))
    assert equal(aedat3.read(path.read_bytes())[0], by_name(events))


def test_aedat3_leaves_out_invalid_events():
    content = as_aedat3(draw(0, 10)) + as_aedat3(draw(1, 10), valid=0).partition(b"#!END-HEADER\r\n")[2]
    assert equal(aedat3.read(content)[0], by_name(draw(0, 10)))


def test_aedat4_is_read_as_tonic_does(tmp_path):
    from tonic.io import read_aedat4

    path = tmp_path / "a.aedat4"
    path.write_bytes(as_aedat4(draw(0), 240, 320))
    theirs = read_aedat4(path)
    ours, sensor = aedat4.read(path.read_bytes())
    assert sensor == (240, 320)
    assert equal(ours, {name: theirs["on" if name == "p" else name] for name in "txyp"})


def make_gestures(root: Path) -> dict[str, Events]:
    root.mkdir()
    files = {
        name: draw(i, 3000, duration=9_000_000) for i, name in enumerate(("user02_led", "user01_lab", "user24_led"))
    }
    for name, events in files.items():
        (root / f"{name}.aedat").write_bytes(as_aedat3(events))
        rows = (
            "class,startTime_usec,endTime_usec\n1,0,2000000\n8,2000000,3000000\n8,2500000,4000000\n11,8999999,8999999\n"
        )
        (root / f"{name}_labels.csv").write_text(rows)
    (root / "trials_to_train.txt").write_text("user02_led.aedat\nuser01_lab.aedat\n")
    (root / "trials_to_test.txt").write_text("\nuser24_led.aedat\n")
    return files


def test_gestures_are_the_rows_of_the_tables(tmp_path):
    from spikingjelly.datasets.dvs128_gesture import _split_aedat_files_to_np

    root, out = tmp_path / "DvsGesture", tmp_path / "out"
    make_gestures(root)
    for part, names in (("train", ["user01_lab", "user02_led"]), ("val", ["user24_led"])):
        source = open_events(root, part)
        assert source.sensor == (128, 128)
        assert source.labels.tolist() == [0, 7, 7, 10] * len(names)
        assert source.class_names[10] == "other_gestures"
        theirs = []
        for name in names:
            for label in range(11):
                (out / str(label)).mkdir(parents=True, exist_ok=True)
            _split_aedat_files_to_np(name, root / f"{name}.aedat", root / f"{name}_labels.csv", out)
            theirs += [out / f"{label}/{name}_{i}.npz" for label, i in ((0, 0), (7, 0), (7, 1), (10, 0))]
        copy = pickle.loads(pickle.dumps(source))
        for i, path in enumerate(theirs):
            with np.load(path) as arrays:
                assert equal(source.read(i), arrays)
                assert equal(copy.read(i), arrays)
    assert len(source.read(3).t) == 0
    with pytest.raises(Mistake, match="say --split"):
        open_events(root)
    with pytest.raises(Mistake, match="official"):
        open_events(root, "train", SplitRule("random"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("user01_lab_labels.csv", "class,a,b\n12,0,5\n", "line 2"),
        ("user01_lab_labels.csv", "class,a,b\n1,0,5\n1,9,5\n", "line 3"),
        ("user01_lab_labels.csv", "class,a,b\nx\n", "line 2"),
        ("user01_lab_labels.csv", b"class\n\xff\xff", "damaged"),
        ("trials_to_test.txt", "user99_led.aedat", "user99_led.aedat"),
        ("trials_to_test.txt", "user01_lab.aedat", "other list"),
        ("user77_lab_labels.csv", "class,a,b\n", "user77_lab.aedat"),
    ],
)
def test_broken_gesture_tables_are_named(file, content, says, tmp_path):
    make_gestures(tmp_path / "g")
    (tmp_path / "g" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Mistake, match=says) as caught:
        open_events(tmp_path / "g", "train")
    assert len(caught.value.lines) == 1


def test_the_sensor_of_bins_is_known_by_their_classes(tmp_path):
    for part in ("Train", "Test"):
        for digit in "01":
            folder = tmp_path / "nmnist" / part / digit
            folder.mkdir(parents=True)
            (folder / "00001.bin").write_bytes(as_bin(draw(int(digit), 50, 34, 34)))
    source = open_events(tmp_path / "nmnist", "val")
    assert (source.kind, source.sensor, source.class_names, len(source.labels)) == ("n-mnist", (34, 34), ["0", "1"], 2)
    with zipfile.ZipFile(tmp_path / "Test.zip", "w") as archive:
        for digit in "01":
            archive.write(tmp_path / "nmnist" / "Test" / digit / "00001.bin", f"Test/{digit}/00001.bin")
    assert equal(open_events(tmp_path / "Test.zip").read(1), source.read(1)._asdict())
    source = open_events(make_folders(tmp_path / "caltech", ".bin", lambda events: as_bin(events)))
    assert (source.kind, source.sensor) == ("n-caltech101", (180, 240))


def test_frames_are_read_as_they_are(tmp_path):
    from tonic.cached_dataset import save_to_disk_cache

    frames = np.random.default_rng(0).poisson(1.0, (10, 2, 32, 48))
    (tmp_path / "npz" / "a").mkdir(parents=True)
    np.savez(tmp_path / "npz" / "a" / "0.npz", frames=frames.astype(np.float64))
    (tmp_path / "hdf5").mkdir()
    save_to_disk_cache(frames.astype(np.int16), 3, tmp_path / "hdf5" / "0_0.hdf5")
    for source in (open_events(tmp_path / "npz"), open_events(tmp_path / "hdf5")):
        read = source.read(0)
        assert source.sensor == (32, 48)
        assert read.dtype == np.uint8
        assert np.array_equal(read, frames)


def test_splits(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(120):
            (tmp_path / name / f"cifar10_{name}_{i}.aedat").write_bytes(as_aedat2(draw(i, 5)))
    whole = open_events(tmp_path)
    names = [whole.name(i) for i in range(len(whole.labels))]
    with pytest.raises(Mistake, match="no official split"):
        open_events(tmp_path, "train", SplitRule("official"))
    assert whole.chosen == "all recordings"
    assert open_events(tmp_path, "val").chosen == "val, random split, 10 % validated on, seed 42"
    # As torch divides it.
    generator = torch.Generator().manual_seed(42)
    train, val = torch.utils.data.random_split(names, [324, 36], generator)
    for split, theirs in (("train", train), ("val", val)):
        part = open_events(tmp_path, split, SplitRule("random"))
        assert [part.name(i) for i in range(len(part.labels))] == sorted(theirs, key=names.index)
        assert equal(part.read(3), whole.read(names.index(part.name(3)))._asdict())
        assert part.labels[3] == whole.labels[names.index(part.name(3))]
    part = open_events(tmp_path, "val", SplitRule("index"))
    assert {int(Path(part.name(i)).stem.split("_")[-1]) for i in range(len(part.labels))} == set(range(100))
    assert len(part.labels) == 300
    signatures = {
        open_events(tmp_path, split, rule).signature()
        for split in ("train", "val")
        for rule in (SplitRule("random"), SplitRule("random", seed=1), SplitRule("index"))
    }
    assert len(signatures) == 6
    assert SplitRule("random").text == "random split, 10 % validated on, seed 42"


@pytest.mark.parametrize(
    "wrong", [{"kind": "fair"}, {"test": 0.0}, {"test": 1.0}, {"first": 0}, {"seed": -1}, {"test": float("nan")}]
)
def test_a_wrong_rule_is_refused(wrong):
    with pytest.raises(Mistake):
        SplitRule(**wrong)


counted = st.integers(0, 40)
columns = st.integers(0, 2**32 - 1)


@given(counted, columns)
@settings(max_examples=60, deadline=None)
@example(0, 0)
def test_what_is_written_is_read(count, seed):
    events = draw(seed, count, duration=1 << 22)
    for read, write in ((aedat2.read, as_aedat2), (aedat3.read, as_aedat3), (npz.read, as_npz)):
        assert equal(read(write(events))[0], by_name(events))
    assert equal(atis.read(as_bin(events))[0], by_name(events))

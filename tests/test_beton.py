"""Betons: what is written is what FFCV's own reader finds, and what is broken is told from what is whole.

Oracles: FFCV's reader, loader and image field, Pillow, numpy on the source.
"""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdkd_dist.data import layout
from tdkd_dist.data.beton import WriteOptions, check_beton, choose, read_manifest, up_to_date, write
from tdkd_dist.data.sources import FolderSource, Source, open_source
from tdkd_dist.data.verify import verify

ffcv = pytest.importorskip("ffcv")
TOOL = Path(__file__).resolve().parent.parent / "tools" / "write_beton.py"
SIZES = [(60, 80), (300, 200), (50, 50), (700, 90), (33, 47), (128, 128)]


def picture(seed: int, height: int, width: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 6, 12 and 18 pictures of several sizes."""
    root = tmp_path_factory.mktemp("tree")
    for c, name in enumerate(("cat", "dog", "owl")):
        (root / name).mkdir()
        for i in range(6 * (c + 1)):
            picture(100 * c + i, *SIZES[i % 6]).save(root / name / f"{i:02d}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def beton(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "tree.beton"
    write(FolderSource(tree), path, WriteOptions(max_side=256))
    return path


@pytest.fixture
def copy(beton: Path, tmp_path: Path) -> Path:
    """A beton with its manifest, to be damaged."""
    for name in (beton.name, beton.name + ".json"):
        shutil.copy(beton.with_name(name), tmp_path / name)
    return tmp_path / beton.name


def stored(path: Path) -> Iterator[tuple[np.ndarray, int, bool]]:
    """(pixels, label, whether it is a JPEG) of each sample, found by FFCV's reader and decoded by OpenCV."""
    import cv2
    from ffcv.reader import Reader

    reader = Reader(str(path))
    content = path.read_bytes()
    sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
    for sample in reader.metadata:
        field, ptr = sample["f0"], int(sample["f0"]["data_ptr"])
        data = np.frombuffer(content[ptr : ptr + sizes[ptr]], np.uint8)
        if field["mode"] == 0:
            pixels = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        else:
            pixels = data.reshape(field["height"], field["width"], 3)
        yield pixels, int(sample["f1"]), field["mode"] == 0


# ---- what is written ----


def test_the_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    metadata = types.get_metadata_type([RGBImageField(), IntField()])
    for ours, theirs in (
        (layout.HEADER, types.HeaderType),
        (layout.ALLOCATION, types.ALLOC_TABLE_TYPE),
        (layout.IMAGE, RGBImageField().metadata_type),
    ):
        assert (ours.itemsize, ours.fields) == (theirs.itemsize, theirs.fields)
    assert layout.DESCRIPTOR.itemsize == types.FieldDescType.itemsize
    assert layout.SAMPLE.itemsize == metadata.itemsize
    assert [f[1] for f in layout.SAMPLE.fields.values()] == [f[1] for f in metadata.fields.values()]
    assert types.CURRENT_VERSION == layout.VERSION
    assert types.TYPE_ID_HANDLER[layout.TYPE_IMAGE] is RGBImageField
    assert types.TYPE_ID_HANDLER[layout.TYPE_INT] is IntField


def test_every_picture_is_stored_once_in_order(tree: Path, beton: Path) -> None:
    paths = sorted(tree.rglob("*.JPEG"))
    found = list(stored(beton))
    assert len(found) == len(paths) == 36
    for path, (pixels, label, jpeg) in zip(paths, found, strict=True):
        expected = Image.open(path).convert("RGB")
        assert label == ["cat", "dog", "owl"].index(path.parent.name)
        expected.thumbnail((256, 256), Image.Resampling.BOX, reducing_gap=None)
        assert max(pixels.shape) <= 256
        assert np.abs(np.array(pixels.shape[:2]) - expected.size[::-1]).max() <= 1
        if pixels.shape[:2] == expected.size[::-1]:
            error = np.abs(pixels.astype(int) - np.asarray(expected)).mean()
            assert error == 0 if not jpeg and max(Image.open(path).size) <= 256 else error < 6


def test_the_bytes_are_those_of_ffcvs_own_field(tree: Path, tmp_path: Path) -> None:
    from ffcv.fields import RGBImageField

    for share, mode in ((0.0, "raw"), (1.0, "jpg")):
        write(FolderSource(tree), tmp_path / mode, WriteOptions(max_side=128, jpeg_share=share, quality=77))
        tables = layout.read_tables(tmp_path / mode)
        content = (tmp_path / mode).read_bytes()
        for i, path in enumerate(sorted(tree.rglob("*.JPEG"))):
            parts: list[np.ndarray] = []

            def malloc(size: int, parts: list[np.ndarray] = parts) -> tuple[int, np.ndarray]:
                parts.append(np.empty(size, np.uint8))
                return 0, parts[-1]

            record = np.zeros(1, RGBImageField().metadata_type)
            RGBImageField(mode, max_resolution=128, jpeg_quality=77).encode(record, Image.open(path), malloc)
            ptr, size = tables.place(i)
            assert content[ptr : ptr + size] == parts[0].tobytes()
            assert tables.samples[i]["image"]["height"] == record["height"]


def test_bare_ffcv_reads_fashion_mnist(tmp_path: Path) -> None:
    from ffcv.loader import Loader
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    for part in ("images-idx3", "labels-idx1"):
        packed = subprocess.run(["gzip", "-dc", str(folder / f"t10k-{part}-ubyte.gz")], capture_output=True, check=True)
        (tmp_path / part).write_bytes(packed.stdout)
    manifest = write(open_source(folder, "val"), tmp_path / "t10k.beton")
    loader = Loader(str(tmp_path / "t10k.beton"), batch_size=1000, num_workers=1)
    images, labels = (np.concatenate([b[i].numpy().copy() for b in loader]) for i in (0, 1))
    expected = read_image_file(str(tmp_path / "images-idx3")).numpy()
    assert np.array_equal(images, np.stack([expected] * 3, axis=-1))
    assert np.array_equal(labels[:, 0], read_label_file(str(tmp_path / "labels-idx1")).numpy())
    assert manifest.mean == pytest.approx([expected.mean() / 255] * 3, abs=1e-5)
    assert manifest.std == pytest.approx([expected.std() / 255] * 3, abs=1e-5)


def test_the_manifest_describes_the_file(tree: Path, beton: Path) -> None:
    manifest = read_manifest(beton)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_classes) == (36, 3)
    assert manifest.class_names == ["cat", "dog", "owl"]
    assert manifest.class_histogram == [6, 12, 18]
    assert manifest.file_size == beton.stat().st_size
    raw = beton.with_name("raw.beton")
    manifest = write(FolderSource(tree), raw, WriteOptions(jpeg_share=0))
    pixels = np.concatenate([p.reshape(-1, 3) for p, _, _ in stored(raw)]) / 255
    assert manifest.mean == pytest.approx(pixels.mean(axis=0), abs=2e-6)
    assert manifest.std == pytest.approx(pixels.std(axis=0), abs=2e-6)
    assert check_beton(raw, "data.train").manifest == manifest


def test_the_same_source_and_options_give_the_same_bytes(tree: Path, beton: Path, tmp_path: Path) -> None:
    write(FolderSource(tree), tmp_path / "again.beton", WriteOptions(max_side=256), workers=3)
    assert (tmp_path / "again.beton").read_bytes() == beton.read_bytes()


def test_the_share_of_jpegs(tree: Path, tmp_path: Path) -> None:
    for share, most in ((0.0, 0), (0.5, 26), (1.0, 36)):
        write(FolderSource(tree), tmp_path / "x.beton", WriteOptions(jpeg_share=share))
        count = sum(jpeg for _, _, jpeg in stored(tmp_path / "x.beton"))
        assert most - 16 * (share == 0.5) <= count <= most


def test_no_picture_crosses_a_page(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for i in range(12):
        picture(i, 1000, 1100 + i).save(tmp_path / "tree" / "a" / f"{i:02d}.bmp")
    write(FolderSource(tmp_path / "tree"), tmp_path / "x.beton", WriteOptions(jpeg_share=0, max_side=0))
    tables = layout.read_tables(tmp_path / "x.beton")
    first = tables.allocations["ptr"] // layout.PAGE_SIZE
    last = (tables.allocations["ptr"] + tables.allocations["size"] - 1) // layout.PAGE_SIZE
    assert np.array_equal(first, last)
    assert len(np.unique(first)) == 6
    for i, (pixels, _, _) in enumerate(stored(tmp_path / "x.beton")):
        assert np.array_equal(pixels, np.asarray(picture(i, 1000, 1100 + i)))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 20000), (20000, 10), (3000, 3000)])
def test_extreme_sizes(height: int, width: int, tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    Image.new("RGB", (width, height), (10, 200, 30)).save(tmp_path / "tree" / "a" / "x.png")
    # 3000 x 3000 raw pixels do not fit a page: stored as JPEG instead.
    for max_side in (500, 0):
        write(FolderSource(tmp_path / "tree"), tmp_path / "x.beton", WriteOptions(max_side=max_side, jpeg_share=0))
        [(pixels, _, jpeg)] = stored(tmp_path / "x.beton")
        assert jpeg == (max_side == 0 and height * width == 3000 * 3000)
        assert np.abs(pixels.astype(int) - (10, 200, 30)).max() <= 2
        side = min(500, max(height, width)) if max_side else max(height, width)
        assert max(pixels.shape[:2]) == side
        assert verify(tmp_path / "x.beton")[1] == []


def test_subsets_are_spread_over_the_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    np.random.default_rng(0).shuffle(labels)
    for subset, count in ((50, 50), (0.2, 200), (5000, 1000), (None, 1000)):
        chosen = choose(labels, subset)
        assert len(np.unique(chosen)) == len(chosen) == count
        assert np.bincount(labels[chosen]).tolist() == [count // 10] * 10


# ---- what is broken ----


def damage(path: Path, where: str) -> None:
    size, tables = path.stat().st_size, layout.read_tables(path)
    at = {
        "nothing": 0,
        "header": 11,
        "descriptors": 500,
        "samples": 24 + 2 * 1041 + 100,
        "pictures": int(tables.allocations["ptr"][20]) + 5,
        "allocations": size - 60,
        "last byte": size - 1,
    }[where]
    os.truncate(path, at)


PLACES = ["nothing", "header", "descriptors", "samples", "pictures", "allocations", "last byte"]


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("where", PLACES)
def test_a_truncated_file_is_refused(where: str, with_manifest: bool, copy: Path) -> None:
    damage(copy, where)
    if not with_manifest:
        copy.with_name(copy.name + ".json").unlink()
    with pytest.raises(ValueError, match=f"^data.val={copy}: .*(truncated|not an FFCV file)"):
        check_beton(copy, "data.val")


def test_what_is_no_beton_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n" * 10000)
    for path, message in (
        (tmp_path / "text", "not an FFCV file"),
        (tmp_path / "no", "no such file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(ValueError, match=f"^data.train={path}: {message}"):
            check_beton(path, "data.train")


@pytest.mark.parametrize("places", [range(24), range(24, 2000, 97), range(2106, 2106 + 36 * 28, 31)])
def test_a_flipped_byte_in_the_tables_is_refused_at_load(places: range, copy: Path) -> None:
    content = copy.read_bytes()
    for place in places:
        copy.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        with pytest.raises(ValueError, match=f"^data.train={copy}: "):
            check_beton(copy, "data.train")


def test_a_sample_table_that_points_nowhere_is_refused_without_a_manifest(copy: Path) -> None:
    copy.with_name(copy.name + ".json").unlink()
    content = bytearray(copy.read_bytes())
    content[24 + 2 * 1041 + 24 * 7 + 8] ^= 0xFF
    copy.write_bytes(content)
    with pytest.raises(ValueError, match="sample table is corrupt: 1 samples, the first is 7"):
        check_beton(copy, "data.train")


@pytest.mark.parametrize("sample", [0, 17, 35])
def test_a_flipped_byte_in_a_picture_is_found_by_verify(sample: int, copy: Path) -> None:
    ptr, size = layout.read_tables(copy).place(sample)
    content = bytearray(copy.read_bytes())
    content[ptr + size // 2] ^= 0x01
    copy.write_bytes(content)
    check_beton(copy, "data.train")
    _, problems = verify(copy)
    assert problems == [f"sample {sample}: its checksum differs: its bytes have changed since they were written"]


def test_verify_finds_a_broken_jpeg_without_a_manifest(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write(FolderSource(tree), path, WriteOptions(jpeg_share=1))
    path.with_name(path.name + ".json").unlink()
    ptr, _ = layout.read_tables(path).place(4)
    content = bytearray(path.read_bytes())
    content[ptr : ptr + 20] = bytes(20)
    path.write_bytes(content)
    info, problems = verify(path, workers=2)
    assert info.manifest is None
    assert len(problems) == 1
    assert problems[0].startswith("sample 4: ")


def test_a_file_that_ffcv_wrote_is_accepted(tree: Path, tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField("proportion", max_resolution=200), "label": IntField()}
    DatasetWriter(str(tmp_path / "x.beton"), fields, num_workers=2).from_indexed_dataset(
        ImageFolder(str(tree)), chunksize=5
    )
    info = check_beton(tmp_path / "x.beton", "data.train")
    assert (info.num_samples, info.num_classes, info.manifest) == (36, None, None)
    assert verify(tmp_path / "x.beton")[1] == []
    fields = {"picture": RGBImageField("raw"), "class": IntField()}
    DatasetWriter(str(tmp_path / "y.beton"), fields, num_workers=1).from_indexed_dataset(ImageFolder(str(tree)))
    with pytest.raises(ValueError, match="its fields are picture, class"):
        check_beton(tmp_path / "y.beton", "data.train")


def test_a_manifest_that_does_not_belong_is_refused(copy: Path) -> None:
    manifest = copy.with_name(copy.name + ".json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"num_samples": 35}))
    with pytest.raises(ValueError, match="36 samples, but its manifest says 35"):
        check_beton(copy, "data.train")
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="not a manifest"):
        check_beton(copy, "data.train")


# ---- the command ----


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
    done = run(*(tree if arg == "TREE" else arg for arg in args), cwd=tmp_path)
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
    stopped = run(tmp_path / "tree", dest, "--workers", workers)
    assert stopped.returncode == 2
    assert "dog/03.JPEG: not a readable picture" in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
    assert list(dest.parent.iterdir()) == []
    skipped = run(tmp_path / "tree", dest, "--workers", workers, "--on-error", "skip")
    assert skipped.returncode == 0
    manifest = read_manifest(dest)
    assert manifest is not None
    assert manifest.class_histogram == [6, 11, 18]
    assert "dog/03.JPEG" in manifest.skipped[0]
    labels = [label for _, label, _ in stored(dest)]
    assert labels == [0] * 6 + [1] * 11 + [2] * 18
    assert run("--verify", dest).returncode == 0


def test_verify_names_the_sample_and_exits_1(copy: Path) -> None:
    ptr, _ = layout.read_tables(copy).place(9)
    content = bytearray(copy.read_bytes())
    content[ptr + 50] ^= 0x80
    copy.write_bytes(content)
    done = run("--verify", copy)
    assert done.returncode == 1
    assert "sample 9: " in done.stdout


def test_no_space_left(tree: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(15 * 2**20))
    for workers in (1, 2):
        done = run(tree, small_disk / "x.beton", "--workers", workers, "--jpeg-share", 0)
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


def test_an_empty_source(tmp_path: Path) -> None:
    source: Source = open_source_of_nothing(tmp_path)
    with pytest.raises(ValueError, match="no pictures"):
        write(source, tmp_path / "x.beton")


def open_source_of_nothing(root: Path) -> Source:
    for part, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        (root / f"t10k-{part}-ubyte").write_bytes(bytes([0, 0, 8, dimensions]) + bytes(4 * dimensions))
    return open_source(root)

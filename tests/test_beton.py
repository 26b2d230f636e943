"""Betons: what is written is what FFCV's own reader finds, and what is broken is told from what is whole.

Oracles: FFCV's reader, loader and image field, Pillow, numpy on the source.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, stored
from PIL import Image

from tdkd_dist.data.beton import layout
from tdkd_dist.data.beton.manifest import WriteOptions, check_beton, read_manifest
from tdkd_dist.data.beton.verify import verify
from tdkd_dist.data.beton.writing import choose, write
from tdkd_dist.data.sources import open_source
from tdkd_dist.data.sources.folder import FolderSource

ffcv = pytest.importorskip("ffcv")


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
        chosen = choose(labels, WriteOptions(subset=subset))
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


def test_a_killed_process_ends_the_verification_in_a_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[verify.__module__]
    monkeypatch.setattr(module, "_find_problem", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match="a process that decodes pictures was killed"):
        verify(copy, workers=2)


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

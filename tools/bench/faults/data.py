"""Pictures in every form, damaged: bytes changed, cut or doubled; members and keys of other kinds; odd names."""

import io
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tdkd_dist.data.beton.manifest import check_beton, manifest_path
from tdkd_dist.data.beton.verify import verify
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources import open_source
from tdkd_dist.data.sources.folder import FolderSource

COUNT = 6
ODD: tuple[Any, ...] = (None, -1, 2**62, 2**80, 1.5, float("nan"), "x", b"\xff", [], [[]], {}, {"a": 1}, np.zeros(3))
NAMES = ("\udcff\udcfe.png", "a\x1b[2J.png", "a\nb.png", " ", "..png", "x" * 200 + ".png")


@lru_cache
def picture(k: int) -> bytes:
    """A small encoded picture."""
    stream = io.BytesIO()
    Image.new("RGB", (9 + k, 8), (40 * k, 9, 0)).save(stream, "PNG" if k % 2 else "JPEG")
    return stream.getvalue()


def damaged(draw: random.Random, content: bytes) -> bytes:
    """The bytes with some changed, cut, doubled, or none at all."""
    kind = draw.choice(("bytes", "cut", "double", "insert", "empty", "zeros"))
    if kind == "empty" or not content:
        return b""
    at = draw.randrange(len(content))
    if kind == "cut":
        return content[:at]
    if kind == "double":
        return content[:at] + content[at // 2 :]
    if kind == "insert":
        return content[:at] + draw.randbytes(draw.randint(1, 40)) + content[at:]
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        # Headers are at the start and, in parquet, at the end.
        at = draw.choice((draw.randrange(len(changed)), draw.randrange(min(len(changed), 300)), -draw.randint(1, 300)))
        if -len(changed) <= at < len(changed):
            changed[at] = 0 if kind == "zeros" else draw.randrange(256)
    return bytes(changed)


def read_all(path: Path, draw: random.Random) -> None:
    """All that a source can be asked."""
    source = open_source(path, draw.choice((None, "train", "val")))
    _, _ = source.class_names, source.signature()
    for index in range(min(len(source.labels), COUNT)):
        source.name(index)
        source.read(index)


def class_folders(draw: random.Random, folder: Path) -> None:
    """A tree with odd pictures, names, pipes, links and folders."""
    for k in range(COUNT):
        path = folder / "tree" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(k))
    path = draw.choice(sorted((folder / "tree").rglob("*.png")))
    kind = draw.choice(("bytes", "pipe", "folder", "link", "loop", "name", "class", "file", "gone"))
    if kind == "bytes":
        path.write_bytes(damaged(draw, path.read_bytes()))
    elif kind == "name":
        path.rename(os.fsdecode(os.fsencode(path.parent)) + "/" + draw.choice(NAMES))
    elif kind == "class":
        path.parent.rename(path.parent.parent / draw.choice(NAMES))
    elif kind == "file":
        (folder / "tree" / "class9").write_text("a file")
    else:
        path.unlink()
        make: dict[str, Callable[[], Any]] = {
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "link": lambda: path.symlink_to("/nowhere/x.png"),
            "loop": lambda: path.symlink_to(path),
            "gone": lambda: path.parent.joinpath("note.txt").write_text("x"),
        }
        make[kind]()
    read_all(folder / "tree", draw)


@lru_cache
def tree_tar() -> bytes:
    """A tar of class folders."""
    return make_tar({f"top/{'train' if k < 4 else 'val'}/n{k % 2}/{k}.png": picture(k) for k in range(COUNT)})


@lru_cache
def webdataset() -> bytes:
    """A shard."""
    members = {f"{k:03d}.jpg": picture(k) for k in range(COUNT)} | {
        f"{k:03d}.cls": b"%d" % (k % 3) for k in range(COUNT)
    }
    return make_tar(dict(sorted(members.items())))


def make_tar(members: dict[str, bytes]) -> bytes:
    """A tar's bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def tars(draw: random.Random, folder: Path) -> None:
    """Class folders and WebDataset shards in tars."""
    path = folder / "x.tar"
    path.write_bytes(damaged(draw, draw.choice((tree_tar, webdataset))()))
    read_all(path, draw)


@lru_cache
def parquet_bytes() -> bytes:
    """A shard as public copies of CIFAR-10 are."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": picture(k), "path": f"{k}.png"} for k in range(COUNT)]
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    features = {"info": {"features": {"img": {"_type": "Image"}, "label": names}}}
    table = pa.table({"img": rows, "label": [k % 2 for k in range(COUNT)]})
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), stream)
    return stream.getvalue()


def parquet(draw: random.Random, folder: Path) -> None:
    """Parquet with corrupt pages, metadata and text."""
    path = folder / "x.parquet"
    path.write_bytes(damaged(draw, parquet_bytes()))
    read_all(path, draw)


def idx(draw: random.Random, folder: Path) -> None:
    """idx files with impossible sizes."""
    images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (COUNT, 5, 4)) + bytes(COUNT * 20)
    labels = bytes([0, 0, 8, 1]) + COUNT.to_bytes(4, "big") + bytes(range(COUNT))
    first = draw.random() < 0.7
    (folder / "train-images-idx3-ubyte").write_bytes(damaged(draw, images) if first else images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels if first else damaged(draw, labels))
    read_all(folder, draw)


def cifar(draw: random.Random, folder: Path) -> None:
    """CIFAR-10's pickles with missing keys, odd values, other bytes, and code."""
    for k in range(1, 6):
        batch: Any = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [k % 3, 1]}
        if k == 1 or draw.random() < 0.2:
            key = draw.choice(list(batch))
            batch = draw.choice((batch, {**batch, key: draw.choice(ODD)}, draw.choice(ODD), Path("x")))
        content = pickle.dumps(batch)
        (folder / f"data_batch_{k}").write_bytes(content if draw.random() < 0.7 else damaged(draw, content))
    meta = draw.choice(({b"label_names": [b"a", b"b", b"c"]}, {b"label_names": draw.choice(ODD)}, draw.choice(ODD)))
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}))
    read_all(folder, draw)


@lru_cache
def beton_bytes() -> tuple[bytes, bytes]:
    """A beton and its manifest."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k in range(COUNT):
            path = folder / "tree" / f"class{k % 2}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(k))
        write(FolderSource(folder / "tree"), folder / "x.beton", workers=1)
        beton = (folder / "x.beton").read_bytes()
        return beton, manifest_path(folder / "x.beton").read_bytes()


def betons(draw: random.Random, folder: Path) -> None:
    """FFCV files with damaged tables and manifests, or without one."""
    beton, manifest = beton_bytes()
    path, which = folder / "x.beton", draw.random()
    # Pictures fill a page of 8 MB; the tables before them and after are what counts.
    small = draw.random() < 0.9
    head, rest = (beton[:4096], beton[4096:]) if small else (b"", beton)
    path.write_bytes(damaged(draw, head) + rest if which < 0.7 and small else beton)
    if which < 0.35 or which > 0.9:
        manifest_path(path).write_bytes(damaged(draw, manifest))
    elif which > 0.7:
        manifest_path(path).write_bytes(draw.choice((b"[]", b"3", b"{}", b"null", b"\xff", b"[" * 5000)))
    check_beton(path, "data.train")
    verify(path)


AREAS = {
    "class folders": class_folders,
    "tars": tars,
    "parquet": parquet,
    "idx": idx,
    "cifar": cifar,
    "betons": betons,
}

"""ImageNet in the forms it is handed out in, read in place; only a compressed tar is unpacked to disk, once.

A tar is indexed once, by reading its headers; a picture is then one read at a known offset.
"""

import gzip
import hashlib
import json
import logging
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.classes import synsets_of
from tdkd_dist.data.sources.ground_truth import find_truth, read_truth
from tdkd_dist.data.sources.parquet import ParquetSource
from tdkd_dist.data.sources.source import IMAGE_SUFFIXES, Image, Source, decode_image, fingerprint, of_split, one_line
from tdkd_dist.files import private_folder, whole
from tdkd_dist.mistakes import Mistake

PREFIXES = {
    "train": ("train", "ILSVRC2012_img_train", "imagenet1k-train"),
    "val": ("val", "ILSVRC2012_img_val", "imagenet1k-val"),
}
TESTS = {"train": (), "val": ("test",)}
"""What is validated on where there is no validation set, as in CIFAR."""


HALVES = PREFIXES | {"test": TESTS["val"]}


def refuse_both(path: Path, parts: set[str]) -> None:
    """Raise `Mistake` where nobody said which of what is trained, validated and tested on is wanted."""
    if "train" in parts and len(parts) > 1:
        raise Mistake(f"{path}: holds {' and '.join(sorted(parts, key=['train', 'val', 'test'].index))}; say --split")


def open_archive(path: Path, split: str | None, labels: Path | None) -> Source | None:
    """The tar, WebDataset, parquet or flat source at `path`, None if it is none of these."""
    if path.is_file():
        files = [path]
    else:
        files = [p for folder in (path, path / "data") if folder.is_dir() for p in folder.iterdir() if p.is_file()]
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        return _open_tars(path, [unpacked(path)], labels, split)
    for suffix in (".parquet", ".tar"):
        found = [p for p in files if p.suffix == suffix]
        if found:
            if split is None and path.is_dir():
                refuse_both(path, {part for part in HALVES if of_split(found, part, HALVES)})
            chosen = of_split(found, split, PREFIXES) or of_split(found, split, TESTS) if path.is_dir() else found
            if not chosen:
                raise Mistake(f"{path}: no {suffix} file for --split {split}")
            return ParquetSource(path, chosen) if suffix == ".parquet" else _open_tars(path, chosen, labels, split)
    if labels is not None and any(p.name.lower().endswith(IMAGE_SUFFIXES) for p in files):
        return FlatSource(path, labels)
    return None


def _open_tars(path: Path, files: list[Path], labels: Path | None, split: str | None) -> Source:
    first = [m.name for _, m in zip(range(8), _members(files[0]), strict=False)]
    if any(name.endswith(".tar") for name in first):
        return NestedTarSource(path, files)
    if any(name.endswith((".cls", ".json")) for name in first):
        return WebDatasetSource(path, files)
    if len(files) == 1:
        picture = next((PurePosixPath(m.name) for m in _members(files[0]) if _is_picture(m.name)), PurePosixPath())
        # ILSVRC2012's validation pictures lie in one folder at most, which is no class.
        depth = 2 if picture.name.startswith("ILSVRC2012_val") else 1
        if labels is None and len(picture.parent.parts) >= depth:
            return TreeTarSource(path, files[0], split)
        return FlatSource(files[0], labels)
    raise Mistake(f"{path}: {len(files)} tars, but neither WebDataset shards nor ILSVRC2012's; say --split, or which")


@dataclass
class Index:
    """Where each encoded picture lies: a byte range of a file."""

    files: list[Path]
    file: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, file: int, offset: int, size: int, name: str) -> None:
        """One more picture. Raises `Mistake` if it would lie beyond the file's end."""
        if offset + size > os.stat(self.files[file]).st_size:
            raise Mistake(f"{self.files[file]}: truncated at {name}")
        for column, value in zip(
            (self.file, self.offset, self.size, self.names), (file, offset, size, name), strict=True
        ):
            column.append(value)  # type: ignore[attr-defined]


class EncodedSource:
    """Encoded pictures at known places; a subclass says where, and what they show."""

    kind = "encoded"
    lossless = False

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, list(files)

    @cached_property
    def _indexed(self) -> tuple[Index, NDArray[np.int64], list[str] | None]:
        """Places, labels, class names; read at first need, since it may mean passing through 150 GB of headers."""
        return self._read_index()

    def _read_index(self) -> tuple[Index, NDArray[np.int64], list[str] | None]:
        raise NotImplementedError

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]."""
        return self._indexed[1]

    @property
    def class_names(self) -> list[str] | None:
        """Synsets, where the source tells them."""
        return self._indexed[2]

    def name(self, index: int) -> str:
        """The archive and the picture's name in it."""
        places = self._indexed[0]
        return f"{places.files[places.file[index]]}/{places.names[index]}"

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]."""
        places = self._indexed[0]
        with open(places.files[places.file[index]], "rb") as file:
            data = os.pread(file.fileno(), places.size[index], places.offset[index])
        return decode_image(data, self.name(index))

    def signature(self) -> str:
        """Hash of the files' names, sizes, beginnings and ends."""
        return fingerprint(self.files)


class NestedTarSource(EncodedSource):
    """ILSVRC2012's training set: a tar of one tar a class, named after its synset."""

    kind = "ilsvrc2012-train"

    def _read_index(self) -> tuple[Index, NDArray[np.int64], list[str] | None]:
        index, synsets = Index(self.files), []
        for file, outer in enumerate(self.files):
            for inner in _members(outer):
                if not inner.name.endswith(".tar"):
                    raise Mistake(f"{outer}: {inner.name} among the class tars is not a tar")
                before = len(index.names)
                for picture in _members(outer, inner):
                    index.add(file, inner.offset_data + picture.offset_data, picture.size, picture.name)
                if len(index.names) == before:
                    raise Mistake(f"{outer}: {inner.name} holds no pictures")
                synsets += [Path(inner.name).stem] * (len(index.names) - before)
        names = sorted(set(synsets))
        return index, _positions(synsets, names), names


class FlatSource(EncodedSource):
    """ILSVRC2012's validation set: pictures without labels, in a tar or a folder, in the order of their names.

    `labels` is the devkit (its archive or folder), a text file of one synset a line, or Kaggle's LOC_val_solution.csv;
    None: one of these beside the pictures.
    """

    kind = "ilsvrc2012-val"

    def __init__(self, path: Path, labels: Path | None):
        self.truth = labels or find_truth(path.parent)
        found = [path] if path.is_file() else [p for p in path.iterdir() if _is_picture(p.name) and p.is_file()]
        super().__init__(path, sorted(found))

    def _read_index(self) -> tuple[Index, NDArray[np.int64], list[str] | None]:
        index = Index(self.files)
        if self.path.is_dir():
            for number, file in enumerate(self.files):
                index.add(number, 0, file.stat().st_size, file.name)
        else:
            for member in sorted(_members(self.path), key=lambda m: m.name):
                index.add(0, member.offset_data, member.size, member.name)
        synsets = read_truth(self.truth, [Path(name).stem for name in index.names])
        names = sorted(set(synsets))
        return index, _positions(synsets, names), names

    def signature(self) -> str:
        """Hash of the pictures' files and of the labels."""
        return fingerprint([*self.files, *([self.truth] if self.truth.is_file() else [])])


class TreeTarSource(EncodedSource):
    """A tar of an ImageFolder tree, as Imagenette is handed out: pictures in folders named after their classes.

    With `split`, those under a folder of that name, if there is one.
    """

    kind = "imagefolder-tar"

    def __init__(self, path: Path, file: Path, split: str | None):
        super().__init__(path, [file])
        self._split = split

    def _read_index(self) -> tuple[Index, NDArray[np.int64], list[str] | None]:
        pictures = sorted((m for m in _members(self.files[0]) if _is_picture(m.name)), key=lambda m: m.name)
        parts = {part for m in pictures for part in PurePosixPath(m.name).parts[:-2]}
        if self._split in parts:
            pictures = [m for m in pictures if self._split in PurePosixPath(m.name).parts[:-2]]
        elif self._split is None:
            refuse_both(self.path, parts & set(HALVES))
        index = Index(self.files)
        for member in pictures:
            index.add(0, member.offset_data, member.size, member.name)
        classes = [PurePosixPath(m.name).parent.name for m in pictures]
        names = sorted(set(classes))
        return index, _positions(classes, names), names

    def signature(self) -> str:
        """Hash of the file as it was given, and of the part that is read."""
        return hashlib.sha256(f"{fingerprint([self.path])} {self._split}".encode()).hexdigest()


def unpacked(path: Path) -> Path:
    """A compressed tar as a plain one, in this user's own temporary folder: pictures are read at known places.

    It is made once, and named after the file's size, beginning and end.
    """
    folder = private_folder()
    if folder is None:
        raise Mistake(f"{path}: no folder of your own to unpack it to; set TMPDIR to one where files can be made")
    plain = folder / f"{fingerprint([path])}.tar"
    if not plain.exists():
        logging.getLogger(__name__).info("unpacking %s to %s", path, plain)
        try:
            with (
                lzma.open(path) if path.suffix == ".xz" else gzip.open(path) as compressed,
                whole(plain) as partial,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(compressed, file, 1 << 22)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise Mistake(f"{path}: cannot be unpacked to {folder}: {one_line(error)}; TMPDIR sets where") from error
    return plain


class WebDatasetSource(EncodedSource):
    """WebDataset shards: `KEY.jpg` (or another picture) with `KEY.cls`, or with a `label` in `KEY.json`."""

    kind = "webdataset"

    def _read_index(self) -> tuple[Index, NDArray[np.int64], list[str] | None]:
        index, labels, hints = Index(self.files), [], []
        for file, shard in enumerate(self.files):
            for key, parts in _groups(shard):
                pictures = [m for m in parts.values() if _is_picture(m.name)]
                if not pictures:
                    continue
                label, hint = _read_label(shard, key, parts)
                index.add(file, pictures[0].offset_data, pictures[0].size, pictures[0].name)
                labels.append(label)
                hints.append(hint or key)
        return index, np.array(labels, dtype=np.int64), synsets_of(hints, labels)


def _members(path: Path, inside: tarfile.TarInfo | None = None) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, or of the tar that lies `inside` it, without holding what went before."""
    try:
        with tarfile.open(path, "r:") as tar:
            if inside is None:
                yield from _files(tar)
            else:
                with tarfile.open(fileobj=tar.extractfile(inside), mode="r:") as nested:
                    yield from _files(nested)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Mistake(f"{path}{f'/{inside.name}' if inside else ''}: {one_line(error)}") from error


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        # tarfile keeps every member it has passed: 1.3 million of them.
        tar.members = []  # type: ignore[attr-defined]
        if member.isfile():
            yield member


def _groups(shard: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """WebDataset's samples: neighbouring files whose names agree up to the first dot of the last part."""
    key, parts = "", dict[str, tarfile.TarInfo]()
    for member in _members(shard):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if parts and key != f"{folder}/{stem}":
            yield key, parts
            parts = {}
        key = f"{folder}/{stem}"
        parts[extension.lower()] = member
    if parts:
        yield key, parts


def _read_label(shard: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> tuple[int, str | None]:
    """The label of a WebDataset sample, and its original file name where that is told."""
    content = {}
    with open(shard, "rb") as file:
        for extension in ("cls", "json"):
            if extension in parts:
                content[extension] = os.pread(file.fileno(), parts[extension].size, parts[extension].offset_data)
    try:
        described = json.loads(content.get("json", b"{}"))
        label = int(content["cls"]) if "cls" in content else int(described["label"])
        return label, described.get("filename")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{shard}/{key}: no label in it") from error


def _positions(values: Sequence[str], ordered: Sequence[str]) -> NDArray[np.int64]:
    at = {value: i for i, value in enumerate(ordered)}
    return np.array([at[value] for value in values], dtype=np.int64)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)

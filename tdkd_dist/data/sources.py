"""Readers of what pictures come in: each gives its length, its labels and one picture at a time.

A source can be pickled: the writer's processes each open their own. Shapes: H x W x 3, uint8, RGB.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

FINGERPRINT = 1 << 20
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class Source(Protocol):
    """Labelled pictures in a fixed order."""

    kind: str
    path: Path
    lossless: bool
    """Its pictures are small and were never compressed: they are stored as they are."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """A name for each label, where the source has them."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]."""
        ...

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""
        ...

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]. Raises `ValueError`, naming it, when it cannot be decoded."""
        ...

    def signature(self) -> str:
        """A hash that changes when the source does; cheap, from names and sizes."""
        ...


def open_source(path: Path, split: str | None = None, labels: Path | None = None) -> Source:
    """The reader for whatever lies at `path`; `split` (train or val) says which part of a source that holds both.

    `labels` are the ground truth of pictures that carry none, see `archives.FlatSource`. Raises `ValueError` when
    nothing here can read it.
    """
    from tdkd_dist.data import archives, arrays

    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir() and split is not None and (path / split).is_dir():
        path = path / split
    for opener in (arrays.open_arrays, archives.open_archive):
        source = opener(path, split, labels)
        if source is not None:
            return source
    if path.is_dir():
        return FolderSource(path)
    raise ValueError(f"{path}: neither pictures in class folders, tar, parquet, idx nor CIFAR files")


def of_split(found: Sequence[Path], split: str | None, prefixes: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """Those of the `found` files whose names start as `split` demands; all of them when nothing is asked."""
    if split is None:
        return sorted(found)
    return sorted(p for p in found if p.name.startswith(prefixes[split]))


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in an ImageFolder tree, in the order of their labels."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []


def decode_image(data: bytes | Path, name: str) -> Image:
    """An encoded picture as RGB, [H, W, 3]; grey, palette and CMYK are converted. `ValueError` if it is broken."""
    import io

    from PIL import Image as Pillow

    try:
        with Pillow.open(data if isinstance(data, Path) else io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable picture: {one_line(error)}") from error


class FolderSource:
    """An ImageFolder tree: one folder a class, labelled in the sorted order of their names, as torchvision does."""

    kind = "imagefolder"
    lossless = False

    def __init__(self, root: Path):
        self.path = root
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder")
        self.class_names = class_folders(root)
        if not self.class_names:
            raise ValueError(f"{root}: no class folders in it")
        self._files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = _image_files(root / name)
            if not files:
                raise ValueError(f"{root / name}: no pictures in this class folder; remove it or fill it")
            self._files += [f"{name}/{file}" for file in files]
            labels += [label] * len(files)
        self._labels = np.array(labels, dtype=np.int64)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]."""
        return self._labels

    def name(self, index: int) -> str:
        """The picture's path."""
        return str(self.path / self._files[index])

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]."""
        path = self.path / self._files[index]
        return decode_image(path, str(path))

    def signature(self) -> str:
        """Hash of all relative paths and file sizes."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file}\0{os.stat(self.path / file).st_size}\n".encode())
        return digest.hexdigest()


def _image_files(folder: Path) -> list[str]:
    """Paths of the pictures under `folder`, relative to it, in torchvision's order."""
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        relative = os.path.relpath(parent, folder)
        found += [os.path.normpath(f"{relative}/{n}") for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)]
    return found


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the files' names, sizes, and of the first and the last MiB of each."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(FINGERPRINT))
            file.seek(max(0, size - FINGERPRINT))
            digest.update(file.read())
    return digest.hexdigest()

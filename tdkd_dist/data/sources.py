"""Readers of what pictures come in: each gives its length, its labels and one picture at a time.

A source can be pickled: the writer's processes each open their own. Shapes: H x W x 3, uint8, RGB.
"""

import gzip
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

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


def open_source(path: Path, split: str | None = None) -> Source:
    """The reader for `path`: an ImageFolder tree, an idx image file, or a folder of idx files (`split` train or val).

    Raises `ValueError` when it is none of these.
    """
    if path.is_dir():
        if any(_is_idx_images(entry.name) for entry in os.scandir(path)):
            return IdxSource(_find_idx(path, split))
        return FolderSource(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if _is_idx_images(path.name):
        return IdxSource(path)
    raise ValueError(f"{path}: not a source of pictures that this program knows")


def decode_image(data: bytes | Path, name: str) -> Image:
    """An encoded picture as RGB, [H, W, 3]; grey, palette and CMYK are converted. `ValueError` if it is broken."""
    import io

    from PIL import Image as Pillow

    try:
        with Pillow.open(data if isinstance(data, Path) else io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable picture: {_one_line(error)}") from error


class FolderSource:
    """An ImageFolder tree: one folder a class, labelled in the sorted order of their names, as torchvision does."""

    kind = "imagefolder"
    lossless = False

    def __init__(self, root: Path):
        self.path = root
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder")
        self.class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
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


class IdxSource:
    """An idx image file (MNIST's format, gzipped or not) with the label file beside it."""

    kind = "idx"
    class_names: Sequence[str] | None = None
    lossless = True

    def __init__(self, images: Path):
        self.path = images
        self.label_path = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
        if not self.label_path.is_file():
            raise ValueError(f"{images}: no label file {self.label_path.name} beside it")
        self._images = _read_idx(images, 3)
        self._labels = _read_idx(self.label_path, 1).astype(np.int64)
        if len(self._images) != len(self._labels):
            raise ValueError(f"{images}: {len(self._images)} pictures but {len(self._labels)} labels")

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]."""
        return self._labels

    def name(self, index: int) -> str:
        """The file and the position in it."""
        return f"{self.path}[{index}]"

    def read(self, index: int) -> Image:
        """Picture `index` with three equal channels, [H, W, 3]."""
        return np.repeat(self._images[index][:, :, None], 3, axis=2)

    def signature(self) -> str:
        """Hash of pictures and labels."""
        return hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()


def _image_files(folder: Path) -> list[str]:
    """Paths of the pictures under `folder`, relative to it, in torchvision's order."""
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        relative = os.path.relpath(parent, folder)
        found += [os.path.normpath(f"{relative}/{n}") for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)]
    return found


def _is_idx_images(name: str) -> bool:
    return "images-idx3" in name


def _find_idx(folder: Path, split: str | None) -> Path:
    prefix = {"train": "train", "val": "t10k", None: ""}[split]
    found = sorted(p for p in folder.iterdir() if _is_idx_images(p.name) and p.name.startswith(prefix))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        hint = "; say --split train or --split val" if split is None else ""
        raise ValueError(f"{folder}: expected one idx image file, found {names}{hint}")
    return found[0]


def _read_idx(path: Path, dimensions: int) -> Image:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path}: not an idx file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).astype(np.int64)
    if len(content) != head + shape.prod():
        raise ValueError(f"{path}: {len(content)} bytes, but its header promises {head + shape.prod()}")
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

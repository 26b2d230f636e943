"""ImageFolder trees: one folder of pictures a class."""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.source import IMAGE_SUFFIXES, Image, decode_image
from tdkd_dist.mistakes import Mistake


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in an ImageFolder tree, in the order of their labels."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []


class FolderSource:
    """An ImageFolder tree: one folder a class, labelled in the sorted order of their names, as torchvision does."""

    kind = "imagefolder"
    lossless = False

    def __init__(self, root: Path):
        self.path = root
        if not root.is_dir():
            raise Mistake(f"{root}: no such folder")
        self.class_names = class_folders(root)
        if not self.class_names:
            raise Mistake(f"{root}: no class folders in it")
        self._files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = _image_files(root / name)
            if not files:
                raise Mistake(f"{root / name}: no pictures in this class folder; remove it or fill it")
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

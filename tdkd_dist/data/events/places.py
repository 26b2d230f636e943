"""Where recordings lie: files in folders, or members of zips, which are read in place."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tdkd_dist.data.events.recording import MOST_BYTES, Broken
from tdkd_dist.data.sources.guarded import reading
from tdkd_dist.data.sources.source import read_regular

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
"""What folders of an official split are called: where there is no validation set, the test set is validated on."""


@dataclass(frozen=True)
class Place:
    """A file, or a member of a zip."""

    file: Path
    member: str | None
    inner: PurePosixPath
    """Its path below what was opened; a zip counts as a folder of its name."""
    size: int
    """Bytes, unpacked."""

    def __str__(self) -> str:
        return str(self.file) if self.member is None else f"{self.file}/{self.member}"

    @property
    def suffix(self) -> str:
        """In small letters, with its dot."""
        return self.inner.suffix.lower()

    @property
    def folder(self) -> str:
        """The name of the folder it lies in."""
        return self.inner.parent.name

    def part(self, depth: int) -> str | None:
        """`train` or `val` if a folder `depth` or more above the file is called so, or as `PARTS` says."""
        return next((PARTS[name.lower()] for name in self.inner.parts[:-depth] if name.lower() in PARTS), None)

    def content(self) -> bytes:
        """All of its bytes. Raises `Broken` for more than `MOST_BYTES`, `Mistake` for a pipe."""
        if self.size > MOST_BYTES:
            raise Broken(f"{self.size:,} bytes; at most {MOST_BYTES:,} are read")
        if self.member is None:
            return read_regular(self.file)
        with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as file:
            return file.read()  # no more than the size in the zip's directory, whatever the member unpacks to


def find_places(root: Path) -> list[Place]:
    """All files below the folder `root`, or in the zip `root`, and in zips among them, sorted by their paths."""
    if root.is_file():
        return sorted(_members(root, PurePosixPath(root.stem)), key=lambda place: place.inner)
    found = []
    for parent, _, names in os.walk(root, followlinks=True):
        for name in names:
            file = Path(parent, name)
            inner = PurePosixPath(file.relative_to(root).as_posix())
            if name.startswith("."):
                continue
            if inner.suffix.lower() == ".zip":
                found += _members(file, inner.with_suffix(""))
            else:
                found.append(Place(file, None, inner, os.stat(file).st_size))
    return sorted(found, key=lambda place: place.inner)


def _members(file: Path, inner: PurePosixPath) -> list[Place]:
    """The files of a zip, but for those that begin with a dot: macOS packs such beside each file."""
    with reading(file), zipfile.ZipFile(file) as archive:
        return [
            Place(file, info.filename, inner / info.filename, info.file_size)
            for info in archive.infolist()
            if not info.is_dir() and not PurePosixPath(info.filename).name.startswith(".")
        ]

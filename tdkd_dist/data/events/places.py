"""Where recordings lie: files in folders, or members of zips and tars, which are read in place."""

import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tdkd_dist.data.events.recording import MOST_BYTES, Broken
from tdkd_dist.data.sources.archives import unpacked
from tdkd_dist.data.sources.guarded import reading
from tdkd_dist.data.sources.source import read_regular

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
"""What folders of an official split are called: where there is no validation set, the test set is validated on."""


@dataclass(frozen=True)
class Place:
    """A file, or a member of an archive."""

    name: str
    """What to call it in a message."""
    file: Path
    inner: PurePosixPath
    """Its path below what was opened; an archive counts as a folder of its name."""
    size: int
    """Bytes, unpacked."""
    member: str | None = None
    """Its name in the zip `file`."""
    offset: int | None = None
    """Where in the tar `file` it begins."""

    def __str__(self) -> str:
        return self.name

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
        if self.member is not None:
            with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as member:
                return member.read()  # no more than the size in the zip's directory, whatever it unpacks to
        if self.offset is None:
            return read_regular(self.file)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise Broken("truncated with its archive")
        return content


def find_places(root: Path) -> list[Place]:
    """All files below the folder `root`, or in the archive `root`, and in archives among them, sorted by their paths.

    Those that begin with a dot are left out: macOS packs such beside each file.
    """
    if root.is_file():
        found = _members(root, PurePosixPath(_stem(root.name)))
    else:
        found = []
        for parent, _, names in os.walk(root, followlinks=True):
            folder = PurePosixPath(Path(parent).relative_to(root).as_posix())
            for name in names:
                file = Path(parent, name)
                if name.lower().endswith(ARCHIVES):
                    found += _members(file, folder / _stem(name))
                else:
                    found.append(Place(str(file), file, folder / name, os.stat(file).st_size))
    return sorted((p for p in found if not p.inner.name.startswith(".")), key=lambda place: place.inner)


def _stem(name: str) -> str:
    return next(name[: -len(suffix)] for suffix in ARCHIVES if name.lower().endswith(suffix))


def _members(file: Path, inner: PurePosixPath) -> list[Place]:
    """The files in an archive. A compressed tar is unpacked to a plain one, see `unpacked`."""
    with reading(file):
        if file.suffix.lower() == ".zip":
            with zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
            return [Place(f"{file}/{i.filename}", file, inner / i.filename, i.file_size, i.filename) for i in infos]
        plain = file if file.suffix.lower() == ".tar" else unpacked(file)
        with tarfile.open(plain, "r:") as tar:
            members = [member for member in tar if member.isfile() and not member.issparse()]
        return [Place(f"{file}/{m.name}", plain, inner / m.name, m.size, offset=m.offset_data) for m in members]

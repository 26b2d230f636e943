"""What a source of pictures or frames is: its labels and one sample at a time; and what every form shares.

A source can be pickled: the writer's processes each open their own. Shapes of pictures: H x W x 3, uint8, RGB.
"""

import hashlib
import os
import stat
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.mistakes import Mistake

Image = NDArray[np.uint8]

FINGERPRINT = 1 << 20
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
"""What is decoded, whatever a picture's name: Pillow would hand others, such as EPS, to another program."""
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class Labelled(Protocol):
    """Labelled samples in a fixed order: what sources of pictures and of frames have in common."""

    kind: str
    path: Path

    @property
    def class_names(self) -> Sequence[str] | None:
        """A name for each label, where the source has them."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every sample, [N]."""
        ...

    def name(self, index: int) -> str:
        """What to call sample `index` in a message."""
        ...

    def signature(self) -> str:
        """A hash that changes when the source does; cheap, from names and sizes."""
        ...


class Source(Labelled, Protocol):
    """Labelled pictures."""

    lossless: bool
    """Its pictures are small and were never compressed: they are stored as they are."""

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]. Raises `Mistake`, naming it, when it cannot be decoded."""
        ...


class FrameSource(Labelled):
    """Labelled frames of event recordings. A base class and no protocol: the writer asks whether a source is one."""

    shape: tuple[int, int, int, int]
    """Of a sample: frames, polarities, height, width."""
    about: dict[str, Any]
    """How recordings became frames, and which of them are here: what the manifest says of it."""

    @abstractmethod
    def read(self, index: int) -> NDArray[Any]:
        """The counts of recording `index`, integers of `shape`. Raises `Mistake`, naming it, when it can't be read."""


def of_split(found: Sequence[Path], split: str | None, prefixes: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """Those of the `found` files whose names start as `split` demands; all of them when nothing is asked."""
    if split is None:
        return sorted(found)
    return sorted(p for p in found if p.name.startswith(prefixes[split]))


def read_regular(path: Path) -> bytes:
    """A file's content. Raises `Mistake` for a pipe, which would be waited for, a device or a folder."""
    # Not to block in opening a pipe that nobody writes to.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Mistake(f"{path}: no regular file; remove it")
        return file.read()


def decode_image(data: bytes | Path, name: str) -> Image:
    """An encoded picture as RGB, [H, W, 3]; grey, palette and CMYK are converted. `Mistake` if it is broken."""
    import io

    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        content = read_regular(data) if isinstance(data, Path) else data
        with Pillow.open(io.BytesIO(content), formats=FORMATS) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        what = "of no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise Mistake(f"{name}: not a readable picture: {what}") from error


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

"""What is known about a beton: its manifest, `FILE.json` beside it, and whether the file agrees with it.

The manifest holds a hash of everything in the file that is not a picture, and that everything includes a checksum of
each picture. A file without a manifest, as ffcv-imagenet writes it, is welcome; it can only be checked for being whole.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tdkd_dist.data.beton.layout import Tables, read_tables
from tdkd_dist.files import write_json
from tdkd_dist.mistakes import Mistake, Mistakes


@dataclass(frozen=True)
class WriteOptions:
    """How pictures are stored; the defaults are those of ffcv-imagenet's ResNet-50 files."""

    max_side: int = 500
    """Larger pictures are shrunk so that their longer side is this; 0: never."""
    jpeg_share: float = 0.5
    """Share of the pictures stored as JPEG, the rest as raw pixels: less to read against less to decode."""
    quality: int = 90
    subset: float | None = None
    """Only so many pictures (1 or more) or this share of them (less than 1), spread evenly over the classes."""
    on_error: str = "stop"
    """At a picture that cannot be read: `stop`, or `skip` and list it in the manifest."""
    holdout: int = 0
    """So many pictures, spread evenly over the classes, are set apart: they are not in this file."""
    heldout: bool = False
    """This file holds those that are set apart, and no others."""

    def __post_init__(self) -> None:
        checks = {
            f"--max-side {self.max_side}: must be at least 1, or 0 for no limit": self.max_side >= 0,
            f"--jpeg-share {self.jpeg_share}: must be in [0, 1]": 0 <= self.jpeg_share <= 1,
            f"--quality {self.quality}: must be in 1 to 100": 1 <= self.quality <= 100,
            f"--subset {self.subset}: must be a number of pictures, or a share between 0 and 1": self.subset is None
            or 0 < self.subset < 1
            or (math.isfinite(self.subset) and self.subset == int(self.subset) > 0),
            f"--holdout {self.holdout}: must be at least 1, or 0 for none": self.holdout >= 0,
            f"--on-error {self.on_error}: must be stop or skip": self.on_error in ("stop", "skip"),
        }
        found = Mistakes()
        for message, holds in checks.items():
            found.require(holds, message)
        found.tell()


@dataclass(frozen=True)
class Manifest:
    """What a beton holds and where it came from."""

    source_kind: str
    source: str
    source_signature: str
    options: WriteOptions
    num_samples: int
    num_classes: int
    class_names: list[str] | None
    class_histogram: list[int]
    mean: list[float]
    """Of the pixels as stored, in [0, 1], or of the counts of events, for each channel."""
    std: list[float]
    file_size: int
    tables_sha256: str
    """Of the header, descriptors, sample table, checksums and allocation table."""
    skipped: list[str] = field(default_factory=list)
    frames: dict[str, Any] | None = None
    """Of event recordings: how they became frames, and which of the source's are here."""


@dataclass(frozen=True)
class BetonInfo:
    """What `check_beton` found."""

    path: Path
    num_samples: int
    manifest: Manifest | None
    signature: str
    """Of the labels, the checksums of the samples and their order."""
    largest_label: int
    frames: tuple[int, int, int, int] | None = None
    """Frames, polarities, height and width of a sample; None: it holds pictures."""

    @property
    def class_names(self) -> list[str] | None:
        """From the manifest, in the order of the labels; None where it is not known."""
        return self.manifest.class_names if self.manifest else None

    @property
    def num_classes(self) -> int | None:
        """From the manifest; None without one."""
        return self.manifest.num_classes if self.manifest else None


def manifest_path(path: Path) -> Path:
    """Where the manifest of the beton `path` lies."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path | str) -> Manifest | None:
    """The manifest beside the beton `path`, None if there is none. Raises `Mistake` if it is not one."""
    where = manifest_path(Path(path))
    try:
        content = json.loads(where.read_text())
        options = WriteOptions(**content.pop("options"))
        return Manifest(options=options, **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Mistake(f"{where}: not a manifest that write_beton wrote ({error})") from error


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest beside the beton `path`, whole or not at all."""
    write_json(manifest_path(path), asdict(manifest))


def check_beton(path: Path | str, key: str) -> BetonInfo:
    """Check that `path`, the value of the configuration's `key`, is a whole beton; the pictures are not read.

    Raises `Mistake` starting with `key=path: ` for a file that is missing, truncated or no beton, for fields other
    than `image` and `label`, and for tables that contradict each other or the manifest.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise Mistake("a folder, not an FFCV file (for an ImageFolder tree say data.format=imagefolder)")
        tables = read_tables(path)
        manifest = read_manifest(path)
        if manifest is not None:
            compare(manifest, tables, path.stat().st_size)
    except FileNotFoundError as error:
        raise Mistake(f"{key}={path}: no such file; tools/write_beton.py writes it") from error
    except OSError as error:
        raise Mistake(f"{key}={path}: {error.strerror}") from error
    except Mistake as error:
        raise Mistake(f"{key}={path}: {error}") from error
    frames, largest = tables.frames, int(tables.samples["label"].max())
    return BetonInfo(path, len(tables.samples), manifest, tables.sha256(), largest, frames.shape if frames else None)


def compare(manifest: Manifest, tables: Tables, size: int) -> None:
    """Raise `Mistake` if the file with these tables and this size is not the one the manifest describes."""
    if manifest.file_size != size:
        raise Mistake(f"{size} bytes, but its manifest says {manifest.file_size}: truncated or replaced")
    if manifest.num_samples != len(tables.samples):
        raise Mistake(f"{len(tables.samples)} samples, but its manifest says {manifest.num_samples}")
    if manifest.tables_sha256 != tables.sha256():
        raise Mistake("its tables differ from what its manifest says: corrupt or replaced")
    largest = int(tables.samples["label"].max())
    if largest >= manifest.num_classes:
        raise Mistake(f"its largest label is {largest}, but its manifest says {manifest.num_classes} classes")

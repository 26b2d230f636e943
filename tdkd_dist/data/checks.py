"""Checks of a data set that need more than its own file: the other set, the teacher, the machine's memory."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tdkd_dist.config import DataConfig
from tdkd_dist.data.beton.manifest import BetonInfo, read_manifest
from tdkd_dist.data.sources.classes import check_order
from tdkd_dist.data.sources.folder import class_folders
from tdkd_dist.data.sources.source import Source
from tdkd_dist.mistakes import Mistake

logger = logging.getLogger(__name__)


def check_classes(data: DataConfig, key: str, opened: BetonInfo | Source) -> None:
    """The classes of `data.train` or `data.val` must be numbered as the teacher's are, and alike in both sets.

    Raises `Mistake` starting with `key=path: `. A wrong order trains quietly; a class that one set lacks shifts the
    labels of all after it. A beton without a manifest is taken on trust, with a warning.
    """
    compare_classes(data, key, opened)
    if isinstance(opened, BetonInfo) and opened.manifest is None:
        where = f"{key}={opened.path}"
        logger.warning("%s has no manifest: its classes are taken on trust, the teacher's accuracy must tell", where)


def compare_classes(data: DataConfig, key: str, opened: BetonInfo | Source) -> None:
    """The same, and nothing is said of what is taken on trust."""
    where = f"{key}={opened.path}"
    names = opened.class_names
    check_order(names, where)
    if key == "data.val" and data.train is not None and Path(data.train).exists() and names is not None:
        other = _class_names(data.train, data.format)
        if other is not None and list(other) != list(names):
            raise Mistake(f"{where}: {_difference(other, names)}, unlike data.train's")


def check_frames(data: DataConfig, key: str, info: BetonInfo, channels: int | None = None) -> None:
    """A beton of pictures or of frames, as the configuration says, and enough of them; `Mistake` if not.

    `channels`: `student.in_chans`, if that is to be checked as well.
    """
    where = f"{key}={info.path}"
    if info.frames is None:
        if data.frames is not None:
            raise Mistake(f"{where}: holds pictures; set data.frames=null, or write one of event recordings")
        return
    stored, polarities, height, width = info.frames
    if data.frames is None:
        raise Mistake(f"{where}: holds {stored} frames a sample; set data.frames={stored}, or fewer")
    if data.frames > stored:
        raise Mistake(f"{where}: holds {stored} frames a sample, fewer than data.frames={data.frames}")
    if channels not in (None, polarities):
        raise Mistake(f"student.in_chans={channels}: the frames of {where} have {polarities} polarities")
    if height != width:
        logger.info("%s: frames of %d x %d pixels are stretched to a square", where, height, width)


def say_where_it_is_cached(key: str, path: Path) -> None:
    """Log whether the page cache can hold the file; all ranks of a node share it.

    FFCV's own process cache is no help here: in a random order it ends up holding every page, once in each rank.
    """
    size = path.stat().st_size / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if size > 0.8 * memory:
        text = "%s=%s: %.1f GB do not fit %.0f GB of memory: read from disk, at random places, in every epoch"
        logger.warning(text, key, path, size, memory)
    else:
        logger.info("%s=%s: %.1f GB fit %.0f GB of memory: read from disk once", key, path, size, memory)


def _class_names(path: str, format: str) -> Sequence[str] | None:
    if format == "imagefolder":
        train = Path(path) / "train"
        return class_folders(train if train.is_dir() else Path(path)) or None
    manifest = read_manifest(path)
    return manifest.class_names if manifest else None


def _difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """Where two lists of class names part, in a few words."""
    if len(expected) != len(found):
        odd = sorted(set(expected) ^ set(found))
        return f"{len(found)} classes, not {len(expected)}" + (f" (see {odd[0]})" if odd else "")
    at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    return f"class {at} is {found[at]}, not {expected[at]}"

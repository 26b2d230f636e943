"""Reads a beton from end to end and names what is wrong with it."""

import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tdkd_dist.data.beton.layout import MODE_JPEG, Tables, read_tables
from tdkd_dist.data.beton.manifest import BetonInfo, check_beton
from tdkd_dist.data.sources.source import decode_image
from tdkd_dist.mistakes import Mistake

CHUNK = 256


def verify(
    path: Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> tuple[BetonInfo, list[str]]:
    """What the beton holds, and one line for each sample that is broken.

    Every picture is decoded, and with a manifest also compared with the checksum it was written with. Raises
    `Mistake` for a file that is broken as a whole, as `check_beton` does.
    """
    info = check_beton(path, "--verify")
    classes = None if info.manifest is None else info.manifest.num_classes
    problems: list[str] = []
    try:
        with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(path, classes)) as pool:
            for step, lines in enumerate(pool.map(_check_chunk, range(0, info.num_samples, CHUNK)), start=1):
                problems += lines
                if progress is not None:
                    progress(min(step * CHUNK, info.num_samples), info.num_samples)
    except BrokenProcessPool as error:
        raise Mistake("a process that decodes pictures was killed; is there memory for --workers?") from error
    return info, problems


_worker: tuple[Path, Tables, int | None]


def _start_worker(path: Path, classes: int | None) -> None:
    global _worker
    _worker = path, read_tables(path), classes


def _check_chunk(start: int) -> list[str]:
    path, tables, classes = _worker
    problems = []
    with open(path, "rb") as file:
        for index in range(start, min(start + CHUNK, len(tables.samples))):
            ptr, size = tables.place(index)
            file.seek(ptr)
            problem = _find_problem(tables, index, file.read(size), classes)
            if problem is not None:
                problems.append(f"sample {index}: {problem}")
    return problems


def _find_problem(tables: Tables, index: int, data: bytes, classes: int | None) -> str | None:
    """What is wrong with a sample; `classes` is None without a manifest, hence without checksums."""
    label = int(tables.samples[index]["label"])
    if classes is not None and zlib.crc32(data) != tables.checksums[index]:
        return "its checksum differs: its bytes have changed since they were written"
    if classes is not None and label >= classes:
        return f"its label is {label}, of {classes} classes"
    if tables.frames is not None:
        return None
    picture = tables.samples[index]["image"]
    if picture["mode"] == MODE_JPEG:
        try:
            pixels = decode_image(data, "its JPEG")
        except Mistake as error:
            return str(error)
        if pixels.shape[:2] != (picture["height"], picture["width"]):
            return f"its JPEG has {pixels.shape[:2]} pixels, not {(int(picture['height']), int(picture['width']))}"
    return None

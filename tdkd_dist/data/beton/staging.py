"""Copies of betons on a node's own disk: a shared file system is slow at random places, and every epoch has them."""

import fcntl
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tdkd_dist.data.beton.manifest import manifest_path
from tdkd_dist.data.sources.source import fingerprint
from tdkd_dist.files import whole
from tdkd_dist.mistakes import Mistake

logger = logging.getLogger(__name__)
CHUNK = 1 << 24
SAY_EVERY = 10.0
"""Seconds between lines of progress."""


def staged(path: Path, folder: str, beat: Callable[[], None] = lambda: None) -> Path:
    """The copy of the beton `path` in `folder` (in which environment variables are expanded).

    The first process on a node copies it and compares checksums; the others wait for it. A copy that is already there
    is used. `beat` is called all the while: the copy of ImageNet may take longer than a rank may stand still. Raises
    `Mistake` starting with `data.stage_to=` if it cannot be made.
    """
    where = Path(os.path.expandvars(folder))
    # Betons of the same name may come from different folders.
    dest = where / f"{path.stem}-{fingerprint([path])[:12]}{path.suffix}"
    try:
        where.mkdir(parents=True, exist_ok=True)
        with _alone(dest.with_name(f".{dest.name}.lock"), beat):
            if not dest.exists():
                _copy(path, dest, beat)
    except OSError as error:
        raise Mistake(f"data.stage_to={where}: {error.strerror or error}") from error
    return dest


def _copy(path: Path, dest: Path, beat: Callable[[], None]) -> None:
    size, free = path.stat().st_size, shutil.disk_usage(dest.parent).free
    if size > free:
        raise Mistake(f"data.stage_to={dest.parent}: {free / 1e9:.1f} GB free, {path} has {size / 1e9:.1f} GB")
    start = said = time.monotonic()
    checksum = done = 0
    with whole(dest) as partial:
        with open(path, "rb") as source, open(partial, "wb") as copy:
            while chunk := source.read(CHUNK):
                copy.write(chunk)
                checksum, done = zlib.crc32(chunk, checksum), done + len(chunk)
                beat()
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    rate = done / (said - start)
                    left = (size - done) / rate
                    text = "copying %s: %.1f of %.1f GB, %.2f GB/s, %.0f s left"
                    logger.info(text, path, done / 1e9, size / 1e9, rate / 1e9, left)
            os.fsync(copy.fileno())
        if _checksum(partial, beat) != checksum:
            raise Mistake(f"data.stage_to={dest.parent}: the copy of {path} differs from it: is the disk sound?")
        if manifest_path(path).exists():
            shutil.copyfile(manifest_path(path), manifest_path(dest))
    logger.info("copied %s to %s in %.0f s", path, dest, time.monotonic() - start)


def _checksum(path: Path, beat: Callable[[], None]) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
            beat()
    return checksum


@contextmanager
def _alone(lock: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Hold the lock; the kernel frees it when its holder dies, so nobody waits for a process that is gone."""
    with open(lock, "w") as file:
        while True:
            beat()
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        yield

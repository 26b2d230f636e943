"""A file stands under its name whole or not at all."""

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tdkd_dist.mistakes import Mistake


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` when the block ends, and vanishes if that raises."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        # Made here and now, not through a link that somebody else has put in its place.
        with open(partial, "xb", opener=_not_through_a_link) as stream:
            mode = os.fstat(stream.fileno()).st_mode
        yield partial
        partial.chmod(mode)  # safetensors' files are for their owner alone
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def append_text(path: Path, text: str) -> bool:
    """Append all of `text`, or nothing: on a full disk what was written of it is taken back, and False returned.

    Raises `Mistake` if `path` is a symbolic link.
    """
    size: int | None = None
    try:
        with open(path, "a", encoding="utf-8", opener=_not_through_a_link) as stream:
            size = stream.tell()
            stream.write(text)
    except OSError:
        if size is not None:
            with suppress(OSError):
                os.truncate(path, size)
        return False
    return True


def private_folder() -> Path | None:
    """This user's own folder on the node's own disk; None if it can't be made, or somebody else made it."""
    folder = Path(tempfile.gettempdir()) / f"tdkd-dist-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() else None


def cut(path: Path, size: int) -> None:
    """Leave the first `size` bytes of a file. Raises `Mistake` if `path` is a symbolic link."""
    with open(path, "r+b", opener=_not_through_a_link) as stream:
        stream.truncate(size)


def _not_through_a_link(path: str, flags: int) -> int:
    """An opener for `open`."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Mistake(f"{path}: a symbolic link, which is not written through; remove it") from error
        raise

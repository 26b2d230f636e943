"""Reads files of a run folder, which others may have damaged: they are as a run writes them, or refused in a line."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

from tdkd_dist.mistakes import Mistake, require

MOST_BYTES = 2**26
"""More than any JSON file of a run has."""
LONGEST_LINE = 2**20
"""Longer ones are none of ours."""
MOST_DIGITS = 18
"""Of an integer: larger ones are none of ours, and fit no float."""


def is_there(path: Path) -> bool:
    """Whether `path` is a file. Raises `Mistake` if that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:
        raise Mistake(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, to be read and for nothing else.

    Raises `FileNotFoundError` if it isn't there, `Mistake` if it can't be read or is a folder, a device, a pipe.
    """
    try:
        # Before it is opened: that of a pipe waits for somebody to write.
        require(stat.S_ISREG(path.stat().st_mode), f"{path}: a file belongs here; move away what there is")
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Mistake(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path, **types: type | UnionType) -> dict[str, Any] | None:
    """The JSON mapping in `path`, with all keys of `types`; None if that isn't there.

    Raises `Mistake` if it is no mapping, or one in which a key of `types` is not of its type.
    """
    try:
        with opened(path) as stream:
            found = parse_mapping(stream.read(min(MOST_BYTES, os.fstat(stream.fileno()).st_size)))
    except FileNotFoundError:
        return None
    wrong = [key for key, wanted in types.items() if found is not None and not isinstance(found.get(key), wanted)]
    if found is None or wrong:
        what = f"its {', '.join(wrong)} cannot be" if wrong else "no JSON mapping"
        raise Mistake(f"{path}: not as a run writes it ({what}); delete it, or bring back what was there")
    return dict.fromkeys(types) | found


def iter_mappings(path: Path, *keys: str, backward: bool = False) -> Iterator[dict[str, Any]]:
    """The mappings in a file of JSON lines that have all `keys`, from its start or `backward` from its end.

    Other lines, such as one that a crash cut short, are left out. None if the file isn't there.
    """
    quoted = [json.dumps(key).encode() for key in keys]
    try:
        with opened(path) as stream:
            lines = (line for _, line in lines_from_end(stream)) if backward else _lines(stream)
            for line in lines:
                # Parsing is what takes time.
                found = parse_mapping(line) if all(key in line for key in quoted) else None
                if found is not None and all(key in found for key in keys):
                    yield found
    except FileNotFoundError:
        return


def lines_from_end(stream: BinaryIO, block: int = 2**20) -> Iterator[tuple[int, bytes]]:
    """Where a line starts, and the line without its end: what follows the last line end first, and so on to the start.

    Of a line longer than `LONGEST_LINE`, only a part.
    """
    start, rest = stream.seek(0, os.SEEK_END), b""
    while start:
        end, start = start, max(0, start - block)
        stream.seek(start)
        first, *lines = (stream.read(end - start) + rest).split(b"\n")
        at, found = start + len(first) + 1, []
        for line in lines:
            found.append((at, line))
            at += len(line) + 1
        yield from reversed(found)
        rest = first if len(first) <= LONGEST_LINE else b""
    yield 0, rest


def parse_mapping(text: bytes) -> dict[str, Any] | None:
    """The mapping that `text` is in JSON, or None."""
    try:
        found = _DECODER.decode(text.decode())
    except (ValueError, RecursionError):  # cut short, not UTF-8, an endless number, nested without end
        return None
    return found if isinstance(found, dict) else None


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(digits)
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    return iter(partial(stream.readline, LONGEST_LINE), b"")

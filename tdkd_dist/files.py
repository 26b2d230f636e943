"""A file stands under its name whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` when the block ends, and vanishes if that raises."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
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
    """Append all of `text`, or nothing: on a full disk what was written of it is taken back, and False returned."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        return False
    return True

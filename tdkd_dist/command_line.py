"""What the command lines share."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tdkd_dist.mistakes import Mistake, require

MOST_TIMESTEPS = 1024
"""As `student.num_timesteps`; the configuration is above this."""


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line, and the description shown as it is written."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise the `Mistake` that `run_tool` prints."""
        raise Mistake(message)


def run_tool(action: Callable[[], int | None], name: str = "error") -> int:
    """Do `action`; its exit status, 0 if it gives none, or 2 for a `Mistake`, told line by line after `name`.

    130 after Ctrl-C, as a shell has it; 0 where nobody reads on, as after `| head`.
    """
    try:
        status = action() or 0
        sys.stdout.flush()
        return status
    except SystemExit as end:  # argparse's, after --help; or with what went wrong, as text
        if isinstance(end.code, str):
            print(f"{name}: {end.code}", file=sys.stderr)
        return 1 if isinstance(end.code, str) else int(end.code or 0)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its exit
        return 0
    except Mistake as mistake:
        for line in mistake.lines:
            print(f"{name}: {line}", file=sys.stderr)
        return 2


def check_output(path: Path, option: str) -> None:
    """Raise `Mistake`, before the work, unless a file can be written at `path`, the value of `option`."""
    require(not path.is_dir(), f"{option} {path}: a folder; name a file")
    require(path.parent.is_dir(), f"{option} {path}: no folder {path.parent}; create it")
    require(os.access(path.parent, os.W_OK), f"{option} {path}: {path.parent} cannot be written to; choose another")


def check_input(path: Path | None) -> None:
    """Raise `Mistake`, before the work, unless a file or a folder is there, or none was asked for."""
    require(path is None or path.exists(), f"{path}: no such file or folder")


def check_timesteps(timesteps: int | None) -> None:
    """Raise `Mistake` unless `--timesteps` is what `student.num_timesteps` may be."""
    fits = timesteps is None or 1 <= timesteps <= MOST_TIMESTEPS
    require(fits, f"--timesteps {timesteps}: must be in 1 to {MOST_TIMESTEPS:,}")


def publish(table: str, file: Path | None) -> None:
    """Print a Markdown table, and append it to the file if there is one."""
    print(table)
    if file is not None:
        with file.open("a") as stream:
            stream.write(table + "\n")


def cut_page(page: Path, begin: str, end: str) -> tuple[str, str, str]:
    """A page's text up to the mark `begin`, between it and the mark `end`, and from that on: a part that tools write.

    Raises `Mistake` if there is no such page, or if the marks are not in it in this order.
    """
    require(page.is_file(), f"{page}: no such file")
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    between, closed, after = rest.partition(end)
    require(bool(found and closed), f"{page}: no mark {begin.strip()} with a mark {end} after it")
    return before + begin, between, end + after

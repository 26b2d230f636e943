"""What the command lines share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tdkd_dist.mistakes import Mistake, require


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line, and the description shown as it is written."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise the `Mistake` that `run_tool` prints."""
        raise Mistake(message)


def run_tool(action: Callable[[], int | None], name: str = "error") -> int:
    """Do `action`; its exit status, 0 if it gives none, or 2 for a `Mistake`, told line by line after `name`."""
    try:
        return action() or 0
    except SystemExit as end:  # argparse's, after --help
        return int(end.code or 0)
    except Mistake as mistake:
        for line in mistake.lines:
            print(f"{name}: {line}", file=sys.stderr)
        return 2


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

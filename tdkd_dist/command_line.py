"""What the command lines in `tools/` share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the `ValueError` that `run_tool` prints."""
        raise ValueError(message)


def run_tool(action: Callable[[], None], name: str = "error") -> int:
    """Do `action`; the exit status: 0, or 2 for a user's mistake (`ValueError`), told in one line after `name`."""
    try:
        action()
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def publish(table: str, file: Path | None) -> None:
    """Print a Markdown table, and append it to the file if there is one."""
    print(table)
    if file is not None:
        with file.open("a") as stream:
            stream.write(table + "\n")

"""What the command lines in `tools/` share."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the `ValueError` that the tool's `main` prints."""
        raise ValueError(message)

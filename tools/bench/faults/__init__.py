"""Generators of hostile input: each module's `AREAS` maps an area's name to a function that tries one case.

A case draws from the generator it is given, writes what it needs into an empty folder, and reads it with the
project's own reader. It may return, or raise `Mistake` with one line for each thing that is wrong; all else is a fault.
"""

import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

Case = Callable[[random.Random, Path], None]
MODULES = ("settings", "data", "weights", "runs")


def areas() -> dict[str, Case]:
    """Every area, by name."""
    found: dict[str, Case] = {}
    for name in MODULES:
        found |= import_module(f"faults.{name}").AREAS
    return found

"""What the benchmarks check of their command lines, before any work is done."""

import argparse

import torch

from tdkd_dist.command_line import check_output
from tdkd_dist.mistakes import require


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raise `Mistake` unless each of these options is at least 1, or was left out."""
    for name in names:
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name} {value}: must be at least 1")


def check_outputs(options: argparse.Namespace, *names: str) -> None:
    """Raise `Mistake` unless a file can be written where each of these options says, if it says anything."""
    for name in names:
        path = getattr(options, name)
        if path is not None:
            check_output(path, f"--{name}")


def check_device(device: str) -> None:
    """Raise `Mistake` for `cuda` where no GPU is."""
    require(device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU here")

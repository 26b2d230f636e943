"""Runs a function as the ranks of one gloo job, each in a process of its own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from tdkd_dist import distributed


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
    """Call `function(rank, world_size, *arguments)` on every rank, inside the project's process group."""
    task = (world_size, distributed.free_port(), function, arguments)
    mp.start_processes(_rank, task, nprocs=world_size, start_method="spawn")


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.start_here(rank, world_size, port, torch.device("cpu"))
    try:
        function(rank, world_size, *arguments)
    finally:
        distributed.stop()

"""Runs a function as the ranks of one gloo job, each in a process of its own; or as one rank without the others."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.distributed.fake_pg import FakeStore

from tdkd_dist import distributed


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
    """Call `function(rank, world_size, *arguments)` on every rank, inside the project's process group."""
    task = (world_size, distributed.free_port(), function, arguments)
    mp.start_processes(_rank, task, nprocs=world_size, start_method="spawn")


def run_without_peers(function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
    """Call `function(0, world_size, *arguments)` in a process whose collectives do nothing: for what is counted."""
    mp.start_processes(_alone, (world_size, function, arguments), nprocs=1, start_method="spawn")


def _alone(rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.start_here(rank, world_size, port, torch.device("cpu"))
    try:
        function(rank, world_size, *arguments)
    finally:
        distributed.stop()

"""Runs a function as the ranks of one gloo job, each in a process of its own."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
    """Call `function(rank, world_size, *arguments)` on every rank, inside the project's process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, (world_size, port, function, arguments), nprocs=world_size, start_method="spawn")


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from tdkd_dist import distributed

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    try:
        function(rank, world_size, *arguments)
    finally:
        distributed.stop()

"""Facts about this process's rank, and exact sums across ranks. Everything also works in a single process."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
"""The longest that a collective waits for a rank that doesn't come, where no heartbeat watches over it."""
PATIENCE = timedelta(days=7)
"""The same of the control group, in which ranks also wait for one that copies its data: the heartbeat ends a hang."""


# Flags, names and barriers travel over gloo, so that agreeing on them never waits for the GPU's queue of work.
_control: dist.ProcessGroup | None = None
_replaced: dict[str, str | None] = {}
"""What `start_here` replaced in the environment."""


def start(device: torch.device, timeout: timedelta = TIMEOUT) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: nccl on a GPU, else gloo.

    `timeout` bounds every collective; longer than the heartbeat's, or else a hang ends before the laggard is named.
    """
    global _control
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    _control = group


def start_here(rank: int, world_size: int, port: int, device: torch.device, *, timeout: timedelta = TIMEOUT) -> None:
    """Join a process group whose ranks are all on this machine, without a launcher: for tests and benchmarks.

    `stop` puts the environment back: a run launched later from this process would take the group's port for its own.
    """
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    ours = {name: str(value) for name, value in facts.items()}
    ours |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    _replaced.update({name: os.environ.get(name) for name in ours})
    os.environ |= ours
    start(device, timeout)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def stop() -> None:
    """Leave the process group, if there is one."""
    global _control
    if dist.is_initialized():
        dist.destroy_process_group()
    _control = None
    for name, value in _replaced.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _replaced.clear()


def rank() -> int:
    """This process's number, 0 for a process on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 for a process on its own."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of every rank's `values` (counts in int64 or float64 stay exact)."""
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """For each flag, true on all ranks if it is set on one; every rank must call it."""
    if world_size() == 1:
        return flags
    values = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_control)
    return tuple(bool(value) for value in values.tolist())


def from_every_rank(value: Any) -> list[Any]:
    """Every rank's (picklable, small) value, in order of rank, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def from_rank_0(value: str | None) -> str | None:
    """Rank 0's string on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def cores_per_rank() -> int:
    """How many cores this rank has to itself, at least 1; every rank must call it.

    Where Slurm binds its tasks, a rank's affinity is its own share already; elsewhere all ranks of a machine see the
    same cores. So a core counts as one, divided by the ranks of its machine that may use it. Slurm's allocation
    bounds it too: without a task plugin the affinity shows a whole node to a job that was given a few of its cores.
    """
    mine = os.sched_getaffinity(0)
    neighbours = [cores for machine, cores in from_every_rank((_machine(), mine)) if machine == _machine()]
    share = sum(1 / sum(core in cores for cores in neighbours) for core in mine)
    given = int(os.environ.get("SLURM_CPUS_ON_NODE", len(mine) * len(neighbours)))
    return max(1, min(int(share + 1e-6), given // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _machine() -> str:
    """What ranks on one machine have in common: containers may all have the same host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier(group=_control)


def meet(beat: Callable[[], None]) -> None:
    """Wait for every rank, however long it takes; `beat` is called meanwhile, a sign that this one is well."""
    if world_size() == 1:
        return
    arrived = dist.barrier(group=_control, async_op=True)
    assert arrived is not None
    while not arrived.is_completed():
        beat()
        time.sleep(0.05)
    arrived.wait()

"""How many cores a rank takes for its own, where Slurm binds tasks and where nobody does."""

import os

from ranks import run_ranks

from tdkd_dist import distributed

CASES = [
    # cores that each rank may use, the machine it is on, its share
    ([{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}], "aaa", [4, 4, 2]),  # bound
    ([set(range(9))] * 3, "aaa", [3, 3, 3]),  # not bound
    ([set(range(8))] * 3, "aab", [4, 4, 8]),  # two machines
    ([{0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}, {0}], "aaa", [1, 3, 1]),  # overlapping
]


def expect(rank: int, world_size: int) -> None:
    os.environ.pop("SLURM_CPUS_ON_NODE", None)
    for cores, machines, shares in CASES:
        # What the kernel would say on a machine with more cores than CI's have.
        os.sched_getaffinity = lambda pid, own=cores[rank]: own
        distributed._machine = lambda own=machines[rank]: own
        assert distributed.cores_per_rank() == shares[rank], (cores, machines)


def test_ranks_share_the_cores_that_they_have_in_common():
    run_ranks(expect, 3)


def test_a_process_on_its_own_has_all_that_it_may_use(monkeypatch):
    for variable in ("SLURM_CPUS_ON_NODE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    cores = os.sched_getaffinity(0)
    assert distributed.cores_per_rank() == len(cores)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert distributed.cores_per_rank() == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_slurms_allocation_bounds_what_an_unbound_task_takes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.cores_per_rank() == 8

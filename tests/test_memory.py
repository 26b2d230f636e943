"""Freed memory stays with the process: no page is faulted in twice."""

import subprocess
import sys

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from tdkd_dist.memory import keep_freed_memory
    assert keep_freed_memory()
def work():
    x = [torch.ones(2_400_000 // 4) for _ in range(4)]
    return [a + 1 for a in x]
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Page faults of twenty rounds of tensors of 2.4 MB, in a process of their own."""
    return int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], text=True))


def test_tensors_reuse_the_pages_of_those_before():
    pages = 20 * 8 * 2_400_000 // 4096
    kept, default = faults("keep"), faults("default")
    assert kept < pages // 20  # the interpreter has its own
    assert default > 4 * kept  # else there would be nothing to mend; with huge pages there are few faults either way

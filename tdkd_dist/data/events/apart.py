"""Work in a process of its own: the libraries below some forms do not survive every damaged file.

The package `aedat` aborts within Rust, HDF5's library reads where nothing is: each would take the whole program along.
"""

import faulthandler
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, TypeVar

from tdkd_dist.data.events.recording import MOST_BYTES, Broken
from tdkd_dist.data.sources.source import one_line

T = TypeVar("T")
SECONDS = 60
"""For one recording of at most `MOST_BYTES`."""
MEMORY = 3 * MOST_BYTES


def apart(work: Callable[[], T]) -> T:
    """What `work()` gives, called in a fork of this process. Raises `Broken` if it raises, dies, or takes too long."""
    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        _work(work, sender)
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            raise Broken(f"not read within {SECONDS} seconds")
        result = receiver.recv()
    except (EOFError, OSError) as error:
        raise Broken("the library that reads it failed over it") from error
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        receiver.close()
    if isinstance(result, Broken):
        raise result
    return result  # type: ignore[no-any-return]


def _work(work: Callable[[], object], sender: Connection) -> NoReturn:
    """The fork's life: it says nothing, leaves no core, and takes so much memory more and no further."""
    try:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, held + MEMORY)):
            resource.setrlimit(limit, (min(value, resource.getrlimit(limit)[1]) if value else 0,) * 2)
        try:
            result = work()
        except Broken as broken:
            result = broken
        except Exception as error:
            result = Broken(f"{type(error).__name__}: {one_line(error)}")
        sender.send(result)
    finally:
        os._exit(0)

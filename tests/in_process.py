"""Command lines called in this process: to import torch anew for each takes longer than what is tested."""

import contextlib
import io
import signal
import subprocess
from collections.abc import Callable


def call(main: Callable[[list[str]], int], *arguments: object) -> subprocess.CompletedProcess[str]:
    """What `main` does with the arguments: its exit status, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

"""What a run says: its log. Only rank 0 speaks."""

import logging
import math
from pathlib import Path

from tdkd_dist.files import append_text
from tdkd_dist.mistakes import printable

PROGRESS_PREFIX = "  step "
"""How progress lines start; a follower on a terminal shows them as one line that changes."""


class Log:
    """`say` appends lines to the run's log if this rank `speaks`."""

    def __init__(self, path: Path, *, speaks: bool = True) -> None:
        self._path, self.speaks = path, speaks

    def say(self, text: str) -> None:
        """Append one or more lines."""
        if self.speaks:
            append_text(self._path, printable(text.rstrip("\n")) + "\n")

    def take_over_logging(self) -> None:
        """Make the package's own `logging` messages, from INFO on, lines of this log; and Dynamo's one that counts."""
        logger = logging.getLogger("tdkd_dist")
        logger.handlers = [_SayHandler(self)]
        logger.setLevel(logging.INFO)
        logger.propagate = False
        dynamo = logging.getLogger("torch._dynamo.convert_frame")
        dynamo.handlers = [h for h in dynamo.handlers if not isinstance(h, _FallBackHandler)] + [_FallBackHandler(self)]


class _SayHandler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(record.getMessage())


class _FallBackHandler(_SayHandler):
    """Says once that a network runs uncompiled: Dynamo gives up on its own, and training would just be slower."""

    def emit(self, record: logging.LogRecord) -> None:
        if "torch._dynamo hit config" in record.msg:
            self._log.say(
                "warning: compiled for as many image sizes, batch sizes and numbers of timesteps as allowed; what comes"
                " now runs uncompiled, at less than full speed (compilation.VERSIONS is the limit)"
            )
            logging.getLogger("torch._dynamo.convert_frame").removeHandler(self)


def format_seconds(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"

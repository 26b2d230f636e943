"""The user's mistakes, each told in a line that says what is wrong, where, and how to mend it; exit status 2.

Whatever else is raised is a crash: a traceback, exit status 1, and on a cluster another start.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Mistake(ValueError):  # noqa: N818 (a fault of the user, not an error of ours)
    """What a user can mend: one line, or the lines of all that was found together; control characters are escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).replace("\t", "\\t"))

    @property
    def lines(self) -> list[str]:
        """A line a mistake."""
        return str(self).splitlines()


def printable(text: str) -> str:
    """`text`, whose control characters, and bytes that were no UTF-8, are spelt out: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def require(condition: bool, message: str) -> None:
    """Raise `Mistake(message)` unless `condition` holds."""
    if not condition:
        raise Mistake(message)


class Mistakes:
    """Gathers mistakes, so that the first does not hide the others."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep the mistake that is raised inside, and go on."""
        try:
            yield
        except Mistake as mistake:
            self.lines += [line for line in mistake.lines if line not in self.lines]

    def gather(self, check: Callable[..., None], *args: Any) -> None:
        """Keep the mistake that `check(*args)` raises."""
        with self.gathered():
            check(*args)

    def require(self, condition: bool, message: str) -> None:
        """Keep `message` unless `condition` holds."""
        with self.gathered():
            require(condition, message)

    def tell(self) -> None:
        """Raise all of them as one `Mistake`, if there are any."""
        if self.lines:
            raise Mistake("\n".join(self.lines))

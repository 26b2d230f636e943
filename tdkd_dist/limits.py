"""What a field of the configuration may be, declared beside it, and the one checker of that."""

import re
from dataclasses import field, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from tdkd_dist.mistakes import Mistakes

WORDS = {">= 1": "at least 1", ">= 0": "at least 0", "> 0": "positive"}


def limited(default: Any, limits: str, note: str = "") -> Any:
    """A dataclass field whose value, unless None, must lie within `limits`: `>= 1`, `> 0`, or an interval `[0, 1)`.

    `note` is added to the message, such as what 0 means.
    """
    return field(default=default, metadata={"limits": limits, "note": f" ({note})" if note else ""})


class Section:
    """A section of the configuration: a dataclass that checks itself. Raises `Mistake`, a line for each bad value."""

    section: ClassVar[str]
    """How its keys start."""

    def __post_init__(self) -> None:
        found = Mistakes()
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            wanted = self._wanted(f.name, value, f.metadata.get("limits"))
            found.require(
                wanted is None, f"{self.section}.{f.name}={value}: must be {wanted}{f.metadata.get('note', '')}"
            )
        self.check_together(found)
        found.tell()

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""

    def _wanted(self, name: str, value: Any, limits: str | None) -> str | None:
        """What a bad value should have been; None for a good one."""
        choices = _choices(type(self)).get(name)  # type: ignore[arg-type]
        if value is None:
            return None
        if choices is not None and value not in choices:
            return f"one of {', '.join(map(str, choices))}"
        if limits is not None and not within(value, limits):
            return WORDS.get(limits, f"in {limits}")
        return None


def within(value: float, limits: str) -> bool:
    """Whether a number lies within `>= 1`, `> 0` or an interval such as `[0, 1)`; infinity and nan do not."""
    if not -float("inf") < value < float("inf"):
        return False
    if limits[0] == ">":
        sign, bound = limits.split()
        return value > float(bound) or (sign == ">=" and value == float(bound))
    match = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", limits)
    assert match is not None, limits
    low, high = float(match[2]), float(match[3])
    return low < value < high or (match[1] == "[" and value == low) or (match[4] == "]" and value == high)


@lru_cache
def _choices(section: type[Section]) -> dict[str, tuple[Any, ...]]:
    """The values of each field that is a `Literal`, or one or None."""
    found = {}
    for name, hint in get_type_hints(section).items():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Literal:
                found[name] = get_args(part)
    return found

"""What a field of the configuration may be, declared beside it, and the one checker of that."""

import math
import re
from collections.abc import Mapping
from dataclasses import field, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from tdkd_dist.mistakes import Mistakes

WORDS = {">= 1": "at least 1", ">= 0": "at least 0", "> 0": "positive"}


def limited(default: Any, limits: str, note: str = "", *, most: float | None = None) -> Any:
    """A dataclass field whose numbers must lie within `limits`: `>= 1`, `> 0`, or an interval `[0, 1)`.

    An interval says all; else the number is `most` at the most. None passes. `note` is added to the message, such as
    what 0 means.
    """
    metadata = {"limits": limits, "most": most, "note": f" ({note})" if note else ""}
    assert (most is None) == (limits[0] in "[("), "every number has a largest value"
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A section of the configuration: a dataclass that checks itself. Raises `Mistake`, a line for each bad value."""

    section: ClassVar[str]
    """How its keys start."""

    def __post_init__(self) -> None:
        found = Mistakes()
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            wanted = self._wanted(f.name, value, f.metadata)
            found.require(
                wanted is None, f"{self.section}.{f.name}={value}: must be {wanted}{f.metadata.get('note', '')}"
            )
        self.check_together(found)
        found.tell()

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""

    def _wanted(self, name: str, value: Any, metadata: Mapping[str, Any]) -> str | None:
        """What a bad value should have been; None for a good one."""
        choices = _choices(type(self)).get(name)  # type: ignore[arg-type]
        if value is None:
            return None
        limits, most = metadata.get("limits"), metadata.get("most")
        if choices is not None and value not in choices and (limits is None or isinstance(value, str)):
            return f"one of {', '.join(map(str, choices))}" + (f", or a number in {limits}" if limits else "")
        texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not all(text.isprintable() for text in texts if isinstance(text, str)):
            return "text without control characters"
        for number in value if isinstance(value, list | tuple) else [value]:
            if choices is not None and number in choices:
                continue  # a word that a number may be replaced by
            if limits is not None and not within(number, limits):
                finite = not isinstance(number, float) or math.isfinite(number)
                return WORDS.get(limits, f"in {limits}") + ("" if finite else " and finite")
            if most is not None and number > most:
                return f"at most {most:,}"
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

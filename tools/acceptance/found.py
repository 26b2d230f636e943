"""What a check measured, and the bounds that this was held against."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

Figure = float | int | str


@dataclass
class Bound:
    """A figure held against a limit."""

    figure: str
    """Its name among the figures."""
    limit: str
    """In words, such as `at most 1.1`."""
    ok: bool
    enforced: bool
    """Whether missing it fails the acceptance: not where it means nothing, as a GPU's idle share on a processor."""


@dataclass
class Found:
    """Named figures, with units in their names, and bounds."""

    figures: dict[str, Figure] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)

    def at_most(self, figure: str, limit: float, *, enforced: bool = True) -> None:
        """Hold a figure against an upper bound; one that is not a finite number misses it."""
        value = self.figures[figure]
        ok = not isinstance(value, str) and math.isfinite(value) and value <= limit
        self.bounds.append(Bound(figure, f"at most {limit:.4g}", ok, enforced))

    def holds(self, figure: str, fact: bool) -> None:
        """Note a fact that must be true."""
        self.figures[figure] = "yes" if fact else "no"
        self.bounds.append(Bound(figure, "yes", fact, True))

    def tell(self) -> None:
        """Print what was found so far, which stands if the check is cut off at its limit."""
        print("answer", json.dumps(self.as_json()), flush=True)

    @property
    def ok(self) -> bool:
        """Whether every bound that counts is met."""
        return all(bound.ok for bound in self.bounds if bound.enforced)

    def as_json(self) -> dict[str, Any]:
        """As the JSON line of a check holds it."""
        return {"figures": self.figures, "bounds": [asdict(bound) for bound in self.bounds]}

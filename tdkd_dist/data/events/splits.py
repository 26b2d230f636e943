"""Which recordings are trained on and which are validated on: stated, since it moves the accuracy by points."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.recording import EventSource, Recording, Sensor
from tdkd_dist.mistakes import require

KINDS = ("official", "random", "index")
SPLITS = ("train", "val")
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class SplitRule:
    """How a source is divided into `train` and `val`; what is validated on is most papers' test set."""

    kind: str = "official"
    """`official`: as the data set is handed out. `random`: over all recordings. `index`: the first of every class."""
    seed: int = 42
    """Of `random`."""
    test: float = 0.1
    """Of `random`: the share that is validated on."""
    first: int = 100
    """Of `index`: recordings with a number below it, in their name, are validated on."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"split {self.kind}: must be one of {', '.join(KINDS)}")
        require(0 < self.test < 1, f"split test {self.test}: must be a share between 0 and 1")
        require(self.first >= 1, f"split first {self.first}: must be at least 1")
        require(0 <= self.seed < 1 << 63, f"split seed {self.seed}: must be in 0 to 2^63 - 1")

    @property
    def text(self) -> str:
        """In words, as a result should say it."""
        return {
            "official": "official split",
            "random": f"random split, {100 * self.test:g} % validated on, seed {self.seed}",
            "index": f"recordings 0 to {self.first - 1} of every class validated on",
        }[self.kind]

    def choose(self, source: EventSource, split: str) -> NDArray[np.int64]:
        """Ascending indices of what belongs to `split`. Raises `Mistake` if the rule does not fit, or none is left."""
        require(split in SPLITS, f"split {split}: must be one of {', '.join(SPLITS)}")
        held = self._held_out(source)
        chosen = np.flatnonzero(held if split == "val" else ~held)
        require(len(chosen) > 0, f"{source.path}: no recording is left for {split} ({self.text})")
        return chosen

    def _held_out(self, source: EventSource) -> NDArray[np.bool_]:
        """Whether each recording is validated on, [N]."""
        parts = source.parts
        if self.kind == "official":
            require(parts is not None, f"{source.path}: has no official split; say random or index")
            return np.array([part == "val" for part in parts or ()], dtype=bool)
        require(parts is None, f"{source.path}: has an official split; take it, and not {self.kind}")
        if self.kind == "index":
            return np.array([_number(source.name(i)) < self.first for i in range(len(source.labels))], dtype=bool)
        return self._drawn(len(source.labels))

    def _drawn(self, count: int) -> NDArray[np.bool_]:
        """As `torch.utils.data.random_split` into [train, val] with a generator of this seed draws them."""
        import torch

        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).numpy()
        held = np.zeros(count, dtype=bool)
        held[order[count - round(count * self.test) :]] = True
        return held


class Part:
    """Some of a source's recordings, chosen by a rule."""

    def __init__(self, source: EventSource, indices: NDArray[np.int64], why: str):
        self.source, self.indices, self.why = source, indices, why
        self.kind, self.path = source.kind, source.path

    @property
    def sensor(self) -> Sensor:
        """That of the source."""
        return self.source.sensor

    @property
    def class_names(self) -> Sequence[str] | None:
        """Those of the source, whether or not this part shows them."""
        return self.source.class_names

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]."""
        return self.source.labels[self.indices]

    @property
    def parts(self) -> Sequence[str] | None:
        """None: a part is not divided again."""
        return None

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> Recording:
        """Recording `index` of this part."""
        return self.source.read(int(self.indices[index]))

    def signature(self) -> str:
        """Hash of the source's and of the choice."""
        digest = hashlib.sha256(f"{self.source.signature()} {self.why}\n".encode())
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


def _number(name: str) -> int:
    """The last number in a recording's name: its place in its class."""
    numbers = NUMBER.findall(Path(name).stem)
    require(bool(numbers), f"{name}: no number in its name, which a split by index needs; say random")
    return int(numbers[-1])

"""Recordings as a beton keeps them: frames of one shape, and how they came to be.

Shapes: T frames, 2 polarities, H x W pixels.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.framing import FramingRule, framed
from tdkd_dist.data.events.recording import Frames, Guarded
from tdkd_dist.data.sources.source import FrameSource


class FramedSource(FrameSource):
    """A source of recordings as one of frames. Raises `Mistake` if the rule does not fit the sensor."""

    def __init__(self, source: Guarded, rule: FramingRule):
        self.source, self.rule = source, rule
        self.kind, self.path = source.kind, source.path
        self._sensor = source.sensor
        rows, columns = rule.factors(self._sensor)
        self.shape = (rule.frames, 2, self._sensor[0] // rows, self._sensor[1] // columns)
        self.about = {"framing": rule.text, "sensor": list(self._sensor), "split": source.chosen}

    @property
    def class_names(self) -> Sequence[str] | None:
        """Those of the source."""
        return self.source.class_names

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]."""
        return self.source.labels

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(index)

    def read(self, index: int) -> Frames:
        """Counts [T, 2, H, W] of recording `index`. Raises `Mistake`, naming it."""
        return framed(self.source.read(index), self.rule, self._sensor)

    def signature(self) -> str:
        """Hash of the source's and of the framing."""
        return hashlib.sha256(f"{self.source.signature()} {self.rule}\n".encode()).hexdigest()

"""What a recording of an event camera is, what a source of them is, and what every form shares.

A source can be pickled, and parses one recording at a time. Times are in microseconds; a place on the sensor is a
column x from the left and a row y from the top; polarity 1 is brighter. Shapes: N events, T frames, 2 polarities,
H x W pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.guarded import checked_labels, reading
from tdkd_dist.mistakes import Mistake

MOST_BYTES = 1 << 31
"""Of one recording, as it lies on disk or as it is unpacked: what claims more is no recording but a bomb."""
MOST_EVENTS = 1 << 27
MOST_TIME = 1 << 61
"""Differences of two times must fit 64 bits."""
MOST_SIDE = 1 << 12

Sensor = tuple[int, int]
"""Height and width in pixels."""
Frames = NDArray[np.unsignedinteger]
"""Counts of events, [T, 2, H, W], in the smallest unsigned integer that holds them."""


class Events(NamedTuple):
    """The events of one recording, each array [N]."""

    t: NDArray[np.int64]
    """Microseconds, from any beginning."""
    x: NDArray[np.int16]
    y: NDArray[np.int16]
    p: NDArray[np.uint8]
    """0 or 1."""

    def only(self, chosen: NDArray[np.bool_]) -> "Events":
        """Those that are `chosen` [N], in the same order."""
        return Events(self.t[chosen], self.x[chosen], self.y[chosen], self.p[chosen])


Recording = Events | Frames
"""Events, or what somebody has framed before."""


class Broken(Exception):  # noqa: N818 (it becomes a Mistake, which is no error of ours either)
    """A recording is not what its form promises. Whoever knows the file's name makes it a `Mistake`."""


class EventSource(Protocol):
    """Labelled recordings in a fixed order."""

    kind: str
    path: Path

    @property
    def sensor(self) -> Sensor:
        """Height and width of the sensor, or of the frames where the source holds these."""
        ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """A name for each label, where the source has them."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]."""
        ...

    @property
    def parts(self) -> Sequence[str] | None:
        """`train` or `val` for every recording, [N], where the data set has an official split; else None."""
        ...

    def name(self, index: int) -> str:
        """What to call recording `index` in a message."""
        ...

    def read(self, index: int) -> Recording:
        """Recording `index`. Raises `Mistake`, naming it, when it cannot be parsed."""
        ...

    def signature(self) -> str:
        """A hash that changes when the source does; cheap, from names and sizes."""
        ...


class Guarded:
    """A source whose every answer is an answer or a `Mistake`, and whose recordings lie within the sensor."""

    def __init__(self, source: EventSource):
        self.source = source
        self.kind, self.path = source.kind, source.path
        self.chosen: str = getattr(source, "why", "all recordings")
        """Which of them are here, in words."""

    @property
    def sensor(self) -> Sensor:
        """Height and width of the sensor."""
        with whole_recording(f"{self.path}: its first recording"):
            height, width = (int(side) for side in self.source.sensor)
            if not 1 <= min(height, width) <= max(height, width) <= MOST_SIDE:
                raise Mistake(f"{self.path}: its sensor is {height} x {width} pixels; must be in 1 to {MOST_SIDE} each")
            return height, width

    @property
    def class_names(self) -> Sequence[str] | None:
        """A name for each label, where the source has them."""
        with whole_recording(f"{self.path}: its classes"):
            return self.source.class_names

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]: from 0 on."""
        with whole_recording(f"{self.path}: its labels"):
            return checked_labels(self.source.labels, self.path)

    @property
    def parts(self) -> Sequence[str] | None:
        """`train` or `val` for every recording, [N], where there is an official split."""
        with whole_recording(f"{self.path}: its split"):
            return self.source.parts

    def name(self, index: int) -> str:
        """What to call recording `index` in a message."""
        with whole_recording(f"{self.path}: the name of recording {index}"):
            return self.source.name(index)

    def read(self, index: int) -> Recording:
        """Recording `index`."""
        sensor = self.sensor
        with whole_recording(self.name(index)):
            recording = self.source.read(index)
            if isinstance(recording, Events):
                return checked_events(recording, sensor)
            if recording.shape[2:] != sensor:
                raise Broken(f"its frames are {list(recording.shape)}, those before it {sensor[0]} x {sensor[1]}")
            return recording

    def signature(self) -> str:
        """That of the source."""
        with whole_recording(self.path):
            return self.source.signature()


@contextmanager
def whole_recording(where: object) -> Iterator[None]:
    """Turn whatever is raised inside into a `Mistake` that says where, and how to mend it."""
    with reading(where):
        try:
            yield
        except Broken as broken:
            raise Mistake(f"{where}: {broken}; get it anew, or leave it out") from broken


def as_events(t: NDArray[np.integer], x: NDArray[np.integer], y: NDArray[np.integer], p: NDArray[np.integer]) -> Events:
    """Four arrays [N] of any integers, or truth values, as events. Raises `Broken` if they are none."""
    arrays = dict(zip("txyp", (np.asarray(array) for array in (t, x, y, p)), strict=True))
    for name, array in arrays.items():
        if array.dtype.kind not in "iub" or array.ndim != 1 or len(array) != len(arrays["t"]):
            raise Broken(f"its {name} is {array.dtype} {list(array.shape)}; one integer for each event wanted")
        low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
        least, most = {"t": (-MOST_TIME, MOST_TIME), "p": (0, 1)}.get(name, (0, MOST_SIDE - 1))
        if not least <= low <= high <= most:
            raise Broken(f"its {name} goes from {low} to {high}; must be in {least} to {most}")
    if len(arrays["t"]) > MOST_EVENTS:
        raise Broken(f"{len(arrays['t']):,} events; at most {MOST_EVENTS:,} are read")
    return Events(
        arrays["t"].astype(np.int64),
        arrays["x"].astype(np.int16),
        arrays["y"].astype(np.int16),
        arrays["p"].astype(np.uint8),
    )


def checked_events(events: Events, sensor: Sensor) -> Events:
    """The events themselves. Raises `Broken` if one lies outside of the sensor."""
    height, width = sensor
    if len(events.t) and (int(events.x.max()) >= width or int(events.y.max()) >= height):
        first = int(np.argmax((events.x >= width) | (events.y >= height)))
        at = f"x {events.x[first]}, y {events.y[first]}"
        raise Broken(f"event {first} is at {at}, outside of the sensor's {height} rows and {width} columns")
    return events


def as_frames(frames: NDArray[np.generic]) -> Frames:
    """An array [T, 2, H, W] of counts, whatever its type, as frames. Raises `Broken` if it is none."""
    if frames.ndim != 4 or frames.shape[1] != 2 or 0 in frames.shape or frames.dtype.kind not in "iubf":
        raise Broken(f"its frames are {frames.dtype} {list(frames.shape)}, not counts [T, 2, H, W]")
    low, high = float(frames.min()), float(frames.max())
    if not 0 <= low <= high < 1 << 32:
        raise Broken(f"its frames go from {low} to {high}, which are no counts")
    counts: Frames = frames.astype(np.min_scalar_type(int(high)))
    if not np.array_equal(counts, frames):
        raise Broken("its frames are no whole numbers, so no counts")
    return counts

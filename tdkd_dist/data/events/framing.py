"""Frames of events: how often each pixel got brighter and darker in each of T stretches of a recording.

Shapes: N events, T frames, 2 polarities, H x W pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.recording import Events, Frames, Recording, Sensor
from tdkd_dist.mistakes import Mistake, Mistakes

MOST_FRAMES, MOST_US = 10_000, 1 << 40
MOST_COUNTS = 1 << 28
"""Of one recording: 2 GiB while they are counted."""


@dataclass(frozen=True)
class FramingRule:
    """How a recording is cut into frames, as spikingjelly's `split_by`."""

    frames: int
    """T."""
    by: str = "number"
    """`number`: floor(N / T) events each, the last also gets what remains. `time`: floor(duration / T) microseconds
    each from the first event on, the last also gets what remains; a frame without events is zeros."""
    window_us: int | None = None
    """Only the events of so many microseconds from the first event on are framed; None: all."""
    size: Sensor | None = None
    """Height and width of the frames: the sensor's divided by whole numbers, whose pixels are summed. None: its own."""

    def __post_init__(self) -> None:
        found, window = Mistakes(), self.window_us
        found.require(1 <= self.frames <= MOST_FRAMES, f"frames {self.frames}: must be in 1 to {MOST_FRAMES:,}")
        found.require(self.by in ("number", "time"), f"by {self.by}: must be number or time")
        found.require(window is None or 1 <= window <= MOST_US, f"window_us {window}: must be in 1 to {MOST_US:,}")
        found.require(self.size is None or min(self.size) >= 1, f"size {self.size}: must be at least 1 x 1")
        found.tell()

    @property
    def text(self) -> str:
        """In words, as a result should say it."""
        window = "" if self.window_us is None else f" of the first {self.window_us} us"
        return f"{self.frames} frames by {self.by}{window}"

    def factors(self, sensor: Sensor) -> tuple[int, int]:
        """How many rows and columns of the sensor make one of a frame. Raises `Mistake` for a broken number."""
        height, width = self.size or sensor
        if sensor[0] % height or sensor[1] % width:
            raise Mistake(f"size {height} x {width}: the sensor's {sensor[0]} x {sensor[1]} is no multiple of it")
        return sensor[0] // height, sensor[1] // width


def frame(events: Events, rule: FramingRule, sensor: Sensor) -> Frames:
    """Counts [T, 2, H, W] of the events of each polarity, in the smallest unsigned integer that holds them.

    The events must lie within `sensor`, as a `Guarded` source's do. Times may go backwards; the beginning is the first
    event's, the end the last one's.
    """
    if rule.window_us is not None and len(events.t):
        events = events.only(events.t < events.t[0] + rule.window_us)
    rows, columns = rule.factors(sensor)
    height, width = sensor[0] // rows, sensor[1] // columns
    y, x = (events.y, events.x) if rows == columns == 1 else (events.y // rows, events.x // columns)
    pixels = height * width
    if rule.frames * 2 * pixels > MOST_COUNTS:
        raise Mistake(f"{rule.text} of {height} x {width} are too much for memory; say fewer, or a smaller size")
    place = (_frame_of(events.t, rule) * 2 + events.p) * pixels + y.astype(np.int64) * width + x
    counts = np.bincount(place, minlength=rule.frames * 2 * pixels)
    return counts.reshape(rule.frames, 2, height, width).astype(np.min_scalar_type(int(counts.max())))


def framed(recording: Recording, rule: FramingRule, sensor: Sensor) -> Frames:
    """Frames [T, 2, H, W] of events, or those that are there if they are as the rule wants them. Raises `Mistake`."""
    if isinstance(recording, Events):
        return frame(recording, rule, sensor)
    if len(recording) != rule.frames or rule.window_us is not None or rule.factors(sensor) != (1, 1):
        size = " x ".join(map(str, rule.size or sensor))
        raise Mistake(
            f"frames of {list(recording.shape)} cannot become {rule.text} of {size}; take the events themselves"
        )
    return recording


def _frame_of(t: NDArray[np.int64], rule: FramingRule) -> NDArray[np.int64]:
    """The frame that each event belongs to, [N]."""
    if rule.by == "number":
        each = len(t) // rule.frames
        ends = np.arange(1, rule.frames) * each
        return np.repeat(np.arange(rule.frames), np.diff(ends, prepend=0, append=len(t)))
    if not len(t):
        return t
    each = int(t[-1] - t[0]) // rule.frames
    # Where all is over in fewer microseconds than there are frames, each frame but the last is empty.
    return np.clip((t - t[0]) // each, 0, rule.frames - 1) if each > 0 else np.full_like(t, rule.frames - 1)

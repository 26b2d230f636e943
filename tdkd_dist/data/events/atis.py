"""The 40-bit events of N-MNIST and N-Caltech101: `.bin` files from an ATIS.

Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015; the overflows
as in the authors' own reader (gorchard/event-Python, `eventvision.py`).
"""

from collections.abc import Sequence

import numpy as np

from tdkd_dist.data.events.recording import Broken, Events, Sensor, as_events

BYTES = 5
OVERFLOW_ROW, OVERFLOW_US = 240, 1 << 13
N_MNIST, N_CALTECH101 = (34, 34), (180, 240)


def read(content: bytes) -> tuple[Events, None]:
    """The events: 8 bits x, 8 bits y, 1 bit polarity, 23 bits microseconds. Raises `Broken`.

    What lies in row 240 is no event: from there on 2^13 microseconds more have passed.
    """
    if len(content) % BYTES:
        raise Broken(f"truncated: {len(content)} bytes are no whole number of {BYTES}-byte events")
    x, y, high, middle, low = np.frombuffer(content, dtype=np.uint8).reshape(-1, BYTES).T
    time = (high & 127).astype(np.int64) << 16 | middle.astype(np.int64) << 8 | low
    p = high >> 7
    overflow = y == OVERFLOW_ROW
    if overflow.any():
        time = time + OVERFLOW_US * np.cumsum(overflow)
        time, x, y, p = (column[~overflow] for column in (time, x, y, p))
    return as_events(time, x, y, p), None


def sensor_of(class_names: Sequence[str]) -> Sensor:
    """N-MNIST's classes are digits, N-Caltech101's are not."""
    return N_MNIST if all(name.isdigit() for name in class_names) else N_CALTECH101

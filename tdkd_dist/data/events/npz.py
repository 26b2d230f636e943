"""spikingjelly's `.npz`: events as t, x, y, p, or `frames` that were integrated from them."""

import io
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.recording import MOST_BYTES, Broken, Recording, Sensor, as_events, as_frames

EVENTS = ("t", "x", "y", "p")


def read(content: bytes) -> tuple[Recording, Sensor | None]:
    """The events, of a sensor that the file does not tell, or the frames. Raises `Broken`, and what numpy raises."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        held = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
    wanted = EVENTS if set(EVENTS) <= set(held) else ("frames",)
    if not set(wanted) <= set(held):
        raise Broken(f"holds {', '.join(held) or 'nothing'}: neither t, x, y, p nor frames")
    if sum(held[name] for name in wanted) > MOST_BYTES:
        raise Broken(f"unpacks to more than {MOST_BYTES:,} bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        columns: list[NDArray[Any]] = [arrays[name] for name in wanted]
    if wanted == EVENTS:
        return as_events(*columns), None
    frames = as_frames(columns[0])
    return frames, (frames.shape[2], frames.shape[3])

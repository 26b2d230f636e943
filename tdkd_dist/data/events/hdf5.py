"""tonic's `DiskCachedDataset`: `INDEX_COPY.hdf5`, each with the recording as `data/0` and its label as `target/0`."""

import io
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.apart import apart
from tdkd_dist.data.events.recording import MOST_BYTES, Broken, Recording, Sensor, as_events, as_frames
from tdkd_dist.mistakes import Mistake


def read(content: bytes) -> tuple[Recording, Sensor | None]:
    """Structured events with t, x, y and p, of a sensor that the file does not tell, or frames. Raises `Broken`."""
    data = _array(content, "data/0")
    if data.dtype.names is None:
        frames = as_frames(data)
        return frames, (frames.shape[2], frames.shape[3])
    if not {"t", "x", "y", "p"} <= set(data.dtype.names):
        raise Broken(f"its events have {', '.join(data.dtype.names)}: not t, x, y and p")
    return as_events(data["t"], data["x"], data["y"], data["p"]), None


def read_target(content: bytes) -> int | str:
    """What the recording shows: a number, or the name of a class. Raises `Broken`."""
    target = _array(content, "target/0")
    if target.dtype.kind in "iuS" and target.size == 1:
        value = target.reshape(()).item()
        return value.decode() if isinstance(value, bytes) else int(value)
    raise Broken(f"its target is {target.dtype} {list(target.shape)}, not one label")


def _array(content: bytes, name: str) -> NDArray[Any]:
    """The array of that name. Raises `Broken` if there is none, and `Mistake` where `h5py` is missing."""
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise Mistake("reading tonic's HDF5 needs the package h5py: pip install h5py") from error

    def load() -> NDArray[Any]:
        with h5py.File(io.BytesIO(content), "r") as file:
            if not isinstance(file.get(name), h5py.Dataset):
                raise Broken(f"no array {name} in it, as tonic's DiskCachedDataset writes")
            if file[name].nbytes > MOST_BYTES:
                raise Broken(f"{name} unpacks to {file[name].nbytes:,} bytes; at most {MOST_BYTES:,} are read")
            return np.asarray(file[name][()])

    return apart(load)

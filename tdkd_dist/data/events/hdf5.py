"""tonic's `DiskCachedDataset`: `INDEX_COPY.hdf5`, each with the recording as `data/0` and its label as `target/0`."""

import io
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.recording import MOST_BYTES, Broken, Recording, Sensor, as_events, as_frames
from tdkd_dist.mistakes import Mistake


def read(content: bytes) -> tuple[Recording, Sensor | None]:
    """Structured events with t, x, y and p, of a sensor that the file does not tell, or frames. Raises `Broken`."""
    data = _dataset(content, "data/0")
    if data.dtype.names is None:
        frames = as_frames(data)
        return frames, (frames.shape[2], frames.shape[3])
    if not {"t", "x", "y", "p"} <= set(data.dtype.names):
        raise Broken(f"its events have {', '.join(data.dtype.names)}: not t, x, y and p")
    return as_events(data["t"], data["x"], data["y"], data["p"]), None


def read_target(content: bytes) -> int | str:
    """What the recording shows: a number, or the name of a class. Raises `Broken`."""
    target = _dataset(content, "target/0")
    if target.dtype.kind in "iu" and target.size == 1:
        return int(target.reshape(()))
    if target.dtype.kind == "O" and target.size == 1 and isinstance(target.reshape(()).item(), bytes):
        return bytes(target.reshape(()).item()).decode()
    raise Broken(f"its target is {target.dtype} {list(target.shape)}, not one label")


def _dataset(content: bytes, name: str) -> NDArray[Any]:
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise Mistake("reading tonic's HDF5 needs the package h5py: pip install h5py") from error
    with h5py.File(io.BytesIO(content), "r") as file:
        if not isinstance(file.get(name), h5py.Dataset):
            raise Broken(f"no array {name} in it, as tonic's DiskCachedDataset writes")
        dataset = file[name]
        if dataset.nbytes > MOST_BYTES:
            raise Broken(f"{name} unpacks to {dataset.nbytes:,} bytes; at most {MOST_BYTES:,} are read")
        return np.asarray(dataset[()])

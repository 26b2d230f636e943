"""The layout of an FFCV file, and telling a whole one from a broken one; needs numpy alone.

    header | field descriptors | sample table | checksums (ours) | padding | pages of samples | allocation table

A sample is a picture (`RGBImageField`), or the frames of an event recording (`NDArrayField`, all of one shape), and a
label. The checksums, one CRC-32 a sample, sit in what FFCV leaves as padding. A sample never crosses a page.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.mistakes import Mistake

VERSION = 2
PAGE_SIZE = 1 << 23
MODE_JPEG, MODE_RAW = 0, 1
TYPE_INT, TYPE_IMAGE, TYPE_ARRAY = 1, 2, 4

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype({"names": ["image", "label"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
FRAMES_SAMPLE = np.dtype([("frames", "<u8"), ("label", "<i8")])
"""Of frames, of which the place alone is said; their shape is the field's."""
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
"""What a descriptor says of arrays; the type follows, as JSON."""
COUNT_TYPES = ("|u1", "<i2")
"""What counts of events are stored as: PyTorch knows no unsigned 16 bits."""
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

Table = NDArray[Any]


@dataclass(frozen=True)
class FrameLayout:
    """How frames are stored."""

    shape: tuple[int, int, int, int]
    """Frames, polarities, height, width."""
    dtype: str
    """One of `COUNT_TYPES`."""

    @property
    def nbytes(self) -> int:
        """Of a sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Tables:
    """Everything in a beton that is not a picture or a frame."""

    header: Table
    descriptors: Table
    samples: Table
    checksums: NDArray[np.uint32]
    """CRC-32 of each stored sample; meaningless without a manifest."""
    allocations: Table

    @cached_property
    def frames(self) -> FrameLayout | None:
        """How its frames are stored; None: it holds pictures."""
        return read_frame_layout(self.descriptors[0]["arguments"]) if self.samples.dtype == FRAMES_SAMPLE else None

    @property
    def pointers(self) -> NDArray[np.uint64]:
        """Where each sample begins."""
        return self.samples["frames"] if self.frames is not None else self.samples["image"]["data_ptr"]

    def place(self, index: int) -> tuple[int, int]:
        """Offset and size of a sample's bytes in the file."""
        ptr = self.pointers[index]
        order, ptrs = self.by_ptr
        row = self.allocations[order[np.searchsorted(ptrs, ptr)]]
        return int(row["ptr"]), int(row["size"])

    @cached_property
    def by_ptr(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The allocation table's order by place, and the places: FFCV writes it in the order its processes ended in."""
        order = np.argsort(self.allocations["ptr"])
        return order, self.allocations["ptr"][order]

    def sha256(self) -> str:
        """Hash of all of them."""
        digest = hashlib.sha256()
        for part in (self.header, self.descriptors, self.samples, self.checksums, self.allocations):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def data_start(num_samples: int, sample: np.dtype[Any] = SAMPLE, page_size: int = PAGE_SIZE) -> int:
    """Where the first page begins: after the tables and checksums, at a multiple of the page size."""
    tables = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + num_samples * (sample.itemsize + 4)
    return -(-tables // page_size) * page_size


def descriptors(frames: FrameLayout | None) -> Table:
    """The fields' descriptors of a beton of pictures, or of such frames."""
    found = np.zeros(2, dtype=DESCRIPTOR)
    first = ("image", TYPE_IMAGE) if frames is None else ("frames", TYPE_ARRAY)
    for row, (name, type_id) in zip(found, (first, ("label", TYPE_INT)), strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
    if frames is not None:
        arguments = np.zeros(1, dtype=ARRAY_ARGUMENTS)
        arguments["shape"][0, : len(frames.shape)] = frames.shape
        text = json.dumps(np.dtype(frames.dtype).descr).encode()
        arguments["type_length"] = len(text)
        packed = arguments.tobytes() + text
        found[0]["arguments"][: len(packed)] = np.frombuffer(packed, np.uint8)
    return found


def read_frame_layout(arguments: Table) -> FrameLayout:
    """What a descriptor says of frames. Raises `Mistake` if it is nothing that we would write."""
    head = np.frombuffer(arguments[: ARRAY_ARGUMENTS.itemsize].tobytes(), dtype=ARRAY_ARGUMENTS)[0]
    text = arguments[ARRAY_ARGUMENTS.itemsize :].tobytes()[: min(int(head["type_length"]), 64)]
    shape = tuple(int(n) for n in head["shape"] if n)
    known = {json.dumps(np.dtype(t).descr).encode(): t for t in COUNT_TYPES}
    if len(shape) != 4 or text not in known or max(shape) > 1 << 16:
        raise Mistake(f"its frames are {list(shape)[:5]}; counts [frames, polarities, height, width] wanted")
    return FrameLayout((shape[0], shape[1], shape[2], shape[3]), known[text])


def read_tables(path: Path) -> Tables:
    """The tables of a beton of pictures or frames, with labels. Raises `Mistake` if it is not one, or not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER.itemsize).ljust(HEADER.itemsize, b"\0"), dtype=HEADER)[0]
        count, fields = int(header["num_samples"]), int(header["num_fields"])
        if header["version"] != VERSION or fields == 0 or not _is_power_of_two(int(header["page_size"])):
            raise Mistake("not an FFCV file")
        truncated = Mistake(f"truncated: {size} bytes are less than its header promises")
        if fields * DESCRIPTOR.itemsize > size - HEADER.itemsize:
            raise truncated
        described = np.frombuffer(file.read(fields * DESCRIPTOR.itemsize), dtype=DESCRIPTOR)
        sample = _check_fields(described)
        table_ptr = int(header["alloc_table_ptr"])
        if not HEADER.itemsize + described.nbytes + count * sample.itemsize <= table_ptr <= size:
            raise truncated
        samples = np.frombuffer(file.read(count * sample.itemsize), dtype=sample)
        checksums = np.frombuffer(file.read(4 * count), dtype="<u4")
        file.seek(table_ptr)
        rest = file.read()
    if len(rest) < count * ALLOCATION.itemsize or len(rest) % ALLOCATION.itemsize:
        raise Mistake(f"truncated: its allocation table holds {len(rest)} of {count * ALLOCATION.itemsize} bytes")
    tables = Tables(header, described, samples, checksums, np.frombuffer(rest, dtype=ALLOCATION))
    _check_pointers(tables)
    return tables


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _check_fields(described: Table) -> np.dtype[Any]:
    """The form of the sample table."""
    found = [(bytes(d["name"]).rstrip(b"\0").decode("ascii", "replace"), int(d["type_id"])) for d in described]
    if found == [("frames", TYPE_ARRAY), ("label", TYPE_INT)]:
        return FRAMES_SAMPLE
    if found != [("image", TYPE_IMAGE), ("label", TYPE_INT)]:
        names = ", ".join(name for name, _ in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise Mistake(f"its fields are {names}; expected image (RGBImageField) or frames (NDArrayField), and label")
    return SAMPLE


def _check_pointers(tables: Tables) -> None:
    """Every sample must lie where the allocation table says, inside the file: FFCV would read past it."""
    if len(tables.samples) == 0:
        raise Mistake("it holds no samples")
    order, ptrs = tables.by_ptr
    sizes = tables.allocations["size"][order]
    at = np.minimum(np.searchsorted(ptrs, tables.pointers), len(ptrs) - 1)
    bad = (
        (ptrs[at] != tables.pointers)
        | (ptrs[at] + sizes[at] > tables.header["alloc_table_ptr"])
        | (tables.samples["label"] < 0)
    )
    if tables.frames is not None:
        bad |= sizes[at] != tables.frames.nbytes
    else:
        pictures = tables.samples["image"]
        pixels = pictures["width"].astype(np.int64) * pictures["height"]
        bad |= (pixels == 0) | (pictures["mode"] > MODE_RAW)
        bad |= (pictures["mode"] == MODE_RAW) & (sizes[at] != 3 * pixels)
    if bad.any():
        raise Mistake(f"its sample table is corrupt: {bad.sum()} samples, the first is {bad.argmax()}")

"""The layout of an FFCV file, and telling a whole one from a broken one; needs numpy alone.

    header | field descriptors | sample table | checksums (ours) | padding | pages of pictures | allocation table

The checksums, one CRC-32 a picture, sit in what FFCV leaves as padding. A picture never crosses a page.
"""

import hashlib
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
TYPE_INT, TYPE_IMAGE = 1, 2

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
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

Table = NDArray[Any]


@dataclass(frozen=True)
class Tables:
    """Everything in a beton that is not a picture."""

    header: Table
    descriptors: Table
    samples: Table
    checksums: NDArray[np.uint32]
    """CRC-32 of each stored picture; meaningless without a manifest."""
    allocations: Table

    def place(self, index: int) -> tuple[int, int]:
        """Offset and size of a picture's bytes in the file."""
        ptr = self.samples[index]["image"]["data_ptr"]
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


def data_start(num_samples: int, page_size: int = PAGE_SIZE) -> int:
    """Where the first page begins: after the tables and checksums, at a multiple of the page size."""
    tables = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + num_samples * (SAMPLE.itemsize + 4)
    return -(-tables // page_size) * page_size


def read_tables(path: Path) -> Tables:
    """The tables of a beton with fields `image` and `label`. Raises `Mistake` if it is not one, or not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER.itemsize).ljust(HEADER.itemsize, b"\0"), dtype=HEADER)[0]
        count, fields = int(header["num_samples"]), int(header["num_fields"])
        if header["version"] != VERSION or fields == 0 or not _is_power_of_two(int(header["page_size"])):
            raise Mistake("not an FFCV file")
        tables_end = HEADER.itemsize + fields * DESCRIPTOR.itemsize + count * SAMPLE.itemsize
        table_ptr = int(header["alloc_table_ptr"])
        if fields * DESCRIPTOR.itemsize > size or (fields == 2 and not tables_end <= table_ptr <= size):
            raise Mistake(f"truncated: {size} bytes are less than its header promises")
        descriptors = np.frombuffer(file.read(fields * DESCRIPTOR.itemsize), dtype=DESCRIPTOR)
        _check_fields(descriptors)
        samples = np.frombuffer(file.read(count * SAMPLE.itemsize), dtype=SAMPLE)
        checksums = np.frombuffer(file.read(4 * count), dtype="<u4")
        file.seek(table_ptr)
        rest = file.read()
    if len(rest) < count * ALLOCATION.itemsize or len(rest) % ALLOCATION.itemsize:
        raise Mistake(f"truncated: its allocation table holds {len(rest)} of {count * ALLOCATION.itemsize} bytes")
    tables = Tables(header, descriptors, samples, checksums, np.frombuffer(rest, dtype=ALLOCATION))
    _check_pointers(tables)
    return tables


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _check_fields(descriptors: Table) -> None:
    found = [(bytes(d["name"]).rstrip(b"\0").decode("ascii", "replace"), int(d["type_id"])) for d in descriptors]
    if found != [("image", TYPE_IMAGE), ("label", TYPE_INT)]:
        names = ", ".join(name for name, _ in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise Mistake(f"its fields are {names}; expected image (RGBImageField) and label (IntField)")


def _check_pointers(tables: Tables) -> None:
    """Every picture must lie where the allocation table says, inside the file: FFCV would read past it."""
    if len(tables.samples) == 0:
        raise Mistake("it holds no samples")
    order, ptrs = tables.by_ptr
    sizes = tables.allocations["size"][order]
    pictures = tables.samples["image"]
    at = np.minimum(np.searchsorted(ptrs, pictures["data_ptr"]), len(ptrs) - 1)
    pixels = pictures["width"].astype(np.int64) * pictures["height"]
    bad = (
        (ptrs[at] != pictures["data_ptr"])
        | (ptrs[at] + sizes[at] > tables.header["alloc_table_ptr"])
        | (pixels == 0)
        | (pictures["mode"] > MODE_RAW)
        | ((pictures["mode"] == MODE_RAW) & (sizes[at] != 3 * pixels))
        | (tables.samples["label"] < 0)
    )
    if bad.any():
        raise Mistake(f"its sample table is corrupt: {bad.sum()} samples, the first is {bad.argmax()}")

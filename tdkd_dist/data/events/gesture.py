"""DVS128 Gesture as it is handed out: long AEDAT 3.1 files, each beside a CSV of what was done from when to when.

Amir et al., "A low power, fully event-based gesture recognition system", 2017.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events import aedat3
from tdkd_dist.data.events.places import Place
from tdkd_dist.data.events.recording import Broken, Events, whole_recording
from tdkd_dist.mistakes import Mistake

CSV = "_labels.csv"
LISTS = {"trials_to_train.txt": "train", "trials_to_test.txt": "val"}
CLASSES = [
    "hand_clapping",
    "right_hand_wave",
    "left_hand_wave",
    "right_arm_clockwise",
    "right_arm_counter_clockwise",
    "left_arm_clockwise",
    "left_arm_counter_clockwise",
    "arm_roll",
    "air_drums",
    "air_guitar",
    "other_gestures",
]
"""In the order of their numbers, 1 to 11 (`gesture_mapping.csv`)."""


class Row(NamedTuple):
    """One line of a CSV: a recording."""

    file: PurePosixPath
    number: int
    label: int
    start: int
    """Microseconds, as the file counts them; `end` is no longer part of it."""
    end: int


class GestureSource:
    """Each line of each CSV is a recording, in the order of the files' names; split by the data set's own lists.

    The lists count where they are: a file that is in neither is left out, as spikingjelly does.
    """

    kind = "dvs128-gesture"
    sensor = (128, 128)

    def __init__(self, path: Path, files: Sequence[Place]):
        self.path = path
        self._at = {place.inner: place for place in files}
        self._csvs = {self._recorded(place): place for place in files if place.inner.name.endswith(CSV)}
        self._lists = [place for place in files if place.inner.name in LISTS]
        self._last: tuple[PurePosixPath, Events] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the file that was parsed last, which can be hundreds of megabytes."""
        return self.__dict__ | {"_last": None}

    @property
    def class_names(self) -> list[str]:
        """The eleven gestures."""
        return CLASSES

    @cached_property
    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        for file in sorted(self._part_of or self._csvs):
            with whole_recording(self._csvs[file]):
                rows += _read_csv(file, self._csvs[file].content())
        return rows

    @cached_property
    def _part_of(self) -> dict[PurePosixPath, str]:
        """The part each file belongs to, by the lists; empty without lists."""
        parts: dict[PurePosixPath, str] = {}
        for place in self._lists:
            with whole_recording(place):
                for line in place.content().decode().split():
                    file = place.inner.with_name(line)
                    if file not in self._at or file not in self._csvs:
                        raise Mistake(f"{place}: {line} or its {CSV} is not there; get it, or take it off the list")
                    if parts.setdefault(file, LISTS[place.inner.name]) != LISTS[place.inner.name]:
                        raise Mistake(f"{place}: {line} is on the other list too; take it off one")
        return parts

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]: the CSV's number less 1."""
        return np.array([row.label for row in self._rows], dtype=np.int64)

    @property
    def parts(self) -> list[str] | None:
        """By the lists of trials, where these are."""
        return [self._part_of[row.file] for row in self._rows] if self._part_of else None

    def name(self, index: int) -> str:
        """The file, and the line of its CSV."""
        row = self._rows[index]
        return f"{self._at[row.file]}[line {row.number} of its {CSV}]"

    def read(self, index: int) -> Events:
        """The events of recording `index`: those from its start on, before its end. The file is kept for the next."""
        row = self._rows[index]
        if self._last is None or self._last[0] != row.file:
            self._last = row.file, aedat3.read(self._at[row.file].content())[0]
        events = self._last[1]
        chosen = (events.t >= row.start) & (events.t < row.end)
        return events.only(chosen)

    def signature(self) -> str:
        """Hash of the files' paths and sizes, and of the lists and tables."""
        digest = hashlib.sha256()
        for place in self._at.values():
            digest.update(f"{place.inner}\0{place.size}\n".encode(errors="surrogateescape"))
            if place in self._lists or place in self._csvs.values():
                digest.update(place.content())
        return digest.hexdigest()

    def _recorded(self, csv: Place) -> PurePosixPath:
        """The recording that a CSV is about."""
        file = csv.inner.with_name(csv.inner.name.removesuffix(CSV) + ".aedat")
        if file not in self._at:
            raise Mistake(f"{csv}: no {file.name} beside it; get it, or remove the table")
        return file


def _read_csv(file: PurePosixPath, content: bytes) -> list[Row]:
    rows = []
    for number, line in enumerate(content.decode().splitlines()[1:], start=2):
        if not line.strip():
            continue
        try:
            label, start, end = (int(field) for field in line.split(","))
        except ValueError as error:
            raise Broken(f"line {number}, {line[:80]!r}, is not class, start, end") from error
        if not 1 <= label <= len(CLASSES) or not 0 <= start <= end:
            raise Broken(
                f"line {number}, {line[:80]!r}: the class must be 1 to {len(CLASSES)}, the end after the start"
            )
        rows.append(Row(file, number, label - 1, start, end))
    return rows

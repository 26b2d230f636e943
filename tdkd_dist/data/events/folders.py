"""Class folders of recordings, in any form; an archive counts as a folder."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.places import Place
from tdkd_dist.data.events.recording import Broken, Recording, Sensor, whole_recording
from tdkd_dist.mistakes import Mistake

Reader = Callable[[bytes], tuple[Recording, Sensor | None]]
"""Parses a file's content; the sensor, where the file tells it. Raises `Broken`, or what its library raises."""


class FileSource:
    """One file a recording; a subclass says what it shows."""

    _depth = 1
    """How far above a file the folders of an official split lie at least."""

    def __init__(self, kind: str, path: Path, files: Sequence[Place], read: Reader, sensor: Sensor | None):
        self.kind, self.path, self.files = kind, path, list(files)
        self._read, self._told = read, sensor

    @cached_property
    def sensor(self) -> Sensor:
        """As it was told, else as the first recording tells."""
        with whole_recording(self.files[0]):
            sensor = self._told or self._read(self.files[0].content())[1]
        if sensor is None:
            raise Mistake(f"{self.path}: {self.kind} does not tell how large the sensor is; say its height and width")
        return sensor

    @property
    def parts(self) -> list[str] | None:
        """The official split, where the recordings lie below folders of one, such as Train and Test."""
        parts = [place.part(self._depth) for place in self.files]
        if any(parts) and None in parts:
            raise Mistake(
                f"{self.files[parts.index(None)]}: in neither train nor test, as others are; move or remove it"
            )
        return [part for part in parts if part] or None

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def read(self, index: int) -> Recording:
        """Recording `index`."""
        recording, sensor = self._read(self.files[index].content())
        if sensor not in (None, self.sensor):
            raise Broken(f"its sensor is {sensor}, and not {self.sensor} (height, width)")
        return recording

    def signature(self) -> str:
        """Hash of all paths below the root, and of the sizes."""
        digest = hashlib.sha256(f"{self.kind} {self._told}\n".encode())
        for place in self.files:
            digest.update(f"{place.inner}\0{place.size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class ClassFolders(FileSource):
    """A folder a class, labelled in the sorted order of their names, as torchvision and spikingjelly do."""

    _depth = 2

    @cached_property
    def class_names(self) -> list[str]:
        """The folders' names."""
        return sorted({place.folder for place in self.files})

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]."""
        at = {name: label for label, name in enumerate(self.class_names)}
        return np.array([at[place.folder] for place in self.files], dtype=np.int64)


class LabelledFiles(FileSource):
    """Files that tell their own label, a number or a name."""

    def __init__(
        self,
        kind: str,
        path: Path,
        files: Sequence[Place],
        read: Reader,
        sensor: Sensor | None,
        target: Callable[[bytes], int | str],
    ):
        super().__init__(kind, path, files, read, sensor)
        self._target = target

    @cached_property
    def _targets(self) -> list[int] | list[str]:
        targets = []
        for place in self.files:
            with whole_recording(place):
                targets.append(self._target(place.content()))
        numbers = [target for target in targets if isinstance(target, int)]
        names = [target for target in targets if isinstance(target, str)]
        if numbers and names:
            raise Mistake(f"{self.path}: {len(numbers)} labels are numbers, {len(names)} are names; say one of both")
        return numbers or names

    @property
    def class_names(self) -> list[str] | None:
        """The sorted names, where labels are such."""
        return sorted({target for target in self._targets if isinstance(target, str)}) or None

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The label of every recording, [N]."""
        names = self.class_names
        return np.array([names.index(str(t)) for t in self._targets] if names else self._targets, dtype=np.int64)

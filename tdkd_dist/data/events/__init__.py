"""Event-camera recordings: one file a form; `open_events` chooses. `framing` makes frames of them."""

import re
from collections import Counter
from pathlib import Path

from tdkd_dist.data.events import aedat2, aedat3, aedat4, atis, hdf5, npz
from tdkd_dist.data.events.folders import ClassFolders, LabelledFiles, Reader
from tdkd_dist.data.events.gesture import CSV, GestureSource
from tdkd_dist.data.events.places import ARCHIVES, Place, find_places
from tdkd_dist.data.events.recording import EventSource, Guarded, Sensor, whole_recording
from tdkd_dist.data.events.splits import Part, SplitRule
from tdkd_dist.mistakes import Mistake

READERS: dict[str, tuple[str, Reader]] = {
    ".aedat": ("aedat2", aedat2.read),
    ".aedat4": ("aedat4", aedat4.read),
    ".bin": ("atis", atis.read),
    ".npz": ("npz", npz.read),
    ".hdf5": ("tonic-hdf5", hdf5.read),
}
"""What each form is called, and how it is parsed, by the files' suffix."""
MAGICS: dict[bytes, tuple[str, Reader]] = {
    aedat2.MAGIC: ("aedat2", aedat2.read),
    aedat3.MAGIC: ("aedat3", aedat3.read),
    b"#!AER-DAT4": ("aedat4", aedat4.read),
}
"""The same for `.aedat`, by how the first file begins."""
CACHED = re.compile(r"(\d+)_0")
"""The first copy of a recording in tonic's cache; others are augmented."""


def open_events(
    path: Path, split: str | None = None, rule: SplitRule | None = None, sensor: Sensor | None = None
) -> Guarded:
    """The reader for the recordings below the folder, or in the archive, `path`.

    `split` (train or val) says which part is wanted, `rule` how it is divided (None: as the data set is handed out, or
    else at random), `sensor` (height, width) how large the camera is, where the form does not say. Raises `Mistake`
    when nothing here can read it, when there is no such part, or when there is an official split and no part is asked
    for.
    """
    with whole_recording(path):
        source = _open(path, sensor)
        if split is not None:
            rule = rule or SplitRule("random" if source.parts is None else "official")
            return Guarded(Part(source, rule.choose(source, split), f"{split}, {rule.text}"))
        if len(set(source.parts or ())) > 1:
            raise Mistake(
                f"{path}: holds what is trained on and what is validated on; say --split train or --split val"
            )
        return Guarded(source)


def _open(path: Path, sensor: Sensor | None) -> EventSource:
    if not path.exists():
        raise Mistake(f"{path}: no such file or folder")
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(ARCHIVES)):
        raise Mistake(f"{path}: neither a folder of recordings nor one of {', '.join(ARCHIVES)}")
    found = find_places(path)
    if any(place.inner.name.endswith(CSV) for place in found):
        return GestureSource(path, found)
    count = Counter(place.suffix for place in found if place.suffix in READERS)
    if not count:
        raise Mistake(f"{path}: no recordings in it ({', '.join(READERS)}, in folders or archives)")
    if len(count) > 1:
        held = ", ".join(f"{number} {suffix}" for suffix, number in count.items())
        raise Mistake(f"{path}: holds {held}; name the folder of one of them")
    return _open_files(path, [place for place in found if place.suffix in count], sensor)


def _open_files(path: Path, files: list[Place], sensor: Sensor | None) -> EventSource:
    kind, read = READERS[files[0].suffix]
    if files[0].suffix == ".hdf5":
        return LabelledFiles(kind, path, _first_copies(path, files), read, sensor, hdf5.read_target)
    if files[0].suffix == ".aedat":
        with whole_recording(files[0]):
            beginning = files[0].content()[:16]
        kind, read = next((form for magic, form in MAGICS.items() if beginning.startswith(magic)), (kind, read))
    loose = [place for place in files if not place.folder]
    if loose:
        raise Mistake(f"{loose[0]}: in no class folder; a recording's folder says what it shows")
    if files[0].suffix == ".bin":
        sensor = sensor or atis.sensor_of([place.folder for place in files])
        kind = {atis.N_MNIST: "n-mnist", atis.N_CALTECH101: "n-caltech101"}.get(sensor, kind)
    return ClassFolders(kind, path, files, read, sensor)


def _first_copies(path: Path, files: list[Place]) -> list[Place]:
    """Those of the files that tonic numbered `INDEX_0.hdf5`, in the order of the folders and of the indices."""
    numbered = [(place, CACHED.fullmatch(place.inner.stem)) for place in files]
    first = [(place.inner.parent, int(match[1]), place) for place, match in numbered if match]
    if not first:
        raise Mistake(f"{path}: no INDEX_0.hdf5 in it, as tonic's DiskCachedDataset writes them")
    return [place for *_, place in sorted(first, key=lambda row: row[:2])]

"""Recordings of event cameras that the tests write, byte by byte, in the forms that data sets come in."""

import io
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tdkd_dist.data.events.recording import Events

# spikingjelly's data sets import torchaudio, for sound: it refuses to load beside a torch for another CUDA.
held = sys.modules.get("torchaudio")
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
try:
    import spikingjelly.datasets  # noqa: F401
finally:
    del sys.modules["torchaudio"]
    if held is not None:
        sys.modules["torchaudio"] = held

AEDAT2 = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n#End Of ASCII Header\r\n"
AEDAT3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
DV = """<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">
<node name="0" path="/mainloop/Recorder/outInfo/0/"><attr key="compression" type="string">NONE</attr>
<attr key="originalModuleName" type="string">capture</attr><attr key="originalOutputName" type="string">events</attr>
<attr key="typeDescription" type="string">Events.</attr><attr key="typeIdentifier" type="string">EVTS</attr>
<node name="info" path="/mainloop/Recorder/outInfo/0/info/"><attr key="sizeX" type="int">{width}</attr>
<attr key="sizeY" type="int">{height}</attr><attr key="source" type="string">DVS</attr></node></node></node></dv>"""


def draw(seed: int, count: int = 500, height: int = 128, width: int = 128, duration: int = 300_000) -> Events:
    """Events in the order of their times, of which some are the same."""
    rng = np.random.default_rng(seed)
    return Events(
        np.sort(rng.integers(1, duration, count)),
        rng.integers(0, width, count).astype(np.int16),
        rng.integers(0, height, count).astype(np.int16),
        rng.integers(0, 2, count).astype(np.uint8),
    )


def wide(events: Events) -> list[np.ndarray]:
    """t, x, y and p as integers that do not overflow."""
    return [column.astype(np.int64) for column in events]


def as_aedat2(events: Events) -> bytes:
    t, x, y, p = wide(events)
    address = (127 - x) << 8 | (127 - y) << 1 | (1 - p)
    return AEDAT2 + np.stack([address, t], axis=1).astype(">u4").tobytes()


def as_aedat3(events: Events, each: int = 100, valid: int = 1) -> bytes:
    """Packets of `each` events, and one of another kind among them."""
    t, x, y, p = wide(events)
    words = np.stack([x << 17 | y << 2 | p << 1 | valid, t & 0x7FFFFFFF], axis=1).astype("<u4")
    content = AEDAT3 + struct.pack("<hhiiiiii", 0, 1, 8, 4, 0, 1, 1, 1) + bytes(8)
    for begin in range(0, len(t), each):
        part = words[begin : begin + each]
        overflow = int(t[begin]) >> 31
        content += struct.pack("<hhiiiiii", 1, 1, 8, 4, overflow, len(part), len(part), len(part)) + part.tobytes()
    return content


def as_aedat4(events: Events, height: int = 128, width: int = 128) -> bytes:
    """Uncompressed: a size-prefixed flatbuffer `IOHE`, then packets that are a size-prefixed flatbuffer `EVTS` each."""
    node = DV.format(height=height, width=width).encode()
    vtable = struct.pack("<5H", 10, 20, 4, 12, 8)
    table = struct.pack("<iiIq", 10, 0, 12, -1)
    header = struct.pack("<I4s6x", 24, b"IOHE") + vtable + table + struct.pack("<I", len(node)) + node + b"\0"
    content = b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header
    rows = np.zeros(len(events.t), dtype=[("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "?"), ("pad", "V3")])
    for name in "txyp":
        rows[name] = getattr(events, name)
    # The root's offset, the identifier, padding, a vtable of one field, the table, the vector's length, its structures.
    packet = struct.pack("<I4s2xHHHiII", 16, b"EVTS", 6, 8, 4, 6, 4, len(rows)) + rows.tobytes()
    return content + struct.pack("<iiI", 0, len(packet) + 4, len(packet)) + packet


def as_bin(events: Events) -> bytes:
    t, x, y, p = wide(events)
    return np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], axis=1).astype(np.uint8).tobytes()


def by_name(events: Events) -> dict[str, np.ndarray]:
    return dict(zip("txyp", wide(events), strict=True))


def as_npz(events: Events) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **by_name(events))
    return file.getvalue()


CLASSES = ["bird", "cat", "ship"]
PER_CLASS = 4
RECORDINGS = [(name, i, draw(10 * c + i, count=60 + i)) for c, name in enumerate(CLASSES) for i in range(PER_CLASS)]
"""The class of each, its number in the class, its events."""
LABELS = np.repeat(np.arange(len(CLASSES)), PER_CLASS)


def make_folders(root: Path, suffix: str, write: Callable[[Events], bytes]) -> Path:
    for name, i, events in RECORDINGS:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{name}_{i}{suffix}").write_bytes(write(events))
    return root


def make_zips(root: Path) -> Path:
    """A zip a class, as CIFAR10-DVS is handed out, with what macOS packs beside."""
    root.mkdir(exist_ok=True)
    for name in CLASSES:
        with zipfile.ZipFile(root / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for _, i, events in [row for row in RECORDINGS if row[0] == name]:
                archive.writestr(f"{name}/{name}_{i}.aedat", as_aedat2(events))
                archive.writestr(f"__MACOSX/{name}/._{name}_{i}.aedat", b"\0\5\26\7")
    return root


def make_tar(path: Path, folder: str = "data") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:" if path.suffix == ".tar" else f"w:{path.suffix[1:]}") as tar:
        for name, i, events in reversed(RECORDINGS):
            info = tarfile.TarInfo(f"{folder}/{name}/{name}_{i}.aedat")
            info.size = len(as_aedat2(events))
            tar.addfile(info, io.BytesIO(as_aedat2(events)))
    return path


def make_cache(root: Path, targets: list[object], copies: int = 1) -> Path:
    from tonic.cached_dataset import save_to_disk_cache
    from tonic.io import make_structured_array

    root.mkdir(parents=True, exist_ok=True)
    for i, ((_, _, events), target) in enumerate(zip(RECORDINGS, targets, strict=True)):
        data = make_structured_array(events.x, events.y, events.t, events.p)
        for copy in range(copies):
            save_to_disk_cache(data if copy == 0 else data[::2], target, root / f"{i}_{copy}.hdf5")
    return root

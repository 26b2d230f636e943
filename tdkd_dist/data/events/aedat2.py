"""AEDAT 2.0, as jAER writes it from a DVS128: CIFAR10-DVS, and others' class folders.

`#` lines, then pairs of big-endian 32-bit numbers: an address and a time in microseconds.
"""

import numpy as np

from tdkd_dist.data.events.recording import Broken, Events, Sensor, as_events

SENSOR = (128, 128)
MAGIC = b"#!AER-DAT2.0"
SYNC = 0x8000
"""jAER's mark of what no pixel sent (`DVS128.java`)."""


def read(content: bytes) -> tuple[Events, Sensor]:
    """The events, mapped as spikingjelly maps CIFAR10-DVS's.

    x = 127 - (a >> 8 & 127), y = 127 - (a >> 1 & 127), p = 1 - (a & 1). jAER's own picture of a DVS128 has the columns
    and the rows the other way round; results on CIFAR10-DVS are on these. Raises `Broken`.
    """
    begin = _header(content)
    if (len(content) - begin) % 8:
        raise Broken(f"truncated: {len(content) - begin} bytes after its header are no whole number of events")
    address, time = np.frombuffer(content, dtype=">u4", offset=begin).reshape(-1, 2).T.astype(np.uint32)
    if len(address) and int(address.max()) > 0xFFFF:
        first = int(np.argmax(address > 0xFFFF))
        raise Broken(f"event {first} has the address {address[first]:#x}, which no DVS128 has")
    pixel = address < SYNC
    if not pixel.all():
        address, time = address[pixel], time[pixel]
    return as_events(time, 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)), SENSOR


def _header(content: bytes) -> int:
    """Where the events begin: an address's first byte is 0, and so no `#`."""
    if not content.startswith(MAGIC):
        raise Broken(f"begins with {content[: len(MAGIC)]!r}, not with {MAGIC.decode()}")
    end = 0
    while content[end : end + 1] == b"#":
        end = content.find(b"\n", end) + 1
        if end == 0:
            raise Broken("truncated: its header does not end")
    return end

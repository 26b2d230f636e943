"""AEDAT 3.1, as cAER writes it (DVS128 Gesture): `#` lines, then packets of little-endian events.

The format: libcaer's `events/common.h` and `events/polarity.h`.
"""

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.events.recording import Broken, Events, as_events

MAGIC = b"#!AER-DAT3.1"
END = b"#!END-HEADER\r\n"
PACKET = struct.Struct("<hhiiiiii")
"""Type, source, bytes an event, where in an event its time is, overflows of the time, capacity, events, valid ones."""
POLARITY, POLARITY_BYTES = 1, 8


def read(content: bytes) -> tuple[Events, None]:
    """The valid polarity events; how large the sensor is, the file does not say. Raises `Broken`.

    An event is a word (valid: bit 0, polarity: bit 1, y: bits 2 to 16, x: bits 17 to 31) and 31 bits of time.
    """
    packets = list(_polarity_packets(content))
    words = np.concatenate([np.empty((0, 2), dtype="<u4"), *(events for events, _ in packets)])
    overflows = np.repeat([overflow for _, overflow in packets], [len(events) for events, _ in packets]).astype(
        np.int64
    )
    valid = words[:, 0] & 1 == 1
    word, time = words[valid, 0], (overflows << 31 | words[:, 1].astype(np.int64))[valid]
    return as_events(time, word >> 17 & 0x7FFF, word >> 2 & 0x7FFF, word >> 1 & 1), None


def _polarity_packets(content: bytes) -> Iterator[tuple[NDArray[np.uint32], int]]:
    """The events [n, 2] of each packet of polarity events, and how often their time has overflowed before it."""
    at = _header(content)
    while at < len(content):
        if at + PACKET.size > len(content):
            raise Broken(f"truncated within the packet's header at byte {at}")
        kind, _, size, _, overflow, capacity, number, _ = PACKET.unpack_from(content, at)
        if size <= 0 or not 0 <= number <= capacity or overflow < 0:
            raise Broken(f"the packet at byte {at} claims {number} of {capacity} events of {size} bytes")
        data, at = at + PACKET.size, at + PACKET.size + size * capacity
        if at > len(content):
            raise Broken(f"truncated: the packet at byte {data - PACKET.size} ends {at - len(content)} bytes later")
        if kind == POLARITY:
            if size != POLARITY_BYTES:
                raise Broken(
                    f"the packet at byte {data - PACKET.size} has events of {size} bytes, not {POLARITY_BYTES}"
                )
            yield np.frombuffer(content, dtype="<u4", count=2 * number, offset=data).reshape(-1, 2), overflow


def _header(content: bytes) -> int:
    """Where the packets begin."""
    if not content.startswith(MAGIC):
        raise Broken(f"begins with {content[: len(MAGIC)]!r}, not with {MAGIC.decode()}")
    end = content.find(END)
    if end < 0:
        raise Broken(f"truncated: its header does not end with {END.decode().strip()}")
    return end + len(END)

"""AEDAT 4, as DV writes it: compressed flatbuffers, decoded by the package `aedat`."""

import tempfile
from importlib import import_module
from typing import Any

import numpy as np

from tdkd_dist.data.events.apart import apart
from tdkd_dist.data.events.recording import MOST_EVENTS, Broken, Events, Sensor, as_events
from tdkd_dist.mistakes import Mistake


def read(content: bytes) -> tuple[Events, Sensor]:
    """The events of the first stream of such, and its sensor. Raises `Broken`; `Mistake` where `aedat` is missing."""
    try:
        decoder_of = import_module("aedat").Decoder
    except ImportError as error:
        raise Mistake("reading AEDAT 4 needs the package aedat: pip install aedat") from error
    with tempfile.NamedTemporaryFile(suffix=".aedat4") as file:  # it reads files with names only
        file.write(content)
        file.flush()
        return apart(lambda: _decode(decoder_of(file.name)))


def _decode(decoder: Any) -> tuple[Events, Sensor]:
    streams = {i: stream for i, stream in decoder.id_to_stream().items() if stream["type"] == "events"}
    if not streams:
        raise Broken("no stream of events in it")
    chosen = min(streams)
    packets, count = [], 0
    for packet in decoder:
        if packet["stream_id"] == chosen:
            packets.append(packet["events"])
            count += len(packets[-1])
            if count > MOST_EVENTS:
                raise Broken(f"more than {MOST_EVENTS:,} events")
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(events[name] for events in packets)])
        for name, dtype in (("t", np.uint64), ("x", np.uint16), ("y", np.uint16), ("on", np.bool_))
    }
    sensor = int(streams[chosen]["height"]), int(streams[chosen]["width"])
    return as_events(columns["t"], columns["x"], columns["y"], columns["on"]), sensor

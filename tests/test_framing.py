"""Frames of events. Oracles: a loop over the events, spikingjelly, tonic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import draw, wide

from tdkd_dist.data.events.framing import FramingRule, frame, framed
from tdkd_dist.data.events.recording import Events
from tdkd_dist.mistakes import Mistake

SENSOR = (12, 20)


def by_loop(events: Events, rule: FramingRule, sensor: tuple[int, int]) -> np.ndarray:
    """Every event on its own, in Python's integers."""
    rows = list(zip(*(column.tolist() for column in wide(events)), strict=True))
    if rule.window_us is not None and rows:
        rows = [row for row in rows if row[0] < rows[0][0] + rule.window_us]
    height, width = rule.size or sensor
    frames = np.zeros((rule.frames, 2, height, width), dtype=np.int64)
    each = len(rows) // rule.frames
    long = (rows[-1][0] - rows[0][0]) // rule.frames if rows else 0
    for i, (t, x, y, p) in enumerate(rows):
        step, length = (i, each) if rule.by == "number" else (t - rows[0][0], long)
        which = min(step // length, rule.frames - 1) if length > 0 else rule.frames - 1
        frames[which, p, y * height // sensor[0], x * width // sensor[1]] += 1
    return frames


counts = st.one_of(st.integers(0, 12), st.integers(0, 400))


@given(
    counts,
    st.integers(1, 20),
    st.sampled_from(["number", "time"]),
    st.sampled_from([None, 1, 500, 10**9]),
    st.sampled_from([None, (12, 20), (6, 4), (1, 1)]),
    st.sampled_from([2, 30, 5000]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_frames_are_what_a_loop_counts(count, frames, by, window, size, duration, seed):
    events = draw(seed, count, *SENSOR, duration)
    rule = FramingRule(frames, by, window, size)
    ours = frame(events, rule, SENSOR)
    assert np.array_equal(ours, by_loop(events, rule, SENSOR))
    assert ours.dtype == np.min_scalar_type(int(ours.max()))
    assert framed(events, rule, SENSOR).tobytes() == ours.tobytes()


@pytest.mark.parametrize("by", ["number", "time"])
@pytest.mark.parametrize("frames", [1, 4, 7, 10])
def test_frames_are_spikingjellys(by, frames):
    from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number

    for seed in range(20):
        events = draw(seed, 997, *SENSOR)
        columns = dict(zip("txyp", wide(events), strict=True))
        theirs = integrate_events_by_fixed_frames_number(columns, by, frames, *SENSOR)
        assert np.array_equal(frame(events, FramingRule(frames, by), SENSOR), theirs)


def test_frames_by_number_are_tonics_where_nothing_remains():
    from tonic.functional import to_frame_numpy
    from tonic.io import make_structured_array

    events = draw(0, 1000, *SENSOR)
    theirs = to_frame_numpy(
        make_structured_array(events.x, events.y, events.t, events.p), (SENSOR[1], SENSOR[0], 2), n_event_bins=10
    )
    assert np.array_equal(frame(events, FramingRule(10), SENSOR), theirs)


def test_what_remains_goes_to_the_last_frame():
    events = draw(0, 49, *SENSOR)
    assert frame(events, FramingRule(10), SENSOR).sum((1, 2, 3)).tolist() == [4] * 9 + [13]
    few = draw(0, 3, *SENSOR)
    assert frame(few, FramingRule(10), SENSOR).sum((1, 2, 3)).tolist() == [0] * 9 + [3]


def test_a_silent_stretch_is_zeros():
    t = np.array([0, 1, 2, 95, 99, 100])
    events = Events(t, *(np.zeros(6, dtype) for dtype in (np.int16, np.int16, np.uint8)))
    # spikingjelly raises IndexError here.
    assert frame(events, FramingRule(10, "time"), SENSOR).sum((1, 2, 3)).tolist() == [3] + [0] * 8 + [3]
    assert frame(events, FramingRule(3, "time", window_us=99), SENSOR).sum((1, 2, 3)).tolist() == [3, 0, 1]


@pytest.mark.parametrize("by", ["number", "time"])
def test_an_empty_recording_is_frames_of_zeros(by):
    frames = frame(draw(0, 0), FramingRule(4, by, window_us=5), SENSOR)
    assert frames.shape == (4, 2, *SENSOR)
    assert frames.dtype == np.uint8
    assert not frames.any()


def test_times_that_go_backwards_lose_no_event():
    events = draw(0, 100, *SENSOR)
    mixed = Events(np.random.default_rng(0).permutation(events.t), *events[1:])
    for by in ("number", "time"):
        assert frame(mixed, FramingRule(7, by), SENSOR).sum() == 100


def test_counts_widen_as_they_must():
    for count, dtype in ((255, np.uint8), (256, np.uint16), (70_000, np.uint32)):
        events = Events(np.arange(count), *(np.zeros(count, dtype) for dtype in (np.int16, np.int16, np.uint8)))
        assert frame(events, FramingRule(1), SENSOR).dtype == dtype


def test_frames_that_are_there_must_be_as_the_rule_wants_them():
    frames = np.ones((10, 2, *SENSOR), dtype=np.uint8)
    assert framed(frames, FramingRule(10), SENSOR) is frames
    for rule in (FramingRule(9), FramingRule(10, window_us=5), FramingRule(10, size=(6, 10))):
        with pytest.raises(Mistake, match="take the events themselves"):
            framed(frames, rule, SENSOR)


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"frames": 1 << 20},
        {"by": "magic"},
        {"window_us": 0},
        {"window_us": 1 << 70},
        {"size": (0, 5)},
    ],
)
def test_a_wrong_rule_is_refused(wrong):
    with pytest.raises(Mistake):
        FramingRule(**{"frames": 4} | wrong)


def test_what_does_not_fit_is_refused():
    with pytest.raises(Mistake, match="no multiple"):
        frame(draw(0, 5), FramingRule(4, size=(48, 48)), (128, 128))
    with pytest.raises(Mistake, match="too much for memory"):
        frame(draw(0, 5), FramingRule(10_000), (4096, 4096))
    assert FramingRule(10, "time", 1000).text == "10 frames by time of the first 1000 us"

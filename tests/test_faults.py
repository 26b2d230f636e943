"""CI's share of tools/bench/fault_campaign.py: hostile input is read, or refused in a line."""

import faults
import pytest
from fault_campaign import attempt
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("area", faults.areas())
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_hostile_input_is_read_or_refused_in_a_line(area, seed):
    attempt(faults.areas()[area], str(seed))

"""The ring holds every sum that its rules admit, and refuses the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.fixedpoint import capacity, from_ring, to_ring


@given(parties=st.integers(1, 100), data=st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_sums_within_capacity_are_exact(parties, data) -> None:
    limit = capacity(parties)
    summands = data.draw(st.lists(st.integers(-limit, limit), min_size=parties, max_size=parties))
    total = np.zeros(1, np.uint64)
    for summand in summands:
        total += to_ring(np.array([summand], np.int64), parties=parties)
    assert int(from_ring(total)[0]) == sum(summands)


@pytest.mark.parametrize("parties", [1, 2, 3, 5, 7, 10, 99, 100])
def test_the_extreme_sum_is_exact_and_one_more_is_refused(parties) -> None:
    limit = capacity(parties)
    for sign in (1, -1):
        edge = to_ring(np.array([sign * limit], np.int64), parties=parties)
        total = np.zeros(1, np.uint64)
        for _ in range(parties):
            total += edge
        assert int(from_ring(total)[0]) == sign * limit * parties
        if parties > 1:
            _refused("FIXED-RANGE", np.array([sign * (limit + 1)], np.int64), parties)


def test_the_lowest_int64_has_no_absolute_value() -> None:
    _refused("FIXED-RANGE", np.array([-(2**63)], np.int64), 1)


@pytest.mark.parametrize("bad", [0.5, np.nan, np.inf, -np.inf, 2.0**53 + 2, -(2.0**60)])
def test_floats_are_whole_and_exact(bad) -> None:
    _refused("FIXED-WHOLE", np.array([1.0, bad]), 3)


def test_whole_floats_equal_their_integers() -> None:
    values = np.array([0.0, -0.0, -3.0, 2.0**53, -(2.0**53)])
    ring = to_ring(values, parties=100)
    assert np.array_equal(from_ring(ring), values.astype(np.int64))
    assert ring.dtype == np.uint64


def test_the_input_is_left_alone_and_empty_is_fine() -> None:
    values = np.array([1, -1], np.int64)
    ring = to_ring(values, parties=2)
    ring += np.uint64(5)
    assert values.tolist() == [1, -1]
    assert to_ring(np.zeros(0, np.int64), parties=2).size == 0


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.float32, object])
def test_other_types_are_refused(dtype) -> None:
    _refused("FIXED-TYPE", np.zeros(2, dtype), 2)


def test_wrong_types_on_the_way_back_and_no_parties() -> None:
    with pytest.raises(ProtocolError, match="FIXED-TYPE"):
        from_ring(np.zeros(1, np.int64))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="FIXED-PARTIES"):
        capacity(0)


def _refused(code: str, values: np.ndarray, parties: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        to_ring(values, parties=parties)
    assert caught.value.code == code

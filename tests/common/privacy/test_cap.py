"""The lifetime cap: the filter's own rule, and a form that says the same floats again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.accountant import RdpFilter
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.cap import Cap, private

CAP = Cap(epsilon=3.1, delta=1e-6, hospitals=2)


def test_what_is_used_up_is_what_the_filter_no_longer_allows() -> None:
    event = Event.gaussian(9.0)
    most = 1
    while RdpFilter(epsilon=3.1, delta=1e-6, hospitals=2).allows([(event, most + 1)]):
        most += 1
    assert CAP.allows([(event, most)]) and not CAP.allows([(event, most + 1)])
    assert CAP.used([(event, most)]) <= 1 < CAP.used([(event, most + 1)])
    assert math.isclose(CAP.used([(event, 1)]) * most, CAP.used([(event, most)]))


def test_what_has_no_price_fits_no_cap() -> None:
    free = [(Event.non_private(), 3)]
    assert CAP.used(free) == 0.0 and private(free) == [] and not CAP.allows(free)


def test_it_says_the_same_numbers_again() -> None:
    for cap in (CAP, Cap(epsilon=0.1 + 0.2, delta=1e-9 / 3, hospitals=1)):
        assert Cap.from_json(cap.to_json()) == cap
        assert not any(isinstance(value, float) for value in cap.to_json().values())


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": "inf"},
        {"epsilon": "nan"},
        {"epsilon": "-1"},
        {"epsilon": 3.0},
        {"epsilon": "3" + "0" * 60},
        {"delta": "0.5"},
        {"delta": "0"},
        {"hospitals": 0},
        {"hospitals": True},
        {"hospitals": "2"},
        {"more": 1},
    ],
)
def test_no_other_form_is_a_cap(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="CAP-FORM"):
        Cap.from_json(CAP.to_json() | change)


@pytest.mark.parametrize("value", [None, 3, "cap", [], {}, {"epsilon": "1"}])
def test_nor_is_anything_else(value: Any) -> None:
    with pytest.raises(ProtocolError, match="CAP-FORM"):
        Cap.from_json(value)

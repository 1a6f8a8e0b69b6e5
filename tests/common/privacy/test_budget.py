"""Events and statements: born valid or refused, one spelling each, numbers never rounded down."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.budget import WHOLE, Event, Statement, rate_of, rounded_up
from cohortium.common.protocol.messages import canonical

NOISES = st.floats(min_value=1e-6, max_value=1e9)
EVENTS = st.one_of(
    st.builds(Event.gaussian, NOISES),
    st.builds(Event.poisson_gaussian, st.integers(1, WHOLE - 1), NOISES),
    st.just(Event.non_private()),
)


@given(event=EVENTS)
def test_json_round_trip_is_exact_and_canonical(event: Event) -> None:
    text = canonical(event.to_json())  # refuses floats
    assert Event.from_json(json.loads(text)) == event


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 0.0},
        {"kind": "gaussian", "noise_multiplier": -1.0},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "gaussian", "noise_multiplier": math.inf},
        {"kind": "gaussian", "noise_multiplier": 1},
        {"kind": "gaussian", "noise_multiplier": 1.0, "rate": 1},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "rate": 0},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "rate": -1},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "rate": WHOLE + 1},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "rate": 0.5},
        {"kind": "non-private", "noise_multiplier": 1.0},
        {"kind": "non-private", "rate": 5},
    ],
)
def test_a_bad_event_is_not_born(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="EVENT-"):
        Event(**fields)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "laplace"},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.5},
        {"kind": "gaussian", "noise_multiplier": "1.5"},  # another spelling of 0x1.8p+0
        {"kind": "gaussian", "noise_multiplier": "0x1.8000000000000p+0", "rate": str(WHOLE)},
        {"kind": "gaussian", "noise_multiplier": "0x1.8000000000000p+0", "more": "1"},
        {"kind": "gaussian", "noise_multiplier": "nan"},
        {"kind": "gaussian", "noise_multiplier": "0x1p+99999"},
        {"kind": "poisson-gaussian", "noise_multiplier": "0x1.8000000000000p+0", "rate": "+5"},
        {"kind": "poisson-gaussian", "noise_multiplier": "0x1.8000000000000p+0", "rate": 5},
        {"kind": ["gaussian"]},
    ],
)
def test_unknown_or_misspelt_json_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError, match="EVENT-"):
        Event.from_json(value)


@given(probability=st.floats(min_value=1e-15, max_value=1.0))
def test_a_rate_is_the_floor_and_its_price_is_never_below(probability: float) -> None:
    rate = rate_of(probability)
    assert Fraction(rate, WHOLE) <= Fraction(probability) < Fraction(rate + 1, WHOLE)
    if rate < WHOLE:
        assert Fraction(Event.poisson_gaussian(rate, 1.0).probability) >= Fraction(rate, WHOLE)


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, math.nan, math.inf, 1e-30])
def test_a_rate_outside_0_to_1_is_refused(probability: float) -> None:
    with pytest.raises(ProtocolError):
        rate_of(probability)


def statement(**fields: Any) -> Statement:
    whole = {
        "epsilon": 2.9981,
        "delta": 1e-5,
        "unit": "patient",
        "adjacency": "add-remove",
        "mode": "secure-sum",
    }
    if fields.get("mode") != "local":
        whole |= {"survivors": 4, "colluders": 1, "sites": 5}
    return Statement(**(whole | fields))


def test_the_sentence_says_on_whom_a_secure_sum_depends() -> None:
    text = statement().sentence()
    assert "from this one run" in text
    assert "as long as at least 4 of 5 sites stay to the end of each round and at most 1 of them sides with the" in text
    assert "none of them sides with the coordinator" in statement(colluders=0).sentence()
    assert "at most 2 of them side with the coordinator" in statement(colluders=2).sentence()
    assert "from this one run" in statement(mode="local").sentence()


def test_the_sentence_says_all_five_things() -> None:
    text = statement(hospitals=2).sentence()
    for word in ("2.999", "1e-05", "patient", "add-remove", "secure-sum", "2 hospitals"):
        assert word in text
    assert "one record" in statement(unit="row").sentence()
    assert "dishonest" in statement(mode="local").sentence()
    assert "No privacy guarantee" in statement(epsilon=math.inf).sentence()


@given(epsilon=st.floats(min_value=0, max_value=1e6))
def test_a_printed_epsilon_is_never_below_the_real_one(epsilon: float) -> None:
    assert Fraction(epsilon) <= Fraction(rounded_up(epsilon)) < Fraction(epsilon) + Fraction(1, 1000)


@pytest.mark.parametrize(
    "fields",
    [
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"unit": ""},
        {"adjacency": "zero-out"},
        {"mode": "trusted"},
        {"hospitals": 0},
        {"survivors": None},
        {"sites": None},
        {"colluders": None},
        {"survivors": 6},
        {"colluders": 4},
        {"colluders": -1},
        {"colluders": True},
        {"mode": "local", "survivors": 4},
    ],
)
def test_a_bad_statement_is_not_born(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="STATEMENT-"):
        statement(**fields)


@pytest.mark.parametrize("name", list(statement().to_json()))
def test_a_statement_that_leaves_something_out_is_not_read(name: str) -> None:
    value = statement().to_json()
    del value[name]
    with pytest.raises(ProtocolError, match="STATEMENT-"):
        Statement.from_json(value)


def test_statement_round_trip() -> None:
    for value in (statement(), statement(epsilon=math.inf, hospitals=3), statement(mode="local")):
        assert Statement.from_json(json.loads(canonical(value.to_json()))) == value

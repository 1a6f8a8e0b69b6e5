"""Clinical rules: read with the dictionary, refused with a fix, and judged row by row as a person would."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.common.encoding import grids
from cohortium.common.errors import CohortiumError, DictionaryError, TableError
from cohortium.common.rule_checks import RuleResult, breaking_rows, check_rules
from cohortium.common.rules import Difference, IfThen, Order, sentence
from cohortium.common.schema import Schema

DICTIONARY: dict[str, Any] = {
    "name": "ward",
    "missingValues": ["", "NA"],
    "fields": [
        {"name": "pid", "type": "string", "role": "identifier"},
        {"name": "sex", "type": "string", "constraints": {"enum": ["female", "male"]}},
        {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 110, "required": True}},
        {"name": "pregnant", "type": "string", "constraints": {"enum": ["no", "yes", "unknown"]}},
        {"name": "died", "type": "boolean"},
        {"name": "grade", "type": "integer", "constraints": {"enum": [1, 2, 3]}},
        {"name": "low", "type": "number", "constraints": {"minimum": 0, "maximum": 300}},
        {"name": "high", "type": "number", "constraints": {"minimum": 0, "maximum": 300}},
        {"name": "onset", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2021-12-31"}},
        {"name": "admitted", "type": "datetime", "constraints": {"minimum": "2020-01-01", "maximum": "2021-12-31"}},
        {"name": "left", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2021-12-31"}},
    ],
}
RULES: list[dict[str, Any]] = [
    {"name": "dates", "order": ["onset", "admitted", "left"]},
    {"name": "pressure", "order": ["low", "high"], "strict": True},
    {"name": "stay", "difference": ["left", "onset"], "minimum": 0, "maximum": 30},
    {"name": "men", "if": {"sex": "male"}, "then": {"pregnant": ["no"]}},
    {"name": "children", "if": {"age": {"max": 12}}, "then": {"pregnant": "no"}},
    {"name": "the dead", "if": {"died": True}, "then": {"left": {"missing": False}, "grade": {"minimum": 2}}},
    {"name": "the living", "if": {"died": "false", "sex": ["female", "male"]}, "then": {"grade": [1, 2]}},
    {"name": "old", "if": {"onset": {"minimum": "2021-01-01"}}, "then": {"low": None}},
]


def with_rules(*rules: Any) -> dict[str, Any]:
    return {**copy.deepcopy(DICTIONARY), "rules": list(rules)}


def judge(rule: dict[str, Any], **columns: list[Any]) -> RuleResult:
    """One rule on a table of the given columns; all others are empty."""
    schema = Schema.from_dict(with_rules(rule))
    rows = len(next(iter(columns.values())))
    table = pd.DataFrame({c.name: columns.get(c.name, [None] * rows) for c in schema.modelled})
    (result,) = check_rules(schema, table)
    assert int(breaking_rows(schema, table).sum()) == result.broken
    return result


def test_rules_travel_with_the_dictionary(tmp_path: Path) -> None:
    schema = Schema.from_dict(with_rules(*RULES))
    assert [type(rule) for rule in schema.rules] == [Order, Order, Difference, *[IfThen] * 5]
    schema.save(tmp_path / "d.json")
    again = Schema.load(tmp_path / "d.json")
    assert again == schema and again.digest() == schema.digest() and hash(again) == hash(schema)
    assert grids(again)
    assert schema.digest() != Schema.from_dict(DICTIONARY).digest()
    assert schema.digest() != Schema.from_dict(with_rules(*RULES[:-1])).digest()
    assert Schema.from_dict(with_rules()).digest() == Schema.from_dict(DICTIONARY).digest()


def test_a_rule_leaves_with_its_column() -> None:
    schema = Schema.from_dict(with_rules(*RULES)).without(["pregnant", "low"])
    assert [rule.name for rule in schema.rules] == ["dates", "stay", "the dead", "the living"]
    assert Schema.from_dict(schema.to_dict()) == schema


def test_a_rule_reads_as_a_sentence() -> None:
    schema = Schema.from_dict(with_rules(*RULES))
    assert [sentence(rule, schema.columns) for rule in schema.rules] == [
        "onset ≤ admitted ≤ left",
        "low < high",
        "0 days ≤ left − onset ≤ 30 days",
        "if sex is male, then pregnant is no",
        "if age ≤ 12, then pregnant is no",
        "if died is true, then left is there and 2 ≤ grade",
        "if died is false and sex is female or male, then grade is 1 or 2",
        "if 2021-01-01 ≤ onset, then low is missing",
    ]


MISTAKES: list[tuple[Any, str]] = [
    ({"order": ["low", "high"]}, "has no name"),
    ("order", "has no name"),
    ({"name": "x", "ordre": ["low", "high"]}, "'order'"),
    ({"name": "x"}, "one kind"),
    ({"name": "x", "order": ["low", "high"], "if": {}}, "one kind"),
    ({"name": "x", "order": ["low", "high"], "then": {}}, "remove then"),
    ({"name": "x", "order": ["low", "hihg"]}, "did you mean 'high'?"),
    ({"name": "x", "order": ["low"]}, "two columns"),
    ({"name": "x", "order": ["low", "low"]}, "two columns"),
    ({"name": "x", "order": "low"}, "list of columns"),
    ({"name": "x", "order": ["low", "high"], "strict": 1}, "true or false"),
    ({"name": "x", "order": ["low", "left"]}, "one sort"),
    ({"name": "x", "order": ["sex", "left"]}, "no order"),
    ({"name": "x", "order": ["pid", "left"]}, "identifier"),
    ({"name": "x", "difference": ["left", "onset"]}, "minimum or a maximum"),
    ({"name": "x", "difference": ["left", "onset"], "minimum": "0"}, "numbers"),
    ({"name": "x", "difference": ["left", "onset"], "minimum": 3, "maximum": 2}, "above"),
    ({"name": "x", "difference": ["left", "onset", "admitted"], "minimum": 3}, "two columns"),
    ({"name": "x", "if": {"sex": "male"}}, "JSON objects"),
    ({"name": "x", "if": {}, "then": {"sex": "male"}}, "JSON objects"),
    ({"name": "x", "if": {"sex": "mael"}, "then": {"pregnant": "no"}}, "did you mean 'male'?"),
    ({"name": "x", "if": {"sex": "male"}, "then": {"pregnant": []}}, "empty list"),
    ({"name": "x", "if": {"sex": "male"}, "then": {"pregnant": True}}, "no level"),
    ({"name": "x", "if": {"sex": {"maximum": 3}}, "then": {"pregnant": "no"}}, "no range"),
    ({"name": "x", "if": {"age": {"maximum": 12, "max": 13}}, "then": {"pregnant": "no"}}, "not understood"),
    ({"name": "x", "if": {"age": {"most": 12}}, "then": {"pregnant": "no"}}, "not understood"),
    ({"name": "x", "if": {"age": {"maximum": "12"}}, "then": {"pregnant": "no"}}, "not a integer"),
    ({"name": "x", "if": {"age": {"minimum": 111}}, "then": {"pregnant": "no"}}, "no value"),
    ({"name": "x", "if": {"age": {"minimum": 50, "maximum": 40}}, "then": {"pregnant": "no"}}, "above"),
    ({"name": "x", "if": {"age": None}, "then": {"pregnant": "no"}}, "never missing"),
    ({"name": "x", "if": {"age": {"missing": 1}}, "then": {"pregnant": "no"}}, "true or false"),
    ({"name": "x", "if": {"age": [1, 2]}, "then": {"pregnant": "no"}}, "no level"),
    ({"name": "x", "if": {"grade": 4}, "then": {"pregnant": "no"}}, "levels: 1, 2, 3"),
    ({"name": "x", "if": {"left": {"minimum": "1.2.2020"}}, "then": {"pregnant": "no"}}, "not a date"),
]


@pytest.mark.parametrize(("rule", "word"), MISTAKES)
def test_a_rule_that_cannot_be_judged_is_refused_with_a_fix(rule: Any, word: str) -> None:
    with pytest.raises(DictionaryError) as caught:
        Schema.from_dict(with_rules(rule), where="ward.json")
    assert caught.value.code == "DICT-RULE" and caught.value.hint
    assert word in f"{caught.value.sentence} {caught.value.hint}"
    named = isinstance(rule, dict) and "name" in rule
    assert caught.value.where == (("ward.json:rule x" if named else "ward.json"),)


def test_two_rules_of_one_name_and_a_mistyped_list() -> None:
    with pytest.raises(DictionaryError, match="two rules"):
        Schema.from_dict(with_rules(RULES[0], RULES[0]))
    with pytest.raises(DictionaryError, match="'rule'"):
        Schema.from_dict({**DICTIONARY, "rule": RULES})
    with pytest.raises(DictionaryError, match="not a list"):
        Schema.from_dict({**DICTIONARY, "rules": {"name": "x"}})


def test_dates_in_order_and_a_datetime_is_its_day() -> None:
    rule = RULES[0]
    day, later, nothing = "2020-03-01", "2020-03-02", None
    found = judge(
        rule,
        onset=[day, day, later, nothing, day, later, nothing],
        admitted=[
            f"{day}T15:00:00",
            f"{later}T01:00:00",
            nothing,
            f"{later}T00:00:00",
            nothing,
            f"{day}T23:59:59",
            day,
        ],
        left=[day, day, day, day, nothing, nothing, nothing],
    )
    # Right; admitted after leaving; onset after leaving, seen past the empty cell; admitted after leaving; too little
    # to judge; onset after admission; too little to judge.
    assert found == RuleResult(name="dates", applicable=5, broken=4) and found.share == 0.8


def test_equal_values_break_only_a_strict_order() -> None:
    columns = {"low": [80.0, 80.0, None], "high": [80.0, 120.0, 90.0]}
    assert judge(RULES[1], **columns).broken == 1
    assert judge({"name": "x", "order": ["low", "high"]}, **columns).broken == 0
    assert judge(RULES[1], **columns).applicable == 2


def test_a_difference_between_two_columns() -> None:
    found = judge(
        RULES[2],
        onset=["2020-03-01", "2020-03-01", "2020-03-01", "2020-03-02", None],
        left=["2020-03-01", "2020-03-31", "2020-04-01", "2020-03-01", "2020-03-01"],
    )
    assert (found.applicable, found.broken) == (4, 2)
    exact = {"name": "x", "difference": ["high", "low"], "minimum": 0.2, "maximum": 0.2}
    assert judge(exact, high=[0.3, 0.3, 250.2], low=[0.1, 0.2, 250.0]).broken == 1


def test_if_then_with_levels_and_bounds() -> None:
    sexes = {"sex": ["male", "male", "female", None, "male"], "pregnant": ["no", "yes", "yes", "yes", None]}
    assert judge(RULES[3], **sexes) == RuleResult(name="men", applicable=2, broken=1)
    ages = {"age": [12, 13, 3, 3], "pregnant": ["yes", "yes", "no", None]}
    assert judge(RULES[4], **ages) == RuleResult(name="children", applicable=2, broken=1)
    assert judge(RULES[4], age=[50, 60], pregnant=["yes", "no"]).share is None


def test_one_false_condition_breaks_the_rule_whatever_is_missing_beside_it() -> None:
    found = judge(
        RULES[5],
        died=[True, True, True, True, False, None],
        left=["2020-03-01", None, "2020-03-01", "2020-03-01", None, None],
        grade=[2, None, 1, None, 1, 1],
    )
    # Both hold; it has not left; the grade is too low; the grade is not known; twice the rule is not about the row.
    assert (found.applicable, found.broken) == (3, 2)


def test_an_empty_cell_can_be_asked_for() -> None:
    found = judge(RULES[7], onset=["2021-05-01", "2021-05-01", "2020-05-01", None], low=[None, 5.0, 5.0, 5.0])
    assert (found.applicable, found.broken) == (2, 1)
    # Beyond the dictionary's range is no value, as everywhere.
    assert judge(RULES[7], onset=["2021-05-01"], low=[9999.0]).broken == 0


def test_typed_and_text_tables_are_judged_alike() -> None:
    schema = Schema.from_dict(with_rules(*RULES))
    rng = np.random.default_rng(3)
    typed = pd.DataFrame()
    for column, grid in zip(schema.modelled, grids(schema), strict=True):
        gone = np.zeros(400, dtype=bool) if column.required else rng.random(400) < 0.3
        codes = np.where(gone, grid.missing, rng.integers(0, grid.size - 1, 400)).astype(np.int32)
        typed[column.name] = grid.decode(codes, rng.random(400))
    text = pd.DataFrame({name: typed[name].astype(str) for name in typed})
    text = text.replace({"nan": "", "<NA>": "", "None": "", "NaT": "", "True": "true", "False": "false"})
    found = check_rules(schema, typed)
    assert found == check_rules(schema, text)
    assert all(0 < result.broken < result.applicable < 400 for result in found)


def test_a_table_without_the_column_is_refused() -> None:
    schema = Schema.from_dict(with_rules(RULES[3]))
    with pytest.raises(TableError, match="pregnant"):
        check_rules(schema, pd.DataFrame({"sex": ["male"]}))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["male", "age", "low", "", "2020-01-01"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "order", "if", "then", "age", "sex", "minimum", "missing"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_rule_ends_in_a_traceback(data: st.DataObject) -> None:
    rules = copy.deepcopy(RULES)
    rule = data.draw(st.sampled_from(rules))
    key = data.draw(st.sampled_from(["name", "order", "strict", "difference", "minimum", "if", "then", "self"]))
    value = data.draw(JUNK)
    if key in ("if", "then") and isinstance(rule.get(key), dict) and data.draw(st.booleans()):
        rule[key][data.draw(st.sampled_from(["age", "sex", "low", "died", "left", "none"]))] = value
    elif key == "self":
        rules[0] = value  # type: ignore[call-overload]
    else:
        rule[key] = value
    try:
        schema = Schema.from_dict({**copy.deepcopy(DICTIONARY), "rules": rules})
    except CohortiumError as error:
        assert error.lines()
        return
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert all(sentence(rule, schema.columns) for rule in schema.rules)

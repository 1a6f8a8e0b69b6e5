"""`study new`: a draft fits its table, says what was guessed, and decides nothing about privacy."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.client.records import records
from cohortium.client.sources.base import read
from cohortium.common.drafting import WARNING, draft
from cohortium.common.errors import CohortiumError, StudyError, TableError
from cohortium.common.schema import Schema
from cohortium.common.study import Study

HEART = read(Path(__file__).resolve().parents[2] / "simulations" / "data" / "heart.parquet")


def test_the_draft_of_the_demo_table() -> None:
    drafted = draft(HEART, name="heart")
    schema = drafted.schema
    assert [c.name for c in schema.columns] == list(HEART.columns)
    assert [c.name for c in schema.columns if c.identifier] == ["patient"]
    assert {c.name: c.kind for c in schema.columns if c.name in ("fbs", "oldpeak", "age", "sex")} == {
        "fbs": "boolean",
        "oldpeak": "number",
        "age": "integer",
        "sex": "string",
    }
    # everything read off the table is flagged, and the extremes themselves are not shown
    assert set(schema.guessed) == {c.name for c in schema.modelled if c.kind != "boolean"}
    assert schema.column("age").maximum != HEART["age"].max()
    assert "NOT public knowledge" in WARNING and drafted.warning == WARNING
    assert records(schema, HEART, unit="patient").patients == 920


def test_a_csv_and_a_parquet_give_the_same_draft(tmp_path: Path) -> None:
    HEART.to_csv(tmp_path / "h.csv", index=False)
    assert draft(read(tmp_path / "h.csv"), name="heart").schema == draft(HEART, name="heart").schema


def test_the_study_is_refused_until_people_have_decided(tmp_path: Path) -> None:
    drafted = draft(HEART, name="Heart, 2026!")
    drafted.schema.save(tmp_path / "dictionary.json")
    assert Schema.load(tmp_path / "dictionary.json") == drafted.schema
    text = drafted.study
    asked = []
    for _ in range(20):  # obey each error's hint until the study loads
        try:
            study = Study.parse(text, folder=tmp_path)
            break
        except StudyError as error:
            assert error.code == "STUDY-MISSING"
            line = error.hint.split("add: ")[1]
            section = error.hint.split("]")[0] + "]"
            key = line.split(" = ")[0]
            asked.append(key)
            value = next(x[2:] for x in text.splitlines() if x.startswith(f"# {key} = "))
            text = text.replace(section + "\n", f"{section}\n{value}\n", 1)
    assert asked == [
        "epsilon",
        "delta",
        "unit",
        "adjacency",
        "hospitals_per_patient",
        "survivors",
        "colluders",
    ]
    assert study.id == "heart--2026" and study.privacy.unit == "patient"
    with pytest.raises(StudyError) as caught:
        study.refuse_guesses()
    assert "--accept-guessed-ranges" in caught.value.hint


def test_codes_dates_names_and_empty_columns() -> None:
    table = pd.DataFrame(
        {
            "zip": ["010", "020"] * 15,
            "day": ["2020-01-31", "2021-02-01"] * 15,
            "note": [f"note {i}" for i in range(30)],
            "nothing": [None] * 30,
            "flag": ["True", "False"] * 15,
            "na": ["1", "NA"] * 15,
        }
    )
    schema = draft(table, name="t").schema
    assert schema.column("zip").levels == ("010", "020")  # a number with a leading zero is a code
    assert schema.column("day").kind == "date"
    assert schema.column("note").identifier and "CHECK" in schema.column("note").description
    assert schema.column("nothing").guessed
    assert schema.column("flag").kind == "boolean"
    assert schema.missing_values == ("", "NA") and not schema.column("na").required


def test_tables_without_a_draft() -> None:
    for table in (pd.DataFrame(), pd.DataFrame({"a": []}), pd.DataFrame([[1, 2]], columns=["a", "a"])):
        with pytest.raises(TableError):
            draft(table, name="t")


CELL = st.one_of(
    [
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=4),
        st.dates(),
        st.datetimes(),
        st.decimals(),
        st.binary(max_size=2),
        st.lists(st.integers(), max_size=1),
        st.just(pd.NaT),
        st.times(),
        st.sampled_from(["1", "010", "2020-01-01", "true", "NA"]),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CELL, min_size=1, max_size=6), st.booleans())
def test_a_draft_of_any_table_is_a_dictionary_or_a_clear_error(cells: list[object], plain: bool) -> None:
    try:
        values = pd.Series(cells) if plain else pd.Series(cells, dtype=object)
    except (TypeError, ValueError, OverflowError):
        return
    table = pd.DataFrame({"c": values, "other": dt.date(2020, 1, 1)})
    try:
        schema = draft(table, name="t").schema
        assert Schema.from_dict(schema.to_dict()) == schema
        records(schema, table, unit="row")
    except CohortiumError as error:
        assert error.lines()

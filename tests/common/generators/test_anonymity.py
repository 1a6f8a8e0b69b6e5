"""Coarser quasi-identifiers: the target holds for every combination, common rows stay, nothing leaves its type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from cohortium.common.encoding import grids
from cohortium.common.errors import UsageError
from cohortium.common.generators.anonymity import (
    WIDENINGS,
    coarsen,
    plain_values,
    put_back,
    quasi_identifiers,
    sensitive_columns,
    widen,
)
from cohortium.common.schema import Schema

QUASI: list[dict[str, Any]] = [
    {"name": "age", "type": "integer", "constraints": {"minimum": 18, "maximum": 99, "required": True}},
    {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M", "other"]}},
    {"name": "bmi", "type": "number", "resolution": 0.1, "constraints": {"minimum": 10, "maximum": 70}},
    {"name": "seen", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2020-12-31"}},
    {"name": "smoker", "type": "boolean"},
]
REST: list[dict[str, Any]] = [
    {"name": "grade", "type": "integer", "role": "sensitive", "constraints": {"enum": [1, 2, 3]}},
    {"name": "crea", "type": "number", "constraints": {"minimum": 0, "maximum": 10}},
]


def schema_of(*names: str) -> Schema:
    fields = [{**field, "role": "quasi-identifier"} for field in QUASI if field["name"] in names]
    return Schema.from_dict({"name": "ward", "fields": [*fields, *REST]})


def rows_of(schema: Schema, rows: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    out = {}
    for column, grid in zip(schema.modelled, grids(schema), strict=True):
        weight = rng.exponential(size=grid.size) ** 2
        if column.required:
            weight[grid.missing] = 0
        codes = rng.choice(grid.size, rows, p=weight / weight.sum()).astype(np.int32)
        out[column.name] = grid.decode(codes, rng.random(rows))
    return pd.DataFrame(out)


def coarse(schema: Schema, table: pd.DataFrame, *, k: int, diverse: int = 1) -> pd.DataFrame:
    quasi, sensitive = quasi_identifiers(schema), sensitive_columns(schema)
    values = plain_values(schema, table, quasi)
    found = coarsen(quasi, values, k=k, sensitive=plain_values(schema, table, sensitive), diverse=diverse)
    out = table.copy()
    for column in quasi:
        out[column.name] = put_back(column, out[column.name], values[column.name], found.values[column.name])
    assert found.smallest == sizes(schema, out).min()
    return out


def sizes(schema: Schema, table: pd.DataFrame) -> pd.Series:
    names = [column.name for column in quasi_identifiers(schema)]
    return table.groupby(names, dropna=False, observed=True)["crea"].transform("size")


@pytest.mark.parametrize("names", [("sex",), ("age", "sex"), ("age", "sex", "bmi", "seen", "smoker"), ("bmi",)])
@pytest.mark.parametrize(("rows", "k"), [(2000, 5), (60, 11), (30, 30)])
def test_every_combination_is_frequent_enough(names: tuple[str, ...], rows: int, k: int) -> None:
    schema = schema_of(*names)
    table = rows_of(schema, rows)
    found = coarse(schema, table, k=k)
    assert sizes(schema, found).min() >= k and len(found) == rows
    assert rows == k or sizes(schema, table).min() < k or names == ("sex",)
    # The dictionary still holds: every value is read as the same value again.
    for column, grid in zip(schema.modelled, grids(schema), strict=True):
        assert found[column.name].dtype == table[column.name].dtype
        gone = found[column.name].isna().to_numpy()
        assert ((grid.encode(found[column.name]) == grid.missing) == gone).all()
        assert not (column.required and gone.any())
    pd.testing.assert_frame_equal(found[["grade", "crea"]], table[["grade", "crea"]])


def test_frequent_combinations_stay_as_they_are_and_others_are_widened_before_they_are_emptied() -> None:
    schema = schema_of("age", "sex")
    ages = [50] * 10 + [60, 61, 62, 63, 64, 64] + [30] * 5 + [90]
    table = pd.DataFrame({"age": ages, "sex": ["F"] * 21 + ["M"], "grade": 1, "crea": 1.0})
    table = table.astype({"age": "Int64"})
    found = coarse(schema, table, k=5)
    assert found.age.tolist()[:16] == [50] * 10 + [62] * 6  # 60 to 64
    # The last row finds no company: its sex is emptied, its age becomes the middle of the range, and the smallest class
    # joins it.
    assert found.sex.isna().tolist() == [False] * 16 + [True] * 6 and found.age.tolist()[16:] == [58] * 6


def test_groups_hold_different_values_of_what_is_sensitive() -> None:
    schema = schema_of("age", "sex")
    table = rows_of(schema, 800, seed=2)
    assert diversity(schema, coarse(schema, table, k=5)) == 1
    found = coarse(schema, table, k=5, diverse=3)
    assert diversity(schema, found) == 3 and sizes(schema, found).min() >= 5


def diversity(schema: Schema, table: pd.DataFrame) -> int:
    names = [column.name for column in quasi_identifiers(schema)]
    return int(table.groupby(names, dropna=False, observed=True)["grade"].nunique().min())


def test_the_rule_is_public_and_looks_at_nothing_but_the_table() -> None:
    """The same table gives the same result in any order of rows."""
    schema = schema_of("age", "sex", "seen")
    table = rows_of(schema, 500)
    order = np.random.default_rng(1).permutation(500)
    straight = coarse(schema, table, k=7)
    shuffled = coarse(schema, table.iloc[order].reset_index(drop=True), k=7)
    pd.testing.assert_frame_equal(straight.iloc[order].reset_index(drop=True), shuffled)


@pytest.mark.parametrize("name", ["age", "bmi", "seen"])
def test_bins_are_wider_at_each_step_and_hold_their_own_middle(name: str) -> None:
    column = schema_of(name).column(name)
    low, high = float(column.minimum or 0), float(column.maximum or 0)
    x = np.linspace(low, high, 5000)
    x = low + np.round((x - low) / (column.resolution or 1)) * (column.resolution or 1)
    counts = []
    for step in range(1, WIDENINGS + 1):
        middle = widen(column, x, step)
        assert middle.min() >= low and middle.max() <= high and (np.diff(middle) >= 0).all()
        np.testing.assert_allclose(widen(column, middle, step), middle)  # a middle lies in its own bin
        counts.append(len(np.unique(middle)))
    assert counts == sorted(counts, reverse=True) and counts[0] <= 33 and 2 <= counts[-1] <= 6
    assert np.isnan(widen(column, np.array([np.nan]), 1)).all()
    if name == "age":  # the bin from 0 to 49 begins at the dictionary's 18
        assert widen(column, np.array([30.0]), WIDENINGS).tolist() == [33.0]


def test_what_cannot_be_reached_is_refused() -> None:
    schema = schema_of("sex")
    table = rows_of(schema, 40)
    with pytest.raises(UsageError, match="ANONYMITY"):
        coarse(schema, table.iloc[:4], k=5)
    table["grade"] = pd.array([1] * 40, dtype="Int64")
    with pytest.raises(UsageError, match="grade"):
        coarse(schema, table, k=5, diverse=2)

"""Splits: every row in exactly one site, patients whole, sizes and skew as asked, repeatable by seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.client.records import records
from cohortium.client.sources.base import read
from cohortium.common.errors import CohortiumError, TableError, UsageError
from cohortium.common.schema import Schema
from cohortium.simulations.worlds import Split, site_name, split

DATA = Path(__file__).resolve().parents[2] / "simulations" / "data"
HEART = read(DATA / "heart.parquet")


def visits(patients: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    pid = rng.integers(0, patients, 5 * patients)
    return pd.DataFrame({"pid": pid, "sex": np.where(pid % 3 == 0, "F", "M"), "age": rng.normal(60, 9, len(pid))})


@pytest.mark.parametrize("how", ["by:sex", "iid:1", "iid:7", "dirichlet:sex:5:0.3", "dirichlet:age:4:100"])
def test_every_row_is_in_exactly_one_site_and_patients_stay_whole(how: str) -> None:
    table = visits()
    sites = split(table, how, unit="pid", seed=3)
    joined = pd.concat(sites.values()).sort_index()
    pd.testing.assert_frame_equal(joined, table)
    owners = [set(site["pid"]) for site in sites.values()]
    assert sum(len(o) for o in owners) == len(set(table["pid"]))
    again = split(table, how, unit="pid", seed=3)
    assert list(again) == list(sites) and all(again[k].equals(sites[k]) for k in sites)
    if how not in ("by:sex", "iid:1"):
        other = split(table, how, unit="pid", seed=4)
        assert any(not other[k].equals(sites[k]) for k in sites)


def test_iid_sites_have_equal_numbers_of_patients_and_names_that_sort() -> None:
    sites = split(visits(), "iid:11", unit="pid")
    sizes = [site["pid"].nunique() for site in sites.values()]
    assert max(sizes) - min(sizes) <= 1
    assert list(sites) == sorted(sites) and next(iter(sites)) == "site-01"


def test_the_demo_hospitals() -> None:
    sites = split(HEART, "by:hospital", unit="patient")
    assert {name: len(site) for name, site in sites.items()} == {
        "budapest": 293,
        "cleveland": 304,
        "long-beach": 200,
        "zurich-basel": 123,
    }


def test_the_demo_table_fits_its_dictionary_and_is_clean() -> None:
    schema = Schema.load(DATA / "heart.schema.json")
    got = records(schema, HEART, unit="patient")
    assert got.patients == 920 and got.codes.shape == (920, 15)
    assert HEART[["chol", "trestbps"]].min().min() > 0 and HEART["chol"].isna().sum() == 202
    assert int(HEART["disease"].sum()) == 509
    for column in schema.modelled:
        if column.minimum is not None:
            assert HEART[column.name].dropna().between(column.minimum, column.maximum).all()


def test_a_small_alpha_skews_and_a_large_one_does_not() -> None:
    """Spread over sites of the share of women; with 3,000 patients the two differ by far more than chance."""
    table = pd.DataFrame({"sex": np.where(np.arange(3000) % 2, "F", "M")})

    def spread(alpha: float) -> float:
        sites = split(table, f"dirichlet:sex:5:{alpha}", unit="row", seed=1)
        return float(np.std([(s["sex"] == "F").mean() for s in sites.values() if len(s)]))

    assert spread(0.1) > 0.2 > 0.05 > spread(1000.0)


def test_one_table_and_its_split_have_the_same_patients() -> None:
    """The identity of a row that is a patient of its own survives the split."""
    schema = Schema.load(DATA / "heart.schema.json")
    pooled = records(schema, HEART, unit="row")
    parts = [records(schema, s, unit="row") for s in split(HEART, "iid:3", unit="row").values()]
    together = np.sort(np.concatenate([p.identity for p in parts]).view("S16").ravel())
    assert (together == np.sort(pooled.identity.copy().view("S16").ravel())).all()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("by:a:b", Split(kind="by", column="a:b")),
        ("iid:5", Split(kind="iid", sites=5)),
        ("dirichlet:a:b:3:0.5", Split(kind="dirichlet", column="a:b", sites=3, alpha=0.5)),
    ],
)
def test_the_text_of_a_split(text: str, parsed: Split) -> None:
    assert Split.parse(text) == parsed and str(parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "by",
        "by:",
        "iid",
        "iid:0",
        "iid:-1",
        "iid:1.5",
        "iid:9999999",
        "iid:x",
        "dirichlet:a:3",
        "dirichlet:a:3:0",
        "dirichlet:a:3:nan",
        "dirichlet:a:3:x",
        "dirichlet::3:1",
        "random:3",
    ],
)
def test_a_split_that_is_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Split.parse(text)
    assert "iid:5" in caught.value.hint


def test_tables_that_cannot_be_split() -> None:
    table = pd.DataFrame({"pid": [1, 2, None], "ward": ["a", None, "b"]})
    for how, unit, code in [
        ("by:ward", "row", "SPLIT-EMPTY"),
        ("by:wart", "row", "TABLE-COLUMN"),
        ("iid:2", "pid", "TABLE-PATIENT"),
        ("iid:2", "who", "TABLE-COLUMN"),
        ("iid:4", "row", "SPLIT-SITES"),
    ]:
        with pytest.raises(CohortiumError) as caught:
            split(table, how, unit=unit)
        assert caught.value.code == code
    with pytest.raises(TableError):
        split(table.iloc[:0], "iid:1", unit="row")


def test_site_names_are_plain_and_different() -> None:
    assert site_name("Zürich/Basel ") == "zurich-basel" and site_name("東京") == "site"
    table = pd.DataFrame({"h": ["A b", "a-B", "東京", "京都", "A b", "a-b-2"]})
    sites = split(table, "by:h", unit="row")
    assert sorted(len(s) for s in sites.values()) == [1, 1, 1, 1, 2] and len(sites) == 5
    assert all(name == site_name(name) for name in sites)


CELLS = st.none() | st.integers() | st.floats() | st.text(max_size=4) | st.booleans() | st.dates()


@settings(max_examples=100, deadline=None)
@given(st.lists(CELLS, min_size=1, max_size=8), st.sampled_from(["by:c", "dirichlet:c:3:0.5", "iid:2"]))
def test_no_table_ends_in_a_traceback(cells: list[object], how: str) -> None:
    table = pd.DataFrame({"c": pd.Series(cells, dtype=object)})
    for unit in ("row", "c"):
        try:
            sites = split(table, how, unit=unit, seed=1)
        except CohortiumError as error:
            assert error.exit_code == 2
            continue
        assert sum(len(site) for site in sites.values()) == len(table)

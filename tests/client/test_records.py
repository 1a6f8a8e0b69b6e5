"""A table against its dictionary: right cells arrive whole, wrong ones name their row, none is shown."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cohortium.client import records as module
from cohortium.client.records import checked, records, table_digest
from cohortium.client.sources.base import Batches, read
from cohortium.common.encoding import Records, grids
from cohortium.common.errors import CohortiumError, TableError
from cohortium.common.schema import Column, Schema

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("COHORTIUM_DATA", ROOT.parent / "shared" / "data"))


def column(name: str, kind: str, **extra: Any) -> Column:
    return Column(name=name, kind=kind, **extra)  # type: ignore[arg-type]


SCHEMA = Schema(
    name="clinic",
    missing_values=("", "NA"),
    columns=(
        column("pid", "integer", role="identifier"),
        column("age", "integer", minimum=0.0, maximum=110.0),
        column("crea", "number", minimum=0.0, maximum=30.0),
        column("sex", "string", levels=("F", "M")),
        column("ward", "string", levels=("A", "Other")),
        column("stage", "integer", levels=("1", "2", "3")),
        column("dead", "boolean"),
        column("day", "date", minimum=0.0, maximum=20000.0),
        column("seen", "datetime", minimum=0.0, maximum=2e9),
        column("born", "year", minimum=1900.0, maximum=2020.0),
        column("name", "string", role="identifier"),
    ),
)


def table(**changes: list[Any]) -> pd.DataFrame:
    base: dict[str, list[Any]] = {
        "pid": [7, 8, 7],
        "age": [40, 50, None],
        "crea": [0.9, 1.1, None],
        "sex": ["F", "M", None],
        "ward": ["A", "Other", None],
        "stage": [1, 3, None],
        "dead": [True, False, None],
        "day": [dt.date(1970, 1, 2), dt.date(2000, 1, 1), None],
        "seen": [dt.datetime(1970, 1, 1, 0, 1), dt.datetime(2000, 1, 1), None],
        "born": [1950, 2000, None],
        "name": ["x", "y", "z"],
    }
    return pd.DataFrame(base | changes)


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as a CSV reader gives it."""
    cells = {c: ["" if pd.isna(v) else str(v) for v in frame[c]] for c in frame}
    return pd.DataFrame(cells)


def test_types_are_canonical_and_identifiers_gone() -> None:
    out = checked(SCHEMA, table(), unit="pid")
    assert list(out.columns) == ["pid", *[c.name for c in SCHEMA.modelled]] and "name" not in out
    assert [str(t) for t in out.dtypes] == [
        "object",
        "Int64",
        "float64",
        "category",
        "category",
        "Int64",
        "boolean",
        "datetime64[s]",
        "datetime64[us]",
        "Int64",
    ]
    assert out["pid"].tolist() == ["7", "8", "7"]
    assert out.iloc[2, 1:].isna().all()


def test_a_table_of_texts_gives_the_same_records_as_a_typed_one() -> None:
    typed, texts = (records(SCHEMA, t, unit="pid") for t in (table(), as_text(table())))
    assert (typed.codes == texts.codes).all() and (typed.identity == texts.identity).all()
    assert typed.patients == 2 and sorted(typed.rows_per_patient.tolist()) == [1, 2]


@pytest.mark.parametrize("path", sorted(DATA.glob("*.parquet")), ids=lambda p: p.stem)
def test_real_tables_fit_their_dictionaries(path: Path, tmp_path: Path) -> None:
    """Nothing is lost on the way: exactly the empty cells and those outside the dictionary become missing."""
    if path.stat().st_size > 2_000_000:
        pytest.skip("large; the others show the same")
    schema, raw = Schema.load(path.with_name(path.stem + ".schema.json")), read(path)
    got = records(schema, raw, unit="row")
    assert got.patients == len(raw) == got.rows
    lost = got.codes == [g.size - 1 for g in grids(schema)]
    empty = raw[[c.name for c in schema.modelled]].isna().to_numpy()
    assert 0 <= lost.sum() - empty.sum() <= 1e-3 * lost.size


@pytest.mark.parametrize(
    ("name", "cells", "why"),
    [
        ("age", [40, 50.5, 1], "whole"),
        ("age", ["40", "fifty", "1"], "not a number"),
        ("age", ["40", "1_0", "1"], "not a number"),
        ("age", ["40", "١٢", "1"], "not a number"),
        ("age", [40, True, 1], "not a number"),
        ("crea", ["1.0", "0,9", "1"], "comma"),
        ("crea", [1.0, "high", 1], "not a number"),
        ("crea", [1.0, [2], 1], "nested"),
        ("crea", [1.0, b"1", 1], "not a number"),
        ("crea", [1.0, 1j, 1], "number"),
        ("dead", ["yes", "perhaps", "no"], "true or false"),
        ("dead", [0, 2, 1], "true or false"),
        ("day", ["2000-01-01", "01.02.2000", ""], "ISO"),
        ("day", [dt.date(2000, 1, 1), 5, None], "not a date"),
        ("seen", ["2000-01-01", "noon", ""], "ISO"),
        ("sex", ["F", {"a": 1}, "M"], "nested"),
        ("sex", ["F", ("M",), "M"], "text"),
        ("born", [1950, "MCM", 1], "not a number"),
    ],
)
def test_a_wrong_cell_names_its_row_and_not_its_value(name: str, cells: list[Any], why: str) -> None:
    with pytest.raises(TableError) as caught:
        checked(SCHEMA, table(**{name: cells}), unit="pid", where="clinic.csv")
    error = caught.value
    assert error.code == "TABLE-VALUE" and why in error.sentence
    assert error.where[1] == f"dictionary clinic:{name}"
    if why not in ("nested", "number"):
        assert error.where[0] == f"clinic.csv:{name}, row 2"
    assert "fifty" not in "".join(error.lines()) and "MCM" not in "".join(error.lines())


def test_a_split_table_keeps_the_rows_numbers() -> None:
    part = table(age=["1", "2", "x"]).iloc[1:]
    with pytest.raises(TableError) as caught:
        checked(SCHEMA, part, unit="pid", where="t")
    assert caught.value.where[0] == "t:age, row 3"


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("age", 40, [300, -1, np.inf, -np.inf, 1e300, "inf", 10**30]),
        ("crea", 0.9, [31.0, -0.5, np.inf, "-Inf", Decimal("99")]),
        ("sex", "F", ["X", "female", 3]),
        ("stage", 1, [4, "9", np.inf]),
        ("born", 1950, [1800, 99999]),
        ("day", "1980-01-01", ["1950-01-01", "2999-01-01"]),
        ("seen", "1980-01-01", ["1950-01-01"]),
    ],
)
def test_a_value_outside_the_dictionary_is_missing(name: str, inside: Any, outside: list[Any]) -> None:
    place = [c.name for c in SCHEMA.modelled].index(name)
    grid = grids(SCHEMA)[place]
    for value in outside:
        cells = pd.Series([inside, value, None], dtype=object)
        got = records(SCHEMA, table(**{name: cells, "pid": [1, 2, 3]}), unit="row").codes[:, place]
        assert sorted(got.tolist()) == sorted(
            [*grid.encode(pd.Series([inside])).tolist(), grid.size - 1, grid.size - 1]
        )


def test_a_level_never_listed_is_other_where_there_is_one() -> None:
    place = [c.name for c in SCHEMA.modelled].index("ward")
    got = records(SCHEMA, table(ward=["Z", "A", "Other"]), unit="row").codes[:, place]
    assert sorted(got.tolist()) == [0, 1, 1]


def test_flags_do_not_hide_behind_numbers_that_came_first() -> None:
    """True == 1 in Python; what one row means may not depend on another row."""
    level = column("code", "string", levels=("1", "true"))
    schema = Schema(name="s", columns=(level,))
    for cells in ([1, True], [True, 1]):
        out = checked(schema, pd.DataFrame({"code": pd.Series(cells, dtype=object)}), unit="row")["code"]
        assert out.tolist() == ["true" if c is True else "1" for c in cells]


@pytest.mark.parametrize("cells", [[7, 8, 7], [7.0, 8.0, 7.0], ["7", " 8", "7 "], ["7.0", "8", "7"]])
def test_a_patient_is_the_same_however_the_identifier_is_stored(cells: list[Any]) -> None:
    base = records(SCHEMA, table(), unit="pid")
    assert (records(SCHEMA, table(pid=cells), unit="pid").identity == base.identity).all()


@pytest.mark.parametrize(
    "cells", [[7, None, 7], ["7", "", "7"], ["7", "NA", "7"], [7, 8.5, 7], [7, [8], 7], [7, 1e300, 7]]
)
def test_a_row_without_a_usable_patient_is_refused(cells: list[Any]) -> None:
    with pytest.raises(TableError) as caught:
        records(SCHEMA, table(pid=pd.Series(cells, dtype=object)), unit="pid", where="t")
    assert caught.value.code == "TABLE-PATIENT" and caught.value.where[0].startswith("t:pid, row ")


def test_a_number_that_means_missing_means_it_in_every_kind_of_file() -> None:
    columns = (
        column("age", "integer", minimum=-20.0, maximum=9.0),
        column("stage", "integer", levels=("1", "2")),
    )
    schema = Schema(name="s", columns=columns, missing_values=("", "-9"))
    for cells in ([-9, 3], [-9.0, 3.0], ["-9", "3"], pd.Series([-9, 3], dtype=object), pd.array([-9, 3])):
        out = checked(schema, pd.DataFrame({"age": cells, "stage": [1, 1]}), unit="row")
        assert out["age"].isna().tolist() == [True, False]
    needed = Schema(
        name="s", columns=(column("age", "integer", minimum=-20.0, maximum=9.0, required=True),), missing_values=("-9",)
    )
    with pytest.raises(TableError, match="required"):
        checked(needed, pd.DataFrame({"age": [-9, 3]}), unit="row")


def test_required_cells() -> None:
    schema = Schema(name="s", columns=(column("age", "integer", minimum=0.0, maximum=9.0, required=True),))
    assert len(checked(schema, pd.DataFrame({"age": [1, np.inf, 300]}), unit="row")) == 3
    for cells in ([1, None], ["1", ""], [1, np.nan], ["1", "NaN"]):
        with pytest.raises(TableError) as caught:
            checked(schema, pd.DataFrame({"age": cells}), unit="row", where="t")
        assert caught.value.code == "TABLE-REQUIRED" and caught.value.where[0] == "t:age, row 2"


def test_the_header_is_checked() -> None:
    cases = [
        (table().drop(columns="age"), (), "TABLE-COLUMN"),
        (table().drop(columns="pid"), (), "TABLE-COLUMN"),
        (table().rename(columns={"age": "Age"}), (), "TABLE-COLUMN"),
        (table().assign(note="secret"), (), "TABLE-EXTRA"),
        (table(), ("agee",), "TABLE-EXCLUDE"),
        (table().rename(columns={"age": 3}), (), "TABLE-HEADER"),
        (pd.concat([table(), table()[["age"]]], axis=1), (), "TABLE-HEADER"),
        (pd.DataFrame(), (), "TABLE-COLUMN"),
    ]
    for frame, exclude, code in cases:
        with pytest.raises(TableError) as caught:
            checked(SCHEMA, frame, unit="pid", exclude=exclude)
        assert caught.value.code == code and caught.value.hint
    checked(SCHEMA, table().assign(note="secret"), unit="pid", exclude=("note",))
    checked(SCHEMA, table().drop(columns="name"), unit="pid")  # an identifier is dropped anyway
    with pytest.raises(TableError) as caught:
        checked(SCHEMA, table().rename(columns={"age": "Age"}), unit="pid")
    assert "rename 'Age' to 'age'" in caught.value.hint


def test_small_and_wide_tables() -> None:
    assert records(SCHEMA, table().iloc[:0], unit="pid").patients == 0
    assert records(SCHEMA, table().iloc[:1], unit="pid").patients == 1
    assert records(SCHEMA, as_text(table()).iloc[:0], unit="row").codes.shape == (0, 9)
    wide = Schema(name="w", columns=tuple(column(f"c{i}", "number", minimum=0.0, maximum=1.0) for i in range(500)))
    frame = pd.DataFrame(np.random.default_rng(0).random((20, 500)), columns=[c.name for c in wide.columns])
    assert records(wide, frame, unit="row").codes.shape == (20, 500)


def test_constant_and_all_missing_columns() -> None:
    got = records(SCHEMA, table(sex=["F"] * 3, crea=[None] * 3, day=[pd.NaT] * 3), unit="row")
    sizes = [g.size for g in grids(SCHEMA)]
    assert set(got.codes[:, 2]) == {0}
    assert set(got.codes[:, 1]) == {sizes[1] - 1} and set(got.codes[:, 6]) == {sizes[6] - 1}


def test_time_zones_and_formats() -> None:
    german = Schema(name="s", columns=(column("d", "date", minimum=0.0, maximum=30000.0, format="%d.%m.%Y"),))
    out = checked(german, pd.DataFrame({"d": ["31.12.2000"]}), unit="row")
    assert out["d"].iloc[0] == pd.Timestamp(2000, 12, 31)
    stamps = pd.DataFrame({"seen": pd.to_datetime(["2000-01-01T02:00:00+02:00"], format="ISO8601")})
    only = Schema(name="s", columns=(SCHEMA.column("seen"),))
    assert checked(only, stamps, unit="row")["seen"].iloc[0] == pd.Timestamp(2000, 1, 1)


CELL = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["", "NA", "F", "M", "1", "2.5", "2000-01-01", "true", "nan", "inf", " 3 "])
    | st.text(max_size=5)
    | st.dates()
    | st.datetimes()
    | st.decimals()
    | st.binary(max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.just(pd.NaT)
    | st.just(pd.NA)
    | st.just(pd.Timestamp("2000-01-01", tz="UTC"))
    | st.just(np.timedelta64(3, "s"))
    | st.complex_numbers()
)
SAFE = [
    st.none() | st.integers(-5, 200),
    st.none() | st.floats(),
    st.none() | st.sampled_from(["F", "M", "x", ""]),
]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_table_ends_in_a_traceback(data: st.DataObject) -> None:
    """A clear error without the value, or records whose codes are those of each row alone."""
    rows = data.draw(st.integers(0, 5))
    frame = table().iloc[[0] * rows].reset_index(drop=True)
    for name in data.draw(st.lists(st.sampled_from(list(frame.columns)), max_size=3, unique=True)):
        kind = data.draw(st.sampled_from([CELL, *SAFE]))
        cells = data.draw(st.lists(kind, min_size=rows, max_size=rows))
        try:
            frame[name] = pd.Series(cells) if data.draw(st.booleans()) else pd.Series(cells, dtype=object)
        except (TypeError, ValueError, OverflowError):
            return  # pandas cannot hold such a column
    unit = data.draw(st.sampled_from(["row", "pid"]))
    try:
        got = records(SCHEMA, frame, unit=unit)
    except CohortiumError as error:
        assert error.exit_code == 2 and error.lines()
        return
    sizes = np.array([g.size for g in grids(SCHEMA)])
    assert got.rows == rows and (got.codes >= 0).all() and (got.codes < sizes).all()
    if unit == "row" and rows:
        alone = [records(SCHEMA, frame.iloc[[i]], unit="row") for i in range(rows)]
        both = {a.identity.tobytes(): a.codes[0].tolist() for a in alone}
        assert both == {got.identity[p].tobytes(): got.codes[p].tolist() for p in range(rows)}


# ---- order, pieces, duplicates ------------------------------------------------------------------------------


def many(rows: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    part = table().iloc[rng.integers(0, 2, rows)].reset_index(drop=True)
    part["pid"] = rng.integers(0, max(rows // 2, 1), rows)
    part["age"] = rng.integers(0, 110, rows)
    return part


def same(a: Records, b: Records) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Records))


def in_pieces(frame: pd.DataFrame, *sizes: int) -> Batches:
    borders = [0, *np.cumsum(sizes).tolist(), len(frame)]
    parts = [frame.iloc[a:b] for a, b in itertools.pairwise(borders) if b > a]
    return Batches(parts, frame.columns)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from(["pid", "row"]))
def test_records_do_not_depend_on_the_order_of_rows_nor_on_the_pieces(rows: int, seed: int, unit: str) -> None:
    """Red if a patient's rows keep the table's order, or if a database's row is named by its number."""
    frame = many(rows, seed=seed)
    mixed = frame.sample(frac=1.0, random_state=seed)
    whole = records(SCHEMA, in_pieces(frame), unit=unit)
    assert same(whole, records(SCHEMA, in_pieces(mixed.reset_index(drop=True), rows // 3, rows // 4), unit=unit))
    # A file's rows have numbers, which go with them
    assert same(records(SCHEMA, frame, unit=unit), records(SCHEMA, mixed, unit=unit))
    if unit == "pid":
        assert same(whole, records(SCHEMA, frame, unit=unit))


def test_a_large_table_is_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = many(500)
    for unit in ("pid", "row"):
        whole = records(SCHEMA, frame, unit=unit)
        for rows in (1, 7, 499):
            monkeypatch.setattr(module, "PIECE_ROWS", rows)
            assert same(records(SCHEMA, frame, unit=unit), whole)
        twice = frame.set_axis([0] * len(frame))
        assert same(records(SCHEMA, twice, unit=unit), whole)  # labels that name nothing: counted
        monkeypatch.undo()


def test_a_row_of_a_database_keeps_its_name_when_others_come_and_go() -> None:
    """So that training and held-out rows stay apart, and a neighbouring table differs in one record only."""
    frame = many(80)
    frame.loc[40:, :] = frame.loc[:39, :].to_numpy()  # every row twice

    def names(part: pd.DataFrame) -> set[bytes]:
        return {row.tobytes() for row in records(SCHEMA, in_pieces(part), unit="row").identity}

    whole = names(frame)
    assert len(whole) == 80
    for gone in range(0, 80, 9):
        assert len(whole - names(frame.drop(index=gone))) == 1 and names(frame.drop(index=gone)) < whole


def test_one_row_each_is_held_against_the_table() -> None:
    with pytest.raises(TableError) as caught:
        records(SCHEMA, table(), unit="pid", where="q", one_row=True)
    assert caught.value.code == "TABLE-DUPLICATE" and "1 patients" in caught.value.sentence
    assert records(SCHEMA, table(pid=[1, 2, 3]), unit="pid", one_row=True).patients == 3
    assert records(SCHEMA, table(), unit="row", one_row=True).patients == 3


def test_pieces_end_with_the_reading_even_if_a_cell_is_wrong() -> None:
    ended: list[bool] = []

    def parts() -> Iterator[pd.DataFrame]:
        try:
            yield table()
            yield table(age=["SECRET"] * 3)
            yield table()
        finally:
            ended.append(True)

    batches = Batches(parts(), table().columns)
    with pytest.raises(TableError):
        records(SCHEMA, batches, unit="pid")
    assert ended == [True] and next(iter(batches), None) is None


def test_a_digest_needs_its_key_and_sees_every_cell() -> None:
    key = b"0" * 16
    base = records(SCHEMA, table(), unit="pid")
    first = table_digest(base, key=key)
    assert table_digest(records(SCHEMA, table().iloc[::-1], unit="pid"), key=key) == first
    assert table_digest(base, key=b"1" * 16) != first and len(first) == 64
    others = [table(age=[40, 51, None]), table(pid=[7, 8, 8]), table(pid=[7, 9, 7]), table().iloc[:2]]
    assert len({first, *(table_digest(records(SCHEMA, t, unit="pid"), key=key) for t in others)}) == 5
    assert table_digest(records(SCHEMA, table().iloc[:0], unit="pid"), key=key)
    with pytest.raises(ValueError, match="16 bytes"):
        table_digest(base, key=b"short")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_a_column_of_stamps_is_read_as_its_cells_are(unit: str, zone: str | None) -> None:
    texts = ["1969-12-31T23:59:59.999999", "1970-01-01", "2000-02-29T23:30:00", "1950-06-01T00:00:00.000001"]
    stamps = pd.Series(pd.to_datetime(texts, format="ISO8601").as_unit(unit)).reindex([0, 1, 9, 2, 3])
    stamps = stamps if zone is None else stamps.dt.tz_localize(zone)
    for name in ("day", "seen"):
        schema = Schema(name="s", columns=(SCHEMA.column(name),))
        columns = [stamps, stamps.astype(object)]
        fast, slow = (checked(schema, pd.DataFrame({name: c}), unit="row")[name] for c in columns)
        pd.testing.assert_series_equal(fast, slow)
    far = pd.Series(np.array(["12000-01-01"], dtype="datetime64[s]"))
    with pytest.raises(TableError):
        checked(Schema(name="s", columns=(SCHEMA.column("day"),)), pd.DataFrame({"day": far}), unit="row")

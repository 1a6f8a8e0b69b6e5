"""Files as hospitals have them: the same table in every shape, and every broken file a clear error."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cohortium.client.sources import base
from cohortium.client.sources.base import read
from cohortium.common.errors import TableError

TEXT = 'pid,code,note\n1,010,"a, b"\n2,,"two\nlines"\n3,NA,é\n'


def test_cells_of_a_csv_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TEXT, encoding="utf-8")
    table = read(path)
    assert table["code"].tolist() == ["010", "", "NA"]
    assert table["note"].tolist() == ["a, b", "two\nlines", "é"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_marks_and_compression_do_not_matter(tmp_path: Path, delimiter: str) -> None:
    plain = f"a{delimiter}b\r\n1{delimiter}2\r\n".encode()
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + plain)
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(plain))
    for name in ("p.csv", "z.csv.gz"):
        table = read(tmp_path / name)
        assert list(table.columns) == ["a", "b"] and table.iloc[0].tolist() == ["1", "2"]


def test_parquet_keeps_types_where_values_are_missing(tmp_path: Path) -> None:
    big = 2**53 + 1
    source = pa.table(
        {
            "i": pa.array([big, None]),
            "b": pa.array([True, None]),
            "d": pa.array([0, None], pa.date32()),
            "s": pa.array(["x", None]),
        }
    )
    pq.write_table(source, tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet")
    assert table["i"].iloc[0] == big and table["i"].isna().tolist() == [False, True]
    assert str(table["b"].dtype) == "boolean" and str(table["d"].dtype).startswith("datetime64")


def test_an_index_stored_by_pandas_is_a_column_again(tmp_path: Path) -> None:
    frame = pd.DataFrame({"v": [1.0]}, index=pd.Index([7], name="pid"))
    frame.to_parquet(tmp_path / "t.parquet")
    assert set(read(tmp_path / "t.parquet").columns) == {"pid", "v"}


def bad_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1 no")


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("t.csv", lambda p: p.write_text("a,b\n1,2\n3\n"), "TABLE-CSV"),
    ("t.csv", lambda p: p.write_text("a,b\n1,2\n3,SECRET,5\n"), "TABLE-CSV"),
    ("t.csv", lambda p: p.write_text(""), "TABLE-EMPTY"),
    ("t.csv", lambda p: p.write_text("\n\n"), "TABLE-EMPTY"),
    ("t.csv", lambda p: p.write_text("a,a\n1,2\n"), "TABLE-HEADER"),
    ("t.csv", lambda p: p.write_text("a,\n1,2\n"), "TABLE-HEADER"),
    ("t.csv", lambda p: p.write_bytes(b"a,b\n1,\xff\n"), "TABLE-FILE"),
    ("t.csv", lambda p: p.write_bytes("a,b\n1,2\n".encode("utf-16")), "TABLE-FILE"),
    ("t.csv.gz", lambda p: p.write_bytes(b"not gzip"), "TABLE-FILE"),
    ("t.parquet", bad_parquet, "TABLE-FILE"),
    ("t.parquet", lambda p: p.write_bytes(b""), "TABLE-FILE"),
    ("t.parquet", lambda p: p.mkdir(), "TABLE-FILE"),
    ("t.csv", lambda p: None, "TABLE-FILE"),
    ("t.xlsx", lambda p: p.write_text("x"), "TABLE-KIND"),
]


@pytest.mark.parametrize(("name", "make", "code"), BROKEN)
def test_a_broken_file(tmp_path: Path, name: str, make: Callable[[Path], object], code: str) -> None:
    make(tmp_path / name)
    with pytest.raises(TableError) as caught:
        read(tmp_path / name)
    assert caught.value.code == code and caught.value.hint
    assert "SECRET" not in "".join(caught.value.lines())


def test_a_row_of_the_wrong_length_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n5\n")
    with pytest.raises(TableError) as caught:
        read(tmp_path / "t.csv")
    assert caught.value.where == (f"{tmp_path / 't.csv'}, row 3",)


def test_a_table_without_rows_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n")
    assert read(tmp_path / "t.csv").shape == (0, 2)


def test_a_reader_can_be_added_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    read_nothing = lambda location: pd.DataFrame({"x": np.arange(2)})  # noqa: E731
    read_csv_known = dict(base._READERS)
    monkeypatch.setattr(base, "_READERS", read_csv_known)
    base.register("ward://", read_nothing)
    assert len(read("ward://a/b")) == 2
    with pytest.raises(ValueError, match="two readers"):
        base.register("ward://", read_nothing)

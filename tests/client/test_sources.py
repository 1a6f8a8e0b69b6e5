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


# ---- folders ------------------------------------------------------------------------------------------------


def folder_of(folder: Path, parts: dict[str, pa.Table | str]) -> Path:
    for name, part in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(part, str):
            (folder / name).write_text(part, encoding="utf-8")
        else:
            pq.write_table(part, folder / name)
    return folder


def test_a_folder_of_csv_files_is_one_table_of_texts(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "t.csv",
        {"b.csv": "b;a\n010;2\n", "a.csv": "a,b\n1,NA\n", "deep/c.tsv": "a\tb\n3\t\n", "_SUCCESS": "", ".x.csv": "z"},
    )
    table = read(folder)
    assert table["a"].tolist() == ["1", "2", "3"] and table["b"].tolist() == ["NA", "010", ""]
    assert table.index.tolist() == [0, 1, 2]


def test_parts_of_parquet_may_differ_in_width_and_order_and_be_empty(tmp_path: Path) -> None:
    parts = {
        "1.parquet": pa.table({"i": pa.array([1], pa.int8()), "s": ["x"], "n": pa.nulls(1)}),
        "2.parquet": pa.table({"s": pa.array(["y"]).dictionary_encode(), "i": [2**40], "n": [0.5]}),
        "3.parquet": pa.table({"i": [2.0], "n": pa.array([None], pa.float32()), "s": pa.nulls(1)}),
    }
    table = read(folder_of(tmp_path / "a", parts))
    assert table["s"].tolist()[:2] == ["x", "y"] and table["i"].tolist() == [1, 2**40, 2]
    assert table["n"].isna().tolist() == [True, False, True]
    whole = {name: parts[name].select(["i", "s"]) for name in ("1.parquet", "2.parquet")}
    assert str(read(folder_of(tmp_path / "b", whole))["i"].dtype) == "Int64"


def test_names_of_folders_become_a_column_of_texts(tmp_path: Path) -> None:
    """Red if Arrow guesses: the ward "010" would be the ward 10."""
    part = pa.table({"v": [1]})
    folder = folder_of(tmp_path, {"ward=010/a.parquet": part, "ward=020/a.parquet": part})
    assert read(folder)["ward"].tolist() == ["010", "020"]


INT, TEXT_PART = pa.table({"a": [1], "b": [1]}), pa.table({"a": ["SECRET"], "b": [1]})
BAD_FOLDERS: list[tuple[str, dict[str, pa.Table | str], str]] = [
    ("TABLE-FILE", {}, ""),
    ("TABLE-FILE", {"_only.csv": "a\n1\n"}, ""),
    ("TABLE-PARTS", {"1.parquet": INT, "2.parquet": TEXT_PART}, "2.parquet"),
    ("TABLE-PARTS", {"1.parquet": INT, "2.parquet": INT.drop_columns("b")}, "2.parquet"),
    ("TABLE-PARTS", {"1.parquet": INT, "2.parquet": INT.append_column("c", [[1]])}, "2.parquet"),
    ("TABLE-PARTS", {"1.csv": "a,b\n1,2\n", "2.csv": "a\nSECRET\n"}, "2.csv"),
    ("TABLE-PARTS", {"x=1/1.parquet": INT, "2.parquet": INT}, "1.parquet"),
    ("TABLE-KIND", {"1.csv": "a\n1\n", "2.parquet": INT}, "1.csv"),
    ("TABLE-KIND", {"1.csv": "a\n1\n", "2.xlsx": "SECRET"}, "2.xlsx"),
    ("TABLE-CSV", {"1.csv": "a,b\n1,2\n", "2.csv": "a,b\nSECRET\n"}, "2.csv"),
    ("TABLE-FILE", {"1.parquet": INT, "2.parquet": "SECRET"}, "2.parquet"),
    ("TABLE-HEADER", {"1.parquet": pa.table([[1], [2]], names=["a", "a"])}, "1.parquet"),
]


@pytest.mark.parametrize(("code", "parts", "named"), BAD_FOLDERS)
def test_a_folder_that_is_no_table(tmp_path: Path, code: str, parts: dict[str, pa.Table | str], named: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(TableError) as caught:
        read(folder_of(folder, parts))
    assert caught.value.code == code and caught.value.hint and named in caught.value.where[0]
    assert "SECRET" not in "".join(caught.value.lines())

"""Parquet and CSV files through Arrow.

A CSV file is read as text throughout: what a cell means is the dictionary's matter, not a parser's guess (a
reader that infers types turns the code "010" into 10 and the level "NA" into nothing).
"""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cohortium.client.sources.base import check_names, register
from cohortium.common.errors import TableError

_DELIMITERS = ",;\t|"
_HEADER_BYTES = 1 << 20
_NULLABLE: dict[Any, Any] = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


def read_parquet(location: str) -> pd.DataFrame:
    """A Parquet file; integers and booleans stay what they are where values are missing."""
    _check_file(location)
    try:
        table = pq.read_table(location, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise TableError(
            "TABLE-FILE",
            f"not a readable Parquet file ({type(error).__name__})",
            where=(location,),
            hint="write it anew",
        ) from None
    check_names(location, table.column_names)
    return frame_of(table, location)


def frame_of(table: pa.Table | pa.RecordBatch, location: str) -> pd.DataFrame:
    """An Arrow table as pandas; integers and booleans stay what they are where values are missing."""
    try:
        return table.to_pandas(types_mapper=_NULLABLE.get, ignore_metadata=True, date_as_object=False)
    except (pa.ArrowException, NotImplementedError, ValueError) as error:
        raise TableError(
            "TABLE-FILE",
            f"a column has a type that cannot be used ({type(error).__name__})",
            where=(location,),
            hint="store plain numbers, texts, booleans and dates",
        ) from None


def read_csv(location: str) -> pd.DataFrame:
    """A CSV file (comma, semicolon, tab or bar; UTF-8; .gz too), every cell as text."""
    return text_frame(csv_table(location))


def text_frame(table: pa.Table) -> pd.DataFrame:
    """A table of texts as pandas; the texts stay where Arrow put them."""
    return table.to_pandas(types_mapper={pa.string(): pd.StringDtype("pyarrow")}.get)


def csv_table(location: str) -> pa.Table:
    """A CSV file as an Arrow table of texts."""
    _check_file(location)
    names, delimiter = _header(location)
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    try:
        return pa_csv.read_csv(location, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise _csv_error(location, delimiter, names, str(error)) from None


def _header(location: str) -> tuple[list[str], str]:
    try:
        with pa.input_stream(location) as stream:
            head = stream.read(_HEADER_BYTES)
        text = head.decode("utf-8-sig", errors="strict" if len(head) < _HEADER_BYTES else "replace")
    except UnicodeDecodeError:
        raise TableError(
            "TABLE-FILE", "not a text in UTF-8", where=(location,), hint="save the table as UTF-8"
        ) from None
    except (OSError, pa.ArrowException):
        raise TableError("TABLE-FILE", "cannot be read", where=(location,), hint="is the file damaged?") from None
    first = text.lstrip("\r\n").split("\n", 1)[0]
    if not first.strip():
        raise TableError("TABLE-EMPTY", "the file is empty", where=(location,), hint="a table needs a header and rows")
    delimiter = max(_DELIMITERS, key=lambda mark: (first.count(mark), -_DELIMITERS.index(mark)))
    names = next(csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter))
    check_names(location, names)
    return names, delimiter


def _csv_error(location: str, delimiter: str, names: list[str], reason: str) -> TableError:
    """Which row has the wrong number of cells. Arrow's own text is dropped: it quotes the row."""
    if "UTF8" in reason or "UTF-8" in reason:
        return TableError("TABLE-FILE", "not a text in UTF-8", where=(location,), hint="save the table as UTF-8")
    bad: list[tuple[int | None, int]] = []

    def note(row: Any) -> str:
        bad.append((row.number, row.actual_columns))
        return "skip"

    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
    with contextlib.suppress(pa.ArrowException):
        pa_csv.read_csv(location, pa_csv.ReadOptions(use_threads=False), parse_options=parse)
    if not bad:
        return TableError("TABLE-FILE", "not a readable CSV file", where=(location,), hint="are quotes closed?")
    number, cells = bad[0]
    return TableError(
        "TABLE-CSV",
        f"a row has {cells} cells and the header has {len(names)}",
        where=(f"{location}, row {number - 1}" if number else location,),
        hint="put texts that hold the delimiter or a line break in double quotes",
    )


def _check_file(location: str) -> None:
    if not Path(location).is_file():
        raise TableError("TABLE-FILE", "there is no such file", where=(location,), hint="check the path")


register(".parquet", read_parquet)
CSV_ENDINGS = (".csv", ".csv.gz", ".tsv")
for _ending in CSV_ENDINGS:
    register(_ending, read_csv)

"""Synthetic rows out of a fitted model, in blocks, as Parquet or CSV: post-processing, free of budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cohortium.common.errors import UsageError
from cohortium.common.generators.anonymity import coarse_blocks
from cohortium.common.generators.base import Model
from cohortium.common.generators.sampling import tables
from cohortium.common.schema import Column

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.study import Study
    from cohortium.server.runs import RunFolder

BLOCK_ROWS = 65_536
_HAIR = 1e-6  # what turns < into ≤ on grids whose steps are far coarser
_TERM = re.compile(r"\s*(?P<column>.+?)\s*(?P<sign><=|>=|!=|=|<|>)\s*(?P<value>.+?)\s*")


def write_rows(
    folder: RunFolder,
    rows: int,
    outs: list[Path],
    *,
    seed: int,
    where: Mapping[str, object] | None = None,
    balance: str | Sequence[str] | None = None,
    minimum_share: Mapping[str, float] | None = None,
    enforce_rules: bool = False,
    k_anonymity: int | None = None,
    l_diversity: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Sample rows and write them to every file of `outs` (.parquet or .csv); how many were written.

    The same model, seed and rows give the same bytes. Memory stays at a block of 65,536 rows. balance, minimum_share,
    enforce_rules: see `common.generators.sampling.tables`. k_anonymity, l_diversity: rare combinations of
    quasi-identifiers become coarser (`common.generators.anonymity`); then rows are drawn twice, alike.
    """
    if rows < 1:
        raise UsageError("SAMPLE-ROWS", "at least one row", hint="-n 1000")
    for out in outs:
        if out.suffix not in (".parquet", ".csv"):
            raise UsageError("SAMPLE-FILE", f"{out.name}: rows are written as .parquet or .csv")
        out.parent.mkdir(parents=True, exist_ok=True)
    schema, model, grids = folder.study().schema, folder.model(), folder.grids()

    def blocks() -> Iterator[pd.DataFrame]:
        return tables(
            model,
            schema,
            grids,
            rows,
            seed=seed,
            where=where,
            balance=balance,
            minimum_share=minimum_share,
            enforce_rules=enforce_rules,
            block=BLOCK_ROWS,
        )

    made = coarse_blocks(schema, blocks, k=k_anonymity, diverse=l_diversity)
    writers = [_Writer(out) for out in outs]
    written = 0
    try:
        for block in made:
            for writer in writers:
                writer.write(block)
            written += len(block)
            if progress is not None:
                progress(written)
        for writer in writers:
            writer.finish()
    finally:
        for writer in writers:
            writer.close()
    return written


def as_judged(model: Model, study: Study, grids: tuple[Grid, ...], rows: int, *, seed: int) -> pd.DataFrame:
    """At most `rows` rows of a model for an evaluation: coarsened and ruled as the published table is.

    Not balanced: shares that were changed on purpose would be held against the patients'. How coarse rare combinations
    become hangs on the number of rows, so the whole published table is drawn where they do.
    """
    wanted = study.release
    coarse = wanted.k_anonymity is not None or wanted.l_diversity is not None
    drawn = wanted.rows if coarse else rows

    def blocks() -> Iterator[pd.DataFrame]:
        return tables(
            model,
            study.schema,
            grids,
            drawn,
            seed=seed,
            enforce_rules=wanted.enforce_rules,
            block=BLOCK_ROWS,
        )

    kept, have = [], 0
    for block in coarse_blocks(study.schema, blocks, k=wanted.k_anonymity, diverse=wanted.l_diversity):
        kept.append(block.iloc[: rows - have])
        have += len(kept[-1])
        if have >= rows:
            break
    return pd.concat(kept, ignore_index=True)


class _Writer:
    """One output file, written beside its name and moved there when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._parquet: pq.ParquetWriter | None = None
        self._first = True
        self._text = None if path.suffix == ".parquet" else self._part.open("w", encoding="utf-8", newline="")

    def write(self, block: pd.DataFrame) -> None:
        if self._text is not None:
            plain = block.copy()
            for name in plain.columns:
                if plain[name].dtype == "boolean" or plain[name].dtype == bool:
                    plain[name] = plain[name].map({True: "true", False: "false"})
            plain.to_csv(self._text, index=False, header=self._first)
            self._first = False
            return
        table = pa.Table.from_pandas(block, preserve_index=False)
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._part, table.schema)
        self._parquet.write_table(table.cast(self._parquet.schema))

    def finish(self) -> None:
        self.close()
        if self._part.exists():
            self._part.replace(self._path)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        if self._text is not None:
            self._text.close()


def parse_where(text: str | None, folder: RunFolder) -> dict[str, object]:
    """ "sex=F and age>=65 and age<80" -> conditions by column.

    Terms are joined by `and`; = and != take levels or numbers, <, <=, >, >= numbers. Terms on one column narrow it.
    Raises UsageError with the columns that exist.
    """
    if not text or not text.strip():
        return {}
    columns = {column.name: column for column in folder.study().schema.modelled}
    out: dict[str, object] = {}
    for term in re.split(r"\s+and\s+", text.strip(), flags=re.IGNORECASE):
        match = _TERM.fullmatch(term)
        if match is None:
            raise UsageError("WHERE-FORM", f"{term!r} is not a condition", hint='--where "sex=F and age>=65"')
        name, sign, value = match["column"], match["sign"], match["value"].strip("'\"")
        if name not in columns:
            raise UsageError("WHERE-COLUMN", f"the model has no column {name!r}", hint="columns: " + ", ".join(columns))
        out[name] = _narrow(out.get(name), columns[name], sign, value)
    return out


def parse_columns(text: str | None, folder: RunFolder) -> tuple[str, ...]:
    """ "sex,died" -> ("sex", "died"); a column whose own name holds a comma is itself."""
    if text is None:
        return ()
    if text in [column.name for column in folder.study().schema.modelled]:
        return (text,)
    return tuple(part.strip() for part in text.split(","))


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """["grade=0.05", "died=0.3"] -> shares by column. Raises UsageError SHARE-FORM."""
    out = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not name.strip() or not 0 < share <= 1:
            raise UsageError("SHARE-FORM", f"{text!r} is not a column with a share", hint="--minimum-share grade=0.05")
        out[name.strip()] = share
    return out


def _narrow(before: object, column: Column, sign: str, value: str) -> object:
    name, levels = column.name, column.levels
    if levels is not None:
        if sign not in ("=", "!="):
            raise UsageError("WHERE-SIGN", f"{name!r} has levels: use = or !=")
        alias = {"0": "false", "1": "true"}.get(value, value) if set(levels) == {"false", "true"} else value
        if alias not in levels:
            raise UsageError("WHERE-VALUE", f"{name!r} has no level {value!r}", hint="levels: " + ", ".join(levels))
        allowed = {alias} if sign == "=" else set(levels) - {alias}
        allowed = allowed & before if isinstance(before, set) else allowed
        if not allowed:
            raise UsageError("WHERE-EMPTY", f"the conditions on {name!r} exclude each other")
        return allowed
    number = _point(column, value)
    if number is None or sign == "!=":
        raise UsageError("WHERE-VALUE", f"{name!r} is a number or a date: use =, <, <=, > or >= with one")
    low, high = before if isinstance(before, tuple) else (None, None)
    if sign in ("=", ">", ">="):
        bound = _beside(column, number, +1) if sign == ">" else number
        low = bound if low is None else max(low, bound)
    if sign in ("=", "<", "<="):
        bound = _beside(column, number, -1) if sign == "<" else number
        high = bound if high is None else min(high, bound)
    if low is not None and high is not None and low > high:
        raise UsageError("WHERE-EMPTY", f"the conditions on {name!r} exclude each other")
    return low, high


def _point(column: Column, value: str) -> Any:
    """A condition's number or moment on the column's axis, or None."""
    if column.kind in ("date", "datetime"):
        try:
            moment: Any = pd.Timestamp(value)
        except ValueError:
            return None
        if pd.isna(moment):
            return None
        moment = moment if moment.tzinfo is None else moment.tz_convert("UTC").tz_localize(None)
        return moment.normalize() if column.kind == "date" else moment
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _beside(column: Column, point: Any, side: int) -> Any:
    """The bound that turns < into ≤: the next day, a millisecond, or a hair on a grid that is far coarser."""
    if column.kind == "date":
        return point + side * pd.Timedelta(days=1)
    if column.kind == "datetime":
        return point + side * pd.Timedelta(milliseconds=1)
    return point + side * _HAIR * max(1.0, abs(point))

"""Fidelity: do the synthetic rows look like real ones, column by column and pair by pair?

The two mean distances tvd1 and tvd2 follow the benchmark's definition: numbers in 20 quantile bins of the
real training rows, missing as a cell of its own, mean total variation distance over all columns and over all
pairs of columns, dates left out.
Association is Cramér's V on coarse cells with Bergsma's bias correction (Bergsma 2013, J. Korean Stat. Soc.
42, eq. 7 and 8): one measure from 0 to 1 for any mix of kinds; without the correction, independent columns
would score above 0 in a small table and higher the fewer the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cohortium.common.errors import TableError
from cohortium.common.evaluation import cells
from cohortium.common.evaluation.cells import Cells

if TYPE_CHECKING:
    from cohortium.common.schema import Column, Schema

PAIRS_AT_MOST = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """A table in cells: codes int64 [columns, rows]."""

    codes: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.codes.shape[1])

    def take(self, rows: np.ndarray) -> Coded:
        return Coded(codes=np.ascontiguousarray(self.codes[:, rows]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruler:
    """One set of cells for all columns, made from the real training rows."""

    cells: tuple[Cells, ...]

    @classmethod
    def make(cls, columns: Sequence[Column], train: pd.DataFrame, *, target: str | None, coarse: bool) -> Ruler:
        rule = cells.for_association if coarse else cells.for_scoring
        return cls(cells=tuple(rule(c, train[c.name], as_level=c.name == target) for c in columns))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(c.size for c in self.cells)

    def encode(self, table: pd.DataFrame) -> Coded:
        if not self.cells:
            return Coded(codes=np.empty((0, len(table)), dtype=np.int64))
        return Coded(codes=np.stack([c.encode(table[c.column.name]) for c in self.cells]))


def scored_columns(schema: Schema, tables: dict[str, pd.DataFrame]) -> tuple[Column, ...]:
    """The modelled columns, which every table must have and which must hold at least one row.

    Raises TableError where a table lacks a column or is empty.
    """
    columns = tuple(schema.modelled)
    for name, table in tables.items():
        lacking = [c.name for c in columns if c.name not in table.columns]
        if lacking:
            raise TableError(
                "EVAL-COLUMNS",
                f"The {name} table lacks the column {lacking[0]!r}"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + " of the dictionary.",
                hint="Compare tables that fit the study's dictionary.",
            )
        if not len(table):
            raise TableError(
                "EVAL-EMPTY",
                f"The {name} table has no rows.",
                hint="Sample at least one row, or hold out fewer.",
            )
    return columns


def shares(codes: np.ndarray, size: int) -> np.ndarray:
    """Share of rows in each cell, float64 [size]; all zero for no rows."""
    return np.bincount(codes, minlength=size) / max(len(codes), 1)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation distance of two share vectors, 0 to 1."""
    return float(0.5 * np.abs(first - second).sum())


def column_distances(first: Coded, second: Coded, sizes: Sequence[int]) -> np.ndarray:
    """Total variation distance of every column, float64 [columns]."""
    return np.array([distance(shares(a, k), shares(b, k)) for a, b, k in zip(first.codes, second.codes, sizes)])


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float | None:
    """Greatest gap between the distribution functions of two samples (NaN left out); None if one is empty."""
    a, b = (np.sort(x[~np.isnan(x)]) for x in (first, second))
    if not len(a) or not len(b):
        return None
    at = np.concatenate([a, b])
    gap = np.searchsorted(a, at, side="right") / len(a) - np.searchsorted(b, at, side="right") / len(b)
    return float(np.abs(gap).max())


def pairs_of(columns: int, *, seed: int = 0, at_most: int = PAIRS_AT_MOST) -> np.ndarray:
    """All pairs i < j, int [pairs, 2], or a seeded sample of them where there are more than `at_most`."""
    every = np.stack(np.triu_indices(columns, 1), axis=1)
    if len(every) <= at_most:
        return every
    chosen = np.random.default_rng(seed).choice(len(every), size=at_most, replace=False)
    return every[np.sort(chosen)]


def pair_tables(table: Coded, sizes: Sequence[int], pairs: np.ndarray) -> Iterator[np.ndarray]:
    """Counts of each pair's cells, one flat int64 vector of size_i · size_j after the other."""
    for i, j in pairs:
        yield np.bincount(table.codes[i] * sizes[j] + table.codes[j], minlength=sizes[i] * sizes[j])


def pair_distances(first: Coded, second: Coded, sizes: Sequence[int], pairs: np.ndarray) -> np.ndarray:
    """Total variation distance of every pair's joint shares, float64 [pairs]."""
    n, m = max(first.rows, 1), max(second.rows, 1)
    both = zip(pair_tables(first, sizes, pairs), pair_tables(second, sizes, pairs))
    return np.array([distance(a / n, b / m) for a, b in both])


def cramers_v(counts: np.ndarray) -> float:
    """Bias-corrected Cramér's V of a table of counts, 0 to 1; 0 where a side has a single level."""
    table = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0].astype(float)
    n = table.sum()
    r, k = table.shape
    if min(r, k) < 2 or n < 2:
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / n
    phi2 = max(0.0, float(((table - expected) ** 2 / expected).sum() / n) - (r - 1) * (k - 1) / (n - 1))
    room = min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1
    return float(min(1.0, np.sqrt(phi2 / room))) if room > 0 else 0.0


def associations(table: Coded, sizes: Sequence[int], pairs: np.ndarray) -> np.ndarray:
    """Cramér's V of every pair, float64 [pairs]."""
    return np.array(
        [cramers_v(t.reshape(sizes[i], sizes[j])) for t, (i, j) in zip(pair_tables(table, sizes, pairs), pairs)]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Mean and standard deviation of the values present (None for categories or if none), share missing."""

    mean: float | None
    sd: float | None
    missing: float


def moments(column: Column, values: pd.Series[Any]) -> Moments:
    if column.categorical or cells.is_date(column):
        return Moments(mean=None, sd=None, missing=float(values.isna().mean()))
    x = cells.numbers(column, values)
    seen = x[~np.isnan(x)]
    return Moments(
        mean=float(seen.mean()) if len(seen) else None,
        sd=float(seen.std(ddof=1)) if len(seen) > 1 else None,
        missing=float(np.isnan(x).mean()),
    )

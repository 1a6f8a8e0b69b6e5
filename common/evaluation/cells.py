"""The ruler's cells: how a value of one column becomes a cell number, for scoring and for pictures.

Unlike common/encoding (public rule, used under privacy), these cells are made FROM real rows. They may only
be used where the real rows are: in a simulation, or inside a site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from cohortium.common.schema import Column

MISSING = "__missing__"


def is_date(column: Column) -> bool:
    return column.kind in ("date", "datetime")


def numbers(column: Column, values: pd.Series[Any]) -> np.ndarray:
    """The column as float64, dates as days since 1970; what is missing, infinite or no number becomes NaN."""
    if is_date(column):
        when = pd.to_datetime(values, errors="coerce", utc=True)
        days = (when - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
        out = days.to_numpy(dtype=float, na_value=np.nan)
    else:
        out = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    return np.where(np.isfinite(out), out, np.nan)


def level_text(value: object) -> str:
    """A level as text; 1.0 and 1 are the same level, as a column with gaps is read as float."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def levels_of(column: Column, values: pd.Series[Any]) -> tuple[np.ndarray, list[str]]:
    """(index of each row's level, −1 for missing; the distinct levels as text).

    A boolean is "true" or "false" however it is written, as the real table and the synthetic one may differ.
    """
    index, distinct = pd.factorize(values.astype(object), use_na_sentinel=True)
    texts = [level_text(v) for v in distinct]
    if column.kind == "boolean":
        yes, no = ({t.lower() for t in side} for side in (column.true_values, column.false_values))
        texts = ["true" if t.lower() in yes else "false" if t.lower() in no else t for t in texts]
    merged = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    lookup = np.array([merged[t] for t in texts] + [-1], dtype=np.int64)
    return lookup[index], list(merged)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Cells of one column: `edges` for numbers, `levels` (text → cell) for categories. The last cell is
    "missing".

    Categories have, before it, one cell for levels not listed.
    """

    column: Column
    edges: np.ndarray | None = None
    levels: dict[str, int] | None = None
    labels: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        if self.edges is not None:
            return len(self.edges) + 2
        assert self.levels is not None
        return max(self.levels.values(), default=-1) + 3

    def encode(self, values: pd.Series[Any]) -> np.ndarray:
        """Cell number of each row, int64."""
        last = self.size - 1
        if self.edges is not None:
            x = numbers(self.column, values)
            return np.where(np.isnan(x), last, np.searchsorted(self.edges, x, side="right"))
        assert self.levels is not None
        index, texts = levels_of(self.column, values)
        lookup = np.array([self.levels.get(t, last - 1) for t in texts] + [last], dtype=np.int64)
        return lookup[index]


def by_level(column: Column, values: pd.Series[Any], *, most: int | None = None) -> Cells:
    """One cell per level seen in the real rows, or per each of the `most` commonest."""
    index, texts = levels_of(column, values)
    counts = np.bincount(index[index >= 0], minlength=len(texts))
    order = sorted(range(len(texts)), key=lambda i: (-counts[i], texts[i]))
    kept = sorted(texts[i] for i in order[:most])
    if kept and all(_is_number(t) for t in kept):
        kept.sort(key=float)
    labels = (*kept, "other", "missing")
    return Cells(column=column, levels={t: i for i, t in enumerate(kept)}, labels=labels)


def by_quantile(column: Column, values: pd.Series[Any], *, bins: int) -> Cells:
    """At most `bins` cells that hold about equally many real rows; ties share a cell."""
    x = numbers(column, values)
    x = x[~np.isnan(x)]
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.unique(np.quantile(x, inner)) if len(x) else np.empty(0)
    return Cells(column=column, edges=edges)


def for_scoring(column: Column, values: pd.Series[Any], *, as_level: bool = False, bins: int = 20) -> Cells:
    """The ruler's cells: every level seen, or `bins` quantile bins."""
    if column.categorical or as_level:
        return by_level(column, values)
    return by_quantile(column, values, bins=bins)


def for_association(column: Column, values: pd.Series[Any], *, as_level: bool = False) -> Cells:
    """Coarse cells (5 quantile bins, 6 commonest levels), so that few patients fill a two-way table."""
    if column.categorical or as_level:
        return by_level(column, values, most=6)
    return by_quantile(column, values, bins=5)


def for_picture(column: Column, values: pd.Series[Any], *, bars: int = 14) -> Cells:
    """Cells a reader can name: each level (the commonest), each whole number if few, else equal widths."""
    if column.categorical:
        return by_level(column, values, most=bars - 3)
    x = numbers(column, values)
    x = x[~np.isnan(x)]
    distinct = np.unique(x)
    whole = not is_date(column) and bool(np.all(distinct == np.rint(distinct)))
    if not len(distinct) or (len(distinct) <= bars - 2 and whole):
        edges = (distinct[1:] + distinct[:-1]) / 2
        labels = tuple(f"{v:.0f}" for v in distinct) if len(distinct) else ("any value",)
        return Cells(column=column, edges=edges, labels=(*labels, "missing"))
    low, high = np.quantile(x, (0.01, 0.99))
    if low == high:
        low, high = x.min(), x.max()
    edges = np.unique(np.linspace(low, high, bars - 2))
    marks = [_mark(column, e, high - low) for e in edges]
    middle = [f"{a} to {b}" for a, b in pairwise(marks)]
    return Cells(column=column, edges=edges, labels=(f"below {marks[0]}", *middle, f"{marks[-1]} and above", "missing"))


def _mark(column: Column, value: float, width: float) -> str:
    if is_date(column):
        return str((pd.Timestamp(0) + pd.Timedelta(days=float(value))).date())
    digits = max(0, 2 - int(np.floor(np.log10(width)))) if width > 0 else 2
    return f"{value:.{min(digits, 6)}f}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

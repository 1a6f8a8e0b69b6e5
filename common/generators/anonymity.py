"""Coarser quasi-identifiers where a combination is rare in the synthetic table: by public rule, from that table alone.

    numbers   ever wider bins, aligned at multiples of their width; a value becomes its bin's middle
    levels    left empty, the dictionary's last quasi-identifier first, until the combination is frequent enough
No row is deleted and no real row is looked at: whether a combination is rare among patients plays no part, so a row
that is missing or coarse tells nothing about anybody. A class of rows only ever grows (Samarati 2001, local recoding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cohortium.common.encoding import NumberGrid, grids
from cohortium.common.errors import UsageError
from cohortium.common.generators.base import Floats

if TYPE_CHECKING:
    from cohortium.common.schema import Column, Schema

WIDENINGS = 4
NARROWEST = 32
"""The first bins are about a 32nd of the dictionary's range wide, each further step twice that, the last a quarter."""
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coarsened:
    """values: quasi-identifier -> values after the rule, float64 [rows]: a number, a level's place, NaN for missing.

    changed: rows whose value of that column became coarser. smallest: rows of the smallest class.
    """

    values: dict[str, Floats]
    changed: dict[str, int]
    smallest: int


def quasi_identifiers(schema: Schema) -> tuple[Column, ...]:
    return tuple(column for column in schema.modelled if column.role == "quasi-identifier")


def sensitive_columns(schema: Schema) -> tuple[Column, ...]:
    return tuple(column for column in schema.modelled if column.role == "sensitive")


def plain_values(schema: Schema, table: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Floats]:
    """Each column as float64 [rows]: numbers, days or seconds as in the dictionary, a level's place; NaN: missing."""
    places = {column.name: grid for column, grid in zip(schema.modelled, grids(schema), strict=True)}
    out = {}
    for column in columns:
        grid = places[column.name]
        if isinstance(grid, NumberGrid):
            out[column.name] = grid.numbers(table[column.name])
        else:
            codes = grid.encode(table[column.name])
            out[column.name] = np.where(codes == grid.missing, np.nan, codes.astype(np.float64))
    return out


def coarsen(
    columns: Sequence[Column],
    values: Mapping[str, Floats],
    *,
    k: int,
    sensitive: Mapping[str, Floats] | None = None,
    diverse: int = 1,
) -> Coarsened:
    """Every combination of the columns' values occurs k times or more, with `diverse` values of each sensitive column.

    columns: quasi-identifiers in the dictionary's order. values: as `plain_values`. Missing is a value of its own in a
    combination and none of a sensitive column. UsageError ANONYMITY where the whole table is too small or too uniform.
    """
    if not columns:
        raise UsageError("ANONYMITY", "the dictionary names no quasi-identifier", hint='"role": "quasi-identifier"')
    now = {column.name: values[column.name].copy() for column in columns}
    rows = len(next(iter(now.values())))
    others = dict(sensitive or {})
    _refuse_hopeless(rows, k, others, diverse)
    rare = _rare(_classes(now), k, others, diverse)
    for step in range(1, WIDENINGS + 1):
        if not rare.any():
            break
        for column in columns:
            if column.levels is None:
                now[column.name][rare] = widen(column, values[column.name][rare], step)
        rare = _rare(_classes(now), k, others, diverse)
    for column in reversed(columns):
        if not rare.any():
            break
        now[column.name][rare] = _top(column)
        rare = _rare(_classes(now), k, others, diverse)
    if rare.any():
        _absorb(columns, now, rare, k, others, diverse)
    before = {name: values[name] for name in now}
    changed = {
        name: int((~((now[name] == before[name]) | (np.isnan(now[name]) & np.isnan(before[name])))).sum())
        for name in now
    }
    return Coarsened(values=now, changed=changed, smallest=int(np.bincount(_classes(now)).min()))


def coarse_blocks(
    schema: Schema, blocks: Callable[[], Iterator[pd.DataFrame]], *, k: int | None, diverse: int | None
) -> Iterator[pd.DataFrame]:
    """The blocks with coarser quasi-identifiers; as they are where neither k nor `diverse` is set.

    blocks: gives the same table whenever it is called. It is called twice, to count combinations and to change them, so
    that only the quasi-identifiers and sensitive columns of the whole table are in memory.
    """
    if k is None and diverse is None:
        yield from blocks()
        return
    quasi, sensitive = quasi_identifiers(schema), sensitive_columns(schema) if diverse is not None else ()
    kept = [plain_values(schema, block, (*quasi, *sensitive)) for block in blocks()]
    values = {column.name: np.concatenate([part[column.name] for part in kept]) for column in (*quasi, *sensitive)}
    del kept
    others = {column.name: values[column.name] for column in sensitive}
    after = coarsen(quasi, values, k=k or 1, sensitive=others, diverse=diverse or 1).values
    at = 0
    for block in blocks():
        part = slice(at, at + len(block))
        for column in quasi:
            name = column.name
            block[name] = put_back(column, block[name], values[name][part], after[name][part])
        at += len(block)
        yield block


def widen(column: Column, x: Floats, step: int) -> Floats:
    """The middle of x's bin at a widening of 1 to WIDENINGS, inside the dictionary's range and on its steps."""
    low, high = float(column.minimum or 0.0), float(column.maximum or 0.0)
    width = _round_width((high - low) / NARROWEST * 2 ** (step - 1), _unit(column))
    if width <= 0:
        return x
    start = np.floor(x / width) * width
    # The bin [start, start + width), cut at the dictionary's ends; its last value is a step before the next bin.
    return _middle(column, np.maximum(start, low), np.minimum(start + width - _unit(column), high))


def _unit(column: Column) -> float:
    return column.resolution or (0.0 if column.kind == "number" else 1.0)


def _middle(column: Column, first: Floats, last: Floats) -> Floats:
    """The value half way, on the column's steps and inside its range."""
    low, unit, middle = float(column.minimum or 0.0), _unit(column), (first + last) / 2
    if unit:
        middle = low + np.floor((middle - low) / unit + 1e-9) * unit
    return np.clip(np.round(middle, 9), low, float(column.maximum or 0.0))


def _round_width(wanted: float, unit: float) -> float:
    """The least of 1, 2, 5, 10, … times a power of ten that is not below `wanted`; at least two steps of the column."""
    wanted = max(wanted, 2 * unit)
    if wanted <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(wanted) + 1e-12)
    return next(m * power for m in (1, 2, 5, 10) if m * power >= wanted * (1 - 1e-9))


def _top(column: Column) -> float:
    """The coarsest value: missing; of a required number, the middle of its range."""
    if not column.required:
        return math.nan
    ends = (np.array([float(bound or 0.0)]) for bound in (column.minimum, column.maximum))
    return float(_middle(column, *ends)[0])


def _classes(now: Mapping[str, Floats]) -> Ints:
    """Rows with the same values get the same number, from 0."""
    found: Ints | None = None
    for values in now.values():
        codes = pd.factorize(values)[0].astype(np.int64) + 1  # missing is 0
        found = codes if found is None else pd.factorize(found * (codes.max() + 1) + codes)[0].astype(np.int64)
    assert found is not None
    return pd.factorize(found)[0].astype(np.int64)


def _rare(classes: Ints, k: int, sensitive: Mapping[str, Floats], diverse: int) -> Mask:
    """Rows of classes that are too small, or too uniform."""
    wrong = np.bincount(classes) < k
    for values in sensitive.values():
        wrong |= _distinct(classes, values) < diverse
    return wrong[classes]


def _distinct(classes: Ints, values: Floats) -> Ints:
    """How many values each class holds; missing is none."""
    known = ~np.isnan(values)
    codes = pd.factorize(values[known])[0].astype(np.int64)
    pairs = np.unique(classes[known] * (int(codes.max(initial=0)) + 1) + codes)
    size = int(classes.max()) + 1
    return np.bincount(pairs // (int(codes.max(initial=0)) + 1), minlength=size)


def _absorb(
    columns: Sequence[Column],
    now: dict[str, Floats],
    rare: Mask,
    k: int,
    sensitive: Mapping[str, Floats],
    diverse: int,
) -> None:
    """The rows that stay rare although nothing is left to coarsen take whole classes in, the smallest first."""
    while rare.any():
        classes = _classes(now)
        sizes = np.bincount(classes).astype(np.float64)
        sizes[classes[np.flatnonzero(rare)[0]]] = np.inf
        # Of equally small ones the first by its values: by no order of the rows.
        rows = np.flatnonzero(sizes[classes] == sizes.min())
        keys = [np.nan_to_num(now[column.name][rows], nan=-np.inf) for column in reversed(columns)]
        rare = rare | (classes == classes[rows[np.lexsort(keys)[0]]])
        for column in columns:
            now[column.name][rare] = _top(column)
        still = _rare(_classes(now), k, sensitive, diverse)
        rare = rare & still


def _refuse_hopeless(rows: int, k: int, sensitive: Mapping[str, Floats], diverse: int) -> None:
    if rows < k:
        raise UsageError("ANONYMITY", f"{rows} rows cannot be alike in groups of {k}", hint=f"k_anonymity = {rows}")
    for name, values in sensitive.items():
        held = len(np.unique(values[~np.isnan(values)]))
        if held < diverse:
            raise UsageError(
                "ANONYMITY",
                f"the synthetic table holds {held} values of {name!r}, and groups shall hold {diverse}",
                hint="a smaller l_diversity, or more rows",
            )


def put_back(column: Column, series: pd.Series, before: Floats, after: Floats) -> pd.Series:
    """The column with its coarser values, in its own type; before, after: as `plain_values`."""
    changed = ~((after == before) | (np.isnan(after) & np.isnan(before)))
    if not changed.any():
        return series
    gone, out = changed & np.isnan(after), series.copy()
    moved = changed & ~gone
    if moved.any():  # numbers and dates only: a level is kept or left empty
        at = np.flatnonzero(moved)
        x = after[at]
        if column.kind in ("integer", "year"):
            out.iloc[at] = np.rint(x).astype(np.int64)
        elif column.kind == "date":
            out.iloc[at] = np.rint(x).astype(np.int64).astype("datetime64[D]").astype(object)
        elif column.kind == "datetime":
            out.iloc[at] = np.rint(x).astype(np.int64).astype("datetime64[s]")
        else:
            out.iloc[at] = x
    empty = None if column.kind == "date" else pd.NaT if column.kind == "datetime" else pd.NA
    if gone.any():
        out.iloc[np.flatnonzero(gone)] = np.nan if out.dtype == np.float64 else empty
    return out

"""The dictionary's rules held against a table of values. Reads what it is given; on synthetic rows it is free.

A rule is judged only where it can be told: a row with a missing value that the rule needs is a row to which it does
not apply. A value outside the dictionary's range counts as missing, as everywhere (encoding.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from cohortium.common.encoding import LevelGrid, NumberGrid, grids
from cohortium.common.errors import TableError
from cohortium.common.rules import Condition, Difference, IfThen, Order, Rule

if TYPE_CHECKING:
    import pandas as pd

    from cohortium.common.schema import Column, Schema

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
_DAY = 86_400.0
_DUST = 1e-9
"""Of the larger value: 0.3 − 0.1 is not quite 0.2 in floating point, and no rule means that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleResult:
    """name: the rule's. applicable: rows in which it could be judged. broken: those of them that break it."""

    name: str
    applicable: int
    broken: int

    @property
    def share(self) -> float | None:
        """Of the applicable rows, the broken ones; None where there is none."""
        return self.broken / self.applicable if self.applicable else None


def check_rules(schema: Schema, table: pd.DataFrame) -> tuple[RuleResult, ...]:
    """One result for each rule of the dictionary, in its order; table: values of the modelled columns, typed or text.

    Raises TableError RULE-COLUMN where the table lacks a column that a rule names.
    """
    return tuple(
        RuleResult(name=rule.name, applicable=int(applicable.sum()), broken=int(broken.sum()))
        for rule, applicable, broken in _judged(schema, table)
    )


def breaking_rows(schema: Schema, table: pd.DataFrame) -> Mask:
    """Which rows break at least one rule, bool [rows]."""
    found = np.zeros(len(table), dtype=bool)
    for _, _, broken in _judged(schema, table):
        found |= broken
    return found


def _judged(schema: Schema, table: pd.DataFrame) -> list[tuple[Rule, Mask, Mask]]:
    """(rule, applicable, broken) of every rule, bool [rows]."""
    cells = _Cells(schema, table)
    return [(rule, *_judge(rule, cells)) for rule in schema.rules]


class _Cells:
    """The table's columns as numbers and levels, each read once."""

    def __init__(self, schema: Schema, table: pd.DataFrame) -> None:
        self.rows = len(table)
        self._table = table
        self._columns = {c.name: (c, g) for c, g in zip(schema.modelled, grids(schema), strict=True)}
        self._numbers: dict[str, Floats] = {}

    def column(self, name: str) -> Column:
        return self._columns[name][0]

    def _series(self, name: str) -> pd.Series:
        if name not in self._table.columns:
            raise TableError("RULE-COLUMN", f"the table has no column {name!r}, which a rule of the dictionary names")
        return self._table[name]

    def levels(self, name: str) -> tuple[NDArray[np.int32], LevelGrid]:
        grid = cast(LevelGrid, self._columns[name][1])
        return grid.encode(self._series(name)), grid

    def numbers(self, name: str) -> Floats:
        """Days for dates, seconds for datetimes, NaN where there is no value."""
        if name not in self._numbers:
            column, grid = self._columns[name]
            if isinstance(grid, NumberGrid):
                x = grid.numbers(self._series(name))
                outside = ~((x >= cast(float, column.minimum)) & (x <= cast(float, column.maximum)))
                self._numbers[name] = np.where(outside, np.nan, x)
            else:
                codes, _ = self.levels(name)
                values = np.array([float(level) for level in column.levels or ()] + [np.nan])
                self._numbers[name] = values[codes]
        return self._numbers[name]

    def missing(self, name: str) -> Mask:
        if isinstance(self._columns[name][1], NumberGrid):
            return np.isnan(self.numbers(name))
        codes, grid = self.levels(name)
        return codes == grid.missing


def _judge(rule: Rule, cells: _Cells) -> tuple[Mask, Mask]:
    if isinstance(rule, IfThen):
        return _implied(rule, cells)
    values = _alike(rule, cells)
    if isinstance(rule, Difference):
        gap = values[0] - values[1]
        dust = _DUST * np.maximum(np.abs(values[0]), np.abs(values[1]))
        applicable = ~np.isnan(gap)
        broken = np.zeros(cells.rows, dtype=bool)
        if rule.minimum is not None:
            broken |= gap < rule.minimum - dust
        if rule.maximum is not None:
            broken |= gap > rule.maximum + dust
        return applicable, broken & applicable
    return _ordered(rule, values, cells.rows)


def _ordered(rule: Order, values: list[Floats], rows: int) -> tuple[Mask, Mask]:
    """Each value against the last one that is there: a missing value in the middle hides no wrong order."""
    highest = np.full(rows, np.nan)
    applicable, broken = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    for value in values:
        both = ~np.isnan(value) & ~np.isnan(highest)
        applicable |= both
        broken |= both & ((value <= highest) if rule.strict else (value < highest))
        highest = np.where(np.isnan(value), highest, np.fmax(value, highest))
    return applicable, broken


def _alike(rule: Order | Difference, cells: _Cells) -> list[Floats]:
    """Values on one scale: beside a date, a datetime is its day."""
    kinds = [cells.column(name).kind for name in rule.columns]
    values = [cells.numbers(name) for name in rule.columns]
    if "date" in kinds and "datetime" in kinds:
        return [np.floor(x / _DAY) if kind == "datetime" else x for x, kind in zip(values, kinds, strict=True)]
    return values


def _implied(rule: IfThen, cells: _Cells) -> tuple[Mask, Mask]:
    """Kleene's logic: one false condition of `then` breaks the rule, whatever is missing beside it."""
    given = np.ones(cells.rows, dtype=bool)
    for condition in rule.given:
        known, true = _held(condition, cells)
        given &= known & true
    false, true_all = np.zeros(cells.rows, dtype=bool), np.ones(cells.rows, dtype=bool)
    for condition in rule.then:
        known, true = _held(condition, cells)
        false |= known & ~true
        true_all &= known & true
    return given & (false | true_all), given & false


def _held(condition: Condition, cells: _Cells) -> tuple[Mask, Mask]:
    """(it can be told, it holds), bool [rows]."""
    if condition.missing is not None:
        gone = cells.missing(condition.column)
        return np.ones(cells.rows, dtype=bool), gone == condition.missing
    if condition.levels:
        codes, grid = cells.levels(condition.column)
        wanted = np.array([level in condition.levels for level in grid.levels] + [False])
        return codes != grid.missing, wanted[codes]
    x = cells.numbers(condition.column)
    low = -np.inf if condition.minimum is None else condition.minimum
    high = np.inf if condition.maximum is None else condition.maximum
    return ~np.isnan(x), (x >= low) & (x <= high)

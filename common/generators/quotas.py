"""How many rows of each combination of levels a balanced table has. Public arithmetic on a model's own rows.

A balanced column's levels occur equally often (rows without a value do not occur); under a minimum share each level
has at least that part of all rows, and everything else keeps the proportions that the model gives it: the
I-projection of the model's shares on these bounds, found by iterative scaling (Csiszár 1975).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cohortium.common.errors import UsageError
from cohortium.common.generators.base import Floats
from cohortium.common.study_release import sampling_misfit

if TYPE_CHECKING:
    from cohortium.common.encoding import Codes, Grid
    from cohortium.common.schema import Schema

Allowed = Mapping[int, NDArray[np.bool_]]
Ints = NDArray[np.int64]
PILOT_ROWS = 20_000
"""Rows of the model that tell its proportions: a share of 5 % is then known to 0.15 points."""
ROUNDS = 1000
_CLOSE = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One column of the quotas. codes: its fine codes that may occur. share: of all rows, for each level at least.

    share None: balanced. levels: how many of `codes`, from the first, are levels; the missing code, if any, is last.
    """

    column: int
    name: str
    codes: tuple[int, ...]
    levels: int
    share: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quotas:
    """axes: balanced columns first. A cell is a choice of one code of each; cells count as in a C-ordered array."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis.codes) for axis in self.axes)

    @property
    def cells(self) -> int:
        return math.prod(self.shape)

    def cell_of(self, codes: Codes) -> Ints:
        """The cell of each row, -1 for a row that belongs to none; codes [rows, columns]."""
        cell = np.zeros(len(codes), dtype=np.int64)
        outside = np.zeros(len(codes), dtype=bool)
        for axis in self.axes:
            held = codes[:, axis.column]
            place = np.full(int(max(held.max(initial=0), *axis.codes)) + 1, -1, dtype=np.int64)
            place[list(axis.codes)] = np.arange(len(axis.codes))
            outside |= place[held] < 0
            cell = cell * len(axis.codes) + place[held]
        return np.where(outside, -1, cell)

    def condition(self, cell: int, grids: Sequence[Grid]) -> dict[int, NDArray[np.bool_]]:
        """A cell as allowed fine codes by column."""
        out = {}
        for axis, at in zip(self.axes, np.unravel_index(cell, self.shape), strict=True):
            only = np.zeros(grids[axis.column].size, dtype=bool)
            only[axis.codes[int(at)]] = True
            out[axis.column] = only
        return out

    def named(self, cell: int, grids: Sequence[Grid]) -> str:
        """A cell in words: "sex = F, grade = missing"."""
        words = []
        for axis, at in zip(self.axes, np.unravel_index(cell, self.shape), strict=True):
            code = axis.codes[int(at)]
            value = grids[axis.column].decode(np.array([code], dtype=np.int32), np.zeros(1)).iloc[0]
            words.append(f"{axis.name} = {'missing' if code == grids[axis.column].missing else value}")
        return ", ".join(words)

    def counts(self, rows: int, pilot: Ints | None) -> Ints:
        """Rows of each cell [cells], `rows` in all. pilot: rows of the model in each cell; None: nothing to keep."""
        balanced = sum(axis.share is None for axis in self.axes)
        outer = math.prod(self.shape[:balanced])
        totals = np.full(outer, rows // outer) + (np.arange(outer) < rows % outer)
        if balanced == len(self.axes):
            return totals.astype(np.int64)
        # Half a row of smoothing in all: a combination that the pilot did not show is rare and not impossible.
        drawn = np.zeros(self.cells) if pilot is None else pilot.astype(np.float64)
        shares = self._projected(((drawn + 0.5 / self.cells) / (drawn.sum() + 0.5)).reshape(self.shape), balanced)
        inner = shares.reshape(outer, -1)
        out = np.stack([_rounded(total, part) for total, part in zip(totals, inner, strict=True)]).reshape(self.shape)
        for at, axis in enumerate(self.axes):
            if axis.share is not None:
                _repair(out, at, axis, need=min(math.ceil(axis.share * rows - _CLOSE), rows // axis.levels))
        return out.reshape(-1).astype(np.int64)

    def _projected(self, shares: Floats, balanced: int) -> Floats:
        """Scale axis after axis until every bound holds; one axis alone needs one round."""
        outer = tuple(range(balanced, len(self.axes)))
        for _ in range(ROUNDS):
            before = shares
            if balanced:
                held = shares.sum(axis=outer, keepdims=True)
                shares = shares / held / math.prod(self.shape[:balanced])
            for at, axis in enumerate(self.axes):
                if axis.share is not None:
                    others = tuple(i for i in range(len(self.axes)) if i != at)
                    now = shares.sum(axis=others)
                    factor = lifted(now, axis.levels, axis.share) / now
                    shares = shares * factor.reshape([-1 if i == at else 1 for i in range(len(self.axes))])
            if np.abs(shares - before).max() < _CLOSE:
                break
        return shares


def lifted(shares: Floats, levels: int, least: float) -> Floats:
    """Shares of which the first `levels` are at least `least`; all that stay above keep their proportions."""
    low = np.zeros(len(shares), dtype=bool)
    while True:
        free = float(shares[~low].sum())
        rest = max(0.0, 1.0 - least * low.sum())
        out = np.where(low, least, shares * (rest / free if free > 0 else 0.0))
        more = ~low & (np.arange(len(shares)) < levels) & (out < least)
        if not more.any():
            return out
        low |= more


def quotas_for(
    schema: Schema,
    grids: Sequence[Grid],
    rows: int,
    *,
    balance: Sequence[str],
    minimum_share: Mapping[str, float],
    allowed: Allowed,
) -> Quotas:
    """The axes, narrowed to the codes that a condition allows. UsageError BALANCE-… where it cannot be."""
    misfit = sampling_misfit(schema, rows, balance=balance, minimum_share=minimum_share)
    if misfit is not None:
        raise UsageError(misfit.code, misfit.sentence, hint=misfit.fix)
    names = [column.name for column in schema.modelled]
    axes = []
    for name in (*balance, *minimum_share):
        index = names.index(name)
        grid = grids[index]
        may = allowed.get(index, np.ones(grid.size, dtype=bool)).copy()
        if grid.required or name in balance:
            may[grid.missing] = False
        codes = tuple(int(code) for code in np.flatnonzero(may))
        levels = sum(code != grid.missing for code in codes)
        if not levels:
            raise UsageError("BALANCE-EMPTY", f"the condition leaves no level of {name!r}", hint="another --where")
        axes.append(Axis(column=index, name=name, codes=codes, levels=levels, share=minimum_share.get(name)))
    return Quotas(axes=tuple(axes))


def block_counts(left: Ints, size: int, rng: np.random.Generator) -> Ints:
    """How many rows of each cell the next `size` rows hold, so that all rows together come in random order."""
    total = int(left.sum())
    if total < 10**9:  # what numpy's sampler takes
        found: Ints = rng.multivariate_hypergeometric(left, size, method="marginals")
        return found
    return np.minimum(_rounded(size, left / total), left)


def _rounded(total: int, shares: Floats) -> Ints:
    """Whole numbers near total · shares that sum to total: largest remainders."""
    sum_ = float(shares.sum())
    exact = total * shares / sum_ if sum_ > 0 else np.full(len(shares), total / len(shares))
    out = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - out), kind="stable")
    out[order[: int(total - out.sum())]] += 1
    return out


def _repair(counts: Ints, at: int, axis: Axis, *, need: int) -> None:
    """Rounding may fall short: move rows along this axis, which leaves every other column's counts as they are."""
    lines = np.moveaxis(counts, at, 0).reshape(len(axis.codes), -1)
    moved = lines.copy()
    for level in range(axis.levels):
        while (short := need - int(moved[level].sum())) > 0:
            spare = moved.sum(axis=1) - np.where(np.arange(len(axis.codes)) < axis.levels, need, 0)
            spare[level] = 0
            giver = int(np.argmax(spare))
            cell = int(np.argmax(moved[giver]))
            step = min(short, int(spare[giver]), int(moved[giver, cell]))
            if step < 1:
                break
            moved[giver, cell] -= step
            moved[level, cell] += step
    rest = [size for i, size in enumerate(counts.shape) if i != at]
    counts[...] = np.moveaxis(moved.reshape(len(axis.codes), *rest), 0, at)

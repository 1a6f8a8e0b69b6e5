"""From a model to rows: draw, herd, place values inside bins, decode. In blocks, reproducible by seed.

Balanced rows come from the same draws as all others, thinned to their quotas; what is short is drawn under a condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cohortium.common.encoding import NumberGrid
from cohortium.common.errors import UsageError
from cohortium.common.generators.base import Floats, Model
from cohortium.common.generators.bins import Bins
from cohortium.common.generators.quotas import PILOT_ROWS, Ints, Quotas, block_counts, quotas_for
from cohortium.common.generators.threads import in_order
from cohortium.common.rule_checks import breaking_rows

if TYPE_CHECKING:
    from cohortium.common.encoding import Codes, Grid
    from cohortium.common.schema import Schema

BLOCK = 8192
MOST_DRAWS = 1000
"""Times the rows wanted that are drawn for rows which keep the dictionary's rules, before that is given up."""
LEAST_DRAWS = 2000
Allowed = Mapping[int, NDArray[np.bool_]]


class Placer:
    """Fine codes inside chosen bins, by the noised histogram there; only allowed codes."""

    def __init__(self, bins: Bins, allowed: NDArray[np.bool_] | None) -> None:
        self._order = np.argsort(bins.map, kind="stable").astype(np.int32)
        self._counts = np.bincount(bins.map, minlength=bins.size)
        self._first = np.concatenate([[0], np.cumsum(self._counts)])[:-1]
        self._single = allowed is None and bool((self._counts == 1).all())
        weight = bins.within.copy()
        if allowed is not None:
            weight = weight * allowed
            held = np.bincount(bins.map, weights=weight, minlength=bins.size)
            bare = (held <= 0)[bins.map] & allowed  # allowed codes of a bin whose histogram gives them nothing
            weight[bare] = 1.0
        self._weight = weight
        self._held = np.bincount(bins.map, weights=weight, minlength=bins.size)
        self._start = np.concatenate([[0.0], np.cumsum(self._held)])[:-1]
        self._cumulative = np.cumsum(weight[self._order])
        by_weight = np.argsort(weight, kind="stable")
        self._heaviest = np.zeros(bins.size, dtype=np.int32)
        self._heaviest[bins.map[by_weight]] = by_weight

    def place(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> Codes:
        """A code of each chosen bin, int32."""
        if self._single:
            return self._order.take(chosen)
        at = self._start.take(chosen) + rng.random(len(chosen)) * self._held.take(chosen)
        first = self._first.take(chosen)
        position = np.searchsorted(self._cumulative, at, side="right")
        position = np.clip(position, first, first + self._counts.take(chosen) - 1)
        fine = self._order.take(position)
        lost = self._weight.take(fine) <= 0  # float dust at a bin's end: take the bin's heaviest code
        return np.where(lost, self._heaviest.take(chosen), fine) if lost.any() else fine


def bin_share(bins: Bins, allowed: NDArray[np.bool_]) -> Floats:
    """Which part of each bin a condition allows; a bin without noised mass on it counts its codes."""
    share: Floats = np.bincount(bins.map, weights=bins.within * allowed, minlength=bins.size).astype(np.float64)
    if not share.sum() > 0:
        share = np.bincount(bins.map, weights=allowed, minlength=bins.size) / np.bincount(bins.map, minlength=bins.size)
    return np.clip(share, 0.0, 1.0)


def resampled(weight: Floats, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices [rows] of rows taken by their weight, in random order: systematic resampling, few rows twice."""
    at = (np.arange(rows) + rng.random()) / rows
    cumulative = np.cumsum(weight) / weight.sum()
    return np.asarray(rng.permutation(np.searchsorted(cumulative, at).clip(0, len(weight) - 1)), dtype=np.int64)


def conditions(
    schema: Schema, grids: tuple[Grid, ...], where: Mapping[str, object] | None
) -> dict[int, NDArray[np.bool_]]:
    """{column name: value, set of values, or (low, high)} as allowed fine codes by column index."""
    names = [c.name for c in schema.modelled]
    out = {}
    for name, wanted in (where or {}).items():
        if name not in names:
            raise UsageError("WHERE-COLUMN", f"the model has no column {name!r}", hint="columns: " + ", ".join(names))
        grid = grids[names.index(name)]
        allowed = grid.allowed(wanted)
        if grid.required:
            allowed[grid.missing] = False
        if not allowed.any():
            raise UsageError("WHERE-EMPTY", f"the condition on {name!r} allows no value")
        out[names.index(name)] = allowed
    return out


def decode(
    schema: Schema,
    grids: tuple[Grid, ...],
    codes: Codes,
    rng: np.random.Generator,
    where: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """A table with the dictionary's modelled columns, in its order and types. where: bounds that values keep."""
    out = {}
    for i, (c, g) in enumerate(zip(schema.modelled, grids)):
        u, wanted = rng.random(len(codes)), (where or {}).get(c.name)
        if isinstance(g, NumberGrid) and isinstance(wanted, tuple) and len(wanted) == 2:
            out[c.name] = g.decode_between(codes[:, i], u, wanted)
        else:
            out[c.name] = g.decode(codes[:, i], u)
    return pd.DataFrame(out, copy=False)  # column by column, as they are


def tables(
    model: Model,
    schema: Schema,
    grids: tuple[Grid, ...],
    rows: int,
    *,
    seed: int,
    where: Mapping[str, object] | None = None,
    balance: str | Sequence[str] | None = None,
    minimum_share: Mapping[str, float] | None = None,
    enforce_rules: bool = False,
    block: int = 65536,
) -> Iterator[pd.DataFrame]:
    """Finished rows in blocks, in random order.

    balance: columns whose combinations of levels shall occur equally often. minimum_share: column -> share of all rows
    that each of its levels has at least. enforce_rules: rows that break a rule of the dictionary are drawn again.
    Raises UsageError BALANCE-… for what cannot be, RULES-RARE where the model gives hardly any row that keeps them.
    """
    columns = [balance] if isinstance(balance, str) else list(balance or ())
    allowed = conditions(schema, grids, where)
    rng = np.random.default_rng([seed, 0x7461])
    if not columns and not minimum_share and not enforce_rules:

        def block_of(number: int) -> pd.DataFrame:
            # A block is drawn by a generator of its own, so that it is the same whoever draws it and when.
            own = rng if number == 0 else np.random.default_rng([seed, 0x7461, number])
            size = min(block, rows - number * block)
            codes = model.sample(size, seed=int(own.integers(2**62)), where=allowed or None)
            return decode(schema, grids, codes, own, where)

        yield from in_order(block_of, math.ceil(rows / block))
        return
    shares = dict(minimum_share or {})
    quotas = quotas_for(schema, grids, rows, balance=columns, minimum_share=shares, allowed=allowed)
    pilot = None
    if shares:
        drawn = quotas.cell_of(model.sample(PILOT_ROWS, seed=int(rng.integers(2**62)), where=allowed or None))
        pilot = np.bincount(drawn[drawn >= 0], minlength=quotas.cells)
    left = quotas.counts(rows, pilot)
    draw = _Draw(
        model=model,
        schema=schema,
        grids=grids,
        where=where,
        allowed=allowed,
        quotas=quotas,
        keep=enforce_rules,
        rng=rng,
    )
    for at in range(0, rows, block):
        wanted = block_counts(left, min(block, rows - at), rng)
        left = left - wanted
        yield draw.block(wanted)


@dataclass(kw_only=True, slots=True)
class _Draw:
    """Blocks of rows that fill quotas. keep: only rows that break no rule of the dictionary."""

    model: Model
    schema: Schema
    grids: tuple[Grid, ...]
    where: Mapping[str, object] | None
    allowed: Allowed
    quotas: Quotas
    keep: bool
    rng: np.random.Generator
    drawn: dict[int, list[int]] = field(default_factory=dict)  # cell -> rows drawn, rows that keep the rules

    def block(self, wanted: Ints) -> pd.DataFrame:
        """wanted [cells] -> as many rows of each cell, in random order."""
        parts: list[pd.DataFrame] = []
        short = wanted - self._take(int(wanted.sum()), None, wanted, parts)
        for cell in np.flatnonzero(short):
            self._fill(int(cell), int(short[cell]), parts)
        table = pd.concat([part for part in parts if len(part)], ignore_index=True)
        return table.iloc[self.rng.permutation(len(table))].reset_index(drop=True)

    def _fill(self, cell: int, short: int, parts: list[pd.DataFrame]) -> None:
        """The rows of one cell that the common draw did not give, drawn under its condition."""
        most, used = MOST_DRAWS * short + LEAST_DRAWS, 0
        wanted = np.zeros(self.quotas.cells, dtype=np.int64)
        while short:
            drawn, kept = self.drawn.get(cell, [0, 0])
            rate = max((kept + 1) / (drawn + 1), 1 / MOST_DRAWS)
            size = min(int(1.1 * short / rate) + 8, 4 * short + LEAST_DRAWS) if self.keep else short
            used += size
            wanted[cell] = short
            short -= int(self._take(size, cell, wanted, parts)[cell])
            if short and used > most:
                name = self.quotas.named(cell, self.grids)
                raise UsageError(
                    "RULES-RARE",
                    f"of {used:,} rows drawn{' with ' + name if name else ''} too few keep the dictionary's rules",
                    hint="balance fewer columns, correct the rule, or leave enforce_rules out",
                )

    def _take(self, size: int, cell: int | None, wanted: Ints, parts: list[pd.DataFrame]) -> Ints:
        """Draw `size` rows, of one cell or of all, and keep at most `wanted` of each; how many were kept [cells]."""
        condition = self.allowed if cell is None else {**self.allowed, **self.quotas.condition(cell, self.grids)}
        codes = self.model.sample(size, seed=int(self.rng.integers(2**62)), where=condition or None)
        cells = self.quotas.cell_of(codes)
        table = None
        if self.keep:
            table = decode(self.schema, self.grids, codes, self.rng, self.where)
            broken = breaking_rows(self.schema, table)
            if cell is not None:
                before = self.drawn.get(cell, [0, 0])
                self.drawn[cell] = [before[0] + size, before[1] + int((~broken).sum())]
            cells = np.where(broken, -1, cells)
        chosen = _first_of_each(cells, wanted, self.rng)
        if table is None:
            parts.append(decode(self.schema, self.grids, codes[chosen], self.rng, self.where))
        else:
            parts.append(table.iloc[chosen])
        return np.bincount(cells[chosen], minlength=self.quotas.cells)


def _first_of_each(cells: Ints, wanted: Ints, rng: np.random.Generator) -> Ints:
    """At most wanted[c] random rows of each cell c; a row of cell -1 is never taken."""
    order = rng.permutation(len(cells))
    order = order[np.argsort(cells[order], kind="stable")]
    sorted_ = cells[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_, sorted_, side="left")
    return order[(sorted_ >= 0) & (rank < wanted[sorted_])]


def table(
    model: Model,
    schema: Schema,
    grids: tuple[Grid, ...],
    rows: int,
    *,
    seed: int,
    where: Mapping[str, object] | None = None,
    balance: str | Sequence[str] | None = None,
    minimum_share: Mapping[str, float] | None = None,
    enforce_rules: bool = False,
) -> pd.DataFrame:
    """All rows as one table, see `tables`."""
    blocks = tables(
        model,
        schema,
        grids,
        rows,
        seed=seed,
        where=where,
        balance=balance,
        minimum_share=minimum_share,
        enforce_rules=enforce_rules,
    )
    return pd.concat(list(blocks), ignore_index=True)

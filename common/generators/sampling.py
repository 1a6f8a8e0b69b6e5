"""From a model to rows: draw, herd, place values inside bins, decode. In blocks, reproducible by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cohortium.common.encoding import NumberGrid
from cohortium.common.errors import UsageError
from cohortium.common.generators.base import Floats, Model
from cohortium.common.generators.bins import Bins

if TYPE_CHECKING:
    from cohortium.common.encoding import Codes, Grid
    from cohortium.common.schema import Schema

BLOCK = 8192
Allowed = Mapping[int, NDArray[np.bool_]]


def inverse_cdf(cumulative: Floats, which: NDArray[np.int64], u: Floats) -> NDArray[np.int64]:
    """For each i the first column j with u_i < cumulative[which_i, j]; rows end in 1."""
    rows, width = cumulative.shape
    flat = (cumulative + np.arange(rows)[:, None]).ravel()
    index = np.searchsorted(flat, which + u, side="right") - which * width
    return np.clip(index, 0, width - 1)


def to_fine(bins: Bins, chosen: NDArray[np.int64], u: Floats, allowed: NDArray[np.bool_] | None) -> Codes:
    """A fine code inside each chosen bin, by the noised histogram there; only allowed codes."""
    weight = bins.within.copy()
    if allowed is not None:
        weight = weight * allowed
        held = np.bincount(bins.map, weights=weight, minlength=bins.size)
        bare = (held <= 0)[bins.map] & allowed  # allowed codes of a bin whose histogram gives them nothing
        weight[bare] = 1.0
    order = np.argsort(bins.map, kind="stable")
    held = np.bincount(bins.map, weights=weight, minlength=bins.size)
    cumulative = np.cumsum(weight[order])
    start = np.concatenate([[0.0], np.cumsum(held)])[:-1]
    position = np.searchsorted(cumulative, start[chosen] + u * held[chosen], side="right")
    counts = np.bincount(bins.map, minlength=bins.size)
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    position = np.clip(position, first[chosen], first[chosen] + counts[chosen] - 1)
    fine = order[position]
    lost = weight[fine] <= 0  # float dust at a bin's end: take the bin's heaviest code
    if lost.any():
        heaviest = np.zeros(bins.size, dtype=np.int64)
        by_weight = np.argsort(weight, kind="stable")
        heaviest[bins.map[by_weight]] = by_weight
        fine = np.where(lost, heaviest[chosen], fine)
    return fine.astype(np.int32)


def bin_share(bins: Bins, allowed: NDArray[np.bool_]) -> Floats:
    """Which part of each bin a condition allows; a bin without noised mass on it counts its codes."""
    share: Floats = np.bincount(bins.map, weights=bins.within * allowed, minlength=bins.size).astype(np.float64)
    if not share.sum() > 0:
        share = np.bincount(bins.map, weights=allowed, minlength=bins.size) / np.bincount(bins.map, minlength=bins.size)
    return np.clip(share, 0.0, 1.0)


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
    return pd.DataFrame(out)


def tables(
    model: Model,
    schema: Schema,
    grids: tuple[Grid, ...],
    rows: int,
    *,
    seed: int,
    where: Mapping[str, object] | None = None,
    balance: str | None = None,
    block: int = 65536,
) -> Iterator[pd.DataFrame]:
    """Finished rows in blocks. balance: a column whose levels shall occur equally often."""
    allowed = conditions(schema, grids, where)
    rng = np.random.default_rng([seed, 0x7461])
    parts: list[tuple[int, Allowed]] = [(rows, allowed)]
    if balance is not None:
        parts = _balanced(schema, grids, balance, rows, allowed)
    for part, (count, condition) in enumerate(parts):
        for at in range(0, count, block):
            size = min(block, count - at)
            codes = model.sample(size, seed=int(rng.integers(2**62)) + part, where=condition or None)
            yield decode(schema, grids, codes, rng, where)


def _balanced(
    schema: Schema, grids: tuple[Grid, ...], name: str, rows: int, allowed: Allowed
) -> list[tuple[int, Allowed]]:
    names = [c.name for c in schema.modelled]
    if name not in names:
        raise UsageError("BALANCE-COLUMN", f"the model has no column {name!r}", hint="columns: " + ", ".join(names))
    index = names.index(name)
    grid = grids[index]
    codes = np.arange(grid.size - 1)
    if index in allowed:
        codes = codes[allowed[index][:-1]]
    out: list[tuple[int, Allowed]] = []
    for i, code in enumerate(codes):
        only = np.zeros(grid.size, dtype=bool)
        only[code] = True
        count = rows // len(codes) + (1 if i < rows % len(codes) else 0)
        out.append((count, {**allowed, index: only}))
    return out


def table(
    model: Model,
    schema: Schema,
    grids: tuple[Grid, ...],
    rows: int,
    *,
    seed: int,
    where: Mapping[str, object] | None = None,
    balance: str | None = None,
) -> pd.DataFrame:
    """All rows as one table. Class-balanced tables come class after class."""
    return pd.concat(
        list(tables(model, schema, grids, rows, seed=seed, where=where, balance=balance)), ignore_index=True
    )

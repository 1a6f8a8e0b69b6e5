"""Levels of a target for many rows at once: each row's by its law, all together with the law's moments. Free of budget.

Levels drawn row by row are the law and the luck of so many draws, and of a rare level there are few: what a classifier
then learns from the rows is the luck as well. So levels are drawn DRAWS times, and of all rows that a level fell on
those keep it which together have the one-ways and moments of pairs, mean_x p(level | x) f(x), that the law itself gives
that level (balanced sampling: Deville & Tillé 2004; here by the swaps of herding.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats
from cohortium.common.generators.herding import Herder, Targets

DRAWS = 4
FEW = 4096  # rows of a level in all: where there are more luck is small, and this costs time
MORE = 3  # times the steps of other rows
ROWS_AT_ONCE = 8192
Ints = NDArray[np.int64]


def drawn(p: Floats, rng: np.random.Generator) -> Ints:
    """Levels [rows], each by itself. p [rows, levels]: weights of a row's levels, not all zero; need not sum to 1."""
    cumulative = np.cumsum(p, axis=1)
    at = rng.random(len(p)) * cumulative[:, -1]
    last = p.shape[1] - 1 - (p[:, ::-1] > 0).argmax(axis=1)  # rounding must not reach a level without weight
    return np.asarray(np.minimum((cumulative <= at[:, None]).sum(axis=1), last), dtype=np.int64)


def drawn_together(
    p: Floats, targets: Targets, column: int, bins: Ints, rng: np.random.Generator, *, among: int
) -> Ints:
    """Levels [rows] of the column that together have the law's moments with the other columns.

    p [rows, levels]: the law, rows sum to 1; bins [rows, columns]: whatever they hold in the column; of targets the
    features alone are used; among: rows that are wanted in all, of which these are a block. The rarest level is settled
    first, the commonest gets what is left; levels of more than FEW rows in all stay as they were drawn.
    """
    draws = np.stack([drawn(p, rng) for _ in range(DRAWS)], axis=1)
    levels, unsettled, still = draws[:, 0].copy(), np.ones(len(p), dtype=np.bool_), np.ones(p.shape[1])
    others = [c for c in range(bins.shape[1]) if c != column]
    if not others:
        return levels
    features, bins = tuple(targets.features[c] for c in others), bins[:, others]
    for level in np.argsort(p.sum(axis=0), kind="stable")[:-1]:
        inside = np.flatnonzero(unsettled & (levels == level))
        outside = np.flatnonzero(unsettled & (levels != level) & (draws == level).any(axis=1))
        still[level] = 0.0
        if len(inside) and len(outside) and p[:, level].mean() * among <= FEW:
            rows = np.concatenate([inside, outside])
            herder = Herder(_of_level(features, bins, p[:, level]))
            keep = np.zeros(len(rows), dtype=np.bool_)
            keep[herder.select(bins[rows], len(inside), more=MORE)] = True
            levels[rows[keep]] = level
            leaving = inside[~keep[: len(inside)]]
            levels[leaving] = _drawn_among(p[leaving], still, rng)
        unsettled &= levels != level
    return levels


def _of_level(features: tuple[Floats, ...], bins: Ints, weight: Floats) -> Targets:
    """One-ways and moments of the rows, each with its weight."""
    share = weight / weight.sum()
    one_way = tuple(np.bincount(bins[:, c], share, minlength=len(f)).astype(np.float64) for c, f in enumerate(features))
    width = sum(f.shape[1] for f in features)
    gram = np.zeros((width, width))
    for at in range(0, len(bins), ROWS_AT_ONCE):
        part = bins[at : at + ROWS_AT_ONCE]
        phi = np.concatenate([f[part[:, c]] for c, f in enumerate(features)], axis=1)
        gram += (phi * share[at : at + ROWS_AT_ONCE, None]).T @ phi
    return Targets(one_way=one_way, features=features, gram=gram)


def _drawn_among(p: Floats, still: Floats, rng: np.random.Generator) -> Ints:
    """Levels of rows, of those that are not settled yet; evenly where the law gives a row none of them."""
    left = p * still
    left[~(left.sum(axis=1) > 0)] = still
    return drawn(left, rng)

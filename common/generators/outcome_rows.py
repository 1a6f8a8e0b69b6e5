"""Levels of a target for many rows at once: each row's by its law, all together with the law's moments. Free of budget.

Levels drawn row by row are the law and the luck of so many draws, and of a rare level there are few: what a classifier
then learns from the rows is the luck as well. So every row draws twice. Where just one of its two draws is the level,
either may count; and of all such rows those keep the level which together have the one-ways and moments of pairs,
mean_x p(level | x) f(x), that the law itself gives it (balanced sampling: Deville & Tillé 2004; here by the swaps of
herding.py). Both draws have the row's law, so that whichever counts, the row keeps it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats
from cohortium.common.generators.herding import Herder, Targets

FEW = 4096  # rows of a level in one sample: where there are more luck is small, and this costs time
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
    features alone are used; among: rows of the whole sample, of which these are a block. The rarest level is settled
    first, the commonest gets what is left; levels of more than FEW rows in the sample stay as they were drawn.
    """
    levels, open_ = drawn(p, rng), np.ones(p.shape[1])
    others = [c for c in range(bins.shape[1]) if c != column]
    if not others:
        return levels
    features, bins = tuple(targets.features[c] for c in others), bins[:, others]
    for level in np.argsort(p.sum(axis=0), kind="stable")[:-1]:
        if p[:, level].mean() * among <= FEW:
            at = np.flatnonzero(open_[levels] > 0)
            has, again = levels[at] == level, drawn(p[at] * open_, rng)
            may = again == level
            leave, enter = at[has & ~may], at[~has & may]
            if len(leave) and len(enter):
                weight = p[:, level] * (has.sum() / p[:, level].sum())
                weight[at[has & may]] -= 1.0  # these have the level either way
                rows = np.concatenate([leave, enter])
                keep = np.zeros(len(rows), dtype=np.bool_)
                keep[Herder(_of_level(features, bins, weight)).select(bins[rows], len(leave), more=MORE)] = True
                levels[leave] = again[has & ~may]
                levels[rows[keep]] = level
        open_[level] = 0.0
    return levels


def _of_level(features: tuple[Floats, ...], bins: Ints, weight: Floats) -> Targets:
    """One-ways and moments of the rows, each with its weight, which may be negative; their sum is not zero."""
    share = weight / weight.sum()
    one_way = tuple(np.bincount(bins[:, c], share, minlength=len(f)).astype(np.float64) for c, f in enumerate(features))
    width = sum(f.shape[1] for f in features)
    gram = np.zeros((width, width))
    for at in range(0, len(bins), ROWS_AT_ONCE):
        part = bins[at : at + ROWS_AT_ONCE]
        phi = np.concatenate([f[part[:, c]] for c, f in enumerate(features)], axis=1)
        gram += (phi * share[at : at + ROWS_AT_ONCE, None]).T @ phi
    return Targets(one_way=one_way, features=features, gram=gram)

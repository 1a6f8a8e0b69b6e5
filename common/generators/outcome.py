"""The target given the other columns: a logistic law that has the moments that are believed. Free of budget.

A mixture that matches every pair a little says less about the target than was measured about it. Among all laws of the
target y given the other columns x that have given moments E[T(y) φ(x)ᵀ] (T, φ: the features of measure.py), the one
nearest to the generator's own q(y | x) is

    p(y | x) ∝ q(y | x) · exp(T(y)ᵀ A (1, φ(x)))

and A minimises the convex  mean_x log Σ_y q(y | x) exp(T(y)ᵀ A (1, φ(x))) − ⟨A, G⟩ + ½ ridge ‖A‖²,
x drawn from the generator (maximum entropy: Berger, Della Pietra & Della Pietra 1996, section 3; with noised moments:
Dudík, Phillips & Schapire 2007, section 4). G is what relevance.py believes of the measured moments, the target's own
distribution with them; the ridge holds back what it believes too much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats
from cohortium.common.generators.outcome_rows import drawn, drawn_together
from cohortium.common.generators.relevance import Seen, believed, hessian, moments
from cohortium.common.generators.sampling import resampled
from cohortium.common.generators.three_way import (
    MOST_LEVELS,
    MOST_UNKNOWNS,
    NO_RIDGE,
    ByClass,
    features_of,
    fit_products,
    products,
)

if TYPE_CHECKING:
    from cohortium.common.generators.herding import Targets

RIDGE, HELD = 1e-3, 0.3  # at least; of the noise's standard deviation
ITERATIONS = 30
NEAR = 1e-10  # what a Newton step must promise to be worth it
MOST_EXCESS = 256
POOL = 65536  # rows that a condition on the target is chosen from at once
Bins2 = NDArray[np.int64]
Own = Callable[[Bins2], Floats]
"""The generator's log q(y | x) of rows, up to a constant of the row: [rows, levels]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """column: the target's; slope: A [features of the target, 1 + Σk], 0 for the target's own features; square: B
    [features of the target, Σk, Σk] of three_way.py, None where the law has slopes alone."""

    column: int
    slope: Floats
    square: Floats | None = None


class OutcomeLaw:
    """p(y | x) of an Outcome, worked out once for many rows. own: see `Own`."""

    def __init__(self, outcome: Outcome, targets: Targets, own: Own) -> None:
        self.column, self._own = outcome.column, own
        self._targets, self._square = targets, outcome.square
        mine = targets.features[outcome.column]
        ends = np.cumsum([1] + [f.shape[1] for f in targets.features])
        self._one_way = targets.one_way[outcome.column]
        self._constant = mine @ outcome.slope[:, 0]
        self._tables = [
            table @ (mine @ outcome.slope[:, a:b]).T
            for table, a, b in zip(targets.features, ends[:-1], ends[1:], strict=True)
        ]

    def probabilities(self, bins: Bins2) -> Floats:
        """[rows, levels], whatever the rows hold in the target's column."""
        logits = self._own(bins) + self._constant
        for c, table in enumerate(self._tables):
            if c != self.column:
                logits += table.take(bins[:, c], axis=0)
        if self._square is not None:
            mine = self._targets.features[self.column]
            logits += products(self._targets, self.column, self._square, bins) @ mine.T
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        return np.asarray(p / p.sum(axis=1, keepdims=True), dtype=np.float64)

    def redraw(self, bins: Bins2, rng: np.random.Generator, *, among: int | None = None) -> Bins2:
        """The rows with new targets, which together have the law's moments with the other columns.

        among: rows of the whole sample, of which these are a block; None: these.
        """
        p, among, out = self.probabilities(bins), among or len(bins), bins.copy()
        out[:, self.column] = drawn_together(p, self._targets, self.column, bins, rng, among=among)
        return out

    def redraw_among(self, bins: Bins2, rng: np.random.Generator, share: Floats) -> Bins2:
        """The rows with new targets, each by itself, of the bins that `share` allows."""
        p = self.probabilities(bins) * share
        p[~(p.sum(axis=1) > 0)] = share
        out = bins.copy()
        out[:, self.column] = drawn(p, rng)
        return out

    def conditioned(
        self, draw: Callable[[int, np.random.Generator], Bins2], rows: int, rng: np.random.Generator, share: Floats
    ) -> Bins2:
        """Rows whose target lies where `share` allows, from a `draw` that does not know it.

        Importance resampling: more rows than wanted, the rarer the condition the more, taken by how likely their other
        columns make it. A row may come twice where the condition is rarer than 1 in MOST_EXCESS.
        """
        rate = float(self._one_way @ share)
        excess = int(min(max(4.0, np.ceil(4.0 / max(rate, 1e-9))), MOST_EXCESS))
        parts = []
        each = max(1, POOL // excess)
        for at in range(0, rows, each):
            count = min(each, rows - at)
            pool = draw(excess * count, rng)
            weight = self.probabilities(pool) @ share
            if not weight.sum() > 0:
                weight = np.ones(len(pool))
            parts.append(self.redraw_among(pool[resampled(weight, count, rng)], rng, share))
        return np.concatenate(parts)


def applies(targets: Targets, column: int | None, *, ordered: bool) -> bool:
    """Whether there is a target of few levels, with measured moments, and a system small enough to solve.

    ordered: whether the target is a number of many values, whose law stays the generator's.
    """
    if column is None or ordered or not targets.gram.any():
        return False
    levels, width = targets.features[column].shape
    return 2 <= levels <= MOST_LEVELS and width * (1 + len(targets.gram)) <= MOST_UNKNOWNS


def fit_outcome(
    targets: Targets, column: int, bins: Bins2, own: Own, seen: Seen, by_class: ByClass | None = None
) -> Outcome:
    """bins [rows, columns]: rows of the generator, whose targets do not count; with by_class, the law has its products
    too."""
    ends = np.cumsum([0] + [f.shape[1] for f in targets.features])
    a, b = int(ends[column]), int(ends[column + 1])
    others = np.concatenate([np.arange(a), np.arange(b, ends[-1])])
    phi = np.concatenate([np.ones((len(bins), 1)), features_of(targets, column, bins)[:, others]], axis=1)
    groups = np.concatenate([[0]] + [np.full(f.shape[1], 1 + c) for c, f in enumerate(targets.features) if c != column])
    mine, log_q = targets.features[column], own(bins)
    wanted = np.concatenate([np.zeros((b - a, 1)), seen.gram[a:b, others]], axis=1)
    wanted = believed(log_q, mine, phi, groups, wanted, seen.sd, seen.patients)
    ridge = np.full(wanted.shape, max(RIDGE, HELD * seen.sd))
    ridge[:, 0] = NO_RIDGE
    slope = np.zeros_like(wanted)

    def value(at: Floats) -> tuple[float, Floats]:
        logits = log_q + phi @ at.T @ mine.T
        top = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - top)
        total = p.sum(axis=1, keepdims=True)
        loss = float((top + np.log(total)).mean() - (at * wanted).sum() + 0.5 * (ridge * at**2).sum())
        return loss, p / total

    loss, p = value(slope)
    for _ in range(ITERATIONS):
        gradient = moments(p, mine, phi) - wanted + ridge * slope
        step = -np.linalg.solve(hessian(p, mine, phi) + np.diag(ridge.ravel()), gradient.ravel())
        promise = -float(gradient.ravel() @ step)
        if promise < NEAR:
            break
        length = 1.0
        while True:
            there = slope + length * step.reshape(slope.shape)
            new_loss, new_p = value(there)
            if new_loss <= loss - 1e-4 * length * promise or length < 1e-6:
                break
            length /= 2
        if not new_loss < loss:
            break
        slope, loss, p = there, new_loss, new_p
    out = np.zeros((b - a, 1 + int(ends[-1])))
    out[:, 0], out[:, 1 + others] = slope[:, 0], slope[:, 1:]
    if by_class is None:
        return Outcome(column=column, slope=out)
    out, square = fit_products(targets, column, bins, log_q, out, by_class)
    return Outcome(column=column, slope=out, square=square)

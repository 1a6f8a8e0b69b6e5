"""Moments of all pairs of columns within each class of the target, and the target's law that has them too.

The question "pairs" may be asked class by class of the target y for the same noise an entry: a patient's matrix goes to
one class. The sum over the classes is the matrix of all pairs with √classes of the noise; the classes beside it tell
how y moves with products of other columns, E[T_i(y) φ(x) φ(x)ᵀ] = M_i, which a law of y with slopes alone
(outcome.py) cannot follow. The law with both moments nearest to the generator's own q(y | x) is

    p(y | x) ∝ q(y | x) · exp(T(y)ᵀ A (1, φ(x)) + Σ_i T_i(y) φ(x)ᵀ B_i φ(x))

B strictly above the diagonal blocks, found as A is: the dual of maximum entropy with a ridge for the noise (Dudík,
Phillips & Schapire 2007, section 4). Free of budget, as all that follows an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Facts, Floats
from cohortium.common.generators.features import clear_own
from cohortium.common.generators.relevance import law, moments

if TYPE_CHECKING:
    from cohortium.common.generators.herding import Targets

MOST_LEVELS, MOST_UNKNOWNS = 8, 3000  # of a target whose law is fitted
MOST_NUMBERS = 1_000_000  # of one answer
PAYS = 70.0
"""Least patients × ε over features^1.5: docs/generators.md has what it was measured with."""
RIDGE = 0.3  # of the noise's variance, counted in variances that sampling n patients has
LEAST_RIDGE, NO_RIDGE = 1e-3, 1e-9  # nothing holds the target's own distribution back
ITERATIONS = 150
ROWS_AT_ONCE = 8192
Bins2 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ByClass:
    """moments [classes, Σk, Σk]: mean over all patients of 1{y = class} φφᵀ, zero diagonal blocks; sd: noise of an
    entry; patients: noised number of them."""

    moments: Floats
    sd: float
    patients: float


def classes(facts: Facts, width: int) -> int:
    """How many classes of the target "pairs" is asked by; 1 where that does not pay. By public facts alone.

    width: features of all columns together, at most. Levels only: for targets on a number line answers were no better
    for it. `local` mode has several times the noise that the rule was measured with.
    """
    if facts.target is None or facts.patients is None or facts.mode == "local":
        return 1
    _, size, categorical = facts.columns[facts.target]
    small = size <= MOST_LEVELS and size * (1 + width) <= MOST_UNKNOWNS and size * width**2 <= 2 * MOST_NUMBERS
    return size if categorical and small and facts.patients * facts.epsilon >= PAYS * width**1.5 else 1


def products(targets: Targets, column: int, square: Floats, bins: Bins2) -> Floats:
    """φ(x)ᵀ B_i φ(x) of every row and feature i of the target: [rows, width]. square: B [width, Σk, Σk]."""
    out = np.empty((len(bins), len(square)))
    for at in range(0, len(bins), ROWS_AT_ONCE):
        phi = features_of(targets, column, bins[at : at + ROWS_AT_ONCE])
        for i, each in enumerate(square):
            np.einsum("rk,rk->r", phi @ each, phi, out=out[at : at + ROWS_AT_ONCE, i])
    return out


def features_of(targets: Targets, column: int, bins: Bins2) -> Floats:
    """φ(x) [rows, Σk] of all columns; zero where the target's own would be."""
    parts = [
        f[bins[:, c]] if c != column else np.zeros((len(bins), f.shape[1])) for c, f in enumerate(targets.features)
    ]
    return np.concatenate(parts, axis=1)


def fit_products(
    targets: Targets,
    column: int,
    bins: Bins2,
    log_q: Floats,
    slope: Floats,
    by_class: ByClass,
) -> tuple[Floats, Floats]:
    """(A [width, 1 + Σk], B [width, Σk, Σk]) from `slope`, the law's A without products: its moments are kept.

    bins [rows, columns]: rows of the generator, whose targets do not count; log_q [rows, levels]: its own law of them.
    On one thread, or rounding differs from machine to machine.
    """
    from scipy.optimize import minimize

    mine, total = targets.features[column], len(targets.gram)
    width = mine.shape[1]
    free = _across(targets, column)
    phi = features_of(targets, column, bins)
    phi1 = np.concatenate([np.ones((len(bins), 1)), phi], axis=1)
    ridge = np.full(slope.shape, LEAST_RIDGE)
    ridge[:, 0] = NO_RIDGE
    wanted = moments(law(log_q, mine, phi1, slope), mine, phi1) + ridge * slope  # no further held back than they are
    twice = np.einsum("ti,tab->iab", mine, by_class.moments) * free
    sd = by_class.sd * float(np.sqrt((mine**2).sum(axis=0).max()))
    hold = RIDGE * max(by_class.patients, 1.0) * sd**2 + LEAST_RIDGE
    cut = width * (1 + total)

    def gap(theta: Floats) -> tuple[float, Floats]:
        a, b = theta[:cut].reshape(width, -1), theta[cut:].reshape(width, total, total) * free
        pulled = [phi @ each for each in b]
        bent = np.stack([np.einsum("rk,rk->r", each, phi) for each in pulled], axis=1)
        logits = log_q + (phi1 @ a.T + bent) @ mine.T
        top = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - top)
        norm = p.sum(axis=1, keepdims=True)
        mean = (p / norm) @ mine
        loss = float((top + np.log(norm)).mean() - (a * wanted).sum() - (b * twice).sum())
        loss += float(0.5 * (ridge * a**2).sum() + 0.5 * hold * (b**2).sum())
        of_a = mean.T @ phi1 / len(phi) - wanted + ridge * a
        of_b = np.stack([(phi * mean[:, i : i + 1]).T @ phi / len(phi) for i in range(width)])
        return loss, np.concatenate([of_a.ravel(), ((of_b - twice) * free + hold * b).ravel()])

    start = np.concatenate([slope.ravel(), np.zeros(width * total * total)])
    theta = minimize(gap, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS, "maxcor": 15}).x
    return theta[:cut].reshape(width, -1), theta[cut:].reshape(width, total, total) * free


def _own(targets: Targets, column: int) -> slice:
    before = sum(f.shape[1] for f in targets.features[:column])
    return slice(before, before + targets.features[column].shape[1])


def _across(targets: Targets, column: int) -> Floats:
    """1 where a product belongs to a pair of different columns, none of them the target; each pair once."""
    out = clear_own(np.triu(np.ones_like(targets.gram), 1), [f.shape[1] for f in targets.features])
    mine = _own(targets, column)
    out[mine], out[:, mine] = 0.0, 0.0
    return out

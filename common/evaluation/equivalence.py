"""Equivalence: is a difference shown to be small, rather than not shown to be large?

Two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15): the difference is equivalent to nothing where
both "at least +margin" and "at most −margin" are rejected. The mechanism's noise is known and adds its variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence:
    """p: the larger one-sided p-value; equivalent: p < 5 %. margin: in the unit of the difference."""

    label: str
    difference: float
    standard_error: float
    margin: float
    p: float

    @property
    def equivalent(self) -> bool:
        return self.p < ALPHA


def tost(label: str, difference: float, standard_error: float, margin: float, freedom: float = math.inf) -> Equivalence:
    """Both one-sided tests by Student's t with `freedom` degrees (normal where infinite). Raises ValueError."""
    if not (margin > 0 and standard_error >= 0 and freedom > 0):
        raise ValueError("a test of equivalence needs a margin above 0 and a standard error of at least 0")
    if standard_error == 0:
        p = 0.0 if abs(difference) < margin else 1.0
    else:
        p = max(
            _upper((difference + margin) / standard_error, freedom),
            _upper((margin - difference) / standard_error, freedom),
        )
    return Equivalence(label=label, difference=difference, standard_error=standard_error, margin=margin, p=p)


def tost_means(
    label: str,
    *,
    means: tuple[float, float],
    variances: tuple[float, float],
    rows: tuple[float, float],
    margin: float,
    noise: float = 0.0,
) -> Equivalence:
    """Means of two tables, unequal variances (Welch); `noise`: standard deviation of the mechanism in the first.

    Without noise it is statsmodels' ttost_ind(usevar="unequal"). The noise is known exactly, so it brings no
    degrees of freedom of its own: Welch–Satterthwaite with an infinite one.
    """
    parts = [v / n for v, n in zip(variances, rows, strict=True)]
    total = sum(parts) + noise**2
    spread = sum(p * p / (n - 1) for p, n in zip(parts, rows, strict=True) if n > 1)
    freedom = total**2 / spread if spread > 0 else math.inf
    return tost(label, means[0] - means[1], math.sqrt(total), margin, freedom)


def _upper(t: float, freedom: float) -> float:
    """P(T ≥ t)."""
    return float(special.ndtr(-t) if math.isinf(freedom) else special.stdtr(freedom, -t))

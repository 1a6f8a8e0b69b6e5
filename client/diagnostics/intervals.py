"""95 % intervals in closed form: shares, the median, the residual risk of an attack, the area under a ROC curve.

No resampling: an interval at a hospital needs no random numbers. Each function says whom it is after.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Z = 1.959963984540054  # of 95 %
Interval = tuple[float, float]
Floats = NDArray[np.float64]


def wilson(hits: int, of: int) -> Interval:
    """Interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209). ValueError unless 0 <= hits <= of, of > 0."""
    if not 0 <= hits <= of or of < 1:
        raise ValueError("wilson: hits of at least one attempt")
    p, square = hits / of, Z * Z
    middle = (p + square / (2 * of)) / (1 + square / of)
    half = Z / (1 + square / of) * math.sqrt(p * (1 - p) / of + square / (4 * of * of))
    # At the ends the bound is exact; rounding must not push it past what was seen.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == of else middle + half)


def residual(hits: int, of: int, control_hits: int, control_of: int) -> tuple[float, Interval] | None:
    """(attack - control) / (1 - control) and its interval; None where the control always succeeds.

    What an attack gains over guessing from the population (Giomi et al. 2023, PoPETs 2023-2, equation 2). It is
    1 - q1/q0 of two shares of failures; the ratio's interval is MOVER-R on Wilson's (Donner, Zou 2012, Stat. Methods
    Med. Res. 21, 347, equation 9). Below 0: the attack does worse on training patients than on others.
    """
    q1, q0 = 1 - hits / of, 1 - control_hits / control_of
    if q0 == 0:
        return None
    (low1, high1), (low0, high0) = wilson(of - hits, of), wilson(control_of - control_hits, control_of)
    least = _ratio(q1, q0, low1, high0, sign=-1)
    return 1 - q1 / q0, (1 - _ratio(q1, q0, high1, low0, sign=+1), 1 - least)


def _ratio(q1: float, q0: float, end1: float, end0: float, *, sign: int) -> float:
    """One end of the interval of q1 / q0 from the ends of both."""
    product = q1 * q0
    inner = max(product * product - end1 * end0 * (2 * q1 - end1) * (2 * q0 - end0), 0.0)
    return (product + sign * math.sqrt(inner)) / (end0 * (2 * q0 - end0))


def median(values: Floats) -> tuple[float, Interval]:
    """The median and the order statistics that cover it 95 times in 100, whatever the law (Conover 1999, 3.2)."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    n = len(x)
    if not n:
        raise ValueError("median: at least one value")
    below = int(stats.binom.ppf(0.025, n, 0.5))
    return float(np.median(x)), (float(x[max(below - 1, 0)]), float(x[min(n - below, n - 1)]))


def auc(members: Floats, others: Floats) -> tuple[float, Interval]:
    """P(a member's score > another's), ties one half, and its interval.

    Newcombe 2006 (Stat. Med. 25, 559), method 5: Wilson's idea with Hanley and McNeil's variance, so that it stays
    inside [0, 1] and is never a single point, not even where members and others separate entirely.
    """
    m, n = len(members), len(others)
    if not m or not n:
        raise ValueError("auc: at least one member and one other")
    ranks = stats.rankdata(np.concatenate([members, others]))
    value = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    return value, auc_interval(value, m, n)


def auc_interval(value: float, members: int, others: int) -> Interval:
    star = (members + others) / 2 - 1

    def off(theta: float, sign: int) -> float:
        spread = 1 + star * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return value - theta + sign * Z * math.sqrt(theta * (1 - theta) * spread / (members * others))

    # At 0 and at 1 the variance is nothing and `off` may be 0 too: the search ends a hair before.
    low = 0.0 if value <= 0 else optimize.brentq(off, 0.0, min(value, 1 - 1e-12), args=(-1,), xtol=1e-12)
    high = 1.0 if value >= 1 else optimize.brentq(off, max(value, 1e-12), 1.0, args=(+1,), xtol=1e-12)
    return min(low, value), max(high, value)


def auc_bound(epsilon: float, delta: float) -> float:
    """The greatest area under the ROC curve that any attack on one patient can have under (epsilon, delta).

    One less the area below the trade-off function max(0, 1 - δ - e^ε a, e^-ε (1 - δ - a)) (Kairouz, Oh, Viswanath
    2015, ICML; Dong, Roth, Su 2022, J. R. Stat. Soc. B 84, 3, proposition 2.5).
    """
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError("auc_bound: epsilon at least 0 and delta in [0, 1]")
    if math.isinf(epsilon) or delta == 1:
        return 1.0
    room = 1 - delta
    ratio = math.exp(-epsilon)
    corner = room * ratio / (1 + ratio)
    first = room * corner - corner * corner / (2 * ratio) if ratio > 0 else 0.0
    return 1 - first - ratio * (room - corner) ** 2 / 2

"""From estimates on replicate datasets to one interval that covers: the combining rules, as pure functions.

An analysis of a private synthetic table errs for three reasons: the patients are a sample, the answers were noised,
and the generator fits them imperfectly. The plan makes all three public, so the whole release can be played again on
invented patients whose true value θ_i is known, and the same analysis gives q_i: the parametric bootstrap through the
mechanism (Ferrando, Wang & Sheldon, AISTATS 2022). Two rules, by what the played worlds were:

    one world      θ_i = θ           estimate  θ + (q₀ − q̄)             a shift by the bias that the worlds showed
    many worlds    θ_i scattered     estimate  θ̄ + (q₀ − q̄) / A         A: slope of q_i on θ_i (calibration line)

The first assumes that the bias is the same in truth as in the world; the second only that it moves along a line: it
undoes attenuation, by noise and by what a generator cannot express (indirect inference, Gouriéroux, Monfort & Renault
1993). Its interval is Fieller's (1954; Osborne, Int. Stat. Rev. 1991, eq. 2.3), which knows that A is estimated.

The rules of Raghunathan, Reiter & Rubin (2003) and Reiter (2003), and Räisä et al. (2023) for private data, combine
datasets drawn from a posterior; a refit to a replayed release is no posterior draw, so they do not apply here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
FEWEST = 5
"""Replicates below which a spread is a guess: t on 4 degrees of freedom already doubles the tails."""
SCATTERED = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Combined:
    """An estimate with its interval.

    low, high: infinite where the replicates cannot tell the slope from 0 (the table does not carry this effect).
    spread: standard deviation of q about the line; slope: A, 1 under a shift; refits: how many.
    """

    estimate: float
    low: float
    high: float
    level: float
    spread: float
    slope: float
    refits: int

    @property
    def assessed(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


def combine(
    own: float,
    refits: Sequence[float] | np.ndarray,
    truths: float | Sequence[float] | np.ndarray,
    *,
    level: float = LEVEL,
) -> Combined:
    """The estimate of the replayed analysis, and an interval of the wanted level.

    own: q₀, the analysis of what was released. refits: q_i, float [m], the same analysis of each replay, on as many
    synthetic rows as q₀, so that their finite number is part of the spread. truths: θ_i, the value in the world that
    replicate i was played in: one number, or [m]. Raises ValueError for fewer than 5 replicates or a NaN.
    """
    q = np.asarray(refits, dtype=float)
    theta = np.broadcast_to(np.asarray(truths, dtype=float), q.shape)
    m = len(q)
    if q.ndim != 1 or m < FEWEST:
        raise ValueError(f"at least {FEWEST} replicates")
    if not (np.isfinite(q).all() and np.isfinite(theta).all() and math.isfinite(own)):
        raise ValueError("estimates and truths are finite numbers")
    if not 0 < level < 1:
        raise ValueError("level lies between 0 and 1")
    centre, mean = float(theta.mean()), float(q.mean())
    away, gap = theta - centre, own - mean
    moved = float(away @ away)
    if moved <= SCATTERED * max(1.0, centre * centre) * m:
        spread = float(q.std(ddof=1))
        half = float(stats.t.ppf(0.5 + level / 2, m - 1)) * spread * math.sqrt(1 + 1 / m)
        middle = centre + gap
        return Combined(
            estimate=middle, low=middle - half, high=middle + half, level=level, spread=spread, slope=1.0, refits=m
        )
    slope = float(away @ (q - mean)) / moved
    rest = q - mean - slope * away
    spread = math.sqrt(float(rest @ rest) / (m - 2))
    t = float(stats.t.ppf(0.5 + level / 2, m - 2))
    low, high = _fieller(slope, gap, reach=t * spread, moved=moved, m=m)
    return Combined(
        estimate=centre + gap / slope if slope else math.nan,
        low=centre + low,
        high=centre + high,
        level=level,
        spread=spread,
        slope=slope,
        refits=m,
    )


def _fieller(slope: float, gap: float, *, reach: float, moved: float, m: int) -> tuple[float, float]:
    """All u with |gap − slope·u| ≤ reach √(1 + 1/m + u²/moved): an interval, or the whole line.

    A negative slope is no attenuation but noise: nothing is known then.
    """
    a = slope * slope - reach * reach / moved
    if a <= 0 or slope <= 0:
        return -math.inf, math.inf
    half = math.sqrt(max((slope * gap) ** 2 - a * (gap * gap - reach * reach * (1 + 1 / m)), 0.0))
    return (slope * gap - half) / a, (slope * gap + half) / a


def plain(value: float, error: float, *, level: float = LEVEL) -> tuple[float, float]:
    """What an analysis says that takes synthetic rows for patients: (low, high), Gaussian. It does not cover."""
    half = float(stats.norm.ppf(0.5 + level / 2)) * error
    return value - half, value + half

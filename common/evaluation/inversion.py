"""Intervals for a distance that noise makes too large, by inverting the mechanism's own test.

A distance (a largest gap, a mean of absolute differences, a chi-square) of noised differences is too large: noise
never cancels in it, and at a true distance of zero no symmetric interval covers. The law of the noise is known
exactly, so the interval holds every size of difference that the noised distance is compatible with: the differences
are scaled along their estimated direction, noise is added anew, and a scale stays if the observed distance lies
between the outer quantiles of what it gives (test inversion; Efron and Tibshirani 1993, section 12.3 and
problem 12.3). The value is the scale at which the observed distance is the median: median-unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SCALES = np.linspace(0.0, 2.5, 51)
LEVELS = (0.01, 0.5, 0.985)
"""Wider than 95 %, most of all upwards: the direction is estimated too, and noise spreads it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inverted:
    """value, low, high: true distances. spread: half of the interval's width."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return (self.high - self.low) / 2


def inverted(
    *,
    observed: float,
    direction: np.ndarray,
    noise: np.ndarray,
    distance: Callable[[np.ndarray], np.ndarray],
    degree: int = 1,
    levels: tuple[float, float, float] = LEVELS,
) -> Inverted:
    """The true distances that the observed one is compatible with.

    observed: distance of the noised differences. direction: float64 [d], the estimated differences; only their
    direction counts. noise: float64 [draws, d], fresh noise of the differences. distance: float64 [..., d] -> [...],
    not negative, growing with its argument's scale to the power of `degree`. levels: quantiles of what a scale gives
    at which the upper end, the value and the lower end are taken.
    """
    size = float(distance(direction))
    if not size > 0:
        direction = noise[0]
        size = float(distance(direction))
    if not size > 0:
        return Inverted(value=observed, low=observed, high=observed)
    # Twice and a half as far as anything that was seen or that noise alone gives.
    far = max(observed, float(np.quantile(distance(noise), levels[-1])))
    unit = direction * (far / size) ** (1.0 / degree)
    true = np.asarray([float(distance(unit * s)) for s in SCALES])
    given = np.array([np.quantile(distance(unit * s + noise), levels) for s in SCALES])
    given = np.maximum.accumulate(given, axis=0)
    # Below the lower quantile of no difference at all, the interval would be empty: it is taken as that quantile.
    seen = max(observed, float(given[0, 0]))
    # Strictly ascending by a hair, and looked up above it: the last scale of a flat stretch is the one wanted.
    hair = np.arange(len(given)) * (1e-12 * max(1.0, float(np.abs(given).max())))
    ends = [float(np.interp(seen + hair[-1], given[:, i] + hair, true)) for i in (0, 1, 2)]
    low = 0.0 if seen <= given[0, 2] else ends[2]
    value = 0.0 if seen <= given[0, 1] else ends[1]
    return Inverted(value=max(value, low), low=low, high=max(ends[0], value, low))

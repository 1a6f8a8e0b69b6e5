"""The mean absolute size of many differences that are each drowned in known Gaussian noise.

Column means, correlations: each difference δ between held-out and synthetic is seen as δ + noise. The mean of the
absolute values seen is too large. Prior: δ ~ N(0, sampling² + τ²) with τ unknown; the posterior mean is the
statistic, and worlds like the inferred one, with fatter tails or thinner, noised anew, give its belt (belts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.belts import Interval, belt

GRID = np.geomspace(1e-3, 1.5, 24)
SCALE = 0.05
"""Of the half-Cauchy prior on τ, as a part of the unit in which differences are given (a correlation, an SD)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worlds:
    """Simulated truths and what the mechanism shows of them, [draws, differences]; weights of τ, [draws, GRID].

    observed_weights: the same of the observation, [1, GRID].
    """

    truth: np.ndarray
    seen: np.ndarray
    weights: np.ndarray
    observed_weights: np.ndarray


def mean_size(
    seen: np.ndarray, noise: np.ndarray, sampling: np.ndarray, rng: np.random.Generator, draws: int = 2000
) -> tuple[Interval, Worlds]:
    """95 % interval of mean |δ|, and the worlds it came from (for other figures of the same differences).

    seen: the differences as noised, [differences]; noise: their noise's standard deviations (above 0), the same
    shape; sampling: standard deviations that sampling alone gives. Raises ValueError for no difference at all.
    """
    if not len(seen) or np.any(noise <= 0):
        raise ValueError("mean_size needs at least one difference, each with noise above 0")
    observed = _weights(seen[None], noise, sampling)
    open_ = np.flatnonzero(observed[0] > 1e-3 * observed[0].max())
    first, last = GRID[max(open_[0] - 2, 0)], GRID[min(open_[-1] + 2, len(GRID) - 1)]
    tau = np.exp(rng.uniform(np.log(first), np.log(last), size=(draws, 1)))
    luck = np.sqrt(rng.uniform(0.2, 1.0, size=(draws, 1)))
    fat = rng.uniform(0.1, 1.0, size=(draws, 1))
    stretch = np.exp(fat * rng.standard_normal((draws, len(seen))) - fat**2)  # its mean square is one
    truth = np.sqrt((luck * sampling) ** 2 + (tau * stretch) ** 2) * rng.standard_normal((draws, len(seen)))
    noisy = truth + noise * rng.standard_normal(truth.shape)
    worlds = Worlds(truth=truth, seen=noisy, weights=_weights(noisy, noise, sampling), observed_weights=observed)
    found = belt(
        np.abs(truth).mean(axis=1),
        _posterior_size(noisy, worlds.weights, noise, sampling),
        float(_posterior_size(seen[None], observed, noise, sampling)[0]),
    )
    return found, worlds


def shrunk(seen: np.ndarray, weights: np.ndarray, noise: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """Posterior mean of the differences, [draws, differences]."""
    return np.asarray((weights @ _keep(noise, sampling)) * seen)


def simulated(
    worlds: Worlds,
    seen: np.ndarray,
    noise: np.ndarray,
    sampling: np.ndarray,
    figure: Callable[[np.ndarray], np.ndarray],
    *,
    draws: int,
) -> Interval:
    """The belt of another figure of the same differences; `figure` maps [draws, differences] to [draws]."""
    part = slice(0, draws)
    return belt(
        figure(worlds.truth[part]),
        figure(shrunk(worlds.seen[part], worlds.weights[part], noise, sampling)),
        float(figure(shrunk(seen[None], worlds.observed_weights, noise, sampling))[0]),
    )


def _prior(sampling: np.ndarray) -> np.ndarray:
    return np.asarray(sampling**2 + GRID[:, None] ** 2)


def _keep(noise: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    prior = _prior(sampling)
    return np.asarray(prior / (prior + noise**2))


def _weights(seen: np.ndarray, noise: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """Posterior of τ, [draws, GRID]; the grid is logarithmic, hence one more factor τ in the prior."""
    total = _prior(sampling) + noise**2
    logs = -0.5 * (seen**2 @ (1 / total).T + np.log(total).sum(axis=1)) + np.log(GRID) - np.log1p((GRID / SCALE) ** 2)
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _posterior_size(seen: np.ndarray, weights: np.ndarray, noise: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """About the posterior mean of mean |δ|, [draws]: √(m² + 2v/π) is E|N(m, v)| to a few percent."""
    keep = _keep(noise, sampling)
    squares = seen**2
    out = np.zeros(len(seen))
    for g in range(len(GRID)):
        if weights[:, g].max() < 1e-6:
            continue
        out += weights[:, g] * np.sqrt(keep[g] ** 2 * squares + keep[g] * noise**2 * (2 / np.pi)).mean(axis=1)
    return out

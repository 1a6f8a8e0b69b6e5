"""The mean absolute size of many differences that are each drowned in known Gaussian noise.

Column means, correlations: each difference δ between held-out and synthetic is seen as δ + noise. The mean of the
absolute values seen is too large, and how much too large depends on the shape of the differences: many alike, or few
large ones. Prior: δ = sampling + τ · S, size τ unknown and S of one of several shapes; the posterior mean of mean |δ|
is the statistic, and worlds of every size, of the shapes that the observation leaves likely, noised anew, give its
belt (belts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from cohortium.common.evaluation.belts import TAIL, Interval, belt, folded_mean

GRID = np.geomspace(1e-3, 1.5, 20)
SHAPES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
"""Differences are like sign(z)|z|^g of a normal z: all of one size (g = 0), normal (1), few large ones (3)."""
UNLIKELY = 0.15
"""A shape whose likelihood is below this part of the best one's takes no part, unless it is next to the best."""
OUTLIER = 1e-4
"""Likelihood of a difference that no size and shape explains: it counts as large as it is seen."""
SCALE = 0.05
"""Of the half-Cauchy prior on τ, as a part of the unit in which differences are given (a correlation, an SD)."""
_NORMALS = 0.3 * (np.arange(14) + 0.5)
_WEIGHTS = np.exp(-0.5 * _NORMALS**2) / np.exp(-0.5 * _NORMALS**2).sum()
PLACES = 120
ALIKE = 0.15
"""Differences whose noise differs by no more than this part are read from one table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worlds:
    """Simulated truths and what the mechanism shows of them, [draws, differences]; weights of τ, [draws, GRID].

    observed_weights: the same of the observation, [1, GRID]. chances: posterior of τ and shape, [GRID, SHAPES].
    """

    truth: np.ndarray
    seen: np.ndarray
    weights: np.ndarray
    observed_weights: np.ndarray
    chances: np.ndarray


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
    first, last = max(open_[0] - 2, 0), min(open_[-1] + 2, len(GRID) - 1)
    # One more shape or less must not change the others' worlds.
    each = [
        _world(shape, draws // 2, (first, last), noise, sampling, np.random.default_rng(rng.integers(2**63)))
        for shape in range(len(SHAPES))
    ]
    read = _Reader.of(noise, sampling, max(float(np.abs(x).max()) for x in (seen, *(w[1] for w in each))))
    likelihood, size = read(seen[None])
    statistic = _posterior(likelihood, size)[0]
    of_shape = special.logsumexp((likelihood + _PRIOR).reshape(len(GRID), len(SHAPES)), axis=0)
    chance = np.exp(of_shape - of_shape.max())
    chance[(chance < UNLIKELY) & (np.abs(np.arange(len(SHAPES)) - chance.argmax()) > 1)] = 0.0
    found = {
        s: belt(np.abs(truth).mean(axis=1), _posterior(*read(noisy)), statistic)
        for s, (truth, noisy) in enumerate(each)
        if chance[s] > 0
    }
    interval = Interval(
        low=min(i.low for i in found.values()),
        middle=float(np.average([i.middle for i in found.values()], weights=chance[list(found)])),
        high=max(i.high for i in found.values()),
        statistic=float(statistic),
    )
    picked = rng.choice(len(SHAPES), size=draws // 2, p=chance / chance.sum())
    truth, noisy = (np.stack([w[i] for w in each])[picked, np.arange(draws // 2)] for i in (0, 1))
    weights = _weights(noisy, noise, sampling)
    # A prior that does not draw towards small differences: intervals of single ones must not be too narrow.
    chances = _normalised(likelihood + np.repeat(np.log(GRID), len(SHAPES))).reshape(len(GRID), len(SHAPES))
    return interval, Worlds(truth=truth, seen=noisy, weights=weights, observed_weights=observed, chances=chances)


def _world(
    shape: int, draws: int, sizes: tuple[int, int], noise: np.ndarray, sampling: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(true differences, the same as the mechanism would show them), [draws, differences]; τ between two of GRID."""
    tau = np.exp(rng.uniform(np.log(GRID[sizes[0]]), np.log(GRID[sizes[1]]), size=(draws, 1)))
    luck = np.sqrt(rng.uniform(0.2, 1.0, size=(draws, 1)))  # a held-out sample may lie closer than expected
    normals = rng.standard_normal((draws, len(noise)))
    spread = np.sign(normals) * np.abs(normals) ** SHAPES[shape] / _ROOT_MEAN_SQUARE[shape]
    truth = tau * spread + luck * sampling * rng.standard_normal((draws, len(noise)))
    return truth, truth + noise * rng.standard_normal(truth.shape)


def shrunk(seen: np.ndarray, weights: np.ndarray, noise: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """Posterior mean of the differences, [draws, differences], of the normal shape."""
    return np.asarray((weights @ _keep(noise, sampling)) * seen)


def each_one(
    worlds: Worlds, seen: np.ndarray, noise: np.ndarray, sampling: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(posterior mean, low and high) of every single difference, [differences] each.

    Size and shape are those that all differences together tell (empirical Bayes: Efron 2010, Large-Scale Inference,
    chapter 1). Such an interval holds its difference 95 times in 100 on average over all of them, and still does for
    those that a reader picks because they look large, where a plain interval does not.
    """
    tau, shape = np.nonzero(worlds.chances > 1e-3 * worlds.chances.max())
    likely = worlds.chances[tau, shape] / worlds.chances[tau, shape].sum()
    middle = (GRID[tau, None] * np.concatenate([_SIZES[shape], -_SIZES[shape]], axis=1))[None]
    total, keep = noise**2 + sampling**2, sampling**2 / (noise**2 + sampling**2)
    off = seen[:, None, None] - middle
    density = np.tile(_WEIGHTS / 2, 2) * np.exp(-0.5 * off**2 / total[:, None, None]) + 1e-300
    weights = density / density.sum(axis=2, keepdims=True) * likely[:, None]
    at, sd = middle + keep[:, None, None] * off, np.sqrt(keep) * noise
    found = [_mixed(m, w, s) for m, w, s in zip(at.reshape(len(seen), -1), weights.reshape(len(seen), -1), sd)]
    return np.array([f[0] for f in found]), np.array([f[1] for f in found]), np.array([f[2] for f in found])


def _mixed(means: np.ndarray, weights: np.ndarray, sd: float) -> tuple[float, float, float]:
    """Mean, low and high of a mixture of normals of one standard deviation, on a grid of a tenth of it."""
    step = max(sd / 10, 1e-9, float(np.ptp(means)) / 4000)
    start = float(means.min()) - 6 * sd
    held = np.bincount(np.rint((means - start) / step).astype(int), weights)
    reach = int(np.ceil(6 * sd / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / max(sd, 1e-12)) ** 2)
    below = np.cumsum(np.convolve(held, kernel / kernel.sum()))
    places = start + step * (np.arange(len(below)) - reach + 0.5)
    low, high = np.interp((TAIL * below[-1], (1 - TAIL) * below[-1]), below, places)
    return float(means @ weights / weights.sum()), float(low), float(high)


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
    """Posterior of τ, [draws, GRID], of the normal shape."""
    total = _prior(sampling) + noise**2
    return _normalised(-0.5 * (seen**2 @ (1 / total).T + np.log(total).sum(axis=1)) + _LOG_PRIOR)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """Sums over differences of functions of one number, looked up: one table for differences of like noise."""

    step: float
    groups: tuple[np.ndarray, ...]
    tables: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, noise: np.ndarray, sampling: np.ndarray, farthest: float) -> _Reader:
        alike = np.rint(np.log(np.hypot(noise, sampling)) / ALIKE)
        groups = tuple(np.flatnonzero(alike == group) for group in np.unique(alike))
        step = farthest * (1 + 1e-9) / (PLACES - 1)
        x = step * np.arange(PLACES)
        tables = tuple(_tables(x, float(noise[g].mean()), float(sampling[g].mean())) for g in groups)
        return cls(step=step, groups=groups, tables=tables)

    def __call__(self, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log-likelihood, posterior mean of mean |δ|) for each τ and shape, [draws, GRID · SHAPES]."""
        draws = len(seen)
        likelihood = np.zeros((draws, len(GRID) * len(SHAPES)))
        size = np.zeros_like(likelihood)
        for group, (log_density, sizes) in zip(self.groups, self.tables, strict=True):
            x = np.abs(seen[:, group]) / self.step
            low = np.minimum(x.astype(int), PLACES - 2)
            at = (low + np.arange(draws)[:, None] * PLACES).ravel()
            part = (x - low).ravel()
            held = np.bincount(at, 1 - part, draws * PLACES) + np.bincount(at + 1, part, draws * PLACES)
            likelihood += held.reshape(draws, PLACES) @ log_density
            size += held.reshape(draws, PLACES) @ sizes / seen.shape[1]
        return likelihood, size


def _tables(x: np.ndarray, noise: float, sampling: float) -> tuple[np.ndarray, np.ndarray]:
    """(log-likelihood, posterior mean of |δ|) of one difference seen as x [places], [places, GRID · SHAPES]."""
    total, keep = noise**2 + sampling**2, sampling**2 / (noise**2 + sampling**2)
    middle = GRID[:, None, None] * np.stack([_SIZES, -_SIZES], axis=1).reshape(len(SHAPES), -1)
    off = x[:, None] - middle.reshape(-1)
    weights = np.tile(_WEIGHTS / 2, 2)
    density = np.exp(-0.5 * off**2 / total).reshape(len(x), -1, len(weights)) * weights
    sizes = folded_mean(middle.reshape(-1) + keep * off, np.array(keep * noise**2)).reshape(density.shape)
    whole = density.sum(axis=2) + OUTLIER
    return np.log(whole), ((density * sizes).sum(axis=2) + OUTLIER * x[:, None]) / whole


def _posterior(likelihood: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Posterior mean of mean |δ|, [draws]."""
    return np.asarray((_normalised(likelihood + _PRIOR) * size).sum(axis=1))


def _normalised(logs: np.ndarray) -> np.ndarray:
    weights = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


_LOG_PRIOR = np.log(GRID) - np.log1p((GRID / SCALE) ** 2)  # the grid is logarithmic, hence one more factor τ
_PRIOR = np.repeat(_LOG_PRIOR, len(SHAPES))
_ROOT_MEAN_SQUARE = np.sqrt(2.0**SHAPES * special.gamma(SHAPES + 0.5) / np.sqrt(np.pi))
_SIZES = _NORMALS ** SHAPES[:, None] / _ROOT_MEAN_SQUARE[:, None]

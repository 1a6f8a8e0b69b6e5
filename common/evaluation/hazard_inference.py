"""Plausible true counts behind noised counts of events and censorings.

The synthetic table says roughly where events and censorings fall; how wrong it is, is inferred. Prior of one arm's
cells: the synthetic shares of the arm's patients, sampling of that many patients, and a misfit whose log-hazards are
smooth over time and partly shared between arms, with size τ for events and another for censorings (half-Cauchy
prior, a grid). The law of the noise is known, all is Gaussian given the sizes, so the posterior is a mixture of
Gaussians in closed form. A draw below zero is mended by whoever uses it: the nearest counts that are not negative
with the same sum (`to_simplex`, of the counts, never of the curve), after arms are added where arms are added.

Two readings, because they answer two questions. `shrunk` infers both sizes: the best guess, its error is smallest.
`wide` lets events go anywhere (τ = 2) and censorings far: its quantiles are confidence limits whose rate does not
depend on how far the synthetic table is from these very patients, while a shrunk posterior covers too often near it
and too seldom far off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.risk_sets import at_risk

SIZES = np.array([0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2])
EVENT_SCALE, CENSOR_SCALE = 0.1, 0.3
EVENTS_WIDE, CENSOR_WIDE = np.array([2.0]), np.array([0.3, 0.6, 1.2])
NEIGHBOURS = 0.8
"""Correlation of the log-hazards' misfit in neighbouring intervals, beside a half that all share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plausible:
    """shrunk, wide: float64 [draws, A, 2K + 1]; some may be below zero."""

    shrunk: np.ndarray
    wide: np.ndarray


def plausible(
    noised: np.ndarray, sigma: float, synthetic: np.ndarray, rng: np.random.Generator, *, draws: int
) -> Plausible:
    """Draws of the true cells [A, 2K + 1] given the noised ones; with sigma 0 every draw is the noised cells."""
    if sigma == 0:
        same = np.broadcast_to(noised, (draws, *noised.shape))
        return Plausible(shrunk=same, wide=same)
    model = _Model.of(noised, synthetic)
    return Plausible(
        shrunk=_draws(model, noised, sigma, (SIZES, SIZES), rng, draws),
        wide=_draws(model, noised, sigma, (EVENTS_WIDE, CENSOR_WIDE), rng, draws),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """Prior mean float64 [D] and covariances float64 [D, D] of the cells, D = A (2K + 1)."""

    mean: np.ndarray
    sampling: np.ndarray
    events: np.ndarray
    censored: np.ndarray

    @classmethod
    def of(cls, noised: np.ndarray, synthetic: np.ndarray) -> _Model:
        arms, cells = noised.shape
        patients = np.maximum(noised.sum(axis=1), 3.0 * cells)
        # Half a patient spread over the cells: no cell is impossible because the synthetic table lacks it.
        made = synthetic / synthetic.sum(axis=1, keepdims=True) + 0.5 / (cells * patients[:, None])
        shares = made / made.sum(axis=1, keepdims=True)
        event, censor = _slopes(shares)
        steps = np.arange(event.shape[2])
        smooth = 0.5 + 0.5 * NEIGHBOURS ** np.abs(steps[:, None] - steps)
        between = 0.5 + 0.5 * np.eye(arms)
        size = arms * cells
        both = [
            np.einsum("a,aik,kl,bjl,ab,b->aibj", patients, slope, smooth, slope, between, patients).reshape(size, size)
            for slope in (event, censor)
        ]
        sampling = np.zeros((arms, cells, arms, cells))
        for a, (n, q) in enumerate(zip(patients, shares, strict=True)):
            # The arm's size itself is all but free: 10 n wide.
            sampling[a, :, a, :] = n * (np.diag(q) - np.outer(q, q)) + (10 * n) ** 2 * np.outer(q, q)
        mean = (patients[:, None] * shares).ravel()
        return cls(mean=mean, sampling=sampling.reshape(size, size), events=both[0], censored=both[1])


def _slopes(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How the cells' shares [A, 2K + 1] move with each interval's log-hazard: of events, of censoring, [A, 2K+1, K]."""
    events, risk = at_risk(shares)
    censored = shares[:, 1::2]
    event_hazard = np.clip(events / risk, 1e-4, 0.95)
    censor_hazard = np.clip(censored / np.maximum(risk - events, 1e-12), 1e-4, 0.95)
    by_event = np.zeros((*shares.shape, events.shape[1]))
    by_censoring = np.zeros(by_event.shape)
    for k in range(events.shape[1]):
        lost = -event_hazard[:, k] / (1 - event_hazard[:, k])
        by_event[:, 2 * k, k] = shares[:, 2 * k]
        by_event[:, 2 * k + 1 :, k] = shares[:, 2 * k + 1 :] * lost[:, None]
        lost = -censor_hazard[:, k] / (1 - censor_hazard[:, k])
        by_censoring[:, 2 * k + 1, k] = shares[:, 2 * k + 1]
        by_censoring[:, 2 * k + 2 :, k] = shares[:, 2 * k + 2 :] * lost[:, None]
    return by_event, by_censoring


def _draws(
    model: _Model,
    noised: np.ndarray,
    sigma: float,
    sizes: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    draws: int,
) -> np.ndarray:
    """float64 [draws, A, 2K + 1] from the mixture over the two sizes."""
    off = noised.ravel() - model.mean
    noise = sigma**2 * np.eye(len(off))
    weights, parts = [], []
    for event in sizes[0]:
        for censor in sizes[1]:
            prior = model.sampling + event**2 * model.events + censor**2 * model.censored
            total = prior + noise
            root = np.linalg.cholesky(total)
            white = np.linalg.solve(root, off)
            # Log-spaced grids, hence a factor of each size beside its half-Cauchy prior.
            log_prior = np.log(event / (1 + (event / EVENT_SCALE) ** 2) * censor / (1 + (censor / CENSOR_SCALE) ** 2))
            weights.append(log_prior - 0.5 * white @ white - np.log(np.diag(root)).sum())
            gain = np.linalg.solve(total, prior)
            parts.append((model.mean + off @ gain, prior - prior @ gain))
    weight = np.exp(np.array(weights) - max(weights))
    pick = rng.choice(len(parts), size=draws, p=weight / weight.sum())
    out = np.empty((draws, len(off)))
    for part in np.unique(pick):
        chosen = np.flatnonzero(pick == part)
        mean, covariance = parts[part]
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        normals = rng.standard_normal((len(chosen), len(off)))
        out[chosen] = mean + (normals * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return out.reshape(draws, *noised.shape)

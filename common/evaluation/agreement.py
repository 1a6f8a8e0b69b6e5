"""How often a reader of the held-out and of the synthetic analysis would decide alike, from noised coefficients.

Noise makes two analyses look farther apart than they are. Best guesses come from a posterior in which the difference
has an unknown size (MISFITS); intervals come from the noise alone, for the overlap by test inversion (inversion.py).
"""

from __future__ import annotations

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.inversion import inverted

Z = 1.959963984540054
DRAWS = 2000
QUANTILES = (0.02, 0.98)
NOISE_AT_MOST = 4.0
"""A coefficient's noise over its standard error of sampling; beyond, it cannot be assessed."""
MISFITS = np.array([1.0, 1.4, 2.0, 3.0, 4.5, 7.0, 10.0, 15.0])
"""How far synthetic and held-out coefficients may lie apart, in standard errors of sampling; 1 is sampling alone."""


def agreement(
    *,
    synthetic: np.ndarray,
    difference: np.ndarray,
    noise: np.ndarray,
    sampling: np.ndarray,
    how: str,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, NamedFigure]:
    """decision_agreement, estimate_agreement, ci_overlap, each with interval and reference.

    synthetic: coefficients of the synthetic analysis float64 [d]; difference: the held-out ones minus these, noised;
    noise, sampling: covariances float64 [d, d] of the noise in `difference` (0 for none) and of sampling, which both
    analyses have. The reference is what real data as large would reach if the synthetic fit were the truth.
    """
    rng = np.random.default_rng([seed, 9])
    spread, off = np.sqrt(np.diag(sampling)), difference
    fresh = _normal(sampling, draws, rng)
    exact = not np.any(noise)
    blur = np.zeros((1, len(off))) if exact else _normal(noise, draws, rng)
    guess = off[None] if exact else _shrunk(off, noise, sampling, rng, draws)

    def decisions(difference: np.ndarray) -> np.ndarray:
        return decisions_agree(synthetic + difference, synthetic, spread).mean(axis=-1)

    def estimates(difference: np.ndarray) -> np.ndarray:
        return np.asarray((np.abs(difference) <= Z * spread).mean(axis=-1))

    def apart(difference: np.ndarray) -> np.ndarray:
        return np.asarray(np.minimum(np.abs(difference) / (2 * Z * spread), 1.0).mean(axis=-1))

    ends: dict[str, tuple[float, float, float]] = {}
    for key, share in (("decision_agreement", decisions), ("estimate_agreement", estimates)):
        loose, tight = share(off + blur), share(guess)
        # Differences with noise added twice almost never all agree: the shrunk draws bound the upper end.
        low = min(float(np.quantile(loose, QUANTILES[0])), float(np.quantile(tight, QUANTILES[0])))
        high = max(float(np.quantile(loose, QUANTILES[1])), float(np.quantile(tight, QUANTILES[1])))
        ends[key] = (float(np.clip(np.mean(tight), low, high)), low, high)
    if exact:
        far = float(apart(off))
        ends["ci_overlap"] = (1 - far, 1 - far, 1 - far)
    else:
        limits = inverted(observed=float(apart(off)), direction=np.median(guess, axis=0), noise=blur, distance=apart)
        middle = float(np.clip(np.median(apart(guess)), limits.low, limits.high))
        ends["ci_overlap"] = (1 - middle, max(1 - limits.high, 0.0), 1 - limits.low)
    references = {
        "decision_agreement": decisions(fresh),
        "estimate_agreement": estimates(fresh),
        "ci_overlap": 1 - apart(fresh),
    }
    labels = {
        "decision_agreement": "Same decision (sign and 5 % significance)",
        "estimate_agreement": "Synthetic effect inside the real 95 % interval",
        "ci_overlap": "Overlap of the 95 % intervals",
    }
    swamped = float(np.sqrt(np.median(np.diag(noise) / np.diag(sampling)))) > NOISE_AT_MOST
    out = {}
    for key, (value, low, high) in ends.items():
        unit = "share of coefficients" if key != "ci_overlap" else "share of the interval"
        if swamped:
            reason = "the noise is several times the standard error of these patients"
            figure = Figure.unknown(reason, unit=unit, direction="higher", how=how)
        else:
            wanted = references[key]
            figure = Figure(
                value=value,
                low=low,
                high=high,
                reference=float(np.mean(wanted)),
                reference_low=float(np.quantile(wanted, 0.025)),
                reference_high=float(np.quantile(wanted, 0.975)),
                reference_text="a fresh real sample of as many patients, if the synthetic fit were the truth",
                unit=unit,
                direction="higher",
                how=how,
            )
        out[key] = NamedFigure(label=labels[key], figure=figure)
    return out


def decisions_agree(first: np.ndarray, second: np.ndarray, se: np.ndarray) -> np.ndarray:
    """Per coefficient [..., d]: both significant at 5 % with the same sign, or neither significant."""

    def decided(beta: np.ndarray) -> np.ndarray:
        return np.sign(beta) * (np.abs(beta) > Z * se)

    return np.asarray(decided(first) == decided(second))


def interval_overlap(low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray) -> np.ndarray:
    """Mean share of two intervals that lies in both, 0 where they are apart (Karr et al. 2006, Am. Stat. 60, 224)."""
    both = np.maximum(np.minimum(high, other_high) - np.maximum(low, other_low), 0.0)
    return np.asarray((both / (high - low) + both / (other_high - other_low)) / 2)


def _shrunk(
    off: np.ndarray, noise: np.ndarray, sampling: np.ndarray, rng: np.random.Generator, draws: int
) -> np.ndarray:
    """Plausible true differences [draws, d]: prior N(0, τ² · sampling), τ on a grid with equal weights."""
    weights, parts = [], []
    for misfit in MISFITS:
        prior = misfit**2 * sampling
        root = np.linalg.cholesky(prior + noise)
        white = np.linalg.solve(root, off)
        weights.append(-0.5 * white @ white - np.log(np.diag(root)).sum())
        gain = np.linalg.solve(prior + noise, prior)
        parts.append((off @ gain, prior - prior @ gain))
    weight = np.exp(np.array(weights) - max(weights))
    pick = rng.choice(len(parts), size=draws, p=weight / weight.sum())
    out = np.empty((draws, len(off)))
    for part in np.unique(pick):
        chosen = pick == part
        out[chosen] = parts[part][0] + _normal(parts[part][1], int(chosen.sum()), rng)
    return out


def _normal(covariance: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [draws, d] of N(0, covariance)."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.asarray((rng.standard_normal((draws, len(values))) * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)

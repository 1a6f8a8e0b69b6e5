"""Private evaluation, first version: column distances from noised counts of held-out patients.

The server holds no real record. What it has is, for every column, the noised counts of held-out patients in
the study's bins, the standard deviation of that noise (public), and the synthetic table's own counts.

A distance taken from noised counts is too large: noise never cancels in a sum of absolute values. So the
difference δ between the held-out and the synthetic shares is inferred instead. Prior: sampling of n patients,
variance q/n a cell, plus a misfit of unknown size τ spread over the cells; the law of the noise is known
exactly; δ sums to zero. τ is drawn from its posterior on a grid, then δ, and the distance's median and 95 %
interval are read off the draws (an empirical-Bayes deconvolution; Efron 2016, Biometrika 103).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure

HALF_WIDTH_AT_MOST = 0.1
# The posterior's 95 % interval covers 93.5 % over simulated worlds (one τ a column is a simplification);
# these wider quantiles cover about 95 %, see test_private.py.
QUANTILES = (0.0125, 0.5, 0.9875)
DRAWS = 2000
MEAN_LABEL = "Mean column agreement"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateColumns:
    """mean: 1 minus the mean distance (higher is better). columns: each one's distance (lower is better)."""

    mean: NamedFigure
    columns: tuple[NamedFigure, ...]
    patients: float

    def rows(self) -> tuple[NamedFigure, ...]:
        return (self.mean, *self.columns)


def private_columns(
    *,
    names: Sequence[str],
    noised: Sequence[np.ndarray],
    sigma: float,
    synthetic: Sequence[np.ndarray],
    seed: int = 0,
) -> PrivateColumns:
    """Column distances and their mean, with intervals.

    noised: per column the noised counts of held-out patients, float64 [cells]; every patient counts once per
    column. sigma: standard deviation of the noise of each count; 0 gives the exact distances. synthetic: per
    column the synthetic table's counts in the same cells. Raises ValueError for shapes that do not fit, a
    negative or non-finite sigma, or synthetic counts that are all zero.
    """
    if not (len(names) == len(noised) == len(synthetic)):
        raise ValueError("names, noised and synthetic must have one entry per column each")
    if not names:
        raise ValueError("there is no column to evaluate")
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and not negative, not {sigma!r}")
    for name, a, b in zip(names, noised, synthetic):
        if np.shape(a) != np.shape(b) or np.ndim(a) != 1 or not np.all(np.isfinite(a)):
            raise ValueError(f"the counts of column {name!r} do not fit: {np.shape(a)} against {np.shape(b)}")
        if np.sum(b) <= 0:
            raise ValueError(f"the synthetic counts of column {name!r} are all zero")
    patients, patients_sd = patient_number(noised, sigma)
    how = f"From noised counts of held-out patients (noise SD {sigma:.3g} a count), the noise inferred away."
    if patients <= 0 or patients < 2 * patients_sd:
        reason = "the noise is larger than the number of held-out patients"
        lost = Figure.unknown(reason, unit="share of rows", direction="lower", how=how)
        return PrivateColumns(
            mean=NamedFigure(
                label=MEAN_LABEL,
                figure=Figure.unknown(reason, unit="share of rows", direction="higher", how=how),
            ),
            columns=tuple(NamedFigure(label=n, figure=lost) for n in names),
            patients=max(patients, 0.0),
        )
    rng = np.random.default_rng([seed, 6])
    draws, references, figures = [], [], []
    for name, counts, made in zip(names, noised, synthetic):
        q = np.asarray(made, dtype=float) / np.sum(made)
        draws.append(distance_draws(np.asarray(counts, dtype=float), sigma, q, patients, patients_sd, rng))
        references.append(sampling_distance(q, patients))
        figures.append(NamedFigure(label=name, figure=_figure(draws[-1], references[-1], "lower", how)))
    return PrivateColumns(
        mean=NamedFigure(
            label=MEAN_LABEL,
            figure=_figure(
                1 - np.mean(draws, axis=0),
                1 - float(np.mean(references)),
                "higher",
                f"1 minus the mean distance. {how}",
            ),
        ),
        columns=tuple(figures),
        patients=patients,
    )


def patient_number(noised: Sequence[np.ndarray], sigma: float) -> tuple[float, float]:
    """The number of held-out patients and its standard error, from the noised counts alone.

    Every column's counts sum to it; columns with few cells carry less noise and weigh more.
    """
    sums = np.array([np.sum(c) for c in noised])
    weights = np.array([1 / len(c) for c in noised])
    return float(np.average(sums, weights=weights)), float(sigma / np.sqrt(weights.sum()))


def distance_draws(
    counts: np.ndarray,
    sigma: float,
    shares: np.ndarray,
    patients: float,
    patients_sd: float,
    rng: np.random.Generator,
    *,
    draws: int = DRAWS,
) -> np.ndarray:
    """Draws of the total variation distance between held-out and synthetic shares, given the noised counts.

    counts float64 [cells], shares (of the synthetic rows) float64 [cells]; float64 [draws].
    """
    n = np.maximum(patients + patients_sd * rng.standard_normal(draws), patients / 4)[:, None]
    if sigma == 0:
        return np.broadcast_to(0.5 * np.abs(counts / patients - shares).sum(), (draws,)).copy()
    cells = len(shares)
    noise = (sigma / patients) ** 2
    sampling = (shares + 1 / (4 * patients)) / patients
    spread = (shares + 1 / cells) / np.mean(shares + 1 / cells)
    tau = np.geomspace(1e-4 / cells, 1.0, 90)
    prior = sampling + tau[:, None] ** 2 * spread
    total = prior + noise
    observed = counts / patients - shares
    weight = -0.5 * np.sum(np.log(total) + observed**2 / total, axis=1)
    # half-Cauchy on τ, scale 0.1 / cells; the grid is logarithmic, hence one more factor τ
    weight = np.exp(weight - weight.max()) * tau / (1 + (tau * cells / 0.1) ** 2)
    pick = rng.choice(len(tau), size=draws, p=weight / weight.sum())
    keep = prior[pick] / total[pick]
    variance = keep * noise
    delta = keep * (counts / n - shares) + np.sqrt(variance) * rng.standard_normal((draws, cells))
    delta -= variance / variance.sum(axis=1, keepdims=True) * delta.sum(axis=1, keepdims=True)
    return np.minimum(0.5 * np.abs(delta).sum(axis=1), 1.0)


def sampling_distance(shares: np.ndarray, patients: float) -> float:
    """Expected distance of a sample of `patients` from its own population: ½ Σ √(2 q(1−q)/(π n))."""
    return float(min(1.0, 0.5 * np.sqrt(2 * shares * (1 - shares) / (np.pi * patients)).sum()))


def _figure(draws: np.ndarray, reference: float, direction: str, how: str) -> Figure:
    low, value, high = (float(v) for v in np.quantile(draws, QUANTILES))
    if (high - low) / 2 > HALF_WIDTH_AT_MOST:
        return Figure.unknown(
            f"the noise leaves it anywhere between {low:.2f} and {high:.2f}",
            unit="share of rows",
            direction="lower" if direction == "lower" else "higher",
            how=how,
        )
    return Figure(
        value=value,
        low=low,
        high=high,
        reference=reference,
        reference_text="a fresh real sample of as many patients",
        unit="share of rows",
        direction="lower" if direction == "lower" else "higher",
        how=how,
    )

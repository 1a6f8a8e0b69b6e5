"""How near are real patients to their nearest synthetic row? A measure of similarity, not of privacy.

The sites answer with a histogram of held-out patients' distances to the nearest of some synthetic rows (`Nearest`).
Beside it stands the same histogram of further synthetic rows (free), and, where the plan pays for it, of training
patients: if training patients are nearer than held-out ones, the table repeats its training data. The direction
synthetic → nearest real is never asked: one patient could move all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import TWO_SIDED, linear_figure
from cohortium.common.evaluation.private import DRAWS, private_columns

HALF_WIDTH_AT_MOST = 0.1
FINE = 60
"""Places in each bin where a median is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearness:
    """median: held-out patients' median distance; difference: total variation distance of the held-out histogram to
    that of synthetic rows; training: probability that a training patient is nearer than a held-out one (0.5: the
    table does not repeat its training data), None where no training histogram was asked for.
    """

    median: NamedFigure
    difference: NamedFigure
    training: NamedFigure | None


def nearness(
    *,
    counts: np.ndarray,
    sigma: float,
    edges: np.ndarray,
    synthetic: np.ndarray,
    training: np.ndarray | None = None,
    training_sigma: float = 0.0,
    seed: int = 0,
    draws: int = DRAWS,
) -> Nearness:
    """Figures of a distance histogram.

    counts: float64 [edges + 1], noised, of held-out patients; edges: ascending distances in 0..1; synthetic: counts
    of synthetic rows that are not among the rows compared with; training: noised counts of training patients with
    training_sigma. Raises ValueError for shapes that do not fit.
    """
    counts, edges = np.asarray(counts, dtype=float), np.asarray(edges, dtype=float)
    if edges.ndim != 1 or not len(edges) or np.any(np.diff(edges) <= 0) or counts.shape != (len(edges) + 1,):
        raise ValueError("a histogram of distances has ascending edges and one count more than edges")
    if np.shape(synthetic) != counts.shape or (training is not None and np.shape(training) != counts.shape):
        raise ValueError("all histograms must have the same bins")
    how = f"Noised histogram of distances to the nearest synthetic row (noise SD {sigma:.3g} a count)."
    compared = private_columns(
        names=["distance"], noised=[counts], sigma=sigma, synthetic=[synthetic], seed=seed, draws=draws
    )
    return Nearness(
        median=NamedFigure(
            label="Median distance to the nearest synthetic row", figure=_median(counts, sigma, edges, synthetic, how)
        ),
        difference=NamedFigure(
            label="Distances of held-out patients against those of synthetic rows", figure=compared.columns[0].figure
        ),
        training=None
        if training is None
        else NamedFigure(
            label="Chance that a training patient is nearer than a held-out one",
            figure=_nearer(np.asarray(training, dtype=float), training_sigma, counts, sigma, how),
        ),
    )


def _bounds(edges: np.ndarray) -> np.ndarray:
    """Where the histogram's bins begin and end: distances lie in 0..1."""
    return np.concatenate([[min(0.0, edges[0])], edges, [max(1.0, edges[-1])]])


def _cumulated(counts: np.ndarray, edges: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(those nearer than `at`, weights [at, bins] of the counts in it), straight lines inside the bins."""
    bounds = _bounds(edges)
    width = np.maximum(np.diff(bounds), 1e-12)
    weights = np.clip((at[:, None] - bounds[:-1]) / width, 0.0, 1.0)
    return weights @ counts, weights


def median_of(counts: np.ndarray, edges: np.ndarray) -> float:
    """The distance that half of the counted lie below, straight lines inside the bins."""
    heights = np.concatenate([[0.0], np.cumsum(np.maximum(counts, 0.0))])
    return float(np.interp(heights[-1] / 2, heights, _bounds(edges)))


def _median(counts: np.ndarray, sigma: float, edges: np.ndarray, synthetic: np.ndarray, how: str) -> Figure:
    """All distances whose "half lie nearer" the noise allows: Σ (w − ½)·counts has known Gaussian noise."""
    reference = median_of(np.asarray(synthetic, dtype=float), edges)
    text = "further synthetic rows"
    if sigma == 0:
        exact = median_of(counts, edges)
        return Figure(value=exact, low=exact, high=exact, reference=reference, reference_text=text, how=how)
    bounds = _bounds(edges)
    steps = np.linspace(0.0, 1.0, FINE + 1)
    at = np.unique(bounds[:-1, None] + np.diff(bounds)[:, None] * steps)
    _, weights = _cumulated(counts, edges, at)
    excess = (weights - 0.5) @ counts
    allowed = np.flatnonzero(np.abs(excess) <= TWO_SIDED * sigma * np.sqrt(((weights - 0.5) ** 2).sum(axis=1)))
    if not len(allowed):
        return Figure.unknown("the noise leaves no distance that fits", how=how)
    # The ends lie between places: the places outside are the safe side.
    low, high = float(at[max(allowed[0] - 1, 0)]), float(at[min(allowed[-1] + 1, len(at) - 1)])
    if (high - low) / 2 > HALF_WIDTH_AT_MOST:
        return Figure.unknown(f"the noise leaves it anywhere between {low:.2f} and {high:.2f}", how=how)
    value = float(at[allowed[np.argmin(np.abs(excess[allowed]))]])
    return Figure(value=value, low=low, high=high, reference=reference, reference_text=text, how=how)


def _nearer(train: np.ndarray, train_sigma: float, held: np.ndarray, sigma: float, how: str) -> Figure:
    """P(training nearer) + ½ P(same bin) (Mann–Whitney), bilinear in two independently noised histograms."""
    unit = "probability"
    n, m = train.sum(), held.sum()
    if n <= 4 * train_sigma * np.sqrt(len(train)) or m <= 4 * sigma * np.sqrt(len(held)) or min(n, m) <= 0:
        return Figure.unknown("the noise is larger than the number of patients", unit=unit, direction="lower", how=how)
    p, q = train / n, held / m
    beyond = q.sum() - np.cumsum(q) + q / 2  # chance that a held-out patient lies beyond each bin
    nearer = np.cumsum(p) - p / 2
    value = float(p @ beyond)
    # The totals are noised as well: the derivative by a count is centred on the value.
    by_train, by_held = (beyond - value) / n, (nearer - value) / m
    variance = train_sigma**2 * (by_train @ by_train) + sigma**2 * (by_held @ by_held)
    variance += (train_sigma * sigma / (n * m)) ** 2 * len(p) ** 2 / 4
    return linear_figure(
        value,
        float(np.sqrt(variance)),
        low=0.0,
        high=1.0,
        at_most=HALF_WIDTH_AT_MOST,
        reference=0.5,
        reference_text="training patients as far away as held-out ones",
        unit=unit,
        direction="lower",
        how=how,
    )

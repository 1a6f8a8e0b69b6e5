"""Correlations of held-out patients from one noised Gram matrix, and how near the synthetic ones are.

The sites answer with Σ r_j r_k over held-out patients for all pairs of columns, r being rank scores by the synthetic
distribution (ranks.py). Held-out means and variances of the scores follow from the noised one-way counts in the same
bins, so the correlation is Pearson's of the scores. Similarity of a pair is 1 − |ρ_real − ρ_synthetic| / 2 (SDMetrics'
CorrelationSimilarity). The noise of a correlation is known. Readers look at the pairs that differ most, and noise
makes them differ more than they do: a pair's correlation is inferred together with all others (sizes.each_one), and
so is the mean of |difference|, which noise makes too large; a pair's similarity has the folded normal's belt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import Interval, size_interval
from cohortium.common.evaluation.equivalence import Equivalence, tost
from cohortium.common.evaluation.private import inferred_shares
from cohortium.common.evaluation.sizes import Worlds, each_one, mean_size

MARGIN = 0.1
"""Correlations this near count as equivalent."""
NOISE_AT_MOST = 0.25
"""Standard deviation of a correlation's noise: beyond it, what is told of a pair would be the other pairs' alone."""
MEAN_HALF_WIDTH_AT_MOST = 0.1
VARIANCE_AT_LEAST = 0.05
"""Of a score's variance, as a part of the synthetic one: below it no correlation can be told from noise."""
SIMILARITY_LABEL = "Mean similarity of correlations"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFigure:
    """One pair: the held-out correlation with its interval, the synthetic one, their similarity.

    real: inferred from all pairs (empirical Bayes), so that the pairs with the greatest differences may be listed;
    shrunk: its value, which a map of correlations draws, also where the interval is too wide to be printed.
    """

    first: str
    second: str
    real: Figure
    synthetic: float
    similarity: Figure
    equivalence: Equivalence
    shrunk: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlations:
    """similarity: mean over pairs, higher is better. names: the columns; matrices [columns, columns].

    real: inferred correlations, diagonal 1; synthetic: exact ones; noise: standard deviation of a seen correlation.
    clip_share: share of synthetic rows whose scores the query's bound shortens.
    """

    names: tuple[str, ...]
    similarity: NamedFigure
    pairs: tuple[PairFigure, ...]
    clip_share: float
    real: np.ndarray = field(repr=False)
    synthetic: np.ndarray = field(repr=False)
    state: State = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What other figures of the same answer need (axes.py). Vectors over pairs, upper triangle by rows.

    seen: differences real minus synthetic as noised; noise, sampling: standard deviations; worlds: None without noise.
    """

    seen: np.ndarray
    noise: np.ndarray
    sampling: np.ndarray
    worlds: Worlds | None
    patients: float


def correlations(
    *,
    names: Sequence[str],
    scores: Sequence[np.ndarray],
    comoments: np.ndarray,
    sigma: float,
    counts: Sequence[np.ndarray],
    counts_sigma: float,
    synthetic_counts: Sequence[np.ndarray],
    synthetic_bins: np.ndarray,
    patients: float,
    clip_share: float = 0.0,
    seed: int = 0,
    draws: int = 2000,
) -> Correlations:
    """Correlations of p columns.

    scores: per column float64 [bins]; comoments: float64 [p(p−1)/2], noised Σ r_j r_k, pairs j < k by rows, as
    `Moments` answers; sigma: its noise. counts: per column the noised one-way counts of held-out patients, with
    counts_sigma; synthetic_counts: the synthetic table's; synthetic_bins: its rows in bins, int [rows, p].
    patients: how many held-out patients there are, inferred. Raises ValueError for shapes that do not fit.
    """
    p = len(names)
    _check(p, scores, comoments, sigma, counts, synthetic_counts, synthetic_bins, patients)
    upper = np.triu_indices(p, 1)
    made = np.stack([s[synthetic_bins[:, j]] for j, s in enumerate(scores)], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho_made = np.corrcoef(made, rowvar=False)
    shares = inferred_shares(counts, counts_sigma, synthetic_counts, patients)
    means = np.array([h @ s for h, s in zip(shares, scores, strict=True)])
    variances = np.array([h @ s**2 for h, s in zip(shares, scores, strict=True)]) - means**2
    floor = VARIANCE_AT_LEAST * made.var(axis=0) if sigma > 0 or counts_sigma > 0 else np.zeros(p)
    variances = np.maximum(variances, floor)
    spread = np.sqrt(variances)
    usable = (spread[upper[0]] * spread[upper[1]] > 1e-9) & np.isfinite(rho_made[upper])
    scale = np.where(usable, spread[upper[0]] * spread[upper[1]], 1.0)
    rho = (comoments / patients - means[upper[0]] * means[upper[1]]) / scale
    noise = sigma / patients / scale
    made_rho = rho_made[upper]
    seen = np.where(usable, rho - made_rho, 0.0)
    sampling = (1 - np.nan_to_num(made_rho) ** 2) / np.sqrt(patients)
    how = f"Rank scores by the synthetic distribution; noise SD {float(np.median(noise)):.2g} a correlation."
    keep = np.flatnonzero(usable)
    if not len(keep):
        raise ValueError("no pair of columns has a spread on both sides")
    inferred, worlds = seen, None
    ends = np.stack([seen, seen])
    if sigma > 0:
        rng = np.random.default_rng([seed, 8])
        found, worlds = mean_size(seen[keep], noise[keep], sampling[keep], rng, draws)
        inferred, ends = np.zeros(len(seen)), np.zeros((2, len(seen)))
        inferred[keep], ends[0, keep], ends[1, keep] = each_one(worlds, seen[keep], noise[keep], sampling[keep])
    else:
        exact = float(np.abs(seen[keep]).mean())
        found = Interval(low=exact, middle=exact, high=exact)
    reference = 1 - float(np.mean(sampling[keep])) * np.sqrt(2 / np.pi) / 2
    matrix = np.eye(p)
    matrix[upper] = np.clip(np.nan_to_num(made_rho) + inferred, -1, 1)
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    pairs = tuple(
        _pair(
            (names[upper[0][i]], names[upper[1][i]]),
            float(rho[i]),
            float(made_rho[i]),
            float(noise[i]),
            float(sampling[i]),
            float(made_rho[i] + inferred[i]),
            (float(made_rho[i] + ends[0, i]), float(made_rho[i] + ends[1, i])),
            how,
        )
        for i in keep
    )
    return Correlations(
        names=tuple(names),
        similarity=NamedFigure(label=SIMILARITY_LABEL, figure=_mean_figure(found, reference, how)),
        pairs=pairs,
        clip_share=clip_share,
        real=matrix,
        synthetic=np.where(np.isfinite(rho_made), rho_made, np.eye(p)),
        state=State(
            seen=seen,
            noise=noise,
            sampling=sampling,
            worlds=worlds if len(keep) == len(seen) else None,
            patients=patients,
        ),
    )


def _pair(
    names: tuple[str, str],
    rho: float,
    made: float,
    noise: float,
    sampling: float,
    inferred: float,
    ends: tuple[float, float],
    how: str,
) -> PairFigure:
    lowest, value, highest = (float(np.clip(v, -1.0, 1.0)) for v in (ends[0], inferred, ends[1]))
    if noise > NOISE_AT_MOST:
        reason = f"the noise has a standard deviation of {noise:.2f}"
        real = Figure.unknown(reason, unit="correlation", how=how)
    else:
        value = min(max(value, lowest), highest)
        real = Figure(value=value, low=lowest, high=highest, unit="correlation", how=how)
    gap_low, gap_high = size_interval(rho - made, noise)
    low, high = (float(np.clip(1 - gap / 2, 0.0, 1.0)) for gap in (gap_high, gap_low))
    unit, reference = "similarity, 0 to 1", 1 - sampling * float(np.sqrt(2 / np.pi)) / 2
    if (high - low) / 2 > MEAN_HALF_WIDTH_AT_MOST:
        reason = f"the noise leaves it anywhere between {low:.2f} and {high:.2f}"
        similarity = Figure.unknown(reason, unit=unit, direction="higher", how=how)
    else:
        # Without noise the gap itself; with noise the gap that the noise most plausibly left, |x|² − noise² at least 0.
        gap = float(np.sqrt(max((rho - made) ** 2 - noise**2, 0.0))) if noise > 0 else abs(rho - made)
        similarity = Figure(
            value=float(np.clip(1 - gap / 2, low, high)),
            low=low,
            high=high,
            reference=reference,
            reference_text="a fresh real sample of as many patients",
            unit=unit,
            direction="higher",
            how=how,
        )
    error = float(np.hypot(noise, sampling))
    equivalence = tost(f"{names[0]} × {names[1]}", rho - made, error, MARGIN)
    return PairFigure(
        first=names[0],
        second=names[1],
        real=real,
        synthetic=made,
        similarity=similarity,
        equivalence=equivalence,
        shrunk=float(np.clip(inferred, -1.0, 1.0)),
    )


def _mean_figure(gap: Interval, reference: float, how: str) -> Figure:
    unit = "similarity, 0 to 1"
    low, value, high = (float(np.clip(1 - g / 2, 0.0, 1.0)) for g in (gap.high, gap.value, gap.low))
    if (high - low) / 2 > MEAN_HALF_WIDTH_AT_MOST:
        reason = f"the noise leaves it anywhere between {low:.2f} and {high:.2f}"
        return Figure.unknown(reason, unit=unit, direction="higher", how=how)
    return Figure(
        value=value,
        low=low,
        high=high,
        reference=reference,
        reference_text="a fresh real sample of as many patients",
        unit=unit,
        direction="higher",
        how=f"1 minus half the mean difference of correlations. {how}",
    )


def _check(
    p: int,
    scores: Sequence[np.ndarray],
    comoments: np.ndarray,
    sigma: float,
    counts: Sequence[np.ndarray],
    synthetic_counts: Sequence[np.ndarray],
    synthetic_bins: np.ndarray,
    patients: float,
) -> None:
    if p < 2 or not len(scores) == len(counts) == len(synthetic_counts) == p or synthetic_bins.shape[1:] != (p,):
        raise ValueError("correlations need at least two columns, each with scores, counts and synthetic bins")
    if comoments.shape != (p * (p - 1) // 2,) or not np.isfinite(comoments).all():
        raise ValueError(f"{p} columns have {p * (p - 1) // 2} finite co-moments, not {comoments.shape}")
    if any(len(s) != len(c) or len(s) != len(m) for s, c, m in zip(scores, counts, synthetic_counts, strict=True)):
        raise ValueError("scores and counts must have the same bins")
    if not (np.isfinite(sigma) and sigma >= 0 and np.isfinite(patients) and patients > 0):
        raise ValueError("sigma is at least 0 and the number of patients above 0")

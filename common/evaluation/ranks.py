"""Rank scores: what held-out patients' co-moments are asked of, one bounded number per column.

A row's score in a column is where its bin lies in the SYNTHETIC distribution: the mid-rank of the bin among the
synthetic values present, centred and scaled; missing scores 0. Scores of present values are centred on the synthetic
table. All of it is public. A correlation of scores of fine bins is nearly Spearman's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.evaluation.bins import Bins

SCORE_AT_MOST = 3.0
CLIP_QUANTILE = 0.99
COLUMNS_AT_LEAST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RankScores:
    """columns: the dictionary's columns that have a score; scores: per such column float64 [bins].

    features: per column of the dictionary float64 [codes, 1], or [codes, 0] without a score: `Moments.features`.
    bound_sq: `Moments.bound_sq`; clip_share: share of synthetic rows that it shortens.
    """

    columns: tuple[int, ...]
    scores: tuple[np.ndarray, ...] = field(repr=False)
    features: tuple[np.ndarray, ...] = field(repr=False)
    bound_sq: float
    clip_share: float


def scorable(column: Bins) -> bool:
    """A number, or a category of which the synthetic table holds two levels: both have an order and a spread."""
    present = np.flatnonzero(column.counts[:-1])
    return len(present) >= 2 and (column.ordered or len(present) == 2)


def rank_scores(bins: Sequence[Bins], codes: np.ndarray, *, clip_quantile: float = CLIP_QUANTILE) -> RankScores:
    """Scores from the synthetic rows `codes` (fine codes, int [rows, columns]).

    clip_quantile: share of synthetic rows that the bound leaves whole; 1 shortens none of them, and real ones hardly.
    Raises ValueError where fewer than two columns have a score.
    """
    columns = tuple(c for c, b in enumerate(bins) if scorable(b))
    if len(columns) < COLUMNS_AT_LEAST:
        raise ValueError("correlations need at least two columns with an order and a spread")
    scores = tuple(_scores(bins[c]) for c in columns)
    features = [np.zeros((len(b.map), 0)) for b in bins]
    norms = np.zeros(len(codes))
    for c, score in zip(columns, scores, strict=True):
        features[c] = score[bins[c].map][:, None]
        norms += features[c][codes[:, c], 0] ** 2
    bound = float(np.quantile(norms, clip_quantile)) * (1 + 1e-9)
    if clip_quantile >= 1:
        bound = float(sum((score**2).max() for score in scores)) * (1 + 1e-6)
    return RankScores(
        columns=columns,
        scores=scores,
        features=tuple(features),
        bound_sq=bound,
        clip_share=float(np.mean(norms > bound)),
    )


def _scores(column: Bins) -> np.ndarray:
    counts = column.counts[:-1]
    if not column.ordered:  # two levels present: levels that no synthetic row has stand with the first
        high = np.arange(len(counts)) == np.flatnonzero(counts)[1]
        share = counts[high].sum() / counts.sum()
        raw = np.where(high, 1 - share, -share)
    else:
        share_of = counts / counts.sum()
        raw = np.cumsum(share_of) - share_of / 2 - 0.5
    variance = float((counts * raw**2).sum() / counts.sum())
    # Unit variance where no value then scores above 3: a rare level must not take the whole bound.
    scale = min(1 / np.sqrt(variance), SCORE_AT_MOST / np.abs(raw[counts > 0]).max())
    return np.concatenate([np.clip(raw * scale, -SCORE_AT_MOST, SCORE_AT_MOST), [0.0]])

"""Rare categories: how many real patients have a level that the synthetic table does not know?

Levels of all categorical columns are put in bands by a PUBLIC frequency: the released (noised) training histogram
where one was paid for, else the synthetic share. Recall of a band is the share of its held-out patients whose level
occurs in the synthetic table at all: a ratio of two disjoint noised sums, with Fieller's interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.belts import ratio_figure

EDGES = (0.001, 0.01, 0.05, 0.2)
NAMES = ("below 0.1 %", "0.1 % to 1 %", "1 % to 5 %", "5 % to 20 %", "20 % and more")
HALF_WIDTH_AT_MOST = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """levels: in the band, and in the synthetic table; held_out: share of all held-out answers; recall."""

    name: str
    levels: int
    levels_present: int
    held_out: Figure
    synthetic_share: float
    recall: Figure


def rare_recall(
    *,
    counts: Sequence[np.ndarray],
    sigma: float,
    synthetic: Sequence[np.ndarray],
    frequencies: Sequence[np.ndarray] | None = None,
) -> tuple[Band, ...]:
    """Recall by frequency band over categorical columns.

    counts: per column the noised held-out counts by level, float64 [levels]; sigma: noise of each; synthetic: the
    synthetic table's counts; frequencies: public shares that make the bands, [levels] each (None: the synthetic ones,
    where a level that never occurs falls into the lowest band). Raises ValueError for shapes that do not fit.
    """
    made = [np.asarray(m, dtype=float) / max(float(np.sum(m)), 1.0) for m in synthetic]
    bands_by = made if frequencies is None else [np.asarray(f, dtype=float) for f in frequencies]
    if not counts or not len(counts) == len(made) == len(bands_by):
        raise ValueError("rare_recall needs counts, synthetic counts and frequencies of the same columns")
    if any(np.shape(c) != m.shape or m.shape != f.shape for c, m, f in zip(counts, made, bands_by, strict=True)):
        raise ValueError("counts, synthetic counts and frequencies must have the same levels")
    if not (np.isfinite(sigma) and sigma >= 0 and all(np.isfinite(c).all() for c in counts)):
        raise ValueError("counts are finite and sigma at least 0")
    seen, q = np.concatenate([np.asarray(c, dtype=float) for c in counts]), np.concatenate(made)
    band = np.searchsorted(EDGES, np.concatenate(bands_by), side="right")
    how = f"From noised counts of held-out patients (noise SD {sigma:.3g} a count)."
    source = "synthetic" if frequencies is None else "released training"
    out = []
    for b, name in enumerate(NAMES):
        inside, known = band == b, (band == b) & (q > 0)
        lost = inside & ~known
        out.append(
            Band(
                name=name,
                levels=int(inside.sum()),
                levels_present=int(known.sum()),
                held_out=ratio_figure(
                    float(seen[inside].sum()),
                    float(seen[~inside].sum()),
                    sigma * float(np.sqrt(inside.sum())),
                    sigma * float(np.sqrt((~inside).sum())),
                    at_most=HALF_WIDTH_AT_MOST,
                    reference=float(q[inside].sum() / len(counts)),
                    reference_text="the synthetic table",
                    unit="share of answers",
                    how=f"Bands by the {source} frequency. {how}",
                ),
                synthetic_share=float(q[inside].sum() / len(counts)),
                recall=ratio_figure(
                    float(seen[known].sum()),
                    float(seen[lost].sum()),
                    sigma * float(np.sqrt(known.sum())),
                    sigma * float(np.sqrt(lost.sum())),
                    at_most=HALF_WIDTH_AT_MOST,
                    reference=1.0,
                    reference_text="every level that patients have",
                    unit="share of answers",
                    direction="higher",
                    how=how,
                ),
            )
        )
    return tuple(out)

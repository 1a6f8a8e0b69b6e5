"""Who is in the table, and for whom does the model trained on it err? Shares and error rates by group.

The sites answer with counts by group × outcome × prediction, the prediction by a model and a threshold fixed on the
synthetic table. A rate is the ratio of two noised sums: Fieller's interval covers it exactly whatever the noise. The
gap between groups (largest minus smallest rate) is biased upward by noise and inferred instead (sizes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import Interval, ratio_figure
from cohortium.common.evaluation.sizes import mean_size, simulated

HALF_WIDTH_AT_MOST = 0.15
GAP_HALF_WIDTH_AT_MOST = 0.15
DRAWS = 1000

# name: (what is counted, of whom), as masks over [outcome, prediction]; outcome and prediction: 0 no, 1 yes.
RATES: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "prevalence": (np.array([[0, 0], [1, 1]]), np.array([[1, 1], [1, 1]])),
    "selection rate": (np.array([[0, 1], [0, 1]]), np.array([[1, 1], [1, 1]])),
    "sensitivity": (np.array([[0, 0], [0, 1]]), np.array([[0, 0], [1, 1]])),
    "specificity": (np.array([[1, 0], [0, 0]]), np.array([[1, 1], [0, 0]])),
    "precision": (np.array([[0, 0], [0, 1]]), np.array([[0, 1], [0, 1]])),
    "error rate": (np.array([[0, 1], [1, 0]]), np.array([[1, 1], [1, 1]])),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One group: its share of held-out patients, and its rates by name (keys of RATES)."""

    name: str
    share: Figure
    rates: dict[str, Figure]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subgroups:
    """groups; overall: rates of everybody; gaps: largest minus smallest rate between groups, by name of the rate."""

    groups: tuple[Group, ...]
    overall: dict[str, Figure]
    gaps: dict[str, NamedFigure]


def subgroups(
    *, names: Sequence[str], counts: np.ndarray, sigma: float, synthetic: np.ndarray, seed: int = 0
) -> Subgroups:
    """Shares, rates and gaps.

    counts: float64 [groups, outcomes, 2], noised counts of held-out patients as `Scored` with one edge answers (group
    and outcome are its `by`, slowest first); outcomes 0 and 1 are no and yes, any further ones (unknown) count in the
    shares only. sigma: noise of each. synthetic: the synthetic table's counts, the same shape; its shares are the
    references. Raises ValueError for shapes that do not fit.
    """
    counts, synthetic = np.asarray(counts, dtype=float), np.asarray(synthetic, dtype=float)
    if counts.ndim != 3 or counts.shape != synthetic.shape or counts.shape[0] != len(names) or counts.shape[2] != 2:
        raise ValueError(f"counts are [groups, outcomes, 2] on both sides, not {counts.shape} and {synthetic.shape}")
    if counts.shape[1] < 2 or not (np.isfinite(counts).all() and np.isfinite(sigma) and sigma >= 0):
        raise ValueError("there are at least two outcomes, and counts and sigma are finite")
    how = f"From noised counts by group, outcome and prediction (noise SD {sigma:.3g} a count)."
    everybody = counts.sum(axis=0)
    overall = {name: _rate(everybody, name, sigma * np.sqrt(len(names)), None, how) for name in RATES}
    made_total = synthetic.sum()
    cells = counts.shape[1] * 2
    groups = []
    for g, name in enumerate(names):
        share = ratio_figure(
            counts[g].sum(),
            counts.sum() - counts[g].sum(),
            sigma * np.sqrt(cells),
            sigma * np.sqrt(cells * (len(names) - 1)),
            at_most=HALF_WIDTH_AT_MOST,
            reference=float(synthetic[g].sum() / made_total) if made_total > 0 else None,
            reference_text="the synthetic table",
            unit="share of patients",
            how=how,
        )
        rates = {rate: _rate(counts[g], rate, sigma, overall[rate].value, how) for rate in RATES}
        groups.append(Group(name=name, share=share, rates=rates))
    gaps = {rate: _gap(counts, rate, sigma, np.random.default_rng([seed, 10, i]), how) for i, rate in enumerate(RATES)}
    return Subgroups(groups=tuple(groups), overall=overall, gaps=gaps)


def _parts(counts: np.ndarray, rate: str) -> tuple[float, float, int, int]:
    """(counted, the rest of those it is of, cells in each)."""
    top, whole = RATES[rate]
    rest = whole - top
    table = counts[:2]
    return float((table * top).sum()), float((table * rest).sum()), int(top.sum()), int(rest.sum())


def _rate(counts: np.ndarray, rate: str, sigma: float, reference: float | None, how: str) -> Figure:
    part, rest, part_cells, rest_cells = _parts(counts, rate)
    return ratio_figure(
        part,
        rest,
        sigma * np.sqrt(part_cells),
        sigma * np.sqrt(rest_cells),
        at_most=HALF_WIDTH_AT_MOST,
        reference=reference,
        reference_text="all groups together",
        unit="share of patients",
        direction="lower" if rate == "error rate" else "none",
        how=how,
    )


def _gap(counts: np.ndarray, rate: str, sigma: float, rng: np.random.Generator, how: str) -> NamedFigure:
    """Largest minus smallest rate, over groups whose rate can be told from noise at all."""
    label = f"Largest gap in {rate} between groups"
    unit = "share of patients"
    values, errors, sampling = [], [], []
    for table in counts:
        part, rest, part_cells, rest_cells = _parts(table, rate)
        whole = part + rest
        if whole <= max(4 * sigma * np.sqrt(part_cells + rest_cells), 0.5):
            continue
        r = min(max(part / whole, 0.0), 1.0)
        values.append(part / whole if sigma == 0 else r)
        errors.append(sigma * float(np.sqrt((1 - r) ** 2 * part_cells + r**2 * rest_cells)) / whole)
        sampling.append(float(np.sqrt(max(r * (1 - r), 0.01) / whole)))
    if len(values) < 2:
        lost = Figure.unknown("fewer than two groups stand out of the noise", unit=unit, direction="lower", how=how)
        return NamedFigure(label=label, figure=lost)
    seen, noise, spread = np.array(values), np.array(errors), np.array(sampling)
    if sigma == 0:
        exact = float(seen.max() - seen.min())
        found = Interval(low=exact, middle=exact, high=exact)
    else:
        seen = seen - np.average(seen, weights=1 / (noise**2 + spread**2))
        _, worlds = mean_size(seen, noise, spread, rng, DRAWS)
        span: Callable[[np.ndarray], np.ndarray] = lambda x: x.max(axis=1) - x.min(axis=1)  # noqa: E731
        found = simulated(worlds, seen, noise, spread, span, draws=DRAWS)
    low, value, high = (min(max(v, 0.0), 1.0) for v in (found.low, found.value, found.high))
    if (high - low) / 2 > GAP_HALF_WIDTH_AT_MOST:
        reason = f"the noise leaves it anywhere between {low:.2f} and {high:.2f}"
        return NamedFigure(label=label, figure=Figure.unknown(reason, unit=unit, direction="lower", how=how))
    fresh = spread[:, None] * rng.standard_normal((len(spread), 400))
    figure = Figure(
        value=value,
        low=low,
        high=high,
        reference=float((fresh.max(axis=0) - fresh.min(axis=0)).mean()),
        reference_text="groups of these sizes that differ by chance alone",
        unit=unit,
        direction="lower",
        how=f"{len(values)} of {len(counts)} groups are large enough. {how}",
    )
    return NamedFigure(label=label, figure=figure)

"""Who is in the table, and for whom does the model trained on it err? Shares and error rates by group.

The sites answer with counts by group × outcome × prediction, the prediction by a model and a threshold fixed on the
synthetic table. A rate is the ratio of two noised sums: Fieller's interval covers it exactly whatever the noise. The
gap between groups (largest minus smallest rate) is biased upward by noise: its interval holds every gap that the
noised one is compatible with (inversion.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import Interval, ratio_figure
from cohortium.common.evaluation.inversion import inverted

HALF_WIDTH_AT_MOST = 0.15
RATE_NOISE_AT_MOST = 0.06
"""Standard deviation of the noise in a group's rate, as the synthetic table foretells it: noisier groups take no part
in a gap. Decided by public numbers alone: a rule on the answer would keep the lucky ones."""
GAP_LEVELS = (0.02, 0.5, 0.975)
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
    *,
    names: Sequence[str],
    counts: np.ndarray,
    sigma: float,
    synthetic: np.ndarray,
    planned_sigma: float | None = None,
    seed: int = 0,
) -> Subgroups:
    """Shares, rates and gaps.

    counts: float64 [groups, outcomes, 2], noised counts of held-out patients as `Scored` with one edge answers (group
    and outcome are its `by`, slowest first); outcomes 0 and 1 are no and yes, any further ones (unknown) count in the
    shares only. sigma: noise of each. synthetic: the synthetic table's counts, the same shape; its shares are the
    references. planned_sigma: by what noise the groups of a gap are chosen, `sigma` where it is None; a twin without
    noise passes that of the private side, to speak of the same groups. Raises ValueError for shapes that do not fit.
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
    planned = sigma if planned_sigma is None else planned_sigma
    expected = synthetic * (max(float(counts.sum()), 1.0) / max(float(made_total), 1.0))
    gaps = {
        rate: _gap(
            counts, expected, rate, sigma, _large(expected, rate, planned), np.random.default_rng([seed, 10, i]), how
        )
        for i, rate in enumerate(RATES)
    }
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


def _noise(rate: float, whole: float, part_cells: int, rest_cells: int, sigma: float) -> float:
    """Standard deviation of the noise of a rate, first order."""
    return sigma * float(np.sqrt((1 - rate) ** 2 * part_cells + rate**2 * rest_cells)) / whole


def _large(expected: np.ndarray, rate: str, sigma: float) -> list[bool]:
    """Which groups are large enough to take part in a gap, by the counts that the synthetic table foretells."""
    out = []
    for table in expected:
        part, rest, part_cells, rest_cells = _parts(table, rate)
        whole = part + rest
        out.append(whole > 0.5 and _noise(part / whole, whole, part_cells, rest_cells, sigma) <= RATE_NOISE_AT_MOST)
    return out


def _gap(
    counts: np.ndarray,
    expected: np.ndarray,
    rate: str,
    sigma: float,
    large: list[bool],
    rng: np.random.Generator,
    how: str,
) -> NamedFigure:
    """Largest minus smallest rate, over the groups that are large enough; the reference is the synthetic rows' own gap,
    and the range that sampling as many patients from them gives it."""
    label = f"Largest gap in {rate} between groups"
    unit = "share of patients"
    values, errors, sampling = [], [], []
    for table in counts[large]:
        part, rest, part_cells, rest_cells = _parts(table, rate)
        whole = part + rest
        if whole <= max(2 * sigma * np.sqrt(part_cells + rest_cells), 0.5):
            continue
        r = min(max(part / whole, 0.0), 1.0)
        values.append(r)
        errors.append(_noise(r, whole, part_cells, rest_cells, sigma))
        sampling.append(float(np.sqrt(max(r * (1 - r), 0.01) / whole)))
    if len(values) < 2:
        lost = Figure.unknown("fewer than two groups stand out of the noise", unit=unit, direction="lower", how=how)
        return NamedFigure(label=label, figure=lost)
    seen, noise, spread = np.array(values), np.array(errors), np.array(sampling)
    if sigma == 0:
        exact = float(seen.max() - seen.min())
        found = Interval(low=exact, middle=exact, high=exact)
    else:
        limits = inverted(
            observed=float(_span(seen)),
            direction=_shrunk(seen, noise, spread),
            noise=noise * rng.standard_normal((DRAWS, len(noise))),
            distance=_span,
            levels=GAP_LEVELS,
        )
        found = Interval(low=limits.low, middle=limits.value, high=limits.high)
    low, value, high = (min(max(v, 0.0), 1.0) for v in (found.low, found.value, found.high))
    made, size = _foretold(expected[large], rate)
    fresh = made[:, None] + np.sqrt(np.maximum(made * (1 - made), 0.01) / size)[:, None] * rng.standard_normal(
        (len(made), 400)
    )
    sampled = np.clip(fresh, 0.0, 1.0).T
    figure = Figure(
        value=value,
        low=low,
        high=high,
        reference=float(np.mean(_span(sampled))),
        reference_low=float(np.quantile(_span(sampled), 0.025)),
        reference_high=float(np.quantile(_span(sampled), 0.975)),
        reference_text="as many patients sampled from the synthetic rows",
        unit=unit,
        direction="lower",
        how=f"{len(values)} of {len(counts)} groups are large enough. {how}",
    )
    return NamedFigure(label=label, figure=figure)


def _foretold(expected: np.ndarray, rate: str) -> tuple[np.ndarray, np.ndarray]:
    """(rate, size) of each group by the synthetic counts, brought to as many patients as are held out."""
    parts = [_parts(table, rate)[:2] for table in expected]
    size = np.maximum(np.array([part + rest for part, rest in parts]), 1.0)
    return np.array([part for part, _ in parts]) / size, size


def _span(rates: np.ndarray) -> np.ndarray:
    return np.asarray(rates.max(axis=-1) - rates.min(axis=-1))


def _shrunk(seen: np.ndarray, noise: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """Rates around their mean, each as far as it stands out of its noise: groups that differ by more than sampling
    do so by an unknown size, estimated by moments (Paule and Mandel 1982, J. Res. NBS 87, in one step)."""
    weights = 1 / (noise**2 + sampling**2)
    off = seen - np.average(seen, weights=weights)
    more = max(float(np.average(off**2 - noise**2 - sampling**2, weights=weights)), 0.0)
    prior = sampling**2 + more
    return np.asarray(off * prior / (prior + noise**2))

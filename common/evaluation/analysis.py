"""An analysis to replicate: its terms, its outcome, its fit on the synthetic table, and the question to the sites.

Terms are made by public rule from the synthetic table: numbers standardised (a coefficient is per standard
deviation) and held within the synthetic 0.5 % and 99.5 % quantiles, levels against the commonest one, missing as a
level of its own where it is not rare. Rare levels stay with the commonest: their coefficient would be noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.encoding import Grid
from cohortium.common.estimates import Cox, Estimates, Logistic, norms, side_by_side
from cohortium.common.evaluation.coded import TimeToEvent, number_of_code
from cohortium.common.evaluation.regression import CannotFit, Fit, fit_cox, fit_logistic

RARE = 0.02
HELD_WITHIN = (0.005, 0.995)
CLIP_QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 1.0)
DEPENDENT = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """The design of a regression, in codes.

    tables: per column of the dictionary float64 [fine codes, k_c], k_c = 0 where a column has no term; names and
    units [d]: coefficient × unit is the effect that is reported (per standard deviation, or level against reference).
    """

    tables: tuple[np.ndarray, ...] = field(repr=False)
    names: tuple[str, ...]
    units: np.ndarray


def make_terms(
    grids: Sequence[Grid], codes: np.ndarray, columns: Sequence[int], *, used: np.ndarray | None = None
) -> Terms:
    """Terms of some columns. codes: synthetic rows int32 [rows, columns]; used: bool [rows], those of the analysis.

    Raises CannotFit where no column has a term.
    """
    rows = codes if used is None else codes[used]
    if not len(rows):
        raise CannotFit("no synthetic row can be used")
    tables = [np.zeros((grid.size, 0)) for grid in grids]
    names: list[str] = []
    units: list[float] = []
    kept = np.zeros((0, len(rows)))
    for column in sorted(columns):
        for table, name, unit in _column_terms(grids[column], rows[:, column]):
            values = table[rows[:, column]]
            # What earlier terms already say (a level that marks the same rows as another) is left out.
            residual = values - kept.T @ (kept @ values)
            residual -= kept.T @ (kept @ residual)
            size = float(np.sqrt(residual @ residual))
            if size <= DEPENDENT * np.sqrt(len(rows)):
                continue
            kept = np.vstack([kept, residual / size])
            tables[column] = np.column_stack([tables[column], table])
            names.append(name)
            units.append(unit)
    if not names:
        raise CannotFit("no column varies")
    return Terms(tables=tuple(tables), names=tuple(names), units=np.array(units))


def _column_terms(grid: Grid, codes: np.ndarray) -> list[tuple[np.ndarray, str, float]]:
    """(table [fine codes], name, unit) of one column's terms; each has mean 0 over the rows."""
    counts = np.bincount(codes, minlength=grid.size)
    shares = counts / counts.sum()
    out: list[tuple[np.ndarray, str, float]] = []
    if grid.categorical:
        reference = int(np.argmax(counts))
        marks = [c for c in range(grid.size) if c != reference and shares[c] >= RARE]
        labels = [*(str(level) for level in getattr(grid, "levels", ())), "missing"]
        return [_mark(grid.size, code, shares[code], f"{grid.name}: {labels[code]}") for code in marks]
    number = number_of_code(grid)
    present = ~np.isnan(number)
    weights = counts * present
    if weights.sum() > 0:
        order = np.argsort(np.where(present, number, np.inf), kind="stable")
        cumulated = np.cumsum(weights[order]) / weights.sum()
        low, high = (number[order[int(np.searchsorted(cumulated, q))]] for q in HELD_WITHIN)
        held = np.clip(np.where(present, number, low), low, high)
        mean = float(held @ weights / weights.sum())
        sd = float(np.sqrt((held - mean) ** 2 @ weights / weights.sum()))
        if sd > 0:
            out.append((np.where(present, (held - mean) / sd, 0.0), f"{grid.name} (per SD)", 1.0))
    if RARE <= shares[grid.missing] <= 1 - RARE:
        out.append(_mark(grid.size, grid.missing, shares[grid.missing], f"{grid.name}: missing"))
    return out


def _mark(size: int, code: int, share: float, name: str) -> tuple[np.ndarray, str, float]:
    """An indicator, centred and partly scaled: rare levels are lifted so that the noise, equal in all directions,
    does not drown them; a full scaling would spend the clip on them alone."""
    scale = float((share * (1 - share)) ** 0.25)
    table = np.full(size, -share / scale)
    table[code] += 1 / scale
    return table, name, 1 / scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """key, label; outcome: (column, int32 [fine codes] -> 1, 0, or −1 not used) for a logistic regression, or a time to
    an event (its arms are not looked at) for a Cox regression; terms."""

    key: str
    label: str
    outcome: tuple[int, np.ndarray] | TimeToEvent = field(repr=False)
    terms: Terms

    @property
    def model(self) -> str:
        return "cox" if isinstance(self.outcome, TimeToEvent) else "logistic"

    def used(self, codes: np.ndarray) -> np.ndarray:
        """bool [rows]."""
        return used_rows(self.outcome, codes)

    def fit(self, codes: np.ndarray, weights: np.ndarray | None = None) -> tuple[Fit, Logistic | Cox]:
        """Maximum likelihood on rows that may be looked at, and the score at it. Raises CannotFit.

        beta: float64, the intercept first in a logistic regression.
        """
        used = self.used(codes)
        rows = codes[used]
        w = None if weights is None else np.asarray(weights, dtype=float)[used]
        x = side_by_side(self.terms.tables, rows)
        if isinstance(self.outcome, TimeToEvent):
            time, event = self.outcome.time, self.outcome.event
            fit, baseline = fit_cox(x, time[1][rows[:, time[0]]], event[1][rows[:, event[0]]], w)
            return fit, Cox(
                time=time,
                event=event,
                design=self.terms.tables,
                beta=fit.beta,
                times=baseline.times,
                increments=baseline.increments,
                means=baseline.means,
            )
        column, label = self.outcome
        fit = fit_logistic(np.column_stack([np.ones(len(x)), x]), label[rows[:, column]], w)
        return fit, Logistic(outcome=self.outcome, design=self.terms.tables, beta=fit.beta)

    @property
    def units(self) -> np.ndarray:
        """Per coefficient, the intercept's included."""
        return self.terms.units if self.model == "cox" else np.append(1.0, self.terms.units)

    @property
    def names(self) -> tuple[str, ...]:
        return self.terms.names if self.model == "cox" else ("intercept", *self.terms.names)


def used_rows(outcome: tuple[int, np.ndarray] | TimeToEvent, codes: np.ndarray) -> np.ndarray:
    """Rows whose outcome is known, bool [rows]."""
    if isinstance(outcome, TimeToEvent):
        time, event = outcome.time, outcome.event
        known = ~np.isnan(time[1][codes[:, time[0]]]) & (event[1][codes[:, event[0]]] >= 0)
        return np.asarray(known)
    return np.asarray(outcome[1][codes[:, outcome[0]]] >= 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An analysis fitted on the synthetic table, and the query that asks the sites for its score.

    Per patient, from the synthetic rows: information I [d, d]; slope D [d, d], how the clipped score moves with the
    coefficients; centre b [d], the clipped score's mean; residual [d, d], covariance of clip(v) − R v, what clipping
    loses. clip_share: synthetic rows whose score is clipped.
    """

    analysis: Analysis
    query: Estimates
    fit: Fit
    information: np.ndarray = field(repr=False)
    slope: np.ndarray = field(repr=False)
    centre: np.ndarray = field(repr=False)
    residual: np.ndarray = field(repr=False)
    clip_share: float


def ask_about(analysis: Analysis, codes: np.ndarray, *, noise_multiplier: float, patients: float) -> Question:
    """Fit on the synthetic rows and choose the clip: the one with the least error against the unclipped estimate.

    codes: int32 [rows, columns]; noise_multiplier: noise SD over sensitivity (public, from the plan); patients: about
    how many are held out. Raises CannotFit.

    With v a row's score and R = E[clip(v) vᵀ] E[v vᵀ]⁻¹, the clipped sum moves by D = R I per unit of the
    coefficients: the derivative of any statistic's mean is its covariance with the score. Unclipped, D = I.
    """
    if not (np.isfinite(noise_multiplier) and noise_multiplier >= 0 and patients > 0):
        raise ValueError("noise_multiplier must be finite and not negative, patients above 0")
    fit, model = analysis.fit(codes)
    v = model.vectors(codes)
    information = fit.information / len(codes)
    size = norms(v)
    plain = v.T @ v / len(v)
    best: tuple[float, float, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    for clip in np.unique(np.quantile(size[size > 0], CLIP_QUANTILES)):
        # Just above the largest: equal norms must not fall to rounding.
        clip = float(clip) * (1 + 1e-9)
        parts = _clipping(v, size, clip, plain, information)
        inverse = np.linalg.inv(parts[0])
        spread = (noise_multiplier * clip / patients) ** 2 * np.eye(len(plain)) + parts[2] / patients
        error = float(np.trace(information @ inverse @ spread @ inverse.T))
        # The larger clip wins a tie: without noise nothing is clipped.
        if best is None or error <= best[0] + 1e-12:
            best = (error, clip, parts)
    assert best is not None
    _, clip, (slope, centre, residual) = best
    return Question(
        analysis=analysis,
        query=Estimates(model=model, clip_norm_l2=clip, part="holdout"),
        fit=fit,
        information=information,
        slope=slope,
        centre=centre,
        residual=residual,
        clip_share=float((size > clip).mean()),
    )


def _clipping(
    v: np.ndarray, size: np.ndarray, clip: float, plain: np.ndarray, information: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slope, centre, residual) of `Question` at one clip."""
    if clip >= size.max():
        return information, np.zeros(len(plain)), np.zeros(plain.shape)
    clipped = v * np.minimum(1.0, clip / np.maximum(size, 1e-300))[:, None]
    regression = np.linalg.solve(plain, v.T @ clipped / len(v)).T
    centre = clipped.mean(axis=0)
    rest = clipped - v @ regression.T
    return regression @ information, centre, rest.T @ rest / len(v) - np.outer(centre, centre)

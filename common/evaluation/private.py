"""Private evaluation of columns: distances from noised counts of held-out patients.

The server holds no real record. What it has is, for every column, the noised counts of held-out patients in public
bins, the standard deviation of that noise (public), and the synthetic table's own counts.

A distance taken from noised counts is too large: noise never cancels in a sum of absolute values. So the difference
δ between the held-out and the synthetic shares is inferred instead. Prior: sampling of n patients, variance
q(1−q)/n a cell, plus a misfit of unknown size τ spread over the cells; the law of the noise is known exactly; δ sums
to zero. The posterior mean of the distance (τ weighed on a grid: an empirical-Bayes deconvolution, Efron 2016,
Biometrika 103) is the statistic; worlds like the inferred one, noised anew, give its confidence belt (belts.py).
For the means over columns the sizes τ of all columns inform one another: where a single column drowns, the mean of
many can still be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.evaluation.base import Direction, Figure, NamedFigure
from cohortium.common.evaluation.belts import Interval, belt

HALF_WIDTH_AT_MOST = 0.1
DRAWS = 2000
MEAN_LABEL = "Mean column agreement"
MEAN_KS_LABEL = "Mean agreement of distribution functions"
TAU = np.geomspace(1e-3, 2.5, 20)
"""Sizes of the misfit: a cell's standard deviation in units of 1/cells. The distance is about 0.4 τ."""
TAU_SCALE = 0.1
TAU_SPREAD = 0.6
"""How far the logarithms of the columns' τ lie from their common centre: one in twenty by a factor above 3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateColumns:
    """mean: 1 minus the mean distance (higher is better). columns: each one's distance (lower is better).

    ks: per column the greatest gap of the distribution functions of the values present (lower is better), None for
    categories; ks_mean: 1 minus their mean, None where no column has one.
    """

    mean: NamedFigure
    columns: tuple[NamedFigure, ...]
    patients: float
    ks_mean: NamedFigure | None = None
    ks: tuple[NamedFigure | None, ...] = ()

    def rows(self) -> tuple[NamedFigure, ...]:
        return (self.mean, *self.columns)


def private_columns(
    *,
    names: Sequence[str],
    noised: Sequence[np.ndarray],
    sigma: float,
    synthetic: Sequence[np.ndarray],
    ordered: Sequence[bool] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> PrivateColumns:
    """Column distances and their means, with intervals.

    noised: per column the noised counts of held-out patients, float64 [cells]; every patient counts once per
    column. sigma: standard deviation of the noise of each count; 0 gives the exact distances. synthetic: per
    column the synthetic table's counts in the same cells. ordered: which columns have their cells in order, the
    missing one last, and so a Kolmogorov–Smirnov distance. Raises ValueError for shapes that do not fit, a
    negative or non-finite sigma, or synthetic counts that are all zero.
    """
    ordered = [False] * len(names) if ordered is None else [bool(x) for x in ordered]
    _check(names, noised, sigma, synthetic, ordered)
    patients, patients_sd = patient_number(noised, sigma)
    how = f"From noised counts of held-out patients (noise SD {sigma:.3g} a count), the noise inferred away."
    if patients <= 0 or patients < 2 * patients_sd:
        return _lost(names, ordered, max(patients, 0.0), how)
    worlds = _Worlds.of(noised, sigma, synthetic, ordered, patients)
    single, pooled = worlds.intervals(np.random.default_rng([seed, 6]), draws)
    columns: list[NamedFigure] = []
    gaps: list[NamedFigure | None] = []
    for c, name in enumerate(names):
        reference = sampling_distance(worlds.shares[c], patients)
        columns.append(NamedFigure(label=name, figure=_figure(single["tvd"][c], reference, "lower", how)))
        if ordered[c] and single["ks"][c] is not None:
            reference = sampling_gap(worlds.shares[c], patients, np.random.default_rng([seed, 7, c]))
            gaps.append(NamedFigure(label=name, figure=_figure(single["ks"][c], reference, "lower", how)))
        else:
            gaps.append(None)
    mean_reference = float(np.mean([sampling_distance(q, patients) for q in worlds.shares]))
    ks_mean = None
    if pooled["ks"] is not None:
        gap_reference = float(
            np.mean(
                [
                    sampling_gap(worlds.shares[c], patients, np.random.default_rng([seed, 7, c]))
                    for c, gap in enumerate(gaps)
                    if gap is not None
                ]
            )
        )
        ks_mean = NamedFigure(
            label=MEAN_KS_LABEL,
            figure=_figure(_turned(pooled["ks"]), 1 - gap_reference, "higher", f"1 minus the mean gap. {how}"),
        )
    mean = _figure(_turned(pooled["tvd"]), 1 - mean_reference, "higher", f"1 minus the mean distance. {how}")
    return PrivateColumns(
        mean=NamedFigure(label=MEAN_LABEL, figure=mean),
        columns=tuple(columns),
        patients=patients,
        ks_mean=ks_mean,
        ks=tuple(gaps),
    )


def patient_number(noised: Sequence[np.ndarray], sigma: float) -> tuple[float, float]:
    """The number of held-out patients and its standard error, from the noised counts alone.

    Every column's counts sum to it; columns with few cells carry less noise and weigh more.
    """
    sums = np.array([np.sum(c) for c in noised])
    weights = np.array([1 / len(c) for c in noised])
    return float(np.average(sums, weights=weights)), float(sigma / np.sqrt(weights.sum()))


def inferred_shares(
    noised: Sequence[np.ndarray], sigma: float, synthetic: Sequence[np.ndarray], patients: float
) -> list[np.ndarray]:
    """Posterior mean of the held-out shares per column, float64 [cells] each, summing to one; exact for sigma 0."""
    if sigma == 0:
        return [np.asarray(c, dtype=float) / np.sum(c) for c in noised]
    worlds = _Worlds.of(noised, sigma, synthetic, [False] * len(noised), patients)
    out = []
    for c, q in enumerate(worlds.shares):
        inferred = worlds.inference(c, worlds.cells(worlds.seen[None], c))
        keep = (worlds.own_weights(inferred.log_likelihood) @ inferred.keep)[0]
        shares = np.maximum(q + keep * inferred.seen[0], 0.0)
        out.append(shares / shares.sum())
    return out


def sampling_distance(shares: np.ndarray, patients: float) -> float:
    """Expected distance of a sample of `patients` from its own population: ½ Σ √(2 q(1−q)/(π n))."""
    return float(min(1.0, 0.5 * np.sqrt(2 * shares * (1 - shares) / (np.pi * patients)).sum()))


def sampling_gap(shares: np.ndarray, patients: float, rng: np.random.Generator) -> float:
    """Expected Kolmogorov–Smirnov distance of a sample of `patients` from its own population, missing (last) apart."""
    drawn = rng.multinomial(max(round(patients), 1), shares / shares.sum(), size=400)
    gaps = gap_of(drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1), shares)
    return float(np.mean(gaps))


def gap_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Greatest gap between the distribution functions of the values present, [...]; the last cell is missing.

    first: shares float64 [..., cells]; second: float64 [cells]. 0 where one side has no value at all.
    """
    a, b = np.cumsum(first[..., :-1], axis=-1), np.cumsum(second[:-1])
    if b[-1] <= 0:
        return np.zeros(first.shape[:-1])
    present = a[..., -1:]
    known = present > 1e-9
    return np.asarray(np.where(known[..., 0], np.abs(a / np.where(known, present, 1.0) - b / b[-1]).max(axis=-1), 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worlds:
    """One comparison, the cells of all columns side by side.

    shares: the synthetic ones per column. ends: where each column's cells begin, [columns + 1].
    seen: observed differences of shares [cells]; counts to shares by the number of patients, each column's noise
    levelled so that its shares sum to one.
    """

    shares: list[np.ndarray]
    ordered: list[bool]
    ends: np.ndarray
    q: np.ndarray
    sigma: float
    patients: float
    exact: list[np.ndarray]
    seen: np.ndarray = field(repr=False)

    @classmethod
    def of(
        cls,
        noised: Sequence[np.ndarray],
        sigma: float,
        synthetic: Sequence[np.ndarray],
        ordered: list[bool],
        patients: float,
    ) -> _Worlds:
        shares = [np.asarray(made, dtype=float) / np.sum(made) for made in synthetic]
        ends = np.concatenate([[0], np.cumsum([len(q) for q in shares])])
        q = np.concatenate(shares)
        flat = np.concatenate([np.asarray(c, dtype=float) for c in noised])
        out = cls(
            shares=shares,
            ordered=ordered,
            ends=ends,
            q=q,
            sigma=sigma,
            patients=patients,
            exact=[np.asarray(c, dtype=float) / patients for c in noised],
            seen=np.empty(0),
        )
        object.__setattr__(out, "seen", out.levelled(flat[None], np.array([patients]))[0])
        return out

    def levelled(self, counts: np.ndarray, patients: np.ndarray) -> np.ndarray:
        """Differences of shares [draws, cells] of counts [draws, cells]; each column sums to zero."""
        sizes = np.diff(self.ends)
        excess = np.add.reduceat(counts, self.ends[:-1], axis=1) - patients[:, None]
        return np.asarray((counts - np.repeat(excess / sizes, sizes, axis=1)) / patients[:, None] - self.q)

    def intervals(
        self, rng: np.random.Generator, draws: int
    ) -> tuple[dict[str, list[Interval | None]], dict[str, Interval | None]]:
        """(per column, mean over columns), each for "tvd" and "ks"."""
        if self.sigma == 0:
            return self._without_noise()
        columns = range(len(self.shares))
        at_hand = [self.inference(c, self.cells(self.seen[None], c)) for c in columns]
        own = np.stack([self.own_weights(i.log_likelihood)[0] for i in at_hand])
        together = _together(np.stack([i.log_likelihood for i in at_hand], axis=1))[0]

        # Columns by themselves: every τ alike up to the largest that the column leaves possible.
        open_ = np.flip(np.maximum.accumulate(np.flip(own, axis=1), axis=1), axis=1) > 1e-4 * own.max(axis=1)[:, None]
        truth, noisy = self._simulated(rng, draws, open_ / open_.sum(axis=1, keepdims=True), common=False)
        single: dict[str, list[Interval | None]] = {"tvd": [], "ks": []}
        for c in columns:
            inferred = self.inference(c, self.cells(noisy, c))
            weights = self.own_weights(inferred.log_likelihood)
            true_cells = self.cells(truth, c)
            single["tvd"].append(
                belt(
                    0.5 * np.abs(true_cells).sum(axis=1),
                    (weights * inferred.distance).sum(axis=1),
                    float((own[c] * at_hand[c].distance[0]).sum()),
                )
            )
            single["ks"].append(
                belt(
                    gap_of(self.shares[c] + true_cells, self.shares[c]),
                    self._gap(c, inferred, weights),
                    float(self._gap(c, at_hand[c], own[c][None])[0]),
                )
                if self.ordered[c]
                else None
            )

        # All columns together: one factor stretches every column's misfit.
        truth, noisy = self._simulated(rng, draws, together, common=True)
        inferred_all = [self.inference(c, self.cells(noisy, c)) for c in columns]
        weights_all = _together(np.stack([i.log_likelihood for i in inferred_all], axis=1))
        pooled: dict[str, Interval | None] = {
            "tvd": belt(
                0.5 * np.abs(truth).sum(axis=1) / len(self.shares),
                np.mean([(weights_all[:, c] * inferred_all[c].distance).sum(axis=1) for c in columns], axis=0),
                float(np.mean([(together[c] * at_hand[c].distance[0]).sum() for c in columns])),
            ),
            "ks": None,
        }
        chosen = [c for c in columns if self.ordered[c]]
        if chosen:
            pooled["ks"] = belt(
                np.mean([gap_of(self.shares[c] + self.cells(truth, c), self.shares[c]) for c in chosen], axis=0),
                np.mean([self._gap(c, inferred_all[c], weights_all[:, c]) for c in chosen], axis=0),
                float(np.mean([self._gap(c, at_hand[c], together[c][None])[0] for c in chosen])),
            )
        return single, pooled

    def _without_noise(self) -> tuple[dict[str, list[Interval | None]], dict[str, Interval | None]]:
        tvd = [0.5 * float(np.abs(p - q).sum()) for p, q in zip(self.exact, self.shares, strict=True)]
        ks = [
            float(gap_of(p, q)) if ordered else None
            for p, q, ordered in zip(self.exact, self.shares, self.ordered, strict=True)
        ]
        gaps = [k for k in ks if k is not None]
        return (
            {"tvd": [_point(v) for v in tvd], "ks": [None if k is None else _point(k) for k in ks]},
            {"tvd": _point(float(np.mean(tvd))), "ks": _point(float(np.mean(gaps))) if gaps else None},
        )

    def cells(self, values: np.ndarray, column: int) -> np.ndarray:
        return values[:, self.ends[column] : self.ends[column + 1]]

    def _variances(self, column: int) -> tuple[np.ndarray, np.ndarray, float]:
        """(sampling [cells], misfit for τ = 1 [cells], noise of a levelled share)."""
        q = self.shares[column]
        k = len(q)
        sampling = (q * (1 - q) + 1 / (4 * self.patients)) / self.patients
        misfit = (q + 1 / k) / np.mean(q + 1 / k) / k**2
        return sampling, misfit, (self.sigma / self.patients) ** 2 * max(1 - 1 / k, 0.25)

    def inference(self, column: int, seen: np.ndarray) -> _Inference:
        sampling, misfit, noise = self._variances(column)
        prior = sampling + TAU[:, None] ** 2 * misfit
        total = prior + noise
        keep = prior / total
        squares = seen**2
        likelihood = -0.5 * (squares @ (1 / total).T + np.log(total).sum(axis=1))
        distance = np.empty_like(likelihood)
        for g in range(len(TAU)):
            # E|N(m, v)| is √(m² + 2v/π · exp(−0.56 m²/v)) to half a percent, without an error function for each cell.
            left = np.maximum(keep[g] * noise, 1e-300)
            middle = keep[g] ** 2 * squares
            distance[:, g] = 0.5 * np.sqrt(middle + (2 / np.pi) * left * np.exp(-0.56 * middle / left)).sum(axis=1)
        return _Inference(log_likelihood=likelihood, distance=np.minimum(distance, 1.0), keep=keep, seen=seen)

    @staticmethod
    def own_weights(log_likelihood: np.ndarray) -> np.ndarray:
        """Posterior of τ [draws, grid]: half-Cauchy prior; the grid is logarithmic, hence one more factor τ."""
        return _normalised(log_likelihood + _LOG_PRIOR)

    def _gap(self, column: int, inferred: _Inference, weights: np.ndarray) -> np.ndarray:
        """Kolmogorov–Smirnov distance at the posterior mean of the shares, [draws]."""
        delta = (weights @ inferred.keep) * inferred.seen
        return gap_of(np.maximum(self.shares[column] + delta, 0.0), self.shares[column])

    def _simulated(
        self, rng: np.random.Generator, draws: int, weights: np.ndarray, *, common: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(true differences of shares, the same as the mechanism would show them), both [draws, cells].

        weights [columns, grid]: from which each column's τ is drawn; common: then one factor a world stretches all.
        """
        stretch = np.exp(rng.uniform(-1.6, 1.6, size=(draws, 1))) if common else np.ones((draws, 1))
        # A held-out sample may lie closer than expected; that of many columns together hardly.
        luck = np.sqrt(rng.uniform(0.7, 1.3, size=(draws, 1)) if common else rng.uniform(0.2, 1.0, size=(draws, 1)))
        sparse = rng.random((draws, 1)) < 0.5
        truth = np.empty((draws, len(self.q)))
        for c, q in enumerate(self.shares):
            tau = TAU[rng.choice(len(TAU), size=draws, p=weights[c])][:, None] * stretch
            if not common:
                tau = tau * np.exp(rng.uniform(-0.5, 0.5, size=(draws, 1)))
            sampling, misfit, _ = self._variances(c)
            normals = rng.standard_normal((draws, len(q)))
            # In some worlds the misfit is spread over all cells, in others few cells have most of it.
            spread = np.where(sparse, np.sign(normals) * normals**2 / np.sqrt(3), normals)
            wrong = tau * np.sqrt(misfit) * spread
            drawn = q + np.sqrt(sampling) * luck * rng.standard_normal((draws, len(q))) + wrong
            drawn = np.maximum(drawn - (drawn - q).mean(axis=1, keepdims=True), 0.0)
            self.cells(truth, c)[...] = drawn / drawn.sum(axis=1, keepdims=True) - q
        noised = self.patients * (self.q + truth) + self.sigma * rng.standard_normal(truth.shape)
        sizes = np.diff(self.ends)
        sums = np.add.reduceat(noised, self.ends[:-1], axis=1)
        patients = np.maximum((sums / sizes).sum(axis=1) / (1 / sizes).sum(), self.patients / 4)
        return truth, self.levelled(noised, patients)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inference:
    """log_likelihood, distance (posterior mean for each τ): [draws, grid]; keep: [grid, cells]; seen [draws, cells]."""

    log_likelihood: np.ndarray
    distance: np.ndarray
    keep: np.ndarray
    seen: np.ndarray


_LOG_PRIOR = np.log(TAU) - np.log1p((TAU / TAU_SCALE) ** 2)


def _normalised(logs: np.ndarray) -> np.ndarray:
    weights = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _together(log_likelihood: np.ndarray) -> np.ndarray:
    """Posterior of every column's τ where all share a common centre: [draws, columns, grid], from the same shape."""
    log_tau = np.log(TAU)
    around = _normalised(-0.5 * ((log_tau[:, None] - log_tau) / TAU_SPREAD) ** 2)  # [centre, grid]
    top = log_likelihood.max(axis=-1, keepdims=True)
    likelihood = np.exp(log_likelihood - top)
    of_centre = likelihood @ around.T  # [draws, columns, centre]
    centre = _normalised(np.log(np.maximum(of_centre, 1e-300)).sum(axis=1) + _LOG_PRIOR)
    mixed = (centre[:, None, :] / np.maximum(of_centre, 1e-300)) @ around
    return np.asarray(mixed * likelihood)


def _point(value: float) -> Interval:
    return Interval(low=value, middle=value, high=value)


def _turned(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    statistic = None if interval.statistic is None else 1 - interval.statistic
    return Interval(low=1 - interval.high, middle=1 - interval.middle, high=1 - interval.low, statistic=statistic)


def _check(
    names: Sequence[str],
    noised: Sequence[np.ndarray],
    sigma: float,
    synthetic: Sequence[np.ndarray],
    ordered: Sequence[bool],
) -> None:
    if not (len(names) == len(noised) == len(synthetic) == len(ordered)):
        raise ValueError("names, noised, synthetic and ordered must have one entry per column each")
    if not names:
        raise ValueError("there is no column to evaluate")
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and not negative, not {sigma!r}")
    for name, a, b in zip(names, noised, synthetic):
        if np.shape(a) != np.shape(b) or np.ndim(a) != 1 or not np.all(np.isfinite(a)):
            raise ValueError(f"the counts of column {name!r} do not fit: {np.shape(a)} against {np.shape(b)}")
        if np.sum(b) <= 0:
            raise ValueError(f"the synthetic counts of column {name!r} are all zero")


def _lost(names: Sequence[str], ordered: Sequence[bool], patients: float, how: str) -> PrivateColumns:
    def lost(label: str, direction: Direction) -> NamedFigure:
        reason = "the noise is larger than the number of held-out patients"
        return NamedFigure(
            label=label, figure=Figure.unknown(reason, unit="share of rows", direction=direction, how=how)
        )

    return PrivateColumns(
        mean=lost(MEAN_LABEL, "higher"),
        columns=tuple(lost(n, "lower") for n in names),
        patients=patients,
        ks_mean=lost(MEAN_KS_LABEL, "higher") if any(ordered) else None,
        ks=tuple(lost(n, "lower") if o else None for n, o in zip(names, ordered, strict=True)),
    )


def _figure(interval: Interval | None, reference: float, direction: Direction, how: str) -> Figure:
    assert interval is not None
    low, value, high = (float(np.clip(v, 0.0, 1.0)) for v in (interval.low, interval.value, interval.high))
    if (high - low) / 2 > HALF_WIDTH_AT_MOST:
        return Figure.unknown(
            f"the noise leaves it anywhere between {low:.2f} and {high:.2f}",
            unit="share of rows",
            direction=direction,
            how=how,
        )
    return Figure(
        value=value,
        low=low,
        high=high,
        reference=reference,
        reference_text="a fresh real sample of as many patients",
        unit="share of rows",
        direction=direction,
        how=how,
    )

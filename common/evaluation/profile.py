"""Means, standard deviations and missing shares of held-out patients, beside the synthetic ones.

The sites answer with one vector of sums (`Sums`): per number its standardised value z and a weight times z² − 1, both
by the SYNTHETIC mean and standard deviation and both 0 where the value is missing; how many values are present is
known from the noised one-way counts. A synthetic table that is right has sums near 0, whatever its columns.
A mean is linear in the sums, so its noise is Gaussian and known. SMD is the standardised mean difference with the
pooled standard deviation (Austin 2009, Stat. Med. 28, eq. 1); its mean absolute value over columns is biased upward
by noise and therefore inferred (sizes.py). Equivalence: two one-sided tests (equivalence.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import TWO_SIDED, Interval, linear_figure
from cohortium.common.evaluation.equivalence import Equivalence, tost_means
from cohortium.common.evaluation.sizes import mean_size

SECOND_WEIGHT = 0.35
"""Of z² − 1: its spread is larger than that of z, and means matter more than standard deviations."""
CLIP_QUANTILE = 0.99
WINSORISE = 0.01
MARGIN = 0.2
"""Standardised mean differences below it count as equivalent (Cohen's "small")."""
SMD_HALF_WIDTH_AT_MOST = 0.5
SHARE_HALF_WIDTH_AT_MOST = 0.1
PRESENT_AT_LEAST = 0.02
MEAN_LABEL = "Mean absolute standardised difference of means"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileFeatures:
    """What to ask by `Sums`, and how to read the answer.

    columns: the dictionary's columns that are numbers; features: per column of the dictionary float64 [codes, 2], or
    [codes, 0] for other columns; clip_norm_l2: the bound; clip_share: share of synthetic rows that it shortens.
    centres, scales: synthetic mean and SD per number; limits: values beyond them count as these (winsorised).
    """

    columns: tuple[int, ...]
    features: tuple[np.ndarray, ...] = field(repr=False)
    clip_norm_l2: float
    clip_share: float
    centres: tuple[float, ...]
    scales: tuple[float, ...]
    limits: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberProfile:
    """One number: held-out mean and SD in its unit, and how far they are from the synthetic ones."""

    name: str
    mean: Figure
    sd: Figure
    smd: Figure
    synthetic_mean: float
    synthetic_sd: float
    equivalence: Equivalence


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """numbers: per number; smd: mean |SMD| (lower is better); equivalent: how many means are shown equivalent."""

    numbers: tuple[NumberProfile, ...]
    smd: NamedFigure
    equivalent: int
    clip_share: float


def profile_features(
    values: Sequence[np.ndarray],
    codes: np.ndarray,
    *,
    clip_quantile: float = CLIP_QUANTILE,
    winsorise: float = WINSORISE,
) -> ProfileFeatures:
    """Features from the synthetic rows `codes` (fine codes, int [rows, columns]).

    values: per column the number of each fine code, float64 [codes], NaN for missing and throughout for categories
    (`bins.values_of`). winsorise: share of synthetic values cut at each end; 0 cuts none. clip_quantile: share of
    synthetic rows that the bound leaves whole; 1 leaves every possible row whole. Raises ValueError without a number.
    """
    columns, centres, scales, limits = [], [], [], []
    features = [np.zeros((len(v), 0)) for v in values]
    norms = np.zeros(len(codes))
    most = 0.0
    for c, value in enumerate(values):
        x = value[codes[:, c]]
        x = x[~np.isnan(x)]
        if len(x) < 2 or x.min() == x.max():
            continue
        low, high = np.quantile(x, [winsorise, 1 - winsorise], method="nearest") if winsorise else (-np.inf, np.inf)
        if low == high:
            low, high = x.min(), x.max()
        x, value = np.clip(x, low, high), np.clip(value, low, high)
        centre, scale = float(x.mean()), float(x.std())
        z = (value - centre) / scale
        table = np.nan_to_num(np.stack([z, SECOND_WEIGHT * (z**2 - 1)], axis=1))
        features[c] = table
        columns.append(c)
        centres.append(centre)
        scales.append(scale)
        limits.append((float(low), float(high)))
        norms += (table**2).sum(axis=1)[codes[:, c]]
        most += float((table**2).sum(axis=1).max())
    if not columns:
        raise ValueError("no column is a number with a spread: there is nothing to sum")
    clip = float(np.sqrt(np.quantile(norms, clip_quantile) if clip_quantile < 1 else most)) * (1 + 1e-9)
    return ProfileFeatures(
        columns=tuple(columns),
        features=tuple(features),
        clip_norm_l2=clip,
        clip_share=float(np.mean(np.sqrt(norms) > clip)),
        centres=tuple(centres),
        scales=tuple(scales),
        limits=tuple(limits),
    )


def profile(
    *,
    names: Sequence[str],
    asked: ProfileFeatures,
    sums: np.ndarray,
    sigma: float,
    missing: Sequence[float],
    patients: float,
    synthetic: Sequence[tuple[float, float, int]],
    seed: int = 0,
) -> Profile:
    """Figures from the answer to `asked`.

    names: of asked.columns; sums: float64 [2 · numbers], the answer; sigma: its noise. missing: inferred share of
    held-out patients without a value, per number (exact without noise); patients: how many there are, inferred.
    synthetic: (mean, SD with n − 1, values present) of the synthetic column, winsorised alike. Raises ValueError.
    """
    p = len(asked.columns)
    if not (len(names) == len(missing) == len(synthetic) == p) or np.shape(sums) != (2 * p,):
        raise ValueError(f"{p} numbers need a name, a missing share, synthetic moments and two sums each")
    if not (np.isfinite(sums).all() and np.isfinite(sigma) and sigma >= 0 and patients > 0):
        raise ValueError("sums and sigma are finite, and the number of patients is above 0")
    first, second = np.asarray(sums, dtype=float).reshape(p, 2).T
    present = patients * (1 - np.clip(np.asarray(missing, dtype=float), 0.0, 1.0))
    known = present > max(PRESENT_AT_LEAST * patients, 1.0) if sigma > 0 else present > 1 + 1e-9
    present = np.where(known, present, 1.0)
    z_mean, noise = first / present, sigma / present
    z_square = 1 + second / SECOND_WEIGHT / present
    variance, variance_noise = z_square - z_mean**2, np.hypot(noise / SECOND_WEIGHT, 2 * z_mean * noise)
    scales, centres = np.array(asked.scales), np.array(asked.centres)
    made = np.array([(m, s) for m, s, _ in synthetic], dtype=float).reshape(p, 2)
    # The SD in the denominator of an SMD: the held-out one as far as it is known, else the synthetic one.
    z_made = (made[:, 1] / scales) ** 2
    bessel = np.where(present > 1, present / np.maximum(present - 1, 1e-9), 1.0)
    trust = 0.25 / (0.25 + variance_noise**2)
    pooled = np.sqrt((z_made + np.maximum(z_made + trust * (variance * bessel - z_made), 0.05 * z_made)) / 2)
    if sigma == 0:
        pooled = np.sqrt((z_made + variance * bessel) / 2)
    known &= pooled > 0
    pooled = np.where(pooled > 0, pooled, 1.0)
    smd = (z_mean - (made[:, 0] - centres) / scales) / pooled
    how = f"From clipped sums over held-out patients (noise SD {sigma:.3g}); values beyond the limits winsorised."
    numbers = tuple(
        _number(
            names[i],
            synthetic[i],
            scales[i],
            centres[i] + scales[i] * z_mean[i],
            noise[i],
            variance[i] * bessel[i],
            variance_noise[i],
            noise[i] / SECOND_WEIGHT,
            smd[i],
            pooled[i],
            present[i],
            how,
        )
        if known[i]
        else _unknown_number(names[i], synthetic[i], how)
        for i in range(p)
    )
    keep = np.flatnonzero(known)
    return Profile(
        numbers=numbers,
        smd=NamedFigure(
            label=MEAN_LABEL,
            figure=_mean_smd(smd[keep], noise[keep] / pooled[keep], np.sqrt(1 / present[keep]), sigma, seed, how),
        ),
        equivalent=sum(n.equivalence.equivalent for n in numbers),
        clip_share=asked.clip_share,
    )


def missing_share(count: float, sigma: float, patients: float, patients_sd: float, synthetic: float) -> Figure:
    """Share of held-out patients without a value, from the noised count of the missing bin."""
    share = count / patients
    return linear_figure(
        share,
        float(np.hypot(sigma, min(max(share, 0.0), 1.0) * patients_sd)) / patients,
        low=0.0,
        high=1.0,
        at_most=SHARE_HALF_WIDTH_AT_MOST,
        reference=synthetic,
        reference_text="the synthetic table",
        unit="share of patients",
        how=f"Noised count of missing values (noise SD {sigma:.3g}).",
    )


def _number(
    name: str,
    synthetic: tuple[float, float, int],
    scale: float,
    mean: float,
    noise: float,
    variance: float,
    variance_noise: float,
    second_noise: float,
    smd: float,
    pooled: float,
    present: float,
    how: str,
) -> NumberProfile:
    made_mean, made_sd, made_rows = synthetic
    half = SMD_HALF_WIDTH_AT_MOST
    text = "the synthetic table"
    low, high = (np.sqrt(max(variance + side * TWO_SIDED * variance_noise, 0.0)) * scale for side in (-1, 1))
    sd = float(np.sqrt(max(variance, 0.0)) * scale)
    # Decided by the noise alone: a rule on the interval would keep the lucky ones.
    if TWO_SIDED * second_noise / 2 > half:
        sd_figure = Figure.unknown(f"the noise leaves it anywhere between {low:.3g} and {high:.3g}", how=how)
    else:
        sd_figure = Figure(value=sd, low=float(low), high=float(high), reference=made_sd, reference_text=text, how=how)
    return NumberProfile(
        name=name,
        mean=linear_figure(
            float(mean), float(noise * scale), at_most=half * scale, reference=made_mean, reference_text=text, how=how
        ),
        sd=sd_figure,
        smd=linear_figure(
            float(smd),
            float(noise / pooled),
            at_most=half,
            reference=0.0,
            reference_text="the same mean",
            unit="standard deviations",
            how=how,
        ),
        synthetic_mean=made_mean,
        synthetic_sd=made_sd,
        equivalence=tost_means(
            name,
            means=(float(mean), made_mean),
            variances=(max(float(variance), 0.0) * scale**2, made_sd**2),
            rows=(float(present), made_rows),
            margin=MARGIN * float(pooled) * scale,
            noise=float(noise * scale),
        ),
    )


def _unknown_number(name: str, synthetic: tuple[float, float, int], how: str) -> NumberProfile:
    lost = Figure.unknown("hardly any held-out patient has a value", how=how)
    return NumberProfile(
        name=name,
        mean=lost,
        sd=lost,
        smd=lost,
        synthetic_mean=synthetic[0],
        synthetic_sd=synthetic[1],
        equivalence=Equivalence(label=name, difference=0.0, standard_error=0.0, margin=MARGIN, p=1.0),
    )


def _mean_smd(smd: np.ndarray, noise: np.ndarray, sampling: np.ndarray, sigma: float, seed: int, how: str) -> Figure:
    unit = "standard deviations"
    if not len(smd):
        return Figure.unknown("no number has enough values", unit=unit, direction="lower", how=how)
    if sigma == 0:
        exact = float(np.abs(smd).mean())
        found = Interval(low=exact, middle=exact, high=exact)
    else:
        found, _ = mean_size(smd, noise, sampling, np.random.default_rng([seed, 9]))
    if found.high - found.low > 0.4:
        reason = f"the noise leaves it anywhere between {found.low:.2f} and {found.high:.2f}"
        return Figure.unknown(reason, unit=unit, direction="lower", how=how)
    return Figure(
        value=found.value,
        low=found.low,
        high=found.high,
        reference=float(np.sqrt(2 / np.pi) * sampling.mean()),
        reference_text="a fresh real sample of as many patients",
        unit=unit,
        direction="lower",
        how=how,
    )

"""Means, SDs, SMD and equivalence from noised sums: exact without noise, covered with it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cohortium.common.evaluation.equivalence import tost_means
from cohortium.common.evaluation.profile import Profile, ProfileFeatures, missing_share, profile, profile_features

CODES, NUMBERS = 61, 12
VALUES = [np.append(np.linspace(c, 3.0 * c + 7, CODES - 1), np.nan) for c in range(NUMBERS)] + [np.full(4, np.nan)]


def rows(rng: np.random.Generator, n: int, shift: float) -> np.ndarray:
    codes = np.clip(np.rint(30 + 9 * (rng.standard_normal((n, NUMBERS + 1)) + shift)), 0, CODES - 2).astype(np.int32)
    codes[rng.random(codes.shape) < 0.15] = CODES - 1
    codes[:, -1] = rng.integers(0, 4, n)
    return codes


def read(asked: ProfileFeatures, held: np.ndarray, made: np.ndarray, noise: np.ndarray, sigma: float) -> Profile:
    vectors = np.concatenate([asked.features[c][held[:, c]] for c in asked.columns], axis=1)
    synthetic = []
    for c, limits in zip(asked.columns, asked.limits, strict=True):
        x = VALUES[c][made[:, c]]
        x = np.clip(x[~np.isnan(x)], *limits)
        synthetic.append((float(x.mean()), float(x.std(ddof=1)), len(x)))
    return profile(
        names=[f"c{c}" for c in asked.columns],
        asked=asked,
        sums=vectors.sum(axis=0) + noise,
        sigma=sigma,
        missing=[float(np.mean(held[:, c] == CODES - 1)) for c in asked.columns],
        patients=len(held),
        synthetic=synthetic,
    )


@pytest.fixture(scope="module")
def tables() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rows(rng, 1200, 0.1), rows(rng, 5000, 0.0)


def test_without_noise_it_is_pandas_on_the_values(tables: tuple[np.ndarray, np.ndarray]) -> None:
    held, made = tables
    asked = profile_features(VALUES, made, winsorise=0.0, clip_quantile=1.0)
    assert asked.columns == tuple(range(NUMBERS)) and asked.clip_share == 0.0
    got = read(asked, held, made, np.zeros(2 * NUMBERS), 0.0)
    sizes = []
    for c, number in enumerate(got.numbers):
        real, synthetic = (pd.Series(VALUES[c][t[:, c]]) for t in (held, made))
        assert number.mean.value == pytest.approx(real.mean(), abs=1e-9)
        assert number.sd.value == pytest.approx(real.std(), abs=1e-9)
        smd = (real.mean() - synthetic.mean()) / np.sqrt((real.var() + synthetic.var()) / 2)
        assert number.smd.value == pytest.approx(smd, abs=1e-9)
        sizes.append(abs(smd))
    assert got.smd.figure.value == pytest.approx(np.mean(sizes), abs=1e-9)


def test_without_noise_equivalence_is_that_of_statsmodels(tables: tuple[np.ndarray, np.ndarray]) -> None:
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    real, made = (VALUES[3][t[:, 3]] for t in tables)
    real, made = real[~np.isnan(real)], made[~np.isnan(made)]
    for margin in (0.2, 1.0, 3.0):
        wanted = weightstats.ttost_ind(real, made, -margin, margin, usevar="unequal")[0]
        got = tost_means(
            "x", means=(real.mean(), made.mean()), variances=(real.var(ddof=1), made.var(ddof=1)),
            rows=(len(real), len(made)), margin=margin,
        )  # fmt: skip
        assert got.p == pytest.approx(wanted, abs=1e-9)
        assert got.equivalent == (wanted < 0.05)


def test_with_noise_figures_are_covered(tables: tuple[np.ndarray, np.ndarray]) -> None:
    """50 runs on the same patients, 12 numbers each: 600 intervals of each kind at 95 % (± 3 points: 1 in 1000).

    Planted: the noise of a sum told as half, or z² − 1 read without its weight: red.
    """
    held, made = tables
    asked = profile_features(VALUES, made, clip_quantile=1.0)
    exact = read(asked, held, made, np.zeros(2 * NUMBERS), 0.0)
    rng = np.random.default_rng(1)
    found: dict[str, list[bool]] = {"mean": [], "sd": [], "smd": []}
    means = []
    for _ in range(50):
        got = read(asked, held, made, 60.0 * rng.standard_normal(2 * NUMBERS), 60.0)
        for a, b in zip(got.numbers, exact.numbers, strict=True):
            for name, hits in found.items():
                mine, right = getattr(a, name), getattr(b, name)
                hits.append(mine.low <= right.value <= mine.high)
        means.append(got.smd.figure.low <= exact.smd.figure.value <= got.smd.figure.high)
    for name, hits in found.items():
        assert 0.92 < np.mean(hits) < 0.98, name
    assert sum(means) >= 43


def test_noise_that_swamps_and_columns_without_values_are_said(tables: tuple[np.ndarray, np.ndarray]) -> None:
    held, made = tables
    asked = profile_features(VALUES, made)
    got = read(asked, held, made, np.zeros(2 * NUMBERS), 5000.0)
    assert all(n.mean.value is None and n.smd.value is None and n.sd.value is None for n in got.numbers)
    empty = held.copy()
    empty[:, 0] = CODES - 1
    got = read(asked, empty, made, np.zeros(2 * NUMBERS), 0.0)
    assert got.numbers[0].mean.value is None and not got.numbers[0].equivalence.equivalent
    assert got.numbers[1].mean.value is not None
    with pytest.raises(ValueError):
        profile_features([np.full(4, np.nan)], np.zeros((3, 1), dtype=int))


def test_winsorised_features_are_bounded_and_the_clip_shortens_a_stated_share(
    tables: tuple[np.ndarray, np.ndarray],
) -> None:
    asked = profile_features(VALUES, tables[1])
    assert max(np.abs(asked.features[c][:, 0]).max() for c in asked.columns) < 3.2
    assert 0.005 < asked.clip_share <= 0.0101
    assert asked.features[NUMBERS].shape == (4, 0)
    assert all((asked.features[c][CODES - 1] == 0).all() for c in asked.columns)


def test_a_missing_share_is_linear_and_covered() -> None:
    rng = np.random.default_rng(2)
    hits = []
    for e in rng.standard_normal(1000):
        figure = missing_share(120 + 20 * e, 20.0, 1000, 0.0, 0.1)
        hits.append(figure.low <= 0.12 <= figure.high)
    assert 0.93 < np.mean(hits) < 0.97
    assert missing_share(120, 0.0, 1000, 0.0, 0.1).value == pytest.approx(0.12)
    assert missing_share(120, 400.0, 1000, 0.0, 0.1).value is None

"""Grouped curves and tests equal lifelines on the pooled rows; counts below zero are mended without adding patients."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.evaluation.risk_sets import (
    at_risk,
    chi_square,
    greenwood,
    kaplan_meier,
    log_rank,
    restricted_mean,
    to_simplex,
)

ENDS = np.array([2.0, 5.0, 9.0, 14.0])
PLACES = np.array([1.0, 4.0, 6.5, 12.0])


def rows(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(interval or 4 past the end, event, arm, weight) with ties in every interval."""
    rng = np.random.default_rng(seed)
    arm = rng.integers(0, 3, n)
    return rng.choice(5, n, p=[0.2, 0.2, 0.2, 0.1, 0.3]), rng.integers(0, 2, n), arm, rng.choice([0.5, 1.0], n)


def cells_of(interval: np.ndarray, event: np.ndarray, arm: np.ndarray, weight: np.ndarray) -> np.ndarray:
    cell = np.where(interval == 4, 8, 2 * interval + 1 - event)
    return np.bincount(arm * 9 + cell, weights=weight, minlength=27).reshape(3, 9)


@pytest.mark.parametrize("seed", [0, 1])
def test_curve_band_and_mean_equal_lifelines(seed: int) -> None:
    """Each interval's rows stand at its place, those past the end at 20. Planted: d/(n−c) as the hazard: red."""
    lifelines = pytest.importorskip("lifelines")
    from lifelines.utils import restricted_mean_survival_time

    interval, event, arm, weight = rows(seed)
    cells = cells_of(interval, event, arm, weight)
    time = np.append(PLACES, 20.0)[interval]
    died = np.where(interval == 4, 0, event)
    for a in range(3):
        mine = arm == a
        fitted = lifelines.KaplanMeierFitter().fit(time[mine], died[mine], weights=weight[mine])
        assert kaplan_meier(cells[a]) == pytest.approx(fitted.predict(ENDS).to_numpy(), abs=1e-9)
        mean = restricted_mean_survival_time(fitted, t=14.0)
        assert float(restricted_mean(kaplan_meier(cells[a]), PLACES, 14.0)) == pytest.approx(mean, abs=1e-9)
        assert at_risk(cells[a])[1][0] == pytest.approx(weight[mine].sum())
    whole = lifelines.KaplanMeierFitter().fit(time, died)
    low, high = greenwood(cells_of(interval, event, np.zeros_like(arm), np.ones(len(arm)))[0])
    band = whole.confidence_interval_.loc[PLACES].to_numpy()
    assert low == pytest.approx(band[:, 0], abs=1e-9)
    assert high == pytest.approx(band[:, 1], abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_rank_equals_lifelines(seed: int) -> None:
    """Planted: n in place of n − 1 in the variance turns it red."""
    statistics = pytest.importorskip("lifelines.statistics")
    interval, event, arm, _ = rows(seed)
    u, v = log_rank(cells_of(interval, event, arm, np.ones(len(arm))))
    died = np.where(interval == 4, 0, event)
    theirs = statistics.multivariate_logrank_test(np.append(PLACES, 20.0)[interval], arm, died)
    assert float(chi_square(u, v)) == pytest.approx(theirs.test_statistic, abs=1e-9)
    assert u.sum() == pytest.approx(0, abs=1e-9)


def test_mended_counts_are_the_nearest_that_keep_the_sum() -> None:
    """Against brute force; planted: clipping at zero adds patients and turns it red."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        raw = rng.normal(1.0, 2.0, 5)
        if raw.sum() <= 0:
            continue
        got = to_simplex(raw)
        assert got.min() >= 0
        assert got.sum() == pytest.approx(raw.sum())
        shifts = np.linspace(-10, 10, 200_001)
        best = shifts[np.argmin(np.abs(np.maximum(raw - shifts[:, None], 0).sum(axis=1) - raw.sum()))]
        assert got == pytest.approx(np.maximum(raw - best, 0), abs=2e-4)
    good = np.array([[0.0, 3.25, 1e-9], [2.0, 1.0, 7.0]])
    assert np.array_equal(to_simplex(good), good)


def test_nobody_at_risk_and_everybody_dead_are_curves_too() -> None:
    assert kaplan_meier(np.zeros(5)).tolist() == [1.0, 1.0]
    assert kaplan_meier(np.array([4.0, 0, 0, 0, 0])).tolist() == [0.0, 0.0]
    assert np.isfinite(greenwood(np.array([4.0, 0, 0, 0, 0]))[0]).all()

"""Figures of a score equal scikit-learn's and statsmodels', with weights and ties, to 1e-9."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from cohortium.common.evaluation import score_statistics as stats


def scored(seed: int, *, n: int = 700, cells: int = 25) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cell, outcome, weight) of each row; weights as of patients with 1 to 3 rows."""
    rng = np.random.default_rng([seed, 7])
    x = rng.standard_normal(n)
    hit = rng.random(n) < 1 / (1 + np.exp(1 - 1.5 * x))
    cell = np.searchsorted(np.linspace(-2, 2, cells - 1), x)
    return cell, hit, 1.0 / rng.integers(1, 4, n)


def counts(cell: np.ndarray, hit: np.ndarray, weight: np.ndarray, cells: int = 25) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.bincount(cell, weight * hit, minlength=cells)[None],
        np.bincount(cell, weight * ~hit, minlength=cells)[None],
    )


@pytest.mark.parametrize("seed", range(4))
def test_areas_and_brier_are_scikit_learns(seed: int) -> None:
    """Red with ties counted whole or not at all, or with precision before the cell."""
    cell, hit, weight = scored(seed)
    positive, negative = counts(cell, hit, weight)
    chance = np.linspace(0.02, 0.9, 25)
    assert stats.auc(positive, negative)[0] == pytest.approx(
        metrics.roc_auc_score(hit, cell, sample_weight=weight), abs=1e-12
    )
    assert stats.average_precision(positive, negative)[0] == pytest.approx(
        metrics.average_precision_score(hit, cell, sample_weight=weight), abs=1e-12
    )
    assert stats.brier(positive, negative, chance)[0] == pytest.approx(
        metrics.brier_score_loss(hit, chance[cell], sample_weight=weight), abs=1e-12
    )
    expected = (weight * hit).sum() / (weight * chance[cell]).sum()
    assert stats.observed_over_expected(positive, negative, chance)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("first", [1, 9, 20])
def test_figures_at_a_threshold_are_scikit_learns(first: int) -> None:
    cell, hit, weight = scored(11)
    called = cell >= first
    got = {k: v[0] for k, v in stats.confusion(*counts(cell, hit, weight), first).items()}
    one = {"sample_weight": weight}
    sensitivity = metrics.recall_score(hit, called, **one)
    specificity = metrics.recall_score(~hit, ~called, **one)
    assert set(got) == set(stats.CONFUSION)
    assert got == pytest.approx(
        {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "balanced_accuracy": metrics.balanced_accuracy_score(hit, called, **one),
            "g_mean": np.sqrt(sensitivity * specificity),
            "f1": metrics.f1_score(hit, called, **one),
            "precision": metrics.precision_score(hit, called, **one),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_calibration_slope_is_that_of_a_logistic_regression(scale: float) -> None:
    """Red without the intercept, or with the Newton steps stopped early."""
    sm = pytest.importorskip("statsmodels.api")
    cell, hit, weight = scored(12)
    x = scale * np.linspace(-2, 2, 25)
    model = sm.GLM(hit.astype(float), sm.add_constant(x[cell]), family=sm.families.Binomial(), freq_weights=weight).fit(
        tol=1e-14, maxiter=200
    )
    got = stats.calibration_slope(*counts(cell, hit, weight), x)[0]
    assert got == pytest.approx(model.params[1], abs=1e-9)


def test_each_draw_stands_alone() -> None:
    tables = [counts(*scored(seed)) for seed in range(3)]
    positive, negative = (np.concatenate([t[i] for t in tables]) for i in (0, 1))
    x = np.linspace(-2, 2, 25)
    for together, one in (
        (stats.auc(positive, negative), [stats.auc(*t)[0] for t in tables]),
        (stats.average_precision(positive, negative), [stats.average_precision(*t)[0] for t in tables]),
        (stats.calibration_slope(positive, negative, x), [stats.calibration_slope(*t, x)[0] for t in tables]),
    ):
        assert together == pytest.approx(one, abs=1e-12)


def test_without_a_denominator_there_is_no_figure() -> None:
    none, some = np.zeros((1, 4)), np.ones((1, 4))
    assert np.isnan(stats.auc(none, some)[0]) and np.isnan(stats.average_precision(none, some)[0])
    assert np.isnan(stats.confusion(none, some, 2)["sensitivity"][0])
    assert np.isnan(stats.brier(none, none, np.full(4, 0.5))[0])
    # Everyone in one cell, or a perfect split: the slope is not defined, or has no end.
    alone = np.array([[0.0, 5.0, 0.0, 0.0]])
    assert np.isnan(stats.calibration_slope(alone, alone, np.arange(4.0))[0])
    apart = np.array([[5.0, 5.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 5.0, 5.0]])
    assert np.isnan(stats.calibration_slope(*apart, np.arange(4.0))[0])

"""Prediction from noised counts: exact without noise, right on average and covered with it, silent where it swamps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from scored_world import DIED, FEATURES, GRIDS, KIND, people
from sklearn import metrics

from cohortium.common.evaluation import prediction
from cohortium.common.evaluation.discrimination import FIGURES, Discrimination, discrimination, exact
from cohortium.common.evaluation.prediction import Predictor, train_predictor
from cohortium.common.evaluation.utility import CannotBeAssessed

SIGMA = 14.06
"""Noise of one count at a quarter (in μ²) of ε = 0.5, δ = 1e-5."""
HELD = 3000


@lru_cache
def trained(sigma: float = SIGMA, target: int = DIED, strength: float = 1.0, patients: int = HELD) -> Predictor:
    return train_predictor(
        codes=people(9000, seed=1, strength=strength),
        grids=GRIDS,
        target=target,
        features=FEATURES,
        noise_multiplier=sigma,
        patients=patients,
    )


@lru_cache
def held(patients: int = HELD) -> np.ndarray:
    return people(patients, seed=2)


def counted(predictor: Predictor, codes: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    return np.concatenate([np.bincount(d.assign(codes), weights, minlength=d.bins) for d in predictor.derived]).astype(
        np.float64
    )


def asked(predictor: Predictor, sigma: float, *, seed: int) -> Discrimination:
    noise = np.random.default_rng([seed, 77]).standard_normal(predictor.dim)
    values = counted(predictor, held(int(predictor.patients))) + sigma * noise
    return discrimination(predictor=predictor, values=values, sigma=sigma, seed=seed)


def by_hand(predictor: Predictor, codes: np.ndarray, score: np.ndarray, at: float) -> dict[str, float]:
    """scikit-learn's figures for rows with a known outcome, at the threshold `at` of the score."""
    del predictor
    hit = codes[:, DIED] == 1
    called = score >= at
    sensitivity, specificity = metrics.recall_score(hit, called), metrics.recall_score(~hit, ~called)
    return {
        "tstr_auc": metrics.roc_auc_score(hit, score),
        "tstr_pr_auc": metrics.average_precision_score(hit, score),
        "tstr_f1": metrics.f1_score(hit, called),
        "tstr_g_mean": float(np.sqrt(sensitivity * specificity)),
        "tstr_balanced_accuracy": metrics.balanced_accuracy_score(hit, called),
        "tstr_sensitivity": sensitivity,
        "tstr_specificity": specificity,
        "tstr_precision": metrics.precision_score(hit, called),
    }


def threshold(predictor: Predictor) -> float:
    chosen = predictor.levels[0].cuts
    return float(chosen.edges[chosen.threshold - 1])


def test_without_noise_every_figure_is_scikit_learns() -> None:
    """σ = 0: the score of a patient is its cell. Red with the classes swapped, the unknown outcomes counted, or the
    threshold one bin off."""
    predictor = trained(0.0)
    got = asked(predictor, 0.0, seed=0).figures
    codes = held()[held()[:, DIED] < 2]
    level = predictor.levels[0]
    cell = np.searchsorted(level.cuts.edges, level.scored.score.score(codes), side="right")
    expected = by_hand(predictor, codes, cell, level.cuts.threshold)
    hit = codes[:, DIED] == 1
    expected["tstr_brier"] = metrics.brier_score_loss(hit, level.cuts.chance[cell])
    expected["tstr_observed_expected"] = hit.sum() / level.cuts.chance[cell].sum()
    assert {k: got[k].value for k in expected} == pytest.approx(expected, abs=1e-9)
    assert set(got) == set(FIGURES)
    assert all(f.low == f.value == f.high for f in got.values())


def test_the_calibration_slope_without_noise_is_that_of_a_logistic_regression() -> None:
    sm = pytest.importorskip("statsmodels.api")
    predictor = trained(0.0)
    codes = held()[held()[:, DIED] < 2]
    level = predictor.levels[0]
    cell = np.searchsorted(level.cuts.edges, level.scored.score.score(codes), side="right")
    x = sm.add_constant(level.cuts.log_odds[cell])
    fit = sm.GLM((codes[:, DIED] == 1).astype(float), x, family=sm.families.Binomial()).fit(tol=1e-14, maxiter=200)
    got = asked(predictor, 0.0, seed=0).figures["tstr_calibration_slope"].value
    assert got == pytest.approx(fit.params[1], abs=1e-9)


def test_the_exact_figures_are_scikit_learns_on_the_very_scores() -> None:
    predictor = trained()
    codes = held()[held()[:, DIED] < 2]
    score = predictor.levels[0].scored.score.score(codes)
    expected = by_hand(predictor, codes, score, threshold(predictor))
    got = exact(predictor=predictor, codes=held())
    assert {k: got[k] for k in expected} == pytest.approx(expected, abs=1e-9)


def test_a_patient_with_several_rows_weighs_as_one() -> None:
    codes = np.repeat(held()[:500], np.arange(500) % 3 + 1, axis=0)
    weights = np.repeat(1.0 / (np.arange(500) % 3 + 1), np.arange(500) % 3 + 1)
    predictor = trained(0.0)
    for figures in (
        lambda c, w: exact(predictor=predictor, codes=c, weights=w),
        lambda c, w: {
            k: f.value
            for k, f in discrimination(predictor=predictor, values=counted(predictor, c, w), sigma=0.0).figures.items()
        },
    ):
        assert figures(codes, weights) == pytest.approx(figures(held()[:500], None), abs=1e-9)


COVERED = ("tstr_auc", "tstr_f1", "tstr_g_mean", "tstr_sensitivity", "tstr_specificity", "tstr_observed_expected")


RUNS = 100


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 1.25])
def test_intervals_cover_the_exact_figure_and_errors_are_small(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 runs of the mechanism on the same patients, a synthetic table that is right and one that is too sure.

    A method that covers 95 % falls below 89 % once in 230. Planted: noise assumed half as large, or the order within
    bins forgotten (areas by bins alone): red.
    """
    monkeypatch.setattr("cohortium.common.evaluation.discrimination.DRAWS", 800)
    predictor = trained(strength=strength, patients=6000)
    truth = exact(predictor=predictor, codes=held(6000))
    counts = counted(predictor, held(6000))
    noise = np.random.default_rng(77).standard_normal((RUNS, len(counts)))
    runs = [
        discrimination(predictor=predictor, values=counts + SIGMA * e, sigma=SIGMA, seed=seed).figures
        for seed, e in enumerate(noise)
    ]
    for key in COVERED:
        figures = [run[key] for run in runs]
        covered = np.mean([f.low is not None and f.low <= truth[key] <= f.high for f in figures])
        assert covered >= 0.89, (key, covered)
    for key in ("tstr_auc", "tstr_f1", "tstr_g_mean"):
        errors = np.array([run[key].value - truth[key] for run in runs])
        assert np.mean(np.abs(errors) <= 0.02) >= 0.95, key
        assert abs(errors.mean()) < 0.008
        # No interval is wide enough to cover by its width alone.
        assert np.mean([run[key].high - run[key].low for run in runs]) < 0.045


def test_the_noise_is_neither_forgotten_nor_doubled() -> None:
    """Half-widths at the threshold follow from the noise alone: a closed form for the specificity."""
    predictor = trained()
    chosen = predictor.levels[0].cuts
    negative = counted(predictor, held()).reshape(3, -1)[0]
    share = negative[: chosen.threshold].sum() / negative.sum()
    upper, lower = chosen.bins - chosen.threshold, chosen.threshold
    sd = SIGMA * np.sqrt(lower * (1 - share) ** 2 + upper * share**2) / negative.sum()
    f = asked(predictor, SIGMA, seed=3).figures["tstr_specificity"]
    assert f.high is not None and f.low is not None
    assert (f.high - f.low) / 2 == pytest.approx(1.96 * sd, rel=0.1)


def test_every_figure_has_its_reference_and_says_how() -> None:
    figures = asked(trained(), SIGMA, seed=4).figures
    auc = figures["tstr_auc"]
    assert auc.value is not None and auc.reference is not None and auc.reference_low is not None
    assert auc.reference_low < auc.reference < (auc.reference_high or 0)
    # The made-up synthetic table is of the patients' own population: they score what it promises.
    assert auc.reference_low - 0.02 < auc.value < (auc.reference_high or 0) + 0.02
    assert "noise" in auc.how and "threshold" in figures["tstr_f1"].how
    assert all(f.reference_text for f in figures.values() if f.value is not None)


def test_curves_have_a_point_for_each_edge_and_bin() -> None:
    predictor = trained()
    (curve,) = asked(predictor, SIGMA, seed=5).curves
    bins = predictor.levels[0].cuts.bins
    assert len(curve.true_positive) == len(curve.precision) == bins - 1 and len(curve.observed) == bins
    assert curve.label == "1"
    assert list(curve.predicted) == sorted(curve.predicted)
    for observed, low, high in zip(curve.observed, curve.observed_low, curve.observed_high):
        if observed is not None and low is not None and high is not None:
            assert low <= observed <= high
    (clean,) = asked(trained(0.0), 0.0, seed=5).curves
    assert list(clean.true_positive) == sorted(clean.true_positive)


def test_several_levels_are_judged_each_against_the_rest() -> None:
    predictor = trained(0.0, KIND)
    assert [level.label for level in predictor.levels] == ["x", "y", "z"]
    got = asked(predictor, 0.0, seed=6)
    areas = []
    for level, kind in zip(predictor.levels, range(3)):
        cell = np.searchsorted(level.cuts.edges, level.scored.score.score(held()), side="right")
        areas.append(metrics.roc_auc_score(held()[:, KIND] == kind, cell))
    assert got.figures["tstr_auc"].value == pytest.approx(np.mean(areas), abs=1e-9)
    assert "Mean over 3 levels" in got.figures["tstr_auc"].how and len(got.curves) == 3


def test_noise_that_swamps_cannot_be_assessed() -> None:
    predictor = trained()
    drowned = discrimination(predictor=predictor, values=np.ones(predictor.dim), sigma=SIGMA)
    assert all(f.value is None and f.reason for f in drowned.figures.values()) and not drowned.curves
    assert any("died" in note for note in drowned.notes)
    with pytest.raises(CannotBeAssessed, match="too few patients"):
        trained(2000.0)


def test_rare_levels_are_left_out_by_a_public_rule() -> None:
    codes = people(6000, seed=8)
    codes[:, KIND] = np.where(codes[:, KIND] == 2, 0, codes[:, KIND])
    codes[:120, KIND] = 2  # 2 % of the patients: 60 of 3,000
    predictor = train_predictor(
        codes=codes, grids=GRIDS, target=KIND, features=FEATURES, noise_multiplier=SIGMA, patients=HELD
    )
    assert [level.label for level in predictor.levels] == ["x", "y"]
    assert predictor.notes and "too rare" in predictor.notes[0]


def test_a_target_that_cannot_be_predicted_is_told() -> None:
    codes = people(500, seed=9)
    one = {"grids": GRIDS, "noise_multiplier": 1.0, "patients": 500.0}
    with pytest.raises(CannotBeAssessed, match="values"):
        train_predictor(codes=codes, target=0, features=FEATURES, **one)
    with pytest.raises(CannotBeAssessed, match="no column"):
        train_predictor(codes=codes, target=DIED, features=(DIED,), **one)


@pytest.mark.parametrize(
    ("values", "sigma"), [(np.zeros(3), 1.0), (None, -1.0), (None, np.nan), (np.full(1000, np.nan), 1.0)]
)
def test_an_answer_that_does_not_fit_is_refused(values: np.ndarray | None, sigma: float) -> None:
    predictor = trained()
    with pytest.raises(ValueError):
        discrimination(
            predictor=predictor,
            values=np.ones(predictor.dim) if values is None else values[: predictor.dim],
            sigma=sigma,
        )


def test_the_same_answer_and_seed_give_the_same_figures() -> None:
    assert asked(trained(), SIGMA, seed=10) == asked(trained(), SIGMA, seed=10)
    assert prediction.FRESH_SHARE < 0.5

"""Groups from noised counts: exact without noise, covered with it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from cohortium.common.evaluation.subgroups import RATES, subgroups

NAMES = ["women", "men", "unknown"]


def table(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    group, outcome = rng.integers(0, 3, n), (rng.random(n) < 0.3).astype(int)
    predicted = (rng.random(n) < 0.15 + 0.5 * outcome + 0.08 * group).astype(int)
    counts = np.bincount(group * 4 + outcome * 2 + predicted, minlength=12).reshape(3, 2, 2).astype(float)
    return group, outcome, predicted, counts


def test_without_noise_rates_are_those_of_scikit_learn() -> None:
    group, outcome, predicted, counts = table(np.random.default_rng(0), 3000)
    got = subgroups(names=NAMES, counts=counts, sigma=0.0, synthetic=counts)
    sensitivities = []
    for g, found in enumerate(got.groups):
        y, p = outcome[group == g], predicted[group == g]
        wanted = {
            "prevalence": y.mean(),
            "selection rate": p.mean(),
            "sensitivity": metrics.recall_score(y, p),
            "specificity": metrics.recall_score(y, p, pos_label=0),
            "precision": metrics.precision_score(y, p),
            "error rate": 1 - metrics.accuracy_score(y, p),
        }
        assert set(wanted) == set(RATES)
        for name, value in wanted.items():
            assert found.rates[name].value == pytest.approx(value, abs=1e-12), name
        assert found.share.value == pytest.approx((group == g).mean(), abs=1e-12)
        sensitivities.append(wanted["sensitivity"])
    assert got.overall["precision"].value == pytest.approx(metrics.precision_score(outcome, predicted), abs=1e-12)
    gap = got.gaps["sensitivity"].figure
    assert gap.value == pytest.approx(max(sensitivities) - min(sensitivities), abs=1e-12) == gap.low == gap.high


def test_with_noise_rates_and_gaps_are_covered() -> None:
    """60 runs on the same patients: 1080 rates at 95 %, 360 gaps. Planted: cells of a sum not counted: red."""
    rng = np.random.default_rng(1)
    *_, counts = table(rng, 3000)
    exact = subgroups(names=NAMES, counts=counts, sigma=0.0, synthetic=counts)
    rates, shares, gaps = [], [], []
    for seed in range(60):
        noised = counts + 12 * rng.standard_normal(counts.shape)
        got = subgroups(names=NAMES, counts=noised, sigma=12.0, synthetic=counts, seed=seed)
        for a, b in zip(got.groups, exact.groups, strict=True):
            shares.append(a.share.low <= b.share.value <= a.share.high)
            rates += [a.rates[r].low <= b.rates[r].value <= a.rates[r].high for r in RATES]
        for rate in RATES:
            figure = got.gaps[rate].figure
            gaps.append(figure.value is None or figure.low <= exact.gaps[rate].figure.value <= figure.high)
    assert 0.915 < np.mean(rates) < 0.98 and np.mean(shares) > 0.9 and np.mean(gaps) > 0.9


def test_a_group_in_the_noise_is_not_assessed() -> None:
    counts = np.array([[[400.0, 80], [90, 150]], [[300, 70], [60, 120]], [[3, 1], [2, 1]]])
    got = subgroups(names=NAMES, counts=counts, sigma=10.0, synthetic=counts)
    assert got.groups[2].rates["sensitivity"].value is None
    assert got.groups[0].rates["sensitivity"].value is not None
    assert "2 of 3" in got.gaps["sensitivity"].figure.how
    nobody = subgroups(names=NAMES, counts=np.zeros((3, 2, 2)), sigma=0.0, synthetic=counts)
    assert nobody.groups[0].rates["precision"].value is None
    with pytest.raises(ValueError):
        subgroups(names=NAMES, counts=np.zeros((3, 2)), sigma=1.0, synthetic=np.zeros((3, 2)))


def test_a_twin_without_noise_speaks_of_the_same_groups() -> None:
    """Which groups take part in a gap is decided by the synthetic table and the planned noise, not by the answer."""
    counts = np.array([[[400.0, 80], [90, 150]], [[300, 70], [60, 120]], [[3, 1], [2, 30]]])
    made = 10 * counts
    assert subgroups(names=NAMES, counts=counts, sigma=0.0, synthetic=made).gaps["prevalence"].figure.value > 0.5
    twin = subgroups(names=NAMES, counts=counts, sigma=0.0, synthetic=made, planned_sigma=10.0).gaps["prevalence"]
    assert twin.figure.value == pytest.approx(240 / 720 - 180 / 550, abs=1e-12)
    noised = counts + 10 * np.random.default_rng(4).standard_normal(counts.shape)
    assert (
        subgroups(names=NAMES, counts=noised, sigma=10.0, synthetic=made).gaps["prevalence"].figure.how[:6] == "2 of 3"
    )

"""Intervals in closed form: equal to other people's where these exist, and covering at their stated rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats
from sklearn.metrics import roc_auc_score

from cohortium.client.diagnostics import draws, intervals


@pytest.mark.parametrize(("hits", "of"), [(0, 7), (7, 7), (3, 20), (499, 1000), (1, 1)])
def test_wilson_is_scipys(hits: int, of: int) -> None:
    ends = stats.binomtest(hits, of).proportion_ci(method="wilson")
    assert intervals.wilson(hits, of) == pytest.approx((ends.low, ends.high), abs=1e-12)


@pytest.mark.parametrize(("hits", "of"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(hits: int, of: int) -> None:
    with pytest.raises(ValueError):
        intervals.wilson(hits, of)


@pytest.mark.parametrize(
    ("attack", "control"), [((0.05, 400), (0.03, 400)), ((0.6, 200), (0.5, 100)), ((0.9, 300), (0.85, 60))]
)
def test_the_residual_risks_interval_covers_it(attack: tuple[float, int], control: tuple[float, int]) -> None:
    """Power: with 1.5 times the deviate it covers above 0.985, with two thirds of it below 0.90."""
    rng = np.random.default_rng(1)
    truth = 1 - (1 - attack[0]) / (1 - control[0])
    covered = []
    for _ in range(3000):
        found = intervals.residual(
            rng.binomial(attack[1], attack[0]), attack[1], rng.binomial(*control[::-1]), control[1]
        )
        assert found is not None
        value, (low, high) = found
        assert low <= value <= high
        covered.append(low <= truth <= high)
    assert 0.93 <= np.mean(covered) <= 0.975


def test_the_residual_risk_at_its_ends() -> None:
    """Everything guessed against nothing is 1, equal rates are 0, a control that always succeeds leaves nothing."""
    value, (low, high) = intervals.residual(50, 50, 0, 50) or (0.0, (0.0, 0.0))
    assert value == high == 1 and 0.8 < low < 1
    value, (low, high) = intervals.residual(20, 50, 20, 50) or (9.0, (0.0, 0.0))
    assert value == 0 and low < 0 < high
    assert intervals.residual(5, 50, 50, 50) is None


def test_the_area_is_sklearns_with_ties() -> None:
    rng = np.random.default_rng(2)
    members, others = rng.integers(0, 9, 80).astype(float), rng.integers(0, 7, 50).astype(float)
    truth = np.repeat([1, 0], [80, 50])
    assert intervals.auc(members, others)[0] == pytest.approx(roc_auc_score(truth, [*members, *others]), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_the_areas_interval_covers_it(shift: float) -> None:
    rng = np.random.default_rng(3)
    truth = float(stats.norm.cdf(shift / math.sqrt(2)))
    covered = []
    for _ in range(600):
        value, (low, high) = intervals.auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 40))
        assert 0 <= low <= value <= high <= 1
        covered.append(low <= truth <= high)
    assert 0.925 <= np.mean(covered) <= 0.985


def test_an_area_of_one_still_has_an_interval() -> None:
    value, (low, high) = intervals.auc(np.arange(10.0) + 20, np.arange(12.0))
    assert value == high == 1 and 0.6 < low < 0.98
    value, (low, high) = intervals.auc(np.arange(10.0) - 20, np.arange(12.0))
    assert value == low == 0 and 0.02 < high < 0.4


def test_the_medians_interval_covers_it() -> None:
    rng = np.random.default_rng(4)
    covered = [intervals.median(rng.exponential(1, 41))[1] for _ in range(2000)]
    share = np.mean([low <= math.log(2) <= high for low, high in covered])
    assert 0.945 <= share <= 0.985  # discrete: never below the stated rate
    assert intervals.median(np.array([3.0])) == (3.0, (3.0, 3.0))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1e-5), (3.0, 0.1), (9.0, 1e-6)])
def test_the_proven_area_is_the_integral_of_the_trade_off(epsilon: float, delta: float) -> None:
    def missed(alarm: float) -> float:
        return max(0.0, 1 - delta - math.exp(epsilon) * alarm, math.exp(-epsilon) * (1 - delta - alarm))

    corner = (1 - delta) / (1 + math.exp(epsilon))
    below, _ = integrate.quad(missed, 0, 1, points=[corner, 1 - delta], limit=200)
    assert intervals.auc_bound(epsilon, delta) == pytest.approx(1 - below, abs=1e-8)


def test_the_proven_area_at_its_ends() -> None:
    assert intervals.auc_bound(0.0, 0.0) == 0.5 and intervals.auc_bound(math.inf, 0.0) == 1
    assert intervals.auc_bound(800.0, 1e-6) == pytest.approx(1)
    with pytest.raises(ValueError):
        intervals.auc_bound(-1.0, 0.0)


def test_choices_are_repeatable_and_look_uniform() -> None:
    assert np.array_equal(draws.bits("a", 50)[:9], draws.bits("a", 9))
    assert not np.array_equal(draws.bits("a", 9), draws.bits("b", 9))
    assert stats.kstest(draws.uniforms("uniform", 20_000), "uniform").pvalue > 0.001
    assert np.array_equal(np.sort(draws.order("x", 100)), np.arange(100))
    some = draws.some("x", 100, 7)
    assert len(set(some)) == 7 and np.array_equal(some, np.sort(some)) and len(draws.some("x", 5, 7)) == 5
    assert set(draws.integers("i", 999, 3)) == {0, 1, 2}

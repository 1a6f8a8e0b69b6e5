"""Belts and closed-form intervals cover at their stated rate, whatever the truth."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.evaluation.belts import belt, folded_mean, linear_figure, ratio_interval, size_interval
from cohortium.common.evaluation.sizes import each_one, mean_size


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5])
def test_a_belt_covers_and_undoes_the_bias_of_its_statistic(truth: float) -> None:
    """t = θ² + noise, far from θ itself. 400 runs: 95 ± 3.5 % (a right belt is outside 1 time in 700)."""
    rng = np.random.default_rng([1, int(10 * truth)])
    theta = rng.uniform(0, 4, 4000)
    t = theta**2 + rng.standard_normal(4000)
    found = [belt(theta, t, truth**2 + rng.standard_normal()) for _ in range(400)]
    covered = np.mean([i.low <= truth <= i.high for i in found])
    assert 0.915 < covered < 0.985
    assert np.mean([i.middle > truth for i in found]) == pytest.approx(0.5, abs=0.15)
    assert all(i.low <= i.value <= i.high for i in found)


@pytest.mark.parametrize("delta", [0.0, 0.5, 3.0])
def test_the_interval_of_an_absolute_value_covers_exactly(delta: float) -> None:
    rng = np.random.default_rng([2, int(10 * delta)])
    ends = np.array([size_interval(delta + e, 1.0) for e in rng.standard_normal(1000)])
    covered = np.mean((ends[:, 0] <= delta) & (delta <= ends[:, 1]))
    assert 0.93 < covered < 0.99  # at 0 the belt has one side only: up to 97.5 %
    assert size_interval(-0.7, 0.0) == (0.7, 0.7)


@pytest.mark.parametrize(("part", "rest"), [(30.0, 170.0), (5.0, 20.0), (0.0, 100.0)])
def test_fieller_covers_exactly_even_where_the_whole_is_small(part: float, rest: float) -> None:
    """2000 draws: 95 ± 1.6 % (1 in 1000); the plain ratio ± 1.96 delta-method errors misses it at (5, 20)."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((2000, 2)) * [6.0, 8.0]
    ends = np.array([ratio_interval(part + a, rest + b, 6.0, 8.0) for a, b in noise])
    rate = part / (part + rest)
    covered = np.mean((ends[:, 0] <= rate + 1e-12) & (rate - 1e-12 <= ends[:, 1]))
    assert 0.934 < covered < 0.99
    assert ratio_interval(1.0, 3.0, 0.0, 0.0) == (0.25, 0.25)
    assert ratio_interval(1.0, 1.0, 50.0, 50.0) == (0.0, 1.0)


def test_the_mean_of_a_folded_normal() -> None:
    x = np.random.default_rng(4).standard_normal(200_000)
    for mean, sd in ((0.0, 1.0), (0.4, 0.5), (-2.0, 0.3)):
        got = folded_mean(np.array([mean]), np.array([sd**2]))[0]
        assert got == pytest.approx(np.abs(mean + sd * x).mean(), abs=0.01)


def test_a_linear_figure_is_cut_to_what_is_possible_and_silent_where_noise_swamps() -> None:
    figure = linear_figure(1.02, 0.02, low=0.0, high=1.0, at_most=0.1)
    assert figure.value == 1.0 and figure.high == 1.0 and figure.low == pytest.approx(1.02 - 0.0392, abs=1e-4)
    assert linear_figure(0.5, 0.2, at_most=0.1).value is None


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
def test_the_mean_size_of_drowned_differences_is_covered_and_nearly_unbiased(spread: float) -> None:
    """One fixed set of 60 differences, 60 runs of the mechanism with noise 0.2. Planted: worlds
    with half of the noise: red."""
    rng = np.random.default_rng([5, int(100 * spread)])
    sampling = np.full(60, 0.03)
    delta = 0.03 * rng.standard_normal(60) + spread * rng.standard_t(5, 60)
    truth, noise = np.abs(delta).mean(), np.full(60, 0.2)
    found = []
    for seed in range(60):
        seen = delta + noise * rng.standard_normal(60)
        found.append(mean_size(seen, noise, sampling, np.random.default_rng(seed), draws=700)[0])
    assert np.mean([i.low <= truth <= i.high for i in found]) > 0.88
    assert np.mean([i.value for i in found]) == pytest.approx(truth, abs=0.04)
    assert np.abs(delta + 0.2 * rng.standard_normal(60)).mean() > truth - 0.02
    with pytest.raises(ValueError):
        mean_size(np.empty(0), np.empty(0), np.empty(0), rng)


def test_the_greatest_of_many_differences_are_covered_though_they_were_picked() -> None:
    """60 differences, 5 of them large, noise 0.07; 40 runs, the 10 that look largest each time: 400 intervals.

    The plain interval x ± 1.96 noise, beside it, misses one in six of those that look largest next to the five.
    """
    rng = np.random.default_rng(6)
    noise, sampling = np.full(60, 0.07), np.full(60, 0.02)
    delta = np.append(np.full(5, 0.25), 0.02 * rng.standard_normal(55))
    ours, plain, everyone = [], [], []
    for seed in range(40):
        seen = delta + noise * rng.standard_normal(60)
        worlds = mean_size(seen, noise, sampling, np.random.default_rng(seed), draws=300)[1]
        middle, low, high = each_one(worlds, seen, noise, sampling)
        assert np.all((low <= middle) & (middle <= high))
        inside = (low <= delta) & (delta <= high)
        everyone.append(inside.mean())
        ours.append(inside[np.argsort(-np.abs(middle))[:10]].mean())
        chosen = np.argsort(-np.abs(seen))[5:15]
        plain.append((np.abs(seen - delta)[chosen] <= 1.96 * 0.07).mean())
    assert np.mean(ours) > 0.88 and np.mean(everyone) > 0.93
    assert np.mean(plain) < 0.86 < np.mean(ours)

"""The combining rules: their formulas, their coverage where theory is exact, and when they must not answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cohortium.common.evaluation.combining import FEWEST, combine, plain

TRUTH = 0.7


def plays(
    rng: np.random.Generator, m: int, *, bias: float, slope: float, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """(θ_i, q_i) of a mechanism that answers bias + slope·θ + noise of standard deviation 1; width 0: one world."""
    truths = TRUTH + 0.3 + width * np.where(np.arange(m) % 2, 1.0, -1.0)
    return truths, bias + slope * truths + rng.standard_normal(m)


def covered(*, m: int, bias: float, slope: float, width: float, trials: int) -> float:
    rng, hits = np.random.default_rng(m), 0
    for _ in range(trials):
        truths, q = plays(rng, m, bias=bias, slope=slope, width=width)
        own = bias + slope * TRUTH + rng.standard_normal()
        found = combine(own, q, truths)
        hits += found.low <= TRUTH <= found.high
    return hits / trials


def test_a_shift_is_what_the_formula_says() -> None:
    q = np.array([1.0, 2.0, 4.0, 3.0, 2.5, 1.5])
    found = combine(5.0, q, 2.0, level=0.9)
    half = stats.t.ppf(0.95, 5) * q.std(ddof=1) * math.sqrt(1 + 1 / 6)
    assert found.estimate == pytest.approx(2.0 + 5.0 - q.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((found.estimate - half, found.estimate + half), abs=1e-12)
    assert found.slope == 1.0 and found.assessed


def test_the_ends_of_a_calibration_interval_are_where_the_deviation_is_just_significant() -> None:
    rng = np.random.default_rng(4)
    truths, q = plays(rng, 12, bias=0.4, slope=0.8, width=3.0)
    found = combine(1.1, q, truths)
    line = stats.linregress(truths, q)
    assert found.slope == pytest.approx(line.slope, abs=1e-12)
    moved = ((truths - truths.mean()) ** 2).sum()
    for end in (found.low, found.high):
        error = found.spread * math.sqrt(1 + 1 / 12 + (end - truths.mean()) ** 2 / moved)
        gap = 1.1 - (line.intercept + line.slope * end)
        assert abs(gap) == pytest.approx(stats.t.ppf(0.975, 10) * error, rel=1e-9)


@pytest.mark.parametrize(
    ("m", "bias", "slope", "width"),
    [(5, 0.0, 1.0, 0.0), (20, -2.0, 1.0, 0.0), (8, 0.5, 0.6, 3.0), (20, -1.0, 0.5, 3.0)],
)
def test_intervals_cover_at_their_rate(m: int, bias: float, slope: float, width: float) -> None:
    """False alarm below 1e-4 a case: 0.95 ± 3.9 standard errors of 2,000 trials."""
    assert abs(covered(m=m, bias=bias, slope=slope, width=width, trials=2000) - 0.95) < 3.9 * math.sqrt(
        0.95 * 0.05 / 2000
    )


def test_a_shift_does_not_undo_attenuation_and_the_line_does() -> None:
    """The power of the test above: worlds 6 away from the truth and a slope of 0.5."""
    rng, shift, line = np.random.default_rng(3), 0, 0
    for _ in range(500):
        scattered = TRUTH + 6.0 + 3.0 * np.where(np.arange(20) % 2, 1.0, -1.0)
        noise, own = rng.standard_normal(20), 0.5 * TRUTH + rng.standard_normal()
        for_shift = combine(own, 0.5 * (TRUTH + 6.0) + noise, TRUTH + 6.0)
        for_line = combine(own, 0.5 * scattered + noise, scattered)
        shift += for_shift.low <= TRUTH <= for_shift.high
        line += for_line.low <= TRUTH <= for_line.high
    assert shift / 500 < 0.3 and line / 500 > 0.92


def test_what_the_table_does_not_carry_has_no_interval() -> None:
    rng = np.random.default_rng(1)
    truths, q = plays(rng, 10, bias=0.0, slope=0.0, width=0.1)
    for values in (q, -5 * truths + 1e-3 * q):  # no slope, and one of the wrong sign
        found = combine(0.2, values, truths)
        assert (found.low, found.high) == (-math.inf, math.inf) and not found.assessed


@pytest.mark.parametrize(
    ("own", "q", "truths"),
    [
        (0.0, [1.0] * (FEWEST - 1), 0.0),
        (math.nan, [1.0, 2.0, 3.0, 4.0, 5.0], 0.0),
        (0.0, [1.0, 2.0, 3.0, 4.0, math.nan], 0.0),
        (0.0, [1.0, 2.0, 3.0, 4.0, 5.0], math.inf),
    ],
)
def test_a_value_that_is_none_is_refused(own: float, q: list[float], truths: float) -> None:
    with pytest.raises(ValueError):
        combine(own, q, truths)


def test_a_level_is_a_probability() -> None:
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError):
            combine(0.0, [1.0, 2.0, 3.0, 4.0, 5.0], 0.0, level=level)


def test_plain_is_the_gaussian_interval() -> None:
    assert plain(1.0, 0.5) == pytest.approx((1.0 - 0.5 * 1.959964, 1.0 + 0.5 * 1.959964), abs=1e-6)

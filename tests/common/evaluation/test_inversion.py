"""Intervals of a distance cover, at no distance as well; a plain quantile interval does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cohortium.common.evaluation.inversion import inverted


def largest(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(x).max(axis=-1))


def square(x: np.ndarray) -> np.ndarray:
    return np.asarray((x**2).sum(axis=-1))


@pytest.mark.parametrize("size", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("distance", "degree"), [(largest, 1), (square, 2)])
def test_intervals_cover_at_every_size(distance: Callable[[np.ndarray], np.ndarray], degree: int, size: float) -> None:
    """150 draws, right rate 95 to 99 %: below 90 % by chance 1 time in 100 at the most.

    Planted: quantiles of the plain noised distance (no inversion) cover 0 % at size 0 and turn it red.
    """
    rng = np.random.default_rng([int(size), degree])
    true = size * np.array([0.2, 0.5, 0.8, 1.0])
    covered, values = [], []
    for _ in range(150):
        seen = true + rng.standard_normal(4)
        got = inverted(
            observed=float(distance(seen)),
            direction=seen,
            noise=rng.standard_normal((200, 4)),
            distance=distance,
            degree=degree,
        )
        covered.append(got.low <= float(distance(true)) <= got.high)
        values.append(got.value)
        assert got.low <= got.value <= got.high
    assert np.mean(covered) >= 0.90
    if size == 4.0:
        assert abs(np.median(values) / float(distance(true)) - 1) < 0.12


def test_without_any_noise_the_distance_is_its_own_interval() -> None:
    got = inverted(observed=0.0, direction=np.zeros(2), noise=np.zeros((3, 2)), distance=largest)
    assert (got.low, got.value, got.high) == (0.0, 0.0, 0.0)

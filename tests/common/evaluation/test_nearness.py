"""Distances to the nearest synthetic row from noised histograms: exact without noise, covered with it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from cohortium.common.evaluation.nearness import nearness


def test_distances_median_and_repetition() -> None:
    """Planted: a median at 45 % in place of a half: red."""
    edges = np.array([0.05, 0.1, 0.15, 0.2])
    held, near = np.array([50.0, 150, 400, 300, 100]), np.array([300.0, 250, 250, 150, 50])
    got = nearness(counts=held, sigma=0.0, edges=edges, synthetic=held, training=near)
    assert got.median.figure.value == pytest.approx(0.1 + 0.05 * 300 / 400, abs=1e-12)
    assert got.difference.figure.value == pytest.approx(0.0, abs=1e-12)
    distances = np.concatenate([np.repeat(range(5), h.astype(int)) for h in (near, held)])
    labels, scores = np.repeat([1, 0], [1000, 1000]), -distances
    assert got.training is not None
    assert got.training.figure.value == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    rng, median, repeated = np.random.default_rng(3), [], []
    for _ in range(150):
        noised = nearness(
            counts=held + 15 * rng.standard_normal(5),
            sigma=15.0,
            edges=edges,
            synthetic=held,
            training=near + 15 * rng.standard_normal(5),
            training_sigma=15.0,
            draws=200,
        )
        assert noised.training is not None
        median.append(noised.median.figure.low <= got.median.figure.value <= noised.median.figure.high)
        mine = noised.training.figure
        repeated.append(mine.low <= got.training.figure.value <= mine.high)
    assert np.mean(median) > 0.92 and 0.9 < np.mean(repeated) < 0.995
    with pytest.raises(ValueError):
        nearness(counts=held, sigma=1.0, edges=edges[::-1], synthetic=held)

"""Recall of rare levels from noised counts: exact without noise, covered with it."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.evaluation.rarity import rare_recall


def test_recall_of_rare_levels_by_band() -> None:
    held = [np.array([700.0, 250, 40, 6, 4]), np.array([990.0, 10])]
    made = [np.array([720.0, 240, 40, 0, 0]), np.array([995.0, 5])]
    frequencies = [h / 1000 for h in held]
    bands = rare_recall(counts=held, sigma=0.0, synthetic=made, frequencies=frequencies)
    assert [b.levels for b in bands] == [0, 2, 2, 0, 3]
    assert bands[1].recall.value == 0.0 and bands[1].levels_present == 0
    assert bands[2].recall.value == 1.0
    assert bands[0].recall.value is None
    assert sum(b.held_out.value or 0.0 for b in bands) == pytest.approx(1.0, abs=1e-12)
    unbanded = rare_recall(counts=held, sigma=0.0, synthetic=made)
    assert unbanded[0].levels == 2 and unbanded[0].held_out.value == pytest.approx(0.005)
    rng, hits = np.random.default_rng(2), []
    for _ in range(500):
        noised = [h + 5 * rng.standard_normal(len(h)) for h in held]
        band = rare_recall(counts=noised, sigma=5.0, synthetic=made, frequencies=frequencies)[4]
        hits.append(band.held_out.low <= bands[4].held_out.value <= band.held_out.high)
    assert 0.92 < np.mean(hits) < 0.98
    with pytest.raises(ValueError):
        rare_recall(counts=held, sigma=1.0, synthetic=made[:1])

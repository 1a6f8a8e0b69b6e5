"""Two one-sided tests: noise is part of them (beside statsmodels: test_profile.py)."""

from __future__ import annotations

import pytest

from cohortium.common.evaluation.equivalence import tost, tost_means


def test_noise_makes_equivalence_harder_to_show() -> None:
    facts = {"means": (1.0, 1.1), "variances": (4.0, 4.0), "rows": (900.0, 9000.0), "margin": 0.5}
    assert tost_means("x", **facts).equivalent
    assert not tost_means("x", noise=0.5, **facts).equivalent
    assert tost("x", 0.0, 0.0, 1.0).p == 0.0 and tost("x", 2.0, 0.0, 1.0).p == 1.0
    with pytest.raises(ValueError):
        tost("x", 0.0, 1.0, 0.0)

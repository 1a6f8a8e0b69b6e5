"""Newton fits equal statsmodels; what has no finite estimate is refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.evaluation.regression import CannotFit, fit_cox, fit_logistic


def table(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, time, event, weights); times are whole numbers, so that there are ties."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([rng.standard_normal(n), rng.integers(0, 2, n), rng.standard_normal(n) + 3])
    y = (rng.random(n) < 1 / (1 + np.exp(-(x @ [0.8, -0.5, 0.3] - 1)))).astype(int)
    time = np.ceil(rng.exponential(20 * np.exp(-x @ [0.5, 0.4, 0.0])))
    return x, y, time, (rng.random(n) < 0.7).astype(int), rng.choice([0.5, 1.0], n)


@pytest.mark.parametrize("seed", [0, 1])
def test_logistic_equals_statsmodels(seed: int) -> None:
    models = pytest.importorskip("statsmodels.api")
    x, y, _, _, w = table(seed)
    x = np.column_stack([np.ones(len(x)), x])
    fit = fit_logistic(x, y)
    theirs = models.Logit(y, x).fit(method="newton", tol=1e-14, maxiter=100, disp=0)
    assert fit.beta == pytest.approx(theirs.params, abs=1e-9)
    assert fit.standard_errors == pytest.approx(theirs.bse, abs=1e-9)
    weighted = models.GLM(y, x, family=models.families.Binomial(), freq_weights=w).fit(tol=1e-14)
    assert fit_logistic(x, y, w).beta == pytest.approx(weighted.params, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_cox_equals_statsmodels(seed: int) -> None:
    """Breslow ties. Planted: risk sets without the rows that end at the step turn it red."""
    models = pytest.importorskip("statsmodels.api")
    x, _, time, event, _ = table(seed)
    fit, baseline = fit_cox(x, time, event)
    theirs = models.PHReg(time, x, status=event, ties="breslow").fit(method="newton", tol=1e-14, disp=0)
    assert fit.beta == pytest.approx(theirs.params, abs=1e-9)
    assert fit.standard_errors == pytest.approx(theirs.bse, abs=1e-9)
    hazard = np.cumsum(baseline.increments)
    times, cumulated, _ = theirs.baseline_cumulative_hazard[0]
    at = np.searchsorted(times, baseline.times, side="right") - 1
    # statsmodels gives the hazard just before a time.
    assert hazard[:-1] == pytest.approx(np.asarray(cumulated)[at][1:], rel=1e-6)


def test_weights_count_like_copies() -> None:
    x, y, time, event, _ = table(2, 120)
    copies = np.random.default_rng(0).integers(1, 4, len(x))
    again = np.repeat(np.arange(len(x)), copies)
    ones = np.ones((len(x), 1))
    plain = np.concatenate([ones, x], axis=1)
    assert fit_logistic(plain, y, copies).beta == pytest.approx(fit_logistic(plain[again], y[again]).beta, abs=1e-9)
    assert fit_cox(x, time, event, copies)[0].beta == pytest.approx(
        fit_cox(x[again], time[again], event[again])[0].beta, abs=1e-9
    )


def test_what_has_no_finite_estimate_is_refused() -> None:
    x, y, time, _, _ = table(3)
    with pytest.raises(CannotFit, match="one value"):
        fit_logistic(x, np.ones(len(x), dtype=int))
    with pytest.raises(CannotFit, match="no event"):
        fit_cox(x, time, np.zeros(len(x), dtype=int))
    with pytest.raises(CannotFit, match="independent"):
        fit_logistic(np.column_stack([x, x[:, 0]]), y)
    with pytest.raises(CannotFit):
        fit_logistic(np.column_stack([np.ones(len(x)), 2.0 * y - 1]), y)

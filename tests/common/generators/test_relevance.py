"""Slopes from noised moments: those that the evidence speaks for, as far as it does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from cohortium.common.generators import relevance as module
from cohortium.common.generators.relevance import relevant_slopes

COLUMNS, EACH = 15, 2
GROUPS = np.concatenate([[0], np.repeat(np.arange(1, COLUMNS + 1), EACH)])
TWO = np.array([[-0.5], [0.5]])
THREE = np.array([[0.6, -0.2], [-0.4, 0.7], [-0.1, -0.6]])
SD = 0.03


def features(rows: int, seed: int) -> np.ndarray:
    """[rows, 1 + 30]: neighbours go together, so that a column without a slope has moments with the target too."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((rows, COLUMNS * EACH))
    return np.concatenate([np.ones((rows, 1)), 0.8 * own + 0.6 * np.roll(own, 1, axis=1)], axis=1)


def truth(width: int = 1) -> np.ndarray:
    """Two columns of fifteen matter."""
    slope = np.zeros((width, len(GROUPS)))
    slope[0, GROUPS == 3], slope[-1, GROUPS == 8] = (1.5, -1.0), (0.0, 1.2)
    return slope


def law(phi: np.ndarray, slope: np.ndarray, mine: np.ndarray = TWO) -> np.ndarray:
    logits = phi @ slope.T @ mine.T
    p = np.exp(np.maximum(logits - logits.max(axis=1, keepdims=True), -50.0))
    return p / p.sum(axis=1, keepdims=True)


def moments(phi: np.ndarray, slope: np.ndarray, mine: np.ndarray = TWO) -> np.ndarray:
    return (law(phi, slope, mine) @ mine).T @ phi / len(phi)


def noised(phi: np.ndarray, seed: int, sd: float = SD) -> np.ndarray:
    wanted = moments(phi, truth())
    noise = np.random.default_rng([seed, 7]).normal(0.0, sd, wanted.shape)
    noise[:, 0] = 0.0
    return wanted + noise


def found(phi: np.ndarray, wanted: np.ndarray, *, sd: float, patients: float = 1e9) -> np.ndarray:
    return relevant_slopes(np.zeros((len(phi), 2)), TWO, phi, GROUPS, wanted, sd, patients)


def miss(phi: np.ndarray, slope: np.ndarray) -> float:
    """Kullback-Leibler divergence of the law from the true one."""
    p = law(phi, truth())
    return float((p * np.log(p / law(phi, slope))).sum(axis=1).mean())


def test_what_noise_explains_as_well_gets_no_slope() -> None:
    """Against the same moments taken at their word, as a law that knows no noise takes them."""
    knowing, trusting, silent, kept = [], [], [], []
    for seed in range(12):
        phi = features(4000, seed)
        wanted = noised(phi, seed)
        slope = found(phi, wanted, sd=SD)
        knowing.append(miss(phi, slope))
        trusting.append(miss(phi, found(phi, wanted, sd=0.0)))
        size = np.sqrt(np.bincount(GROUPS, weights=(slope**2).sum(axis=0)))[1:]
        matters = np.isin(np.arange(1, COLUMNS + 1), (3, 8))
        silent.append((size[~matters] < 0.05).mean())
        kept.append((size[matters] > 0.6).all())
    assert np.mean(knowing) < 0.35 * np.mean(trusting)
    assert np.mean(silent) > 0.5
    assert all(kept)


def test_without_noise_the_law_is_found() -> None:
    phi = features(4000, 1)
    np.testing.assert_allclose(found(phi, moments(phi, truth()), sd=0.0), truth(), atol=5e-3)


def test_several_levels_and_a_generator_that_knows_something() -> None:
    """q(y | x) is the start, and what it says already needs no slope."""
    phi, slope = features(4000, 2), truth(2)
    wanted = moments(phi, slope, THREE)
    blank = relevant_slopes(np.zeros((len(phi), 3)), THREE, phi, GROUPS, wanted, 0.0, 1e9)
    np.testing.assert_allclose(law(phi, blank, THREE), law(phi, slope, THREE), atol=5e-3)
    told = relevant_slopes(np.log(law(phi, slope, THREE)), THREE, phi, GROUPS, wanted, SD, 1e9)
    assert np.abs(told[:, 1:]).max() < 1e-3


def test_few_patients_say_less() -> None:
    """Moments of a sample miss those of the law by H / n; no noise was added."""
    error = {}
    for knows in (True, False):
        misses = []
        for seed in range(12):
            phi = features(4000, seed)
            drawn = np.random.default_rng([seed, 3]).random(150) < law(phi[:150], truth())[:, 1]
            wanted = (TWO[drawn.astype(int)]).T @ phi[:150] / 150
            misses.append(miss(phi, found(phi, wanted, sd=0.0, patients=150 if knows else 1e9)))
        error[knows] = np.mean(misses)
    assert error[True] < 0.5 * error[False]


def test_the_evidence_is_greatest_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """log N(y; 0, R + H T H) has no slope in log τ where τ was found, and falls where τ was put to nothing."""
    monkeypatch.setattr(module, "TURNS", 20_000)
    monkeypatch.setattr(module, "STILL", 1e-10)
    rng = np.random.default_rng(5)
    root = rng.standard_normal((40, 9))
    h, group = root.T @ root / 40, np.array([0, 1, 1, 2, 2, 3, 3, 4, 4])
    noise = 0.02 * np.eye(9) + h / 300
    y = h @ np.array([0.3, 1.0, -0.5, 0, 0, 0.4, 0.3, 0, 0]) + np.linalg.cholesky(noise) @ rng.standard_normal(9)
    seen, pull = h @ np.linalg.solve(noise, h), h @ np.linalg.solve(noise, y)
    size = np.bincount(group).astype(float)
    tau, mean = module._evidence(seen, pull, group, size, np.array([module.FREE, *[module.FIRST] * 4]))

    def evidence(log_tau: np.ndarray) -> float:
        spread = noise + h @ np.diag(np.exp(log_tau)[group]) @ h
        return float(-0.5 * (np.linalg.slogdet(spread)[1] + y @ np.linalg.solve(spread, y)))

    slope = approx_fprime(np.log(tau), evidence, 1e-6)[1:]
    alive = tau[1:] > 10 * module.LEAST
    assert alive.any() and not alive.all()
    np.testing.assert_allclose(slope[alive], 0.0, atol=1e-4)
    assert (slope[~alive] <= 1e-6).all()
    prior = np.diag(tau[group])
    np.testing.assert_allclose(mean, prior @ h @ np.linalg.solve(noise + h @ prior @ h, y), atol=1e-8)


def test_the_hessian_is_how_the_moments_move() -> None:
    phi, at = features(200, 3)[:, :6], np.random.default_rng(1).normal(0, 0.4, (2, 6))
    h = module._hessian(law(phi, at, THREE), THREE, phi)
    for k in range(12):
        step = np.zeros(12)
        step[k] = 1e-6
        up, down = (moments(phi, at + s * step.reshape(2, 6), THREE).ravel() for s in (1, -1))
        np.testing.assert_allclose(h[:, k], (up - down) / 2e-6, atol=1e-8)


def test_moments_that_no_law_has_end_in_finite_slopes() -> None:
    phi = features(2000, 4)
    for sd in (0.0, SD):
        slope = found(phi, 50 * moments(phi, truth()), sd=sd, patients=2000)
        assert np.isfinite(slope).all() and np.isfinite(law(phi, slope)).all()


def test_too_many_columns_leave_those_that_stand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SLOPES", 9)
    phi = features(4000, 6)
    slope = found(phi, noised(phi, 6), sd=SD)
    size = np.sqrt(np.bincount(GROUPS, weights=(slope**2).sum(axis=0)))[1:]
    assert (size > 0).sum() <= 4
    assert size[2] > 0.6 and size[7] > 0.6
    shifted = noised(phi, 6)
    shifted[:, 0] = 0.2  # the target's own distribution is always matched
    assert moments(phi, found(phi, shifted, sd=SD))[0, 0] == pytest.approx(0.2, abs=1e-3)

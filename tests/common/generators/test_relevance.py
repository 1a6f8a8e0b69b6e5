"""Noised moments of the target: followed as far as the evidence speaks for them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from cohortium.common.generators import relevance as module
from cohortium.common.generators.relevance import believed, hessian, law, moments

COLUMNS, EACH = 15, 2
GROUPS = np.concatenate([[0], np.repeat(np.arange(1, COLUMNS + 1), EACH)])
MATTER = np.isin(GROUPS, (3, 8))
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


def blank(phi: np.ndarray, levels: int = 2) -> np.ndarray:
    return np.zeros((len(phi), levels))


def true_moments(phi: np.ndarray) -> np.ndarray:
    return moments(law(blank(phi), TWO, phi, truth()), TWO, phi)


def noised(phi: np.ndarray, seed: int, sd: float = SD) -> np.ndarray:
    wanted = true_moments(phi)
    noise = np.random.default_rng([seed, 7]).normal(0.0, sd, wanted.shape)
    noise[:, 0] = 0.0
    return wanted + noise


def found(phi: np.ndarray, wanted: np.ndarray, *, sd: float, patients: float = 1e9) -> np.ndarray:
    return believed(blank(phi), TWO, phi, GROUPS, wanted, sd, patients)


def slopes(phi: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """What a straight line makes of moments."""
    p = law(blank(phi), TWO, phi, np.zeros(wanted.shape))
    return np.linalg.solve(hessian(p, TWO, phi), (wanted - moments(p, TWO, phi)).ravel())


def test_what_noise_explains_as_well_is_not_believed() -> None:
    """Beside the noised moments themselves: nearer to the truth, most of all in the slopes that follow from them."""
    noise, left, steep, held, silent = [], [], [], [], []
    for seed in range(12):
        phi = features(4000, seed)
        wanted, true = noised(phi, seed), true_moments(phi)
        got = found(phi, wanted, sd=SD)
        noise.append(((wanted - true) ** 2).mean())
        left.append(((got - true) ** 2).mean())
        steep.append(((slopes(phi, wanted) - slopes(phi, true)) ** 2).mean())
        held.append(((slopes(phi, got) - slopes(phi, true)) ** 2).mean())
        silent.append((np.abs(slopes(phi, got)[~MATTER]) < 0.02).mean())
    assert np.mean(left) < 0.4 * np.mean(noise)
    assert np.mean(held) < 0.1 * np.mean(steep)
    assert np.mean(silent) > 0.5


def test_far_above_the_noise_all_is_believed() -> None:
    phi = features(4000, 1)
    np.testing.assert_allclose(found(phi, true_moments(phi), sd=0.0), true_moments(phi), atol=3e-4)


def test_what_the_generator_says_itself_is_where_it_begins() -> None:
    """Three levels; moments that q(y | x) has already are believed, and half of noise beside them is not followed."""
    phi = features(4000, 2)
    log_q = np.log(law(blank(phi, 3), THREE, phi, truth(2)))
    wanted = moments(np.exp(log_q), THREE, phi)
    np.testing.assert_allclose(believed(log_q, THREE, phi, GROUPS, wanted, SD, 1e9), wanted, atol=1e-3)
    noise = np.random.default_rng(1).normal(0, SD, wanted.shape) * (GROUPS > 0)
    beside = believed(log_q, THREE, phi, GROUPS, wanted + noise, SD, 1e9)
    assert ((beside - wanted) ** 2).sum() < 0.25 * (noise**2).sum()


def test_few_patients_say_less() -> None:
    """Moments of a sample miss those of the law by H / n; no noise was added."""
    error = {}
    for knows in (True, False):
        misses = []
        for seed in range(12):
            phi = features(4000, seed)
            chance = law(blank(phi), TWO, phi, truth())[:150, 1]
            drawn = np.random.default_rng([seed, 3]).random(150) < chance
            wanted = true_moments(phi) + (TWO[drawn.astype(int)].T - (chance - 0.5)) @ phi[:150] / 150
            got = found(phi, wanted, sd=0.0, patients=150 if knows else 1e9)
            misses.append(((slopes(phi, got) - slopes(phi, true_moments(phi)))[1:] ** 2).mean())
        error[knows] = np.mean(misses)
    assert error[True] < 0.5 * error[False]


def test_what_the_generator_knows_varies_with_the_rows_too() -> None:
    """A generator that is right, beside moments of few patients and of other rows: nothing is left to believe."""
    share = []
    for seed in range(8):
        mine, theirs = features(3000, seed), features(1500, seed + 100)
        slope = 2 * truth()
        chance = law(blank(theirs), TWO, theirs, slope)[:, 1]
        drawn = (np.random.default_rng([seed, 9]).random(1500) < chance).astype(int)
        wanted = TWO[drawn].T @ theirs / 1500
        log_q = np.log(law(blank(mine), TWO, mine, slope))
        here = moments(np.exp(log_q), TWO, mine)
        got = believed(log_q, TWO, mine, GROUPS, wanted, 0.001, 1500)
        share.append((((got - here)[:, 1:]) ** 2).sum() / (((wanted - here)[:, 1:]) ** 2).sum())
    assert np.mean(share) < 0.3


def test_the_evidence_is_greatest_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """log N(y; 0, R + H T H) has no slope in log τ where τ was found, and falls where τ was put to nothing."""
    monkeypatch.setattr(module, "TURNS", 20_000)
    monkeypatch.setattr(module, "STILL", 1e-10)
    rng = np.random.default_rng(5)
    root = rng.standard_normal((40, 9))
    h, group = root.T @ root / 40, np.array([0, 1, 1, 2, 2, 3, 3, 4, 4])
    noise = 0.02 * np.eye(9) + h / 300
    y = h @ np.array([0.3, 1.0, -0.5, 0, 0, 0.4, 0.3, 0, 0]) + np.linalg.cholesky(noise) @ rng.standard_normal(9)
    tau, mean = module._evidence(h @ np.linalg.solve(noise, h), h @ np.linalg.solve(noise, y), group)

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
    h = hessian(law(blank(phi, 3), THREE, phi, at), THREE, phi)
    for k in range(12):
        step = np.zeros(12)
        step[k] = 1e-6
        up, down = (
            moments(law(blank(phi, 3), THREE, phi, at + s * step.reshape(2, 6)), THREE, phi).ravel() for s in (1, -1)
        )
        np.testing.assert_allclose(h[:, k], (up - down) / 2e-6, atol=1e-8)


def test_too_many_columns_leave_those_that_stand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SLOPES", 9)
    phi = features(4000, 6)
    wanted = noised(phi, 6)
    wanted[:, 0] = 0.2  # the target's own distribution is always believed
    got = found(phi, wanted, sd=SD)
    assert got[0, 0] == pytest.approx(0.2, abs=1e-3)
    slope = slopes(phi, got)
    assert (np.bincount(GROUPS, weights=np.abs(slope) > 1e-9)[1:] > 0).sum() <= 4
    assert np.abs(slope[GROUPS == 3]).max() > 0.4 and np.abs(slope[GROUPS == 8]).max() > 0.3

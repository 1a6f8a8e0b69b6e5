"""Private column distances: exact without noise, covered intervals with it, silence where it swamps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cohortium.common.evaluation.private import inferred_shares, patient_number, private_columns


def world(
    rng: np.random.Generator, *, columns: int, cells: int, patients: int, shift: float
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Held-out counts, synthetic counts, and the exact distances."""
    held, made, truth = [], [], []
    for _ in range(columns):
        p = rng.dirichlet(np.full(cells, 2.0))
        q = p * np.exp(shift * rng.standard_normal(cells))
        held.append(rng.multinomial(patients, p).astype(float))
        made.append(np.rint(1e6 * q / q.sum()))
        truth.append(0.5 * np.abs(held[-1] / patients - made[-1] / made[-1].sum()).sum())
    return held, made, np.array(truth)


def names(n: int) -> list[str]:
    return [f"c{i}" for i in range(n)]


def test_without_noise_the_distance_is_exact() -> None:
    held, made, truth = world(np.random.default_rng(0), columns=4, cells=6, patients=500, shift=0.3)
    got = private_columns(names=names(4), noised=held, sigma=0.0, synthetic=made)
    assert [c.figure.value for c in got.columns] == pytest.approx(truth, abs=1e-12)
    assert got.mean.figure.value == pytest.approx(1 - truth.mean(), abs=1e-12)
    assert got.patients == pytest.approx(500)


def test_without_noise_the_gap_is_that_of_the_values_present() -> None:
    """Against scipy on the rows themselves; the last cell is missing and takes no part."""
    rng = np.random.default_rng(1)
    real, made = rng.integers(0, 5, 400), rng.integers(0, 5, 700) // 2 * 2
    counts = [np.append(np.bincount(x, minlength=5), lost).astype(float) for x, lost in ((real, 50), (made, 10))]
    got = private_columns(names=["a"], noised=counts[:1], sigma=0.0, synthetic=counts[1:], ordered=[True])
    assert got.ks[0] is not None and got.ks_mean is not None
    wanted = stats.ks_2samp(real, made).statistic
    assert got.ks[0].figure.value == pytest.approx(wanted, abs=1e-12)
    assert got.ks_mean.figure.value == pytest.approx(1 - wanted, abs=1e-12)


def test_inferred_shares_lie_between_the_noised_and_the_synthetic_ones() -> None:
    """Without noise they are the held-out shares; noise that swamps leaves nearly the synthetic ones."""
    held, made = np.array([300.0, 100.0, 100.0]), np.array([1.0, 1.0, 2.0])
    assert inferred_shares([held], 0.0, [made], 500)[0] == pytest.approx(held / 500, abs=1e-15)
    assert inferred_shares([held], 1.0, [made], 500)[0] == pytest.approx(held / 500, abs=0.01)
    assert inferred_shares([held], 5000.0, [made], 500)[0] == pytest.approx(made / 4, abs=0.01)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.8])
def test_intervals_cover_and_the_mean_is_debiased(shift: float) -> None:
    """20 worlds of 8 columns: 160 intervals for distances and as many for gaps, at a nominal 95 %; a right method
    gives fewer than 88 % of either 1 time in 2000. The mean's own interval fails at most 4 times in 20 (1 in 400).

    Planted: the belt without its outer quantiles (TAIL 0.16), or the noised distance itself as the value: red.
    """
    rng = np.random.default_rng([3, int(10 * shift)])
    covered, gaps, mean_covered, errors, naive = [], [], [], [], []
    for seed in range(20):
        held, made, truth = world(rng, columns=8, cells=8, patients=1000, shift=shift)
        noised = [h + 15 * rng.standard_normal(8) for h in held]
        asked = {"names": names(8), "synthetic": made, "ordered": [True] * 8}
        got = private_columns(noised=noised, sigma=15.0, seed=seed, draws=700, **asked)
        exact = private_columns(noised=held, sigma=0.0, **asked)
        for mine, right, found in ((got.columns, exact.columns, covered), (got.ks, exact.ks, gaps)):
            for a, b in zip(mine, right, strict=True):
                assert a is not None and b is not None
                assert a.figure.value is None or a.figure.low <= a.figure.value <= a.figure.high
                found.append(a.figure.value is None or a.figure.low <= b.figure.value <= a.figure.high)
        mean_covered.append(got.mean.figure.low <= 1 - truth.mean() <= got.mean.figure.high)
        errors.append(got.mean.figure.value - (1 - truth.mean()))
        naive.append(
            np.mean([0.5 * np.abs(x / x.sum() - m / m.sum()).sum() for x, m in zip(noised, made)]) - truth.mean()
        )
    assert np.mean(covered) > 0.88 and np.mean(gaps) > 0.88
    assert sum(mean_covered) >= 16
    assert abs(np.mean(errors)) < 0.01
    assert abs(np.mean(errors)) < 0.5 * np.mean(naive)


def test_noise_that_swamps_cannot_be_assessed() -> None:
    held, made, _ = world(np.random.default_rng(0), columns=3, cells=20, patients=300, shift=0.3)
    rng = np.random.default_rng(1)
    noised = [h + 40 * rng.standard_normal(20) for h in held]
    got = private_columns(names=names(3), noised=noised, sigma=40.0, synthetic=made)
    assert all(c.figure.value is None and "noise" in c.figure.reason for c in got.columns)
    drowned = private_columns(names=names(3), noised=noised, sigma=4000.0, synthetic=made)
    assert all(c.figure.value is None for c in drowned.rows())


def test_the_number_of_patients_is_estimated_from_the_noised_counts() -> None:
    rng = np.random.default_rng(2)
    draws = []
    for _ in range(400):
        draws.append(patient_number([rng.normal(0, 10, k) + 700 / k for k in (2, 5, 20)], 10.0))
    values, errors = np.array(draws).T
    assert values.mean() == pytest.approx(700, abs=3 * errors[0] / 20)
    assert 0.9 < values.std() / errors[0] < 1.1


@pytest.mark.parametrize(
    ("sigma", "noised", "made"),
    [
        (-1.0, np.ones(3), np.ones(3)),
        (np.nan, np.ones(3), np.ones(3)),
        (1.0, np.ones(2), np.ones(3)),
        (1.0, np.ones(3), np.zeros(3)),
        (1.0, np.array([np.nan, 1, 1]), np.ones(3)),
    ],
)
def test_counts_that_do_not_fit_are_refused(sigma: float, noised: np.ndarray, made: np.ndarray) -> None:
    with pytest.raises(ValueError):
        private_columns(names=["a"], noised=[noised], sigma=sigma, synthetic=[made])

"""The release primitive: noise of the planned sigma and law, integers, Poisson sampling, local steps, its price."""

from __future__ import annotations

import math
from collections.abc import Callable

import checks
import numpy as np
import pytest
from checks import assert_gaussian, assert_sigma, local_update, noise_of, released, wide
from hospital import counts, gradient, moments, people
from scipy import stats

from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.budget import WHOLE, Event
from cohortium.common.privacy.entropy import Keystream, SeededEntropy
from cohortium.common.privacy.release import UPDATE_LATTICE, Mechanism, lattice_noise
from cohortium.common.queries import LocalSteps

SIGMA = 2.0**20


def draw(size: int, *, seed: int = 0, sigma: float = SIGMA) -> np.ndarray:
    return lattice_noise(Keystream(seed.to_bytes(32, "big")), sigma_units=sigma, size=size)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_the_noise_has_the_planned_sigma,
        checks.check_noise_is_drawn_anew_for_every_release,
        checks.check_noise_comes_from_the_keystream_alone,
        checks.check_answers_are_whole_multiples_of_the_lattice,
        checks.check_what_ran_is_what_is_charged,
        checks.check_sampling_is_poisson,
        checks.check_no_denominator_or_weight_depends_on_the_patients,
    ],
    ids=lambda check: check.__name__,
)
def test_guarantee(check: Callable[[], None]) -> None:
    checks.passes(check)


# ---- sigma and law ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2 / 3, 0.9, 1.1, 3 / 2])
def test_the_test_of_sigma_rejects_a_wrong_one(factor: float) -> None:
    sample = draw(20_000)
    assert_sigma(sample, SIGMA)
    with pytest.raises(AssertionError, match="sigma"):
        assert_sigma(np.rint(sample * factor), SIGMA)
    with pytest.raises(AssertionError, match="mean"):
        assert_sigma(sample + SIGMA * 0.1, SIGMA)


@pytest.mark.parametrize("sigma", [1024.0, 2.0**20, 1e15])
def test_the_noise_is_gaussian(sigma: float) -> None:
    """100,000 draws; false alarm below 2e-7."""
    assert_gaussian(draw(100_000, seed=5, sigma=sigma), sigma)


WRONG: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "Laplace": lambda rng, n: rng.laplace(0, math.sqrt(0.5), n),
    "uniform": lambda rng, n: rng.uniform(-math.sqrt(3), math.sqrt(3), n),
    "four uniforms": lambda rng, n: (rng.random((n, 4)).sum(axis=1) - 2) * math.sqrt(3),
    "cut at 3 sigma": lambda rng, n: np.clip(rng.normal(size=n), -3, 3),
    "2/3 of sigma": lambda rng, n: rng.normal(0, 2 / 3, n),
    "3/2 of sigma": lambda rng, n: rng.normal(0, 3 / 2, n),
    "one in 50 not noised": lambda rng, n: rng.normal(size=n) * (rng.random(n) > 0.02),
}


@pytest.mark.parametrize("law", WRONG)
def test_the_test_of_the_law_rejects_another(law: str) -> None:
    sample = WRONG[law](np.random.default_rng(1), 100_000)
    with pytest.raises(AssertionError):
        assert_gaussian(sample, 1.0)


def test_the_tails_reach_beyond_five_sigma() -> None:
    """2,000,000 draws hold 1.15 beyond 5 sigma on average; at least one here, none beyond 6.5, and about 127
    beyond 4 sigma (Poisson: 59 to 195 is 6 standard deviations)."""
    z = np.abs(draw(2_000_000, seed=2)) / SIGMA
    assert 5 < z.max() < 6.5
    assert 59 <= int((z > 4).sum()) <= 195


def test_both_halves_of_box_and_muller_are_used_and_independent() -> None:
    """The cosine and the sine of one radius: neither their values nor their squares are correlated."""
    z = draw(100_001, seed=3).astype(float)
    one, other = z[:50_000], z[50_001:]
    for power in (1, 2):
        assert abs(np.corrcoef(one**power, other**power)[0, 1]) < 6 / math.sqrt(50_000)
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 6 / math.sqrt(100_000)


def test_all_lattice_points_occur() -> None:
    """Residues modulo 64 are uniform (chi-square, false alarm 1e-7): no lattice within the lattice."""
    counted = np.bincount(draw(200_000, seed=4) % 64, minlength=64)
    assert stats.chisquare(counted).pvalue > 1e-7
    coarse = np.bincount(4 * (draw(200_000, seed=4) // 4) % 64, minlength=64)
    assert stats.chisquare(coarse).pvalue < 1e-7


def test_shares_of_h_sites_sum_to_the_planned_variance() -> None:
    query, records = wide(), people(4)
    for h in (1, 3, 7):
        sites = [SeededEntropy(seed=1, site=f"s{i}") for i in range(h)]
        total = np.sum([noise_of(query, records, noise=1.5, shares=h, entropy=e) for e in sites], axis=0)
        sigma = 1.5 * query.sensitivity_l2 / query.lattice
        assert_sigma(total, sigma)
        assert_gaussian(total, sigma)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1001])
def test_any_length(size: int) -> None:
    assert draw(size).shape == (size,) and draw(size).dtype == np.int64


def test_long_vectors_are_drawn_in_blocks_without_repetition() -> None:
    z = draw((1 << 20) + 5_000, seed=6)
    assert abs(np.corrcoef(z[:5_000], z[1 << 20 :])[0, 1]) < 6 / math.sqrt(5_000)
    assert len(np.unique(z[-5_000:])) > 4_900


@pytest.mark.parametrize("sigma", [0.0, 1023.9, -1e6, math.nan, math.inf, 2.0**57])
def test_noise_too_coarse_or_too_large_for_its_lattice_is_refused(sigma: float) -> None:
    with pytest.raises(ProtocolError, match="RELEASE-NOISE"):
        draw(3, sigma=sigma)


@pytest.mark.parametrize("noise", [1e-4, 1e-9])
def test_a_release_with_hardly_any_noise_is_refused(noise: float) -> None:
    with pytest.raises(ProtocolError, match="RELEASE-NOISE"):
        released(counts(), people(3), noise=noise)


# ---- edges of the docstring ---------------------------------------------------------------------------------


def test_no_patients_give_pure_noise_and_one_patient_is_as_noised_as_any() -> None:
    query = wide()
    nobody = people(1).subset(np.zeros(1, dtype=bool))
    sigma = 3.0 * query.sensitivity_l2 / query.lattice
    assert_sigma(released(query, nobody, noise=3.0).values, sigma)
    for patients in (1, 100):
        assert np.array_equal(
            noise_of(query, people(patients), noise=3.0), released(query, nobody, noise=3.0).values
        ), "noise depends on the records"


def test_noise_off_gives_the_exact_sum_and_no_privacy() -> None:
    records = people(9)
    for query in (counts(), moments(), gradient()):
        answer = released(query, records, noise=0.0)
        assert np.array_equal(answer.values, query.contribution(records).units)
        assert answer.event == Event.non_private()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"noise_multiplier": -1.0}, "RELEASE-NOISE"),
        ({"noise_multiplier": math.nan}, "RELEASE-NOISE"),
        ({"noise_multiplier": math.inf}, "RELEASE-NOISE"),
        ({"noise_multiplier": 1.0, "rate": 0}, "RELEASE-VALUE"),
        ({"noise_multiplier": 1.0, "rate": WHOLE + 1}, "RELEASE-VALUE"),
        ({"noise_multiplier": 1.0, "shares": 0}, "RELEASE-VALUE"),
        ({"noise_multiplier": 1.0, "shares": 1001}, "RELEASE-VALUE"),
    ],
)
def test_a_bad_mechanism_is_refused(options: dict[str, float], code: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Mechanism(**options)  # type: ignore[arg-type]
    assert caught.value.code == code


# ---- sampling -----------------------------------------------------------------------------------------------


def test_the_test_of_poisson_sampling_rejects_batches_of_fixed_size() -> None:
    n, q, draws = 200, 0.3, 500
    bound = 6 * math.sqrt(2 / draws)
    sizes = checks.batch_sizes(draws, n, q)
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) <= bound
    fixed = np.full(draws, round(n * q))
    assert abs(fixed.var() / (n * q * (1 - q)) - 1) > bound
    mostly_fixed = np.random.default_rng(0).binomial(n, q / 4, draws) + round(n * q * 3 / 4)
    assert abs(mostly_fixed.var() / (n * q * (1 - q)) - 1) > bound


def test_everybody_is_in_at_rate_one_and_hardly_anybody_at_a_tiny_rate() -> None:
    records = people(50)
    whole = counts().contribution(records).units
    assert np.array_equal(released(counts(), records, noise=0.0, rate=WHOLE).values, whole)
    assert np.array_equal(released(counts(), records, noise=0.0, rate=WHOLE - 1).values, whole)
    assert not released(counts(), records, noise=0.0, rate=1).values.any()


def test_sampling_takes_all_rows_of_a_patient_or_none() -> None:
    records = people(60, most_rows=5)
    query = counts(columns=(0,))
    for index in range(20):
        answer = released(query, records, noise=0.0, rate=WHOLE // 2, index=index)
        patients = answer.values.sum() * query.lattice  # whole, but for rounding each row's share down
        assert 0 < patients < 60 and abs(patients - round(patients)) < 1e-3


def test_the_noise_does_not_depend_on_who_was_sampled() -> None:
    query = wide()
    nobody = people(1).subset(np.zeros(1, dtype=bool))
    with_people = released(query, people(40), noise=2.0, rate=WHOLE // 2).values[3:]
    assert np.array_equal(with_people, released(query, nobody, noise=2.0, rate=WHOLE // 2).values[3:])


# ---- local steps --------------------------------------------------------------------------------------------


def test_one_local_step_is_the_scaled_negative_gradient() -> None:
    records, query = people(10), gradient()
    update = local_update(records).values * UPDATE_LATTICE
    plain = released(query, records, noise=0.0).values * query.lattice
    assert np.abs(update + 0.5 / 100.0 * plain).max() <= UPDATE_LATTICE


def test_two_local_steps_are_two_single_ones() -> None:
    records, start = people(10), gradient().parameters.astype(np.float64)
    theta = start.copy()
    for _ in range(2):
        at = gradient(parameters=theta.astype(np.float32))
        theta -= 0.5 / 100.0 * (released(at, records, noise=0.0).values * at.lattice)
    both = local_update(records, steps=2).values * UPDATE_LATTICE
    assert np.abs(both - (theta - start)).max() <= UPDATE_LATTICE


def test_the_pull_to_the_start_shortens_the_second_step() -> None:
    records = people(10)
    free, held = (local_update(records, steps=2, fedprox_mu=mu).values for mu in (0.0, 1.0))
    first = local_update(records, steps=1).values
    expected = free - 0.5 * 1.0 * first  # θ₂ = θ₁ − η(g(θ₁) + μ(θ₁ − θ₀)); g is the same on both ways
    assert np.abs(held - expected).max() <= 3


@pytest.mark.parametrize("steps", [1, 4])
def test_every_local_step_is_noised_and_charged(steps: int) -> None:
    """Without records the update is −η/B times the sum of E noises: its variance says how many were drawn."""
    nobody = people(1).subset(np.zeros(1, dtype=bool))
    query = gradient()
    updates = []
    for seed in range(40):
        local = LocalSteps(steps=steps, learning_rate=0.5, denominator=100.0)
        answer = released(gradient(local=local), nobody, noise=2.0, entropy=SeededEntropy(seed=seed, site="a"))
        assert (answer.event, answer.count) == (Event.gaussian(2.0), steps)
        assert answer.lattice == UPDATE_LATTICE
        updates.append(answer.values * answer.lattice)
    sigma = 0.5 / 100.0 * 2.0 * query.sensitivity_l2 * math.sqrt(steps)
    sample = np.concatenate(updates)
    assert abs(np.mean(sample**2) / sigma**2 - 1) <= 6 * math.sqrt(2 / len(sample))


def test_local_steps_with_a_share_of_the_noise_are_refused() -> None:
    local = LocalSteps(steps=2, learning_rate=0.5, denominator=100.0)
    with pytest.raises(ProtocolError, match="RELEASE-VALUE"):
        released(gradient(local=local), people(3), shares=3)


def test_an_update_that_runs_away_is_bounded() -> None:
    local = LocalSteps(steps=1, learning_rate=1e30, denominator=1e-6)
    answer = released(gradient(local=local), people(3), noise=1.0)
    assert np.abs(answer.values).max() <= 2**60

"""What audits prove: bounds that hold as often as they say, against closed forms, scipy and loops, with power."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from cohortium.common.errors import UsageError
from cohortium.common.privacy import accountant, auditing
from cohortium.common.privacy.auditing import (
    Distinguished,
    NoiseTally,
    clopper_pearson,
    distinguish,
    guess,
    one_run_epsilon,
    one_run_p_value,
    planned_guesses,
    same_noise_p_value,
    uniform_bytes_p_value,
)
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.pld import gaussian_epsilon

DELTA = 1e-5

# ---- one run ------------------------------------------------------------------------------------------------


def naive_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 as it is written: a maximum over i of differences of tails."""
    law = stats.binom(r, math.exp(epsilon) / (1 + math.exp(epsilon)))
    tail = law.sf(v - 1)
    slope = max(((law.sf(v - i - 1) - tail) / i for i in range(1, m + 1)), default=0.0)
    return float(min(1.0, tail + 2 * m * delta * max(0.0, slope)))


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3, 0.05])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (10, 10, 0), (40, 20, 15), (40, 40, 40), (100, 30, 29)])
def test_the_p_value_is_the_theorems(m: int, r: int, v: int, delta: float) -> None:
    for epsilon in (0.0, 0.3, 1.0, 4.0):
        found = one_run_p_value(canaries=m, guesses=r, correct=v, epsilon=epsilon, delta=delta)
        assert found == pytest.approx(naive_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-13)


def test_randomised_response_is_audited_exactly() -> None:
    """delta 0: 20 of 20 right is refuted below the epsilon whose own randomised response does it once in 20 times."""
    bound = one_run_epsilon(canaries=20, guesses=20, correct=20, delta=0.0, confidence=0.95)
    right = 0.05 ** (1 / 20)
    assert bound == pytest.approx(math.log(right / (1 - right)), abs=1e-9)
    assert one_run_epsilon(canaries=20, guesses=20, correct=10, delta=0.0, confidence=0.95) == 0.0


def test_the_bound_of_randomised_response_is_right_as_often_as_it_says() -> None:
    """The exact chance of a bound above the true epsilon, over all outcomes: at most 5 %, and not far below."""
    for epsilon, m in ((0.5, 50), (1.0, 200), (2.0, 200)):
        law = stats.binom(m, 1 / (1 + math.exp(-epsilon)))
        wrong = sum(
            float(law.pmf(v))
            for v in range(m + 1)
            if one_run_epsilon(canaries=m, guesses=m, correct=v, delta=0.0, confidence=0.95) > epsilon
        )
        assert 0.01 < wrong <= 0.05, (epsilon, wrong)


def one_run(mu: float, rng: np.random.Generator, canaries: int = 1000) -> float:
    coins = rng.integers(0, 2, canaries)
    scores = mu * coins + rng.normal(size=canaries)
    guesses = planned_guesses(mu=mu, canaries=canaries, delta=DELTA, confidence=0.95)
    correct = int((guess(scores, guesses=guesses) == 2 * coins - 1).sum())
    return one_run_epsilon(canaries=canaries, guesses=guesses, correct=correct, delta=DELTA, confidence=0.95)


@pytest.mark.parametrize(("mu", "least"), [(0.57, 0.3), (1.0, 1.0), (2.0, 2.2)])
def test_a_gaussian_mechanism_is_bounded_from_below_and_never_above(mu: float, least: float) -> None:
    """20 runs of 1,000 canaries: the bound stays below the price, and on average proves the stated part of it."""
    rng = np.random.default_rng(4)
    bounds = [one_run(mu, rng) for _ in range(20)]
    price = accountant.epsilon([(Event.gaussian(1 / mu), 1)], delta=DELTA)
    assert max(bounds) < price and np.mean(bounds) > least, (np.mean(bounds), price)


def test_missing_noise_is_refuted_far_above_any_usual_budget() -> None:
    every = one_run_epsilon(canaries=1000, guesses=1000, correct=1000, delta=DELTA, confidence=0.95)
    assert 5.5 < every < math.log(1000 / -math.log(0.95))
    assert one_run_epsilon(canaries=1000, guesses=1000, correct=1000, delta=0.1, confidence=0.95) == 0.0


def test_a_larger_delta_more_confidence_and_fewer_right_prove_less() -> None:
    given = {"canaries": 500, "guesses": 200, "correct": 180, "delta": DELTA, "confidence": 0.95}
    most = one_run_epsilon(**given)
    for name, value in (("delta", 1e-3), ("confidence", 0.999), ("correct", 170), ("canaries", 500_000)):
        assert one_run_epsilon(**given | {name: value}) < most, name


def test_guesses_are_the_extremes_half_and_half() -> None:
    said = guess(np.array([0.3, -2.0, 5.0, 0.1, 4.0, -1.0, 0.2]), guesses=4)
    assert said.tolist() == [0, -1, 1, 0, 1, -1, 0]
    assert not guess(np.ones(5), guesses=0).any() and np.abs(guess(np.arange(5.0), guesses=5)).all()


def test_the_number_of_guesses_is_planned_from_public_facts() -> None:
    """Weak scores: few guesses, only the surest; strong ones: many. Never odd, never more than there are."""
    few, many = (planned_guesses(mu=mu, canaries=1000, delta=DELTA, confidence=0.95) for mu in (0.7, 4.0))
    assert few < many <= 1000 and few % 2 == many % 2 == 0
    assert planned_guesses(mu=1e-6, canaries=2, delta=0.0, confidence=0.5) == 2


# ---- neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "trials"), [(0, 7), (1, 7), (7, 7), (40, 1000), (999, 1000)])
def test_clopper_and_pearson_as_scipy_has_them(hits: int, trials: int) -> None:
    for confidence in (0.9, 0.95, 0.9999):
        low, high = clopper_pearson(hits, trials, confidence=confidence)
        two_sided = stats.binomtest(hits, trials).proportion_ci(2 * confidence - 1, method="exact")
        assert (low, high) == pytest.approx((two_sided.low, two_sided.high), rel=1e-7, abs=1e-12)


def test_the_bound_on_mu_is_right_as_often_as_it_says() -> None:
    """5,000 audits of a mechanism that is exactly mu-GDP: at most 5 % above it (and 1.2 % more by chance: 4 sd)."""
    rng, n = np.random.default_rng(2), 400
    for mu in (0.5, 2.0):
        rate = float(stats.norm.cdf(-mu / 2))
        both = rng.binomial(n, rate, (5000, 2))
        bounds = [
            Distinguished(false_alarms=a, absent=n, misses=b, present=n, confidence=0.95).mu_low
            for a, b in both.tolist()
        ]
        assert np.mean(np.array(bounds) > mu) <= 0.062
        assert np.mean(bounds) > mu - 0.35


def draws(mean: float, n: int, *, seed: int, d: int = 6) -> np.ndarray:
    out = np.random.default_rng(seed).normal(size=(n, d))
    out[:, 2] += mean
    return out


def test_two_gaussians_are_told_apart_by_nine_tenths_of_their_mu() -> None:
    found = distinguish(draws(0, 9000, seed=1), draws(3, 9000, seed=2), training=1000, confidence=0.9999)
    assert 2.7 <= found.mu_low < found.mu < found.mu_high and found.mu_low < 3 < found.mu_high
    assert found.absent == found.present == 8000


def test_the_test_is_not_judged_on_what_it_was_learned_from() -> None:
    """Equal mechanisms, more numbers than learning releases: learned and judged on the same it would prove mu 2."""
    one, other = (draws(0, 200, seed=seed, d=400) for seed in (3, 4))
    assert distinguish(one, other, training=100, confidence=0.95).mu_low == 0.0
    same = np.vstack([one[:100], one[:100]]), np.vstack([other[:100], other[:100]])
    assert distinguish(*same, training=100, confidence=0.95).mu_low > 1.5


def test_a_direction_of_epsilon_each_and_both() -> None:
    """Alarms are rare and hits are not: adding shows more than removing; the closed form lies above."""
    some = Distinguished(false_alarms=10, absent=20_000, misses=12_000, present=20_000, confidence=0.99)
    add, remove = (some.epsilon_low(delta=DELTA, direction=d) for d in ("add", "remove"))
    assert add > 5.5 and remove < 0.6 and some.epsilon_low(delta=DELTA) == add
    turned = Distinguished(false_alarms=12_000, absent=20_000, misses=10, present=20_000, confidence=0.99)
    assert turned.epsilon_low(delta=DELTA, direction="remove") == pytest.approx(add)
    alarms = clopper_pearson(10, 20_000, confidence=0.995)[1]
    misses = clopper_pearson(12_000, 20_000, confidence=0.995)[1]
    assert add == pytest.approx(math.log((1 - misses - DELTA) / alarms))
    assert some.delta_low(epsilon=2.0) == pytest.approx(1 - misses - math.exp(2.0) * alarms)
    found = distinguish(draws(0, 9000, seed=1), draws(1, 9000, seed=2), training=500, confidence=0.99)
    assert 0 < found.epsilon_low(delta=DELTA) < gaussian_epsilon(1.0, DELTA)


def test_delta_at_an_epsilon_is_nearly_all_of_a_gaussians() -> None:
    one, other = draws(0, 40_000, seed=5), draws(2, 40_000, seed=6)
    found = distinguish(one, other, training=8_000, confidence=0.999, epsilon=1.0)
    true = accountant.delta_for([(Event.gaussian(0.5), 1)], epsilon=1.0)
    assert 0.9 * true < found.delta_low(epsilon=1.0, direction="add") < true


def test_no_noise_at_all_is_told_apart_every_time() -> None:
    still = np.zeros((500, 3)), np.tile([0.0, 1.0, 0.0], (500, 1))
    found = distinguish(*still, training=100, confidence=0.9999)
    assert found.false_alarms == found.misses == 0 and found.mu == math.inf and found.mu_low > 3.9
    equal = distinguish(still[0], still[0], training=100, confidence=0.9999)
    assert equal.mu_low == 0.0 and equal.epsilon_low(delta=0.0) == 0.0


# ---- noise --------------------------------------------------------------------------------------------------

SIGMA = 50_000.0


def tally(sample: np.ndarray) -> NoiseTally:
    out = NoiseTally(sigma=SIGMA)
    for block in np.array_split(np.rint(SIGMA * sample).astype(np.int64), 5):
        out.add(block)
    return out


def test_right_noise_is_found_wrong_as_often_as_the_p_value_says() -> None:
    """200 tallies: no test's p-values are far from uniform, and the smallest of all is not below its share."""
    rng = np.random.default_rng(7)
    found = [tally(rng.normal(size=4000)) for _ in range(200)]
    each = [one.p_values() for one in found]
    for name in each[0]:
        values = np.array([p[name] for p in each])
        assert stats.kstest(np.minimum(values, 1.0), "uniform").pvalue > 1e-4 or name == "tails", name
        assert (values <= 0.1).mean() <= 0.18, name  # tails are discrete: conservative
    assert np.mean([one.p_value() <= 0.05 for one in found]) <= 0.11


def turned(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five blocks whose second half is the first one with other signs: uncorrelated, and of the same sizes."""
    halves = rng.normal(size=(5, n // 10))
    return np.concatenate([halves, halves * rng.choice([-1, 1], halves.shape)], axis=1).ravel()


WRONG: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sigma of 97 in 100": lambda rng, n: rng.normal(0, 0.97, n),
    "sigma of 103 in 100": lambda rng, n: rng.normal(0, 1.03, n),
    "off by a twentieth of sigma": lambda rng, n: rng.normal(0.05, 1, n),
    "Laplace": lambda rng, n: rng.laplace(0, math.sqrt(0.5), n),
    "cut at 3 sigma": lambda rng, n: np.clip(rng.normal(size=n), -3, 3),
    "one in 50 not noised": lambda rng, n: rng.normal(size=n) * (rng.random(n) > 0.02),
    "each number twice": lambda rng, n: np.repeat(rng.normal(size=n // 2), 2),
    "each size twice": turned,
    "a coarser lattice": lambda rng, n: np.rint(rng.normal(size=n) * SIGMA / 4) * 4 / SIGMA,
}


@pytest.mark.parametrize("law", WRONG)
def test_wrong_noise_is_found(law: str) -> None:
    draws = 1_000_000 if "cut" in law else 100_000  # beyond 4 sigma lie six of 100,000
    sample = WRONG[law](np.random.default_rng(1), draws)
    assert tally(sample).p_value() < 1e-6
    assert tally(np.random.default_rng(1).normal(size=100_000)).p_value() > 1e-3


def test_the_interval_of_sigma_covers_it() -> None:
    rng = np.random.default_rng(3)
    hit = []
    for _ in range(400):
        low, high = tally(1.1 * rng.normal(size=1000)).ratio_interval(confidence=0.9)
        hit.append(low <= 1.1 <= high)
    assert 0.84 <= np.mean(hit) <= 0.96


def test_the_same_noise_is_found_with_either_sign_and_under_other_noise() -> None:
    rng = np.random.default_rng(0)
    one, other, third = (np.rint(1e6 * rng.normal(size=2000)).astype(np.int64) for _ in range(3))
    assert same_noise_p_value(one, other) > 1e-3
    assert max(same_noise_p_value(one, x) for x in (one, -one, one + other, third - one)) < 1e-9
    assert same_noise_p_value(np.zeros(200, np.int64), np.zeros(200, np.int64)) == 0.0


def test_bytes_that_are_not_uniform_are_found() -> None:
    rng = np.random.default_rng(0)
    assert uniform_bytes_p_value(rng.bytes(8000)) > 1e-3
    plain = np.rint(1e6 * rng.normal(size=1000)).astype("<i8").tobytes()
    assert uniform_bytes_p_value(plain) < 1e-9


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: one_run_p_value(canaries=5, guesses=6, correct=1, epsilon=1.0, delta=0.0),
        lambda: one_run_p_value(canaries=5, guesses=3, correct=4, epsilon=1.0, delta=0.0),
        lambda: one_run_p_value(canaries=5, guesses=3, correct=1, epsilon=math.nan, delta=0.0),
        lambda: one_run_p_value(canaries=5, guesses=3, correct=1, epsilon=1.0, delta=-0.1),
        lambda: one_run_epsilon(canaries=5, guesses=3, correct=1, delta=0.0, confidence=1.0),
        lambda: guess(np.ones(3), guesses=4),
        lambda: planned_guesses(mu=0.0, canaries=10, delta=0.0, confidence=0.95),
        lambda: clopper_pearson(3, 2, confidence=0.9),
        lambda: clopper_pearson(0, 0, confidence=0.9),
        lambda: distinguish(np.ones((3, 2)), np.ones((3, 3)), training=1, confidence=0.9),
        lambda: distinguish(np.ones((3, 2)), np.ones((3, 2)), training=3, confidence=0.9),
        lambda: NoiseTally(sigma=0.0),
        lambda: NoiseTally(sigma=1.0).p_values(),
        lambda: same_noise_p_value(np.ones(200, np.int64), np.ones(201, np.int64)),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(UsageError) as caught:
        wrong()
    assert caught.value.code == "AUDIT-VALUE"


def test_an_auditor_needs_neither_chance_nor_the_code_it_judges() -> None:
    source = auditing.__dict__
    assert not {"release", "lattice_noise", "Keystream", "random"} & set(source)

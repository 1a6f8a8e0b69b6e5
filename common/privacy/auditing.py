"""What an auditor proves from a mechanism's answers alone: lower bounds on epsilon and mu, and tests of the noise.

    one-run audit   of m canaries each is in by a fair coin; from one run's answers guess the coins (Steinke, Nasr,
                    Jagielski 2023, arXiv 2305.08846): more right guesses than (epsilon, delta) allows refute it
    neighbours      many releases without and with one patient: false alarms and misses of one threshold, bounded by
                    Clopper and Pearson (1934), refute every smaller mu (Dong, Roth, Su 2022) or epsilon
    noise           the law of the noise itself: a few per cent of sigma, which no audit of epsilon resolves

A lower bound never shows that a mechanism is private; a bound above the claimed price shows that it is not.
Statistics only: nothing here draws, reads a record or calls the code that it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, chdtrc, chdtri, expit, ndtr, ndtri
from scipy.stats import binom

from cohortium.common.errors import UsageError

Floats = NDArray[np.float64]
Direction = Literal["add", "remove", "both"]

LARGEST_EPSILON = 64.0
"""Bisection ends here; no audit of fewer than 10^27 guesses reaches it."""
CELLS = 64
RESIDUES = 16
FAR = 4.0
"""Standard deviations from where on the tails are counted apart."""


# ---- one run, many canaries ---------------------------------------------------------------------------------


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """P[at least `correct` of `guesses` are right] at most, if the mechanism is (epsilon, delta)-DP, add-remove.

    canaries: m, each in or out by a fair coin; guesses: r <= m, a number fixed before the run.
    Steinke, Nasr, Jagielski 2023, theorem 5.2: with W ~ Binomial(r, e^eps / (1 + e^eps)) it is
        P[W >= v] + 2 m delta * max over i of P[v - i <= W < v] / i.

    Guarantees: nothing right    1.0          delta 0    randomised response's own tail, exactly
                r = 0            1.0          more right than guessed, or more guessed than there are: UsageError
    """
    if not 0 <= correct <= guesses <= canaries:
        raise UsageError("AUDIT-VALUE", "an audit has at most as many right guesses as guesses, and these as canaries")
    if not (math.isfinite(epsilon) and epsilon >= 0 and 0 <= delta <= 1):
        raise UsageError("AUDIT-VALUE", "an audited epsilon is finite and 0 or more, delta between 0 and 1")
    right = float(expit(epsilon))
    plain = float(binom.sf(correct - 1, guesses, right))
    if correct == 0 or delta == 0:
        return min(1.0, plain)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))  # P[v - i <= W < v], i = 1..v
    slope = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, plain + 2.0 * canaries * delta * slope)


def one_run_epsilon(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Lower bound on epsilon at this delta: too high with probability at most 1 - confidence, whatever the mechanism.

    0.0 where nothing is refuted. If an epsilon is refuted, so is every smaller one, because it promises more.
    """
    _check_confidence(confidence)

    def refuted(epsilon: float) -> bool:
        found = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return found < 1.0 - confidence

    low, high = 0.0, LARGEST_EPSILON
    if not refuted(low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guess(scores: Floats, *, guesses: int) -> NDArray[np.int8]:
    """+1 (in) for the highest scores, -1 (out) for the lowest, 0 (no guess) between: int8 [canaries]."""
    if not 0 <= guesses <= len(scores):
        raise UsageError("AUDIT-VALUE", "there are at most as many guesses as canaries")
    order = np.argsort(scores, kind="stable")
    out = np.zeros(len(scores), dtype=np.int8)
    out[order[: guesses // 2]] = -1
    out[order[len(scores) - (guesses - guesses // 2) :]] = 1
    return out


@lru_cache(maxsize=256)
def planned_guesses(*, mu: float, canaries: int, delta: float, confidence: float) -> int:
    """How many guesses give the best bound if a canary's score moves by mu standard deviations; from public facts.

    The number must not depend on the run: one chosen by its outcome would be many tests at the price of one.
    """
    if not mu > 0 or canaries < 2:
        raise UsageError("AUDIT-VALUE", "guesses are planned for a mu above 0 and two canaries or more")
    grid = np.linspace(-10.0, 10.0 + mu, 4001)
    outside, inside = ndtr(-grid), ndtr(mu - grid)  # P[score > grid] of a canary that is out, that is in
    best, chosen = -1.0, 2
    for share in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        guesses = max(2, 2 * round(share * canaries / 2))
        at = int(np.argmin(np.abs((outside + inside) / 2 - guesses / canaries / 2)))
        accuracy = float(inside[at] / (outside[at] + inside[at]))
        correct = math.floor(guesses * accuracy - math.sqrt(guesses * accuracy * (1 - accuracy)))  # a bad day
        bound = one_run_epsilon(
            canaries=canaries, guesses=guesses, correct=max(0, correct), delta=delta, confidence=confidence
        )
        if bound > best:
            best, chosen = bound, guesses
    return chosen


# ---- two neighbours, many runs ------------------------------------------------------------------------------


def clopper_pearson(hits: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """(lower, upper) bound on a probability, EACH one-sided at this confidence (Clopper & Pearson 1934)."""
    _check_confidence(confidence)
    if not 0 <= hits <= trials or trials < 1:
        raise UsageError("AUDIT-VALUE", "there are at most as many hits as trials, and one trial at least")
    low = 0.0 if hits == 0 else float(betaincinv(hits, trials - hits + 1, 1.0 - confidence))
    high = 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, confidence))
    return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class Distinguished:
    """How well one fixed test tells the releases with a patient from those without.

    false_alarms of `absent` releases, misses of `present` ones. confidence: of each bound below by itself.
    """

    false_alarms: int
    absent: int
    misses: int
    present: int
    confidence: float

    def _rates(self) -> tuple[tuple[float, float], tuple[float, float]]:
        # Two rates a bound: each may be wrong with half of what is left.
        each = 1.0 - (1.0 - self.confidence) / 2
        return (
            clopper_pearson(self.false_alarms, self.absent, confidence=each),
            clopper_pearson(self.misses, self.present, confidence=each),
        )

    @property
    def mu(self) -> float:
        """The mu that the observed rates alone would give; infinite where one of them is 0."""
        return float(-ndtri(self.false_alarms / self.absent) - ndtri(self.misses / self.present))

    @property
    def mu_low(self) -> float:
        """No mu-GDP mechanism with a smaller mu has these rates; 0.0 where nothing is refuted (both directions)."""
        (_, alarms), (_, misses) = self._rates()
        return max(0.0, float(-ndtri(alarms) - ndtri(misses))) if alarms < 1 and misses < 1 else 0.0

    @property
    def mu_high(self) -> float:
        """Of this test and these neighbours; another test may do better, so it bounds no mechanism."""
        (alarms, _), (misses, _) = self._rates()
        return float(-ndtri(alarms) - ndtri(misses)) if alarms > 0 and misses > 0 else math.inf

    def epsilon_low(self, *, delta: float, direction: Direction = "both") -> float:
        """Lower bound on epsilon at this delta: "add" from what alarms show of a patient, "remove" from their absence,
        "both" the larger. All of them hold at once, because they are made of the same two bounds."""
        (_, alarms), (_, misses) = self._rates()
        bounds = {"add": (1.0 - misses - delta, alarms), "remove": (1.0 - alarms - delta, misses)}
        chosen = bounds.values() if direction == "both" else (bounds[direction],)
        return max(0.0, *(math.log(one / other) if one > 0 else 0.0 for one, other in chosen))

    def delta_low(self, *, epsilon: float, direction: Direction = "both") -> float:
        """Lower bound on delta at this epsilon, in the same directions."""
        (_, alarms), (_, misses) = self._rates()
        grown = math.exp(epsilon)
        bounds = {"add": 1.0 - misses - grown * alarms, "remove": 1.0 - alarms - grown * misses}
        return max(0.0, *(bounds.values() if direction == "both" else (bounds[direction],)))


def distinguish(
    absent: Floats, present: Floats, *, training: int, confidence: float, epsilon: float | None = None
) -> Distinguished:
    """Learn a test from the first `training` releases of each kind, judge it on the others.

    absent, present: [releases, numbers], of neighbouring tables. The direction is the difference of the means; the
    threshold the middle between them, the best for two Gaussians, or with `epsilon` the one that shows the largest
    delta there. Of anything else it is an honest test too: what it is judged on was not used to choose it.
    """
    if absent.ndim != 2 or present.ndim != 2 or absent.shape[1] != present.shape[1]:
        raise UsageError("AUDIT-VALUE", "releases are two tables [releases, numbers] of one width")
    if not 1 <= training < min(len(absent), len(present)):
        raise UsageError("AUDIT-VALUE", "some releases are for learning the test and some for judging it")
    without, with_ = absent[:training].mean(axis=0), present[:training].mean(axis=0)
    origin, direction = (without + with_) / 2, with_ - without
    low, high = (absent - origin) @ direction, (present - origin) @ direction
    threshold = 0.0
    if epsilon is not None:
        known = np.concatenate([low[:training], high[:training]])
        weights = np.concatenate([np.full(training, -math.exp(epsilon)), np.ones(training)])
        order = np.argsort(-known, kind="stable")
        threshold = float(known[order[int(np.argmax(np.cumsum(weights[order])))]])
    alarms, hits = low[training:] >= threshold, high[training:] >= threshold
    return Distinguished(
        false_alarms=int(alarms.sum()),
        absent=len(alarms),
        misses=int(len(hits) - hits.sum()),
        present=len(hits),
        confidence=confidence,
    )


# ---- the noise itself ---------------------------------------------------------------------------------------


class NoiseTally:
    """What is left of any number of noise vectors: enough to test their variance, law and independence.

    sigma: the standard deviation that the plan promises, in lattice units. Memory does not grow with the draws.
    """

    def __init__(self, *, sigma: float) -> None:
        if not (math.isfinite(sigma) and sigma > 0):
            raise UsageError("AUDIT-VALUE", "a promised standard deviation is finite and above 0")
        self.sigma = sigma
        self.draws = self.pairs = self.far = 0
        self.total = self.squares = 0.0
        self._next = self._across = self._sizes = 0.0
        self._nexts = 0
        self._cells = np.zeros(CELLS, dtype=np.int64)
        self._residues = np.zeros(RESIDUES, dtype=np.int64)

    def add(self, noise: NDArray[np.int64]) -> None:
        """One release's noise: int64 lattice units. Its two halves are what Box and Muller make of one radius."""
        z = noise / self.sigma
        half = len(z) // 2
        self.draws += len(z)
        self.total += float(z.sum())
        self.squares += float(z @ z)
        self.far += int((np.abs(z) > FAR).sum())
        cells = np.minimum((ndtr(z) * CELLS).astype(np.int64), CELLS - 1)
        self._cells += np.bincount(cells, minlength=CELLS)
        self._residues += np.bincount(noise % RESIDUES, minlength=RESIDUES)
        self._next += float(z[:-1] @ z[1:])
        self._nexts += max(0, len(z) - 1)
        one, other = z[:half], z[len(z) - half :]
        self.pairs += half
        self._across += float(one @ other)
        self._sizes += float((one * one - 1.0) @ (other * other - 1.0))

    def p_values(self) -> dict[str, float]:
        """Each test's two-sided p-value under independent Gaussians of mean 0 and this sigma.

        mean and variance are exact, tails exactly binomial, the others asymptotic in the draws.
        """
        n, spread = self.draws, self.squares
        if n < 1000:
            raise UsageError("AUDIT-VALUE", "a law is tested on 1,000 draws or more")
        low = float(chdtrc(n, spread))
        beyond = 2.0 * float(ndtr(-FAR))
        return {
            "mean": _normal(self.total / math.sqrt(n)),
            "variance": 2 * min(low, 1.0 - low),
            "law": _uniform(self._cells),
            "tails": min(1.0, 2 * min(float(binom.cdf(self.far, n, beyond)), float(binom.sf(self.far - 1, n, beyond)))),
            "lattice": _uniform(self._residues),
            "neighbours": _normal(self._next / math.sqrt(max(1, self._nexts))),
            "halves": _normal(self._across / math.sqrt(max(1, self.pairs))),
            "halves' sizes": _normal(self._sizes / (2.0 * math.sqrt(max(1, self.pairs)))),
        }

    def p_value(self) -> float:
        """All tests as one, by Bonferroni: at most p with probability p if the noise is as promised."""
        each = self.p_values()
        return min(1.0, len(each) * min(each.values()))

    @property
    def ratio(self) -> float:
        """Measured standard deviation over the promised one."""
        return math.sqrt(self.squares / self.draws)

    def ratio_interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval of the true standard deviation over the promised one (chi-squared, mean 0 known)."""
        _check_confidence(confidence)
        left = (1.0 - confidence) / 2
        high = self.squares / float(chdtri(self.draws, 1.0 - left))
        return math.sqrt(self.squares / float(chdtri(self.draws, left))), math.sqrt(high)


def same_noise_p_value(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Of the correlation of two noise vectors: small where part of one is in the other, with either sign."""
    if one.shape != other.shape or one.ndim != 1 or len(one) < 100:
        raise UsageError("AUDIT-VALUE", "two noise vectors are compared over one length of 100 or more")
    a, b = one.astype(np.float64), other.astype(np.float64)
    size = math.sqrt(float(a @ a) * float(b @ b))
    if size == 0.0:
        return 0.0  # no noise at all is the same noise
    return _normal(float(a @ b) / size * math.sqrt(len(a)))


def uniform_bytes_p_value(data: bytes) -> float:
    """Chi-squared of the 256 byte values: what leaves a site in a secure sum looks like nothing else than chance."""
    return _uniform(np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256))


def _normal(z: float) -> float:
    return 2.0 * float(ndtr(-abs(z)))


def _uniform(counts: NDArray[np.int64]) -> float:
    expected = counts.sum() / len(counts)
    return float(chdtrc(len(counts) - 1, float(((counts - expected) ** 2).sum() / expected)))


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise UsageError("AUDIT-VALUE", "a confidence lies between 0 and 1")

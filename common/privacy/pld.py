"""Privacy loss distributions of our mechanisms, on a grid that fits the events; dp_accounting does the rest.

Everything is pessimistic ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380). The grid's interval
is a power of two and a function of the events alone: whoever recomputes an epsilon gets the same number.

A patient in k hospitals counts as k copies. All patients: a Gaussian of k times the sensitivity. Poisson
sampling: every hospital draws for itself, so the number of copies that are in is Binomial(k, q), and the pair
is a mixture of Gaussians at 0..k against one at 0 (Choquette-Choo et al. 2023, arXiv 2310.15526, cor. 4.7).
Replacing one patient's records: the same mixture against its mirror image (Schuchardt et al. 2024, arXiv
2403.04867, group insertions and deletions under Poisson sampling).

dp_accounting and scipy's optimiser and laws are loaded where a price is asked for: they take a second, and most
commands ask for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cohortium.common.late import Late
from cohortium.common.privacy.budget import Relation

if TYPE_CHECKING:
    from scipy import special
else:
    special = Late("scipy.special")

Floats = NDArray[np.float64]
Group = tuple[float, float, int]
"""A sampled mechanism: sampling probability, noise multiplier, how often."""

TAIL = 10.2
"""Standard deviations kept on each side: 2e-24 of the mass lies beyond and goes to infinite loss."""
CELLS = 2**14
LARGEST_LOSS = 2.0**16
SMALLEST_DELTA = 1e-12
"""Below this the FFT's rounding error (about 1e-15 a convolution) would no longer be negligible."""


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of a Gaussian mechanism with sensitivity over noise `mu` (Balle & Wang 2018, theorem 8)."""
    if mu == 0.0:
        return 0.0
    upper = float(special.ndtr(mu / 2 - epsilon / mu))
    return max(0.0, upper - math.exp(min(700.0, epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu)))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon >= 0 whose Gaussian delta is at most `delta`: the closed form that checks the PLDs."""
    if mu == 0.0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    from scipy.optimize import brentq

    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # the concentrated-DP bound lies above
    return float(brentq(lambda e: gaussian_delta(mu, e) - delta, 0.0, high, xtol=1e-13 * high, rtol=1e-13))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian mechanism is (epsilon, delta)-DP; epsilon > 0."""
    from scipy.optimize import brentq

    high = 1.0
    while gaussian_delta(high, epsilon) < delta:
        high *= 2
    return float(brentq(lambda m: gaussian_delta(m, epsilon) - delta, 1e-12, high, xtol=1e-15, rtol=1e-12))


@lru_cache(maxsize=16)
def composed(mu: float, groups: tuple[Group, ...], hospitals: int, relation: Relation) -> Any:
    """The PLD of a Gaussian of total `mu` (one hospital's) and all sampled groups; None: too wide for a grid.

    mu: sqrt(sum of count / noise multiplier**2). The result is a dp_accounting PrivacyLossDistribution.
    """
    interval = _interval(mu, groups, hospitals, relation)
    if interval is None:
        return None
    result = None
    for probability, noise, count in groups:
        one = _sampled(probability, noise, hospitals, relation, interval).self_compose(count)
        result = one if result is None else result.compose(one)
    if mu > 0.0:
        gaussian = _library().from_gaussian_mechanism(
            1.0 / (mu * hospitals),
            value_discretization_interval=interval,
            neighboring_relation=_relation(relation),
        )
        result = gaussian if result is None else result.compose(gaussian)
    return result


def _library() -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution


def _relation(relation: Relation) -> Any:
    from dp_accounting import NeighboringRelation as Neighbouring

    return Neighbouring.ADD_OR_REMOVE_ONE if relation == "add-remove" else Neighbouring.REPLACE_ONE


@lru_cache(maxsize=16)
def _sampled(probability: float, noise: float, hospitals: int, relation: Relation, interval: float) -> Any:
    if hospitals == 1:
        return _library().from_gaussian_mechanism(
            noise,
            value_discretization_interval=interval,
            sampling_prob=probability,
            neighboring_relation=_relation(relation),
        )
    if relation == "replace-one":
        return _library().PrivacyLossDistribution(_mixture(probability, noise, hospitals, "replace", interval))
    return _library().PrivacyLossDistribution(
        _mixture(probability, noise, hospitals, "remove", interval),
        _mixture(probability, noise, hospitals, "add", interval),
    )


def _mixture(probability: float, noise: float, hospitals: int, direction: str, interval: float) -> Any:
    """The pessimistic pmf of Binomial(k, q) copies. The numbers of dp_accounting's mixture, 100 times faster.

    That library inverts the privacy loss one value at a time; the loss is monotone, so we bisect for the
    whole grid at once. An error in a cut-off changes a delta in second order only (it is the maximum there).
    """
    from dp_accounting.pld import pld_pmf

    pair = _Pair(probability, noise, hospitals, direction)
    reach = TAIL * noise
    low = math.floor(float(pair.loss(np.array([reach + hospitals]))[0]) / interval)
    high = math.ceil(float(pair.loss(np.array([-reach - hospitals]))[0]) / interval)
    losses = np.arange(low, high + 1, dtype=np.float64) * interval
    cuts = _decreasing_root(pair.loss, losses, reach + hospitals)
    deltas = np.clip(pair.upper(cuts) - np.exp(losses + pair.log_lower(cuts)), 0.0, 1.0)
    # The trivial test (accept everything) shows delta >= 1 - e^loss; it is exact where no cut-off exists.
    deltas = np.maximum(deltas, -np.expm1(np.minimum(losses, 0.0)))
    deltas = np.maximum.accumulate(deltas[::-1])[::-1]  # undo rounding noise upwards, never downwards
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas)


class _Pair:
    """P and Q of one sampled step in one direction, sensitivity 1, and the falling privacy loss log P/Q."""

    def __init__(self, probability: float, noise: float, hospitals: int, direction: str) -> None:
        from scipy.stats import binom

        copies = np.arange(hospitals + 1, dtype=np.float64)
        weights = binom.pmf(copies, hospitals, probability)
        self.noise = noise
        self.weights, self.log_weights = weights, np.log(weights)
        self.slopes, self.offsets = copies / noise**2, self.log_weights - copies**2 / (2 * noise**2)
        none = np.zeros(1)
        self.left, self.right = {  # shifts of P to the left and of Q to the right
            "remove": (copies, none),
            "add": (none, copies),
            "replace": (copies, copies),
        }[direction]

    def loss(self, x: Floats) -> Floats:
        total = np.zeros_like(x)
        if len(self.left) > 1:
            total = total + special.logsumexp(self.offsets[:, None] - self.slopes[:, None] * x, axis=0)
        if len(self.right) > 1:
            total = total - special.logsumexp(self.offsets[:, None] + self.slopes[:, None] * x, axis=0)
        return total

    def upper(self, x: Floats) -> Floats:
        """P of everything up to x."""
        weights = self.weights if len(self.left) > 1 else np.ones(1)
        return np.asarray(weights @ special.ndtr((x + self.left[:, None]) / self.noise))

    def log_lower(self, x: Floats) -> Floats:
        """log Q of everything up to x."""
        weights = self.log_weights if len(self.right) > 1 else np.zeros(1)
        return np.asarray(
            special.logsumexp(weights[:, None] + special.log_ndtr((x - self.right[:, None]) / self.noise), axis=0)
        )

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the loss under P, by the trapezoid rule."""
        reach = TAIL * self.noise + self.left[-1]
        x = np.linspace(-reach, reach, 2001)
        weights = self.weights if len(self.left) > 1 else np.ones(1)
        density = weights @ np.exp(-(((x + self.left[:, None]) / self.noise) ** 2) / 2)
        density /= density.sum()
        loss = self.loss(x)
        mean = float(density @ loss)
        return mean, float(density @ (loss - mean) ** 2)


def _decreasing_root(function: Callable[[Floats], Floats], targets: Floats, reach: float) -> Floats:
    """x with function(x) = target for each target, by bisection; the ends of [-reach, reach] beyond them."""
    low, high = np.full_like(targets, -reach), np.full_like(targets, reach)
    for _ in range(52):
        middle = (low + high) / 2
        above = function(middle) > targets
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def _interval(mu: float, groups: tuple[Group, ...], hospitals: int, relation: Relation) -> float | None:
    """A power of two, about 1/16384 of the largest loss that matters; None above LARGEST_LOSS.

    At that width the epsilon of 1,000 steps is about 1e-4 too high, relatively, never too low.
    """
    factor = 2.0 if relation == "replace-one" else 1.0
    mu = mu * hospitals * factor
    mean, variance, widest = mu * mu / 2, mu * mu, mu * mu / 2 + TAIL * mu
    for probability, noise, count in groups:
        if noise < 1e-3:
            return None
        pair = _Pair(probability, noise, hospitals, "replace" if relation == "replace-one" else "remove")
        one_mean, one_variance = pair.moments()
        mean, variance = mean + count * one_mean, variance + count * one_variance
        widest = max(widest, float(pair.loss(np.array([-TAIL * noise - hospitals]))[0]))
    span = max(widest, mean + TAIL * math.sqrt(variance))
    if not span <= LARGEST_LOSS:
        return None
    return 2.0 ** min(-1, math.floor(math.log2(span / CELLS)))

"""Intervals for a figure whose noise law is public: Neyman's confidence belt, simulated.

A figure θ (a distance, say) is a function of the true values; a statistic t is computed from the noised ones.
Plausible truths are simulated, each is noised anew by the very mechanism, and for every θ the range holds that t
falls in 95 times in 100. The interval is the set of θ whose range holds the observed t (Neyman 1937, Phil. Trans.
A 236). It covers the true figure at its stated rate whatever bias t has, as long as the simulated truths look like
the true one; a posterior interval would cover on average over truths only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from cohortium.common.evaluation.base import Direction, Figure

LEVEL = 0.95
GRID = 60
TAIL = (1 - LEVEL) / 2
TWO_SIDED = float(special.ndtri(1 - TAIL))


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """low ≤ high; middle: the θ whose median statistic is the observed one (median-unbiased).

    value: halfway between `middle` and the statistic, where that is itself an estimate shrunk to the likely: the
    first has no bias and more spread, the second less spread and a bias the other way.
    """

    low: float
    middle: float
    high: float
    statistic: float | None = None

    @property
    def value(self) -> float:
        """The figure to print, inside the interval."""
        if self.statistic is None:
            return self.middle
        return min(max((self.middle + self.statistic) / 2, self.low), self.high)


def belt(truths: np.ndarray, statistics: np.ndarray, observed: float) -> Interval:
    """The interval for θ from simulated pairs.

    truths, statistics: float64 [draws], the figure and its statistic in each simulated world; truths should spread
    over all that the observation leaves open. At each of GRID values of θ the nearest draws are levelled by a
    straight line; their residuals give the range of t. Where no θ fits (t lies outside every range) the
    interval is the nearest θ alone.
    """
    order = np.argsort(truths, kind="stable")
    theta, t = truths[order], statistics[order]
    starts, width = _windows(len(theta), len(theta) // 12)
    window = starts[:, None] + np.arange(width)
    x, y = theta[window], t[window]
    at = x.mean(axis=1)
    dx = x - at[:, None]
    spread = (dx * dx).sum(axis=1)
    slope = np.where(spread > 0, (dx * y).sum(axis=1) / np.where(spread > 0, spread, 1.0), 0.0)
    level = y.mean(axis=1)
    sd = np.sqrt(((y - level[:, None] - slope[:, None] * dx) ** 2).mean(axis=1))
    # The lines of the outermost windows reach to the outermost truths.
    ends = np.array([theta[0], theta[-1]])
    level = np.concatenate(
        [[level[0] + slope[0] * (ends[0] - at[0])], level, [level[-1] + slope[-1] * (ends[1] - at[-1])]]
    )
    sd, at = np.concatenate([sd[:1], sd, sd[-1:]]), np.concatenate([ends[:1], at, ends[1:]])
    # Tails need more draws than levels do: quantiles of the standardised residuals, over wider windows.
    scaled = (t - np.interp(theta, at, level)) / np.maximum(np.interp(theta, at, sd), 1e-300)
    wide, reach = _windows(len(theta), len(theta) // 4)
    tails = np.quantile(scaled[wide[:, None] + np.arange(reach)], [TAIL, 0.5, 1 - TAIL], axis=1)
    centre = np.array([theta[s : s + reach].mean() for s in wide])
    low_t, middle_t, high_t = (
        optimize.isotonic_regression(level + sd * np.interp(at, centre, tail)).x for tail in tails
    )
    # A large t argues for a large θ: the low end is where the upper range of t reaches the observed one.
    low, middle, high = (_crossing(at, line, observed) for line in (high_t, middle_t, low_t))
    low, high = min(low, high), max(low, high)
    return Interval(low=low, middle=min(max(middle, low), high), high=high, statistic=observed)


def _windows(draws: int, width: int) -> tuple[np.ndarray, int]:
    """(first draws, width) of at most GRID overlapping windows over sorted draws."""
    width = min(draws, max(width, 50))
    return np.unique(np.linspace(0, draws - width, GRID).astype(int)), width


def _crossing(at: np.ndarray, line: np.ndarray, observed: float) -> float:
    """The θ at which a rising line reaches the observed value; the nearest end where it never does."""
    if observed <= line[0]:
        return float(at[0])
    if observed >= line[-1]:
        return float(at[-1])
    i = int(np.searchsorted(line, observed, side="left"))
    rise = line[i] - line[i - 1]
    part = (observed - line[i - 1]) / rise if rise > 0 else 0.0
    return float(at[i - 1] + part * (at[i] - at[i - 1]))


def folded_mean(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E|X| of X ~ N(mean, variance), elementwise (Leone et al. 1961, Technometrics 3)."""
    sd = np.sqrt(np.maximum(variance, 1e-300))
    z = mean / sd
    return np.asarray(sd * np.sqrt(2 / np.pi) * np.exp(-0.5 * z * z) + mean * (1 - 2 * special.ndtr(-z)))


def size_interval(observed: float, sd: float) -> tuple[float, float]:
    """95 % interval of |δ| from one x ~ N(δ, sd²): the belt of the folded normal, with equal tails where they exist.

    Exact coverage for every δ. (0, 0) for an x so small that no |δ| fits.
    """
    x = abs(observed)
    if sd == 0:
        return x, x

    def below(delta: float) -> float:
        return float(special.ndtr((x - delta) / sd) - special.ndtr((-x - delta) / sd))

    low = 0.0 if below(0.0) <= 1 - TAIL else optimize.brentq(lambda d: below(d) - (1 - TAIL), 0.0, x + 10 * sd)
    high = 0.0 if below(0.0) <= TAIL else optimize.brentq(lambda d: below(d) - TAIL, 0.0, x + 10 * sd)
    return float(low), float(high)


def ratio_interval(part: float, rest: float, sd_part: float, sd_rest: float) -> tuple[float, float]:
    """95 % interval of a/(a + b), 0 to 1, from noised a (`part`) and b (`rest`) with independent noise of known SD.

    Fieller's (1954, J. R. Stat. Soc. B 16): the r with |(1−r)a − rb| ≤ 1.96 √((1−r)² sd_part² + r² sd_rest²), a
    quadratic in r. It covers exactly whatever the noise; (0, 1) where every r fits.
    """
    whole = part + rest
    if sd_part == 0 and sd_rest == 0:
        rate = part / whole if whole > 0 else 0.0
        return rate, rate
    a2, b2 = (TWO_SIDED * sd_part) ** 2, (TWO_SIDED * sd_rest) ** 2
    c2, c1, c0 = whole * whole - a2 - b2, -2 * (part * whole - a2), part * part - a2
    root = c1 * c1 - 4 * c2 * c0
    if c2 <= 0 or root < 0 or whole <= 0:
        return 0.0, 1.0  # the noise allows a whole of nothing: any rate
    middle, half = -c1 / (2 * c2), float(np.sqrt(root)) / (2 * c2)
    return min(max(middle - half, 0.0), 1.0), max(min(middle + half, 1.0), 0.0)


def ratio_figure(
    part: float,
    rest: float,
    sd_part: float,
    sd_rest: float,
    *,
    at_most: float,
    reference: float | None = None,
    reference_text: str = "",
    unit: str = "",
    direction: Direction = "none",
    how: str = "",
) -> Figure:
    """a/(a + b) with `ratio_interval`; unknown where nobody is in a + b or the half width is above `at_most`."""
    whole = part + rest
    low, high = ratio_interval(part, rest, sd_part, sd_rest)
    if whole <= 0:
        return Figure.unknown("there is nobody to take a rate of", unit=unit, direction=direction, how=how)
    if (high - low) / 2 > at_most:
        reason = f"the noise leaves it anywhere between {low:.2f} and {high:.2f}"
        return Figure.unknown(reason, unit=unit, direction=direction, how=how)
    return Figure(
        value=min(max(part / whole, low), high),
        low=low,
        high=high,
        reference=reference,
        reference_text=reference_text if reference is not None else "",
        unit=unit,
        direction=direction,
        how=how,
    )


def linear_figure(
    value: float,
    sd: float,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    at_most: float,
    reference: float | None = None,
    reference_text: str = "",
    unit: str = "",
    direction: Direction = "none",
    how: str = "",
) -> Figure:
    """A figure that is linear in the noised numbers: value ± 1.96 sd, both cut to what is possible.

    at_most: largest half width worth printing; a wider one gives Figure.unknown.
    """
    half = TWO_SIDED * sd
    if half > at_most:
        reason = f"the noise leaves it anywhere within ±{half:.2g}"
        return Figure.unknown(reason, unit=unit, direction=direction, how=how)
    ends = np.clip([value - half, value, value + half], low, high)
    return Figure(
        value=float(ends[1]),
        low=float(ends[0]),
        high=float(ends[2]),
        reference=reference,
        reference_text=reference_text if reference is not None else "",
        unit=unit,
        direction=direction,
        how=how,
    )

"""Where a number lies in a picture: linear and logarithmic axes with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from cohortium.common.evaluation.report_text import number

LEAST_LOG = 1e-6
SPANS = 2.0
"""How far beyond the values an interval may stretch an axis, in widths of what the values span."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """An axis from low to high over start to end [drawing units]; log: equal steps are equal ratios.

    Raises ValueError for an empty or, where logarithmic, a non-positive range.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        if not all(map(math.isfinite, ends)) or self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"an axis cannot run from {self.low} to {self.high}")

    def at(self, value: float) -> float:
        """The place of a value; values outside lie on the nearer end."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            part = (inside - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, at_most: int = 6) -> list[tuple[float, str]]:
        """Round values on the axis with their text."""
        found = _log_ticks(self.low, self.high, at_most) if self.log else _ticks(self.low, self.high, at_most)
        gaps = [b - a for a, b in pairwise(found)]
        digits = 0 if not gaps else max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
        if self.log or digits > 5 or any(abs(v) >= 1e5 for v in found):
            return [(v, f"{v:g}".replace("-", "−").replace("e+", "e")) for v in found]
        if any(abs(v) >= 1000 for v in found):
            return [(v, number(v) if abs(v) >= 1000 else f"{v:.0f}".replace("-", "−")) for v in found]
        return [(v, f"{v:.{digits}f}".replace("-", "−")) for v in found]


def _ticks(low: float, high: float, at_most: int) -> list[float]:
    least = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(least))
    unit = next(u * power for u in (1, 2, 5, 10, 20) if (high - low) / (u * power) <= at_most - 1 + 1e-9)
    first = math.ceil(low / unit - 1e-9)
    last = math.floor(high / unit + 1e-9)
    return [k * unit if k else 0.0 for k in range(first, last + 1)]


def _log_ticks(low: float, high: float, at_most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{s * 10.0**p:.6g}") for p in powers for s in steps]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= at_most:
            return found
    return found[:: -(-len(found) // at_most)]


def scale_over(
    values: Iterable[float],
    ends: Sequence[tuple[float, float]] = (),
    *,
    start: float,
    end: float,
    log: bool = False,
    from_zero: bool = False,
) -> Scale:
    """An axis with round ends that holds all values and their intervals, unless one interval would dwarf the rest.

    A logarithmic axis is only made where every value is positive.
    """
    known = sorted(values) or [0.0, 1.0]
    if log and known[0] >= LEAST_LOG:
        lowest = min([known[0], *(max(a, known[0] / 20) for a, _ in ends)])
        highest = max([known[-1], *(min(b, known[-1] * 20) for _, b in ends)])
        if highest / lowest < 1.5:
            lowest, highest = lowest / 1.25, highest * 1.25
        return Scale(low=lowest / 1.05, high=highest * 1.05, start=start, end=end, log=True)
    room = max(SPANS * (known[-1] - known[0]), 2 * median([b - a for a, b in ends] or [0.0]))
    lowest = min([known[0], *(max(a, known[0] - room) for a, _ in ends)])
    highest = max([known[-1], *(min(b, known[-1] + room) for _, b in ends)])
    if from_zero and lowest >= 0:
        lowest = 0.0
    if highest - lowest < 1e-9 * max(1.0, abs(highest)):
        pad = 0.05 * abs(highest) or 0.5
        lowest, highest = lowest - pad, highest + pad
    unit = 10.0 ** math.floor(math.log10((highest - lowest) / 2))
    unit = unit if (highest - lowest) / unit < 8 else 2 * unit
    low, high = math.floor(lowest / unit + 1e-9) * unit, math.ceil(highest / unit - 1e-9) * unit
    return Scale(low=low, high=max(high, low + unit), start=start, end=end)

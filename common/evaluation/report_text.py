"""Numbers as the report prints them: in the page, in its pictures' tables and in the summary.

Epsilons are rounded up, never down. A minus is U+2212, thousands are parted by a thin space.
"""

from __future__ import annotations

import math

from cohortium.common.evaluation.base import Figure

UNKNOWN = "cannot be assessed"


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table cell: fixed digits for small ones, four significant ones for large."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    elif 0 < abs(value) < 0.5 * 10**-digits:
        text = f"{value:.1g}"
    else:
        text = f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.{max(digits - 2, 0)}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%".replace("-", "−")


def amount(value: float) -> str:
    """A count with thin gaps between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")


def epsilon(value: float | None) -> str:
    """An epsilon rounded UP to three decimals, so that what is printed is never less than what was spent."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(value * 1000 - 1e-9) / 1000:.3f}".rstrip("0").rstrip(".")


def lower(value: float) -> str:
    """A lower bound of an epsilon rounded DOWN to three decimals: no more is claimed than was shown."""
    return f"{math.floor(value * 1000 + 1e-9) / 1000:.3f}".rstrip("0").rstrip(".")


def interval(figure: Figure) -> str:
    """Value and interval as text, the ends with as many digits as the value."""
    if figure.value is None:
        return UNKNOWN
    if figure.low is None or figure.high is None:
        return f"{number(figure.value)} (no interval)"
    digits = 3
    if 0 < abs(figure.value) < 0.0005:
        digits = min(math.ceil(-math.log10(abs(figure.value))), 9)
    return f"{number(figure.value)} ({_fixed(figure.low, digits)} to {_fixed(figure.high, digits)})"


def _fixed(value: float, digits: int) -> str:
    """The number without an exponent: what rounds to 0 is 0."""
    return number(round(value, digits), digits)


def reference(figure: Figure) -> str:
    """The reference and the range that sampling alone gives it."""
    if figure.reference is None:
        return "–"
    if figure.reference_low is None or figure.reference_high is None:
        return number(figure.reference)
    return f"{number(figure.reference)} ({number(figure.reference_low)} to {number(figure.reference_high)})"

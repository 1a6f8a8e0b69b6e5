"""What `cohortium analyze` prints: one table an analysis, combined beside naive, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from cohortium.common.evaluation.combining import Combined
from cohortium.server.analysis import RATIOS, Analysed, Analyses

UNKNOWN = "cannot be told"


def tables(found: Analyses) -> Iterator[Table | str]:
    """Printable pieces, in order."""
    percent = f"{100 * found.level:g} %"
    for one in found.found:
        yield _table(one, percent)
        if one.why:
            yield f"Cannot be assessed: {escape(one.why)}."
        elif any(term.combined is None or not term.combined.assessed for term in one.terms):
            yield f"{UNKNOWN}: the noise hides whether this table carries the effect at all."
    yield (
        f"Combined: {found.replicates} replays of the release on {found.patients:,} invented patients (as many as the "
        f"noised number), seed {found.seed}; counts sampling, privacy noise and fit. Free of budget."
    )
    yield (
        f"Naive: the {found.table_rows:,} synthetic rows taken for patients. Its intervals are too short and its "
        "effects too small: do not report them."
    )


def _table(one: Analysed, percent: str) -> Table:
    ratio = RATIOS.get(one.estimand.kind, "estimate")
    table = Table(title=escape(one.estimand.text), title_justify="left")
    table.add_column("")
    table.add_column(f"{ratio}, combined {percent}", justify="right")
    table.add_column("naive, does not cover", justify="right", style="dim")
    for term in one.terms:
        known = term.combined is not None and term.combined.assessed
        shown = _interval(one, *_numbers(term.combined)) if known else UNKNOWN
        beside = _interval(one, *term.naive) if term.naive is not None else "no fit"
        table.add_row(escape(term.name), shown, beside)
    return table


def _numbers(combined: Combined | None) -> tuple[float, float, float]:
    assert combined is not None
    return combined.estimate, combined.low, combined.high


def _interval(one: Analysed, estimate: float, low: float, high: float) -> str:
    if one.estimand.kind in RATIOS:
        estimate, low, high = math.exp(estimate), math.exp(low), math.exp(high)
    # As many digits as the doubt earns: two of the way down, the shorter one of a ratio.
    digits = max(0, min(6, 1 - math.floor(math.log10(estimate - low)))) if estimate > low else 3
    return f"{estimate:.{digits}f}  ({low:.{digits}f} to {high:.{digits}f})"

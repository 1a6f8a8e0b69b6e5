"""The report: one HTML file that opens anywhere, offline, without a script.

`render` turns public facts and scores into the page and computes nothing new: every number on it is in
result.json. Epsilons are rounded up, never down. Column names, titles and sites' names are hostile input:
Jinja escapes all of them, and the pictures escape their own text; a Content-Security-Policy forbids the page
every request.
"""

from __future__ import annotations

import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cohortium.common.evaluation import pictures
from cohortium.common.evaluation.base import ColumnScore, Figure, NamedFigure, ReportFacts, Scores

COLUMNS_DRAWN = 24
ROUNDS_LISTED = 200
PRIVATE_DRAWN = 16
TITLES = {
    "tvd1": "Mean column distance (tvd1)",
    "tvd2": "Mean distance of two-way tables (tvd2)",
    "association_gap": "Mean difference of association",
    "tstr_auc": "AUC trained on synthetic rows",
    "trtr_auc": "AUC trained on real rows",
    "shuffled_auc": "AUC trained on shuffled columns",
    "auc_difference": "AUC difference, synthetic minus real",
}


def render(facts: ReportFacts, scores: Scores | None, out: Path) -> Path:
    """Write the report to `out` (replaced atomically) and return it. Without scores, only facts are shown."""
    text = page(facts, scores)
    part = out.with_name(out.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, out)
    return out


def page(facts: ReportFacts, scores: Scores | None) -> str:
    """The report as HTML text; the same input gives the same bytes."""
    here = resources.files(__package__)
    environment = templates()
    environment.filters |= {"number": number, "percent": percent, "epsilon": epsilon, "interval": interval}
    environment.filters |= {"reference": reference, "amount": amount}
    css = Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
    template = environment.from_string(here.joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        facts=facts,
        scores=scores,
        css=css,
        titles=TITLES,
        drawn=_pictures(facts, scores),
        **_lists(facts, scores),
    )


def templates() -> jinja2.Environment:
    """Whatever is written into a page is escaped; a name that the template uses and nobody gave is an error."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if isinstance(v, Markup) else pictures.clean(v) if isinstance(v, str) else v,
    )


def _pictures(facts: ReportFacts, scores: Scores | None) -> dict[str, Any]:
    """All pictures, each safe to place: pictures.py escapes what it writes."""
    ids = pictures.Identifiers()
    out: dict[str, Any] = {"columns": []}
    if scores is not None:
        out["columns"] = [Markup(pictures.column_picture(ids, c)) for c in worst_columns(scores)]
        maps = scores.associations
        if maps is not None:
            gap = [[s - r for s, r in zip(a, b)] for a, b in zip(maps.synthetic, maps.real)]
            out["maps"] = [
                Markup(pictures.heat_map(ids, maps.names, m, title=t, difference=d))
                for m, t, d in (
                    (maps.real, "Real rows", False),
                    (maps.synthetic, "Synthetic rows", False),
                    (gap, "Synthetic minus real", True),
                )
            ]
        if scores.auc:
            ends = [v for r in scores.auc for v in (r.figure.value, r.figure.low) if v is not None]
            low = min(0.5, _axis(min(ends, default=0.5), 1.0, from_zero=False)[0])
            out["auc"] = Markup(
                pictures.dot_plot(ids, scores.auc, title="Area under the ROC curve", low=low, high=1.0, line=0.5)
            )
    out["private"] = []
    for direction, title in (
        ("higher", "Higher is better"),
        ("lower", "Lower is better"),
        ("none", "Figures"),
    ):
        rows = [r for r in facts.private_scores if r.figure.direction == direction][:PRIVATE_DRAWN]
        known = [
            v for r in rows for v in (r.figure.value, r.figure.low, r.figure.high, r.figure.reference) if v is not None
        ]
        if known:
            axis = _axis(min(known), max(known), from_zero=direction == "lower")
            picture = pictures.dot_plot(ids, rows, title=f"Private evaluation: {title}", low=axis[0], high=axis[1])
            out["private"].append((title, Markup(picture)))
    if facts.plan:
        amounts = [f"ε {epsilon(r.epsilon_cumulated)}" for r in facts.plan]
        out["budget"] = Markup(pictures.burn_down(ids, facts.plan, total=facts.budget.epsilon_total, amounts=amounts))
    if facts.rounds:
        out["rounds"] = Markup(pictures.timeline(ids, sites_of(facts), facts.rounds))
    return out


def _axis(low: float, high: float, *, from_zero: bool) -> tuple[float, float]:
    """Round ends of an axis that holds low and high."""
    start = 0.0 if from_zero and low >= 0 else math.floor(low * 10) / 10
    return start, max(math.ceil(high * 10 - 1e-9) / 10, start + 0.1)


def _lists(facts: ReportFacts, scores: Scores | None) -> dict[str, object]:
    rounds = facts.rounds
    if len(rounds) > ROUNDS_LISTED:
        rounds = tuple(r for r in rounds if r.dropped)[:ROUNDS_LISTED]
    return {
        "worst": [] if scores is None else worst_columns(scores),
        "ranked": [] if scores is None else ranked_columns(scores),
        "sites": sites_of(facts),
        "rounds_listed": rounds,
        "summary": []
        if scores is None
        else [NamedFigure(label=TITLES.get(k, k), figure=f) for k, f in scores.figures.items()],
    }


def ranked_columns(scores: Scores) -> list[ColumnScore]:
    """All columns, the farthest from real rows (beyond their reference) first."""

    def above(figure: Figure) -> float:
        return (figure.value or 0.0) - (figure.reference or 0.0)

    return sorted(scores.columns, key=lambda c: -above(c.tvd))


def worst_columns(scores: Scores) -> list[ColumnScore]:
    """The columns drawn: all in the dictionary's order, or the worst where there are too many."""
    if len(scores.columns) <= COLUMNS_DRAWN:
        return list(scores.columns)
    return ranked_columns(scores)[:COLUMNS_DRAWN]


def sites_of(facts: ReportFacts) -> list[str]:
    """All sites that were ever asked, in order of name."""
    return sorted({s for r in facts.rounds for s in (*r.answered, *r.dropped)})


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table cell: fixed digits for small ones, four significant ones for large."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.{max(digits - 2, 0)}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def amount(value: int) -> str:
    """A count with thin gaps between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def epsilon(value: float | None) -> str:
    """An epsilon rounded UP to three decimals, so that what is printed is never less than what was spent."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(value * 1000 - 1e-9) / 1000:.3f}".rstrip("0").rstrip(".")


def interval(figure: Figure) -> str:
    """Value and interval as text."""
    if figure.value is None:
        return "cannot be assessed"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f} (no interval)"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})".replace("-", "−")


def reference(figure: Figure) -> str:
    """The reference and the range that sampling alone gives it."""
    if figure.reference is None:
        return "–"
    if figure.reference_low is None or figure.reference_high is None:
        return f"{figure.reference:.3f}"
    return f"{figure.reference:.3f} ({figure.reference_low:.3f} to {figure.reference_high:.3f})"

"""The report: one HTML file that opens anywhere, offline, without a script.

`render` turns public facts, findings and scores into the page and computes nothing new: every number on it is in
result.json. Epsilons are rounded up, never down. Column names, titles and sites' names are hostile input:
Jinja escapes all of them, and the pictures escape their own text; a Content-Security-Policy forbids the page
every request.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cohortium.common.evaluation import pictures
from cohortium.common.evaluation.base import ColumnScore, Figure, NamedFigure, ReportFacts, Scores
from cohortium.common.evaluation.findings import Findings
from cohortium.common.evaluation.report_gaps import gaps
from cohortium.common.evaluation.report_sections import blocks
from cohortium.common.evaluation.report_text import amount, epsilon, interval, lower, number, percent, reference
from cohortium.common.text import clean

__all__ = ["Audit", "amount", "epsilon", "page", "render", "source_of", "templates"]

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
TECHNICAL = ("Run", "Plan digest", "Ledger head", "SHA-256", "Seed", "Versions", "Python")
"""What is provenance only; all other lines of it are about the source as well."""

Audit = Mapping[str, Any]
"""A rehearsal's audit: epsilon_lower (a lower bound of ε that an attack has shown) and method, in words.

paths, where given: {path, epsilon_lower, epsilon_charged} of each way into a result. A rehearsal has a plan of its own,
so its bound is judged by what that plan charged, never by the ε of the study.
"""


def render(
    facts: ReportFacts, scores: Scores | None, out: Path, findings: Findings | None = None, audit: Audit | None = None
) -> Path:
    """Write the report to `out` (replaced atomically) and return it. Without scores and findings: the facts."""
    text = page(facts, scores, findings, audit)
    part = out.with_name(out.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, out)
    return out


def page(
    facts: ReportFacts, scores: Scores | None, findings: Findings | None = None, audit: Audit | None = None
) -> str:
    """The report as HTML text; the same input gives the same bytes. Raises ValueError for an audit without a bound."""
    checked(audit)
    here = resources.files(__package__)
    environment = templates()
    environment.loader = jinja2.FunctionLoader(lambda name: here.joinpath(name).read_text(encoding="utf-8"))
    environment.filters |= {"number": number, "percent": percent, "epsilon": epsilon, "interval": interval}
    environment.filters |= {"reference": reference, "amount": amount, "at_least": lower}
    ids = pictures.Identifiers()
    return environment.get_template("report.html.j2").render(
        facts=facts,
        scores=scores,
        findings=findings,
        judged=findings is not None and bool(findings.verdicts),
        audit=audit,
        guaranteed=guaranteed(facts),
        broken=broken(audit),
        css=Markup(here.joinpath("report.css").read_text(encoding="utf-8")),
        titles=TITLES,
        drawn=_pictures(ids, facts, scores),
        blocks=blocks(ids, findings, scores),
        gaps=gaps(facts, findings, scores),
        source=source_of(facts, scores, findings),
        **_lists(facts, scores),
    )


def checked(audit: Audit | None) -> None:
    """Raises ValueError for an audit that does not say its bound and its method."""
    if audit is None:
        return
    bound, method = audit.get("epsilon_lower"), audit.get("method")
    if not _is_epsilon(bound) or not isinstance(method, str) or not method:
        raise ValueError("an audit has epsilon_lower, a number, and method, a text")
    for path in audit.get("paths", ()):
        numbers = _is_epsilon(path.get("epsilon_lower")) and isinstance(path.get("epsilon_charged"), (int, float))
        if not numbers or not isinstance(path.get("path"), str):
            raise ValueError("each path of an audit has path, a text, epsilon_lower and epsilon_charged, numbers")


def _is_epsilon(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def broken(audit: Audit | None) -> bool:
    """Whether an attack found more than the proof of the very same rehearsal allows."""
    paths = () if audit is None else audit.get("paths", ())
    return any(path["epsilon_lower"] > path["epsilon_charged"] for path in paths)


def guaranteed(facts: ReportFacts) -> bool:
    """Whether the statement promises anything: not without noise, and not with noise that can be computed again."""
    return math.isfinite(facts.budget.epsilon_spent) and not facts.statement.startswith("NOT PRIVATE")


def templates() -> jinja2.Environment:
    """Whatever is written into a page is escaped; a name that the template uses and nobody gave is an error."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if isinstance(v, Markup) else clean(v) if isinstance(v, str) else v,
    )


def source_of(facts: ReportFacts, scores: Scores | None, findings: Findings | None) -> list[tuple[str, str]]:
    """What was learned from, in a few lines: the study, its sites, dictionary and patients."""
    sites = sites_of(facts)
    lines = [("Study", facts.study_id)] if "Study" not in facts.provenance else []
    if sites:
        lines.append((f"{len(sites)} hospitals asked", ", ".join(sites)))
    if findings is not None and findings.patients is not None:
        many = findings.patients * findings.rows_per_patient
        lines.append((f"Held-out {findings.counted}, inferred from noised counts", f"about {amount(many)}"))
    if scores is not None:
        lines.append(("Synthetic rows scored", amount(scores.synthetic_rows)))
        lines.append(("Columns", amount(len(scores.columns))))
        real = f"{amount(scores.real_rows)} rows of {amount(scores.real_patients)} patients: {scores.basis}"
        lines.append(("Real rows compared, simulation only", real))
    return lines + [(k, v) for k, v in facts.provenance.items() if not k.startswith(TECHNICAL)]


def _pictures(ids: pictures.Identifiers, facts: ReportFacts, scores: Scores | None) -> dict[str, Any]:
    """All pictures, each safe to place: pictures.py escapes what it writes."""
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

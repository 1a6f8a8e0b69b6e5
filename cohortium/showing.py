"""How the public types look: a line on a terminal, a small table or picture in a notebook.

`dress(kind)` gives a type its `__repr__` and `_repr_html_` when the public API first hands it out, so that the types
themselves know nothing of notebooks. HTML holds no script and asks for nothing; every text is escaped, because names
of studies, sites and columns are whatever somebody typed. Colours suit light and dark pages: text has the page's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cohortium import Run
    from cohortium.common.evaluation.base import Figure, Scores
    from cohortium.common.evaluation.pictures import Identifiers
    from cohortium.common.privacy.plan import Plan
    from cohortium.common.study import Study
    from cohortium.server.analysis import Analyses
    from cohortium.server.audit import AuditReport

STYLE = """<style>
.cohortium { color: inherit; max-width: 820px; line-height: 1.45; }
.cohortium table { border-collapse: collapse; margin: 6px 0; font-size: 0.92em; font-variant-numeric: tabular-nums; }
.cohortium caption { text-align: left; padding: 2px 0; opacity: 0.85; }
.cohortium th, .cohortium td { text-align: right; padding: 2px 10px; border-bottom: 1px solid rgba(128,128,128,0.35);
 background: transparent; color: inherit; white-space: normal; }
.cohortium th.name, .cohortium td.name { text-align: left; }
.cohortium p { margin: 4px 0; }
.cohortium .warning { border: 2px solid #d9532b; padding: 4px 8px; font-weight: bold; }
.cohortium .pictures { display: flex; flex-wrap: wrap; gap: 10px; }
.cohortium svg { width: 360px; max-width: 100%; height: auto; font-size: 11.5px; }
.cohortium .pictures svg { width: 250px; }
.cohortium svg text { fill: currentColor; stroke: none; }
.cohortium svg .small { font-size: 10px; opacity: 0.8; }
.cohortium svg .syn, .cohortium svg .dot { fill: #2a86c7; }
.cohortium svg .before { fill: #2a86c7; fill-opacity: 0.3; }
.cohortium svg .band { fill: #8c959f; fill-opacity: 0.5; }
.cohortium svg .real { stroke: currentColor; stroke-width: 1.8; fill: none; }
.cohortium svg .grid { stroke: rgba(128,128,128,0.4); fill: none; }
.cohortium svg .limit { stroke: #d9772b; stroke-width: 2; stroke-dasharray: 5 3; fill: none; }
.cohortium svg .whisker { stroke: #2a86c7; stroke-width: 3; fill: none; }
.cohortium svg .mark { stroke: #d9772b; stroke-width: 2.5; fill: none; }
</style>"""
COLUMNS_SHOWN = 6
"""Pictures of the columns that differ most."""
Html = Callable[[Any], str]


def dress(kind: type) -> type:
    """The same type, with how it looks; a type of which nothing is known stays as it is."""
    found = LOOKS.get(kind.__name__)
    if found is not None and "_repr_html_" not in vars(kind):
        line, page = found
        setattr(kind, "__repr__", line)  # noqa: B010  a type's own method, for mypy an assignment to a method
        setattr(kind, "_repr_html_", page)  # noqa: B010
    return kind


# ---- one line ---------------------------------------------------------------------------------------------------


def study_line(study: Study) -> str:
    privacy = study.privacy
    return (
        f"<Study {study.id!r}: {len(study.schema.modelled)} columns, ε = {privacy.epsilon:g} at δ = {privacy.delta:g}, "
        f"{study.generator.name}, {study.strategy.name}>"
    )


def plan_line(plan: Plan) -> str:
    noise = "" if plan.private else ", noise OFF: not private"
    return (
        f"<Plan of {plan.study!r}: {plan.releases} releases over {len(plan.sites)} sites, ε = {plan.epsilon:g} at "
        f"δ = {plan.delta:g}{noise}>"
    )


def run_line(run: Run) -> str:
    loud = ", NOT private" if run.warnings else ""
    return f"<Run {run.result['run']!r} in {str(run.directory)!r}{loud}>"


def scores_line(scores: Scores) -> str:
    figures = (
        f"{name} {_number(scores.figures[name])}" for name in ("tvd1", "tvd2", "tstr_auc") if name in scores.figures
    )
    return f"<Scores against {scores.basis}, NOT private: {', '.join(figures)}>"


def audit_line(report: AuditReport) -> str:
    bad = sum(not check.ok for check in report.checks)
    return f"<AuditReport: {len(report.checks)} checks, {'everything holds' if report.ok else f'{bad} FAILED'}>"


def analyses_line(found: Analyses) -> str:
    names = ", ".join(repr(one.estimand.text) for one in found.found)
    return f"<Analyses of {found.run!r}: {names}; {found.replicates} replays>"


# ---- in a notebook ----------------------------------------------------------------------------------------------


def study_page(study: Study) -> str:
    privacy, evaluation = study.privacy, study.evaluation
    rows = [
        ("Title", study.title),
        ("Privacy", f"ε = {privacy.epsilon:g}, δ = {privacy.delta:g}, unit {privacy.unit!r}"),
        ("Hospitals of a patient", privacy.hospitals_per_patient),
        ("Generator", study.generator.name),
        ("Strategy", study.strategy.name),
        ("Sites", ", ".join(study.sites) or "not named: plan(study, sites=…)"),
        ("Columns", ", ".join(column.name for column in study.schema.modelled)),
        ("Target", study.target or "none"),
        ("Evaluation", "none" if evaluation is None else f"ε = {evaluation.epsilon:g} of held-out patients"),
        ("Publishes", f"{study.release.rows:,} rows" if study.release.rows else "as many rows as patients"),
    ]
    return _page(_table(f"Study {study.id}", (), rows))


def plan_page(plan: Plan) -> str:
    from cohortium.common.evaluation.base import PlanRow
    from cohortium.common.evaluation.pictures import burn_down
    from cohortium.common.privacy.budget import WHOLE, rounded_up

    rows, drawn, amounts = [], [], []
    for stage, epsilon in plan.cumulated():
        amounts.append(rounded_up(epsilon))
        rows.append(
            (stage.name, stage.repeats, f"{stage.rate / WHOLE:g}", f"{stage.noise_multiplier:.3g}", amounts[-1])
        )
        drawn.append(
            PlanRow(
                id=stage.name,
                purpose=stage.purpose,
                kind=stage.kind,
                repeats=stage.repeats,
                sampling_rate=stage.rate / WHOLE,
                noise_multiplier=stage.noise_multiplier,
                epsilon_cumulated=epsilon,
            )
        )
    head = ("phase", "releases", "sampling", "noise σ/Δ", "ε so far")
    title = f"Plan of {plan.study}: {plan.releases} releases over {len(plan.sites)} sites; no data was read"
    warning = () if plan.private else ("The noise is off: this plan protects nobody.",)
    picture = burn_down(_ids(), drawn, total=plan.epsilon, amounts=amounts)
    return _page(*map(_warning, warning), _table(title, head, rows), _text(plan.statement().sentence()), picture)


def run_page(run: Run) -> str:
    from cohortium.common.evaluation.base import ReportFacts
    from cohortium.common.evaluation.pictures import burn_down
    from cohortium.common.privacy.budget import rounded_up

    result = run.result
    facts = ReportFacts.from_json(result["facts"])
    parts = [_text(facts.title, "strong"), _text(run.statement), *map(_warning, run.warnings)]
    verdicts = result.get("verdicts") or ()
    if verdicts:
        told = [(tile["use"], tile["word"]) for tile in verdicts]
        parts.append(_table("Fit for, by private figures of held-out patients", ("use", "verdict"), told, names=2))
    prices = [
        (row["relation"], row["hospitals"], rounded_up(float(row["epsilon"]))) for row in result["privacy"]["prices"]
    ]
    parts.append(_table("The same loss in other units", ("relation", "hospitals of a patient", "ε"), prices))
    amounts = [rounded_up(row.epsilon_cumulated) for row in facts.plan]
    parts.append(burn_down(_ids(), facts.plan, total=facts.budget.epsilon_total, amounts=amounts))
    files = f"Files in {run.directory}: report.html, synthetic.parquet, synthetic.csv, summary.pdf, result.json"
    return _page(*parts, _text(files))


def scores_page(scores: Scores) -> str:
    from cohortium.common.evaluation.pictures import column_picture, dot_plot
    from cohortium.common.evaluation.report import TITLES

    rows = [(TITLES.get(name, name), *_cells(figure)) for name, figure in scores.figures.items()]
    head = ("figure", "synthetic", "95 % interval", "real", "shuffled")
    loud = "These scores saw real rows without noise: they are for you, not for publication."
    parts = [_text(scores.headline, "strong"), _warning(loud), _table(f"Compared with {scores.basis}", head, rows)]
    if scores.verdicts:
        tiles = [(verdict.use, verdict.word, verdict.sentence) for verdict in scores.verdicts]
        parts.append(_table("Fit for", ("use", "verdict", "why"), tiles, names=3))
    if scores.auc:
        parts.append(dot_plot(_ids(), scores.auc, title="Area under the ROC curve", low=0.0, high=1.0, line=0.5))
    worst = sorted(scores.columns, key=lambda column: -(column.tvd.value or 0.0))[:COLUMNS_SHOWN]
    if worst:
        drawn = "".join(f"<div>{_text(column.name)}{column_picture(_ids(), column)}</div>" for column in worst)
        parts.append(_text("Columns that differ most: bars synthetic, line and band real."))
        parts.append(f'<div class="pictures">{drawn}</div>')
    return _page(*parts)


def audit_page(report: AuditReport) -> str:
    from cohortium.common.privacy.budget import rounded_up

    rows = [("✓ holds" if check.ok else "✗ FAILED", check.name, check.detail) for check in report.checks]
    parts = [_text(f"Audit of {report.directory}", "strong")]
    bad = sum(not check.ok for check in report.checks)
    parts.append(_text("Everything holds.") if report.ok else _warning(f"{bad} checks failed."))
    parts.append(_table("Checks", ("", "check", "found"), rows, names=3))
    if report.epsilons:
        told = [(row["relation"], row["hospitals"], rounded_up(float(row["epsilon"]))) for row in report.epsilons]
        title = "ε, worked out again from the ledgers" + ("" if report.delta is None else f", δ = {report.delta:g}")
        parts.append(_table(title, ("relation", "hospitals of a patient", "ε"), told))
    return _page(*parts)


def analyses_page(found: Analyses) -> str:
    from cohortium.server.analysis import RATIOS
    from cohortium.server.analysis_shown import UNKNOWN, _interval

    parts = []
    for one in found.found:
        rows = []
        for term in one.terms:
            known = term.combined
            shown = UNKNOWN
            if known is not None and known.assessed:
                shown = _interval(one, known.estimate, known.low, known.high)
            rows.append((term.name, shown, "no fit" if term.naive is None else _interval(one, *term.naive)))
        ratio = RATIOS.get(one.estimand.kind, "estimate")
        head = ("", f"{ratio}, combined {100 * found.level:g} %", "naive, does not cover")
        parts.append(_table(one.estimand.text, head, rows))
        if one.why:
            parts.append(_text(f"Cannot be assessed: {one.why}."))
    told = f"{found.replicates} replays on {found.patients:,} invented patients (the noised number). Free of budget."
    return _page(*parts, _text(told))


LOOKS: dict[str, tuple[Html, Html]] = {
    "Analyses": (analyses_line, analyses_page),
    "AuditReport": (audit_line, audit_page),
    "Plan": (plan_line, plan_page),
    "Scores": (scores_line, scores_page),
    "Study": (study_line, study_page),
}


# ---- pieces -----------------------------------------------------------------------------------------------------

_numbers = count(1)


def _ids() -> Identifiers:
    """Ids of pictures, unique over a notebook's outputs: screen readers find a picture's title by them."""
    from cohortium.common.evaluation.pictures import Identifiers

    class Unique(Identifiers):
        def __call__(self) -> str:
            return f"cohortium-{next(_numbers)}-"

    return Unique()


def _page(*parts: str) -> str:
    return f'<div class="cohortium">{STYLE}{"".join(parts)}</div>'


def _text(text: object, tag: str = "span") -> str:
    return f"<p><{tag}>{_escape(text)}</{tag}></p>"


def _warning(text: object) -> str:
    return f'<p class="warning">{_escape(text)}</p>'


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, names: int = 1) -> str:
    """names: how many columns hold words, which stand left."""
    if not head:  # names beside values
        body = "".join(
            f'<tr><th scope="row" class="name">{_escape(name)}</th><td class="name">{_escape(value)}</td></tr>'
            for name, value in rows
        )
        return f"<table><caption>{_escape(title)}</caption><tbody>{body}</tbody></table>"

    def line(cells: Sequence[object], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        made = (
            f"<{tag}{scope}{' class=' + chr(34) + 'name' + chr(34) if at < names else ''}>{_escape(cell)}</{tag}>"
            for at, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><caption>{_escape(title)}</caption><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    if figure.value is None:
        return "cannot be assessed", "", "", ""
    between = "" if figure.low is None else f"{figure.low:.3f} – {figure.high:.3f}"
    rest = ("" if value is None else f"{value:.3f}" for value in (figure.reference, figure.floor))
    return (f"{figure.value:.3f}", between, *rest)  # type: ignore[return-value]


def _number(figure: Figure) -> str:
    return "unknown" if figure.value is None else f"{figure.value:.3f}"


def _escape(text: object) -> str:
    from cohortium.common.evaluation.pictures import escape

    return escape(text)

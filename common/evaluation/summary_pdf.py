"""The summary: two A4 pages, whatever the study, made from the same facts as the report.

Page 1: statement, verdict per use, key figures with interval and reference. Page 2: a few pictures, what could not be
assessed, provenance and hashes. What does not fit is cut, and the cut is said; report.html and result.json have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cohortium.common.evaluation import summary_pictures as drawn
from cohortium.common.evaluation.base import ColumnScore, Figure, ReportFacts, Scores, Verdict
from cohortium.common.evaluation.findings import Curves, Findings, Shares
from cohortium.common.evaluation.report import TITLES as SCORE_TITLES
from cohortium.common.evaluation.report import Audit, broken, checked, guaranteed, ranked_columns
from cohortium.common.evaluation.report_gaps import gaps
from cohortium.common.evaluation.report_sections import TITLES, is_main, ranked_shares
from cohortium.common.evaluation.report_text import amount, epsilon, interval, lower, number, reference
from cohortium.common.evaluation.summary_pictures import Box, Row
from cohortium.common.evaluation.summary_sheet import (
    AMBER,
    BLUE,
    BOLD,
    CODE,
    GREEN,
    HEIGHT,
    INK,
    LINE,
    PLAIN,
    RED,
    SOFT,
    WIDTH,
    Sheet,
    printable,
    wrap,
)

LEFT, RIGHT = 40.0, WIDTH - 40.0
BOTTOM = HEIGHT - 40.0
COLOURS = {"good": GREEN, "usable with care": AMBER, "not fit": RED}
TILES = 6
FIGURES_OF_A_SECTION = (9, 7, 5, 4, 3, 2, 1)
"""How many at most: the first of these with which all sections fit."""
STEP = 13.0
COLUMNS = 6


def write_summary(
    facts: ReportFacts, scores: Scores | None, findings: Findings | None, audit: Audit | None, out: Path
) -> Path:
    """Write the two pages to `out` (replaced atomically) and return it; the same input gives the same bytes."""
    checked(audit)
    judged = findings if findings is not None and findings.verdicts else None
    title = facts.title or facts.study_id
    sheet = Sheet(title=f"{title} – summary of the synthetic data report", subject=facts.statement)
    _first(sheet, facts, scores, judged, audit)
    _footer(sheet, 1)
    sheet.page()
    _second(sheet, facts, scores, findings)
    _footer(sheet, 2)
    sheet.page()
    return sheet.save(out)


def _first(
    sheet: Sheet, facts: ReportFacts, scores: Scores | None, findings: Findings | None, audit: Audit | None
) -> None:
    room = RIGHT - LEFT
    y = sheet.paragraph(LEFT, 34, facts.title or facts.study_id, room=room, lines=2, size=17, font=BOLD, tag="H1")
    about = [f"Study {facts.study_id}", facts.mode]
    about += [f"{amount(scores.synthetic_rows)} synthetic rows scored"] if scores else []
    y = sheet.paragraph(LEFT, y + 2, " · ".join(about), room=room, lines=1, size=8.5, colour=SOFT)
    y += 8
    top = y
    # The statement is never cut: it shrinks, and then takes what room it needs.
    size = next((s for s in (10.5, 9.5, 8.5) if len(wrap(facts.statement, room - 10, s, lines=9)) <= 4), 7.5)
    end = sheet.paragraph(LEFT + 10, y, facts.statement, room=room - 10, lines=20, size=size)
    y = sheet.paragraph(LEFT + 10, end + 2, _privacy(facts, audit), room=room - 10, lines=5, size=8.5, colour=SOFT)
    sheet.rectangle(LEFT, top, 3, y - top + 2, fill=BLUE)
    y += 6
    notes = list(facts.warnings)
    if broken(audit):
        notes.insert(0, "Do not release: the attack on the rehearsal found more than the rehearsal's proof allows.")
    for note in notes[:3]:
        y = sheet.paragraph(LEFT, y, f"Note: {note}", room=room, lines=2, size=8, colour=RED) + 2
    if len(notes) > 3:
        y = sheet.paragraph(LEFT, y, f"{len(notes) - 3} more notes are in the report.", room=room, lines=1, colour=RED)
    y = sheet.paragraph(LEFT, y + 4, "Verdict per use", room=room, lines=1, size=12, font=BOLD, tag="H2") + 2
    if findings is None and scores is None:
        y = sheet.paragraph(LEFT, y, "No comparison with real rows was made.", room=room, lines=1)
        return
    headline = findings.headline if findings is not None else scores.headline if scores is not None else ""
    y = sheet.paragraph(LEFT, y, headline, room=room, lines=3, size=10, font=BOLD) + 4
    verdicts = findings.verdicts if findings is not None else scores.verdicts if scores is not None else ()
    y = _tiles(sheet, verdicts, y)
    if findings is not None and scores is not None:
        words = "; ".join(f"{v.use}: {v.word}" for v in scores.verdicts)
        y = sheet.paragraph(LEFT, y, f"Exact, simulation only: {words}.", room=room, lines=3, size=8, colour=SOFT)
    y = sheet.paragraph(LEFT, y + 6, "Key figures", room=room, lines=1, size=12, font=BOLD, tag="H2")
    fits = int((BOTTOM - y - 16) / STEP) - 1
    _figures(sheet, _key_figures(scores, findings, fits), y + 2, fits)


def _privacy(facts: ReportFacts, audit: Audit | None) -> str:
    b = facts.budget
    text = f"Proven for one patient: ε = {epsilon(b.epsilon_spent)} of {epsilon(b.epsilon_total)} at δ = {b.delta:g}."
    if not guaranteed(facts):
        text = f"By the plan, with fresh noise: ε = {epsilon(b.epsilon_spent)} at δ = {b.delta:g}."
        text += " This run has no guarantee."
    if audit is None:
        return f"{text} No audit of a rehearsal is recorded."
    bound = lower(audit["epsilon_lower"])
    return f"{text} Audited in a rehearsal with a plan of its own: ε is at least {bound} ({audit['method']})."


def _tiles(sheet: Sheet, verdicts: Sequence[Verdict], y: float) -> float:
    across, gap = 3, 8.0
    width = (RIGHT - LEFT - gap * (across - 1)) / across
    height = 92.0
    for n, tile in enumerate(verdicts[:TILES]):
        x, top = LEFT + (n % across) * (width + gap), y + (n // across) * (height + gap)
        colour = COLOURS.get(tile.word, SOFT)
        sheet.rectangle(x, top, width, height, stroke=LINE)
        sheet.rectangle(x, top, width, 3, fill=colour)
        room = width - 14
        at = sheet.paragraph(x + 7, top + 6, tile.use, room=room, lines=2, size=8.5, font=BOLD, tag="H3")
        at = sheet.paragraph(x + 7, at, tile.word, room=room, lines=1, size=12, font=BOLD, colour=colour)
        figure, shown = tile.figure, ""
        if figure.value is not None and number(figure.value) not in tile.sentence:
            shown = f"{interval(figure)}. "
        small = wrap(printable(shown + tile.thresholds), room, 6.5, lines=3)
        left = int((top + height - at - 6 - 8.2 * len(small)) / (7.5 * 1.25))
        sheet.paragraph(x + 7, at + 1, tile.sentence, room=room, lines=left, size=7.5)
        below = top + height - 5 - 8.2 * len(small)
        sheet.paragraph(x + 7, below, shown + tile.thresholds, room=room, lines=3, size=6.5, colour=SOFT)
    rows = -(-min(len(verdicts), TILES) // across)
    y += rows * (height + gap)
    if len(verdicts) > TILES:
        more = f"{len(verdicts) - TILES} more uses are in the report."
        y = sheet.paragraph(LEFT, y, more, room=RIGHT - LEFT, lines=1, size=8, colour=SOFT)
    return y


def _key_figures(scores: Scores | None, findings: Findings | None, fits: int) -> list[Row]:
    """The first figures of each section in the report's order, known ones before others, as many as there is room."""
    if findings is None:
        figures = {} if scores is None else scores.figures
        return [Row(label=SCORE_TITLES.get(key, key), figure=figure) for key, figure in figures.items()]
    order = {key: n for n, key in enumerate(TITLES)}
    sections = sorted(findings.sections, key=lambda s: order.get(s.key, len(order)))
    rows: list[Row] = []
    for each in FIGURES_OF_A_SECTION:
        rows = []
        for section in sections:
            for f in sorted(filter(is_main, section.findings), key=lambda f: f.named.figure.value is None)[:each]:
                unit = f" [{f.named.figure.unit}]" if f.named.figure.unit else ""
                rows.append(Row(label=f"{f.named.label}{unit}", figure=f.named.figure, exact=f.exact))
        if len(rows) <= fits:
            break
    return rows


def _figures(sheet: Sheet, rows: Sequence[Row], y: float, fits: int) -> None:
    if fits < 2:
        sheet.paragraph(LEFT, y, "They are in the report.", room=RIGHT - LEFT, lines=1, size=7, colour=SOFT)
        return
    exact = any(r.exact is not None for r in rows)
    places = (LEFT, LEFT + 330, LEFT + 455, RIGHT) if exact else (LEFT, LEFT + 365, RIGHT)
    head = ("Figure", "Value (95 % interval)", "Reference", *(("Exact",) if exact else ()))
    shown = rows if len(rows) <= fits else rows[: max(fits - 1, 0)]
    with sheet.group("Table"):
        for n, cells in enumerate([head, *(_cells(r, exact) for r in shown)]):
            level = y + (n + 1) * STEP
            with sheet.group("TR"):
                for i, (cell, place) in enumerate(zip(cells, places)):
                    with sheet.tagged("TH" if not n or not i else "TD"):
                        room = places[1] - LEFT - 118 if not i else 122.0
                        sheet.text(
                            place,
                            level - 3,
                            cell,
                            size=7.5,
                            font=PLAIN if n else BOLD,
                            anchor="end" if i else "start",
                            room=room,
                            colour=INK,
                        )
            sheet.path([(LEFT, level), (RIGHT, level)], stroke=SOFT if not n else LINE, weight=0.6)
    if len(shown) < len(rows):
        more = f"{len(rows) - len(shown)} more figures are in the report."
        sheet.paragraph(LEFT, y + (len(shown) + 1) * STEP + 1, more, room=RIGHT - LEFT, lines=1, size=7, colour=SOFT)


def _cells(row: Row, exact: bool) -> tuple[str, ...]:
    more = (number(row.exact),) if exact else ()
    return (row.label, interval(row.figure), reference(row.figure), *more)


def _second(sheet: Sheet, facts: ReportFacts, scores: Scores | None, findings: Findings | None) -> None:
    room, gap, height = RIGHT - LEFT, 10.0, 172.0
    y = sheet.paragraph(LEFT, 30, "Pictures", room=room, lines=1, size=12, font=BOLD, tag="H2") + 4
    half = (room - gap) / 2
    boxes = [
        Box(x=LEFT + (n % 2) * (half + gap), y=y + (n // 2) * (height + gap), width=half, height=height)
        for n in range(4)
    ]
    if facts.plan:
        drawn.budget(sheet, boxes[0], facts.plan, facts.budget.epsilon_total)
    else:
        drawn.nothing(sheet, boxes[0], "Budget by purpose", "No plan is recorded.")
    _curve(sheet, boxes[1], findings, scores, "prediction", "Prediction")
    _curve(sheet, boxes[2], findings, None, "survival", "Survival")
    worst = _worst(scores, findings)
    if worst:
        side = "held-out" if isinstance(worst[0], Shares) else "real"
        drawn.columns(sheet, boxes[3], f"Columns farthest from {side} patients", worst)
    else:
        drawn.nothing(sheet, boxes[3], "Columns", "Cannot be assessed.")
    y += 2 * (height + gap)
    y = sheet.paragraph(LEFT, y, "Limits", room=room, lines=1, size=12, font=BOLD, tag="H2") + 2
    y = _limits(sheet, facts, scores, findings, y, until=y + 165)
    y = sheet.paragraph(LEFT, y + 6, "Provenance and hashes", room=room, lines=1, size=12, font=BOLD, tag="H2") + 2
    _provenance(sheet, facts, y)


def _curve(sheet: Sheet, box: Box, findings: Findings | None, scores: Scores | None, key: str, title: str) -> None:
    """The section's first curve; where there is none, its figures; where there are none, that it is not known."""
    sections = [] if findings is None else [s for s in findings.sections if s.key == key]
    found: list[Curves] = [c for s in sections for c in s.curves if any(v is not None for r in c.lines for v in r.y)]
    main = [f for s in sections for f in s.findings if is_main(f)]
    rows = [Row(label=f.named.label, figure=f.named.figure, exact=f.exact) for f in main]
    if not sections and scores is not None:
        rows = [Row(label=r.label, figure=r.figure) for r in scores.auc]
    if found:
        drawn.curves(sheet, box, found[0])
    elif any(r.figure.value is not None for r in rows):
        drawn.dots(sheet, box, title, [r for r in rows if _unit_like(r.figure)][:6] or rows[:1])
    else:
        drawn.nothing(sheet, box, title, "Cannot be assessed." if sections else "Not part of this evaluation.")


def _unit_like(figure: Figure) -> bool:
    return figure.value is None or -1.0 <= figure.value <= 1.5


def _worst(scores: Scores | None, findings: Findings | None) -> list[Shares | ColumnScore]:
    if findings is not None:
        shares = [x for s in findings.sections for x in s.shares]
        if shares:
            return list(ranked_shares(shares)[:COLUMNS])
    return [] if scores is None else list(ranked_columns(scores)[:COLUMNS])


def _limits(
    sheet: Sheet, facts: ReportFacts, scores: Scores | None, findings: Findings | None, y: float, *, until: float
) -> float:
    lines = [f"Not protected: {line}" for line in facts.not_protected]
    unknown = gaps(facts, findings, scores)
    lines += [f"{g.where}: {g.what}: {g.why}" if g.what else f"{g.where}: {g.why}" for g in unknown]
    if not unknown and (scores is not None or findings is not None):
        lines.append("Everything this report sets out to compare was assessed.")
    lines.append("A synthetic row is nobody's record. Results that matter must be confirmed on real records.")
    shown = 0
    with sheet.group("L"):
        for line in lines:
            if y > until - 20:
                break
            y = sheet.paragraph(LEFT, y, f"· {line}", room=RIGHT - LEFT, lines=2, size=7.5, tag="LI")
            shown += 1
    if shown < len(lines):
        more = f"{len(lines) - shown} more remarks are in the report."
        y = sheet.paragraph(LEFT, y, more, room=RIGHT - LEFT, lines=1, size=7.5, colour=SOFT)
    return y


def _provenance(sheet: Sheet, facts: ReportFacts, y: float) -> None:
    """Name and value, one a line, as many as there is room for; digests first."""
    step, label = 9.2, 150.0
    lines = sorted(facts.provenance.items(), key=lambda line: not line[0].startswith(("Plan", "Dictionary", "SHA-256")))
    fits = int((BOTTOM - y - 4) / step)
    shown = lines if len(lines) <= fits else lines[: max(fits - 1, 0)]
    with sheet.group("Table"):
        for name, value in shown:
            y += step
            with sheet.group("TR"):
                with sheet.tagged("TH"):
                    sheet.text(LEFT, y - 2, name, size=7, room=label - 6)
                with sheet.tagged("TD"):
                    sheet.text(LEFT + label, y - 2, value, size=6.5, font=CODE, room=RIGHT - LEFT - label)
    if len(shown) < len(lines):
        more = f"{len(lines) - len(shown)} more lines are in the report."
        sheet.paragraph(LEFT, y + 1, more, room=RIGHT - LEFT, lines=1, size=7, colour=SOFT)


def _footer(sheet: Sheet, page: int) -> None:
    text = "Every number here is in result.json; the report shows all of them."
    sheet.text(LEFT, HEIGHT - 24, text, size=7, colour=SOFT)
    sheet.text(RIGHT, HEIGHT - 24, f"Page {page} of 2", size=7, colour=SOFT, anchor="end")

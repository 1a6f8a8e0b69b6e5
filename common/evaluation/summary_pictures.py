"""The few pictures of the summary, drawn into boxes of a tagged page: the same axes and lines as the report's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cohortium.common.evaluation.base import ColumnScore, Figure, PlanRow
from cohortium.common.evaluation.findings import Curves, Shares
from cohortium.common.evaluation.pictures_axes import Scale, scale_over
from cohortium.common.evaluation.pictures_curves import Styled, runs, stairs, styled
from cohortium.common.evaluation.report_text import UNKNOWN, epsilon, interval
from cohortium.common.evaluation.summary_sheet import (
    BAND,
    BLUE,
    BOLD,
    GREEN,
    INK,
    LINE,
    ORANGE,
    PURPLE,
    SOFT,
    Sheet,
    printable,
    wide,
)

HUES = {"hue-ink": INK, "hue-soft": SOFT, "hue-0": BLUE, "hue-1": ORANGE, "hue-2": GREEN, "hue-3": PURPLE}
DASHES = {"": (), "dash": (4.0, 2.0), "dots": (1.0, 2.0)}
STAGES = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Where a picture goes [points from the page's left and top], its title included."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A figure with its label and, in a simulation, the exact one."""

    label: str
    figure: Figure
    exact: float | None = None


def nothing(sheet: Sheet, box: Box, title: str, why: str) -> None:
    """The box with the reason why there is no picture."""
    _frame(sheet, box)
    with sheet.tagged("P"):
        _title(sheet, box, title)
        sheet.text(box.x + 8, box.y + 34, why, size=8, colour=SOFT, room=box.width - 16)


def budget(sheet: Sheet, box: Box, plan: Sequence[PlanRow], total: float) -> None:
    """A bar for what each release adds to ε; the line is the budget. Of many releases those that add most."""
    _frame(sheet, box)
    before, bars = 0.0, []
    for row in plan:
        before = 0.0 if row.epsilon_cumulated < before else before  # held-out patients begin at zero
        bars.append((row, before))
        before = row.epsilon_cumulated
    finite = [b for b in bars if b[0].epsilon_cumulated < float("inf")]
    most = max([r.epsilon_cumulated for r, _ in finite] + ([total] if total < float("inf") else []), default=1.0)
    scale = Scale(low=0.0, high=max(most, 1e-9) * 1.02, start=box.x + 8, end=box.x + box.width - 40)
    chosen = set(sorted(range(len(bars)), key=lambda i: bars[i][1] - bars[i][0].epsilon_cumulated)[:STAGES])
    shown = [bar for i, bar in enumerate(bars) if i in chosen]
    with sheet.tagged("Figure", f"Budget: {len(plan)} releases; the whole budget is {epsilon(total)}."):
        _title(sheet, box, "Budget by purpose" + (f" ({len(shown)} of {len(bars)})" if len(shown) < len(bars) else ""))
        step = (box.height - 38) / max(len(shown), 1)
        step = min(step, 22.0)
        for n, (row, start) in enumerate(shown):
            y = box.y + 22 + n * step
            end = min(row.epsilon_cumulated, scale.high)
            sheet.text(box.x + 8, y + 7, row.purpose, size=7, room=box.width - 56)
            sheet.text(
                box.x + box.width - 8, y + 7 + step / 3, f"ε {epsilon(row.epsilon_cumulated)}", size=7, anchor="end"
            )
            height = max(step - 12, 2.5)
            sheet.rectangle(scale.at(0), y + 9, scale.at(start) - scale.at(0), height, fill=BLUE, alpha=0.25)
            sheet.rectangle(scale.at(start), y + 9, max(scale.at(end) - scale.at(start), 0.8), height, fill=BLUE)
        if total < float("inf"):
            x, y = scale.at(total), box.y + 22
            sheet.path([(x, y), (x, y + len(shown) * step)], stroke=ORANGE, weight=1.2, dash=(4, 2))
        sheet.text(box.x + 8, box.y + box.height - 6, "Dark: added; dashed: the budget.", size=6.5, colour=SOFT)


def curves(sheet: Sheet, box: Box, drawn: Curves) -> None:
    """A frame of lines with its legend; numbers below a picture stay in the report."""
    _frame(sheet, box)
    lines = styled(drawn.lines)
    rows = -(-len(lines) // 2)
    bottom = box.y + box.height - 22 - 10 * rows
    x = _axis(drawn.x_range, box.x + 30, box.x + box.width - 12)
    y = _axis(drawn.y_range, bottom, box.y + 34)
    with sheet.tagged("Figure", f"{drawn.title}: {drawn.y_label} over {drawn.x_label}, {len(drawn.lines)} lines."):
        _title(sheet, box, drawn.title)
        sheet.text(box.x + 8, box.y + 27, drawn.y_label, size=6.5, colour=SOFT, room=box.width - 16)
        for at, text in y.ticks(5):
            sheet.path([(x.start, y.at(at)), (x.end, y.at(at))], stroke=LINE, weight=0.5)
            sheet.text(x.start - 3, y.at(at) + 2.3, text, size=6.5, anchor="end", colour=SOFT)
        for at, text in x.ticks(5):
            sheet.path([(x.at(at), y.end), (x.at(at), bottom)], stroke=LINE, weight=0.5)
            sheet.text(x.at(at), bottom + 8, text, size=6.5, anchor="middle", colour=SOFT)
        sheet.text(x.end, bottom + 16, drawn.x_label, size=6.5, anchor="end", colour=SOFT, room=box.width - 40)
        if drawn.diagonal:
            ends = (max(x.low, y.low), min(x.high, y.high))
            sheet.path([(x.at(v), y.at(v)) for v in ends], stroke=ORANGE, weight=0.8, dash=(3, 2))
        for part in lines:
            _line(sheet, part, x, y)
        for n, part in enumerate(lines):
            left = box.x + 8 + (n % 2) * (box.width - 16) / 2
            level = bottom + 26 + 10 * (n // 2)
            sheet.path(
                [(left, level - 2), (left + 16, level - 2)],
                stroke=HUES[part.hue],
                weight=1.3,
                dash=DASHES[part.dash],
            )
            sheet.text(left + 20, level, part.line.label, size=6.5, room=(box.width - 16) / 2 - 24)


def _line(sheet: Sheet, part: Styled, x: Scale, y: Scale) -> None:
    line, colour = part.line, HUES[part.hue]
    for run in runs(line, line.low, line.high) if line.low else ():
        if line.marks:
            for at, low, high in run:
                sheet.path([(x.at(at), y.at(low)), (x.at(at), y.at(high))], stroke=colour)
        elif len(run) > 1:
            lower = stairs([(p[0], p[1]) for p in run], line.step)
            upper = stairs([(p[0], p[2]) for p in run], line.step)
            sheet.path([(x.at(a), y.at(b)) for a, b in upper + lower[::-1]], fill=colour, alpha=0.18)
    for run in runs(line, line.y):
        points = [(x.at(a), y.at(b)) for a, b in stairs([(p[0], p[1]) for p in run], line.step)]
        if len(points) > 1:
            sheet.path(points, stroke=colour, weight=0.8 if line.marks else 1.3, dash=DASHES[part.dash])
        if line.marks or len(points) == 1:
            for at, level in points:
                sheet.dot(at, level, 2.0, colour)


def columns(sheet: Sheet, box: Box, title: str, worst: Sequence[Shares | ColumnScore]) -> None:
    """Small multiples: synthetic bars, the real side's line and band."""
    _frame(sheet, box)
    alt = f"{title}: " + "; ".join(f"{s.name} {interval(_distance(s))}" for s in worst)
    with sheet.tagged("Figure", alt):
        _title(sheet, box, title)
        across, down = 3, -(-len(worst) // 3)
        width, height = (box.width - 16) / across, (box.height - 34) / max(down, 1)
        for n, shares in enumerate(worst):
            left, top = box.x + 8 + (n % across) * width, box.y + 22 + (n // across) * height
            _column(sheet, shares, left, top, width - 8, height - 6)
        sheet.text(
            box.x + 8,
            box.y + box.height - 6,
            "Bars: synthetic. Line and band: real, 95 %. Number: distance.",
            size=6.5,
            colour=SOFT,
            room=box.width - 16,
        )


def _distance(column: Shares | ColumnScore) -> Figure:
    return column.distance if isinstance(column, Shares) else column.tvd


def _column(sheet: Sheet, column: Shares | ColumnScore, left: float, top: float, width: float, height: float) -> None:
    lows, highs = (column.low, column.high) if isinstance(column, Shares) else (column.band_low, column.band_high)
    sheet.text(left, top + 6, column.name, size=7, font=BOLD, room=width)
    distance = _distance(column)
    sheet.text(left, top + 14, interval(distance), size=6, colour=SOFT, room=width)
    floor, ceiling = top + height - 9, top + 19
    most = max([*column.synthetic, *column.real, 1e-9]) * 1.15
    y = Scale(low=0.0, high=most, start=floor, end=ceiling)
    step = width / max(len(column.synthetic), 1)
    for i, share in enumerate(column.synthetic):
        sheet.rectangle(left + (i + 0.14) * step, y.at(share), step * 0.72, floor - y.at(share), fill=BLUE)
    for i, (real, low, high) in enumerate(zip(column.real, lows, highs)):
        x = left + i * step
        sheet.rectangle(x, y.at(high), step, max(y.at(low) - y.at(high), 0.4), fill=BAND, alpha=0.6)
        sheet.path([(x, y.at(real)), (x + step, y.at(real))], stroke=INK, weight=1.0)
    sheet.path([(left, floor), (left + width, floor)], stroke=LINE, weight=0.5)
    if column.labels:
        sheet.text(left, floor + 7, column.labels[0], size=6, colour=SOFT, room=width / 2 - 2)
        last = column.labels[-1]
        sheet.text(left + width, floor + 7, last, size=6, colour=SOFT, anchor="end", room=width / 2 - 2)


def dots(sheet: Sheet, box: Box, title: str, rows: Sequence[Row]) -> None:
    """Figures with interval and reference (upright mark); a cross is the exact figure of a simulation."""
    _frame(sheet, box)
    known = [r for r in rows if r.figure.value is not None]
    values = [v for r in known for v in (r.figure.value, r.figure.reference, r.exact) if v is not None]
    ends = [(r.figure.low, r.figure.high) for r in known if r.figure.low is not None and r.figure.high is not None]
    scale = scale_over(values, ends, start=box.x + 14, end=box.x + box.width - 14)
    alt = f"{title}: " + "; ".join(f"{r.label} {interval(r.figure)}" for r in rows)
    with sheet.tagged("Figure", alt):
        _title(sheet, box, title)
        step = min((box.height - 44) / max(len(rows), 1), 24.0)
        bottom = box.y + 22 + step * len(rows)
        for at, text in scale.ticks(5):
            sheet.path([(scale.at(at), box.y + 22), (scale.at(at), bottom)], stroke=LINE, weight=0.5)
            sheet.text(scale.at(at), bottom + 8, text, size=6.5, anchor="middle", colour=SOFT)
        for n, row in enumerate(rows):
            y = box.y + 22 + n * step
            shown = UNKNOWN if row.figure.value is None else interval(row.figure)
            room = box.width - 24 - wide(printable(shown), 6.5)
            sheet.text(box.x + 8, y + 7, row.label, size=7, room=room)
            sheet.text(box.x + box.width - 8, y + 7, shown, size=6.5, anchor="end")
            level = y + min(13.0, step - 4)
            f = row.figure
            if f.value is None:
                continue
            if f.low is not None and f.high is not None:
                sheet.path([(scale.at(f.low), level), (scale.at(f.high), level)], stroke=BLUE, weight=1.8)
            if f.reference is not None:
                x = scale.at(f.reference)
                sheet.path([(x, level - 4), (x, level + 4)], stroke=ORANGE, weight=1.5)
            sheet.dot(scale.at(f.value), level, 2.4, BLUE)
            if row.exact is not None:
                x = scale.at(row.exact)
                for sign in (-1, 1):
                    sheet.path([(x - 2.5, level - 2.5 * sign), (x + 2.5, level + 2.5 * sign)], stroke=INK)
        sheet.text(
            box.x + 8,
            box.y + box.height - 6,
            "Upright: reference. Cross: exact, simulation only.",
            size=6.5,
            colour=SOFT,
            room=box.width - 16,
        )


def _axis(ends: Sequence[float], start: float, end: float) -> Scale:
    low, high = (ends[0], ends[-1]) if len(ends) > 1 else (0.0, 1.0)
    return Scale(low=low, high=high if high > low else low + 1.0, start=start, end=end)


def _frame(sheet: Sheet, box: Box) -> None:
    sheet.rectangle(box.x, box.y, box.width, box.height, stroke=LINE)


def _title(sheet: Sheet, box: Box, title: str) -> None:
    sheet.text(box.x + 8, box.y + 14, title, size=9, font=BOLD, room=box.width - 16)

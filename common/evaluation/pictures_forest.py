"""Figures with their intervals, one below the other: dot plots of findings and forest plots of effects.

A filled dot is what held-out patients say, a hollow square what the synthetic rows say, an upright mark a reference,
a cross the exact figure of a simulation. An interval that does not fit the axis ends in an arrow.
"""

from __future__ import annotations

from collections.abc import Sequence

from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.findings import Effect, Finding, Forest
from cohortium.common.evaluation.pictures import Identifiers, cut, escape, frame, short
from cohortium.common.evaluation.pictures_axes import Scale, scale_over
from cohortium.common.evaluation.report_text import UNKNOWN, interval, number

LEFT, RIGHT, TOP = 14.0, 346.0, 6.0
ROOM, LONG = 28, 14
"""Letters that fit beside the numbers, and what a longer label adds to its row's height."""


def findings_picture(ids: Identifiers, rows: Sequence[Finding], *, title: str, from_zero: bool = False) -> str:
    """A dot with its interval per finding on one axis, with reference and, in a simulation, the exact figure."""
    effects = [Effect(label=r.named.label, figure=r.named.figure, exact=r.exact) for r in rows]
    return _picture(ids, effects, title=title, line=None, scale=_scale(effects, None, False, from_zero), unit="")


def forest_picture(ids: Identifiers, forest: Forest, *, first: int = 0, last: int | None = None) -> str:
    """Each effect held out and synthetic; ratios (unit names one, no effect is 1) on a logarithmic axis.

    first, last: the rows drawn; the axis is that of all rows, so that parts of one forest can be compared.
    """
    log = forest.line == 1.0 and "ratio" in forest.unit.lower()
    scale = _scale(forest.rows, forest.line, log, False)
    return _picture(ids, forest.rows[first:last], title=forest.title, line=forest.line, scale=scale, unit=forest.unit)


def _picture(
    ids: Identifiers,
    rows: Sequence[Effect],
    *,
    title: str,
    line: float | None,
    scale: Scale,
    unit: str,
) -> str:
    body: list[str] = []
    y, places = TOP, []
    for row in rows:
        places.append(y)
        y += (36 if row.beside is None else 50) + (LONG if _long(row) else 0)
    for at, text in scale.ticks():
        place = short(scale.at(at))
        body.append(
            f'<path class="grid" d="M{place} {TOP:g}V{y:g}"/>'
            f'<text class="small" x="{place}" y="{y + 14:g}" text-anchor="middle">{text}</text>'
        )
    if line is not None:
        body.append(f'<path class="limit" d="M{short(scale.at(line))} {TOP:g}V{y:g}"/>')
    for row, top in zip(rows, places):
        body += _row(row, top, scale)
    if unit:
        body.append(f'<text class="small" x="{RIGHT:g}" y="{y + 28:g}" text-anchor="end">{cut(unit, 60)}</text>')
        y += 14
    said = "; ".join(f"{row.label}: {interval(row.figure)}" for row in rows)
    return frame(ids, y + 20, title, f"Axis from {number(scale.low)} to {number(scale.high)}. {said}.", body)


def _scale(rows: Sequence[Effect], line: float | None, log: bool, from_zero: bool) -> Scale:
    figures = [f for row in rows for f in (row.figure, row.beside) if f is not None and f.value is not None]
    values = [f.value for f in figures if f.value is not None]
    values += [f.reference for f in figures if f.reference is not None]
    values += [row.exact for row in rows if row.exact is not None]
    values += [] if line is None else [line]
    ends = [(f.low, f.high) for f in figures if f.low is not None and f.high is not None]
    return scale_over(values, ends, start=LEFT + 6, end=RIGHT - 6, log=log, from_zero=from_zero)


def _long(row: Effect) -> bool:
    """Whether the label needs a line of its own."""
    return cut(row.label, ROOM) != escape(row.label)


def _row(row: Effect, top: float, scale: Scale) -> list[str]:
    below = top + 13 + (LONG if _long(row) else 0)
    y = below + 11
    body = [
        f'<text class="halo" x="{LEFT:g}" y="{top + 13:g}"><title>{escape(row.label)}</title>'
        f"{cut(row.label, 53 if _long(row) else ROOM)}</text>"
        f'<text class="halo" x="{RIGHT:g}" y="{below:g}" text-anchor="end">{_numbers(row.figure)}</text>'
    ]
    if row.figure.reference is not None and row.figure.value is not None:
        body.append(f'<path class="mark" d="M{short(scale.at(row.figure.reference))} {y - 7:g}v14"/>')
    body += _whisker(row.figure, y, scale, "whisker")
    if row.figure.value is not None:
        body.append(f'<circle class="dot" cx="{short(scale.at(row.figure.value))}" cy="{y:g}" r="4.5"/>')
    if row.beside is not None:
        body += _whisker(row.beside, y + 14, scale, "whisker other")
        if row.beside.value is not None:
            x = scale.at(row.beside.value)
            body.append(f'<path class="square" d="M{short(x - 4)} {y + 10:g}h8v8h-8z"/>')
    if row.exact is not None:
        x = scale.at(row.exact)
        body.append(f'<path class="exact" d="M{short(x - 4.5)} {y - 4.5:g}l9 9m0 -9l-9 9"/>')
    return body


def _whisker(figure: Figure, y: float, scale: Scale, name: str) -> list[str]:
    if figure.value is None or figure.low is None or figure.high is None:
        return []
    low, high = scale.at(figure.low), scale.at(figure.high)
    path, hair = f"M{short(low)} {y:g}H{short(high)}", 1e-6 * (scale.high - scale.low)
    if figure.low < scale.low - hair:
        path += f"M{short(low + 5)} {y - 4:g}l-5 4l5 4"
    if figure.high > scale.high + hair:
        path += f"M{short(high - 5)} {y - 4:g}l5 4l-5 4"
    return [f'<path class="{name}" d="{path}"/>']


def _numbers(figure: Figure) -> str:
    return UNKNOWN if figure.value is None else interval(figure).replace(" (no interval)", "")

"""Curves in one frame: ROC, precision–recall, calibration, Kaplan–Meier with the numbers at risk below.

Held-out patients are solid with their band, synthetic rows dashed, references dotted; so the picture can be read
without its colours. One line of each kind: ink and blue. Several (arms, levels): one hue for each arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cohortium.common.evaluation.findings import Curves, Line
from cohortium.common.evaluation.pictures import WIDTH, Identifiers, cut, escape, frame, short
from cohortium.common.evaluation.pictures_axes import Scale
from cohortium.common.evaluation.report_text import amount

ARMS = 4
POINTS_AT_MOST = 400
LEFT, RIGHT, TOP, HEIGHT = 44.0, 350.0, 22.0, 208.0

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Styled:
    """A line with the CSS classes of its hue and of its dashes."""

    line: Line
    hue: str
    dash: str


def styled(lines: Sequence[Line]) -> list[Styled]:
    """The lines drawn, at most ARMS of a style, and how; the legend uses the same classes."""
    seen = {"real": 0, "synthetic": 0, "reference": 0}
    several = any(sum(line.style == s for line in lines) > 1 for s in ("real", "synthetic"))
    out = []
    for line in lines:
        arm = seen[line.style]
        seen[line.style] += 1
        if arm >= ARMS:
            continue
        if line.style == "reference":
            out.append(Styled(line=line, hue="hue-soft", dash="dots"))
        else:
            alone = "hue-ink" if line.style == "real" else "hue-0"
            out.append(
                Styled(line=line, hue=f"hue-{arm}" if several else alone, dash="" if line.style == "real" else "dash")
            )
    return out


def curves_picture(ids: Identifiers, curves: Curves) -> str:
    """All lines of a frame. Values outside the axes' ranges lie on the frame's edge."""
    bottom = TOP + HEIGHT
    x = _scale(curves.x_range, LEFT, RIGHT)
    y = _scale(curves.y_range, bottom, TOP)
    body = [
        f'<text class="small" x="2" y="11">{cut(curves.y_label, 58)}</text>',
        f'<text class="small" x="{RIGHT:g}" y="{bottom + 31:g}" text-anchor="end">{cut(curves.x_label, 52)}</text>',
    ]
    for at, text in y.ticks():
        level = short(y.at(at))
        body.append(
            f'<path class="grid" d="M{LEFT:g} {level}H{RIGHT:g}"/><text class="small" x="{LEFT - 4:g}" '
            f'y="{short(y.at(at) + 3.5)}" text-anchor="end">{text}</text>'
        )
    for at, text in x.ticks():
        place = x.at(at)
        body.append(
            f'<path class="grid" d="M{short(place)} {TOP:g}V{bottom + 4:g}"/><text class="small" '
            f'x="{short(place)}" y="{bottom + 16:g}" text-anchor="middle">{text}</text>'
        )
    if curves.diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        if low < high:
            body.append(
                f'<path class="limit thin" d="M{short(x.at(low))} {short(y.at(low))}'
                f'L{short(x.at(high))} {short(y.at(high))}"/>'
            )
    drawn = styled(curves.lines)
    for part in drawn:
        body += _band(part, x, y)
    for part in drawn:
        body += _line(part, x, y)
    height = bottom + 36
    if curves.counts and curves.count_places:
        rows, height = _counts(curves, x, height)
        body += rows
    desc = (
        f"{len(curves.lines)} lines over {curves.x_label} from {curves.x_range[0]:g} to {curves.x_range[-1]:g}; "
        f"vertical: {curves.y_label}. {_said(drawn)}"
    )
    return frame(ids, height, curves.title, desc, body)


def _scale(ends: Sequence[float], start: float, end: float) -> Scale:
    low, high = (ends[0], ends[-1]) if len(ends) > 1 else (0.0, 1.0)
    return Scale(low=low, high=high if high > low else low + 1.0, start=start, end=end)


def _said(drawn: Sequence[Styled]) -> str:
    parts = []
    for part in drawn:
        known = [v for v in part.line.y if v is not None]
        ends = f"from {known[0]:.3g} to {known[-1]:.3g}" if known else "cannot be assessed"
        parts.append(f"{part.line.label}: {ends}")
    return "; ".join(parts) + "." if parts else "No line."


def thinned(line: Line, at_most: int) -> list[int]:
    """The indices of at most so many points, evenly spread, both ends among them."""
    n = len(line.x)
    return list(range(n)) if n <= at_most else sorted({round(i * (n - 1) / (at_most - 1)) for i in range(at_most)})


def runs(line: Line, *series: Sequence[float | None]) -> list[list[tuple[float, ...]]]:
    """(x, value of each series) of neighbouring points at which all are known, in runs."""
    found: list[list[tuple[float, ...]]] = [[]]
    for i in thinned(line, POINTS_AT_MOST):
        values = [s[i] for s in series]
        if any(v is None for v in values):
            found.append([])
        else:
            found[-1].append((line.x[i], *(float(v) for v in values if v is not None)))
    return [run for run in found if run]


def stairs(points: Sequence[Point], step: bool) -> list[Point]:
    """The corners of a line whose values hold until the next point, or the points themselves."""
    if not step:
        return list(points)
    out = [points[0]]
    for (_, before), (x, now) in pairwise(points):
        out += [(x, before), (x, now)]
    return out


def _band(part: Styled, x: Scale, y: Scale) -> list[str]:
    line = part.line
    if not line.low or line.marks:
        return []
    out = []
    for run in runs(line, line.low, line.high):
        if len(run) < 2:
            continue
        low = stairs([(p[0], p[1]) for p in run], line.step)
        high = stairs([(p[0], p[2]) for p in run], line.step)
        out.append(f'<path class="area {part.hue}" d="{_path(high + low[::-1], x, y)}z"/>')
    return out


def _line(part: Styled, x: Scale, y: Scale) -> list[str]:
    line, out = part.line, []
    for run in runs(line, line.y):
        points = stairs([(p[0], p[1]) for p in run], line.step)
        if len(points) > 1:
            weight = " thin" if line.marks else ""
            out.append(f'<path class="curve {part.hue} {part.dash}{weight}" d="{_path(points, x, y)}"/>')
        if line.marks or len(points) == 1:
            out += [_spot(part, x.at(a), y.at(b)) for a, b in points]
    if line.marks and line.low:
        for run in runs(line, line.low, line.high):
            for at, low, high in run:
                place = short(x.at(at))
                out.append(f'<path class="curve {part.hue}" d="M{place} {short(y.at(low))}V{short(y.at(high))}"/>')
    return out


def _spot(part: Styled, x: float, y: float) -> str:
    if part.line.style == "real":
        return f'<circle class="spot {part.hue}" cx="{short(x)}" cy="{short(y)}" r="3.6"/>'
    return f'<path class="curve hollow {part.hue}" d="M{short(x - 3.2)} {short(y - 3.2)}h6.4v6.4h-6.4z"/>'


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{short(x.at(a))} {short(y.at(b))}" for a, b in points)


def _counts(curves: Curves, x: Scale, top: float) -> tuple[list[str], float]:
    """Numbers below their places, each row's label above it; places without room for their number are left out."""
    longest = max((len(_count(v)) for row in curves.counts for v in row.values), default=1)
    half = longest * 3.2
    shown: list[tuple[int, float]] = []
    for i, place in enumerate(curves.count_places):
        at = min(max(x.at(place), 2 + half), WIDTH - 2 - half)
        if not shown or at - shown[-1][1] >= 2 * half + 5:
            shown.append((i, at))
    body = []
    if curves.count_title:
        body.append(f'<text class="small" x="2" y="{top + 10:g}">{cut(curves.count_title, 60)}</text>')
        top += 15
    for row in curves.counts:
        numbers = (
            f'<text class="small" x="{short(at)}" y="{top + 24:g}" text-anchor="middle">{_count(row.values[i])}</text>'
            for i, at in shown
            if i < len(row.values)
        )
        body.append(
            f'<text x="2" y="{top + 10:g}"><title>{escape(row.label)}</title>{cut(row.label, 56)}</text>'
            f"{''.join(numbers)}"
        )
        top += 31
    return body, top


def _count(value: float | None) -> str:
    return "–" if value is None else amount(max(value, 0.0))

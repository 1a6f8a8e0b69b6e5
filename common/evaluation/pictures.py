"""Pictures as SVG text, drawn by hand: no plotting library, no script, no network.

Every function returns one <svg role="img"> with title and desc. Colours are CSS classes (report.css: Okabe
and Ito's palette, one set for light and one for dark), so a picture follows the reader's scheme. Drawings
are 360 units wide, so that their text stays readable at phone width. All text is escaped here; names are
hostile input.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from itertools import count

from cohortium.common.evaluation.base import ColumnScore, NamedFigure, PlanRow, RoundRow
from cohortium.common.evaluation.pictures_axes import Scale
from cohortium.common.evaluation.report_text import interval, number
from cohortium.common.text import clean

WIDTH = 360
ROUNDS_AT_MOST = 90
STEPS = 12


def escape(text: object) -> str:
    return html.escape(clean(text), quote=True)


def cut(text: object, room: float) -> str:
    """At most `room` character widths (wide ones count two), with an ellipsis where shortened; escaped."""
    plain, used, out = clean(text), 0.0, ""
    for ch in plain:
        used += 2 if unicodedata.east_asian_width(ch) in "WF" else 1.25 if ch.isupper() or ch in "mwMW@%" else 1
        if used > room:
            return html.escape(out.rstrip() + "…", quote=True)
        out += ch
    return html.escape(out, quote=True)


class Identifiers:
    """Ids for title and desc, unique on the page."""

    def __init__(self) -> None:
        self._next = count(1)

    def __call__(self) -> str:
        return f"p{next(self._next)}"


def frame(ids: Identifiers, height: float, title: str, desc: str, body: Sequence[str], *, width: float = WIDTH) -> str:
    """One accessible SVG around `body`."""
    name = ids()
    return (
        f'<svg role="img" aria-labelledby="{name}t {name}d" viewBox="0 0 {short(width)} {short(height)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{name}t">{escape(title)}</title>'
        f'<desc id="{name}d">{escape(desc)}</desc>{"".join(body)}</svg>'
    )


def column_picture(ids: Identifiers, column: ColumnScore, *, real_shown: bool = True) -> str:
    """Synthetic bars against the band and line of real shares; a small picture, one of many."""
    top, bottom, left, right = 8.0, 108.0, 34.0, 246.0
    n = max(len(column.labels), 1)
    step = (right - left) / n
    most = max([*column.synthetic, *(column.band_high if real_shown else ()), 1e-9])
    scale = (bottom - top) / (most * 1.04)
    body = share_axis(most, top, bottom, left, right, scale)
    for i, share in enumerate(column.synthetic):
        x, h = left + i * step, share * scale
        body.append(
            f'<rect class="syn" x="{short(x + step * 0.14)}" y="{short(bottom - h)}" '
            f'width="{short(step * 0.72)}" height="{short(h)}"/>'
        )
        if real_shown:
            low, high = bottom - column.band_low[i] * scale, bottom - column.band_high[i] * scale
            y = bottom - column.real[i] * scale
            body.append(
                f'<rect class="band" x="{short(x)}" y="{short(high)}" width="{short(step)}" '
                f'height="{short(max(low - high, 0.6))}"/><path class="real" d="M{short(x)} {short(y)}h{short(step)}"/>'
            )
    body += cell_labels(column.labels, left, right, step, bottom + 14)
    desc = f"Shares of rows in {len(column.labels)} cells. Total variation distance {number(column.tvd.value)}"
    if real_shown and column.tvd.reference is not None:
        desc += f"; between real samples {number(column.tvd.reference)}"
    return frame(ids, 140, f"Column {column.name}, real and synthetic", desc + ".", body, width=250)


def cell_labels(labels: Sequence[str], left: float, right: float, step: float, y: float) -> list[str]:
    """Each cell's label where there is room, else the first and the last value and, below them, "missing"."""

    def text(x: float, down: float, anchor: str, label: str, room: float) -> str:
        return f'<text x="{short(x)}" y="{short(y + down)}" text-anchor="{anchor}">{cut(label, room)}</text>'

    if len(labels) <= 4:
        return [text(left + (i + 0.5) * step, 0, "middle", v, step / 6.4) for i, v in enumerate(labels)]
    gap = labels[-1] == "missing"
    last = len(labels) - 2 if gap else len(labels) - 1
    room = min(15.0, (last + 1) * step / 2 / 7)
    out = [
        text(left, 0, "start", labels[0], room),
        text(left + (last + 1) * step, 0, "end", labels[last], room),
    ]
    if gap:
        out.append(text(right, 13, "end", "missing", 15))
    return out


def heat_map(
    ids: Identifiers,
    names: Sequence[str],
    matrix: Sequence[Sequence[float]],
    *,
    title: str,
    difference: bool,
    darkest: float | None = None,
    desc: str = "",
) -> str:
    """A square map; strength in one colour, a difference or a signed figure in two (below 0, above 0).

    darkest: the size of the darkest cell; 0.5 for a difference, else 1. Cells of equal shade are one path, which
    keeps the file small.
    """
    darkest = darkest or (0.5 if difference else 1.0)
    n = max(len(names), 1)
    left, top = 84.0, 84.0
    cell = (WIDTH - left - 4) / n
    paths: dict[tuple[str, int], list[str]] = {}
    for i in range(len(names)):
        for j in range(len(names)):
            value = matrix[i][j]
            shade = round(STEPS * min(abs(value) / darkest, 1.0))
            if i == j or not shade:
                continue
            colour = "less" if difference and value < 0 else "more" if difference else "much"
            paths.setdefault((colour, shade), []).append(
                f"M{short(left + j * cell)} {short(top + i * cell)}h{short(cell)}v{short(cell)}h{short(-cell)}z"
            )
    side = short(n * cell)
    body = [f'<rect class="paper" x="{left}" y="{top}" width="{side}" height="{side}"/>']
    for (colour, shade), parts in sorted(paths.items()):
        body.append(f'<path class="{colour}" fill-opacity="{shade / STEPS:.2f}" d="{"".join(parts)}"/>')
    size = min(11.0, max(6.5, cell * 0.82))
    room = 80 / (size * 0.64)
    for i, name in enumerate(names):
        at = left + (i + 0.5) * cell
        text = f"<title>{escape(name)}</title>{cut(name, room)}"
        body.append(
            f'<text font-size="{short(size)}" x="{left - 4}" y="{short(at + size * 0.34)}" '
            f'text-anchor="end">{text}</text><text font-size="{short(size)}" '
            f'transform="translate({short(at + size * 0.34)} {top - 4}) rotate(-90)">{text}</text>'
        )
    desc = desc or (
        "Difference of association, synthetic minus real; blue weaker, orange stronger, darkest at 0.5."
        if difference
        else "Association from 0 (pale) to 1 (dark) of each pair of columns."
    )
    return frame(ids, top + n * cell + 4, title, desc, body)


def dot_plot(
    ids: Identifiers,
    rows: Sequence[NamedFigure],
    *,
    title: str,
    low: float,
    high: float,
    line: float | None = None,
) -> str:
    """One dot with its interval per row on a common axis; a small upright mark is the row's reference."""
    left, right, step, top = 16.0, 344.0, 36.0, 8.0
    bottom = top + step * len(rows)
    scale = Scale(low=low, high=high, start=left, end=right)
    x = scale.at
    body = []
    for at, text in scale.ticks(7):
        body.append(
            f'<path class="grid" d="M{short(x(at))} {top}V{short(bottom)}"/>'
            f'<text x="{short(x(at))}" y="{short(bottom + 15)}" text-anchor="middle">{text}</text>'
        )
    if line is not None:
        body.append(f'<path class="limit" d="M{short(x(line))} {top}V{short(bottom)}"/>')
    for i, row in enumerate(rows):
        y, f = top + step * i + 25, row.figure
        shown = interval(f).replace(" (no interval)", "")
        body.append(
            f'<text class="halo" x="{left}" y="{short(y - 10)}"><title>{escape(row.label)}</title>'
            f"{cut(row.label, 29)}</text>"
            f'<text class="halo" x="{right}" y="{short(y - 10)}" text-anchor="end">{shown}</text>'
        )
        if f.value is None:
            continue
        if f.low is not None and f.high is not None:
            body.append(f'<path class="whisker" d="M{short(x(f.low))} {short(y)}H{short(x(f.high))}"/>')
        body.append(f'<circle class="dot" cx="{short(x(f.value))}" cy="{short(y)}" r="4.5"/>')
        if f.reference is not None:
            body.append(f'<path class="mark" d="M{short(x(f.reference))} {short(y - 7)}v14"/>')
    said = "; ".join(f"{r.label} {interval(r.figure)}" for r in rows)
    return frame(ids, bottom + 22, title, f"Axis from {low:.2f} to {high:.2f}. {said}.", body)


def burn_down(ids: Identifiers, plan: Sequence[PlanRow], *, total: float, amounts: Sequence[str]) -> str:
    """One bar per release purpose: epsilon before it (pale) and what it adds (dark), against the budget's
    line.

    amounts: the rounded cumulated epsilons as text, one per row (rounding is the report's business).
    """
    left, right, step, top = 12.0, 348.0, 36.0, 6.0
    finite = [r.epsilon_cumulated for r in plan if r.epsilon_cumulated < float("inf")]
    most = max([total if total < float("inf") else 0.0, *finite, 1e-9])
    bottom = top + step * len(plan)
    scale = (right - left) / most
    body, before = [], 0.0
    if total < float("inf"):
        body.append(f'<path class="limit" d="M{short(left + total * scale)} {top}V{short(bottom)}"/>')
    for i, row in enumerate(plan):
        y, now = top + step * i, min(row.epsilon_cumulated, most)
        if now < before:  # other patients, who have spent nothing yet
            before = 0.0
        body.append(
            f'<text class="halo" x="{left}" y="{short(y + 13)}"><title>{escape(row.purpose)}</title>'
            f"{cut(row.purpose, 42)}</text>"
            f'<text class="halo" x="{right - 4}" y="{short(y + 13)}" text-anchor="end">'
            f"{escape(amounts[i])}</text>"
            f'<rect class="before" x="{left}" y="{short(y + 18)}" width="{short(before * scale)}" height="11"/>'
            f'<rect class="syn" x="{short(left + before * scale)}" y="{short(y + 18)}" '
            f'width="{short(max((now - before) * scale, 1.2))}" height="11"/>'
        )
        before = now
    return frame(
        ids,
        bottom + 6,
        "Budget burn-down by purpose",
        f"Cumulated epsilon after each of {len(plan)} releases; the line is the whole budget.",
        body,
    )


def timeline(ids: Identifiers, sites: Sequence[str], rounds: Sequence[RoundRow]) -> str:
    """A row per site, a column per round (or per group of rounds): answered, dropped out, or not asked."""
    group = max(1, -(-len(rounds) // ROUNDS_AT_MOST))
    columns = [rounds[i : i + group] for i in range(0, len(rounds), group)]
    left, right, step, top = 96.0, 356.0, 18.0, 4.0
    width = min((right - left) / max(len(columns), 1), 18.0)
    gap = min(width * 0.2, 2.0)
    paths: dict[str, list[str]] = {"here": [], "gone": []}
    body = []
    for s, site in enumerate(sites):
        y = top + s * step
        body.append(
            f'<text x="{left - 6}" y="{short(y + 12)}" text-anchor="end"><title>{escape(site)}</title>'
            f"{cut(site, 12)}</text>"
        )
        for c, several in enumerate(columns):
            x = left + c * width
            if any(site in r.dropped for r in several):
                a = short(max(width - gap, 1))
                paths["gone"].append(f"M{short(x)} {short(y + 2)}l{a} 12m0 -12l-{a} 12")
            elif any(site in r.answered for r in several):
                paths["here"].append(
                    f"M{short(x)} {short(y + 3)}h{short(max(width - gap, 0.8))}v10h{short(-max(width - gap, 0.8))}z"
                )
    body += [f'<path class="{name}" d="{"".join(parts)}"/>' for name, parts in paths.items() if parts]
    bottom = top + step * len(sites)
    if rounds:
        body.append(f'<text x="{left}" y="{short(bottom + 13)}">round {rounds[0].round}</text>')
        if len(columns) > 10:
            end = left + len(columns) * width
            body.append(
                f'<text x="{short(end)}" y="{short(bottom + 13)}" text-anchor="end">round {rounds[-1].round}</text>'
            )
    dropped = sum(len(r.dropped) for r in rounds)
    each = f" Each mark stands for {group} rounds." if group > 1 else ""
    return frame(
        ids,
        bottom + 18,
        "Who answered each round",
        f"{len(sites)} sites, {len(rounds)} rounds, {dropped} drop-outs.{each}",
        body,
    )


def share_axis(most: float, top: float, bottom: float, left: float, right: float, scale: float) -> list[str]:
    unit = next(u for u in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if most / u < 4 or u == 0.5)
    out, at = [], 0.0
    while bottom - at * scale >= top:
        y = short(bottom - at * scale)
        out.append(
            f'<path class="grid" d="M{left} {y}H{right}"/>'
            f'<text class="small" x="{left - 3}" y="{short(bottom - at * scale + 3.5)}" text-anchor="end">'
            f"{100 * at:.0f}%</text>"
        )
        at += unit
    return out


def short(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"

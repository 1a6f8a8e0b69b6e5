"""What left over time, as a picture: one bar a day or hour for releases, the lifetime cap's share as a line above."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup

from cohortium.client.page.left import Row

LEFT, RIGHT, TOP, BOTTOM = 46.0, 714.0, 14.0, 150.0
MOST_BARS = 60
STEPS = (3600, 6 * 3600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """start, step in seconds; how many messages made from records, and others, left in it; share used at its end."""

    start: int
    records: int
    others: int
    used: float


def bars(found: Sequence[Row]) -> tuple[int, list[Bar]]:
    """(step in seconds, bars from the first to the last row)."""
    if not found:
        return STEPS[0], []
    first, last = found[0].at, found[-1].at
    step = next((s for s in STEPS if last // s - first // s < MOST_BARS), 10 * STEPS[-1])
    sums: Counter[tuple[int, bool]] = Counter()
    used: dict[int, float] = {}
    for row in found:
        sums[row.at // step, row.records] += 1
        if row.line is not None:
            used[row.at // step] = max(used.get(row.at // step, 0.0), row.used)
    made, most = [], 0.0
    for at in range(first // step, last // step + 1):
        most = max(most, used.get(at, 0.0))
        made.append(Bar(start=at * step, records=sums[at, True], others=sums[at, False], used=most))
    return step, made


def over_time(found: Sequence[Row]) -> Markup:
    """An SVG without text from outside; "" where nothing left."""
    _, made = bars(found)
    if not made:
        return Markup("")
    most = max(bar.records + bar.others for bar in made)
    width, scale = (RIGHT - LEFT) / max(len(made), 12), (BOTTOM - TOP) / most
    records, others = sum(bar.records for bar in made), sum(bar.others for bar in made)
    text = (
        f"{records} messages made from records, with noise, and {others} others, from {_day(made[0].start)} to "
        f"{_day(found[-1].at)}; {made[-1].used:.0%} of the lifetime cap used at the end."
    )
    body = [f'<path class="grid" d="M{LEFT:g} {BOTTOM:g}H{RIGHT:g}"/>']
    body.append(f'<text class="small" x="{LEFT - 6:g}" y="{TOP + 6:g}" text-anchor="end">{most}</text>')
    body.append(f'<text class="small" x="{LEFT - 6:g}" y="{BOTTOM:g}" text-anchor="end">0</text>')
    points = []
    for at, bar in enumerate(made):
        x = LEFT + at * width
        for kind, base, number in (("syn", 0, bar.records), ("band", bar.records, bar.others)):
            if number:
                y, height = BOTTOM - (base + number) * scale, number * scale
                body.append(
                    f'<rect class="{kind}" x="{x + width * 0.1:.2f}" y="{y:.2f}" width="{width * 0.8:.2f}" '
                    f'height="{height:.2f}"/>'
                )
        points.append(f"{x + width / 2:.2f} {BOTTOM - min(bar.used, 1.0) * (BOTTOM - TOP):.2f}")
    body.append(f'<path class="limit" d="M{"L".join(points)}"/>')
    body += [
        f'<text class="small" x="{RIGHT + 6:g}" y="{TOP + 4:g}">100%</text>',
        f'<text class="small" x="{RIGHT + 6:g}" y="{BOTTOM:g}">0%</text>',
        f'<text x="{LEFT:g}" y="{BOTTOM + 18:g}">{_day(made[0].start)}</text>',
        f'<text x="{RIGHT:g}" y="{BOTTOM + 18:g}" text-anchor="end">{_day(found[-1].at)}</text>',
    ]
    return Markup(  # numbers and dates only
        f'<svg class="wide" viewBox="0 0 760 176" role="img" aria-label="{text}"><title>{text}</title>'
        f"{''.join(body)}</svg>"
    )


def step_name(found: Sequence[Row]) -> str:
    step, _ = bars(found)
    return {3600: "hour", 6 * 3600: "six hours", 86_400: "day", 7 * 86_400: "week", 30 * 86_400: "30 days"}.get(
        step, "year or more"
    )


def _day(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"

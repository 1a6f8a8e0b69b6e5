"""The two pictures of a run: which sites answered which releases, and how its budget burns down. Geometry only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cohortium.common.privacy.plan import Plan, Stage
from cohortium.server.console.prices import HOLDOUT, Curve
from cohortium.server.console.run_log import Done

MOST_ROWS = 36
NOW, DONE, NEXT, VOID = "now", "done", "next", "void"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One release, or a block of rounds of one phase. dropped: site -> in how many of them; seconds: each, mean."""

    phase: str
    span: str
    first: int
    last: int
    done: int
    void: int
    dropped: Mapping[str, int]
    seconds: float | None
    state: str

    @property
    def of(self) -> int:
        return self.last - self.first + 1


def rows(plan: Plan, releases: Mapping[int, Done], *, running: bool, most: int = MOST_ROWS) -> tuple[Row, ...]:
    """The plan from top to bottom. Phases of many rounds are cut into blocks, so that about `most` rows are enough."""
    long = sum(stage.repeats > 1 for stage in plan.stages)
    room = max((most - (len(plan.stages) - long)) // max(long, 1), 1)
    found: list[Row] = []
    waiting = running
    for stage in plan.stages:
        size = -(-stage.repeats // room) if stage.repeats > 1 else 1
        for first in range(stage.first, stage.first + stage.repeats, size):
            last = min(first + size, stage.first + stage.repeats) - 1
            row = _row(stage, first, last, releases, is_next=waiting)
            waiting = waiting and row.state != NOW
            found.append(row)
    return tuple(found)


def _row(stage: Stage, first: int, last: int, releases: Mapping[int, Done], *, is_next: bool) -> Row:
    some = [releases[index] for index in range(first, last + 1) if index in releases]
    dropped: dict[str, int] = {}
    for release in some:
        for site in release.dropped:
            dropped[site] = dropped.get(site, 0) + 1
    void = sum(bool(release.void) for release in some)
    whole = len(some) == last - first + 1
    state = (VOID if void == len(some) else DONE) if whole else NOW if is_next else NEXT
    span = "" if stage.repeats == 1 else f"{first - stage.first + 1}–{last - stage.first + 1} of {stage.repeats}"
    if stage.repeats > 1 and first == last:
        span = f"{first - stage.first + 1} of {stage.repeats}"
    return Row(
        phase=stage.name,
        span=span,
        first=first,
        last=last,
        done=len(some),
        void=void,
        dropped=dropped,
        seconds=sum(release.seconds for release in some) / len(some) if some else None,
        state=state,
    )


# ---- which sites answered -----------------------------------------------------------------------------------

LEFT, RIGHT, WIDTH, STEP, CELL = 224, 132, 1040, 22, 12
HEAD, TURNED_HEAD = 34, 92


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    x: float
    site: str
    times: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """A row as drawn. cells: a square for each site that answered all of it; dots: for each still to be asked."""

    row: Row
    y: int
    cells: str
    dots: str
    drops: tuple[Drop, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    width: int
    height: int
    columns: tuple[tuple[float, str, str], ...]
    """(x of its middle, name as shown, whole name)"""
    turned: bool
    head: int
    bands: tuple[Band, ...]
    told: str


def timeline(sites: Sequence[str], given: Sequence[Row]) -> Timeline:
    """Sites from left to right, the plan from top to bottom."""
    width = max(WIDTH, LEFT + RIGHT + (CELL + 1) * len(sites))
    step = min((width - LEFT - RIGHT) / max(len(sites), 1), 76.0)
    middles = {site: round(LEFT + step * (at + 0.5), 1) for at, site in enumerate(sites)}
    turned = step < 70
    head = TURNED_HEAD if turned else HEAD
    bands = []
    for at, row in enumerate(given):
        y = head + at * STEP
        kept = [x for site, x in middles.items() if not row.dropped.get(site)] if row.done else []
        cells = "".join(f"M{x - CELL / 2:g} {y}h{CELL}v{CELL}h-{CELL}z" for x in kept)
        dots = "" if row.done else "".join(f"M{x - 2:g} {y + CELL / 2:g}h4" for x in middles.values())
        drops = tuple(
            Drop(x=middles[site], site=site, times=times)
            for site, times in sorted(row.dropped.items())
            if site in middles
        )
        bands.append(Band(row=row, y=y, cells=cells, dots=dots, drops=drops))
    longest = 14 if turned else 11
    return Timeline(
        width=width,
        height=head + STEP * len(given) + 6,
        columns=tuple((x, _short(site, longest), site) for site, x in middles.items()),
        turned=turned,
        head=head - 14,
        bands=tuple(bands),
        told=_told(given),
    )


def _short(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _told(given: Sequence[Row]) -> str:
    """The picture in a sentence, for those who do not see it."""
    done, planned = sum(row.done for row in given), sum(row.of for row in given)
    times: dict[str, int] = {}
    for row in given:
        for site, count in row.dropped.items():
            times[site] = times.get(site, 0) + count
    void = sum(row.void for row in given)
    gone = ", ".join(f"{site} in {count}" for site, count in sorted(times.items())) or "no site in any"
    return f"{done} of {planned} releases are answered. Dropped: {gone}. Void: {void}."


# ---- how the budget burns down ------------------------------------------------------------------------------

BURN_WIDTH, BURN_HEIGHT, BURN_LEFT, BURN_TOP, BURN_BOTTOM = 420, 220, 52, 12, 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What is left of one part's ε, in percent of it: solid up to now, dashed from now on. Points as SVG wants them."""

    part: str
    name: str
    total: float
    left: float
    solid: str
    dashed: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Burn:
    lines: tuple[Line, ...]
    now: float
    planned: int
    done: int
    told: str
    ticks: tuple[tuple[float, str], ...]


def burn(curves: Sequence[Curve], *, done: int, planned: int) -> Burn:
    """x: releases of the plan; y: what is left of the part's own ε, 100 % at the top."""
    wide, high = BURN_WIDTH - BURN_LEFT - 14, BURN_HEIGHT - BURN_TOP - BURN_BOTTOM

    def place(releases: float, epsilon: float, total: float) -> tuple[float, float]:
        x = BURN_LEFT + wide * releases / max(planned, 1)
        return round(x, 1), round(BURN_TOP + high * (epsilon / total if total else 0.0), 1)

    lines = []
    for curve in curves:
        spent, total = curve.at(done), curve.total
        points = list(curve.points)
        if points[0][0] > 0:
            points = [(0, 0.0), *points]
        if points[-1][0] < planned:
            points = [*points, (planned, total)]
        now = place(done, spent, total)
        solid = [place(n, e, total) for n, e in points if n < done] + [now]
        dashed = [now] + [place(n, e, total) for n, e in points if n > done]
        lines.append(
            Line(
                part=curve.part,
                name="held-out patients" if curve.part == HOLDOUT else "training patients",
                total=total,
                left=max(total - spent, 0.0),
                solid=_points(solid),
                dashed=_points(dashed),
                x=now[0],
                y=now[1],
            )
        )
    told = "; ".join(f"{line.name}: {100 * line.left / line.total:.0f} % left" for line in lines if line.total)
    ticks = tuple((round(BURN_TOP + high * (1 - share / 100), 1), f"{share} %") for share in (0, 25, 50, 75, 100))
    return Burn(lines=tuple(lines), now=place(done, 0, 1)[0], planned=planned, done=done, told=told, ticks=ticks)


def _points(some: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in some)

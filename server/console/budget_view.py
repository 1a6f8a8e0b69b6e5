"""What the Budget page shows: lifetimes by site and study, each run's budget, heads to compare. No file is read here
but the register; all figures are `Books`' own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cohortium.server.console.accounts import Account
from cohortium.server.console.books_picture import RunSpent, SiteBook, plain
from cohortium.server.console.desk import Desk

HUES = 4
OTHER = "other studies"
PAGE = 25
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960.0, 260.0, 46.0, 26.0, 12.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A study's part of a site's bar, in percent of the whole width. hue: 0 .. HUES, the last is all other studies."""

    study: str
    x: float
    width: float
    hue: int
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRow:
    book: SiteBook
    segments: tuple[Segment, ...]
    rehearsal: bool

    @property
    def endless(self) -> bool:
        return math.isinf(self.book.lifetime)

    def to_json(self) -> dict[str, Any]:
        whole = self.book.to_json()
        sources = [{k: v for k, v in source.items() if k != "steps"} for source in whole.pop("sources")]
        return whole | {"runs": len(self.book.runs), "sources": sources, "rehearsal": self.rehearsal}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """A run's budget: what the dearest of the sites that are seen was charged. exact: at every one of them."""

    run: str
    study: str
    state: str
    epsilon: float | None
    exact: bool
    planned: float | None
    delta: float
    sites: int
    releases: int
    burned: int
    rehearsal: bool

    @property
    def left(self) -> float | None:
        if self.planned is None or self.epsilon is None or not math.isfinite(self.planned):
            return None
        return max(0.0, self.planned - self.epsilon)

    @property
    def over(self) -> bool:
        """Charged more than the plan, beyond what two machines' arithmetic may differ by; a bound proves nothing."""
        if self.planned is None or self.epsilon is None or not self.exact or math.isinf(self.planned):
            return False
        return self.epsilon > self.planned * (1 + 1e-6)

    def to_json(self) -> dict[str, Any]:
        names = ("run", "study", "state", "exact", "delta", "sites", "releases", "burned", "rehearsal", "over")
        prices = {"epsilon": plain(self.epsilon), "planned": plain(self.planned)}
        return {name: getattr(self, name) for name in names} | prices


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    sites: tuple[SiteRow, ...]
    studies: tuple[str, ...]
    """Those with a colour of their own, in the order of the colours."""
    others: bool
    runs: tuple[RunRow, ...]
    run_studies: tuple[str, ...]
    lines: int
    problems: int

    def to_json(self) -> dict[str, Any]:
        return {
            "sites": [row.to_json() for row in self.sites],
            "runs": [run.to_json() for run in self.runs],
            "lines": self.lines,
            "problems": self.problems,
        }


def budget(desk: Desk, account: Account) -> Budget:
    """All that an account sees, the dearest lifetime first."""
    enrolled = [member.name for member in desk.register.members() if member.role == "site"]
    known = {book.name: book for book in desk.books.sites()}
    books = [
        known.get(name) or SiteBook.empty(name) for name in sorted({*enrolled, *known}) if desk.sees_site(account, name)
    ]
    weight: dict[str, float] = {}
    for book in books:
        for source in book.sources:
            for study, share in source.shares.items():
                weight[study] = weight.get(study, 0.0) + share * (
                    source.epsilon if math.isfinite(source.epsilon) else 0.0
                )
    coloured = tuple(sorted(weight, key=lambda study: (-weight[study], study))[:HUES])
    most = max((book.lifetime for book in books if math.isfinite(book.lifetime)), default=0.0)
    rows = [
        SiteRow(book=book, segments=_segments(book, coloured, most), rehearsal=any(r.rehearsal for r in book.runs))
        for book in books
    ]
    rows.sort(key=lambda row: (not row.book.problem, -row.book.lifetime, row.book.name))
    runs = _runs(desk, books)
    return Budget(
        sites=tuple(rows),
        studies=coloured,
        others=len(weight) > len(coloured),
        runs=tuple(runs),
        run_studies=tuple(sorted({run.study for run in runs if run.study})),
        lines=sum(ledger.size for book in books for ledger in book.ledgers),
        problems=sum(bool(book.problem) for book in books),
    )


def _segments(book: SiteBook, coloured: Sequence[str], most: float) -> tuple[Segment, ...]:
    if not book.sources or not most or not math.isfinite(book.lifetime):
        return ()
    source = book.sources[0]
    shares = {study: source.shares[study] for study in coloured if study in source.shares}
    rest = sum(share for study, share in source.shares.items() if study not in coloured)
    if rest > 0:
        shares[OTHER] = rest
    found, x = [], 0.0
    for study, share in shares.items():
        width = 100 * share * source.epsilon / most
        hue = coloured.index(study) if study in coloured else HUES
        found.append(Segment(study=study, x=round(x, 3), width=round(width, 3), hue=hue, share=share))
        x += width
    return tuple(found)


def _runs(desk: Desk, books: Sequence[SiteBook]) -> list[RunRow]:
    by_run: dict[str, list[RunSpent]] = {}
    for book in books:
        for spent in book.runs:
            by_run.setdefault(spent.run, []).append(spent)
    states = {row.run: (at, desk.state(row)) for at, row in enumerate(desk.register.runs())}
    rows = []
    for run in sorted(by_run, key=lambda name: states.get(name, (-1, ""))[0], reverse=True):
        given = by_run[run]
        known = [each.epsilon for each in given if each.epsilon is not None]
        rows.append(
            RunRow(
                run=run,
                study=next((each.study for each in given if each.study), ""),
                state=states.get(run, (0, "unknown"))[1],
                epsilon=max(known) if len(known) == len(given) else None,
                exact=all(each.exact for each in given),
                planned=next((each.planned for each in given if each.planned is not None), None),
                delta=given[0].delta,
                sites=len(given),
                releases=max(each.releases for each in given),
                burned=sum(each.burned for each in given),
                rehearsal=any(each.rehearsal for each in given),
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """A step line of ε over time, in the units of a picture WIDTH by HEIGHT."""

    path: str
    ticks_x: tuple[tuple[float, str], ...]
    ticks_y: tuple[tuple[float, str], ...]
    end_x: float
    end_y: float


def steps_of(book: SiteBook) -> Steps | None:
    """The picture of a site's lifetime; None before there are two moments to draw, or without privacy."""
    points = [point for source in book.sources for point in source.steps]
    if not points or not all(math.isfinite(value) for _, value in points) or points[-1][1] <= 0:
        return None
    begin = min([points[0][0], *(run.first for run in book.runs if run.first is not None)])
    end = max(points[-1][0], begin + 86_400)
    most = _round_up(points[-1][1])

    def x(at: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * (at - begin) / (end - begin), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / most, 1)

    path = f"M{x(begin)} {y(0)}" + "".join(f"H{x(at)}V{y(value)}" for at, value in points)
    days = [begin + (end - begin) * part / 3 for part in range(4)]
    pattern = "%Y-%m" if end - begin > 200 * 86_400 else "%m-%d"
    ticks = tuple((x(at), datetime.fromtimestamp(at, UTC).strftime(pattern)) for at in days)
    levels = tuple((y(most * part / 4), f"{most * part / 4:.3g}") for part in range(5))
    return Steps(path=path, ticks_x=ticks, ticks_y=levels, end_x=x(points[-1][0]), end_y=y(points[-1][1]))


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 … times a power of ten: an axis whose quarters read well."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * factor for factor in (1, 2, 4, 8, 20) if unit * factor >= value)


def grouped(head: str) -> str:
    """A hash in groups of four, to be read out on the telephone."""
    return " ".join(head[at : at + 4] for at in range(0, len(head), 4))

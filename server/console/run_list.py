"""Lists of runs: the register, what never changes of each run's folder, and for one page of them how far they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cohortium.server.console.accounts import Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.run_store import Brief, Runs, runs_of
from cohortium.server.register import RunRow

STATES = ("proposed", "approved", "running", "stopping", "stopped", "finished", "failed", "void")
LIVE = ("running", "stopping")
PAGE = 25
_CODE = re.compile(r"([A-Z][A-Z0-9]*(?:-[A-Z0-9]+)+): ")
STATE_KINDS = {
    "proposed": "care",
    "approved": "live",
    "running": "live",
    "stopping": "care",
    "stopped": "care",
    "finished": "good",
    "failed": "bad",
    "void": "soft",
}
"""The looks of a state's badge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLine:
    """One run in a list. done: answered releases; None where that is not asked for."""

    run: str
    state: str
    since: int
    message: str
    code: str
    brief: Brief
    approved: int
    asked: int
    done: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "state": self.state,
            "since": self.since,
            "message": self.message,
            "study": self.brief.study,
            "sites": list(self.brief.sites),
            "rehearsal": self.brief.rehearsal,
            "approved": self.approved,
            "asked": self.asked,
            "releases": {"done": self.done, "planned": self.brief.planned},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A page of runs, newest first, and what can be chosen: how many runs are in each state, and the studies."""

    lines: tuple[RunLine, ...]
    total: int
    page: int
    pages: int
    states: Mapping[str, int]
    studies: tuple[str, ...]
    seen: int


def listed(
    desk: Desk, account: Account, *, state: str = "", study: str = "", text: str = "", page: int = 1, size: int = PAGE
) -> Listing:
    """The runs that an account sees, filtered. text: part of a run's, a study's or a site's name, or of the message."""
    found = lines(desk, account)
    states: dict[str, int] = dict.fromkeys(STATES, 0)
    for line in found:
        states[line.state] = states.get(line.state, 0) + 1
    studies = tuple(sorted({line.brief.study for line in found if line.brief.study}))
    wanted = text.strip().lower()
    chosen = [
        line
        for line in found
        if (not state or line.state == state)
        and (not study or line.brief.study == study)
        and (not wanted or any(wanted in part.lower() for part in _searched(line)))
    ]
    pages = max(-(-len(chosen) // size), 1)
    page = min(max(page, 1), pages)
    runs, shown = runs_of(desk), []
    for line in chosen[(page - 1) * size : page * size]:
        shown.append(_with_done(desk, runs, line))
    return Listing(
        lines=tuple(shown),
        total=len(chosen),
        page=page,
        pages=pages,
        states=states,
        studies=studies,
        seen=len(found),
    )


def lines(desk: Desk, account: Account) -> list[RunLine]:
    """Every run that an account sees, newest first, without its progress: the register and what never changes."""
    runs, tallies = runs_of(desk), desk.register.tallies()
    return [_line(desk, runs, row, tallies.get(row.run, (0, 0))) for row in desk.runs(account)]


def _line(desk: Desk, runs: Runs, row: RunRow, tally: tuple[int, int]) -> RunLine:
    return RunLine(
        run=row.run,
        state=desk.state(row),
        since=row.since,
        message=row.message,
        code=code_of(row.message),
        brief=runs.brief(row),
        approved=tally[0],
        asked=tally[1],
        done=None,
    )


def _with_done(desk: Desk, runs: Runs, line: RunLine) -> RunLine:
    if line.state in ("proposed", "approved", "void") and not line.message:
        return replace(line, done=0)
    return replace(line, done=runs.done(desk.register.run_row(line.run)))


def _searched(line: RunLine) -> tuple[str, ...]:
    return line.run, line.brief.study, line.message, *line.brief.sites


def code_of(message: str) -> str:
    """The code that a message of the conductor begins with, or ""."""
    found = _CODE.match(message)
    return found[1] if found else ""


def named(names: Sequence[str], most: int = 6) -> str:
    """ "a, b and 3 more"."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"

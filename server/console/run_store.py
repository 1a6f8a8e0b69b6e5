"""What was read of runs' folders, kept for all pages: what never changes, events as they grow, what was charged."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from cohortium.common.privacy.plan import Plan
from cohortium.server.console.desk import Desk
from cohortium.server.console.prices import Prices
from cohortium.server.console.run_log import RunLog
from cohortium.server.register import RunRow
from cohortium.server.runs import RunFolder

CHARGED_S, SLOW_CHARGED_S = 10.0, 60.0
"""So long a figure of the ledgers is shown before it is looked up again; longer where it has to be worked out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Brief:
    """What never changes about a run. known: False where its folder cannot be read; then the rest is empty."""

    known: bool = False
    study: str = ""
    generator: str = ""
    mode: str = ""
    sites: tuple[str, ...] = ()
    planned: int = 0
    rehearsal: bool = False

    @property
    def loud(self) -> str:
        return "rehearsal, NOT private" if self.rehearsal else ""


class Runs:
    """What was read of runs' folders, kept. One for a desk (`runs_of`); threads may share it."""

    def __init__(self, desk: Desk) -> None:
        self._consortium, self._register = desk.consortium, desk.register
        self._briefs: dict[str, Brief] = {}
        self._plans: dict[str, Plan] = {}
        self._logs: dict[str, RunLog] = {}
        self._done: dict[str, tuple[int, int]] = {}
        self._charged: dict[str, tuple[float, float | None, bool]] = {}
        self._lock = threading.Lock()
        self.prices = Prices(desk.folder / "prices")

    def brief(self, row: RunRow) -> Brief:
        known = self._briefs.get(row.run)
        if known is None:
            known = self._read(row)
            if known.known:
                self._briefs[row.run] = known
        return known

    def plan(self, row: RunRow) -> Plan:
        """The plan of a run's folder. UsageError RUN-MISSING, ProtocolError PLAN-FORMAT."""
        known = self._plans.get(row.run)
        if known is None:
            known = RunFolder(root=self._consortium.root / row.folder).plan()
            if len(self._plans) > 64:
                self._plans.clear()
            self._plans[row.run] = known
        return known

    def log(self, row: RunRow) -> RunLog:
        """A run's events, as far as they are written now."""
        with self._lock:
            log = self._logs.get(row.run)
            if log is None:
                log = RunLog(path=self._consortium.root / row.folder / "run" / "events.jsonl")
                self._logs[row.run] = log
        log.refresh()
        return log

    def done(self, row: RunRow) -> int:
        """How many releases are answered and on disk; counted again only when the folder changed."""
        folder = self._consortium.root / row.folder / "run" / "answers"
        try:
            stamp = folder.stat().st_mtime_ns
        except OSError:
            return 0
        known = self._done.get(row.run)
        if known is None or known[0] != stamp:
            known = stamp, sum(1 for _ in folder.glob("*.npz"))
            self._done[row.run] = known
        return known[1]

    def charged(self, desk: Desk, row: RunRow, done: int) -> tuple[float | None, bool]:
        books = getattr(desk, "books", None)
        known, now = self._charged.get(row.run), desk.clock()
        wait = CHARGED_S if books is not None else SLOW_CHARGED_S
        if known is not None and known[1] is not None and 0 <= now - known[0] < wait:
            return known[1], known[2]
        value, exact = None, True
        if books is None:
            folder = RunFolder(root=self._consortium.root / row.folder)
            value = self.prices.charged(folder, self._consortium.mirror, done)
        else:
            given = [entry for site in self.brief(row).sites for entry in books.site(site).runs if entry.run == row.run]
            dear = max((entry for entry in given if entry.epsilon is not None), key=lambda e: e.epsilon, default=None)
            if dear is not None:
                value, exact = float(dear.epsilon), all(bool(entry.exact) for entry in given)
        self._charged[row.run] = now, value, exact
        return value, exact

    def _read(self, row: RunRow) -> Brief:
        folder = self._consortium.root / row.folder
        try:
            plan = json.loads((folder / "plan.json").read_bytes())
            facts = json.loads((folder / "run.json").read_bytes())
            return Brief(
                known=True,
                study=str(plan["study"]),
                generator=str(plan["generator"]),
                mode=str(plan["mode"]),
                sites=tuple(str(site) for site in plan["sites"]),
                planned=sum(int(stage["repeats"]) for stage in plan["stages"]),
                rehearsal=bool(facts["rehearsal"]) or not facts["noise"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return Brief()


_runs: WeakKeyDictionary[Desk, Runs] = WeakKeyDictionary()
_lock = threading.Lock()


def runs_of(desk: Desk) -> Runs:
    with _lock:
        found = _runs.get(desk)
        if found is None:
            found = _runs[desk] = Runs(desk)
        return found

"""What plans cost, worked out beside the requests: one thread, and a file for each plan in CONSORTIUM/console/prices.

Pricing a plan takes seconds (a privacy loss distribution for each phase), so no page waits for it: a page says that it
is being worked out, and shows it when it is there. The price of a plan never changes; what was charged does.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.errors import CohortiumError
from cohortium.common.modes import make_private
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol import certificates
from cohortium.server.progress import spent
from cohortium.server.runs import RunFolder

INNER = (0.125, 0.25, 0.5, 0.75)
"""Where a phase of many rounds is priced between its begin and its end, so that its curve shows its bend."""
LONG = 8
TRAIN, HOLDOUT = "train", "holdout"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """ε of one part of the patients after so many releases of the plan; the first point is (first release, 0)."""

    part: str
    points: tuple[tuple[int, float], ...]

    @property
    def total(self) -> float:
        return self.points[-1][1]

    def at(self, done: int) -> float:
        """ε after `done` releases; between two points as on a straight line, as the picture shows it."""
        before = self.points[0]
        if done <= before[0]:
            return before[1]
        for point in self.points[1:]:
            if done <= point[0]:
                share = (done - before[0]) / max(point[0] - before[0], 1)
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """facts: what `cohortium study check --json` prints. curves: none where the plan is not private."""

    facts: dict[str, Any]
    curves: tuple[Curve, ...]


class Prices:
    """Threads may share it; `close` ends its thread after the job under way."""

    def __init__(self, folder: Path) -> None:
        make_private(folder)
        self._folder, self._lock = folder, threading.Lock()
        self._known: dict[str, Price] = {}
        self._charged: dict[str, tuple[int, float | None]] = {}
        self._asked: set[str] = set()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self) -> None:
        """Begin nothing more. A job under way is left behind: whoever ends the process does not wait for it."""
        self._closed = True
        self._jobs.put(None)

    def wait(self) -> None:
        """Until everything that was asked for so far is worked out: for tests and for screenshots."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait(60)

    def of(self, plan: Plan) -> Price | None:
        """A plan's price, or None while it is worked out."""
        known = self._known.get(plan.digest)
        if known is None:
            known = self._read(plan.digest)
            if known is None:
                self._ask(plan.digest, lambda: self._price(plan))
        return known

    def charged(self, folder: RunFolder, mirror: Path, done: int) -> float | None:
        """ε that a run was charged by the mirrored ledgers when it last had another number of releases; or None."""
        name = folder.root.name
        known = self._charged.get(name)
        if known is None or known[0] != done:
            self._ask(f"charged {name}", lambda: self._charge(folder, mirror, done))
        return None if known is None else known[1]

    def _ask(self, name: str, work: Callable[[], None]) -> None:
        def job() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._asked.discard(name)

        with self._lock:
            if self._closed or name in self._asked:
                return
            self._asked.add(name)
            self._jobs.put(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prices", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            try:
                job()
            except Exception:  # asked for again with the next look; the thread goes on with other plans
                _log.exception("prices")

    def _price(self, plan: Plan) -> None:
        from cohortium.server.cli import plan_facts

        price = Price(facts=_plain(plan_facts(plan)), curves=curves(plan) if plan.private else ())
        text = json.dumps({"facts": price.facts, "curves": [[c.part, c.points] for c in price.curves]})
        certificates.write_file(self._folder / f"{plan.digest}.json", text.encode(), 0o600)
        self._known[plan.digest] = price

    def _charge(self, folder: RunFolder, mirror: Path, done: int) -> None:
        try:
            value: float | None = spent(folder, mirror)
        except CohortiumError:
            value = None  # the ledgers' own checks say what is wrong; a display does not stop for it
        self._charged[folder.root.name] = done, value

    def _read(self, digest: str) -> Price | None:
        try:
            value = json.loads((self._folder / f"{digest}.json").read_text(encoding="utf-8"))
            found = Price(
                facts=dict(value["facts"]),
                curves=tuple(Curve(part=p, points=tuple((int(n), float(e)) for n, e in c)) for p, c in value["curves"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._known[digest] = found
        return found


def curves(plan: Plan) -> tuple[Curve, ...]:
    """ε over the releases of the plan, for training and for held-out patients: different people, two curves."""
    found = []
    for part in (TRAIN, HOLDOUT):
        stages = [stage for stage in plan.stages if stage.part == part]
        if not stages:
            continue
        done: list[tuple[Event, int]] = []
        points = [(stages[0].first, 0.0)]
        for stage in stages:
            if stage.first > points[-1][0]:  # the other part's releases lie between: nothing is spent here
                points.append((stage.first, points[-1][1]))
            inner = [round(share * stage.repeats) for share in INNER] if stage.repeats >= LONG else []
            for releases in (*inner, stage.repeats):
                events = [*done, (stage.event, releases * stage.steps)]
                value = epsilon(events, delta=plan.delta, hospitals=plan.hospitals)
                points.append((stage.first + releases, value))
            done.append((stage.event, stage.count))
        found.append(Curve(part=part, points=tuple(points)))
    return tuple(found)


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is spelled "inf", as everywhere."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value

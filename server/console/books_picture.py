"""From verified ledgers to what a page shows: charges joined over a site's keys, priced by run and for its lifetime."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cohortium.common.errors import CohortiumError
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.cap import Cap
from cohortium.common.privacy.chain import REHEARSAL, Entry
from cohortium.common.privacy.plan import Plan
from cohortium.server.console.books_index import Known
from cohortium.server.console.books_prices import FILTER, PLD, Charges, Prices, name_of
from cohortium.server.consortium import Consortium
from cohortium.server.register import Register
from cohortium.server.runs import RunFolder

LIFETIME_DELTA = 1e-6
"""A hospital's policy has its own δ, which nobody else knows: all lifetimes are told at this one."""
RECORDS = "records"
"""A site has one source, whose name and size it keeps to itself: one directory, one ledger, one cap."""
MOST_KINDS = 64
"""So many different sampled events of one run are composed by PLD; beyond, the bound stands (no plan has so many)."""
_HELD = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerBook:
    """One ledger: a site has another for each key it ever had. problem: "" or "CODE line N: sentence"."""

    owner: str
    key: str
    size: int
    head: str
    at: int | None
    problem: str
    current: bool

    @property
    def verified(self) -> bool:
        return bool(self.size) and not self.problem

    def to_json(self) -> dict[str, Any]:
        names = ("key", "size", "head", "at", "problem", "current", "verified")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpent:
    """What a run was charged at a site. epsilon: never too low; exact: it is the PLD figure, not an upper bound yet.

    planned: the plan's ε, None where the plan is not known here; releases: charged; burned: of them never answered
    (crashed or void, paid all the same); first, last: seconds of its lines; rehearsal: the site says not private.
    """

    run: str
    study: str
    source: str
    epsilon: float | None
    exact: bool
    delta: float
    hospitals: int
    planned: float | None
    releases: int
    burned: int
    states: Mapping[str, int]
    rehearsal: bool
    first: int | None
    last: int | None

    def to_json(self) -> dict[str, Any]:
        names = ("run", "study", "source", "exact", "delta", "hospitals", "releases", "burned")
        more = {name: getattr(self, name) for name in (*names, "rehearsal", "first", "last")}
        prices = {"epsilon": plain(self.epsilon), "planned": plain(self.planned)}
        return more | prices | {"states": dict(self.states)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpent:
    """A source's lifetime: the smallest cap that its hospital's filter would have let all charges pass under.

    cap: what the hospital's policy allows, where it tells. shares: study -> part of the spending, sum 1;
    steps: (seconds, ε up to then) after each run.
    """

    name: str
    epsilon: float
    delta: float
    hospitals: int
    cap: Cap | None
    releases: int
    shares: Mapping[str, float]
    steps: tuple[tuple[int, float], ...]
    charges: Charges = field(repr=False)

    @property
    def used(self) -> float | None:
        """Share of the cap that is used up, 0 to 1; infinite after a release without noise; None: no cap was told."""
        if self.cap is None:
            return None
        return math.inf if math.isinf(self.epsilon) else self.cap.used(self.charges.items())

    def affords(self, plan: Plan) -> bool | None:
        """Whether the whole plan would fit beside what was charged; None: no cap was told, or none can hold."""
        if self.cap is None or not plan.private:
            return None
        more = [(stage.event, stage.count) for stage in plan.stages]
        return not math.isinf(self.epsilon) and self.cap.allows([*self.charges.items(), *more])

    def to_json(self) -> dict[str, Any]:
        more = {name: getattr(self, name) for name in ("name", "delta", "hospitals", "releases")}
        more |= {"cap": None if self.cap is None else self.cap.to_json(), "cap_used": plain(self.used)}
        steps = [[at, plain(value)] for at, value in self.steps]
        return more | {"epsilon": plain(self.epsilon), "shares": dict(self.shares), "steps": steps}


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteBook:
    """A site's ledgers in one picture. size, head, at: of its newest ledger. runs: newest first."""

    name: str
    size: int
    head: str
    at: int | None
    verified: bool
    problem: str | None
    sources: tuple[SourceSpent, ...]
    runs: tuple[RunSpent, ...]
    ledgers: tuple[LedgerBook, ...]

    @classmethod
    def empty(cls, name: str) -> Self:
        return cls(name=name, size=0, head="", at=None, verified=False, problem=None, sources=(), runs=(), ledgers=())

    @property
    def lifetime(self) -> float:
        """The largest ε of its sources; 0 before anything was charged."""
        return max((source.epsilon for source in self.sources), default=0.0)

    @property
    def releases(self) -> int:
        return sum(run.releases for run in self.runs)

    @property
    def burned(self) -> int:
        return sum(run.burned for run in self.runs)

    def spent(self, run: str) -> RunSpent | None:
        return next((each for each in self.runs if each.run == run), None)

    def to_json(self) -> dict[str, Any]:
        names = ("name", "size", "head", "at", "verified", "problem", "releases", "burned")
        return {name: getattr(self, name) for name in names} | {
            "sources": [source.to_json() for source in self.sources],
            "runs": [run.to_json() for run in self.runs],
            "ledgers": [ledger.to_json() for ledger in self.ledgers],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """An ε that is still to be worked out."""

    rule: str
    charges: Charges
    delta: float
    hospitals: int


class Painter:
    """Makes site books. One thread at a time; what it works out is kept by `Prices`."""

    def __init__(self, consortium: Consortium, register: Register, prices: Prices) -> None:
        self._consortium, self._register, self._prices = consortium, register, prices
        self._plans: dict[tuple[str, str], Plan] = {}
        self._unplanned: set[str] = set()
        self._steps: dict[str, list[tuple[str, Charges, int, float]]] = {}
        self._priced: dict[tuple[str, str], tuple[Any, RunSpent]] = {}
        self._unpriced: set[str] = set()
        self.missing: dict[str, tuple[Job, set[str]]] = {}
        """Name of an ε -> what it is of, and the sites that show it."""
        self.settled = False
        """Everything was worked out once: from then on there is no hurry."""

    def stale(self, gathered: bool) -> set[str]:
        """Sites with a run whose plan was not found before, if it may be there now."""
        return set(self._unplanned) if gathered else set()

    def work_out(self) -> set[str]:
        """One missing ε; the sites to be painted again."""
        if not self.missing:
            return set()
        name, (job, owners) = next(iter(self.missing.items()))
        del self.missing[name]
        try:
            self._prices.work_out(job.rule, job.charges, job.delta, job.hospitals)
        except CohortiumError:  # a δ, say, that the accountant does not take: the bound stands
            self._unpriced.add(name)
        return owners

    def forget(self) -> None:
        """Work everything out anew."""
        self._steps.clear()
        self._priced.clear()

    def site(self, name: str, ledgers: Sequence[Known], keys: Iterable[str]) -> SiteBook:
        """The book of one site. keys: every key it ever had, oldest first."""
        order = {key: at for at, key in enumerate(keys)}
        mine = sorted(ledgers, key=lambda known: order.get(known.key, -1))
        for _, owners in self.missing.values():
            owners.discard(name)
        self.missing = {job: entry for job, entry in self.missing.items() if entry[1]}
        self._unplanned.discard(name)
        books = tuple(
            LedgerBook(
                owner=name,
                key=known.key,
                size=known.size,
                head=known.head,
                at=known.book.at if known.size else None,
                problem=known.problem,
                current=known is mine[-1],
            )
            for known in mine
        )
        if not books:
            return SiteBook.empty(name)
        by_run: dict[str, list[Entry]] = {}
        for entry in joined(mine):
            by_run.setdefault(entry.run, []).append(entry)
        times = _times(mine)
        runs = [self._run(name, run, entries, times, mine) for run, entries in by_run.items()]
        runs.sort(key=lambda spent: (spent.last or 0, spent.run), reverse=True)
        problems = [f"{book.problem} (key {book.key[:16]}…)" for book in books if book.problem]
        newest = books[-1]
        return SiteBook(
            name=name,
            size=newest.size,
            head=newest.head,
            at=max((book.at for book in books if book.at is not None), default=None),
            verified=not problems and newest.size > 0,
            problem="; ".join(problems) or None,
            sources=(self._lifetime(name, by_run, runs, times, mine[-1].cap),),
            runs=tuple(runs),
            ledgers=books,
        )

    def _run(
        self,
        owner: str,
        run: str,
        entries: Sequence[Entry],
        times: Mapping[str, tuple[int, int]],
        ledgers: Sequence[Known],
    ) -> RunSpent:
        rehearsal = any(known.book.noted(REHEARSAL, run) for known in ledgers)
        now = (times.get(run), rehearsal, [(e.release, e.event, e.count, e.plan, e.state) for e in entries])
        kept = self._priced.get((owner, run))
        if kept is not None and kept[0] == now:
            return kept[1]
        self._priced.pop((owner, run), None)
        digests = {entry.plan for entry in entries}
        plan = self._plan(owner, run, digests.pop()) if len(digests) == 1 else None
        delta, hospitals = (LIFETIME_DELTA, 1) if plan is None else (plan.delta, plan.hospitals)
        # Training and held-out patients are different people: the dearer part counts (server/progress.py).
        parts: dict[str, dict[Event, int]] = {}
        for entry in entries:
            part = parts.setdefault(_part(plan, entry), {})
            part[entry.event] = part.get(entry.event, 0) + entry.count
        prices = [self._price(owner, part, delta, hospitals) for part in parts.values()]
        known = [value for value, _ in prices if value is not None]
        states = Counter(str(entry.state) for entry in entries)
        first, last = times.get(run, (None, None))
        made = RunSpent(
            run=run,
            study="" if plan is None else plan.study,
            source=RECORDS,
            epsilon=max(known) if len(known) == len(prices) else None,
            exact=all(exact for _, exact in prices),
            delta=delta,
            hospitals=hospitals,
            planned=None if plan is None else (plan.epsilon if plan.private else math.inf),
            releases=len(entries),
            burned=states["BURNED"] + states["VOID"],
            states=dict(sorted(states.items())),
            rehearsal=rehearsal,
            first=first,
            last=last,
        )
        if made.exact and plan is not None:
            self._priced[owner, run] = now, made
        return made

    def _price(self, owner: str, charges: Charges, delta: float, hospitals: int) -> tuple[float | None, bool]:
        """(ε, whether it is the PLD's): an upper bound until that is worked out; None where nothing can be said."""
        if any(event.kind == "non-private" for event in charges):
            return math.inf, True
        value = self._prices.known(PLD, charges, delta, hospitals)
        if value is not None:
            return value, True
        name = name_of(PLD, charges, delta, hospitals)
        if name not in self._unpriced and len(charges) <= MOST_KINDS:
            job = Job(rule=PLD, charges=dict(charges), delta=delta, hospitals=hospitals)
            self.missing.setdefault(name, (job, set()))[1].add(owner)
        try:
            return self._prices.work_out(FILTER, charges, delta, hospitals), False
        except CohortiumError:
            return None, False

    def _lifetime(
        self,
        owner: str,
        by_run: Mapping[str, Sequence[Entry]],
        runs: Sequence[RunSpent],
        times: Mapping[str, tuple[int, int]],
        cap: Cap | None,
    ) -> SourceSpent:
        """As the gate counts at the hospital: every charge, training and held out alike; who is held out changes."""
        hospitals = max((spent.hospitals for spent in runs), default=1)
        charges = {run: _grouped(entries) for run, entries in by_run.items()}
        steps = self._stepped(owner, charges, times, hospitals)
        epsilon = steps[-1][1] if steps else 0.0
        studies: dict[str, dict[Event, int]] = {}
        for spent in runs:
            name = spent.study or "unknown study"
            studies[name] = _added([studies.get(name, {}), charges[spent.run]])
        return SourceSpent(
            name=RECORDS,
            epsilon=epsilon,
            delta=LIFETIME_DELTA,
            hospitals=hospitals,
            cap=cap,
            releases=sum(map(len, by_run.values())),
            shares=self._prices.shares(studies, epsilon, LIFETIME_DELTA, hospitals),
            steps=tuple(steps),
            charges=_added(charges.values()),
        )

    def _stepped(
        self, owner: str, charges: Mapping[str, Charges], times: Mapping[str, tuple[int, int]], hospitals: int
    ) -> list[tuple[int, float]]:
        """(seconds, lifetime ε) after each run; only from the first run on that changed is anything worked out."""
        runs = sorted(charges, key=lambda run: (times.get(run, (0, 0))[0], run))
        kept = self._steps.get(owner, [])
        total: dict[Event, int] = {}
        steps: list[tuple[str, Charges, int, float]] = []
        for at, run in enumerate(runs):
            for event, count in charges[run].items():
                total[event] = total.get(event, 0) + count
            same = at == len(steps) < len(kept) and kept[at][:3] == (run, charges[run], hospitals)
            value = kept[at][3] if same else self._prices.work_out(FILTER, total, LIFETIME_DELTA, hospitals)
            if not same:
                kept = []
            steps.append((run, charges[run], hospitals, value))
        self._steps[owner] = steps
        return [(times.get(run, (0, 0))[1], value) for run, _, _, value in steps]

    def _plan(self, owner: str, run: str, digest: str) -> Plan | None:
        """The plan that charges name by its digest, from the run's folder: it names itself, so nobody is trusted."""
        if (run, digest) not in self._plans:
            try:
                row = self._register.run_row(run)
                plan = RunFolder(root=self._consortium.root / row.folder).plan()
            except (CohortiumError, OSError, ValueError):
                plan = None
            if plan is None or plan.digest != digest:
                self._unplanned.add(owner)
                return None
            if len(self._plans) >= _HELD:
                self._plans.clear()
            self._plans[run, digest] = plan
        return self._plans[run, digest]


def joined(ledgers: Sequence[Known]) -> list[Entry]:
    """Every charge of a site's ledgers, oldest first. A charge that a later ledger carries is one charge; the same
    release with another event, count or plan is another."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for known in ledgers:
        for name, entry in known.book.entries.items():
            same = found.setdefault(name, [])
            at = next((i for i, e in enumerate(same) if _charge(e) == _charge(entry)), None)
            if at is None:
                same.append(entry)
            elif same[at].state in ("RESERVED", "RUNNING"):
                same[at] = entry
    return [entry for entries in found.values() for entry in entries]


def _charge(entry: Entry) -> tuple[Event, int, str]:
    return entry.event, entry.count, entry.plan


def _times(ledgers: Sequence[Known]) -> dict[str, tuple[int, int]]:
    """Run -> seconds of its first and last line. What a later ledger only carries over did not happen then."""
    times: dict[str, tuple[int, int]] = {}
    charged: dict[tuple[str, str], tuple[Event, int, str]] = {}
    for known in ledgers:
        mine = {name: _charge(entry) for name, entry in known.book.entries.items()}
        anew = {name[0] for name, charge in mine.items() if charged.get(name) != charge}
        charged |= mine
        for run, (first, last) in known.times.items():
            if run in times and run not in anew:
                continue
            was = times.get(run, (first, last))
            times[run] = min(was[0], first), max(was[1], last)
    return times


def _grouped(entries: Sequence[Entry]) -> dict[Event, int]:
    counts: dict[Event, int] = {}
    for entry in entries:
        counts[entry.event] = counts.get(entry.event, 0) + entry.count
    return counts


def _added(groups: Iterable[Charges]) -> dict[Event, int]:
    counts: dict[Event, int] = {}
    for group in groups:
        for event, count in group.items():
            counts[event] = counts.get(event, 0) + count
    return counts


def _part(plan: Plan | None, entry: Entry) -> str:
    """Training or held out; one part for all where the plan does not say: that is never too low."""
    if plan is None:
        return "train"
    try:
        return plan.stage_of(int(entry.release)).part
    except (CohortiumError, ValueError):
        return "train"


def plain(value: float | None) -> float | str | None:
    """As JSON has it."""
    return "inf" if value is not None and math.isinf(value) else value

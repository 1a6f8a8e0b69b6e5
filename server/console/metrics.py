"""The numbers of GET /metrics: how a consortium's machinery does, for whoever is woken at night.

    Meter(desk).text("application/openmetrics-text") -> (bytes, content type)

What is counted comes from files that other pages show too: the register, the runs' events, `seen.json`, the journal.
A file is read again only when it changed. Nothing here recomputes an ε; what was spent
comes from the ledger index (`desk.books`) where there is one, and is left out where there is none.

Labels name runs, states and roles. A site's name is a label of exactly two figures, when it was last heard of and when
its certificate ends: both are facts of the network, and no figure of any hospital's data is here. Durations are rounded
to a tenth of a second, as in the report: finer, they would measure how many rows a hospital has.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from cohortium.common.errors import CohortiumError
from cohortium.common.protocol import certificates
from cohortium.server.conduct import is_stopped, told_state
from cohortium.server.console.desk import Desk
from cohortium.server.console.metrics_requests import Requests, histogram
from cohortium.server.console.run_log import RunLog
from cohortium.server.register import ENDED, OPEN, RUN_STATES, RunRow
from cohortium.server.runs import RunFolder

STATES = tuple(sorted({*RUN_STATES, "stopped"}))
SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, math.inf)
"""Upper ends of the buckets of releases' durations."""
MOST_RUNS = 500
"""So many of the newest runs have figures of their own; all are in the sums."""
JOURNAL = ("asked", "done", "refused", "sign-in", "sign-in-failed", "sign-out", "password", "second-factor", "download")
OTHER = "other"


# ---- runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What a run's plan says. rehearsal: its noise is off or can be computed: never private."""

    releases: int
    epsilon: float
    rehearsal: bool


@dataclass(kw_only=True, slots=True)
class _Watched:
    """A run's files, read once."""

    log: RunLog
    stamp: int = -1
    planned: Planned | None = None


class Meter(Collector):
    """The figures of one desk. Threads may share it; a scrape at a time. viewers: how many live pages are open now."""

    def __init__(
        self, desk: Desk, *, requests: Requests | None = None, viewers: Callable[[], int | None] = lambda: None
    ) -> None:
        self._desk, self.requests, self._viewers = desk, requests or Requests(), viewers
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._journal: dict[str, int] = dict.fromkeys((*JOURNAL, OTHER), 0)
        self._journal_lines = 0
        self._ends: dict[Path, tuple[int, float]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """(body, content type): OpenMetrics 1.0 where the client takes it, else Prometheus' own text."""
        with self._lock:
            if "application/openmetrics-text" in accept:
                told: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
                return told, openmetrics.CONTENT_TYPE_LATEST
            return exposition.generate_latest(self._registry), exposition.CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterable[Metric]:
        yield from self._machine()
        yield from self._runs()
        yield from self._members()
        yield from self._books()
        yield from self._console()
        yield from self.requests.families()

    # ---- families -------------------------------------------------------------------------------------------

    def _machine(self) -> Iterator[Metric]:
        import importlib.metadata

        desk = self._desk
        version = importlib.metadata.version("cohortium")
        python = ".".join(map(str, sys.version_info[:3]))
        yield InfoMetricFamily(
            "cohortium_console", "What answers here.", {"version": version, "consortium": desk.consortium.name}
        )
        yield InfoMetricFamily("cohortium_python", "The interpreter.", {"version": python})
        yield _gauge(
            "cohortium_serve_up", "1 while cohortium serve of this folder runs.", _served(desk.consortium.root)
        )
        free = shutil.disk_usage(desk.consortium.root).free
        yield _gauge("cohortium_disk_free_bytes", "Room on the disk of the consortium's folder.", free)
        ends = GaugeMetricFamily(
            "cohortium_certificate_end_timestamp_seconds",
            "When the coordinator's own certificates end: of the issuer and of its server.",
            labels=("certificate",),
        )
        for name, path in (("issuer", desk.consortium.pki / "issuer.pem"), ("server", desk.consortium.chain)):
            end = self._end(path)
            if end is not None:
                ends.add_metric((name,), end)
        yield ends

    def _runs(self) -> Iterator[Metric]:
        rows = self._desk.register.runs()
        states, done, planned = (dict.fromkeys(STATES, 0) for _ in range(3))
        epsilon = GaugeMetricFamily(
            "cohortium_run_epsilon_planned",
            "The ε of a run's plan. rehearsal: its noise can be computed, the run is NOT private.",
            labels=("run", "rehearsal"),
        )
        of_run = GaugeMetricFamily("cohortium_run_releases_done", "Releases that a run has answered.", labels=("run",))
        of_plan = GaugeMetricFamily("cohortium_run_releases_planned", "Releases of a run's plan.", labels=("run",))
        since = GaugeMetricFamily(
            "cohortium_run_state_timestamp_seconds", "Since when a run is in its state.", labels=("run", "state")
        )
        buckets, seconds = [0] * len(SECONDS), 0.0
        void = dropped = unreadable = 0
        shown = {row.run for row in rows[-MOST_RUNS:]}
        for row in rows:
            state = told_state(row)
            states[state] += 1
            watched = self._look(row)
            if watched.planned is None:
                unreadable += 1
                continue
            releases = watched.log.releases
            done[state] += len(releases)
            planned[state] += watched.planned.releases
            for release in releases.values():
                void += bool(release.void)
                dropped += len(release.dropped)
                took = round(release.seconds, 1)
                buckets[next(at for at, end in enumerate(SECONDS) if took <= end)] += 1
                seconds += took
            if row.run in shown:
                epsilon.add_metric((row.run, _yes(watched.planned.rehearsal)), watched.planned.epsilon)
                of_run.add_metric((row.run,), len(releases))
                of_plan.add_metric((row.run,), watched.planned.releases)
                since.add_metric((row.run, state), row.since)
        yield _by_state("cohortium_runs", "Runs in each state.", states)
        yield _by_state("cohortium_releases_done", "Releases answered, of the runs in each state.", done)
        yield _by_state("cohortium_releases_planned", "Releases planned, of the runs in each state.", planned)
        yield CounterMetricFamily("cohortium_releases", "Releases answered, all runs together.", sum(done.values()))
        yield CounterMetricFamily("cohortium_void_releases", "Releases that came to nothing and stay paid for.", void)
        yield CounterMetricFamily("cohortium_dropouts", "Sites that did not stay to a release's end, summed.", dropped)
        yield CounterMetricFamily(
            "cohortium_run_attempts", "Times that a run was started.", sum(r.attempts for r in rows)
        )
        yield histogram("cohortium_release_seconds", "From a question to its answer.", SECONDS, buckets, seconds)
        yield _gauge("cohortium_runs_unreadable", "Runs whose files cannot be read.", unreadable)
        yield self._queue(rows)
        yield from (of_run, of_plan, since, epsilon)

    def _queue(self, rows: Iterable[RunRow]) -> Metric:
        found = GaugeMetricFamily(
            "cohortium_queue_runs", "Runs that wait: for officers, for their turn, or for a person.", labels=("for",)
        )
        rows = list(rows)
        found.add_metric(("officers",), sum(row.state == "proposed" for row in rows))
        found.add_metric(("turn",), sum(row.state == "approved" for row in rows))
        found.add_metric(("person",), sum(is_stopped(row) for row in rows))
        return found

    def _members(self) -> Iterator[Metric]:
        members = self._desk.register.members()
        counts: dict[tuple[str, str], int] = {}
        for member in members:
            counts[member.role, member.state] = counts.get((member.role, member.state), 0) + 1
        told = GaugeMetricFamily("cohortium_members", "Who takes part.", labels=("role", "state"))
        for key, count in sorted(counts.items()):
            told.add_metric(key, count)
        seen = self._desk.seen()
        last = GaugeMetricFamily(
            "cohortium_site_last_seen_timestamp_seconds", "When a site was last heard of.", labels=("site",)
        )
        until = GaugeMetricFamily(
            "cohortium_site_certificate_end_timestamp_seconds", "When a site's certificate ends.", labels=("site",)
        )
        for member in members:
            facts = seen.get(member.name)
            if member.role != certificates.SITE or not member.active or not isinstance(facts, dict):
                continue
            for family, name in ((last, "at"), (until, "certificate_until")):
                if isinstance(value := facts.get(name), int | float) and math.isfinite(value):
                    family.add_metric((member.name,), value)
        waiting = 0
        for row in self._desk.register.runs():
            if row.state == "proposed":
                waiting += sum(state == OPEN for state in self._desk.register.approvals(row.run).values())
        yield from (told, last, until)
        yield _gauge("cohortium_approvals_open", "Words of officers that proposed runs wait for.", waiting)

    def _books(self) -> Iterator[Metric]:
        """What the ledger index knows; nothing where there is none."""
        books = getattr(self._desk, "books", None)
        if books is None:
            return
        lines, wrong = 0, 0
        spent: dict[str, float] = {}
        for member in self._desk.register.members():
            if member.role != certificates.SITE:
                continue
            with contextlib.suppress(CohortiumError):
                book = books.site(member.name)
                lines += book.size
                wrong += bool(book.problem)
                for one in book.runs:
                    if one.epsilon is not None:
                        spent[one.run] = max(spent.get(one.run, 0.0), float(one.epsilon))
        yield _gauge("cohortium_ledger_lines", "Ledger lines of all sites in the index.", lines)
        yield _gauge("cohortium_ledgers_unverified", "Sites whose ledger copy does not verify.", wrong)
        if books.as_of is not None:
            lag = max(self._desk.clock() - books.as_of, 0.0)
            yield _gauge("cohortium_ledger_index_lag_seconds", "Since the index last looked at the ledgers.", lag)
        yield _gauge(
            "cohortium_ledger_index_trouble", "1 while the index cannot be brought up to date.", bool(books.trouble)
        )
        family = GaugeMetricFamily(
            "cohortium_run_epsilon_spent",
            "The ε that a run was charged so far, by the dearest of its sites' ledgers.",
            labels=("run", "rehearsal"),
        )
        for row in self._desk.register.runs()[-MOST_RUNS:]:
            watched = self._watched.get(row.run)
            if row.run in spent and watched is not None and watched.planned is not None:
                family.add_metric((row.run, _yes(watched.planned.rehearsal)), spent[row.run])
        yield family

    def _console(self) -> Iterator[Metric]:
        desk = self._desk
        new = desk.journal.lines(self._journal_lines)
        self._journal_lines += len(new)
        for line in new:
            about = str(line.body.get("about", ""))
            if line.number:  # line 0 opens the journal
                self._journal[about if about in self._journal else OTHER] += 1
        journal = CounterMetricFamily(
            "cohortium_journal_lines", "Lines of the console's signed journal.", labels=("about",)
        )
        for about, count in self._journal.items():
            journal.add_metric((about,), count)
        yield journal
        failed = self._journal["sign-in-failed"]
        yield CounterMetricFamily("cohortium_sign_in_failures", "Wrong passwords and codes at the console.", failed)
        viewers = self._viewers()
        if viewers is not None:
            yield _gauge("cohortium_console_viewers", "Live pages that are open now.", viewers)

    # ---- files ----------------------------------------------------------------------------------------------

    def _look(self, row: RunRow) -> _Watched:
        """A run's plan, which never changes, and its events, which only grow, until the run has ended."""
        root = self._desk.consortium.root / row.folder
        known = self._watched.get(row.run)
        if known is None:
            known = self._watched[row.run] = _Watched(log=RunLog(path=RunFolder(root=root).inner / "events.jsonl"))
        if known.planned is None:
            known.planned = _planned(RunFolder(root=root))
        if row.state not in ENDED or known.stamp != row.since:
            known.log.refresh()
            known.stamp = row.since
        return known

    def _end(self, path: Path) -> float | None:
        """When a certificate ends, seconds since 1970; None where it cannot be read."""
        try:
            stamp = path.stat().st_mtime_ns
            known = self._ends.get(path)
            if known is None or known[0] != stamp:
                known = stamp, certificates.expires(path.read_bytes()).timestamp()
                self._ends[path] = known
        except (OSError, CohortiumError, ValueError):
            return None
        return known[1]


def _planned(folder: RunFolder) -> Planned | None:
    try:
        plan, facts = folder.plan(), folder.facts()
        rehearsal = bool(facts["rehearsal"]) or not facts["noise"]
        return Planned(releases=plan.releases, epsilon=plan.epsilon, rehearsal=rehearsal)
    except (CohortiumError, OSError, ValueError, KeyError, TypeError):
        return None


def _served(root: Path) -> bool:
    """Whether a `cohortium serve` holds this folder's lock."""
    import fcntl

    with contextlib.suppress(FileNotFoundError), (root / "serve.lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(name, told, value)


def _by_state(name: str, told: str, counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=("state",))
    for state, count in counts.items():
        family.add_metric((state,), count)
    return family


def _yes(value: bool) -> str:
    return "yes" if value else "no"

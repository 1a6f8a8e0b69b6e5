"""How a study grows with its sites: `python -m cohortium.simulations.benchmarks.scale [--json] [--large]`.

Whole default studies (generator `auto`, secure-sum, ε = 3 and 1) of a made-up table, ten columns, 10,000 patients a
site, at 5 to 100 sites, each in a process of its own: prepare, run, sample and report.

    scale-minutes    the largest study by the clock: at most ten minutes on two cores
    scale-memory     peak until the fit is done: a straight line of the number of sites, its slope in MB a site
    scale-site       CPU time of one site's own work in a release: independent of how many others there are

A site's own work is the query over its records, its noise and its ledger. The rest of what it does in a release is the
key exchange: keys, shares, signatures and masks with every other site, and the messages and memory that carry them.
That grows with the number of sites, and is shown apart. --large: 10 sites × 1,000,000 patients, once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cohortium.simulations.benchmarks.timing import Figure

SITES = (5, 10, 25, 50, 100)
EPSILONS = (3.0, 1.0)
PATIENTS = 10_000
LARGE = (10, 1_000_000)
RELEASED = 100_000
"""Rows of the synthetic table, the same for every number of sites: what is drawn is no question of sites."""
THREADS = 4
"""Sites side by side: while one waits for its disk or checks a signature, another computes."""
MINUTES, BEND, SITE_RATIO = 10.0, 1.25, 1.5
_HERE = "cohortium.simulations.benchmarks.scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One study. rounds: DP-SGD steps in place of the plan's own number; score: the report with its scores."""

    sites: int
    patients: int = PATIENTS
    epsilon: float = 3.0
    threads: int = THREADS
    rounds: int | None = None
    released: int = RELEASED
    score: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A study: seconds by the clock and of CPU (all threads), peak memory in MB at its end and before sampling,
    milliseconds of CPU that a site takes for a release (median), for its own work and for the key exchange."""

    task: Task
    generator: str
    releases: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    run_mb: float
    site_ms: float
    exchange_ms: float
    stages: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """y = base + slope · x by least squares. fit: R². bend: the slope at the upper end over the whole slope."""

    base: float
    slope: float
    fit: float
    bend: float


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The straight line of three or more points in ascending x. A flat y has slope 0, and bends by nothing."""
    slope, base = (float(v) for v in np.polyfit(x, y, 1))
    spread = float(np.var(y))
    left = float(np.mean((np.asarray(y) - base - slope * np.asarray(x)) ** 2))
    whole = (y[-1] - y[0]) / (x[-1] - x[0])
    end = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Line(base=base, slope=slope, fit=1 - left / spread if spread else 1.0, bend=end / whole if whole > 0 else 1)


def figures(found: Sequence[Measured]) -> Iterator[Figure]:
    """Each ε by itself: the limits of the studies, smallest first. Memory wants three numbers of sites, a ratio two."""
    for epsilon in sorted({m.task.epsilon for m in found}, reverse=True):
        studies = sorted((m for m in found if m.task.epsilon == epsilon), key=lambda m: m.task.sites)
        sites, last = [m.task.sites for m in studies], studies[-1]
        yield Figure(
            name=f"scale-minutes-{epsilon:g}",
            unit="min",
            value=last.seconds / 60,
            limit=MINUTES,
            what=f"a default study of {last.task.sites} sites × {last.task.patients:,} patients, ε = {epsilon:g}",
            details={f"{m.task.sites} sites": _told(m) for m in studies},
        )
        if len(studies) >= 3:
            memory = line(sites, [m.run_mb for m in studies])
            yield Figure(
                name=f"scale-memory-{epsilon:g}",
                unit="×",
                value=memory.bend,
                limit=BEND,
                what="peak memory before sampling: slope between the two largest over the whole slope",
                details={"MB a site": memory.slope, "MB without sites": memory.base, "R²": memory.fit},
            )
        if len(studies) >= 2:
            exchange = np.polyfit(sites, [m.exchange_ms for m in studies], 1)
            yield Figure(
                name=f"scale-site-{epsilon:g}",
                unit="×",
                value=last.site_ms / studies[0].site_ms,
                limit=SITE_RATIO,
                what=f"one site's own work in a release, {sites[-1]} sites over {sites[0]}",
                details={
                    **{f"own work at {m.task.sites}, ms": m.site_ms for m in studies},
                    **{f"key exchange at {m.task.sites}, ms": m.exchange_ms for m in studies},
                    "key exchange, ms for each other site": float(exchange[0]),
                },
            )


def _told(m: Measured) -> str:
    return (
        f"{m.generator}, {m.releases} releases: {m.seconds:,.0f} s by the clock, {m.cpu_seconds:,.0f} s of CPU, "
        f"{m.run_mb:,.0f} MB before sampling, {m.peak_mb:,.0f} MB at most"
    )


def measure(task: Task) -> Measured:
    """A study in a process of its own; the table is made in another one, so that its making is not counted."""
    with tempfile.TemporaryDirectory(prefix="cohortium-scale-") as name:
        for role in ("table", "study"):
            command = [sys.executable, "-m", _HERE, "--role", role, name, json.dumps(asdict(task))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        read = json.loads(done.stdout.splitlines()[-1])
    return Measured(**{**read, "task": Task(**read["task"])})


def make_table(folder: Path, task: Task) -> None:
    """table.parquet, dictionary.json and study.toml."""
    from cohortium.simulations.benchmarks.tables import made_up, write_study

    rows = task.sites * task.patients
    made_up(rows).to_parquet(folder / "table.parquet")
    path = write_study(folder, rows=rows, sites=task.sites, generator="auto", release=task.released)
    text = path.read_text().replace("epsilon = 3.0", f"epsilon = {task.epsilon}")
    if task.rounds is not None:
        text = text.replace('name = "secure-sum"', f'name = "secure-sum"\nrounds = {task.rounds}')
    path.write_text(text)


def study(folder: Path, task: Task) -> Measured:
    """Simulate what `make_table` made, in this process."""
    stages: dict[str, dict[str, float]] = {}
    begun, used = time.perf_counter(), time.process_time()
    last = [begun, used]
    from cohortium.simulations import engines
    from cohortium.simulations.benchmarks.memory import peak_bytes
    from cohortium.simulations.finish import finish
    from cohortium.simulations.run import Request, prepare, run

    def reached(stage: str) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        stages[stage] = {"seconds": now - last[0], "cpu_seconds": cpu - last[1], "peak_mb": peak_bytes() / 1e6}
        last[:] = now, cpu
        print(f"    {task.sites} sites, ε = {task.epsilon:g}: {stage} {stages[stage]}", file=sys.stderr, flush=True)

    out = folder / "out"
    reached("libraries")
    plan = prepare(
        Request(study=folder / "study.toml", table=folder / "table.parquet", split=f"iid:{task.sites}", out=out)
    )
    reached("prepare")
    with Clock().running() as clock:
        run(out, engine=engines.InProcess(threads=task.threads), on_event=_said(plan.releases))
    reached("run")
    finish(out, score=task.score)
    reached("finish")
    own, exchange = clock.milliseconds()
    return Measured(
        task=task,
        generator=plan.generator,
        releases=plan.releases,
        seconds=last[0] - begun,
        cpu_seconds=last[1] - used,
        peak_mb=stages["finish"]["peak_mb"],
        run_mb=stages["run"]["peak_mb"],
        site_ms=own,
        exchange_ms=exchange,
        stages=stages,
    )


def _said(releases: int) -> Callable[[dict[str, Any]], None]:
    done, begun = [0], time.perf_counter()

    def say(event: dict[str, Any]) -> None:
        if event["event"] == "release":
            done[0] += 1
            if done[0] <= 5 or done[0] % 10 == 0:
                after = f"{time.perf_counter() - begun:.0f} s"
                print(f"        release {done[0]} of {releases}, {after}", file=sys.stderr, flush=True)

    return say


class Clock:
    """CPU time of the simulated sites' threads, message by message: all of it, and what is a site's own work."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._spent: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])  # own, all
        self._release: dict[str, int] = defaultdict(int)

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """While this is open, guards are timed."""
        from cohortium.client import guard
        from cohortium.client.gate import Gate

        whole = (guard.Guard, "handle")
        own = [(guard, "release"), *((Gate, name) for name in ("open", "check", "sealed", "voted", "released"))]
        before = [(place, name, getattr(place, name)) for place, name in (whole, *own)]
        setattr(*whole, self._whole(guard.Guard.handle))
        for place, name in own:
            setattr(place, name, self._own(getattr(place, name)))
        try:
            yield self
        finally:
            for place, name, plain in before:
                setattr(place, name, plain)

    def _whole(self, plain: Callable[..., bytes]) -> Callable[..., bytes]:
        def handle(guard: Any, envelope: bytes) -> bytes:
            self._here.own, self._here.releasing = 0.0, False
            started = time.thread_time()
            answer = plain(guard, envelope)
            took = time.thread_time() - started
            with self._lock:
                spent = self._spent[guard.site, self._release[guard.site]]
                spent[0] += self._here.own
                spent[1] += took
                self._release[guard.site] += self._here.releasing
            return answer

        return handle

    def _own(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            inside, self._here.inside = getattr(self._here, "inside", False), True
            started = time.thread_time()
            try:
                return plain(*given, **named)
            finally:
                self._here.inside = inside
                if not inside:  # `open` calls `check`: counted once
                    self._here.own = getattr(self._here, "own", 0.0) + time.thread_time() - started
                # A release ends with this line of the ledger: what follows belongs to the next.
                self._here.releasing = getattr(self._here, "releasing", False) or plain.__name__ == "released"

        return timed

    def milliseconds(self) -> tuple[float, float]:
        """(own work, key exchange) of a site for a release, medians over sites and releases.

        A site's first release is left out: its table is read and checked there.
        """
        spent = [s for (site, at), s in self._spent.items() if 0 < at < self._release[site]]
        return 1e3 * median(own for own, _ in spent), 1e3 * median(whole - own for own, whole in spent)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit code 1 where a limit does not hold."""
    parser = argparse.ArgumentParser(prog="scale", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="studies and figures as JSON lines")
    parser.add_argument("--large", action="store_true", help="10 sites × 1,000,000 patients too, once")
    parser.add_argument("--sites", type=int, nargs="+", default=list(SITES), help="numbers of sites")
    parser.add_argument("--epsilon", type=float, nargs="+", default=list(EPSILONS), help="budgets")
    parser.add_argument("--patients", type=int, default=PATIENTS, help="patients a site")
    parser.add_argument("--rounds", type=int, help="DP-SGD steps in place of the plan's own number, for a quick look")
    parser.add_argument("--threads", type=int, default=THREADS, help="sites side by side")
    parser.add_argument("--role", nargs=3, metavar=("ROLE", "FOLDER", "TASK"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role is not None:
        return _child(options.role[0], Path(options.role[1]), Task(**json.loads(options.role[2])))
    found, large = [], None
    for epsilon in options.epsilon:
        for sites in sorted(set(options.sites)):
            task = Task(
                sites=sites,
                patients=options.patients,
                epsilon=epsilon,
                threads=options.threads,
                rounds=options.rounds,
            )
            found.append(measure(task))
            _say(found[-1], options.json)
    if options.large:
        large = measure(Task(sites=LARGE[0], patients=LARGE[1], threads=options.threads, rounds=options.rounds))
        _say(large, options.json)
    held = True
    for figure in figures(found):
        held &= figure.holds
        print(json.dumps(figure.to_json()) if options.json else _shown(figure), flush=True)
    return 0 if held else 1


def _child(role: str, folder: Path, task: Task) -> int:
    if role == "table":
        make_table(folder, task)
    else:
        print(json.dumps(asdict(study(folder, task))))
    return 0


def _say(m: Measured, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(m)), flush=True)
    else:
        where = f"{m.task.sites} sites × {m.task.patients:,} patients, ε = {m.task.epsilon:g}"
        print(f"{where}: {_told(m)}", file=sys.stderr, flush=True)


def _shown(figure: Figure) -> str:
    said = "holds" if figure.holds else "DOES NOT HOLD"
    lines = [f"{figure.name}: {figure.value:.3g} {figure.unit} (limit ≤ {figure.limit:g}) {said}", f"    {figure.what}"]
    for name, value in figure.details.items():
        lines.append(f"    {name:40} {value if isinstance(value, str) else f'{value:,.3g}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

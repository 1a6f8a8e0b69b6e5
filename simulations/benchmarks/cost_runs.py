"""One whole study, taken apart: CPU seconds of each kind of work, bytes and exchanges of a hospital, peak memory.

    python -m cohortium.simulations.benchmarks.cost_runs whole STUDY TABLE SPLIT OUT    a simulation, as people run it
    python -m cohortium.simulations.benchmarks.cost_runs parties OUT                    hospitals in their own processes

Each in a fresh process, so that memory is its own; JSON on the last line. CPU time, all threads: what else the machine
does makes a run slower, not more expensive.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from cohortium.client.app import GuardPort, open_in_process
from cohortium.client.guard_port import SocketGuard
from cohortium.common.errors import UsageError
from cohortium.common.queries import Counts, Moments
from cohortium.server.asking import FederatedAsk
from cohortium.server.cost_shape import wire_bytes
from cohortium.server.evaluate import evaluate
from cohortium.server.finish import publish, sample
from cohortium.server.runs import RunCourier, RunFolder, drive
from cohortium.simulations import engines
from cohortium.simulations.benchmarks.memory import peak_bytes
from cohortium.simulations.benchmarks.record.ours import Counting
from cohortium.simulations.benchmarks.stream_round import _guard
from cohortium.simulations.benchmarks.tables import made_up, write_study
from cohortium.simulations.finish import finish
from cohortium.simulations.run import Request, prepare

MODULE = "cohortium.simulations.benchmarks.cost_runs"
TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A study of the benchmark's own. rounds: of DP-SGD, where the generator trains by it."""

    rows: int
    columns: int
    sites: int
    epsilon: float
    generator: str = "auto"
    mode: str = "secure-sum"
    rounds: int = 20
    holdout: bool = False
    release: int = 0

    @property
    def name(self) -> str:
        text = f"{self.rows}x{self.columns}-{self.sites}-{self.epsilon:g}-{self.generator}-{self.mode}-{self.rounds}"
        return text + ("-held" if self.holdout else "") + (f"-{self.release}" if self.release else "")

    def write_study(self, folder: Path) -> Path:
        """study.toml and dictionary.json in `folder`; the path of the first."""
        document = json.loads((write_study(folder, rows=self.rows, sites=5).parent / "dictionary.json").read_text())
        patient, *others = document["fields"]
        fields = [{**f, "name": f"{f['name']}_{copy}"} for copy in range(self._copies(len(others))) for f in others]
        kept = [f for f in fields if f["name"] != "died_0"][: self.columns - 1]
        kept.append(next(f for f in fields if f["name"] == "died_0"))
        (folder / "dictionary.json").write_text(json.dumps({"name": "cost", "fields": [patient, *kept]}))
        head = (folder / "study.toml").read_text().partition("[generator]")[0]
        head = head.replace("epsilon = 3.0", f"epsilon = {self.epsilon}").replace('"died"', '"died_0"')
        secure = "" if self.mode == "local" else f"survivors = {self.sites}\ncolluders = 1\n"
        held = "[evaluation]\nepsilon = 1.0\nholdout = 0.2\n\n" if self.holdout else ""
        (folder / "study.toml").write_text(
            f'{head}[generator]\nname = "{self.generator}"\n\n[strategy]\nname = "{self.mode}"\n{secure}'
            f"rounds = {self.rounds}\n\n{held}[release]\nrows = {self.release or self.rows}\n"
        )
        return folder / "study.toml"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The study and table.parquet in `folder`; their paths."""
        study = self.write_study(folder)
        names = [f["name"] for f in json.loads((folder / "dictionary.json").read_text())["fields"]]
        copies = self._copies(len(made_up(1).columns) - 1)
        parts = [made_up(self.rows, seed=seed).drop(columns="patient").add_suffix(f"_{seed}") for seed in range(copies)]
        table = pd.concat(parts, axis=1)
        table.insert(0, "patient", np.arange(self.rows))
        table[names].to_parquet(folder / "table.parquet")
        return study, folder / "table.parquet"

    def _copies(self, columns: int) -> int:
        return -(-self.columns // columns)


# ---- one study in parts -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Clock:
    """CPU seconds by name. What runs inside another part counts there alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inside: list[float] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        began = time.process_time()
        try:
            yield
        finally:
            took = time.process_time() - began
            inner = self._inside.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + took - inner
            if self._inside:
                self._inside[-1] += took

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


@dataclass(slots=True)
class _Parts:
    """Where a run's seconds go, stage by stage."""

    clock: _Clock = field(default_factory=_Clock)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stage: str = ""

    def asked(self, ask: FederatedAsk, phase: str, query: Any) -> Any:
        """FederatedAsk.__call__ under the clock."""
        known = self.stages.setdefault(phase, {})
        known |= {
            "dim": query.dim,
            "wire": wire_bytes(query),
            "counted": len(query.columns) if isinstance(query, Counts) else 0,
            "width": sum(query.widths) if isinstance(query, Moments) else 0,
        }
        self.stage = phase
        try:
            with self.clock.part(f"round/{phase}"):
                return _ASK(ask, phase, query)
        finally:
            self.stage = ""

    def opened(self, directory: Path) -> GuardPort:
        return _Timed(open_in_process(directory), self)


_ASK = FederatedAsk.__call__


@dataclass(slots=True)
class _Timed:
    """A guard under the clock."""

    inner: GuardPort
    parts: _Parts

    @property
    def site(self) -> str:
        return self.inner.site

    def handle(self, envelope: bytes) -> bytes:
        with self.parts.clock.part(f"site/{self.parts.stage}" if self.parts.stage else "site.begin"):
            return self.inner.handle(envelope)

    def close(self) -> None:
        self.inner.close()


@dataclass(slots=True)
class _Framed(Counting):
    """Exchanges outside a release: hello, witnesses, start, farewell."""

    parts: _Parts = field(default_factory=_Parts)

    def exchange(
        self, messages: Mapping[str, bytes], *, timeout_s: float, quorum: int | None = None, label: str = ""
    ) -> dict[str, bytes]:
        with ExitStack() as stack:
            if not self.parts.stage:
                stack.enter_context(self.parts.clock.part("coordinator.begin"))
            return Counting.exchange(self, messages, timeout_s=timeout_s, quorum=quorum, label=label)


def whole(study: Path, table: Path, split: str, out: Path) -> dict[str, Any]:
    """A simulation from its study to its report."""
    parts = _Parts()
    clock, began = parts.clock, time.monotonic()
    started = time.process_time()
    with clock.part("prepare"):
        plan = prepare(Request(study=study, table=table, split=split, out=out))
    counted: list[_Framed] = []

    def work(courier: RunCourier) -> None:
        counted.append(_Framed(courier, parts=parts))
        with clock.part("fit"):  # what is left of a run when its exchanges and its evaluation are taken out
            drive(counted[0], out)

    def asked(ask: FederatedAsk, phase: str, query: Any) -> Any:
        return parts.asked(ask, phase, query)

    with (
        patch.object(FederatedAsk, "__call__", asked),
        patch("cohortium.server.evaluate.evaluate", clock.timed("evaluate", evaluate)),
        patch("cohortium.simulations.finish.sample", clock.timed("sample", sample)),
        patch("cohortium.simulations.finish.publish", clock.timed("publish", publish)),
    ):
        engines.run(
            work,
            sites=[out / "sites" / name for name in plan.sites],
            engine=engines.InProcess(),
            log=out / "run" / "flower.log",
            opener=parts.opened,
        )
        with clock.part("score"):
            finish(out)
    seconds = {name: s for name, s in clock.seconds.items() if "/" not in name}
    for name, stage in parts.stages.items():
        stage |= {"site_s": clock.seconds[f"site/{name}"], "round_s": clock.seconds[f"round/{name}"]}
    return {
        "seconds": {"start": started, **seconds},
        "stages": parts.stages,
        "exchanges": counted[0].exchanges,
        "sent": max(counted[0].up.values()),
        "received": max(counted[0].down.values()),
        "cpu_s": time.process_time(),
        "wall_s": time.monotonic() - began,
        "peak_mb": peak_bytes() / 1e6,
    }


# ---- the parties by themselves ------------------------------------------------------------------------------


def parties(out: Path) -> dict[str, float]:
    """The coordinator's run and end in this process, each hospital's guard in one of its own: peaks of both."""
    names = RunFolder(root=out).plan().sites
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets, ExitStack() as stack:
        guards = {
            name: stack.enter_context(_guard(out / "sites" / name, Path(sockets) / f"{i}.sock"))
            for i, name in enumerate(names)
        }
        places = {name: Path(sockets) / f"{i}.sock" for i, name in enumerate(names)}
        deadline = time.monotonic() + 120
        while not all(place.exists() for place in places.values()):
            if time.monotonic() > deadline:
                raise UsageError("BENCH-GUARD", "a guard's process did not begin")
            time.sleep(0.1)
        engines.run(
            lambda courier: drive(courier, out),
            sites=[out / "sites" / name for name in names],
            engine=engines.InProcess(),
            log=out / "run" / "flower.log",
            opener=lambda directory: SocketGuard(places[directory.name]),
        )
        peaks = [peak_bytes(guard.pid) for guard in guards.values()]
    finish(out, score=False)
    return {"hospital_mb": max(peaks) / 1e6, "coordinator_mb": peak_bytes() / 1e6}


# ---- processes ----------------------------------------------------------------------------------------------


def in_process(*words: str) -> Any:
    """What `whole` or `parties` says of a study in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *words], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise UsageError("BENCH-RUN", "a study of the benchmark failed", where=words, hint=done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, *, with_parties: bool) -> dict[str, Any]:
    """One study of the design: {case, observed, and the peaks of its parties where asked for}."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study, table = case.write(folder / "study")
        split = f"iid:{case.sites}"
        found = {"case": asdict(case), **in_process("whole", str(study), str(table), split, str(folder / "whole"))}
        if with_parties:
            prepare(Request(study=study, table=table, split=split, out=folder / "apart"))
            found |= in_process("parties", str(folder / "apart"))
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["whole", study, table, split, out]:
            print(json.dumps(whole(Path(study), Path(table), split, Path(out))))
        case ["parties", out]:
            print(json.dumps(parties(Path(out))))
        case _:
            sys.exit(f"{MODULE} whole STUDY TABLE SPLIT OUT | parties OUT")

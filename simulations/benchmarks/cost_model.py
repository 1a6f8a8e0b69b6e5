"""The cost model measured: `python -m cohortium.simulations.benchmarks.cost_model [--out FILE] [--journal FILE]`.

Runs a designed set of whole studies (rows × columns × sites × ε, both trust modes, on tables that it makes itself),
fits seconds, bytes and megabytes of each kind of work by non-negative least squares (Lawson and Hanson 1974, ch. 23),
prints observed beside predicted of studies left out of the fit one at a time, and writes the coefficients as the JSON
file that `cohortium study check` reads: data/cost.json in the package, or `--machine FILE` for a machine of one's own.

    ... cost_model --check STUDY TABLE SPLIT      a whole simulation that the fit never saw: forecast and observed
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.optimize import nnls

from cohortium.common.study import Study
from cohortium.server.cost import (
    COORDINATOR,
    NUMBER_BYTES,
    Amounts,
    Forecast,
    Machine,
    Size,
    amounts,
    asked_amounts,
    forecast,
    frame_amounts,
    load_machine,
    round_amounts,
    site_amounts,
)
from cohortium.server.cost_shape import Asked, Planned, planned
from cohortium.simulations.benchmarks.cost_runs import Case, in_process, measure
from cohortium.simulations.benchmarks.record.results import model_of_processor

APART = (
    Case(rows=1000, columns=10, sites=3, epsilon=1.0),
    Case(rows=4000, columns=40, sites=5, epsilon=3.0, rounds=10),
    Case(rows=64_000, columns=40, sites=3, epsilon=1.0),
)
"""Run a second time with every hospital in a process of its own: whose memory is whose."""
DESIGN = (
    *APART[:2],
    Case(rows=4000, columns=10, sites=5, epsilon=3.0),
    Case(rows=4000, columns=20, sites=5, epsilon=3.0, mode="local"),
    Case(rows=2000, columns=10, sites=20, epsilon=3.0, rounds=6),
    Case(rows=16_000, columns=20, sites=5, epsilon=1.0),
    Case(rows=3000, columns=20, sites=5, epsilon=3.0, rounds=10, holdout=True),
    Case(rows=1000, columns=5, sites=40, epsilon=1.0),
    APART[2],
    Case(rows=4000, columns=10, sites=5, epsilon=3.0, generator="joined", mode="local", rounds=10),
    Case(rows=4000, columns=40, sites=5, epsilon=10.0, rounds=10, release=20_000),
    Case(rows=4000, columns=10, sites=5, epsilon=3.0, rounds=60),
    Case(rows=16_000, columns=20, sites=5, epsilon=3.0),
    Case(rows=4000, columns=20, sites=5, epsilon=1.0),
    Case(rows=10_000, columns=40, sites=3, epsilon=1.0, holdout=True),
    Case(rows=2000, columns=20, sites=10, epsilon=3.0, generator="autoregressive"),
    Case(rows=2000, columns=10, sites=20, epsilon=1.0),
    Case(rows=200_000, columns=10, sites=3, epsilon=1.0),
)
QUANTILES = (0.05, 0.95)
"""The range that is printed: nine of ten studies that the fit had not seen lay in it."""
LEAST_STUDIES = 8
"""A range is told only where so many were left out."""
SMALL = 0.02
"""A part below this share of its study's time is fitted as if it were that share: its relative error matters little."""
FIGURES = (
    "sent",
    "received",
    "simulation_s",
    "hospital_s",
    "coordinator_s",
    "simulation_mb",
    "hospital_mb",
    "coordinator_mb",
)


@dataclass(frozen=True)
class Observed:
    """One measured study with what was public of it."""

    name: str
    found: Mapping[str, Any]
    plan: Planned

    @classmethod
    def of(cls, found: Mapping[str, Any], study: Path) -> Observed:
        return cls(name=found["name"], found=found, plan=planned(Study.load(study), sites=found["case"]["sites"]))

    @property
    def size(self) -> Size:
        return Size(rows=self.found["case"]["rows"], patients=self.found["case"]["rows"])

    @cached_property
    def asked(self) -> tuple[Asked, ...]:
        """The stages as they were asked; one that was not (too few held-out patients) is left out."""
        out = []
        for a in self.plan.shape.asked:
            seen = self.found["stages"].get(a.stage.name)
            if seen is not None:
                dim, wire, counted, width = (int(seen[name]) for name in ("dim", "wire", "counted", "width"))
                out.append(replace(a, dim=dim, wire=wire, counted=counted, width=width))
        return tuple(out)

    @cached_property
    def amounts(self) -> dict[str, Amounts]:
        return amounts(self.plan.plan, replace(self.plan.shape, asked=self.asked), self.size)

    def figure(self, name: str) -> float | None:
        """What was observed of a figure of the forecast; None where it was not measured."""
        seconds, stages, sites = self.found["seconds"], self.found["stages"].values(), len(self.plan.plan.sites)
        if name == "simulation_s":
            return float(self.found["cpu_s"])
        if name == "hospital_s":
            return float(seconds["start"] + (seconds["site.begin"] + sum(s["site_s"] for s in stages)) / sites)
        if name == "coordinator_s":
            own = sum(seconds.get(group, 0.0) for group in COORDINATOR) + sum(s["round_s"] for s in stages)
            return float(seconds["start"] + own)
        if name == "simulation_mb":
            return float(self.found["peak_mb"])
        value = self.found.get(name)
        return None if value is None else float(value)

    def forecast(self, machine: Machine) -> Forecast:
        return forecast(self.plan.plan, self.plan.shape, machine, patients=self.size.patients, rows=self.size.rows)


# ---- the fit ------------------------------------------------------------------------------------------------


def fitted(found: Sequence[Observed]) -> dict[str, dict[str, float]]:
    """Group of work -> kind -> seconds, bytes or megabytes of one unit."""
    rows: dict[str, list[tuple[Amounts, float, float]]] = {}

    def add(group: str, given: Amounts, value: float, least: float) -> None:
        rows.setdefault(group, []).append((given, value, max(value, least, 1e-9)))

    for one in found:
        plan, stages, total = one.plan.plan, one.found["stages"], float(one.found["cpu_s"])
        for group, seconds in one.found["seconds"].items():
            add(group, one.amounts[group], seconds, SMALL * total)
        answers = questions = 0.0
        for a in one.asked:
            seen = stages[a.stage.name]
            add("site.answer", site_amounts(a, plan, one.plan.shape, one.size), seen["site_s"], SMALL * total)
            add("coordinator.round", round_amounts(a, plan), seen["round_s"], SMALL * total)
            answers += a.stage.repeats * a.dim * NUMBER_BYTES
            questions += a.stage.repeats * a.wire
            if a.stage.part == "holdout":
                add(f"question.{a.stage.kind}", asked_amounts(a, one.plan.shape), a.wire, 0.0)
        add("sent.bytes", frame_amounts(plan), one.found["sent"] - answers, 0.0)
        add("received.bytes", frame_amounts(plan), one.found["received"] - questions, 0.0)
        for name, key in (("simulation", "peak_mb"), ("hospital", "hospital_mb"), ("coordinator", "coordinator_mb")):
            if key in one.found:
                add(f"{name}.mb", one.amounts[f"{name}.mb"], one.found[key], 0.0)
    return {group: _solved(some) for group, some in rows.items()}


def _solved(rows: Sequence[tuple[Amounts, float, float]]) -> dict[str, float]:
    """Coefficients ≥ 0 with the least sum of squared errors, each in units of its row's last entry."""
    names = sorted({name for given, _, _ in rows for name, amount in given.items() if amount})
    weight = np.array([1.0 / scale for _, _, scale in rows])
    design = np.array([[given.get(name, 0.0) for name in names] for given, _, _ in rows]) * weight[:, None]
    largest = design.max(axis=0)
    units, _ = nnls(design / largest, np.array([value for _, value, _ in rows]) * weight)
    return {name: float(unit / most) for name, unit, most in zip(names, units, largest, strict=True) if unit > 0}


def left_out(found: Sequence[Observed], exchange_s: Mapping[str, float]) -> list[tuple[Observed, Forecast]]:
    """Each study with the forecast of a fit to all the others."""
    out = []
    for at, one in enumerate(found):
        others = [other for i, other in enumerate(found) if i != at]
        machine = Machine(each=fitted(others), spread={}, exchange_s=exchange_s, about={})
        out.append((one, one.forecast(machine)))
    return out


def spread_of(pairs: Iterable[tuple[Observed, Forecast]]) -> dict[str, tuple[float, float]]:
    """Figure -> the range of observed / predicted; it always holds 1. None for a figure of too few studies."""
    ratios: dict[str, list[float]] = {}
    for one, said in pairs:
        for name in FIGURES:
            seen = one.figure(name)
            if seen is not None:
                ratios.setdefault(name, []).append(seen / getattr(said, name).value)
    found = {name: np.quantile(values, QUANTILES) for name, values in ratios.items() if len(values) >= LEAST_STUDIES}
    return {name: (min(float(low), 1.0), max(float(high), 1.0)) for name, (low, high) in found.items()}


def machine_of(found: Sequence[Observed], exchange_s: Mapping[str, float]) -> tuple[Machine, list[str]]:
    """The machine that was measured, and observed beside predicted in lines."""
    pairs = left_out(found, exchange_s)
    about = {
        "processor": model_of_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "made": date.today().isoformat(),
        "studies": len(found),
    }
    machine = Machine(each=fitted(found), spread=spread_of(pairs), exchange_s=exchange_s, about=about)
    return machine, [line for one, said in pairs for line in compared(one, said)]


def compared(one: Observed, said: Forecast) -> list[str]:
    cells = []
    for name in FIGURES:
        seen = one.figure(name)
        if seen is not None:
            value = getattr(said, name).value
            cells.append(f"{name} {_short(seen)} / {_short(value)} = {seen / value:.2f}")
    return [f"{one.name}: observed / predicted", *(f"    {cell}" for cell in cells)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- measuring ----------------------------------------------------------------------------------------------


def observed(journal: Path, *, design: Sequence[Case] = DESIGN) -> list[Observed]:
    """Every study of the design, run where the journal does not have it yet."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    known = {value["name"]: value for value in map(json.loads, lines)}
    found = []
    for case in design:
        if case.name not in known:
            known[case.name] = {"name": case.name, **measure(case, with_parties=case in APART)}
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[case.name]) + "\n")
        with tempfile.TemporaryDirectory() as folder:
            found.append(Observed.of(known[case.name], case.write_study(Path(folder))))
    return found


def network(*, stream_s: float | None = None, flower_s: float | None = None) -> dict[str, float]:
    """Seconds of an exchange without the parties' own work, on loopback; each is measured where it is not given.

    A machine that does other things as well spoils both: then give what their own benchmarks said on an idle one.
    """
    from cohortium.simulations.benchmarks import flower_exchange, stream_round

    if stream_s is None:
        (figure,) = stream_round.figures(rounds=10)
        labels = ("mask", "agree", "unmask")
        gaps = [figure.details[f"{label}_ms"] - figure.details[f"{label}_slowest_guard_ms"] for label in labels]
        stream_s = max(fmean(gaps), 0.0) / 1e3
    if flower_s is None:
        said = flower_exchange.measure(6)
        (flower_s,) = (seconds for what, seconds in said if what.startswith("1 byte") and "p50" in what)
    return {"stream": stream_s, "flower": flower_s}


def check(study: Path, table: Path, split: str, machine: Machine) -> list[str]:
    """A simulation of somebody's own study beside its forecast."""
    with tempfile.TemporaryDirectory() as folder:
        found = in_process("whole", str(study), str(table), split, str(Path(folder) / "out"))
        from cohortium.server.runs import RunFolder

        names = RunFolder(root=Path(folder) / "out").plan().sites
    loaded = Study.load(study)
    made = planned(loaded, sites=len(names))
    said = forecast(made.plan, made.shape, machine, patients=loaded.patients)
    case = {"sites": len(names), "rows": said.rows}
    one = Observed(name=f"{study.parent.name}, {split}", found={"name": "", "case": case, **found}, plan=made)
    lines = compared(one, said)
    ranges = [f"    {n}: {_short(getattr(said, n).low)} to {_short(getattr(said, n).high)}" for n in FIGURES]
    return [*lines, f"    exchanges {found['exchanges']} / {said.exchanges}", "forecast ranges", *ranges]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cost_model", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("cost.json"), help="where the coefficients go")
    parser.add_argument("--journal", type=Path, help="keeps what was measured, so that a broken run goes on")
    parser.add_argument("--stream-s", type=float, help="seconds of an exchange, as stream_round said (else measured)")
    parser.add_argument("--flower-s", type=float, help="the same, as flower_exchange said (else measured)")
    parser.add_argument("--check", nargs=3, metavar=("STUDY", "TABLE", "SPLIT"), help="forecast against a simulation")
    parser.add_argument("--machine", type=Path, help="the file that --check reads")
    options = parser.parse_args(arguments)
    if options.check:
        study, table, split = options.check
        print("\n".join(check(Path(study), Path(table), split, load_machine(options.machine))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = observed(options.journal or Path(folder) / "journal.jsonl")
    machine, lines = machine_of(found, network(stream_s=options.stream_s, flower_s=options.flower_s))
    print("\n".join(lines))
    for name, (low, high) in machine.spread.items():
        print(f"{name}: observed is {low:.2f} to {high:.2f} times the forecast")
    options.out.write_text(json.dumps(machine.to_json(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

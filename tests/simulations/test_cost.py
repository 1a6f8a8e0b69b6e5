"""The cost model: what it predicts is held against bytes that were counted, and what it fits against planted truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_study
from typer.testing import CliRunner

from cohortium.common.errors import UsageError
from cohortium.common.study import Study
from cohortium.server.asking import FederatedAsk
from cohortium.server.cost import (
    COORDINATOR,
    FORMAT,
    MACHINE,
    SIMULATION,
    About,
    Machine,
    Size,
    amounts,
    exchanges,
    forecast,
    load_machine,
    traffic,
)
from cohortium.server.cost_shape import Planned, assumed, planned
from cohortium.server.runs import drive
from cohortium.simulations import engines, study_cli
from cohortium.simulations.benchmarks import cost_model, cost_runs
from cohortium.simulations.benchmarks.record.ours import Counting
from cohortium.simulations.cli import app
from cohortium.simulations.run import Request, prepare


def plan_of(
    folder: Path, *, sites: int = 3, generator: str = "autoregressive", rounds: int | None = 3, **said: Any
) -> Planned:
    study, _ = small_study(folder, generator=generator, rounds=rounds, **said)
    return planned(Study.load(study), sites=sites)


@cache
def shipped() -> Machine:
    return load_machine()


def total(made: Planned, rows: int = 10_000) -> Any:
    return forecast(made.plan, made.shape, shipped(), patients=rows)


# ---- against what was counted -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["secure-sum", "local"])
def counted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Planned, Counting, dict[str, Any]]:
    """A small run with its bytes counted, and its plan with the questions as they were asked."""
    home = tmp_path_factory.mktemp(request.param)
    study, table = small_study(home / "study", generator="autoregressive", strategy=request.param, rounds=3)
    plan = prepare(Request(study=study, table=table, split="iid:3", out=home / "out", seed=1))
    box: list[Counting] = []
    seen: dict[str, Any] = {}
    asked = FederatedAsk.__call__

    def noticed(ask: FederatedAsk, phase: str, query: Any) -> Any:
        seen[phase] = query
        return asked(ask, phase, query)

    def work(courier: Any) -> None:
        box.append(Counting(courier))
        drive(box[0], home / "out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FederatedAsk, "__call__", noticed)
        sites = [home / "out" / "sites" / name for name in plan.sites]
        engines.run(work, sites=sites, engine=engines.InProcess(), log=home / "out" / "run" / "flower.log")
    return planned(Study.load(study), sites=plan.sites), box[0], seen


def as_asked(made: Planned, seen: dict[str, Any]) -> Any:
    wire = cost_runs.wire_bytes
    return replace(
        made.shape,
        asked=tuple(replace(a, dim=seen[a.stage.name].dim, wire=wire(seen[a.stage.name])) for a in made.shape.asked),
    )


def test_bytes_are_those_that_were_counted(counted: tuple[Planned, Counting, dict[str, Any]]) -> None:
    """Within 3 %, once the questions' lengths are known; the rest is what the fit says of envelopes and keys."""
    made, courier, seen = counted
    sent, received = traffic(made.plan, as_asked(made, seen), shipped())
    assert sent == pytest.approx(max(courier.up.values()), rel=0.03)
    assert received == pytest.approx(max(courier.down.values()), rel=0.03)


def test_lengths_are_foreseen(counted: tuple[Planned, Counting, dict[str, Any]]) -> None:
    """From public facts alone: within a fifth, and never above what the plan allows."""
    made, courier, seen = counted
    for asked in made.shape.asked:
        assert asked.dim <= asked.stage.max_dim
        assert asked.dim == pytest.approx(seen[asked.stage.name].dim, rel=0.35), asked.stage.name
    said = total(made, 100)
    assert said.sent.value == pytest.approx(max(courier.up.values()), rel=0.2)
    assert said.received.value == pytest.approx(max(courier.down.values()), rel=0.2)


def test_exchanges_are_those_that_were_counted(counted: tuple[Planned, Counting, dict[str, Any]]) -> None:
    made, courier, _ = counted
    assert exchanges(made.plan) == courier.exchanges


def test_a_factor_of_two_is_seen(counted: tuple[Planned, Counting, dict[str, Any]]) -> None:
    """The power of the comparison above: double numbers, or double envelopes, and it is red."""
    made, courier, seen = counted
    shape, up = as_asked(made, seen), max(courier.up.values())
    wider = replace(shape, asked=tuple(replace(a, dim=2 * a.dim) for a in shape.asked))
    doubled = {name: 2 * unit for name, unit in shipped().each["sent.bytes"].items()}
    heavier = replace(shipped(), each={**shipped().each, "sent.bytes": doubled})
    for sent, _ in (traffic(made.plan, wider, shipped()), traffic(made.plan, shape, heavier)):
        assert sent != pytest.approx(up, rel=0.03)


# ---- what must grow -----------------------------------------------------------------------------------------


def figures(said: Any) -> list[float]:
    return [getattr(said, name).value for name in cost_model.FIGURES] + [said.network_s["stream"].value]


def test_more_rounds_cost_more(tmp_path: Path) -> None:
    few, many = (total(plan_of(tmp_path / str(rounds), rounds=rounds)) for rounds in (5, 50))
    assert many.exchanges - few.exchanges == 3 * 45
    for name in ("sent", "received", "simulation_s", "hospital_s", "coordinator_s"):
        assert getattr(many, name).value > getattr(few, name).value, name
    assert many.network_s["flower"].value - few.network_s["flower"].value >= 135 * shipped().exchange_s["flower"]


def test_more_of_anything_never_costs_less(tmp_path: Path) -> None:
    made = plan_of(tmp_path)
    small, large = total(made, 1_000), total(made, 1_000_000)
    assert all(a <= b for a, b in zip(figures(small), figures(large), strict=True))
    assert large.simulation_s.value > 1.5 * small.simulation_s.value
    assert large.hospital_mb.value > small.hospital_mb.value
    more_sites = total(plan_of(tmp_path / "more", sites=12, survivors=11))
    assert more_sites.simulation_s.value > total(made).simulation_s.value
    assert more_sites.sent.value > total(made).sent.value


def test_every_kind_of_work_is_foreseen(tmp_path: Path) -> None:
    """No group that the forecast adds up is without a coefficient, or it would cost nothing for ever."""
    made = plan_of(tmp_path, generator="joined")
    work = amounts(made.plan, made.shape, Size(rows=5_000, patients=5_000))
    for group in {*SIMULATION, *COORDINATOR, "simulation.mb", "hospital.mb", "coordinator.mb"} - {"evaluate"}:
        assert shipped().of(group, work[group]) > 0, group


def test_the_assumed_population_is_a_population(tmp_path: Path) -> None:
    from cohortium.common.encoding import grids

    study, _ = small_study(tmp_path)
    for grid in grids(Study.load(study).schema):
        share = assumed(grid)
        assert len(share) == grid.size and share.sum() == pytest.approx(1.0)
        assert (share[-1] == 0) == grid.required


# ---- the fit ------------------------------------------------------------------------------------------------


def test_the_fit_finds_what_was_planted() -> None:
    """Seconds made of known units come back to a part in a million; a kind of work that costs nothing gets nothing."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(12):
        given = {"base": 1.0, "cell": float(rng.integers(1e3, 1e6)), "idle": float(rng.integers(1, 9))}
        value = 0.5 + 3e-6 * given["cell"]
        rows.append((given, value, value))
    units = cost_model._solved(rows)
    assert units["base"] == pytest.approx(0.5) and units["cell"] == pytest.approx(3e-6)
    assert units.get("idle", 0.0) < 1e-6


def test_no_coefficient_is_negative() -> None:
    rows = [({"base": 1.0, "less": float(x)}, 10.0 - x, 1.0) for x in range(1, 9)]
    assert all(unit >= 0 for unit in cost_model._solved(rows).values())


def test_the_range_is_that_of_studies_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        def __init__(self, ratio: float) -> None:
            self.ratio = ratio

        def figure(self, name: str) -> float | None:
            return 100 * self.ratio if name == "sent" else None

    said = type("Said", (), {"sent": About(value=100.0, low=0.0, high=0.0)})()
    pairs: Any = [(Seen(r), said) for r in np.linspace(0.5, 1.5, 21)]
    (low, high) = cost_model.spread_of(pairs)["sent"]
    assert (low, high) == pytest.approx((0.55, 1.45))
    all_above: Any = [(Seen(r), said) for r in np.linspace(1.2, 1.3, 9)]
    assert cost_model.spread_of(all_above)["sent"][0] == 1.0, "the forecast itself lies in its range"
    assert cost_model.spread_of(all_above[:3]) == {}, "three studies tell no range"


def test_a_measured_machine_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(shipped().to_json()))
    assert load_machine(path).to_json() == shipped().to_json()
    assert {"sent", "received", "simulation_s", "hospital_s", "simulation_mb"} <= set(shipped().spread)
    assert shipped().about["studies"] >= 8


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v.update(format=FORMAT + 1),
        lambda v: v["each"]["fit"].update(base=-1.0),
        lambda v: v["each"]["fit"].update(base="much"),
        lambda v: v.pop("exchange_s"),
        lambda v: v["exchange_s"].pop("flower"),
        lambda v: v.update(spread={"sent": [1.0]}),
    ],
)
def test_a_file_that_no_benchmark_wrote_is_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(json.dumps(shipped().to_json()))
    spoil(value)
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError) as refused:
        load_machine(path)
    assert refused.value.code == "COST-MACHINE"


# ---- the benchmark's studies --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in cost_model.DESIGN if c.rows <= 4000][:6], ids=lambda c: c.name)
def test_the_design_can_be_run(case: cost_runs.Case, tmp_path: Path) -> None:
    """Its dictionaries fit its tables, and its plans have the columns, sites and rounds that their names say."""
    from cohortium.client.records import checked
    from cohortium.client.sources.base import read

    study, table = replace(case, rows=60).write(tmp_path)
    loaded = Study.load(study)
    checked(loaded.schema, read(table), unit="patient", where="made")
    plan = planned(loaded, sites=case.sites).plan
    assert len(loaded.schema.modelled) == case.columns and len(plan.sites) == case.sites and plan.mode == case.mode
    assert all(s.repeats == case.rounds for s in plan.stages if s.kind == "gradient")
    assert (plan.holdout > 0) == case.holdout


@pytest.mark.slow
def test_a_study_is_measured_as_people_run_it(tmp_path: Path) -> None:
    study, table = cost_runs.Case(rows=200, columns=5, sites=3, epsilon=1.0).write(tmp_path)
    found = cost_runs.in_process("whole", str(study), str(table), "iid:3", str(tmp_path / "out"))
    assert found["seconds"]["fit"] > 0 and found["seconds"]["sample"] > 0, found


def test_the_clock_gives_each_part_its_own() -> None:
    clock = cost_runs._Clock()
    spend = sum

    with clock.part("outer"):
        with clock.part("inner"):
            spend(range(3_000_000))
        spend(range(300_000))
    assert clock.seconds["inner"] > 2 * clock.seconds["outer"] > 0


# ---- study check --------------------------------------------------------------------------------------------


def check(*words: object) -> Any:
    return CliRunner().invoke(app, ["study", "check", *map(str, words)])


def test_study_check_says_what_it_will_take(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path)
    said = check(study, "--sites", 3)
    assert said.exit_code == 0, said.output
    for word in ("What it will take", "simulate", "network", "a hospital sends", "coordinator", "Measured on"):
        assert word in said.output


def test_study_check_says_it_to_machines(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path)
    value = json.loads(check(study, "--sites", 3, "--rows", 5000, "--json").output)
    cost = value["cost"]
    assert value["exchanges"] == cost["exchanges"] and cost["rows"] == 5000 and cost["patients"] == 100
    assert set(cost["seconds"]) == {"simulation", "hospital", "coordinator", "network_stream", "network_flower"}
    assert set(cost["megabytes"]) == {"simulation", "hospital", "coordinator"}
    for about in (*cost["seconds"].values(), *cost["megabytes"].values(), cost["bytes_sent_per_site"]):
        assert 0 < about["low"] <= about["value"] <= about["high"]


def test_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By option or environment; ten times slower is ten times longer."""
    study, _ = small_study(tmp_path)
    slow = shipped().to_json()
    slow["each"] = {
        group: {name: unit * (1 if group.endswith(("bytes", "mb")) else 10) for name, unit in units.items()}
        for group, units in slow["each"].items()
    }
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(slow))

    def seconds(*more: object) -> float:
        value = json.loads(check(study, "--sites", 3, "--json", *more).output)
        return float(value["cost"]["seconds"]["simulation"]["value"])

    here = seconds()
    assert seconds("--machine", path) == pytest.approx(10 * here)
    monkeypatch.setenv(MACHINE, str(path))
    assert seconds() == pytest.approx(10 * here)
    monkeypatch.setenv(MACHINE, str(tmp_path / "none.json"))
    refused = check(study, "--sites", 3)
    assert refused.exit_code == 2 and "COST-MACHINE" in refused.output


def test_words_have_two_digits_and_a_range() -> None:
    assert study_cli._time(About(value=234.0, low=120.0, high=431.0)) == "3.9 minutes (2–7.2)"
    assert study_cli._time(About(value=12.34, low=12.34, high=12.34)) == "12 seconds"
    assert study_cli._bytes(About(value=12_345_678.0, low=1e7, high=2e7)) == "12 MB (10–20)"
    assert study_cli._memory(About(value=640.0, low=600.0, high=700.0)) == "0.6 GB (0.6–0.7)"

"""`cohortium study check`: the plan and its price (server/cli.py), and what it will take (server/cost.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cohortium.common.errors import StudyError
from cohortium.common.terminal import emit, failures, out
from cohortium.server.cli import AcceptGuessed, AsJson, plan_facts, show_plan

if TYPE_CHECKING:
    from cohortium.server.cost import About, Forecast


def study_check(
    study: Annotated[Path, typer.Argument(help="study.toml")],
    sites: Annotated[
        int | None, typer.Option("--sites", help="How many hospitals; needed if the study does not name them.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows of all tables, where patients have several.")
    ] = None,
    machine: Annotated[
        Path | None, typer.Option("--machine", help="This machine's speed, as the cost model's benchmark wrote it.")
    ] = None,
    accept_guessed: AcceptGuessed = False,
    as_json: AsJson = False,
) -> None:
    """Compile the plan and print what it would ask, at which price, and what it will take. Reads no data."""
    with failures(as_json=as_json):
        from cohortium.common.study import Study
        from cohortium.server.cost import forecast, load_machine
        from cohortium.server.cost_shape import planned

        loaded = Study.load(study)
        if not accept_guessed:
            loaded.refuse_guesses()
        names = loaded.sites if sites is None else tuple(f"site-{i + 1:03d}" for i in range(sites))
        if not names:
            raise StudyError("STUDY-SITES", "the study does not name its sites", where=(str(study),), hint="--sites 5")
        made = planned(loaded, sites=names)
        said = forecast(made.plan, made.shape, load_machine(machine), patients=loaded.patients, rows=rows)

        def show() -> None:
            show_plan(made.plan)
            show_cost(said)

        emit({**plan_facts(made.plan), "exchanges": said.exchanges, "cost": said.to_json()}, as_json=as_json, show=show)


def show_cost(said: Forecast) -> None:
    """The part "What it will take", for people."""
    assumed = ", which the study does not say" if said.assumed else ""
    table = Table(title=f"What it will take: {said.rows:,} rows of {said.patients:,} patients{assumed}")
    table.title_justify = "left"
    for name in ("", "about", "memory"):
        table.add_column(name, overflow="fold")
    table.add_row("simulate, on one core", _time(said.simulation_s), _memory(said.simulation_mb))
    table.add_row("over the network", _time(said.network_s["stream"]), "")
    table.add_row("with --transport flower", _time(said.network_s["flower"]), "")
    table.add_row("a hospital computes", _time(said.hospital_s), _memory(said.hospital_mb))
    table.add_row("the coordinator computes", _time(said.coordinator_s), _memory(said.coordinator_mb))
    table.add_row("a hospital sends", _bytes(said.sent), "")
    table.add_row("a hospital gets", _bytes(said.received), "")
    out.print(table)
    about = said.machine
    out.print(
        f"Each of {said.exchanges} exchanges adds your line's delay. Measured on {about.get('processor', 'unknown')}, "
        f"{about.get('made', 'unknown')}; in brackets the range of nine in ten measured studies.",
        markup=False,
    )


def _range(low: str, high: str) -> str:
    return "" if low == high else f" ({low}–{high})"


def _time(about: About) -> str:
    unit, size = ("minutes", 60.0) if about.value >= 90 else ("seconds", 1.0)
    value, low, high = (_rounded(v / size) for v in (about.value, about.low, about.high))
    return f"{value} {unit}{_range(low, high)}"


def _memory(about: About) -> str:
    value, low, high = (f"{v / 1e3:.1f}" for v in (about.value, about.low, about.high))
    return f"{value} GB{_range(low, high)}"


def _bytes(about: About) -> str:
    value, low, high = (_rounded(v / 1e6) for v in (about.value, about.low, about.high))
    return f"{value} MB{_range(low, high)}"


def _rounded(value: float) -> str:
    """Two digits are all that a forecast has."""
    return f"{float(f'{value:.2g}'):,.10g}"

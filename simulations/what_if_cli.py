"""`cohortium what-if`: the command."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cohortium.common.errors import UsageError
from cohortium.common.processes import stopping
from cohortium.common.terminal import emit, err, failures, out
from cohortium.server.cli import AsJson

DECLARED = "The table holds no private record: it is public, or was drawn from a release. Required."


def what_if(
    study: Annotated[Path, typer.Argument(help="study.toml")],
    table: Annotated[Path, typer.Option("--table", help="A stand-in without private records (.parquet, .csv).")],
    not_private: Annotated[bool, typer.Option("--not-private", help=DECLARED)] = False,
    split: Annotated[
        str | None,
        typer.Option(help="by:COLUMN, iid:K or dirichlet:COLUMN:K:ALPHA; needed if the study does not name its sites."),
    ] = None,
    epsilons: Annotated[
        str, typer.Option("--epsilons", help="The ε to try: numbers with commas or blanks between them.")
    ] = "0.5,1,3,10",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of each ε, on other cuts with fresh noise.")] = 3,
    to: Annotated[Path, typer.Option("--out", help="Folder for the curve and its picture.")] = Path("what-if"),
    seed: Annotated[int, typer.Option(min=0, help="Of cuts and noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw expected quality against ε on a stand-in table, free of budget. Asks no hospital."""
    with failures(as_json=as_json):
        from cohortium.simulations import what_if as work
        from cohortium.simulations.tune import Interrupted

        work.refuse_private(table)
        if not not_private:
            raise UsageError(
                "WHAT-IF-DECLARE",
                "nobody has said that the table holds no private record. Choosing ε by looking at private records is "
                "a look at them, which nobody would have paid for",
                where=(str(table),),
                hint="--not-private, where the table is public or was drawn from an earlier release",
            )
        request = work.Request(
            study=study, table=table, out=to, split=split, epsilons=numbers(epsilons), seeds=seeds, seed=seed
        )
        err.print(f"STAND-IN DATA: the curve will be of {escape(table.name)}, not of your patients.", style="bold")
        stop = threading.Event()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=err) as bar:
                task = bar.add_task("reading the table", total=None)
                late = "Stopping after this fit (Ctrl-C again: at once) ..."
                with stopping(stop, impatient=True, also=lambda: bar.console.print(late)):
                    result = work.what_if(
                        request,
                        progress=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
                        stop=stop.is_set,
                    )
        except Interrupted as halt:
            said = f"Stopped after {halt.done} fits. The same command goes on from there."
            facts = {"stopped": True, "fits": halt.done, "resume": "the same command"}
            emit(facts, as_json=as_json, show=lambda: out.print(said))
            raise typer.Exit(130) from None
        emit(result, as_json=as_json, show=lambda: _show(result))


def numbers(text: str) -> tuple[float, ...]:
    """ "0.5, 1 3" as numbers. UsageError WHAT-IF-EPSILONS."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            "WHAT-IF-EPSILONS", f"{text!r} is not a list of numbers", hint="--epsilons 0.5,1,3,10"
        ) from None


def _show(result: dict[str, Any]) -> None:
    stand_in = result["stand_in"]
    title = f"{result['study']} on STAND-IN {stand_in['file']}: mean and 95 % interval of {result['seeds']} repetitions"
    shown = Table(title=escape(title), title_justify="left")
    names = list(result["references"])
    for name in ("ε", "generator", *(_TITLES[name] for name in names)):
        shown.add_column(name, justify="right" if name not in ("generator",) else "left")
    for point in result["points"]:
        cells = [_cell(point["scores"][name]) for name in names]
        shown.add_row(f"{point['epsilon']:g}", point["generator"], *cells)
    for row, what in (("real", "the stand-in's own rows"), ("shuffled", "its columns shuffled")):
        shown.add_row(what, "", *(_cell(result["references"][name][row]) for name in names))
    out.print(shown)
    for refused in result["refused"]:
        out.print(f"ε = {refused['epsilon']:g} makes no plan: {refused['error']}: {refused['sentence']}", markup=False)
    if result["no_auc"]:
        out.print(f"No AUC: {result['no_auc']}.", markup=False)
    out.print(result["says"], markup=False)
    out.print(f"Picture: {result['files']['what-if.html']}", markup=False)


_TITLES = {"tvd2": "pairs of columns, TVD (lower is better)", "auc": "AUC of the target (higher is better)"}


def _cell(value: dict[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return ""
    interval = "" if value["low"] is None else f" ({value['low']:.3f}–{value['high']:.3f})"
    return f"{value['mean']:.3f}{interval}"

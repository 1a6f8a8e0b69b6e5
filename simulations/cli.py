"""`cohortium`: the command. Here: demo, simulate, report; the rest comes from server/cli and server/consortium_cli."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cohortium.client.cli import site_app
from cohortium.client.member_cli import member_app
from cohortium.client.page_cli import page
from cohortium.common.errors import UsageError
from cohortium.common.privacy.budget import rounded_up
from cohortium.common.processes import stopping
from cohortium.common.terminal import emit, err, failures, out
from cohortium.server import cli as server_cli
from cohortium.server import consortium_cli
from cohortium.server.cli import AcceptGuessed, AsJson
from cohortium.server.console.journal_cli import verify_journal_command
from cohortium.server.console_cli import console_app
from cohortium.server.showing import evaluation_shown
from cohortium.simulations import study_cli, tune_cli, what_if_cli

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Hospitals that may not share a patient record publish one private synthetic dataset together.",
)
server_cli.study_app.command("check")(study_cli.study_check)
app.add_typer(server_cli.study_app, name="study")
app.command("tune")(tune_cli.tune)
app.command("what-if")(what_if_cli.what_if)
app.command("sample")(server_cli.sample)
app.command("analyze")(server_cli.analyze)
app.command("audit")(server_cli.audit)
app.command("release")(server_cli.release)
app.command("verify")(server_cli.verify)
app.command("doctor")(server_cli.doctor)
app.add_typer(consortium_cli.consortium_app, name="consortium")
app.add_typer(consortium_cli.sites_app, name="sites")
console_app.command("verify-journal")(verify_journal_command)
app.add_typer(console_app, name="console")
site_app.command("page")(page)
app.add_typer(site_app, name="site")
app.add_typer(member_app, name="member")
for command in (consortium_cli.serve, consortium_cli.run, consortium_cli.watch, consortium_cli.stop):
    app.command(command.__name__)(command)
app.command("resume")(consortium_cli.resume)


@app.command("demo")
def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo-result"),
    table: Annotated[Path | None, typer.Option(help="Another table; needs --study, and --split.")] = None,
    study: Annotated[Path | None, typer.Option(help="The study for another table.")] = None,
    split: Annotated[str, typer.Option(help="How rows become hospitals.")] = "by:hospital",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier demo.")] = False,
    as_json: AsJson = False,
) -> None:
    """Federate 920 heart patients of four real hospitals: everything in a few minutes, without network."""
    with failures(as_json=as_json):
        from cohortium.simulations.run import Request

        if (table is None) != (study is None):
            raise UsageError("DEMO-STUDY", "another table needs its study", hint="cohortium study new --table FILE")
        here = Path(str(resources.files("cohortium.simulations")))
        if force:
            _remove_earlier(to)
        request = Request(
            study=study or here / "scenarios" / "demo.toml",
            table=table or here / "data" / "heart.parquet",
            split=split,
            out=to,
        )
        _simulate(request, None, as_json=as_json)


def _remove_earlier(to: Path) -> None:
    """Only a folder that a simulation made is ever removed."""
    import shutil

    if to.exists() and any(to.iterdir()):
        if not (to / "run.json").exists():
            raise UsageError("DEMO-OUT", "that folder was not made by a simulation", where=(str(to),))
        shutil.rmtree(to)


@app.command("simulate")
def simulate(
    study: Annotated[Path | None, typer.Argument(help="study.toml")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="The whole table (.parquet, .csv).")] = None,
    split: Annotated[str, typer.Option(help="by:COLUMN, iid:K or dirichlet:COLUMN:K:ALPHA.")] = "iid:5",
    to: Annotated[Path, typer.Option("--out", help="Folder for everything the simulation makes.")] = Path("simulation"),
    engine: Annotated[str, typer.Option(help="in-process, or ray (pip install 'cohortium[ray]').")] = "in-process",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Reproducible rehearsal: its noise can be recomputed, NOT private.")
    ] = None,
    no_noise: Annotated[bool, typer.Option("--no-noise", help="Switch the noise off: no privacy; for tests.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted simulation in this folder.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Rehearse with canaries as well: the report shows what an auditor proves.")
    ] = False,
    accept_guessed: AcceptGuessed = False,
    as_json: AsJson = False,
) -> None:
    """Turn one table into hospitals on this machine and run the study over them."""
    with failures(as_json=as_json):
        from cohortium.simulations.run import Request

        if resume is not None:
            if study is not None or table is not None or seed is not None or no_noise:
                raise UsageError(
                    "SIMULATE-RESUME", "--resume takes study, table, seed and noise from its folder", hint="drop them"
                )
            _simulate(None, resume, engine=engine, audit=audit, as_json=as_json)
            return
        if study is None or table is None:
            raise UsageError(
                "SIMULATE-ARGUMENTS",
                "a simulation needs a study and a table",
                hint="cohortium simulate study.toml --table FILE",
            )
        request = Request(
            study=study,
            table=table,
            split=split,
            out=to,
            seed=seed,
            noise=not no_noise,
            accept_guessed_ranges=accept_guessed,
        )
        _simulate(request, None, engine=engine, audit=audit, as_json=as_json)


@app.command("report")
def report(
    directory: Annotated[Path, typer.Argument(help="Folder of a finished simulation.")], as_json: AsJson = False
) -> None:
    """Write report.html again from result.json."""
    with failures(as_json=as_json):
        from cohortium.simulations.finish import rewrite_report

        if not (directory / "result.json").exists():
            raise UsageError("REPORT-RESULT", "there is no result.json here", where=(str(directory),))
        path = rewrite_report(directory)
        emit({"report": str(path)}, as_json=as_json, show=lambda: out.print(f"Wrote {path}."))


def _simulate(
    request: Any, resume: Path | None, *, engine: str = "in-process", audit: bool = False, as_json: bool
) -> None:
    from cohortium.server.asking import Stopped
    from cohortium.server.runs import RunFolder
    from cohortium.simulations import engines
    from cohortium.simulations.finish import finish
    from cohortium.simulations.run import prepare, run

    if engine not in ("in-process", "ray"):
        raise UsageError("ENGINE", f"there is no engine {engine!r}", hint="--engine in-process or --engine ray")
    started = time.monotonic()
    folder = resume if resume is not None else request.out
    if resume is None:
        err.print("Compiling the plan and setting up the hospitals ...")
        prepare(request)
    plan = RunFolder(root=folder).plan()
    with _watched(plan.releases) as (bar, stop):
        try:
            chosen = engines.Ray() if engine == "ray" else engines.InProcess(threads=engines.SITES_AT_ONCE)
            run(folder, engine=chosen, on_event=bar.on_event, stop=stop.is_set)
        except Stopped:
            bar.close()
            _say_stopped(folder, as_json=as_json)
            raise typer.Exit(130) from None
        if audit:
            from cohortium.simulations.rehearsal import write_audit

            bar.say("rehearsing with canaries: what can an auditor prove?")
            facts = RunFolder(root=folder).facts()
            write_audit(folder, seed=int(facts["seed"]) if facts["rehearsal"] else None)
        result = finish(folder, progress=bar.say)
    result["seconds"] = round(time.monotonic() - started, 1)
    emit(result, as_json=as_json, show=lambda: show_verdict(folder, result))


class _Bar:
    """Live progress on stderr: releases answered, who dropped, what the coordinator does."""

    def __init__(self, releases: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=False,
        )
        self._task = self._progress.add_task("hospitals answer", total=releases)
        self._fit: Any = None
        self._progress.start()

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "release":
            if event["dropped"]:
                self._progress.console.print(f"release {event['index']}: without {', '.join(event['dropped'])}")
            self._progress.update(self._task, completed=event["index"] + 1, description=f"asked: {event['purpose']}")
        elif event["event"] == "fit":
            if self._fit is None:
                self._fit = self._progress.add_task("fit", total=100)
            self._progress.update(self._fit, description=event["what"], completed=round(100 * event["share"]))
        elif event["event"] == "evaluate":
            self._progress.update(self._task, description=f"evaluated: {event['what']}")
        elif event["event"] == "fitted" and self._fit is not None:
            self._progress.update(self._fit, completed=100, description="model fitted")

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def _watched(releases: int) -> Iterator[tuple[_Bar, threading.Event]]:
    """Progress, and a Ctrl-C that stops after the release under way (a second one at once)."""
    stop, bar = threading.Event(), _Bar(releases)
    try:
        with stopping(
            stop, impatient=True, also=lambda: bar.say("Stopping after this release (Ctrl-C again: at once) ...")
        ):
            yield bar, stop
    finally:
        bar.close()


def _say_stopped(folder: Path, *, as_json: bool) -> None:
    """What was spent when a run was stopped, from the sites' ledgers."""
    from cohortium.common.privacy.accountant import epsilon
    from cohortium.common.privacy.ledger import Ledger
    from cohortium.server.runs import RunFolder

    run_folder = RunFolder(root=folder)
    plan, run = run_folder.plan(), str(run_folder.facts()["run"])
    spent = 0.0
    for name in plan.sites:
        charged = Ledger.open(folder / "sites" / name / "ledger.db").charged_events(run)
        spent = max(spent, epsilon(charged, delta=plan.delta, hospitals=plan.hospitals))
    told: float | str = "inf" if math.isinf(spent) else spent
    facts = {"stopped": True, "epsilon_spent": told, "epsilon": plan.epsilon, "resume": f"--resume {folder}"}
    emit(
        facts,
        as_json=as_json,
        show=lambda: out.print(
            f"Stopped. Spent: ε = {rounded_up(spent)} of {plan.epsilon:g} at δ = {plan.delta:g}. Nothing is lost and "
            f"nothing is paid twice: cohortium simulate --resume {escape(str(folder))}"
        ),
    )


def show_verdict(folder: Path, result: dict[str, Any]) -> None:
    """One screen: the promise, the price, what it is good for, where the files are. All of it is in result.json."""
    privacy, scores = result["privacy"], result["scores"]
    lines = [f"[bold]{escape(privacy['sentence'])}[/]"]
    price = {(row["relation"], row["hospitals"]): row["epsilon"] for row in privacy["prices"]}
    lines.append(
        "replace-one: ε = {}; a patient in 2 or 3 hospitals: ε = {} or {}".format(
            *(rounded_up(float(price[key])) for key in (("replace-one", 1), ("add-remove", 2), ("add-remove", 3)))
        )
    )
    lines += [f"[bold red]{escape(warning)}[/]" for warning in result["warnings"]]
    out.print(Panel("\n".join(lines), title=escape(result["study"]["title"]), title_align="left"))
    if scores is not None:
        out.print(escape(scores["headline"]))
        table = Table(title=f"Compared with {scores['basis']}", title_justify="left")
        for name in ("figure", "synthetic", "95 % interval", "real", "shuffled"):
            table.add_column(name, justify="left" if name == "figure" else "right")
        from cohortium.common.evaluation.report import TITLES

        for name, figure in scores["figures"].items():
            table.add_row(TITLES.get(name, name), *_cells(figure))
        out.print(table)
        tiles = Table(title="Fit for, by exact scores", title_justify="left")
        tiles.add_column("use")
        tiles.add_column("verdict")
        for tile in scores["verdicts"]:
            tiles.add_row(escape(tile["use"]), escape(tile["word"]))
        out.print(tiles)
    for shown in evaluation_shown(result):
        out.print(shown)
    out.print(
        f"{result['facts']['rounds'][-1]['round'] + 1} releases by {len(result['ledgers']) - 1} hospitals in "
        f"{result['seconds']} s. Open {folder}/report.html or summary.pdf; rows in {folder}/synthetic.parquet and .csv."
    )
    out.print(f"Check every claim yourself: cohortium audit {folder}")


def _cells(figure: dict[str, Any]) -> tuple[str, str, str, str]:
    def number(value: Any) -> str:
        return "" if value is None else f"{value:.3f}"

    if figure["value"] is None:
        return "cannot be assessed", "", "", ""
    interval = "" if figure["low"] is None else f"{number(figure['low'])} – {number(figure['high'])}"
    return number(figure["value"]), interval, number(figure["reference"]), number(figure["floor"])


def main() -> None:
    """The console command."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("Stopped at once. What was charged stays charged; `simulate --resume` goes on.")
        sys.exit(130)


if __name__ == "__main__":
    main()

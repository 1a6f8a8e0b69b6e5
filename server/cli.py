"""Commands that need no hospital: study new, sample, analyze, audit, release, verify, doctor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cohortium.common.errors import StudyError, UsageError
from cohortium.common.privacy.budget import rounded_up
from cohortium.common.terminal import emit, err, failures, out

if TYPE_CHECKING:
    from cohortium.common.privacy.plan import Plan

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
AcceptGuessed = Annotated[
    bool, typer.Option("--accept-guessed-ranges", help="Use a dictionary with ranges guessed from data (not private).")
]
study_app = typer.Typer(no_args_is_help=True, help="Write and check a study.")


@study_app.command("new")
def study_new(
    table: Annotated[Path, typer.Option("--table", help="A table to draft the dictionary from (.csv, .parquet).")],
    to: Annotated[Path, typer.Option("--out", help="Folder for study.toml and dictionary.json.")] = Path("study"),
    as_json: AsJson = False,
) -> None:
    """Draft a commented study.toml and a dictionary, to be completed by people."""
    with failures(as_json=as_json):
        from cohortium.client.sources.base import read
        from cohortium.common.drafting import draft

        made = draft(read(table), name=table.stem)
        files = to / "study.toml", to / "dictionary.json"
        if any(path.exists() for path in files):
            raise StudyError("STUDY-EXISTS", "there is a study already", where=(str(to),), hint="choose another --out")
        to.mkdir(parents=True, exist_ok=True)
        files[0].write_text(made.study, encoding="utf-8")
        made.schema.save(files[1])
        guessed = list(made.schema.guessed)
        emit(
            {"study": str(files[0]), "dictionary": str(files[1]), "guessed": guessed, "warning": made.warning},
            as_json=as_json,
            show=lambda: _say_draft(files[0], files[1], guessed, made.warning),
        )


def _say_draft(study: Path, dictionary: Path, guessed: list[str], warning: str) -> None:
    out.print(f"Wrote {study} and {dictionary}.")
    out.print(warning, style="yellow")
    if guessed:
        out.print(f"Columns to complete: {', '.join(guessed)}.")
    out.print(f"Then: cohortium study check {study} --sites 5")


def plan_facts(plan: Plan) -> dict[str, Any]:
    """All that `study check` prints, as plain JSON."""
    cumulated = {stage.name: epsilon for stage, epsilon in plan.cumulated()}
    return {
        "study": plan.study,
        "plan": plan.digest,
        "generator": plan.generator,
        "mode": plan.mode,
        "sites": len(plan.sites),
        "survivors": plan.survivors,
        "colluders": plan.colluders,
        "delta": plan.delta,
        "unit": plan.unit,
        "rows_per_patient": plan.rows_per_patient,
        "statement": plan.statement().sentence(),
        "stages": [
            {
                "phase": s.name,
                "purpose": s.purpose,
                "kind": s.kind,
                "part": s.part,
                "releases": s.repeats,
                "steps": s.steps,
                "sampling_rate": s.event.probability,
                "noise_multiplier": s.noise_multiplier,
                "numbers": s.max_dim,
                "epsilon_cumulated": cumulated[s.name],
            }
            for s in plan.stages
        ],
        "epsilon": {
            relation: {str(k): plan.price(relation=relation, hospitals=k) for k in (1, 2, 3)}
            for relation in ("add-remove", "replace-one")
        },
        "bytes_per_site": plan.bytes_per_site(),
    }


def show_plan(plan: Plan) -> None:
    title = f"{plan.study}: {plan.generator}, {plan.mode}, {len(plan.sites)} sites"
    table = Table(title=title, title_justify="left")
    table.add_column("phase", no_wrap=True)
    for name in ("releases", "sampling", "noise σ/Δ", "numbers", "ε so far"):
        table.add_column(name, justify="right")
    cumulated = {stage.name: epsilon for stage, epsilon in plan.cumulated()}
    for part, of in (("train", "of training patients"), ("holdout", "of held-out patients")):
        stages = [stage for stage in plan.stages if stage.part == part]
        if not stages:
            continue
        table.add_section()
        table.add_row(f"[dim]{of}[/]")
        for stage in stages:
            repeats = str(stage.repeats) if stage.steps == 1 else f"{stage.repeats} × {stage.steps}"
            table.add_row(
                escape(stage.name),
                repeats,
                f"{stage.event.probability:.3g}",
                f"{stage.noise_multiplier:.3g}",
                f"{stage.max_dim:,}",
                f"{cumulated[stage.name]:.3f}",
            )
    out.print(table)
    for stage in plan.stages:
        out.print(f"[dim]{escape(stage.name)}[/]  {escape(stage.purpose)}", soft_wrap=True)
    prices = Table(title=f"Price of the whole plan at δ = {plan.delta:g}", title_justify="left")
    prices.add_column("a patient is in")
    prices.add_column("ε, add/remove", justify="right")
    prices.add_column("ε, replace-one", justify="right")
    for k in (1, 2, 3):
        row = [plan.price(relation=relation, hospitals=k) for relation in ("add-remove", "replace-one")]
        mark = "  ← the study's statement" if k == plan.hospitals else ""
        prices.add_row(f"{k} hospital{'s' if k > 1 else ''}{mark}", *(rounded_up(e) for e in row))
    out.print(prices)
    out.print(plan.statement().sentence())
    if plan.mode == "secure-sum":
        out.print(
            f"Holds while at least {plan.shares} honest sites stay to the end of a round (t = {plan.survivors} must "
            f"stay, c = {plan.colluders} may side with the coordinator)."
        )
    out.print(f"Each site sends at most {plan.bytes_per_site() / 1e6:.1f} MB.")


def sample(
    directory: Annotated[Path, typer.Argument(help="Folder of a finished simulation.")],
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")] = 1000,
    where: Annotated[str | None, typer.Option(help='Condition, e.g. "sex=F and age>=65".')] = None,
    balance: Annotated[
        str | None,
        typer.Option(help="Columns whose levels, or combinations of them, shall occur equally often: sex,died."),
    ] = None,
    minimum_share: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=0.05: each level of it gets at least that share of the rows; may repeat."),
    ] = None,
    to: Annotated[list[Path] | None, typer.Option("-o", "--out", help="File (.parquet, .csv); may repeat.")] = None,
    replicates: Annotated[
        int | None,
        typer.Option(
            help="Also replay the release so often: a table each, to compute intervals from (docs/analyze.md)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same rows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw synthetic rows from a fitted model: free of budget."""
    with failures(as_json=as_json):
        if replicates is not None:
            if where or balance or minimum_share:
                raise UsageError(
                    "SAMPLE-REPLICATES",
                    "replicates are tables of everybody",
                    hint="leave --where, --balance and --minimum-share out and choose rows in the analysis",
                )
            _sample_replicates(directory, replicates, rows, to, seed=seed, as_json=as_json)
            return
        from cohortium.common.study_release import Release, how_sampled
        from cohortium.server.runs import RunFolder
        from cohortium.server.sampling import parse_columns, parse_shares, parse_where, write_rows

        folder = RunFolder(root=directory)
        outs = to or [Path("sample.parquet")]
        conditions = parse_where(where, folder)
        columns, shares = parse_columns(balance, folder), parse_shares(minimum_share or [])
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=err, transient=True
        ) as bar:
            task = bar.add_task("sampling", total=rows)
            written = write_rows(
                folder,
                rows,
                outs,
                seed=seed,
                where=conditions,
                balance=columns,
                minimum_share=shares,
                progress=lambda n: bar.update(task, completed=n),
            )
        design = Release(rows=rows, balance=columns, minimum_share=tuple(shares.items()))
        said = how_sampled(design, folder.study().schema)
        emit(
            {"rows": written, "files": [str(path) for path in outs], "seed": seed, "sampled": list(said)},
            as_json=as_json,
            show=lambda: out.print("\n".join((f"Wrote {written:,} rows to {', '.join(map(str, outs))}.", *said))),
        )


def _sample_replicates(
    directory: Path, replicates: int, rows: int, to: list[Path] | None, *, seed: int, as_json: bool
) -> None:
    from cohortium.server.replicate_tables import write_replicates
    from cohortium.server.runs import RunFolder

    if to is not None and len(to) > 1:
        raise UsageError("SAMPLE-REPLICATES", "replicates are named after one file", hint="-o rows.parquet")
    target = to[0] if to else Path("sample.parquet")
    with _bar() as bar:
        task = bar.add_task("replaying the release", total=replicates + 2)
        files = write_replicates(
            RunFolder(root=directory),
            replicates,
            rows,
            target,
            seed=seed,
            progress=lambda done: bar.update(task, completed=done),
        )
    shown = f"Wrote {files[0]} (the world), {files[1]} (this run) and {len(files) - 2} replays to {files[-1]}."
    emit(
        {"rows": rows, "files": [str(path) for path in files], "seed": seed},
        as_json=as_json,
        show=lambda: out.print(shown, markup=False),
    )


def _bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=err, transient=True)


def analyze(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    mean: Annotated[
        list[str] | None, typer.Option("--mean", help="A number, or the share of a level: age, stage=III; may repeat.")
    ] = None,
    logistic: Annotated[
        list[str] | None, typer.Option("--logistic", help="'death ~ age + sex + arm[control]'; may repeat.")
    ] = None,
    cox: Annotated[list[str] | None, typer.Option("--cox", help="'time, event ~ age + arm'; may repeat.")] = None,
    replicates: Annotated[int, typer.Option(help="How often the release is replayed.")] = 30,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same intervals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Means, odds ratios and hazard ratios with intervals that count the privacy noise: free of budget."""
    with failures(as_json=as_json):
        from cohortium.server.analysis import analyze as run_analyze
        from cohortium.server.analysis import read_formulas
        from cohortium.server.analysis_shown import tables
        from cohortium.server.runs import RunFolder

        folder = RunFolder(root=directory)
        estimands = read_formulas(folder, means=mean or (), logistic=logistic or (), cox=cox or ())
        with _bar() as bar:
            task = bar.add_task("replaying the release", total=None)
            found = run_analyze(
                folder,
                estimands,
                replicates=replicates,
                level=level,
                seed=seed,
                progress=lambda done, of: bar.update(task, completed=done, total=of),
            )

        def show() -> None:
            for shown in tables(found):
                out.print(shown)

        emit(found.to_json(), as_json=as_json, show=show)


def audit(
    directory: Annotated[Path, typer.Argument(help="Folder of a simulation, a run or a release.")],
    as_json: AsJson = False,
) -> None:
    """Recompute every ε and check every signature and chain, offline, from the files alone."""
    with failures(as_json=as_json):
        from cohortium.server.audit import audit as run_audit

        found = run_audit(directory)

        def show() -> None:
            table = Table(title=f"Audit of {directory}", title_justify="left")
            table.add_column("")
            table.add_column("check")
            table.add_column("found")
            for check in found.checks:
                table.add_row("[green]✓[/]" if check.ok else "[red]✗[/]", check.name, check.detail)
            out.print(table)
            for owner, print_ in found.keys.items():
                out.print(f"key of {owner}: {print_}")
            bad = sum(not check.ok for check in found.checks)
            out.print("[bold green]Everything holds.[/]" if found.ok else f"[bold red]{bad} checks failed.[/]")

        emit(found.to_json(), as_json=as_json, show=show)
    if not found.ok:
        raise typer.Exit(1)


def release(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="A new folder for the release (default RUN/release).")
    ] = None,
    rehearsal: Annotated[
        bool, typer.Option("--rehearsal", help="Release a seeded run all the same: NOT private, and marked so.")
    ] = False,
    accept_guessed: AcceptGuessed = False,
    as_json: AsJson = False,
) -> None:
    """Write a finished run as one folder to hand out, signed by the coordinator; at least t sites sign it next."""
    with failures(as_json=as_json):
        from cohortium.server.release import release as write_release

        made = write_release(
            directory,
            to,
            rehearsal=rehearsal,
            accept_guessed=accept_guessed,
            progress=lambda text: None if as_json else err.print(f"{text} ...", markup=False),
        )

        def show() -> None:
            facts = made.to_json()
            for finding in made.gate:
                out.print(f"{'✓' if finding.ok else '!'} {finding.name}: {finding.detail}", markup=False)
            out.print(facts["statement"], markup=False)
            for warning in facts["warnings"]:
                out.print(warning, style="bold red", markup=False)
            out.print(f"Wrote {made.folder}: {len(facts['files'])} files, signed by the coordinator.", markup=False)
            out.print(
                f"At least {made.needed} sites sign it, each with: cohortium site sign SITE {made.folder}", markup=False
            )
            out.print(f"Then check it as a reader does: cohortium verify {made.folder}", markup=False)

        emit(made.to_json(), as_json=as_json, show=show)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a release.")],
    root: Annotated[
        list[str] | None,
        typer.Option("--root", help="Fingerprint of a key that you know: HEX or NAME=HEX; may repeat."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a release offline: every file, ledger, figure and signature, from the folder alone."""
    with failures(as_json=as_json):
        from cohortium.server.release_verify import verify as run_verify

        found = run_verify(directory, roots=root or ())

        def show() -> None:
            table = Table(title=f"Release {directory}", title_justify="left")
            for name in ("", "check", "found", "code"):
                table.add_column(name, overflow="fold")
            for finding in found.findings:
                mark, code = ("[green]✓[/]", "") if finding.ok else ("[red]✗[/]", finding.code)
                table.add_row(mark, escape(finding.name), escape(finding.detail), code)
            out.print(table)
            for owner, shown in found.signers.items():
                out.print(f"signed by {owner}: {shown}", markup=False, soft_wrap=True)
            if not root:
                out.print("Compare these keys with those that the hospitals announce, or name one with --root.")
            out.print(found.sentence, markup=False)
            bad = sum(not finding.ok for finding in found.findings)
            if found.rehearsal:
                out.print("This release is a rehearsal and NOT private.", style="bold white on red")
            out.print("[bold green]Everything holds.[/]" if found.ok else f"[bold red]{bad} checks failed.[/]")

        emit(found.to_json(), as_json=as_json, show=show)
    if not found.ok:
        raise typer.Exit(1)


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, cores, memory, disk, GPU, what is missing and how to get it."""
    with failures(as_json=as_json):
        checks = _doctor()

        def show() -> None:
            table = Table(title="Check of this machine", title_justify="left")
            for name in ("check", "result", "fix"):
                table.add_column(name)
            for name, ok, result, fix in checks:
                table.add_row(f"{'[green]✓[/]' if ok else '[red]✗[/]'} {name}", result, fix if not ok else "")
            out.print(table)

        emit([dict(zip(("check", "ok", "result", "fix"), c)) for c in checks], as_json=as_json, show=show)
    if not all(ok for _, ok, _, _ in checks):
        raise typer.Exit(1)


def _doctor() -> list[tuple[str, bool, str, str]]:
    checks = [("Python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")]
    for name in ("flwr", "torch", "numpy", "pandas", "pyarrow", "cryptography", "dp-accounting", "ray"):
        optional = name == "ray"
        try:
            version = importlib.metadata.version(name)
            checks.append((name, name != "flwr" or version.startswith("1.41."), version, "pip install 'flwr==1.41.*'"))
        except importlib.metadata.PackageNotFoundError:
            hint = "pip install 'cohortium[ray]' for --engine ray" if optional else f"pip install {name}"
            checks.append((name, optional, "not installed" + (" (only for --engine ray)" if optional else ""), hint))
    cores = os.cpu_count() or 1
    checks.append(("cores", True, str(cores), ""))
    free = shutil.disk_usage(".").free
    checks.append(("free disk", free > 1e9, f"{free / 1e9:.1f} GB", "free at least 1 GB"))
    strict = sqlite3.sqlite_version_info >= (3, 37)
    checks.append(("SQLite", strict, sqlite3.sqlite_version, "the ledger needs SQLite 3.37 (STRICT tables)"))
    try:
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: the CPU is used"
    except ImportError:
        gpu = "unknown without torch"
    checks.append(("GPU", True, gpu, ""))
    return checks

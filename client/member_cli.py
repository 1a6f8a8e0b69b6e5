"""`cohortium member …`: for researchers, who fetch the rows of runs that were granted to them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cohortium.common.terminal import emit, err, failures, out

member_app = typer.Typer(no_args_is_help=True, help="Researchers: join by an invitation, fetch synthetic rows.")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The member's directory, or a site's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@member_app.command("join")
def join(
    directory: Directory,
    invitation: Annotated[Path, typer.Option("--invitation", help="File that the coordinator gave you.")],
    as_json: AsJson = False,
) -> None:
    """Make a key here and get a certificate by an invitation; again with a new one after the last has ended."""
    with failures(as_json=as_json):
        from cohortium.client.member import join as join_member
        from cohortium.common.protocol.invitation import Invitation

        made = join_member(directory, Invitation.from_text(invitation.read_text(encoding="utf-8")))
        facts = {
            "name": made.name,
            "role": made.role,
            "consortium": made.consortium,
            "root": made.root_print,
            "coordinator": made.coordinator_print,
            "request": made.request,
        }

        def show() -> None:
            out.print(f"Enrolled as {made.name} of {made.consortium}. Compare by telephone with the coordinator:")
            out.print(f"  the consortium's root  {made.root_print}\n  this request           {made.request}")
            out.print(f"Then: cohortium member runs {directory}", soft_wrap=True)

        emit(facts, as_json=as_json, show=show)


@member_app.command("runs")
def runs(
    directory: Directory,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="One run; all that you may see without it.")] = "",
    as_json: AsJson = False,
) -> None:
    """What the coordinator says of the runs that this member may see."""
    with failures(as_json=as_json):
        from cohortium.client.member import runs as ask

        found = ask(directory, run)

        def show() -> None:
            rows = [found] if run else found.get("runs", [])
            if not rows:
                out.print("No run yet. The coordinator lets you see one: cohortium sites grant DIR RUN NAME")
                return
            table = Table("run", "state", "message")
            for row in rows:
                table.add_row(*(str(row.get(name, "")) for name in ("run", "state", "message")))
            out.print(table)

        emit(found, as_json=as_json, show=show)


@member_app.command("rows")
def rows(
    directory: Directory,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run.")],
    to: Annotated[Path, typer.Option("--out", help="FILE.parquet or FILE.csv; must not exist.")],
    number: Annotated[int, typer.Option("--rows", min=0, help="So many; 0: the table as it was published.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fetch synthetic rows of a finished run: drawn from its model, they cost no privacy, however many."""
    with failures(as_json=as_json):
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        from cohortium.client.member import fetch

        shown = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*shown, console=err, disable=not err.is_terminal, transient=True) as bar:
            task = bar.add_task("fetching", total=None)
            got = fetch(directory, run, to, rows=number, on_bytes=lambda n: bar.update(task, completed=n))
        facts = {**asdict(got), "path": str(got.path), "run": run}
        emit(
            facts,
            as_json=as_json,
            show=lambda: out.print(f"{got.path}: {got.bytes:,} bytes, SHA-256 {got.sha256}", soft_wrap=True),
        )


@member_app.command("renew")
def renew(directory: Directory, as_json: AsJson = False) -> None:
    """Renew the certificate if two thirds of its day are over; for a timer, every few hours."""
    with failures(as_json=as_json):
        from cohortium.client.member import renew_if_due

        done = renew_if_due(directory)
        told = "renewed" if done else "not due yet"
        emit({"renewed": done}, as_json=as_json, show=lambda: out.print(f"The certificate: {told}."))

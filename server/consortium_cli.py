"""The coordinator's commands: consortium init|issuer, sites invite|list|revoke|grant, serve, run, watch, stop, resume.

They and the service meet in the consortium's folder and nowhere else: what a command wants is a line in register.db,
which `cohortium serve` reads within a second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cohortium.common.errors import UsageError
from cohortium.common.terminal import emit, err, failures, out
from cohortium.server.cli import AcceptGuessed, AsJson
from cohortium.server.showing import evaluation_shown

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The consortium's folder.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]
PassphraseRef = Annotated[
    str | None, typer.Option("--passphrase", help="Where the root's passphrase is: env:NAME or file:PATH.")
]
PassphraseFile = Annotated[Path | None, typer.Option("--passphrase-file", help="The same as --passphrase file:PATH.")]

consortium_app = typer.Typer(no_args_is_help=True, help="Set up a consortium on the coordinator's machine.")
sites_app = typer.Typer(no_args_is_help=True, help="Invite, list and revoke the members.")


@consortium_app.command("init")
def init(
    directory: Folder,
    name: Annotated[str, typer.Option("--name", help="The consortium's name: small letters, digits, dashes.")],
    host: Annotated[str, typer.Option("--host", help="Name or address under which sites reach this machine.")],
    listen: Annotated[str | None, typer.Option(help="Interface to bind to (default: all; loopback for it).")] = None,
    service_port: Annotated[int, typer.Option(help="Public: the members' service.")] = 7441,
    enrol_port: Annotated[int, typer.Option(help="Public: enrolment with an invitation.")] = 7442,
    fleet_port: Annotated[int, typer.Option(help="Public: Flower's Fleet paths.")] = 7443,
    superlink_port: Annotated[int, typer.Option(help="Loopback only: Flower's SuperLink.")] = 7440,
    passphrase: PassphraseRef = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make root, issuer, keys and register of a new consortium."""
    with failures(as_json=as_json):
        from cohortium.common.protocol import certificates
        from cohortium.server.consortium import Addresses, Consortium

        addresses = Addresses(
            host=host,
            listen=listen or ("127.0.0.1" if Addresses(host=host).is_loopback else "0.0.0.0"),
            service_port=service_port,
            enrol_port=enrol_port,
            fleet_port=fleet_port,
            superlink_port=superlink_port,
        )
        secret = _passphrase(passphrase, passphrase_file, confirm=True)
        made = Consortium.create(directory, name=name, addresses=addresses, passphrase=secret)
        root_print = certificates.fingerprint(made.root_pem())
        facts = {
            "consortium": name,
            "folder": str(directory),
            "root_fingerprint": root_print,
            "root_key": str(directory / "root" / "root.key"),
            "issuer_ends": f"{made.issuer().expires:%Y-%m-%dT%H:%M:%SZ}",
            "service": addresses.service,
            "enrolment": addresses.enrol,
            "fleet": addresses.fleet,
        }

        def show() -> None:
            out.print(f"Made the consortium {name} in {escape(str(directory))}.")
            out.print(f"Root fingerprint, to be read to every site: [bold]{root_print}[/]", soft_wrap=True)
            out.print(
                f"Now move {escape(str(directory / 'root' / 'root.key'))} to a medium that you lock away. It is needed "
                f"again before {made.issuer().expires:%Y-%m-%d}, for a new issuer.",
                soft_wrap=True,
            )
            out.print(f"Next: cohortium sites invite {escape(str(directory))} NAME", soft_wrap=True)

        emit(facts, as_json=as_json, show=show)


@consortium_app.command("issuer")
def issuer(
    directory: Folder,
    root: Annotated[Path | None, typer.Option("--root", help="Folder with root.pem and root.key (DIR/root).")] = None,
    passphrase: PassphraseRef = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a new issuer with the root, for 90 days. A running `serve` takes it up."""
    with failures(as_json=as_json):
        from cohortium.server.consortium import Consortium

        found = Consortium(directory)
        secret = _passphrase(passphrase, passphrase_file, confirm=False)
        found.renew_issuer(root or directory / "root", passphrase=secret)
        ends = f"{found.issuer().expires:%Y-%m-%d}"
        emit(
            {"issuer_ends": ends},
            as_json=as_json,
            show=lambda: out.print(
                f"The new issuer holds until {ends}. Restart `cohortium serve`, lock the root away."
            ),
        )


@sites_app.command("invite")
def invite(
    directory: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member's name in every study.")],
    to: Annotated[Path | None, typer.Option("--out", help="The invitation's file (NAME.invitation).")] = None,
    role: Annotated[str, typer.Option(help="site, or researcher: may fetch rows of runs granted to it.")] = "site",
    hours: Annotated[int, typer.Option(min=1, max=720, help="How long it can be used.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Write a one-time invitation. Whoever has the file can join under this name: hand it over safely."""
    with failures(as_json=as_json):
        from cohortium.common.protocol import certificates
        from cohortium.server.consortium import Consortium
        from cohortium.server.inviting import make_invitation

        found = Consortium(directory)
        path = to or Path(f"{name}.invitation")
        if path.exists():
            raise UsageError("INVITE-OUT", "the file is there already", where=(str(path),), hint="--out another")
        invitation = make_invitation(found, found.register(), name, role=role, hours=hours)
        until = invitation.valid_until
        path.parent.mkdir(parents=True, exist_ok=True)
        certificates.write_file(path, invitation.to_text().encode(), 0o600)
        facts = {
            "invitation": str(path),
            "name": name,
            "role": role,
            "valid_until": f"{until:%Y-%m-%dT%H:%M:%SZ}",
            "root_fingerprint": invitation.root_fingerprint,
        }

        def show() -> None:
            told = f"Wrote {escape(str(path))}: once, until {until:%Y-%m-%d %H:%M} UTC, for {name} only."
            out.print(told, soft_wrap=True)
            out.print(f"Read to its IT by telephone: [bold]{invitation.root_fingerprint}[/]", soft_wrap=True)
            if role == "site":
                out.print("There: cohortium site init DIR --invitation FILE (docs/hospital.md)")

        emit(facts, as_json=as_json, show=show)


@sites_app.command("list")
def list_sites(directory: Folder, as_json: AsJson = False) -> None:
    """Who takes part: state, fingerprint, when last heard of, how far its ledger is mirrored."""
    with failures(as_json=as_json):
        from cohortium.server.consortium import Consortium

        rows = _members(Consortium(directory))

        def show() -> None:
            table = Table(title=f"Members of {directory}", title_justify="left")
            for column in ("name", "role", "state", "fingerprint", "certificate until", "last seen", "ledger"):
                table.add_column(column, overflow="fold", no_wrap=column in ("name", "state"))
            for row in rows:
                line = "–" if row["ledger_line"] is None else f"line {row['ledger_line']}"
                ends, seen = row["certificate_until"], row["last_seen"]
                table.add_row(
                    row["name"], row["role"], row["state"], row["fingerprint"], _when(ends), _when(seen), line
                )
            out.print(table if rows else f"Nobody yet: cohortium sites invite {escape(str(directory))} NAME")

        emit(rows, as_json=as_json, show=show)


@sites_app.command("revoke")
def revoke(
    directory: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    as_json: AsJson = False,
) -> None:
    """Shut a member out, with its next request; its open streams are cut within a second."""
    with failures(as_json=as_json):
        from cohortium.server.consortium import Consortium

        found = Consortium(directory)
        found.register().revoke(name)
        emit(
            {"name": name, "state": "revoked"},
            as_json=as_json,
            show=lambda: out.print(
                f"{name} is revoked. A run under way goes on without it if enough sites stay; one that waits for "
                "approvals ends. What it was charged stays charged.",
                soft_wrap=True,
            ),
        )


@sites_app.command("grant")
def grant(
    directory: Folder,
    run: Run,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An enrolled researcher.")],
    as_json: AsJson = False,
) -> None:
    """Let a researcher see a run and fetch its synthetic rows."""
    with failures(as_json=as_json):
        from cohortium.server.consortium import Consortium

        Consortium(directory).register().grant(run, name)
        emit(
            {"run": run, "name": name}, as_json=as_json, show=lambda: out.print(f"{name} may fetch the rows of {run}.")
        )


def serve(
    directory: Folder,
    transport: Annotated[str, typer.Option(help="stream, or flower: everything in Flower's messages.")] = "stream",
    no_console: Annotated[bool, typer.Option("--no-console", help="Do not start the console.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the coordinator: service, enrolment, Flower, the console, and every run. Stop it with SIGTERM or Ctrl-C."""
    with failures(as_json=as_json):
        import threading

        from cohortium.common.processes import stopping
        from cohortium.server.logs import captured, of_serve
        from cohortium.server.serve import serve as run_service

        from cohortium.server.consortium import Consortium  # isort: skip  (after serve: it must load TLS first)

        def say(event: str, text: str) -> None:
            line = of_serve(event, text)
            if as_json:
                sys.stdout.write(line.json() + "\n")
                sys.stdout.flush()
            else:
                mark = {"warning": "[yellow]", "error": "[red]"}.get(line.level, "[green]" if event == "ready" else "")
                mark = mark if err.is_terminal else ""
                err.print(f"{mark}{escape(line.plain())}{'[/]' if mark else ''}", soft_wrap=True)
            if event == "ready":  # what scripts and health checks wait for
                sys.stderr.write("ready\n")
                sys.stderr.flush()

        stop = threading.Event()
        with stopping(stop, impatient=True), captured(say):
            run_service(Consortium(directory), transport=transport, stop=stop, say=say, console=not no_console)


def run(
    directory: Folder,
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="study.toml")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Reproducible rehearsal: its noise can be recomputed, NOT private.")
    ] = None,
    transport: Annotated[str | None, typer.Option(help="stream or flower (default: as `serve` was started).")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the study is proposed.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Propose and do not wait.")] = False,
    accept_guessed: AcceptGuessed = False,
    as_json: AsJson = False,
) -> None:
    """Propose a study to its sites, and wait until it is done. Ctrl-C leaves it running."""
    with failures(as_json=as_json):
        from cohortium.common.study import Study
        from cohortium.server.cli import show_plan
        from cohortium.server.consortium import Consortium

        found, loaded = Consortium(directory), Study.load(study)
        if not accept_guessed:
            loaded.refuse_guesses()
        plan = found.compile(loaded)
        if not as_json:
            show_plan(plan)
            if seed is not None:
                out.print(f"[bold red]A rehearsal with seed {seed}: NOT private, its noise can be recomputed.[/]")
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise UsageError("RUN-YES", "nobody is here to agree to the plan", hint="add --yes")
            typer.confirm(f"Propose this plan to {', '.join(plan.sites)}?", abort=True, err=True)
        name = found.propose(loaded, seed=seed, transport=transport, accept_guessed_ranges=accept_guessed)
        told = f"Proposed as {name}. Its sites' officers approve it: cohortium site approve DIR {name}"
        err.print(told, soft_wrap=True)
        if detach:
            emit(
                {"run": name, "state": "proposed", "folder": str(found.runs / name), "plan": plan.digest},
                as_json=as_json,
                show=lambda: out.print(f"Follow it: cohortium watch {escape(str(directory))} {name}", soft_wrap=True),
            )
            return
        _warn_unserved(found)
        facts = _follow(found, name)
        emit(facts, as_json=as_json, show=lambda: _show_end(found, facts))
    raise typer.Exit(_exit_code(facts["state"]))


def watch(
    directory: Folder,
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="One run, followed until it ends.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs, or follow one. With --json: how it stands now, once."""
    with failures(as_json=as_json):
        from cohortium.server.backing import row_facts
        from cohortium.server.consortium import Consortium
        from cohortium.server.progress import Progress

        found = Consortium(directory)
        register, progress = found.register(), Progress(found.mirror)
        if run is not None and not as_json:
            found.folder(run)
            _warn_unserved(found)
            facts = _follow(found, run)
            _show_end(found, facts)
            return
        rows = [row_facts(found, register, row, progress) for row in register.runs() if run in (None, row.run)]
        if run is not None:
            found.folder(run)
            emit(rows[0], as_json=True, show=lambda: None)
            return
        emit({"served": is_served(found), "runs": rows}, as_json=as_json, show=lambda: _show_runs(found, rows))


def stop(directory: Folder, run: Run, as_json: AsJson = False) -> None:
    """Stop a run after the release under way. Nothing is lost: `resume` goes on from there."""
    with failures(as_json=as_json):
        from cohortium.server.conduct import ask_to_stop, told_state
        from cohortium.server.consortium import Consortium

        found = Consortium(directory)
        row = ask_to_stop(found.register(), run)
        _warn_unserved(found)
        emit(
            {"run": run, "state": told_state(row)},
            as_json=as_json,
            show=lambda: out.print(
                f"{run} stops. It goes on with: cohortium resume {escape(str(directory))} {run}", soft_wrap=True
            ),
        )


def resume(directory: Folder, run: Run, as_json: AsJson = False) -> None:
    """Go on with a stopped run. Releases that are paid for are not asked again."""
    with failures(as_json=as_json):
        from cohortium.server.conduct import ask_to_resume
        from cohortium.server.consortium import Consortium

        found = Consortium(directory)
        row = ask_to_resume(found, found.register(), run)
        _warn_unserved(found)
        emit(
            {"run": run, "state": row.state},
            as_json=as_json,
            show=lambda: out.print(f"{run} goes on: cohortium watch {escape(str(directory))} {run}", soft_wrap=True),
        )


# ---- what they show -----------------------------------------------------------------------------------------


def _members(found: Any) -> list[dict[str, Any]]:
    from cohortium.common.protocol.signing import public_from_raw
    from cohortium.server.audit import fingerprint
    from cohortium.server.mirror import Mirror
    from cohortium.server.seen import load

    seen = load(found.root / "seen.json")
    rows = []
    for member in found.register().members():
        line = None
        if member.identity and found.mirror.exists():
            public = public_from_raw(member.identity)
            with Mirror(found.mirror, {member.name: public}) as mirror:
                line = mirror.size(member.name) - 1 if mirror.size(member.name) else None
        heard = seen.get(member.name, {})
        rows.append(
            {
                "name": member.name,
                "role": member.role,
                "state": member.state,
                "fingerprint": fingerprint(public_from_raw(member.identity)) if member.identity else "",
                "since": member.since,
                "certificate_until": heard.get("certificate_until"),
                "last_seen": heard.get("at"),
                "ledger_line": line,
            }
        )
    return rows


def _when(seconds: Any) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}" if isinstance(seconds, (int, float)) else "–"


def _show_runs(found: Any, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Runs of {found.name}", title_justify="left")
    for column in ("run", "state", "approved", "releases", "ε", "what"):
        table.add_column(column, overflow="fold")
    for row in rows:
        approved = sum(state == "approved" for state in row["approvals"].values())
        done = row["releases"]
        name = row["run"] + (" (rehearsal)" if row["rehearsal"] else "")
        table.add_row(
            name,
            row["state"],
            f"{approved} of {len(row['approvals'])}",
            f"{done['done']} of {done['planned']}",
            _epsilon(row),
            escape(row["message"]),
        )
    out.print(table if rows else "No run yet: cohortium run DIR study.toml")


def _epsilon(row: dict[str, Any]) -> str:
    from cohortium.common.privacy.budget import rounded_up

    spent, planned = row["epsilon"]["spent"], row["epsilon"]["planned"]
    told = "?" if spent is None else rounded_up(float(spent))
    return f"{told} of {float(planned):g}"


def _follow(found: Any, run: str) -> dict[str, Any]:
    """Show how a run gets on until it ends or is stopped; the last facts. Ctrl-C leaves it running."""
    from cohortium.server.backing import row_facts
    from cohortium.server.follow import Display
    from cohortium.server.progress import Progress

    register, progress = found.register(), Progress(found.mirror)
    with Display(err) as display:
        try:
            while True:
                facts = row_facts(found, register, register.run_row(run), progress)
                display.show(facts)
                if facts["state"] in ("finished", "failed", "void", "stopped"):
                    return facts
                time.sleep(0.5)
        except KeyboardInterrupt:
            display.close()
            err.print(f"Left; the run goes on: cohortium watch {found.root} {run}", soft_wrap=True)
            raise typer.Exit(0) from None


def _show_end(found: Any, facts: dict[str, Any]) -> None:
    folder = found.runs / facts["run"]
    if facts["state"] != "finished":
        out.print(f"[bold red]{facts['state']}[/]: {escape(facts['message'])}", soft_wrap=True)
        return
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    out.print(f"[bold]{escape(result['privacy']['sentence'])}[/]", soft_wrap=True)
    for warning in result["warnings"]:
        out.print(f"[bold red]{escape(warning)}[/]", soft_wrap=True)
    for shown in evaluation_shown(result):
        out.print(shown)
    out.print(f"Rows in {escape(str(folder))}/synthetic.parquet and .csv; open report.html there.", soft_wrap=True)
    out.print(f"Check every claim yourself: cohortium audit {escape(str(folder))}", soft_wrap=True)


def _exit_code(state: str) -> int:
    return {"finished": 0, "void": 3}.get(state, 1)


def is_served(found: Any) -> bool:
    """Whether a `cohortium serve` of this folder is running."""
    import fcntl

    path = found.root / "serve.lock"
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _warn_unserved(found: Any) -> None:
    if not is_served(found):
        err.print(f"The service is not running here. Start it: cohortium serve {found.root}", soft_wrap=True)


def _passphrase(reference: str | None, file: Path | None, *, confirm: bool) -> str:
    """The root's passphrase: from its reference, or typed."""
    if reference is not None and file is not None:
        raise UsageError("PASSPHRASE", "give --passphrase or --passphrase-file, not both")
    if file is not None:
        reference = f"file:{file}"
    if reference is None:
        if not sys.stdin.isatty():
            raise UsageError("PASSPHRASE", "nobody is here to type the passphrase", hint="--passphrase file:PATH")
        return str(typer.prompt("Passphrase of the root", hide_input=True, confirmation_prompt=confirm, err=True))
    kind, _, what = reference.partition(":")
    if kind == "env" and what:
        value = os.environ.get(what)
        if value is None:
            raise UsageError("PASSPHRASE", f"the environment has no {what}")
        return value
    if kind == "file" and what:
        from cohortium.common.modes import refuse_open

        refuse_open(Path(what))
        return Path(what).read_text(encoding="utf-8").removesuffix("\n")
    # The reference itself is not repeated: somebody may have typed the passphrase here.
    raise UsageError("PASSPHRASE", "a passphrase is given by reference", hint="--passphrase env:NAME or file:PATH")

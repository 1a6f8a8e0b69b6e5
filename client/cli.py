"""`cohortium site …`: what hospital IT and the officer run. Only `check`, `approve` and `report` read records.

Results to stdout, progress to stderr, --json on every read, the exit codes of common/terminal.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cohortium.common.errors import Refused, UsageError
from cohortium.common.privacy.budget import rounded_up
from cohortium.common.terminal import emit, err, failures, out

site_app = typer.Typer(no_args_is_help=True, help="Hospital IT: join a consortium, decide what may leave, audit.")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The site's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
OfficerKey = Annotated[
    Path | None, typer.Option("--officer-key", help="The officer's key, where it does not lie in DIR/officer.")
]
Passphrase = Annotated[
    str | None,
    typer.Option("--officer-passphrase", help="Of the officer's key: env:NAME, file:PATH or keyring:SERVICE/USER."),
]


def say(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)


# ---- init ---------------------------------------------------------------------------------------------------


@site_app.command("init")
def init(
    directory: Directory,
    invitation: Annotated[Path, typer.Option("--invitation", help="File that the coordinator gave you.")],
    policy: Annotated[Path | None, typer.Option("--policy", help="TOML with [data] and [policy].")] = None,
    table: Annotated[str | None, typer.Option(help="Parquet or CSV file, folder, or database address.")] = None,
    query: Annotated[str | None, typer.Option(help="SQL for a database.")] = None,
    query_file: Annotated[Path | None, typer.Option(help="File with the SQL.")] = None,
    password: Annotated[
        str | None, typer.Option(help="Where the database's password lies: env:, file:, keyring:")
    ] = None,
    lifetime_epsilon: Annotated[float | None, typer.Option(help="Cap over all runs on this source, for ever.")] = None,
    lifetime_delta: Annotated[float | None, typer.Option(help="The cap's delta, e.g. 1e-6.")] = None,
    unit: Annotated[str | None, typer.Option(help="Column that names the patient.")] = None,
    hospitals: Annotated[int | None, typer.Option(help="In how many hospitals a patient may have records.")] = None,
    minimum_sites: Annotated[int | None, typer.Option(help="Fewest sites of a plan.")] = None,
    minimum_colluders: Annotated[int | None, typer.Option(help="How many other sites not to trust.")] = None,
    minimum_patients: Annotated[int | None, typer.Option(help="Fewest patients here.")] = None,
    generator: Annotated[list[str] | None, typer.Option(help="Allowed generator; may repeat.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Allowed trust mode; may repeat.")] = None,
    evaluation: Annotated[bool | None, typer.Option(help="Whether held-out patients may be asked for scores.")] = None,
    attacks: Annotated[
        bool | None, typer.Option(help="Whether training patients may be asked how well an attack works.")
    ] = None,
    tell_cap: Annotated[
        bool | None, typer.Option(help="Whether each run tells the coordinator this hospital's lifetime cap.")
    ] = None,
    officer_public: Annotated[
        Path | None, typer.Option(help="Public key of an officer whose key lies elsewhere.")
    ] = None,
    officer_passphrase: Passphrase = None,
    root_fingerprint: Annotated[
        str | None, typer.Option(help="What the coordinator read to you; refused when it is another.")
    ] = None,
    socket: Annotated[
        Path | None, typer.Option(help="Where guard and courier meet (default DIR/run/guard.sock).")
    ] = None,
    rehearsal_seed: Annotated[
        int | None, typer.Option(help="REHEARSALS ONLY: noise that anybody with this number can remove.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make this hospital's keys here, enrol them with an invitation, and write down the policy."""
    with failures(as_json=as_json):
        from cohortium.client.policy_draft import draft_policy
        from cohortium.client.references import resolve
        from cohortium.client.site import describe, join_consortium, refuse_used
        from cohortium.common.protocol.invitation import Invitation
        from cohortium.common.protocol.signing import load_public

        asked = Invitation.from_text(_text(invitation))
        refuse_used(directory)
        _same_root(asked.root_fingerprint, root_fingerprint)
        given = {
            "table": table,
            "query": query,
            "query_file": query_file,
            "password": password,
            "unit": unit,
            "lifetime_epsilon": lifetime_epsilon,
            "lifetime_delta": lifetime_delta,
            "hospitals": hospitals,
            "minimum_sites": minimum_sites,
            "minimum_colluders": minimum_colluders,
            "minimum_patients": minimum_patients,
            "generators": generator,
            "strategies": strategy,
            "evaluation": evaluation,
            "attacks": attacks,
            "tell_cap": tell_cap,
            "rehearsal_seed": rehearsal_seed,
        }
        person = sys.stdin.isatty() and not as_json
        made = draft_policy(given, policy, name=asked.name, ask=_ask if person else None)
        secret = None if officer_passphrase is None else resolve(officer_passphrase)
        if person and secret is None and officer_public is None:
            secret = (
                typer.prompt("Passphrase for the officer's key (empty: none)", "", hide_input=True, err=True) or None
            )
        joined = join_consortium(
            directory,
            invitation=asked,
            policy=made,
            officer=None if officer_public is None else load_public(officer_public),
            passphrase=secret,
            socket=socket,
        )

        def show() -> None:
            out.print(f"Enrolled as {joined.name} of {joined.consortium}. Compare by telephone with the coordinator:")
            for what, value in describe(joined):
                out.print(f"  {what:22} {value}", soft_wrap=True, markup=False)
            out.print(f"Then: cohortium site check {directory}, and cohortium site join {directory}")
            if officer_public is None and secret is None:
                out.print("The officer's key has no passphrase: keep DIR/officer on another machine.", style="yellow")

        emit({**joined.to_json(), "rehearsal": rehearsal_seed is not None}, as_json=as_json, show=show)
        if rehearsal_seed is not None:
            _loud()


def _loud() -> None:
    err.print("REHEARSAL: this site's noise can be computed by whoever knows the seed.", style="bold white on red")
    err.print("Nothing from it is private. Never point it at records of real patients.", style="bold white on red")


def _same_root(found: str, told: str | None) -> None:
    plain = [text.replace(":", "").replace(" ", "").lower() for text in (found, told or found)]
    if plain[0] != plain[1]:
        raise Refused(
            "ROOT-FINGERPRINT",
            "the invitation holds another root than the one that was read to you",
            hint="do not use it; call the coordinator by a number that you know",
        )


def _ask(question: str, example: str) -> str:
    return str(typer.prompt(f"{question} (e.g. {example})", err=True))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError("INVITE-FILE", "the invitation's file cannot be read", where=(str(path),)) from None


@site_app.command("renew")
def renew(
    directory: Directory,
    invitation: Annotated[Path, typer.Option("--invitation", help="A new invitation for this site's name.")],
    as_json: AsJson = False,
) -> None:
    """Another certificate for this site's keys, where the courier was off until the last one had ended."""
    with failures(as_json=as_json):
        from cohortium.client.site import Site, enrol_again
        from cohortium.common.protocol.certificates import expires
        from cohortium.common.protocol.invitation import Invitation

        site = Site.open(directory)
        enrol_again(site, Invitation.from_text(_text(invitation)))
        until = int(expires((site.courier / "leaf.pem").read_bytes()).timestamp())
        emit(
            {"certificate_until": until},
            as_json=as_json,
            show=lambda: out.print(f"A new certificate until {_when(until)}; keys and ledger are the old ones."),
        )


# ---- check --------------------------------------------------------------------------------------------------


@site_app.command("check")
def check(
    directory: Directory,
    dictionary: Annotated[Path | None, typer.Option(help="Hold the table against this dictionary.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not look at the network.")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything that a round needs, asked before: files, keys, clock, ports, data, disk, versions."""
    with failures(as_json=as_json):
        from cohortium.client.checks import run_checks
        from cohortium.client.site import Site

        found = run_checks(Site.open(directory), dictionary=dictionary, network=not offline)

        def show() -> None:
            shown = Table(title=f"Check of {directory}", title_justify="left")
            for name in ("Check", "Result", "Problem", "Fix"):
                shown.add_column(name, overflow="fold")
            marks = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]", "skip": "–"}
            from rich.markup import escape

            for one in found:
                row = [escape(text) for text in (one.result, one.problem, one.fix)]
                shown.add_row(f"{marks[one.word]} {one.name}", *row)
            out.print(shown)

        emit([one.to_json() for one in found], as_json=as_json, show=show)
    if any(one.word == "fail" for one in found):
        raise typer.Exit(1)


# ---- inspect and approve ------------------------------------------------------------------------------------


@site_app.command("inspect")
def inspect(
    directory: Directory,
    run: Annotated[str | None, typer.Argument(help="The run; without it, the open proposals are listed.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A proposal from a file (proposal.bin).")] = None,
    as_json: AsJson = False,
) -> None:
    """What a proposal would take out of this hospital, what it costs and what is left. Reads no record."""
    with failures(as_json=as_json):
        from cohortium.client import calls, proposals
        from cohortium.client.inspection import inspect as look
        from cohortium.client.site import Site

        site = Site.open(directory)
        if run is None and file is None:
            offers = calls.proposals(site)
            emit(
                [{"run": o.run, "state": o.state, "bytes": len(o.envelope)} for o in offers],
                as_json=as_json,
                show=lambda: _show_offers(offers, directory),
            )
            return
        proposal, state = proposals.fetch(site, run, file)
        found = look(site, proposal, state=state)
        emit(found.to_json(), as_json=as_json, show=lambda: _show(found))


def _show_offers(offers: Any, directory: Path) -> None:
    for offer in offers:
        out.print(f"{offer.run}  {offer.state}", markup=False)
    out.print(f"{len(offers)} proposals. Look at one: cohortium site inspect {directory} RUN", markup=False)


def _show(found: Any) -> None:
    from rich.markup import escape

    facts = found.to_json()
    plan = found.proposal.plan
    out.print(f"Run {facts['run']}, study {facts['study']}: {facts['generator']}, {facts['mode']}", markup=False)
    shown = Table(title="What would leave this hospital, at most", title_justify="left")
    for name in ("stage", "what", "patients", "releases", "numbers each", "noise σ/Δ", "bytes", "ε so far"):
        shown.add_column(name, justify="left" if name in ("stage", "what", "patients") else "right", overflow="fold")
    for row in facts["leaves"]:
        shown.add_row(
            escape(row["stage"]),  # the coordinator's words: none of them may hide another
            escape(f"{row['what']} ({row['why']})"),
            row["patients"],
            str(row["releases"]),
            f"{row['numbers']:,}",
            f"{row['noise_multiplier']:.3g}",
            f"{row['bytes']:,}",
            row["epsilon_so_far"] if isinstance(row["epsilon_so_far"], str) else rounded_up(row["epsilon_so_far"]),
        )
    out.print(shown)
    out.print("Beside these: signed ledger lines, round keys, masked shares, fixed codes. Never rows, counts, errors.")
    out.print(facts["statement"], markup=False)
    peers = Table(title="Who takes part", title_justify="left")
    for name in ("site", "fingerprint", ""):
        peers.add_column(name, overflow="fold")
    for row in facts["sites"]:
        mark = {"UNKNOWN": "red", "not pinned": "yellow"}.get(row["known"], "green")
        peers.add_row(escape(row["site"]), row["fingerprint"], f"[{mark}]{row['known']}[/]")
    out.print(peers)
    used = facts["charged_now"]["cap_used"], facts["charged_after"]["cap_used"]
    costs = [_epsilon(facts[name]["epsilon"]) for name in ("charged_now", "charged_after")]
    cap = facts["cap"]
    out.print(
        f"Lifetime cap: ε = {cap['epsilon']:g} at δ = {cap['delta']:g}. Charged until now: ε = {costs[0]} "
        f"({used[0]:.1%} of the cap). With this run: ε = {costs[1]} ({used[1]:.1%}); "
        f"left: {max(0.0, 1 - used[1]):.1%}.",
        markup=False,
    )
    if not plan.private:
        out.print("This plan has no noise: it is a rehearsal and protects nobody.", style="bold red")
    if not facts["fits"]:
        out.print("This run does NOT fit into the cap: the guard would refuse its releases.", style="bold red")
    for objection in found.objections:
        for line in objection.lines():
            out.print(line, style="red", markup=False)
    if facts["approval"] is not None:
        until = _when(facts["approval"]["expires"])
        out.print(f"Approved here by {len(found.signers)} officer(s), until {until}.", markup=False)


def _epsilon(value: Any) -> str:
    return value if isinstance(value, str) else rounded_up(value)


def _when(seconds: int) -> str:
    return "it is taken back" if seconds == 0 else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


@site_app.command("approve")
def approve(
    directory: Directory,
    run: Annotated[str, typer.Argument(help="The run, as `site inspect` names it.")],
    file: Annotated[Path | None, typer.Option("--file", help="A proposal from a file (proposal.bin).")] = None,
    expires: Annotated[str, typer.Option(help="How long the approval holds: 12h, 30d, 8w.")] = "30d",
    yes: Yes = False,
    pin_peers: Annotated[bool, typer.Option("--pin-peers", help="From now on accept only these sites' keys.")] = False,
    decline: Annotated[bool, typer.Option("--decline", help="Tell the coordinator no; take an approval back.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not tell the coordinator.")] = False,
    officer_key: OfficerKey = None,
    officer_passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """The officer's signature under one plan for one run, until it expires. Reads the table once, to check it."""
    with failures(as_json=as_json):
        from cohortium.client import deciding, proposals
        from cohortium.client.inspection import inspect as look
        from cohortium.client.site import Site

        site = Site.open(directory)
        lasts = deciding.seconds(expires)
        proposal, state = proposals.fetch(site, run, file)
        if decline:
            taken_back = proposals.decline(site, proposal, tell=not offline)
            facts: dict[str, Any] = {"run": run, "decision": "declined", "taken_back": taken_back}
            emit(facts, as_json=as_json, show=lambda: out.print(f"Declined {run}.", markup=False))
            return
        found = look(site, proposal, state=state)
        if not as_json:
            _show(found)
        deciding.refuse_objections(found, pin_peers=pin_peers)
        _confirm("Approve this run?", yes)
        officer = _officer(site, officer_key, officer_passphrase)
        until = int(time.time()) + lasts
        decided, told = proposals.approve(site, found, officer, expires=until, pin_peers=pin_peers, tell=not offline)
        facts = {"decision": "approved", "told": told, **decided.to_json()}

        def show() -> None:
            if decided.complete:
                out.print(f"Approved {run} until {_when(decided.expires)}.", markup=False)
                if not told and not offline:
                    out.print("The coordinator waits for the signature of the officer who was enrolled.")
            else:
                out.print(
                    f"Signed by {len(decided.signed_by)} of {decided.needed} officers; the guard answers nothing yet.",
                    markup=False,
                )

        emit(facts, as_json=as_json, show=show)


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("CONFIRM", "nobody is there to be asked", hint="--yes, after reading what it would do")
    if not typer.confirm(question, err=True):
        raise typer.Exit(3)


def _officer(site: Any, path: Path | None, passphrase: str | None) -> Any:
    from cohortium.client.references import resolve
    from cohortium.client.site import load_officer, officer_is_encrypted

    key = path or site.officer / "officer.key"
    secret = None if passphrase is None else resolve(passphrase)
    if secret is None and officer_is_encrypted(key) and sys.stdin.isatty():
        secret = str(typer.prompt("Passphrase of the officer's key", hide_input=True, err=True))
    return load_officer(key, secret)


# ---- running ------------------------------------------------------------------------------------------------


@site_app.command("join")
def join(
    directory: Directory,
    only: Annotated[str | None, typer.Option(help="guard or courier: supervise that one.")] = None,
    guard_user: Annotated[str | None, typer.Option(help="As root: the user of the guard.")] = None,
    courier_user: Annotated[str | None, typer.Option(help="As root: the user of the courier.")] = None,
) -> None:
    """Run guard and courier until SIGTERM; starts either again when it ends."""
    with failures():
        from cohortium.client import join as joining
        from cohortium.client.site import Site

        if only not in (None, "guard", "courier"):
            raise UsageError("SITE-ONLY", "--only is guard or courier")
        code = joining.join(
            Site.open(directory),
            only=only,  # type: ignore[arg-type]
            guard_user=guard_user,
            courier_user=courier_user,
            say=say,
        )
    if code:
        raise typer.Exit(code)


@site_app.command("guard")
def guard(directory: Directory) -> None:
    """The guard alone, in this process: for a container without network."""
    with failures():
        from cohortium.client.join import become
        from cohortium.client.site import Site

        become(Site.open(directory), "guard")


@site_app.command("courier")
def courier(directory: Directory) -> None:
    """The courier alone, in this process: for a container without data."""
    with failures():
        from cohortium.client.join import become
        from cohortium.client.site import Site

        become(Site.open(directory), "courier")


@site_app.command("pause")
def pause(directory: Directory, as_json: AsJson = False) -> None:
    """Refuse everything from the next message on, until `unpause`. Runs wait or go on without this site."""
    with failures(as_json=as_json):
        from cohortium.client import deciding
        from cohortium.client.site import Site

        deciding.pause(Site.open(directory))
        emit({"paused": True}, as_json=as_json, show=lambda: out.print("Paused: the guard refuses everything."))


@site_app.command("unpause")
def unpause(directory: Directory, as_json: AsJson = False) -> None:
    """Go on after `pause`."""
    with failures(as_json=as_json):
        from cohortium.client import deciding
        from cohortium.client.site import Site

        deciding.unpause(Site.open(directory))
        emit({"paused": False}, as_json=as_json, show=lambda: out.print("The guard answers again."))


@site_app.command("leave")
def leave(
    directory: Directory,
    yes: Yes = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not tell the coordinator.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave the consortium: every approval ends, the coordinator is told, the ledger stays for ever."""
    with failures(as_json=as_json):
        from cohortium.client import deciding
        from cohortium.client.site import Site

        site = Site.open(directory)
        _confirm("Leave this consortium for good?", yes)
        facts = deciding.leave(site, tell=not offline)

        def show() -> None:
            out.print(
                f"Left. {len(facts['withdrawn'])} approvals ended; the ledger stays in {site.guard}.", markup=False
            )
            if not facts["told"]:
                out.print("The coordinator could not be told: ask for `cohortium sites revoke`.", style="yellow")

        emit(facts, as_json=as_json, show=show)


# ---- the ledger ---------------------------------------------------------------------------------------------


@site_app.command("ledger")
def ledger(
    directory: Directory,
    verify: Annotated[bool, typer.Option("--verify", help="Check every line's signature too.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write all lines to this file (JSONL).")] = None,
    accept_clock: Annotated[
        bool, typer.Option("--accept-clock", help="Go on after a clock that was ahead; the officer's word.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """What was charged, per run and in total, against the cap; the head and who witnessed it."""
    with failures(as_json=as_json):
        from cohortium.client import bookkeeping
        from cohortium.client.site import Site

        site = Site.open(directory)
        if accept_clock:
            _confirm("Note in the ledger that this machine's clock was wrong?", yes)
            bookkeeping.accept_clock(site)
        facts = bookkeeping.statement(site, verify=verify)
        if export is not None:
            facts["exported"] = bookkeeping.export(site, export)
        emit(facts, as_json=as_json, show=lambda: _show_ledger(facts))


def _show_ledger(facts: dict[str, Any]) -> None:
    shown = Table(title=f"Ledger of {facts['site']}", title_justify="left")
    for name in ("run", "study's plan", "releases", "ε of the run", "first", "states"):
        shown.add_column(name, overflow="fold")
    for row in facts["runs"]:
        states = ", ".join(f"{count} {state.lower()}" for state, count in row["states"].items())
        shown.add_row(
            row["run"], row["plan"][:12], str(row["releases"]), _epsilon(row["epsilon"]), _when(row["first"]), states
        )
    out.print(shown)
    cap, total = facts["cap"], facts["total"]
    out.print(
        f"In total: ε = {_epsilon(total['epsilon'])} at δ = {cap['delta']:g}, {total['cap_used']:.1%} of the lifetime "
        f"cap ε = {cap['epsilon']:g} (a patient in {cap['hospitals']} hospital(s)).",
        markup=False,
    )
    out.print(f"Head: {facts['head']['size']} lines, {facts['head']['hash']}", markup=False, soft_wrap=True)
    verified = "every hash and signature" if facts["verified"] == "all" else "every hash and the last signature"
    out.print(f"Verified: {verified}.", markup=False)
    for seen in facts["witnessed"]:
        out.print(f"Witnesses confirmed {seen['size']} lines when {seen['run']} began.", markup=False)
    if not facts["witnessed"]:
        out.print("No witness has confirmed this ledger yet: that happens when a run begins.")
    for older in facts["earlier"]:
        out.print(f"Earlier ledger of this site, under its old key: {older}", markup=False, soft_wrap=True)
    if "exported" in facts:
        out.print(f"Wrote {facts['exported']}.", markup=False)


# ---- the site's own report ----------------------------------------------------------------------------------


@site_app.command("report")
def report(
    directory: Directory,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The synthetic rows: Parquet or CSV.")],
    run: Annotated[str | None, typer.Option(help="The run that made them, where several were approved here.")] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict, where the dictionary names none.")] = None,
    as_json: AsJson = False,
) -> None:
    """What synthetic rows say about this hospital's own patients: attacks, distances, controls. Never sent."""
    with failures(as_json=as_json):
        from cohortium.client.diagnostics.report import report as diagnose

        written = diagnose(directory, file, run=run, target=target)

        def show() -> None:
            found = written.diagnosis
            out.print(
                f"Compared {found.train_patients} training and {found.control_patients} held-out patients with "
                f"{found.synthetic_rows} synthetic rows.",
                markup=False,
            )
            out.print(f"Page: {written.page}", markup=False, soft_wrap=True)
            out.print(f"Figures: {written.figures}", markup=False, soft_wrap=True)

        emit(written.to_json(), as_json=as_json, show=show)
        err.print("Nothing left this hospital. The page is as secret as the table: do not send it.", style="yellow")


@site_app.command("rotate")
def rotate(
    directory: Directory,
    yes: Yes = False,
    officer_key: OfficerKey = None,
    officer_passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Another Ed25519 identity, signed by the old one and the officer. Stop `join` first; approvals end."""
    with failures(as_json=as_json):
        from cohortium.client import calls
        from cohortium.client.rotation import rotate as change
        from cohortium.client.site import Site

        site = Site.open(directory)
        _confirm("Change this site's identity? Every approval ends.", yes)
        name = site.policy().name
        done = change(
            site,
            _officer(site, officer_key, officer_passphrase),
            tell=lambda identity, *by: calls.rotate(
                site, identity=identity, by_old=by[0], by_new=by[1], by_officer=by[2]
            ),
            known=lambda: next((m["identity"] for m in calls.members(site) if m["name"] == name), ""),
        )
        facts = {"old": done.old, "new": done.new, "carried": done.carried, "withdrawn": list(done.withdrawn)}

        def show() -> None:
            out.print(f"New identity, compare by telephone: {done.new}", markup=False, soft_wrap=True)
            out.print(
                f"{done.carried} charged releases were carried over; {len(done.withdrawn)} approvals ended.",
                markup=False,
            )

        emit(facts, as_json=as_json, show=show)


@site_app.command("sign")
def sign(
    directory: Directory,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the release.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="Write the signature here, to be sent back (default: into the folder).")
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Hold a release against this site's approval, ledger and key, and sign it. Reads no record."""
    with failures(as_json=as_json):
        from cohortium.client import signing_release

        checked = signing_release.check_release(directory, folder)
        if not as_json:
            for line in checked.checks:
                out.print(f"✓ {line}", markup=False)
            out.print(checked.sentence, markup=False)
        if checked.rehearsal:
            err.print("This release is a rehearsal and NOT private.", style="bold white on red")
        _confirm("Sign this release for this site?", yes)
        signed = signing_release.endorse(checked, folder, to)
        emit(
            signed.to_json(),
            as_json=as_json,
            show=lambda: out.print(f"Signed by {signed.site}: {signed.file}", markup=False, soft_wrap=True),
        )


def main() -> None:
    """`python -m cohortium.client.cli`: the same commands where the whole `cohortium` is not wanted."""
    site_app()


if __name__ == "__main__":
    main()

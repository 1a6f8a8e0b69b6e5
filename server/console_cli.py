"""The console's commands: console user add|list|close|password|totp, console open.

They work on CONSORTIUM/console/accounts.db, whether the console runs or not; it sees a change with the next request.
What they did goes to the journal by way of the console, which alone may write it.
"""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cohortium.common.errors import Refused, UsageError
from cohortium.common.terminal import emit, err, failures, out
from cohortium.server.cli import AsJson

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The consortium's folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The account's name.")]
PasswordRef = Annotated[
    str | None, typer.Option("--password", help="Where the password is: env:NAME or file:PATH. Without it: typed.")
]
OneTime = Annotated[
    bool, typer.Option("--one-time", help="Draw a password, show it once; its owner changes it at the first sign-in.")
]

console_app = typer.Typer(no_args_is_help=True, help="The coordinator's console: its people, its address.")
user_app = typer.Typer(no_args_is_help=True, help="Who may sign in to the console.")
console_app.add_typer(user_app, name="user")


@user_app.command("add")
def add(
    directory: Folder,
    name: Name,
    role: Annotated[str, typer.Option(help="coordinator, auditor or site.")] = "coordinator",
    site: Annotated[str, typer.Option(help="The site that a member of role site belongs to.")] = "",
    password: PasswordRef = None,
    one_time: OneTime = False,
    as_json: AsJson = False,
) -> None:
    """Make a local account. Its second factor is set up at the first sign-in."""
    with failures(as_json=as_json), _accounts(directory) as (found, accounts):
        if site and all(member.name != site for member in found.register().members()):
            raise Refused("MEMBER-UNKNOWN", f"there is no site {site!r}", hint=f"cohortium sites list {directory}")
        if accounts.account(name) is not None:  # before anybody types a password in vain
            raise Refused("ACCOUNT-EXISTS", f"there is an account {name!r}")
        secret, shown = _password(password, one_time=one_time)
        made = accounts.add(name, role=role, password=secret, site=site, one_time=one_time)
        _tell(accounts, "account-add", name, role=role, site=site)
        facts = {**_facts(made), **({"one_time_password": secret} if shown else {})}

        def show() -> None:
            out.print(f"{name} may sign in as {role}{' of ' + site if site else ''}.")
            _show_one_time(name, secret if shown else None)
            out.print(f"The address: cohortium console open {escape(str(directory))}", soft_wrap=True)

        emit(facts, as_json=as_json, show=show)


@user_app.command("list")
def list_users(directory: Folder, as_json: AsJson = False) -> None:
    """Everybody who has an account, and its state."""
    with failures(as_json=as_json), _accounts(directory) as (_, accounts):
        people = accounts.accounts()

        def show() -> None:
            table = Table(title=f"Accounts of {directory}", title_justify="left")
            for column in ("name", "role", "site", "state", "signs in with", "last sign-in (UTC)"):
                table.add_column(column, overflow="fold")
            for person in people:
                how = "password and code" if person.local else "identity provider"
                table.add_row(person.name, person.role, person.site or "–", _state(person), how, _when(person.last_in))
            nobody = f"Nobody yet: cohortium console user add {escape(str(directory))} NAME --role coordinator"
            out.print(table if people else nobody, soft_wrap=not people)

        emit([_facts(person) for person in people], as_json=as_json, show=show)


@user_app.command("close")
def close(directory: Folder, name: Name, as_json: AsJson = False) -> None:
    """Shut somebody out at once, with all sessions. The name stays taken."""
    with failures(as_json=as_json), _accounts(directory) as (_, accounts):
        accounts.close_account(name)
        _tell(accounts, "account-close", name)
        emit({"name": name, "state": "closed"}, as_json=as_json, show=lambda: out.print(f"{name} is closed."))


@user_app.command("password")
def set_password(
    directory: Folder, name: Name, password: PasswordRef = None, one_time: OneTime = False, as_json: AsJson = False
) -> None:
    """Set another password. All sessions of the account end, and its wrong tries are forgotten."""
    with failures(as_json=as_json), _accounts(directory) as (_, accounts):
        known = accounts.account(name)
        if known is None or not known.local:
            raise Refused("ACCOUNT-UNKNOWN", f"there is no local account {name!r}")
        secret, shown = _password(password, one_time=one_time)
        accounts.set_password(name, secret, one_time=one_time)
        _tell(accounts, "account-password", name)

        def show() -> None:
            out.print(f"The new password of {name} holds; its sessions have ended.")
            _show_one_time(name, secret if shown else None)

        emit({"name": name, **({"one_time_password": secret} if shown else {})}, as_json=as_json, show=show)


@user_app.command("totp")
def reset_totp(directory: Folder, name: Name, as_json: AsJson = False) -> None:
    """Reset the second factor, for a lost device: the next sign-in sets up a new one."""
    with failures(as_json=as_json), _accounts(directory) as (_, accounts):
        accounts.drop_totp(name)
        _tell(accounts, "account-second-factor", name)
        emit(
            {"name": name, "second_factor": False},
            as_json=as_json,
            show=lambda: out.print(f"{name} sets up a new second factor at the next sign-in."),
        )


@console_app.command("open")
def open_console(directory: Folder, as_json: AsJson = False) -> None:
    """Print the console's address, and whether it runs."""
    with failures(as_json=as_json):
        from cohortium.server.console.settings import Settings
        from cohortium.server.console.store import someone_may_sign_in
        from cohortium.server.consortium import Consortium

        found = Consortium(directory)
        address = Settings.load(directory).address
        runs = _held(found.root / "console.lock")
        people = someone_may_sign_in(found.root / "console")

        def show() -> None:
            out.print(address, soft_wrap=True)
            if runs:
                err.print("It runs.")
            elif not people:
                told = f"Nobody has an account yet: cohortium console user add {directory} NAME --role coordinator"
                err.print(told, soft_wrap=True)
            elif _held(found.root / "serve.lock"):
                err.print("`cohortium serve` runs here, the console does not (yet): see what serve says.")
            else:
                err.print(f"It does not run. Start it: cohortium serve {directory}", soft_wrap=True)

        emit({"address": address, "runs": runs, "accounts": people}, as_json=as_json, show=show)


@console_app.command("metrics-token")
def metrics_token(
    directory: Folder,
    new: Annotated[bool, typer.Option("--new", help="Another one; the old one opens nothing any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the token that a monitoring system shows to GET /metrics (docs/monitoring.md)."""
    with failures(as_json=as_json):
        from cohortium.server.console.metrics_token import token
        from cohortium.server.consortium import Consortium

        made = token(Consortium(directory).root / "console", new=new)
        emit({"token": made}, as_json=as_json, show=lambda: out.print(made, markup=False, soft_wrap=True))


# ---- inside -------------------------------------------------------------------------------------------------


@contextmanager
def _accounts(directory: Path) -> Iterator[tuple[Any, Any]]:
    """The consortium and its open file of accounts."""
    from cohortium.common.modes import make_private
    from cohortium.server.console.accounts import Accounts
    from cohortium.server.console.settings import Settings
    from cohortium.server.console.store import FILE
    from cohortium.server.consortium import Consortium

    found = Consortium(directory)
    settings = Settings.load(directory)
    accounts = Accounts(
        make_private(found.root / "console") / FILE,
        session_s=settings.session_hours * 3600,
        idle_s=settings.idle_minutes * 60,
    )
    try:
        yield found, accounts
    finally:
        accounts.close()


def _password(reference: str | None, *, one_time: bool) -> tuple[str, bool]:
    """(the password, whether it was drawn and has to be shown)."""
    from cohortium.server.console.passwords import one_time_password
    from cohortium.server.console.settings import secret_of

    if reference is not None:
        return secret_of(reference, where="--password", code="PASSWORD"), False
    if one_time:
        return one_time_password(), True
    if not sys.stdin.isatty():
        raise UsageError(
            "PASSWORD", "nobody is here to type the password", hint="--password file:PATH, env:NAME or --one-time"
        )
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)), False


def _show_one_time(name: str, secret: str | None) -> None:
    if secret is not None:
        out.print(f"One-time password, shown this once: [bold]{secret}[/]")
        out.print(f"Hand it to {name} in person or by telephone; it is good for 7 days.")


def _tell(accounts: Any, action: str, name: str, **facts: str) -> None:
    """For the journal: who has a shell here is whoever the system says."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "?"
    accounts.tell("command", by=f"shell:{user}"[:64], action=action, on=name, **facts)


def _facts(person: Any) -> dict[str, Any]:
    return {**asdict(person), "local": person.local, "state": _state(person)}


def _state(person: Any) -> str:
    if person.closed_at is not None:
        return "closed"
    if person.must_change:
        return "one-time password"
    return "open" if person.has_totp or not person.local else "no second factor yet"


def _when(seconds: int | None) -> str:
    return "never" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _held(path: Path) -> bool:
    """Whether a process of ours has that lock."""
    import fcntl

    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False

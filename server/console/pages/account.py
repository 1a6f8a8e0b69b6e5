"""One's own account, and the people of the console: who has which role, and what a coordinator can do about it."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Path, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from cohortium.common.errors import Refused, UsageError
from cohortium.common.protocol.certificates import SITE as SITE_MEMBER
from cohortium.server.console.access import (
    EVERYTHING,
    READERS,
    Why,
    cookie_name,
    desk_of,
    may,
)
from cohortium.server.console.accounts import (
    AUDITOR,
    COORDINATOR,
    SITE,
    Account,
)
from cohortium.server.console.desk import Desk
from cohortium.server.console.passwords import LEAST_PASSWORD, one_time_password

router = APIRouter()

Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._@-]{0,63}$", max_length=64)]
Text = Annotated[str, Form(max_length=1000)]
Reader = Annotated[Account, Depends(may(*READERS))]
Coordinator = Annotated[Account, Depends(may(COORDINATOR))]
TOLD_ROLES = {
    COORDINATOR: "coordinator: sees everything, starts and stops runs, invites sites, releases",
    AUDITOR: "auditor: sees everything, changes nothing",
    SITE: "member of a site: sees its own site and the runs that name it",
}


# ---- one's own ----------------------------------------------------------------------------------------------


def own_facts(desk: Desk, account: Account, until: int) -> dict[str, Any]:
    """What an account's page says: itself, its sessions, and until when this one lasts."""
    sessions = [{"began": s.began, "seen": s.seen, "from": s.address} for s in desk.accounts.sessions(account.name)]
    return {
        "name": account.name,
        "role": account.role,
        "site": account.site,
        "local": account.local,
        "second_factor": account.has_totp if account.local else None,
        "since": account.since,
        "until": until,
        "idle_minutes": desk.accounts.idle_s // 60,
        "session_hours": desk.accounts.session_s // 3600,
        "sessions": sessions,
    }


@router.get("/account", include_in_schema=False)
def account(request: Request, who: Reader) -> Response:
    return _account(request, who)


@router.get("/api/account")
def account_facts(request: Request, who: Reader) -> Response:
    return JSONResponse(own_facts(desk_of(request), who, request.state.session.until))


@router.post("/account/password")
def change_password(request: Request, who: Reader, password: Text = "", new: Text = "", again: Text = "") -> Response:
    from cohortium.server.console.pages import signin

    desk, where = desk_of(request), signin.address(request)
    if not who.local:
        raise Refused("ACCOUNT-PROVIDER", "your password is kept by your organisation")
    browser = request.cookies.get(cookie_name(desk, signin.BROWSER), "")
    try:
        if desk.accounts.check_password(who.name, password, address=where, browser=browser) is None:
            signin.failed(request, who.name, "password")
            raise UsageError("ACCOUNT-PASSWORD", "the password of now is another one")
        set_own_password(desk, who.name, new, again)
    except UsageError as error:
        return _account(request, who, status=422, error=error.as_json())
    desk.journal.note("password", by=who.name)
    token = desk.accounts.begin(who.name, complete=True, address=where)
    answer = RedirectResponse("/account?did=password", status_code=303)
    signin.set_session(desk, answer, token)
    return answer


@router.post("/account/everywhere")
def out_everywhere(request: Request, who: Reader) -> Response:
    desk = desk_of(request)
    desk.accounts.end_all(who.name)
    desk.journal.note("sign-out", by=who.name, where="everywhere")
    return RedirectResponse("/sign-in", status_code=303)


def set_own_password(desk: Desk, name: str, new: str, again: str) -> None:
    """UsageError ACCOUNT-PASSWORD: not typed twice alike, too easy, or the old one."""
    if not secrets.compare_digest(new.encode(errors="replace"), again.encode(errors="replace")):
        raise UsageError("ACCOUNT-PASSWORD", "the two are not the same")
    if desk.accounts.has_password(name, new):
        raise UsageError("ACCOUNT-PASSWORD", "this is the password of now", hint="choose another one")
    desk.accounts.set_password(name, new)


def _account(request: Request, who: Account, **more: Any) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    facts = own_facts(desk, who, request.state.session.until)
    command = [f"cohortium console user password {desk.consortium.root} {who.name}"] if who.local else None
    return render(
        request,
        "account.html.j2",
        title="Your account",
        here="",
        command=command,
        own=facts,
        told=TOLD_ROLES[who.role],
        least=LEAST_PASSWORD,
        oversees=who.role in EVERYTHING,
        **{"error": None, **more},
    )


# ---- people -------------------------------------------------------------------------------------------------


def people_facts(desk: Desk) -> list[dict[str, Any]]:
    """Everybody who may or might sign in. Neither hashes nor secrets are in an Account."""
    return [{**asdict(found), "local": found.local} for found in desk.accounts.accounts()]


@router.get("/people", include_in_schema=False)
def people(request: Request, who: Annotated[Account, Depends(may(*EVERYTHING))]) -> Response:
    return _people(request)


@router.get("/api/people")
def people_as_facts(request: Request, who: Annotated[Account, Depends(may(*EVERYTHING))]) -> Response:
    return JSONResponse(people_facts(desk_of(request)))


@router.post("/people")
def add(
    request: Request,
    who: Coordinator,
    why: Why,
    name: Text = "",
    role: Text = "",
    site: Text = "",
) -> Response:
    desk, password = desk_of(request), one_time_password()
    site = site if role == SITE else ""

    def do() -> Account:
        if site and site not in _sites(desk):
            raise Refused("MEMBER-UNKNOWN", "there is no such site", hint="invite the site first")
        return desk.accounts.add(name.strip().lower(), role=role, password=password, site=site, one_time=True)

    told = _about(name)
    made = desk.journal.act(who.name, "account-add", told, why, do, role=_about(role), site=_about(site))
    return _people(request, shown={"name": made.name, "password": password})


@router.post("/people/{name}/close")
def close(request: Request, who: Coordinator, name: Name, why: Why) -> Response:
    desk = desk_of(request)
    desk.journal.act(who.name, "account-close", name, why, lambda: desk.accounts.close_account(name))
    return RedirectResponse("/people?did=account-closed", status_code=303)


@router.post("/people/{name}/second-factor")
def reset_factor(request: Request, who: Coordinator, name: Name, why: Why) -> Response:
    desk = desk_of(request)
    desk.journal.act(who.name, "account-second-factor", name, why, lambda: desk.accounts.drop_totp(name))
    return RedirectResponse("/people?did=account-factor", status_code=303)


@router.post("/people/{name}/password")
def reset_password(request: Request, who: Coordinator, name: Name, why: Why) -> Response:
    desk, password = desk_of(request), one_time_password()

    def do() -> None:
        desk.accounts.set_password(name, password, one_time=True)

    desk.journal.act(who.name, "account-password", name, why, do)
    return _people(request, shown={"name": name, "password": password})


def _people(request: Request, **more: Any) -> Response:
    from cohortium.server.console.app import render

    desk, root = desk_of(request), desk_of(request).consortium.root
    return render(
        request,
        "people.html.j2",
        title="People",
        here="",
        command=[f"cohortium console user list {root}", f"cohortium console user add {root} NAME --role auditor"],
        people=desk.accounts.accounts(),
        sites=_sites(desk),
        roles=TOLD_ROLES,
        oidc=desk.settings.oidc,
        **{"shown": None, **more},
    )


def _sites(desk: Desk) -> list[str]:
    return [member.name for member in desk.register.members() if member.role == SITE_MEMBER and member.active]


def _about(text: str) -> str:
    """What somebody typed, as the journal keeps it: short and on one line."""
    return " ".join(text.split())[:100]

"""/sites: who is ready; /sites/NAME: one member; invite, revoke, grant."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Path, Query, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from cohortium.common.errors import UsageError
from cohortium.common.protocol import certificates
from cohortium.server.console import site_view
from cohortium.server.console.access import READERS, Why, desk_of, may
from cohortium.server.console.accounts import COORDINATOR, SITE, Account
from cohortium.server.console.run_list import STATE_KINDS
from cohortium.server.inviting import MOST_HOURS, make_invitation

router = APIRouter()
MemberName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", max_length=64)]
Show = Annotated[str, Query(pattern=f"^({'|'.join(site_view.SHOWS)})$")]
Text = Annotated[str, Query(max_length=200)]
Reader = Annotated[Account, Depends(may(*READERS))]
Coordinator = Annotated[Account, Depends(may(COORDINATOR))]
ROLES = ("site", "researcher")
_FILE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@router.get("/sites")
def sites(request: Request, account: Reader, show: Show = "all", text: Text = "") -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    root = desk.consortium.root
    found = site_view.matrix(desk, account, show=show, text=text)
    own = account.role == SITE
    return render(
        request,
        "sites.html.j2",
        title="Your hospital" if own else "Sites",
        here="/sites",
        command=None if own else [f"cohortium sites list {root}", f"cohortium sites invite {root} NAME"],
        found=found,
        chosen={"show": show, "text": text},
        newest=site_view.NEWEST,
        root_print="" if own else certificates.fingerprint(desk.consortium.root_pem()),
        may_act=account.role == COORDINATOR,
    )


@router.get("/api/sites")
def api_sites(request: Request, account: Reader, show: Show = "all", text: Text = "") -> Response:
    found = site_view.matrix(desk_of(request), account, show=show, text=text)
    return JSONResponse(
        {
            "sites": [line.to_json() for line in found.sites],
            "counts": dict(found.counts),
            "researchers": [
                {"name": member.name, "role": member.role, "state": member.state} for member in found.researchers
            ],
            "invitations": [
                {"name": given.name, "role": given.role, "valid_until": given.valid_until}
                for given in found.invitations
            ],
        }
    )


@router.post("/sites/invite")
def invite(
    request: Request,
    account: Coordinator,
    why: Why,
    name: Annotated[str, Form(max_length=64)] = "",
    role: Annotated[str, Form(max_length=20)] = "site",
    hours: Annotated[int, Form(ge=1, le=MOST_HOURS)] = 24,
) -> Response:
    """The invitation as a file, once: its token is nowhere on this machine afterwards, and not in the journal."""
    desk = desk_of(request)
    if role not in ROLES:
        raise UsageError("INVITE-VALUE", "a member is a site or a researcher")
    if not _FILE.fullmatch(name):
        raise UsageError("INVITE-NAME", "a name has small letters, digits and dashes, at most 64")
    made = desk.journal.act(
        account.name,
        "invite",
        name,
        why,
        lambda: make_invitation(desk.consortium, desk.register, name, role=role, hours=hours),
        role=role,
        hours=hours,
    )
    headers = {"Content-Disposition": f'attachment; filename="{made.name}.invitation"'}
    return Response(made.to_text(), media_type="application/octet-stream", headers=headers)


@router.get("/sites/{name}")
def one(request: Request, name: MemberName, account: Reader) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    found = site_view.member_view(desk, account, name)
    root = desk.consortium.root
    commands = [f"cohortium sites list {root}", f"cohortium sites revoke {root} {name}"]
    if found.grantable:
        commands.append(f"cohortium sites grant {root} RUN {name}")
    return render(
        request,
        "site.html.j2",
        title=name,
        here="/sites",
        command=None if account.role == SITE else commands,
        m=found,
        kinds=STATE_KINDS,
        newest=site_view.NEWEST,
        may_act=account.role == COORDINATOR,
    )


@router.get("/api/sites/{name}")
def api_one(request: Request, name: MemberName, account: Reader) -> Response:
    return JSONResponse(site_view.member_view(desk_of(request), account, name).to_json())


@router.post("/sites/{name}/revoke")
def revoke(request: Request, name: MemberName, account: Coordinator, why: Why) -> Response:
    desk = desk_of(request)
    desk.journal.act(account.name, "revoke", name, why, lambda: desk.register.revoke(name))
    return RedirectResponse(f"/sites/{name}?did=revoked", status_code=303)


@router.post("/sites/{name}/grant")
def grant(
    request: Request,
    name: MemberName,
    account: Coordinator,
    why: Why,
    run: Annotated[str, Form(max_length=64)] = "",
) -> Response:
    """Let a researcher see a run and fetch its synthetic rows."""
    desk = desk_of(request)
    desk.journal.act(account.name, "grant", name, why, lambda: desk.register.grant(run, name), run=run)
    return RedirectResponse(f"/sites/{name}?did=granted", status_code=303)

"""What is asked next: proposals, one of them in words with its costs, and the officer's yes or no."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from fastapi import Path as Part
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from cohortium.client import deciding, proposals
from cohortium.client.approval import approvals
from cohortium.client.inspection import Inspection, inspect
from cohortium.client.page import asked
from cohortium.client.page.room import Room, inside, part, render
from cohortium.client.site import load_officer, officer_is_encrypted
from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.common.protocol.messages import digest

router = APIRouter()
Inside = Annotated[Room, Depends(inside)]
Run = Annotated[str, Part(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
Reason = Annotated[str, Form(max_length=500)]
Confirm = Annotated[str, Form(max_length=10)]
SPANS = (("12h", "12 hours"), ("7d", "7 days"), ("30d", "30 days"), ("8w", "8 weeks"))
MOST_FILE_BYTES = 1_500_000


@router.get("/asked")
def what_is_asked(request: Request, room: Inside) -> HTMLResponse:
    """The frame at once; the list asks the coordinator, which may take a while, and comes by itself."""
    return render(
        request,
        "asked.html.j2",
        title="What is asked next",
        here="/asked",
        command=f"cohortium site inspect {room.site.root}",
        files=[offer for offer in room.offers.known() if offer.state == ""],
    )


@router.get("/asked/list")
def listed(request: Request, room: Inside) -> HTMLResponse:
    room.sight.need(room.site, "guard", "courier")
    found, wrong = room.offers.all(fresh=True)
    return part(request, "asked_list.html.j2", offers=found, wrong=wrong, here=in_force(room))


@router.get("/asked/count")
def counted(request: Request, room: Inside) -> HTMLResponse:
    """For the overview: how many wait."""
    room.sight.need(room.site, "guard", "courier")
    found, wrong = room.offers.all()
    here = in_force(room)
    waiting = [offer for offer in found if offer.state == "open" and offer.proposal.run not in here]
    return part(request, "asked_count.html.j2", waiting=waiting, others=len(found) - len(waiting), wrong=wrong)


def in_force(room: Room) -> set[str]:
    """The runs whose approval here has neither ended nor been taken back, whatever the coordinator was told."""
    now = int(room.clock())
    return {run for run, found in approvals(room.site.guard).items() if found is not None and not found.over(now)}


@router.post("/asked/file")
def from_file(room: Inside, proposal: Annotated[UploadFile, File()]) -> Response:
    room.sight.need(room.site, "guard")
    envelope = proposal.file.read(MOST_FILE_BYTES + 1)
    if not 0 < len(envelope) <= MOST_FILE_BYTES:
        raise UsageError("PROPOSAL-FILE", "a proposal's file is neither empty nor that large")
    found = room.offers.add(envelope)
    return RedirectResponse(f"/asked/{found.run}?did=added", status_code=303)


def look(room: Room, run: str) -> Inspection:
    room.sight.need(room.site, "guard", *(() if room.offers.has(run) else ("courier",)))
    offer = room.offers.one(run)
    return inspect(room.site, offer.proposal, state=offer.state)


@router.get("/asked/{run}")
def one(request: Request, room: Inside, run: Run) -> HTMLResponse:
    found = look(room, run)
    previous = asked.last_approved(room.site, room.papers(), found.proposal)
    proposal, plan = found.proposal, found.proposal.plan
    forbidding = forbids(found)
    return render(
        request,
        "proposal.html.j2",
        title=f"Run {run}",
        here="/asked",
        command=[
            f"cohortium site inspect {room.site.root} {run}",
            f"cohortium site approve {room.site.root} {run} --expires 30d",
            f"cohortium site approve {room.site.root} {run} --decline",
        ],
        run=run,
        plan=plan,
        words=asked.in_words(plan, site=found.policy.name),
        leaves=found.to_json()["leaves"],
        most=plan.bytes_per_site(),
        statement=plan.statement().sentence(),
        schema=proposal.schema,
        exclude=proposal.exclude,
        peers=found.peers(),
        bars=asked.bars(found),
        policy=found.policy,
        objections=[error.as_json() for error in found.objections],
        forbidding=None if forbidding is None else forbidding.as_json(),
        pinning=isinstance(forbidding, Refused) and forbidding.code == "POLICY-PEERS",
        approval=found.approval,
        signers=found.signers,
        offered=found.state,
        proposal=digest(proposal.envelope),
        previous=previous,
        differences=[] if previous is None else asked.differences(previous[0], proposal),
        spans=SPANS,
        key=_default_key(room),
        encrypted=_encrypted(room),
        tells=room.sight.sees("courier"),
    )


def forbids(found: Inspection) -> CohortiumError | None:
    """What keeps this plan from being approved, as the command would say it; None: nothing does."""
    try:
        deciding.refuse_objections(found)
    except CohortiumError as error:
        return error
    return None


def _default_key(room: Room) -> str:
    key = room.site.officer / "officer.key"
    try:
        return str(key) if room.sight.sees("officer") and key.exists() else ""
    except OSError:
        return ""


def _encrypted(room: Room) -> bool | None:
    """Whether the key here wants a passphrase; None: there is none here to look at."""
    key = _default_key(room)
    try:
        return officer_is_encrypted(Path(key)) if key else None
    except (CohortiumError, OSError):
        return None


@router.get("/asked/{run}/proposal.bin")
def envelope(room: Inside, run: Run) -> Response:
    """The coordinator's signed bytes, to be looked at and approved on another machine."""
    room.sight.need(room.site, "guard", *(() if room.offers.has(run) else ("courier",)))
    found = room.offers.one(run)
    headers = {"Content-Disposition": 'attachment; filename="proposal.bin"'}
    return Response(found.proposal.envelope, media_type="application/octet-stream", headers=headers)


@router.get("/api/asked/{run}")
def facts(room: Inside, run: Run) -> JSONResponse:
    return JSONResponse(look(room, run).to_json())


@router.post("/asked/{run}/approve")
def approve(
    room: Inside,
    run: Run,
    proposal: Annotated[str, Form(pattern=r"^[0-9a-f]{64}$")],
    expires: Annotated[str, Form(max_length=8)],
    reason: Reason = "",
    confirm: Confirm = "",
    passphrase: Annotated[str, Form(max_length=1000)] = "",
    key: Annotated[str, Form(max_length=1000)] = "",
    pin_peers: Annotated[str, Form(max_length=3)] = "",
    offline: Annotated[str, Form(max_length=3)] = "",
) -> Response:
    """As `site approve`. What is signed is what was shown: another proposal under the same name is refused."""

    def do() -> tuple[deciding.Decided, bool]:
        lasts = deciding.seconds(expires)
        found = look(room, run)
        if digest(found.proposal.envelope) != proposal:
            raise Refused("PAGE-CHANGED", "this is not the proposal that was shown", hint="look at it again")
        deciding.refuse_objections(found, pin_peers=pin_peers == "yes")
        officer = load_officer(_key_file(key or _default_key(room)), passphrase or None)
        return proposals.approve(
            room.site,
            found,
            officer,
            expires=int(time.time()) + lasts,
            pin_peers=pin_peers == "yes",
            tell=offline != "yes" and room.sight.sees("courier"),
        )

    decided, told = room.act("approve", run, reason, confirm, do)
    room.offers.forget()
    word = "approved" if decided.complete else "signed"
    if decided.complete and not told and offline != "yes":
        word = "untold" if decided.notice is not None else "signed"
    return RedirectResponse(f"/asked/{run}?did={word}", status_code=303)


def _key_file(text: str) -> Path:
    path = Path(text)
    if not text or not text.isprintable() or not path.is_absolute():
        raise UsageError("KEY-MISSING", "name the file of the officer's key", hint="its whole path")
    return path


@router.post("/asked/{run}/decline")
def decline(
    room: Inside,
    run: Run,
    proposal: Annotated[str, Form(pattern=r"^[0-9a-f]{64}$")],
    reason: Reason = "",
    confirm: Confirm = "",
    offline: Annotated[str, Form(max_length=3)] = "",
) -> Response:
    def do() -> bool:
        found = room.offers.one(run).proposal
        if digest(found.envelope) != proposal:
            raise Refused("PAGE-CHANGED", "this is not the proposal that was shown", hint="look at it again")
        return proposals.decline(room.site, found, tell=offline != "yes" and room.sight.sees("courier"))

    room.act("decline", run, reason, confirm, do)
    room.offers.forget()
    return RedirectResponse("/asked?did=declined", status_code=303)


@router.post("/pause")
def pause(room: Inside, reason: Reason = "", confirm: Confirm = "") -> Response:
    room.act("pause", "site", reason, confirm, lambda: deciding.pause(room.site))
    return RedirectResponse("/?did=paused", status_code=303)


@router.post("/unpause")
def unpause(room: Inside, reason: Reason = "", confirm: Confirm = "") -> Response:
    room.act("unpause", "site", reason, confirm, lambda: deciding.unpause(room.site))
    return RedirectResponse("/?did=unpaused", status_code=303)

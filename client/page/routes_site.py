"""The site itself: ledger and lifetime bars, checks, its own report, the policy in words, what was done in the page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi import Path as Part
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from cohortium.client import bookkeeping, checks
from cohortium.client.inspection import inspect
from cohortium.client.page import asked, jobs, policy_words
from cohortium.client.page.journal import told
from cohortium.client.page.room import Room, inside, part, render
from cohortium.common.errors import CohortiumError
from cohortium.common.protocol.messages import canonical
from cohortium.common.web.guarding import REPORT_POLICY

router = APIRouter()
Inside = Annotated[Room, Depends(inside)]


# ---- the ledger ---------------------------------------------------------------------------------------------


@router.get("/ledger")
def ledger(request: Request, room: Inside, verify: Annotated[bool, Query()] = False) -> HTMLResponse:
    room.sight.need(room.site, "guard")
    found = bookkeeping.statement(room.site, verify=verify)
    policy = room.site.policy()
    more = " --verify" if verify else ""
    return render(
        request,
        "ledger.html.j2",
        title="Ledger",
        here="/ledger",
        command=f"cohortium site ledger {room.site.root}{more}",
        facts=found,
        verify=verify,
        source=policy_words.source(policy),
        next=standing(room),
    )


def standing(room: Room) -> list[tuple[str, asked.Bars]]:
    """What each proposal that is known here would leave of the cap; asks nobody."""
    found = []
    for offer in room.offers.known():
        bars = asked.bars(inspect(room.site, offer.proposal, state=offer.state))
        if offer.state != "declined" and bars.after != bars.before:  # a run that is over asks for nothing more
            found.append((offer.proposal.run, bars))
    return found


@router.get("/ledger.jsonl")
def export(room: Inside) -> Response:
    """All lines, byte for byte as `site ledger --export` writes them."""
    lines = room.papers().lines
    text = b"".join(canonical(line.to_json()) + b"\n" for line in lines)
    headers = {"Content-Disposition": 'attachment; filename="ledger.jsonl"'}
    return Response(text, media_type="application/jsonl", headers=headers)


@router.get("/api/ledger")
def ledger_facts(room: Inside, verify: Annotated[bool, Query()] = False) -> JSONResponse:
    room.sight.need(room.site, "guard")
    return JSONResponse(bookkeeping.statement(room.site, verify=verify))


# ---- the checks ---------------------------------------------------------------------------------------------


@router.get("/check")
def check(request: Request, room: Inside) -> HTMLResponse:
    return render(
        request,
        "check.html.j2",
        title="Check",
        here="/check",
        command=[f"cohortium site check {room.site.root}", "cohortium doctor"],
        job=room.checking,
    )


@router.post("/check")
def start_check(room: Inside, network: Annotated[str, Form(max_length=3)] = "") -> Response:
    room.checking.start(network=network == "yes")
    return RedirectResponse("/check", status_code=303)


@router.get("/check/state")
def check_state(request: Request, room: Inside) -> HTMLResponse:
    return part(request, "check_state.html.j2", job=room.checking)


@router.get("/api/check")
def check_facts(room: Inside) -> JSONResponse:
    job = room.checking
    return JSONResponse({"running": job.running, "checks": [one.to_json() for one in job.found], "failed": job.failed})


# ---- the site's own report ----------------------------------------------------------------------------------


@router.get("/report")
def report(request: Request, room: Inside) -> HTMLResponse:
    sees = room.sight.sees("guard")
    return render(
        request,
        "report.html.j2",
        title="This hospital's own report",
        here="/report",
        command=f"cohortium site report {room.site.root} ROWS.parquet --run RUN",
        job=room.reporting,
        running=room.reporting.running,
        reports=jobs.reports(room.site.guard) if sees else [],
        runs=sorted(room.papers().proposals) if sees else [],
        sees=sees,
    )


@router.post("/report")
def start_report(
    room: Inside,
    rows: Annotated[str, Form(max_length=1000)],
    run: Annotated[str, Form(max_length=64, pattern=r"^[a-z0-9][a-z0-9-]*$")],
) -> Response:
    room.sight.need(room.site, "guard")
    room.reporting.start(rows, run)
    return RedirectResponse("/report", status_code=303)


@router.get("/report/state")
def report_state(request: Request, room: Inside) -> HTMLResponse:
    running = room.reporting.running
    made = dict(jobs.reports(room.site.guard)).get(room.reporting.run) if room.sight.sees("guard") else None
    return part(request, "report_state.html.j2", job=room.reporting, running=running, made=made)


@router.get("/report/page/{run}")
def report_page(room: Inside, run: Annotated[str, Part(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]) -> Response:
    """The report as it lies on disk, in an origin of its own: no script, no request."""
    room.sight.need(room.site, "guard")
    found = jobs.report_page(room.site.guard, run)
    return Response(found, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": REPORT_POLICY})


# ---- the policy, the journal --------------------------------------------------------------------------------


@router.get("/policy")
def policy(request: Request, room: Inside) -> HTMLResponse:
    found: dict[str, Any] = {"rules": [], "source": "", "broken": None}
    if room.sight.sees("guard"):
        try:
            read = room.site.policy()
            found = {"rules": policy_words.rules(read), "source": policy_words.source(read), "broken": None}
        except CohortiumError as error:
            found["broken"] = error.as_json()
    return render(
        request,
        "policy.html.j2",
        title="Policy",
        here="/policy",
        command=[f"$EDITOR {room.site.policy_path}", f"cohortium site check {room.site.root}", "cohortium doctor"],
        path=str(room.site.policy_path),
        machine=machine(room),
        **found,
    )


def machine(room: Room) -> list[checks.Check]:
    """What can be said of this machine at once; the checks look at the rest."""
    found = [checks.check_versions(), checks.check_disk(room.site), checks.check_gpu()]
    if room.sight.sees("guard"):
        found += [checks.check_filesystem(room.site), checks.check_users(room.site)]
    return found


@router.get("/api/policy")
def policy_facts(room: Inside) -> JSONResponse:
    room.sight.need(room.site, "guard")
    rules = policy_words.rules(room.site.policy())
    return JSONResponse([{"setting": r.setting, "value": r.value, "means": r.means, "care": r.care} for r in rules])


@router.get("/journal")
def journal(request: Request, room: Inside) -> HTMLResponse:
    return render(
        request,
        "journal.html.j2",
        title="What was done here",
        here="/journal",
        actions=told(room.journal.lines()) if room.journal is not None else [],
        path="" if room.journal is None else str(room.journal.path),
    )


@router.get("/journal.jsonl")
def journal_lines(room: Inside) -> Response:
    room.sight.need(room.site, "guard")
    lines = [] if room.journal is None else room.journal.lines()
    text = b"".join(canonical(line.to_json()) + b"\n" for line in lines)
    headers = {"Content-Disposition": 'attachment; filename="journal.jsonl"'}
    return Response(text, media_type="application/jsonl", headers=headers)

"""/audit: who did what and why, signed; and what became of it. For coordinators and auditors."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from cohortium.server.console import audit_view
from cohortium.server.console.access import EVERYTHING, desk_of, may
from cohortium.server.console.accounts import Account
from cohortium.server.console.audit_view import PAGE
from cohortium.server.console.trail import Wanted

router = APIRouter()
Text = Annotated[str, Query(max_length=200)]
Day = Annotated[str, Query(pattern=r"^(\d{4}-\d{2}-\d{2})?$")]
Start = Annotated[int, Query(ge=0, le=10**7)]
FILE = "cohortium-journal.jsonl"
MOST_ROWS = 100_000


def _asked(
    person: Text = "", action: Text = "", site: Text = "", run: Text = "", since: Day = "", until: Day = ""
) -> Wanted:
    return audit_view.wanted(person=person, action=action, site=site, run=run, since=since, until=until)


Asked = Annotated[Wanted, Depends(_asked)]
Reader = Annotated[Account, Depends(may(*EVERYTHING))]


@router.get("/audit")
def page(request: Request, account: Reader, asked: Asked, start: Start = 0, trail: Start = 0) -> HTMLResponse:
    from cohortium.server.console.app import render

    desk, given = desk_of(request), dict(request.query_params)
    journal = desk.journal
    if journal.verified is None:
        journal.verify_beside()
    acts = journal.acts()
    found = audit_view.chosen(acts, asked)
    traces, more = desk.books.search(asked, start=trail, limit=PAGE)
    head = journal.head
    filters = {name: given.get(name, "") for name in ("person", "action", "site", "run", "since", "until")}
    return render(
        request,
        "audit.html.j2",
        title="Audit",
        here="/audit",
        command=f'cohortium console verify-journal {FILE} --key {journal.public_key} --head "{head.size} {head.hash}"',
        choices=audit_view.choices(acts),
        filters=filters,
        filtered=any(filters.values()),
        query=urlencode({name: value for name, value in filters.items() if value}),
        acts=found[start : start + PAGE],
        all_acts=len(found),
        start=start,
        traces=traces,
        trail=trail,
        more=more,
        page=PAGE,
        head=head,
        verified=journal.verified,
        verifying=journal.verifying,
        key=journal.public_key,
        as_of=desk.books.as_of,
    )


@router.get("/api/audit")
def facts(request: Request, account: Reader, asked: Asked, start: Start = 0, trail: Start = 0) -> JSONResponse:
    desk = desk_of(request)
    journal = desk.journal
    found = audit_view.chosen(journal.acts(), asked)
    traces, more = desk.books.search(asked, start=trail, limit=PAGE)
    head, verified = journal.head, journal.verified
    told: dict[str, Any] = {
        "head": {"size": head.size, "hash": head.hash},
        "public_key": journal.public_key,
        "verified": None
        if verified is None
        else {"at": verified.at, "size": verified.size, "head": verified.head, "problem": verified.problem},
        "acts": [act.to_json() for act in found[start : start + PAGE]],
        "all_acts": len(found),
        "trail": [trace.to_json() for trace in traces],
        "more_trail": more,
    }
    return JSONResponse(told)


@router.post("/audit/verify")
def verify(request: Request, account: Reader) -> Response:
    """Look at every line of the journal again. It changes nothing."""
    desk_of(request).journal.verify_beside()
    return RedirectResponse("/audit?did=verifying", status_code=303)


@router.get("/audit/journal.jsonl")
def journal_file(request: Request, account: Reader) -> Response:
    """The whole journal as it is signed, with its signed head as the last line; the download is its last act."""
    journal = desk_of(request).journal
    journal.note("download", by=account.name, on="journal", file=FILE)
    return _file(journal.exported(), "application/x-ndjson", FILE)


@router.get("/audit/journal.csv")
def journal_csv(request: Request, account: Reader, asked: Asked) -> Response:
    """The acts that are asked for, for a spreadsheet; not signed."""
    journal = desk_of(request).journal
    journal.note("download", by=account.name, on="journal", file="cohortium-journal.csv")
    text = audit_view.acts_csv(audit_view.chosen(journal.acts(), asked))
    return _file(text.encode(), "text/csv; charset=utf-8", "cohortium-journal.csv")


@router.get("/audit/trail.csv")
def trail_csv(request: Request, account: Reader, asked: Asked) -> Response:
    desk = desk_of(request)
    desk.journal.note("download", by=account.name, on="trail", file="cohortium-trail.csv")
    traces, _ = desk.books.search(asked, limit=MOST_ROWS)
    return _file(audit_view.trail_csv(traces).encode(), "text/csv; charset=utf-8", "cohortium-trail.csv")


def _file(data: bytes, kind: str, name: str) -> Response:
    return Response(data, media_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'})

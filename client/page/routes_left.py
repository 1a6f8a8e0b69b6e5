"""Overview, and what left here: rows, picture, filter, exports."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from cohortium.client.inspection import account
from cohortium.client.page import left, pictures
from cohortium.client.page.kinds import KINDS
from cohortium.client.page.ledger_view import Papers
from cohortium.client.page.room import Room, inside, render
from cohortium.common.privacy.budget import Event

router = APIRouter()
Inside = Annotated[Room, Depends(inside)]
PER_PAGE = 50
MOST_EPSILONS = 12
"""How many ε of one page are computed for it: each is some tens of milliseconds."""
Run = Annotated[str, Query(max_length=64, pattern=r"^[a-z0-9-]*$")]
Word = Annotated[str, Query(max_length=40, pattern=r"^[a-z.]*$")]
Day = Annotated[str, Query(max_length=10, pattern=r"^(\d{4}-\d{2}-\d{2})?$")]


def choice(run: Run = "", kind: Word = "", since: Day = "", until: Day = "") -> left.Choice:
    return left.Choice(run=run, kind=kind, since=since, until=until)


Chosen = Annotated[left.Choice, Depends(choice)]


@router.get("/")
def overview(request: Request, room: Inside) -> HTMLResponse:
    facts: dict[str, Any] = {"last": None, "rows": 0, "records": 0, "standing": None, "cap": None}
    if room.sight.sees("guard"):
        papers = room.papers()
        found = left.rows(papers)
        gone = [row for row in found if row.kind != "charged"]
        policy = papers.policy
        facts = {
            "last": gone[-1] if gone else None,
            "rows": len(gone),
            "records": sum(row.records for row in gone),
            "standing": account(policy, charges(papers)),
            "cap": policy,
        }
    commands = [f"cohortium site {verb} {room.site.root}" for verb in ("inspect", "ledger", "check", "pause")]
    return render(request, "overview.html.j2", title="Overview", here="/", command=commands, **facts)


def charges(papers: Papers) -> list[tuple[Event, int]]:
    return [
        (Event.from_json(line.body["event"]), int(line.body["count"]))
        for line in papers.lines
        if line.body["kind"] == "reserve"
    ]


@router.get("/left")
def what_left(
    request: Request, room: Inside, chosen: Chosen, page: Annotated[int, Query(ge=1, le=100_000)] = 1
) -> HTMLResponse:
    papers = room.papers()
    everything = left.rows(papers)
    found = chosen.of(everything)
    shown = list(reversed(found))[(page - 1) * PER_PAGE : page * PER_PAGE]
    query = chosen.query()
    return render(
        request,
        "left.html.j2",
        title="What left here",
        here="/left",
        command=f"cohortium site ledger {room.site.root} --verify --export ledger.jsonl",
        rows=shown,
        costs=costs(papers, shown),
        kinds=KINDS,
        found=len(found),
        total=len(everything),
        records=sum(row.records for row in found),
        picture=pictures.over_time(found),
        step=pictures.step_name(found),
        chosen=chosen,
        runs=sorted({row.run for row in everything if row.run}),
        page=page,
        pages=max(1, -(-len(found) // PER_PAGE)),
        query=urlencode(query),
        unlogged=[] if papers.sent else [KINDS[name].title for name in left.UNLOGGED],
        policy=papers.policy,
    )


def costs(papers: Papers, shown: list[left.Row]) -> dict[str, float]:
    """ε so far at the newest release of each stretch of a run's stage, by row: the others lie in between."""
    found: dict[str, float] = {}
    before: tuple[str, str] | None = None
    for row in shown:
        stretch = (row.run, row.stage)
        if row.share and row.line is not None and stretch != before and len(found) < MOST_EPSILONS:
            found[row.id] = left.epsilon_at(papers, row.line)
            before = stretch
    return found


@router.get("/left.csv")
def table(room: Inside, chosen: Chosen) -> Response:
    return _file(left.as_csv(chosen.of(left.rows(room.papers()))), "text/csv; charset=utf-8", "left.csv")


@router.get("/left.jsonl")
def lines(room: Inside, chosen: Chosen) -> Response:
    return _file(left.as_jsonl(chosen.of(left.rows(room.papers()))), "application/jsonl", "left.jsonl")


@router.get("/api/left")
def facts(room: Inside, chosen: Chosen) -> JSONResponse:
    return JSONResponse([row.to_json() for row in chosen.of(left.rows(room.papers()))])


def _file(text: str, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text.encode(), media_type=kind, headers=headers)

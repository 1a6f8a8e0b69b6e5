"""/: what needs a human, what runs, what was published."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from cohortium.server.console import today_view
from cohortium.server.console.access import READERS, desk_of, may
from cohortium.server.console.accounts import SITE, Account

router = APIRouter()
Reader = Annotated[Account, Depends(may(*READERS))]


@router.get("/")
def today(request: Request, account: Reader) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    root = desk.consortium.root
    return render(
        request,
        "today.html.j2",
        title="Today",
        here="/",
        command=None if account.role == SITE else [f"cohortium watch {root}", f"cohortium sites list {root}"],
        t=today_view.today(desk, account),
    )


@router.get("/api/today")
def api_today(request: Request, account: Reader) -> Response:
    return JSONResponse(today_view.today(desk_of(request), account).to_json())

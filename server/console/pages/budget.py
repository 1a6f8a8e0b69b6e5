"""/budget: what each site has spent over its lifetime and each run of its budget, from verified ledger lines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from cohortium.common.errors import Refused
from cohortium.server.console.access import EVERYTHING, READERS, desk_of, may
from cohortium.server.console.accounts import SITE, Account
from cohortium.server.console.books_picture import LIFETIME_DELTA, SiteBook
from cohortium.server.console.budget_view import HEIGHT, PAGE, WIDTH, budget, grouped, steps_of
from cohortium.server.console.desk import Desk


@asynccontextmanager
async def _reading(app: FastAPI) -> AsyncIterator[None]:
    """While the console serves, its index follows the ledgers."""
    desk: Desk = app.state.desk
    desk.start()
    yield


router = APIRouter(lifespan=_reading)
Name = Annotated[str, Path(max_length=200)]
Key = Annotated[str, Query(pattern="^([0-9a-f]{64})?$")]
LINES = 50


@router.get("/budget")
def page(
    request: Request,
    account: Annotated[Account, Depends(may(*READERS))],
    study: Annotated[str, Query(max_length=200)] = "",
    start: Annotated[int, Query(ge=0, le=10**6)] = 0,
) -> HTMLResponse:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    shown = budget(desk, account)
    runs = [run for run in shown.runs if not study or run.study == study]
    folder = desk.consortium.root
    return render(
        request,
        "budget.html.j2",
        title="Budget",
        here="/budget",
        command=[f"cohortium watch {folder} --json", f"cohortium audit {folder}/runs/RUN"],
        budget=shown,
        runs=runs[start : start + PAGE],
        all_runs=len(runs),
        start=start,
        page=PAGE,
        study=study,
        delta=LIFETIME_DELTA,
        grouped=grouped,
        **_state(desk, account),
    )


@router.get("/api/budget")
def facts(request: Request, account: Annotated[Account, Depends(may(*READERS))]) -> JSONResponse:
    desk = desk_of(request)
    state = _state(desk, account)
    check = None if account.role == SITE else state["check"].to_json()
    told = {"as_of": state["as_of"], "trouble": state["trouble"], "check": check, "lifetime_delta": LIFETIME_DELTA}
    return JSONResponse(told | budget(desk, account).to_json())


@router.get("/budget/check")
def check(request: Request, account: Annotated[Account, Depends(may(*EVERYTHING))]) -> HTMLResponse:
    """The part of the page that tells how far a verification is."""
    desk = desk_of(request)
    pages = request.app.state.pages
    text = pages.text(
        "budget_check.html.j2", csrf=request.state.session.csrf, now=desk.clock(), **_state(desk, account)
    )
    return HTMLResponse(text)


@router.post("/budget/verify")
def verify(request: Request, account: Annotated[Account, Depends(may(*EVERYTHING))]) -> Response:
    """Begin to recompute everything from nothing. It changes nothing, so whoever sees everything may ask for it."""
    desk = desk_of(request)
    if desk.books.verify():
        desk.journal.note("verify", by=account.name, on="ledgers")
    return RedirectResponse("/budget?did=verifying", status_code=303)


@router.get("/budget/sites/{name}")
def site(
    request: Request,
    account: Annotated[Account, Depends(may(*READERS))],
    name: Name,
    key: Key = "",
    before: Annotated[int | None, Query(ge=0, le=2**53)] = None,
) -> HTMLResponse:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    book = _seen(desk, account, name)
    return render(
        request,
        "budget_site.html.j2",
        title=f"Budget of {name}",
        here="/budget",
        command=["cohortium site ledger SITE --verify   # at the hospital"],
        book=book,
        steps=steps_of(book),
        width=WIDTH,
        height=HEIGHT,
        delta=LIFETIME_DELTA,
        grouped=grouped,
        lines=_lines(desk, book, key, before),
        **_state(desk, account),
    )


@router.get("/api/budget/sites/{name}")
def site_facts(request: Request, account: Annotated[Account, Depends(may(*READERS))], name: Name) -> JSONResponse:
    return JSONResponse(_seen(desk_of(request), account, name).to_json())


@router.get("/budget/sites/{name}/lines")
def lines(
    request: Request,
    account: Annotated[Account, Depends(may(*READERS))],
    name: Name,
    key: Key = "",
    before: Annotated[int | None, Query(ge=0, le=2**53)] = None,
) -> HTMLResponse:
    """Further rows of the table of lines, older ones."""
    desk = desk_of(request)
    book = _seen(desk, account, name)
    text = request.app.state.pages.text("budget_lines.html.j2", book=book, lines=_lines(desk, book, key, before))
    return HTMLResponse(text)


@router.get("/api/budget/sites/{name}/lines")
def line_facts(
    request: Request,
    account: Annotated[Account, Depends(may(*READERS))],
    name: Name,
    key: Key = "",
    start: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> JSONResponse:
    """Lines in their own order."""
    desk = desk_of(request)
    _seen(desk, account, name)
    return JSONResponse(desk.books.lines(name, start, limit, key=key).to_json())


def _seen(desk: Desk, account: Account, name: str) -> SiteBook:
    """The site's book; Refused MEMBER-UNKNOWN where there is no such site or the account does not see it."""
    book = desk.books.site(name)
    member = desk.register.member(name)
    exists = book.ledgers or (member is not None and member.role == SITE)
    if not exists or not desk.sees_site(account, name):
        raise Refused("MEMBER-UNKNOWN", "there is no such site")
    return book


def _lines(desk: Desk, book: SiteBook, key: str, before: int | None) -> dict[str, Any]:
    """The newest lines before a number, newest first; what did not verify stands on top."""
    ledger = next((each for each in book.ledgers if each.key == key), book.ledgers[-1] if book.ledgers else None)
    if ledger is None:
        return {"rows": (), "older": None, "key": "", "size": 0}
    end = before if before is not None else ledger.size + bool(ledger.problem)
    start = max(0, end - LINES)
    found = desk.books.lines(book.name, start, max(1, end - start), key=ledger.key) if end else None
    rows = tuple(reversed(found.lines)) if found is not None else ()
    return {"rows": rows, "older": start or None, "key": ledger.key, "size": ledger.size}


def _state(desk: Desk, account: Account) -> dict[str, Any]:
    books = desk.books
    may_verify = account.role in EVERYTHING
    return {"as_of": books.as_of, "trouble": books.trouble, "check": books.check, "may_verify": may_verify}

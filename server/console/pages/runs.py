"""/runs: all runs; /runs/RUN: one run, live, with stop and resume."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from cohortium.common.web.pages import Pages
from cohortium.server.conduct import ask_to_resume, ask_to_stop
from cohortium.server.console import run_list, run_store, run_view
from cohortium.server.console.access import READERS, Why, cookie_name, desk_of, may, see_run
from cohortium.server.console.accounts import COORDINATOR, SITE, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.live import EventStream, Live, TooManyStreams
from cohortium.server.console.run_view import RunView
from cohortium.server.register import RunRow

router = APIRouter()
RunName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", max_length=64)]
StateName = Annotated[str, Query(pattern=f"^({'|'.join(run_list.STATES)})?$")]
Reader = Annotated[Account, Depends(may(*READERS))]
Coordinator = Annotated[Account, Depends(may(COORDINATOR))]
PARTS = ("state", "progress", "budget", "timeline", "approvals", "attempts")
AGAIN = "again"


# ---- all runs -----------------------------------------------------------------------------------------------


@router.get("/runs")
def runs(
    request: Request,
    account: Reader,
    state: StateName = "",
    study: Annotated[str, Query(max_length=200)] = "",
    text: Annotated[str, Query(max_length=200)] = "",
    page: Annotated[int, Query(ge=1, le=100_000)] = 1,
) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    found = run_list.listed(desk, account, state=state, study=study, text=text, page=page)

    def to(number: int) -> str:
        given = {"state": state, "study": study, "text": text, "page": number if number > 1 else ""}
        chosen = urlencode({key: value for key, value in given.items() if value})
        return "/runs" + (f"?{chosen}" if chosen else "")

    return render(
        request,
        "runs.html.j2",
        title="Runs",
        here="/runs",
        command=None if account.role == SITE else f"cohortium watch {desk.consortium.root}",
        found=found,
        chosen={"state": state, "study": study, "text": text},
        earlier=to(found.page - 1) if found.page > 1 else "",
        later=to(found.page + 1) if found.page < found.pages else "",
        kinds=run_list.STATE_KINDS,
        named=run_list.named,
    )


@router.get("/api/runs")
def api_runs(
    request: Request,
    account: Reader,
    state: StateName = "",
    study: Annotated[str, Query(max_length=200)] = "",
    text: Annotated[str, Query(max_length=200)] = "",
    page: Annotated[int, Query(ge=1, le=100_000)] = 1,
) -> Response:
    found = run_list.listed(desk_of(request), account, state=state, study=study, text=text, page=page)
    return JSONResponse(
        {
            "runs": [line.to_json() for line in found.lines],
            "total": found.total,
            "page": found.page,
            "pages": found.pages,
            "states": dict(found.states),
            "studies": list(found.studies),
        }
    )


# ---- one run ------------------------------------------------------------------------------------------------


@router.get("/runs/{run}")
def one(request: Request, run: RunName, account: Reader) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    row = see_run(desk, account, run)
    shown = run_view.view(desk, row)
    code, columns, left_out = run_view.signed_plan(desk, row)
    plan, price = run_view.price_of(desk, row)
    last = shown.marks[-1] if shown.marks else None
    return render(
        request,
        "run.html.j2",
        title=run,
        here="/runs",
        command=None if account.role == SITE else _commands(desk, shown),
        v=shown,
        live=f"/runs/{run}/events?{urlencode({'was': shown.state})}" if not (shown.ended and shown.priced) else "",
        plan=plan,
        price=price.facts if price is not None else None,
        signed=code,
        columns=columns,
        left_out=left_out,
        fix=last.fix if last is not None and last.event == "failed" and account.role != SITE else "",
        may_act=account.role == COORDINATOR,
        may_stop=not shown.ended and shown.state not in ("stopping", "stopped"),
        may_resume=shown.state == "stopped",
    )


@router.get("/api/runs/{run}")
def api_one(request: Request, run: RunName, account: Reader) -> Response:
    desk = desk_of(request)
    return JSONResponse(run_view.view(desk, see_run(desk, account, run)).to_json())


@router.post("/runs/{run}/stop")
def stop(request: Request, run: RunName, account: Coordinator, why: Why) -> Response:
    desk = desk_of(request)
    see_run(desk, account, run)
    desk.journal.act(account.name, "stop", run, why, lambda: ask_to_stop(desk.register, run))
    return RedirectResponse(f"/runs/{run}?did=stopped", status_code=303)


@router.post("/runs/{run}/resume")
def resume(request: Request, run: RunName, account: Coordinator, why: Why) -> Response:
    desk = desk_of(request)
    see_run(desk, account, run)
    desk.journal.act(account.name, "resume", run, why, lambda: ask_to_resume(desk.consortium, desk.register, run))
    return RedirectResponse(f"/runs/{run}?did=resumed", status_code=303)


def _commands(desk: Desk, shown: RunView) -> list[str]:
    root = desk.consortium.root
    found = [f"cohortium watch {root} {shown.run}"]
    if shown.state == "stopped":
        found.append(f"cohortium resume {root} {shown.run}")
    elif not shown.ended:
        found.append(f"cohortium stop {root} {shown.run}")
    return found


# ---- live ---------------------------------------------------------------------------------------------------

_live: WeakKeyDictionary[Desk, Live] = WeakKeyDictionary()
_lock = threading.Lock()


def live_of(desk: Desk) -> Live:
    """The watchers over a desk's runs; the server's end closes them (`live_of(desk).close()`)."""
    with _lock:
        found = _live.get(desk)
        if found is None:
            found = _live[desk] = Live()
        return found


def close(desk: Desk) -> None:
    """End every live page and the thread that prices plans. The server calls it before it waits for its connections."""
    live_of(desk).close()
    run_store.runs_of(desk).prices.close()


@router.get("/runs/{run}/events", include_in_schema=False)
async def events(
    request: Request,
    run: RunName,
    account: Reader,
    was: StateName = "",
    only: Annotated[str, Query(pattern=f"^({'|'.join(PARTS)})?$")] = "",
) -> Response:
    """Server-sent events: the parts of this run's page, whenever one of them changed.

    was: the state that the page was made with; another one is told, for its actions are of that state.
    """
    from starlette.concurrency import run_in_threadpool

    desk, pages = desk_of(request), request.app.state.pages
    row = await run_in_threadpool(see_run, desk, account, run)
    live = live_of(desk)
    look, show = _watching(desk, pages, row)
    try:
        watcher, viewer = live.join(run, account.name, look, show)
    except TooManyStreams:
        return Response("LIVE-MANY: too many live pages of this account are open\n", 429, media_type="text/plain")

    def fit(part: str, html: str) -> str | None:
        if part == part_id(AGAIN, run):
            if only:
                return None
            return "" if not was or html == was else pages.text("run_again.html.j2", state=html)
        return html if not only or part == part_id(only, run) else None

    token = request.cookies.get(cookie_name(desk), "")
    stream = live.events(viewer, fit=fit, lasts=lambda: _lasts(desk, account, token, run))
    return EventStream(stream, left=lambda: live.leave(run, watcher, viewer))


def part_id(part: str, run: str) -> str:
    return f"run-{part}-{run}"


def parts(pages: Pages, shown: RunView) -> dict[str, str]:
    """{id: html} of everything on a run's page that changes."""
    return {part_id(part, shown.run): pages.text(f"run_{part}.html.j2", v=shown) for part in PARTS}


def _watching(
    desk: Desk, pages: Pages, row: RunRow
) -> tuple[Callable[[], Any], Callable[[], tuple[Mapping[str, str], bool]]]:
    runs, run, folder = run_store.runs_of(desk), row.run, desk.consortium.root / row.folder

    def look() -> Any:
        now = desk.register.run_row(run)
        log = runs.log(now)
        priced = True
        if run_view.is_private(desk, now):
            priced = run_view.price_of(desk, now)[1] is not None
        return (
            now,
            tuple(desk.register.answers(run)),
            log.stamp,
            priced,
            run_view.charged(desk, now, len(log.releases)) if log.releases else 0.0,
            (folder / "result.json").exists(),
            (folder / "release" / "release.json").exists(),
        )

    def show() -> tuple[Mapping[str, str], bool]:
        shown = run_view.view(desk, desk.register.run_row(run))
        return {**parts(pages, shown), part_id(AGAIN, run): shown.state}, shown.ended and shown.priced

    return look, show


def _lasts(desk: Desk, account: Account, token: str, run: str) -> bool:
    """Whether the session that opened a stream still holds, and still sees the run. Watching keeps nobody signed in."""
    session = desk.accounts.session(token, awake=False)
    if session is None or not session.complete or session.account.name != account.name:
        return False
    return desk.sees_run(session.account, run)

"""The application: what stands before it, its pages, and how every error looks. `create` is all that others call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from cohortium.common.web.failures import answer_failures, failure
from cohortium.common.web.guarding import GuardedApp, Guarding
from cohortium.common.web.pages import Pages, nav, report_style, static
from cohortium.server.console.access import NotAllowed, NotSignedIn, desk_of, session_of, to_sign_in
from cohortium.server.console.accounts import SITE, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.jobs import MOST_TABLE
from cohortium.server.console.metrics_requests import Requests
from cohortium.server.console.pages import audit, budget, metrics, results, runs, signin, sites, studies, today, whatif
from cohortium.server.console.pages import release as release_pages
from cohortium.server.logs import ConsoleLog, account_of, route_of

PRODUCT = "Cohortium"
NAV = (
    ("/", "Today"),
    ("/studies", "Studies"),
    ("/sites", "Sites"),
    ("/runs", "Runs"),
    ("/budget", "Budget"),
    ("/results", "Results"),
    ("/release", "Release"),
    ("/audit", "Audit"),
)
NOT_FOR_SITES = ("/studies", "/audit")
ROUTERS = (today, studies, whatif, sites, runs, budget, results, release_pages, audit, signin, metrics)


LARGER = {"/whatif": MOST_TABLE + 1_000_000}
"""Where a table is sent; everything else is a form."""


def create(desk: Desk) -> FastAPI:
    """The console over one consortium. The caller closes the desk."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = GuardedApp(
        title="Cohortium console", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, version="1"
    )
    app.state.desk = desk
    app.state.guard = lambda inner: Guarding(
        inner, names=desk.settings.known, secure=desk.settings.secure, larger=LARGER
    )
    app.state.requests = Requests()
    app.state.observe = app.state.requests.observe  # what server/logs.Access tells of each answer
    app.state.log = None  # the process that serves it sets its log (running.py)
    app.state.pages = Pages("cohortium.server.console", product=PRODUCT, consortium=desk.consortium.name)
    sheet = report_style()

    @app.get("/static/report.css", include_in_schema=False)
    async def style() -> Response:
        return Response(sheet, media_type="text/css")

    @app.get("/healthz", include_in_schema=False)
    async def alive() -> Response:
        return Response("ok\n", media_type="text/plain")

    for module in ROUTERS:
        app.include_router(module.router)
    app.router.routes.append(static())
    _errors(app)
    return app


def render(
    request: Request, template: str, /, *, title: str, here: str, status: int = 200, command: Any = None, **facts: Any
) -> HTMLResponse:
    """A page in the shell, for the account that asks. here: the entry of the navigation it stands under."""
    session = getattr(request.state, "session", None) or session_of(request)
    account = session.account if session is not None and session.complete else None
    desk, pages = desk_of(request), request.app.state.pages
    found: HTMLResponse = pages.page(
        template,
        status=status,
        title=title,
        nav=nav(entries(account), here) if account is not None else [],
        csrf=session.csrf if session is not None else "",
        account=None if account is None else {"to": "/account", "name": account.name, "role": _told(account)},
        user=account,
        flash=_flash(request),
        command=command,
        now=desk.clock(),
        folder=str(desk.consortium.root),
        **facts,
    )
    return found


def entries(account: Account) -> tuple[tuple[str, str], ...]:
    return tuple(entry for entry in NAV if account.role != SITE or entry[0] not in NOT_FOR_SITES)


FLASHES: Mapping[str, str] = {
    "stopped": "The run stops after the release under way.",
    "resumed": "The run goes on. Nothing is paid twice.",
    "revoked": "The site is shut out; a run under way goes on without it if enough sites stay.",
    "proposed": "Proposed. Each site's officer approves it at the hospital.",
    "released": "The release's folder is written and signed.",
    "password": "The new password holds. Other sessions have ended.",
    "started": "It was started.",
    "granted": "The member may fetch the rows of this run.",
    "verifying": "It is being verified from nothing; the page says when it is done.",
    "saved": "The draft is saved. Nothing was proposed.",
    "removed": "It is removed.",
    "signature": "The site's signature is in the folder.",
    "account-closed": "The account is closed and signed out everywhere.",
    "account-factor": "The second factor is reset. The next sign-in sets up a new one.",
}
"""What a page says after an action that led to it: named in the address, so that nobody can put words there."""


def _flash(request: Request) -> dict[str, str] | None:
    text = FLASHES.get(request.query_params.get("did", ""))
    return None if text is None else {"kind": "good", "text": text}


def _told(account: Account) -> str:
    return f"member of {account.site}" if account.role == SITE else account.role


# ---- errors -------------------------------------------------------------------------------------------------


_STATUS = {"SIGN-IN-WAIT": 429}


def _errors(app: FastAPI) -> None:
    def page(request: Request, facts: dict[str, Any], status: int) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(facts, status_code=status)
        if "hx-request" in request.headers:
            text = request.app.state.pages.text("failure.html.j2", error=facts)
            return HTMLResponse(text, status_code=status)
        return render(request, "error.html.j2", title="This did not work", here="", status=status, error=facts)

    async def sign_in(request: Request, error: Exception) -> Response:
        return to_sign_in(request)

    async def refused(request: Request, error: Exception) -> Response:
        facts = failure("WEB-ROLE", "your account may not do or see this", "ask a coordinator of the consortium")
        return page(request, facts, 403)

    async def bug(request: Request, error: Exception) -> Response:
        log: ConsoleLog | None = request.app.state.log
        where = {"method": request.method, "route": route_of(request.scope), "account": account_of(request.scope)}
        told = "" if log is None else f" under {log.bug(error, **where)}"
        facts = failure("INTERNAL", "this is our bug, not yours", f"the console's log has the details{told}")
        return page(request, facts, 500)

    answer_failures(app, page, own=_STATUS)
    app.add_exception_handler(NotSignedIn, sign_in)
    app.add_exception_handler(NotAllowed, refused)
    app.add_exception_handler(Exception, bug)

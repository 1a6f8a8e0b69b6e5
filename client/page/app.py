"""The page's application: what stands before it, its door, its pages, and how every error looks."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Query, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from cohortium.client.page import routes_asked, routes_left, routes_site
from cohortium.client.page.room import (
    PRODUCT,
    Outside,
    Room,
    cookie_name,
    render,
    room_of,
    user_of_request,
)
from cohortium.common.web.failures import answer_failures, failure
from cohortium.common.web.guarding import GuardedApp, Guarding
from cohortium.common.web.pages import Pages, report_style, static

NAMES = ("127.0.0.1", "localhost")
ENTER = "0; url=/"
"""The answer to the link goes on by itself: a strict cookie is not sent along a redirect that began outside."""


def create(room: Room, *, port: int = 0) -> FastAPI:
    """The page over one site. The caller closes the room. port: where it is served; 0: not known yet."""
    app = GuardedApp(title="Cohortium at this hospital", docs_url=None, redoc_url=None, openapi_url=None, version="1")
    app.state.room, app.state.port, app.state.touched = room, port, time.monotonic()
    app.state.pages = Pages("cohortium.client.page", product=PRODUCT)
    sheet = report_style()

    @app.get("/static/report.css", include_in_schema=False)
    async def style() -> Response:
        return Response(sheet, media_type="text/css")

    @app.get("/open", include_in_schema=False)
    def enter(request: Request, key: str = Query(max_length=200)) -> Response:
        cookie = room_of(request).door.enter(key, user_of_request(request))
        answer = render(request, "entered.html.j2", title="Opened", here="")
        answer.set_cookie(cookie_name(request), cookie, httponly=True, samesite="strict", path="/")
        answer.headers["Refresh"] = ENTER
        return answer

    for module in (routes_left, routes_asked, routes_site):
        app.include_router(module.router)
    app.router.routes.append(static())
    _errors(app)
    app.state.guard = lambda inner: Guarding(inner, names=NAMES, secure=False)
    return app


# ---- errors -------------------------------------------------------------------------------------------------

_OUTSIDE = (
    "PAGE-CLOSED",
    "this browser did not open the page",
    "use the link that the terminal printed; it is good once",
)
_STATUS = {"PAGE-KEY": 403, "PAGE-KEY-USED": 403, "PAGE-SIGHT": 403}


def _errors(app: FastAPI) -> None:
    def page(request: Request, facts: dict[str, Any], status: int) -> Response:
        if "text/html" not in request.headers.get("accept", "") and "hx-request" not in request.headers:
            return JSONResponse(facts, status_code=status)
        if "hx-request" in request.headers:
            # htmx puts only good answers in their place; this one is meant to be seen there.
            return HTMLResponse(request.app.state.pages.text("failure.html.j2", error=facts), status_code=200)
        return render(request, "error.html.j2", title="This did not work", here="", status=status, error=facts)

    async def outside(request: Request, error: Exception) -> Response:
        if "hx-request" in request.headers:
            return Response("PAGE-CLOSED\n", status_code=401, media_type="text/plain")
        return page(request, failure(*_OUTSIDE), 401)

    async def closed(request: Request, error: Exception) -> Response:
        return page(request, failure("FILE", "a file of the site cannot be read", "cohortium site check"), 409)

    async def bug(request: Request, error: Exception) -> Response:
        facts = failure("INTERNAL", f"this is our bug, not yours: {type(error).__name__}", "do it in the terminal")
        return page(request, facts, 500)

    answer_failures(app, page, own=_STATUS)
    app.add_exception_handler(Outside, outside)
    app.add_exception_handler(OSError, closed)
    app.add_exception_handler(Exception, bug)

"""Who asks, and whether they may: a dependency of every route. A test walks over all routes and finds each guarded.

read     Depends(may(*READERS))      signed in with both factors, in one of the roles
change   Depends(may(COORDINATOR))   and, for anything but GET, the form's token beside the cookie
public   PUBLIC                      the few paths that anybody may have
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, Form, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from cohortium.common.errors import Refused
from cohortium.common.web.failures import WrongToken
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE, Account, Session
from cohortium.server.console.desk import Desk

READERS = (COORDINATOR, AUDITOR, SITE)
EVERYTHING = (COORDINATOR, AUDITOR)
PUBLIC = (
    *("/sign-in", "/sign-in/code", "/sign-in/enrol", "/sign-in/password", "/sign-in/oidc", "/sign-in/oidc/back"),
    *("/static", "/static/report.css", "/healthz"),
)
TOKEN = ("/metrics",)
"""Paths that want a bearer token of their own: a monitoring system signs in nowhere. Without it they answer 401."""
COOKIE = "cohortium-session"
LONGEST_PATH = 2000
_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]*")
"""A path of this server: ASCII without spaces and backslashes, and never two slashes first, which name another host."""


class NotSignedIn(Exception):
    """The answer is the sign-in page, or 401 for a program."""


class NotAllowed(Exception):
    """Signed in, but not in a role that may; or something that this account does not see."""


def desk_of(request: Request) -> Desk:
    found: Desk = request.app.state.desk
    return found


def cookie_name(desk: Desk, name: str = COOKIE) -> str:
    """With the prefix that binds the cookie to this host and to TLS, where there is TLS."""
    return f"__Host-{name}" if desk.settings.secure else name


def session_of(request: Request) -> Session | None:
    """The request's session, whether complete or not. What a page asks for by itself does not keep it awake."""
    desk = desk_of(request)
    token = request.cookies.get(cookie_name(desk), "")
    own = "hx-request" in request.headers or "text/event-stream" in request.headers.get("accept", "")
    found = desk.accounts.session(token, awake=not (own and request.method == "GET")) if token else None
    desk.accounts.expire(force=bool(token) and found is None)
    desk.accounts.pass_on(desk.journal.note)
    return found


def may(*roles: str) -> Callable[..., Any]:
    """A dependency: the account that asks. Also checks the token of every request that changes something."""

    async def allowed(request: Request) -> Account:
        session = await run_in_threadpool(session_of, request)
        if session is None or not session.complete:
            raise NotSignedIn
        if request.method not in ("GET", "HEAD"):
            await check_token(request, session)
        if session.account.role not in roles:
            raise NotAllowed
        request.state.session = session
        return session.account

    allowed.roles = roles  # type: ignore[attr-defined]
    return allowed


async def check_token(request: Request, session: Session) -> None:
    """The token comes in a header (htmx) or as a field of the form."""
    given = request.headers.get("x-csrf-token", "")
    if not given:
        form = await request.form()
        value = form.get("csrf", "")
        given = value if isinstance(value, str) else ""
    if not secrets.compare_digest(given.encode(), session.csrf.encode()):
        raise WrongToken


def see_run(desk: Desk, account: Account, run: str) -> Any:
    """The run's row; Refused RUN-UNKNOWN where there is none or the account does not see it: both look alike."""
    row = desk.register.run_row(run)
    if not desk.sees_run(account, run):
        raise Refused("RUN-UNKNOWN", "there is no such run")
    return row


def confirmed(form: Any) -> str:
    """The reason of a confirmed action; Refused ACTION-CONFIRM. The journal checks the reason itself."""
    if form.get("confirm") != "yes":
        raise Refused("ACTION-CONFIRM", "the action was not confirmed", hint="tick “I mean this”")
    return str(form.get("reason", ""))


def _why(confirm: Annotated[str, Form(max_length=20)] = "", reason: Annotated[str, Form(max_length=2000)] = "") -> str:
    return confirmed({"confirm": confirm, "reason": reason})


Why = Annotated[str, Depends(_why)]
"""The reason of a confirmed action. A route that reads its form as a whole asks `confirmed` itself."""


def local_path(text: str) -> str:
    """Where to go after signing in: a path of this server and nothing else (no open redirect)."""
    return text if len(text) <= LONGEST_PATH and _PATH.fullmatch(text) else "/"


def to_sign_in(request: Request) -> Response:
    """303 to the sign-in page for people; 401 where a part of a page, a stream or JSON was asked for."""
    wants_page = "text/html" in request.headers.get("accept", "") and "hx-request" not in request.headers
    if request.method != "GET" or not wants_page:
        headers = {"HX-Redirect": "/sign-in"} if "hx-request" in request.headers else {}
        return Response("SIGN-IN: sign in first\n", status_code=401, headers=headers, media_type="text/plain")
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/sign-in?next={quote(back, safe='')}", status_code=303)

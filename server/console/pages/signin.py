"""Signing in and out: password, then second factor; or the house's identity provider. Each step is its own session.

/sign-in            name and password; before there is a session, the form's token is bound to a cookie
/sign-in/enrol      a local account's first second factor;  /sign-in/code  the code of it
/sign-in/password   one's own password in place of one that somebody else has set
/sign-in/oidc       to the provider;  /sign-in/oidc/back  from there
"""

from __future__ import annotations

import secrets
import threading
from typing import Annotated, Any
from urllib.parse import quote

import pyotp
import segno
from fastapi import APIRouter, Depends, Form, Query, Request
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.common.web.failures import WrongToken
from cohortium.server.console.access import (
    READERS,
    NotSignedIn,
    cookie_name,
    desk_of,
    local_path,
    may,
    session_of,
)
from cohortium.server.console.accounts import BROWSER_S, Account, Session
from cohortium.server.console.desk import Desk
from cohortium.server.console.oidc import BACK_WITHIN_S, Asked, Provider
from cohortium.server.console.pages import account as account_pages
from cohortium.server.console.sealing import form_token, same, seal, unseal
from cohortium.server.console.tries import place

router = APIRouter()
router.include_router(account_pages.router)

FORM, OIDC, BROWSER = "cohortium-form", "cohortium-oidc", "cohortium-browser"
FORM_S = 3600
_making = threading.Lock()

Text = Annotated[str, Form(max_length=1000)]
Token = Annotated[str, Form(max_length=200)]
Next = Annotated[str, Query(max_length=2000, alias="next")]
NextField = Annotated[str, Form(max_length=2000, alias="next")]


# ---- name and password --------------------------------------------------------------------------------------


@router.get("/sign-in", include_in_schema=False)
def sign_in(request: Request, to: Next = "/") -> Response:
    session = session_of(request)
    if request.headers.get("sec-fetch-site") == "cross-site":
        # The session's cookie does not come with a link from elsewhere: ask again, now from a page of our own.
        return go_on(request, f"/sign-in?next={quote(local_path(to), safe='')}")
    if session is not None and session.complete:
        return RedirectResponse(local_path(to), status_code=303)
    return _form(request, to=to)


@router.post("/sign-in")
def password(request: Request, name: Text = "", password: Text = "", csrf: Token = "", to: NextField = "/") -> Response:
    desk, name = desk_of(request), name.strip().lower()
    cookie = request.cookies.get(cookie_name(desk, FORM), "")
    if unseal(FORM, cookie, FORM_S, at=desk.clock()) is None or not same(form_token(cookie), csrf):
        raise WrongToken
    try:
        found = desk.accounts.check_password(name, password, address=address(request), browser=_browser(request))
    except Refused as error:
        return _form(request, to=to, status=429, error=error)
    if found is None:
        failed(request, name, "password")
        wrong = Refused("SIGN-IN", "name and password do not fit", hint="look at both and try again")
        return _form(request, to=to, status=401, error=wrong)
    old = request.cookies.get(cookie_name(desk), "")
    token = desk.accounts.begin(found.name, complete=False, address=address(request), instead_of=old)
    answer = RedirectResponse(_step(found, factor=False, to=to), status_code=303)
    set_session(desk, answer, token)
    return answer


# ---- the second factor --------------------------------------------------------------------------------------


@router.get("/sign-in/code", include_in_schema=False)
def ask_code(request: Request, to: Next = "/") -> Response:
    session, elsewhere = _half_way(request, "/sign-in/code", to)
    return elsewhere or _page(request, "sign_code.html.j2", "Your code", session, to)


@router.post("/sign-in/code")
def code(request: Request, code: Text = "", csrf: Token = "", to: NextField = "/") -> Response:
    desk = desk_of(request)
    session, elsewhere = _half_way(request, "/sign-in/code", to, csrf=csrf)
    if elsewhere is not None:
        return elsewhere
    name = session.account.name
    try:
        right = desk.accounts.check_code(name, code, address=address(request), browser=_browser(request))
    except Refused as error:
        return _page(request, "sign_code.html.j2", "Your code", session, to, status=429, error=error)
    if not right:
        failed(request, name, "code")
        wrong = Refused(
            "SIGN-IN-CODE",
            "this code is not the one of now",
            hint="wait for the next one; if that does not help, compare your device's clock",
        )
        return _page(request, "sign_code.html.j2", "Your code", session, to, status=401, error=wrong)
    return _shown(request, session, to)


@router.get("/sign-in/enrol", include_in_schema=False)
def ask_enrolment(request: Request, to: Next = "/") -> Response:
    session, elsewhere = _half_way(request, "/sign-in/enrol", to)
    return elsewhere or _enrolment(request, session, to)


@router.post("/sign-in/enrol")
def enrol(request: Request, code: Text = "", csrf: Token = "", to: NextField = "/") -> Response:
    desk = desk_of(request)
    session, elsewhere = _half_way(request, "/sign-in/enrol", to, csrf=csrf)
    if elsewhere is not None:
        return elsewhere
    secret = desk.accounts.pending_totp(_token(request))
    if not secret or not desk.accounts.enrol_totp(session.account.name, secret, code):
        wrong = Refused("SIGN-IN-CODE", "this code is not the one of now", hint="type the next one that the app shows")
        return _enrolment(request, session, to, status=401, error=wrong)
    desk.journal.note("second-factor", by=session.account.name, address=place(address(request)))
    return _shown(request, session, to)


@router.get("/sign-in/password", include_in_schema=False)
def ask_password(request: Request, to: Next = "/") -> Response:
    session, elsewhere = _half_way(request, "/sign-in/password", to)
    return elsewhere or _page(request, "sign_password.html.j2", "Your own password", session, to)


@router.post("/sign-in/password")
def own_password(request: Request, new: Text = "", again: Text = "", csrf: Token = "", to: NextField = "/") -> Response:
    desk = desk_of(request)
    session, elsewhere = _half_way(request, "/sign-in/password", to, csrf=csrf)
    if elsewhere is not None:
        return elsewhere
    try:
        account_pages.set_own_password(desk, session.account.name, new, again)
    except UsageError as error:
        return _page(request, "sign_password.html.j2", "Your own password", session, to, status=422, error=error)
    return _signed_in(request, session.account.name, to, how="password and code")


# ---- the house's identity provider --------------------------------------------------------------------------


@router.get("/sign-in/oidc", include_in_schema=False)
def to_provider(request: Request, to: Next = "/") -> Response:
    desk, provider = desk_of(request), _provider(request)
    asked = provider.begin(_back(desk))
    kept = {"state": asked.state, "nonce": asked.nonce, "verifier": asked.verifier, "to": local_path(to)}
    answer = RedirectResponse(asked.address, status_code=303)
    # Lax: it has to come along when the provider sends the browser back. It opens nothing by itself.
    _set(desk, answer, OIDC, seal(OIDC, kept, at=desk.clock()), max_age=BACK_WITHIN_S, same_site="lax")
    return answer


@router.get("/sign-in/oidc/back", include_in_schema=False)
def from_provider(request: Request) -> Response:
    desk, provider = desk_of(request), _provider(request)
    kept = unseal(OIDC, request.cookies.get(cookie_name(desk, OIDC), ""), BACK_WITHIN_S, at=desk.clock())
    try:
        if kept is None:
            raise Refused(
                "OIDC-STATE",
                "this answer does not belong to a sign-in that was begun in this browser",
                hint="begin again at the sign-in page",
            )
        counted = desk.accounts.tries.reserve(("from", place(address(request))))
        asked = Asked(address="", state=kept["state"], nonce=kept["nonce"], verifier=kept["verifier"])
        person = provider.finish(asked, dict(request.query_params), _back(desk))
        assert desk.settings.oidc is not None
        issuer = desk.settings.oidc.issuer
        if not person.role:
            known = desk.accounts.of_subject(issuer, person.subject)
            if known is not None:
                desk.accounts.end_all(known.name)
            raise Refused(
                "OIDC-ROLE",
                "your organisation's account has no role in this consortium, or belongs to several sites",
                hint="ask your organisation for the group that the consortium's coordinator named",
            )
        found = desk.accounts.admit(
            issuer=issuer, subject=person.subject, wish=person.wish, role=person.role, site=person.site
        )
    except CohortiumError as error:
        if error.code != "SIGN-IN-WAIT":
            failed(request, "", "provider", code=error.code)
        raise
    desk.accounts.tries.forgive(counted)
    return _signed_in(request, found.name, kept["to"], how="identity provider", cross_site=True)


# ---- out ----------------------------------------------------------------------------------------------------


@router.post("/sign-out")
def sign_out(request: Request, who: Annotated[Account, Depends(may(*READERS))]) -> Response:
    desk = desk_of(request)
    desk.accounts.end(_token(request))
    desk.journal.note("sign-out", by=who.name)
    answer = RedirectResponse("/sign-in", status_code=303)
    answer.delete_cookie(cookie_name(desk), path="/", secure=desk.settings.secure, httponly=True, samesite="strict")
    return answer


# ---- what the steps have in common --------------------------------------------------------------------------


def address(request: Request) -> str:
    return request.client.host[:64] if request.client is not None else ""


def failed(request: Request, name: str, step: str, **facts: str) -> None:
    """A failure for the journal. A name that nobody has is not written down: people type passwords there."""
    desk = desk_of(request)
    known = name if desk.accounts.account(name) is not None else ""
    desk.journal.note("sign-in-failed", by=known, step=step, address=place(address(request)), **facts)


def set_session(desk: Desk, answer: Response, token: str) -> None:
    """No Max-Age: it goes with the browser's window, and before that when the session is over."""
    _set(desk, answer, "", token, max_age=None)


def go_on(request: Request, to: str) -> Response:
    """A page that goes on by itself, as a request of our own site: only then do browsers send a Strict cookie."""
    from cohortium.server.console.app import render

    answer = render(request, "sign_on.html.j2", title="Signing in", here="", to=local_path(to))
    answer.headers["Refresh"] = f"0; url={local_path(to)}"
    return answer


def _set(
    desk: Desk, answer: Response, name: str, value: str, *, max_age: int | None, same_site: Any = "strict"
) -> None:
    called = cookie_name(desk, name) if name else cookie_name(desk)
    answer.set_cookie(
        called, value, max_age=max_age, path="/", secure=desk.settings.secure, httponly=True, samesite=same_site
    )


def _token(request: Request) -> str:
    return request.cookies.get(cookie_name(desk_of(request)), "")


def _browser(request: Request) -> str:
    return request.cookies.get(cookie_name(desk_of(request), BROWSER), "")


def _step(account: Account, *, factor: bool, to: str) -> str:
    """The page that comes next."""
    if not factor:
        page = "/sign-in/code" if account.has_totp else "/sign-in/enrol"
    else:
        page = "/sign-in/password"
    return f"{page}?next={quote(local_path(to), safe='')}"


def _half_way(request: Request, here: str, to: str, *, csrf: str | None = None) -> tuple[Session, Response | None]:
    """The session of a sign-in under way, and where to go if this is not the page of its step.

    Raises NotSignedIn without one; WrongToken where a form came (csrf) without its session's token.
    """
    session = session_of(request)
    if session is None:
        raise NotSignedIn
    if csrf is not None and not same(session.csrf, csrf):
        raise WrongToken
    if session.complete:
        return session, RedirectResponse(local_path(to), status_code=303)
    due = _step(session.account, factor=session.factor, to=to)
    return session, None if due.partition("?")[0] == here else RedirectResponse(due, status_code=303)


def _shown(request: Request, session: Session, to: str) -> Response:
    """The second factor was shown: on to one's own password, or in."""
    desk, name = desk_of(request), session.account.name
    if not session.account.must_change:
        return _signed_in(request, name, to, how="password and code")
    token = desk.accounts.begin(name, complete=False, factor=True, address=address(request), instead_of=_token(request))
    answer = RedirectResponse(_step(session.account, factor=True, to=to), status_code=303)
    set_session(desk, answer, token)
    return answer


def _signed_in(request: Request, name: str, to: str, *, how: str, cross_site: bool = False) -> Response:
    """In: a new session, whatever the browser brought; its old one ends."""
    desk = desk_of(request)
    where = address(request)
    token = desk.accounts.begin(name, complete=True, address=where, instead_of=_token(request))
    desk.journal.note("sign-in", by=name, how=how, address=place(where))
    answer = go_on(request, to) if cross_site else RedirectResponse(local_path(to), status_code=303)
    set_session(desk, answer, token)
    _set(desk, answer, BROWSER, desk.accounts.remember(name), max_age=BROWSER_S)
    for left in (FORM, OIDC):
        answer.delete_cookie(cookie_name(desk, left), path="/", secure=desk.settings.secure, httponly=True)
    return answer


def _form(request: Request, *, to: str, status: int = 200, error: CohortiumError | None = None) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    cookie = request.cookies.get(cookie_name(desk, FORM), "")
    if unseal(FORM, cookie, FORM_S // 2, at=desk.clock()) is None:
        cookie = seal(FORM, {"form": secrets.token_urlsafe(16)}, at=desk.clock())
    answer = render(
        request,
        "sign_in.html.j2",
        title="Sign in",
        here="",
        status=status,
        to=local_path(to),
        form_token=form_token(cookie),
        error=None if error is None else error.as_json(),
        oidc=desk.settings.oidc,
        nobody=not desk.accounts.accounts(),
    )
    _set(desk, answer, FORM, cookie, max_age=FORM_S)
    return answer


def _enrolment(request: Request, session: Session, to: str, **more: Any) -> Response:
    desk = desk_of(request)
    secret = desk.accounts.pending_totp(_token(request))
    told = pyotp.TOTP(secret).provisioning_uri(
        name=session.account.name, issuer_name=f"Cohortium {desk.consortium.name}"
    )
    drawn = segno.make(told, error="m").svg_inline(
        omitsize=True, dark="black", light="white", border=4, svgclass="qr", lineclass=None, title="QR code of the key"
    )
    picture = Markup(drawn.replace("<svg ", '<svg role="img" ', 1))
    grouped = " ".join(secret[start : start + 4] for start in range(0, len(secret), 4))
    return _page(
        request, "sign_enrol.html.j2", "Your second factor", session, to, picture=picture, secret=grouped, **more
    )


def _page(
    request: Request,
    template: str,
    title: str,
    session: Session,
    to: str,
    *,
    error: CohortiumError | None = None,
    **facts: Any,
) -> Response:
    from cohortium.server.console.app import render

    told = None if error is None else error.as_json()
    return render(
        request, template, title=title, here="", name=session.account.name, to=local_path(to), error=told, **facts
    )


def _back(desk: Desk) -> str:
    return f"{desk.settings.address}/sign-in/oidc/back"


def _provider(request: Request) -> Provider:
    desk, state = desk_of(request), request.app.state
    if desk.settings.oidc is None:
        raise HTTPException(404)
    with _making:
        if not hasattr(state, "provider"):
            state.provider = Provider(desk.settings.oidc, clock=desk.clock)
    found: Provider = state.provider
    return found

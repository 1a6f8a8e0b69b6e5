"""What stands before every page: whose name the browser used, where a form came from, how much it may send.

One ASGI middleware for both web applications. It answers wrong requests itself and puts the same headers on every
answer, error pages and files included:

    Host          only the names that this server has (a foreign name that resolves here is DNS rebinding)
    Origin        a request that changes something must come from a page of this server (OWASP CSRF, "verify origin");
                  the token of each form is checked beside it, by the application
    size          no body longer than the limit, whatever its headers say
    headers       a Content-Security-Policy that allows this server's own files and no inline script or style
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 2_000_000
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)
"""For a report, which is one file with its style inside: no script, no request, an origin of its own."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Frame-Options": "DENY",
}
LASTING = "max-age=31536000"
STATIC = "/static/"
TOO_LONG = "the request is too long"


class Guarding:
    """names: host names, without port, by which browsers reach this server. secure: it is reached over TLS.

    larger: path -> how long a body may be there, where a file is sent. An answer that sets Content-Security-Policy or
    Cache-Control itself keeps its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Iterable[str],
        secure: bool,
        most_bytes: int = MOST_BYTES,
        larger: Mapping[str, int] | None = None,
    ) -> None:
        self._app, self._secure, self._most, self._larger = app, secure, most_bytes, dict(larger or {})
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        sender = self._with_headers(scope, send)
        refusal = self._refusal(scope)
        if refusal is not None:
            status, text = refusal
            await PlainTextResponse(text + "\n", status_code=status)(scope, receive, sender)
            return
        await self._app(scope, _Limited(receive, self._limit(scope)), sender)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(host) not in self._names or headers.getlist("host") != [host]:
            return 421, "This server is not called that."
        if scope["method"] not in SAFE and not self._own(headers, host):
            return 403, "WEB-ORIGIN: this request was not made by a page of this server."
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or int(declared) > self._limit(scope):
            return 413, TOO_LONG
        return None

    def _limit(self, scope: Scope) -> int:
        return self._larger.get(scope["path"], self._most)

    def _own(self, headers: Headers, host: str) -> bool:
        """Whether a changing request comes from here. Browsers send Origin with each; a program may send none."""
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        if origin is None:
            return True
        scheme = "https" if self._secure else "http"
        return origin.lower() == f"{scheme}://{host.lower()}"

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        static = scope["path"].startswith(STATIC)

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", POLICY)
                headers.setdefault("Cache-Control", "max-age=3600" if static else "no-store")
                if self._secure:
                    headers["Strict-Transport-Security"] = LASTING
            await send(message)

        return sender


class GuardedApp(FastAPI):
    """FastAPI with its guard outside everything, so that the page of an unforeseen error has the headers too.

    state.guard: what makes the guard, before the first request.
    """

    def build_middleware_stack(self) -> ASGIApp:
        guard: Callable[[ASGIApp], ASGIApp] = self.state.guard
        return guard(super().build_middleware_stack())


class _Limited:
    """`receive`, which ends a request that sends more than it may."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left = receive, most

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, TOO_LONG)  # the application answers it, as it answers every error
        return message


def _name(host: str) -> str:
    """The name in a Host header, without port; "" for anything odd."""
    try:
        return urlsplit("//" + host).hostname or ""
    except ValueError:
        return ""

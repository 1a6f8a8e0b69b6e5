"""The coordinator's logs: what `serve` says as coded lines, and the console's own file with accesses and errors.

CONSORTIUM/console/console.log holds JSON lines (common/logs.py), mode 0600, five files of 2 MB. An access line names
the route's template and never the address itself: what people typed, tokens and names of runs stay out of it.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cohortium.common.logs import Entry, entry
from cohortium.common.modes import make_private

FILE = "console.log"
LOG_BYTES, LOG_FILES = 2_000_000, 5
NO_ROUTE = "(none)"
QUIET = ("/static", "/static/report.css", "/healthz", "/metrics")
"""Answers that are not worth a line as long as they succeed."""
SERVED = {
    "ready": "SERVE-READY",
    "started": "SERVE-STARTED",
    "stopping": "SERVE-STOPPING",
    "restart": "SERVE-RESTART",
    "renewed": "SERVE-RENEWED",
    "console": "SERVE-CONSOLE",
    "warning": "SERVE-WARNING",
    "error": "SERVE-INTERNAL",
    "enrolled": "MEMBER-ENROLLED",
    "revoked": "MEMBER-REVOKED",
}
"""The service's word -> the code of its line."""
_RUN = re.compile(r"(?s)(?P<run>[a-z0-9][a-z0-9-]{0,62}): (?P<state>[a-z]+)\. (?P<message>.*)")
_ERROR = re.compile(r"(?s)(?P<error>[A-Z]+(?:-[A-Z]+)+): .*")
_HELD = {"stopped": "RUN-HELD", "failed": "RUN-ENDED-BADLY", "void": "RUN-ENDED-BADLY"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


# ---- serve ----------------------------------------------------------------------------------------------------


def of_serve(event: str, text: str, *, at: float | None = None) -> Entry:
    """A line of what the service says: (event, text) as its `say` gets them."""
    if event == "run" and (found := _RUN.fullmatch(text)):
        code = _HELD.get(found["state"], "RUN-CHANGED")
        return entry(code, text, at=at, run=found["run"], state=found["state"], **_error(found["message"]))
    code = SERVED.get(event, "RUN-CHANGED" if event == "run" else "SERVE-TOLD")
    member = text.split(",")[0] if event in ("enrolled", "revoked") else ""
    return entry(code, text, at=at, site=member, **_error(text))


def _error(text: str) -> dict[str, str]:
    found = _ERROR.fullmatch(text)
    return {} if found is None else {"error": found["error"]}


class Captured(logging.Handler):
    """What our own modules log, said as the service's "error": the message, without the exception's text."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            what = f" ({record.exc_info[0].__name__})" if record.exc_info and record.exc_info[0] else ""
            self._say("error", record.getMessage() + what)


@contextlib.contextmanager
def captured(say: Callable[[str, str], None], logger: str = "cohortium") -> Iterator[None]:
    """While it lasts, `say` gets what modules of ours log."""
    handler, found = Captured(say), logging.getLogger(logger)
    found.addHandler(handler)
    try:
        yield
    finally:
        found.removeHandler(handler)


# ---- the console ----------------------------------------------------------------------------------------------


class ConsoleLog:
    """An open log of the console. Any thread may write; a full disk stops the log and nothing else."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = make_private(folder) / FILE, clock
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        self._lock = threading.Lock()
        self._handler = _Private(self.path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8")

    def write(self, code: str, text: str, /, **facts: Any) -> None:
        """One line with this code (common/logs.CODES)."""
        line = entry(code, text, at=self._clock(), **facts).json()
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._handler.emit(logging.LogRecord("console", logging.INFO, "", 0, line, None, None))

    def bug(self, error: BaseException, *, method: str, route: str, account: str = "") -> str:
        """Write an error that we did not foresee down; its short id, for the page that the person sees.

        The line has the kind of error and the places in our code, never the error's own words: they may hold what
        somebody typed.
        """
        name = secrets.token_hex(4)
        where = _places(error.__traceback__)
        facts = {"id": name, "method": method, "route": route, "account": account, "where": where}
        self.write("WEB-BUG", type(error).__name__, **facts)
        return name

    def close(self) -> None:
        with self._lock:
            self._handler.close()


def _places(trace: TracebackType | None) -> str:
    """Where it broke, innermost first: files and lines, and no source text."""
    frames = [f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in traceback.walk_tb(trace)]
    return " < ".join(reversed(frames[-6:]))


class _Private(logging.handlers.RotatingFileHandler):
    """Rotated files stay closed to others, and errors stay silent."""

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:
        return


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class ServerWords(logging.Handler):
    """Warnings of the web server and of every library into the console's log, without the words of exceptions."""

    def __init__(self, log: ConsoleLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            kind, _, trace = record.exc_info or (None, None, None)
            if kind is None:
                self._log.write("WEB-SERVER", record.getMessage(), logger=record.name)
            else:
                told = f"{str(record.msg).strip()[:200]} ({kind.__name__})"
                self._log.write("WEB-SERVER", told, logger=record.name, where=_places(trace))


@contextlib.contextmanager
def server_words(log: ConsoleLog) -> Iterator[None]:
    """While it lasts, everything that is logged in this process goes to `log` and nowhere else."""
    top, handler = logging.getLogger(), ServerWords(log)
    before, top.handlers = top.handlers, [handler]
    # A library that set up a way of its own for its words, as uvicorn does by default, would keep them from us.
    others = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    ways = [(one, one.handlers, one.propagate, one.disabled) for one in others]
    for one in others:
        one.handlers, one.propagate, one.disabled = [], True, False
    try:
        yield
    finally:
        top.handlers = before
        for one, handlers, propagate, disabled in ways:
            one.handlers, one.propagate, one.disabled = handlers, propagate, disabled


Observe = Callable[[str, str, int, float], None]
"""(method, route template, status, seconds until the answer began) of a request."""


class Access:
    """ASGI middleware, the outermost of ours: a line for each request but QUIET ones, when its answer has ended.

    log: None writes nothing and still observes.
    """

    def __init__(self, app: ASGIApp, *, log: ConsoleLog | None, observe: Observe | None = None) -> None:
        self._app, self._log, self._observe = app, log, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, begun = time.perf_counter(), 500, 0.0

        async def sender(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = int(message["status"]), time.perf_counter() - started
            await send(message)

        try:
            await self._app(scope, receive, sender)
        finally:
            seconds = time.perf_counter() - started
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            route = route_of(scope)
            facts: dict[str, Any] = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            if self._log is not None and (route not in QUIET or status >= 400):
                who = account_of(scope)
                facts |= {"account": who} if who else {}
                self._log.write("WEB-ACCESS", f"{method} {route} {status}", **facts)
            if self._observe is not None:
                self._observe(method, route, status, begun or seconds)


def route_of(scope: Scope) -> str:
    """The template of the route that answered, "/runs/{run}"; "(none)" where none did."""
    found = getattr(scope.get("route"), "path", None)
    if isinstance(found, str):
        return found
    return "/static" if str(scope.get("path", "")).startswith("/static/") else NO_ROUTE


def account_of(scope: Scope) -> str:
    """The name of the account whose session the request had, once a route has looked at it."""
    session = scope.get("state", {}).get("session")
    return str(getattr(getattr(session, "account", None), "name", ""))

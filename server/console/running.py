"""The console as a process: uvicorn over the application, until it is told to stop.

It says one line of JSON on its standard output when it answers, or why it does not; everything else goes to
CONSORTIUM/console/console.log (server/logs.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from cohortium.common.errors import CohortiumError, PeerUnreachable
from cohortium.common.processes import leave_with_parent, stopping
from cohortium.common.protocol.sockets import only_one
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk
from cohortium.server.console.pages import runs
from cohortium.server.console.settings import FILE, Settings
from cohortium.server.consortium import Consortium
from cohortium.server.logs import Access, ConsoleLog, server_words

Said = Callable[[dict[str, Any]], None]


def main(root: Path) -> int:
    """The child of `cohortium serve`, or a process of its own; the exit code is that of the error."""
    os.umask(0o077)
    leave_with_parent()

    def say(facts: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()

    try:
        return run(root, say)
    except CohortiumError as error:
        say(error.as_json())
        return error.exit_code


def run(root: Path, say: Said = lambda facts: None) -> int:
    """Serve until SIGTERM or SIGINT; say({"ready": address}) when it answers.

    Refused SOCKET-BUSY where another console of this folder runs; PeerUnreachable CONSOLE-PORT where its port is taken.
    """
    # Ledgers and prices are worked out in threads beside the requests: a page gets its turn in 1 ms, not in 5.
    sys.setswitchinterval(0.001)
    consortium = Consortium(root)
    settings = Settings.load(root)
    lock = only_one(root / "console.lock")
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock)
        listening = stack.enter_context(contextlib.closing(_listen(settings)))
        desk = Desk(consortium, settings)
        stack.callback(desk.close)
        log = ConsoleLog(desk.folder)
        stack.callback(log.close)
        stack.enter_context(server_words(log))
        # uvicorn hands the signal that ended it on to us: without a handler it would kill us before the desk is closed.
        stack.enter_context(stopping(stop))
        app = create(desk)
        app.state.log = log
        desk.start()
        # Outside of everything: it sees what the guard refused, too. /metrics tells what app.state.observe counts.
        seen = Access(app, log=log, observe=app.state.observe)
        config = uvicorn.Config(
            served(seen, settings),
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.certificate_key,
            proxy_headers=False,  # `served` decides whom to believe; uvicorn's own default asks the environment
            server_header=False,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=2,
        )

        def ready() -> None:
            log.write("WEB-STARTED", f"the console answers at {settings.address}")
            say({"ready": settings.address})

        _Server(config, ready, lambda: runs.close(desk)).run(sockets=[listening])
        log.write("WEB-STOPPED", "the console has ended")
    return 0


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._ending = ready, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending()  # live pages have streams that last as long as their run: end them, and wait for the rest
        await super().shutdown(sockets)


def served(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The application, behind a proxy with the address and scheme that the proxy vouches for."""
    if not settings.behind_tls:
        return app
    forwarded = ProxyHeadersMiddleware(_OverTls(app), trusted_hosts=list(settings.proxies))  # type: ignore[arg-type]
    return _FromProxies(forwarded, settings)  # type: ignore[arg-type]


class _FromProxies:
    """Nobody comes past the proxy that ends TLS: a password would travel in the clear, under a made-up address."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        # The same reading of addresses as the middleware that believes them.
        self._known = ProxyHeadersMiddleware(app, trusted_hosts=list(settings.proxies)).trusted_hosts  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] == "http" and (client is None or client[0] not in self._known):
            told = f"Come by the proxy that ends TLS. Is this the proxy? Add it to [console] proxies in {FILE}.\n"
            await PlainTextResponse(told, status_code=403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _OverTls:
    """What the proxy got in the clear is not served: it has to say X-Forwarded-Proto: https."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["scheme"] != "https" and scope["path"] != "/healthz":
            told = "Come over https. (The proxy has to set X-Forwarded-Proto and X-Forwarded-For.)\n"
            await PlainTextResponse(told, status_code=403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _listen(settings: Settings) -> socket.socket:
    """A socket that listens, or PeerUnreachable CONSOLE-PORT."""
    host = "127.0.0.1" if settings.listen == "localhost" else settings.listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, settings.port))
        found.listen(128)
    except OSError as error:
        found.close()
        raise PeerUnreachable(
            "CONSOLE-PORT",
            f"the console cannot listen on {settings.listen}:{settings.port}: {error.strerror}",
            where=(f"{FILE}: [console] port",),
            hint=f"end what has the port, or set another one: [console] port = {settings.port + 1}",
        ) from None
    return found

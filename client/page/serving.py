"""The page as a process: uvicorn on 127.0.0.1 and nowhere else, until Ctrl-C or until nobody has looked for a while."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from cohortium.client.page.app import create
from cohortium.client.page.door import Door
from cohortium.client.page.room import Room
from cohortium.client.page.sight import open_site
from cohortium.common.errors import Refused, UsageError

HOST = "127.0.0.1"
HERE = (HOST, "localhost")
IDLE_MIN = 30
LOOK_EVERY_S = 1.0


def serve(
    root: Path,
    *,
    host: str = HOST,
    port: int = 0,
    idle_min: float = IDLE_MIN,
    browser: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Show one site's page on this machine. port 0: a free one. Refused PAGE-HOST for any address but loopback's.

    Raises UsageError SITE-MISSING, PAGE-PORT; Refused PAGE-BUSY where another page of this site is open.
    """
    if host not in HERE:
        raise Refused(
            "PAGE-HOST",
            "the page is shown on 127.0.0.1 only: it has no protection against a network",
            hint="from another machine: ssh -L 7446:127.0.0.1:7446 HOST, and --port 7446 here",
        )
    site = open_site(root)
    os.umask(0o077)  # from here on: whatever is made is this user's alone
    door = Door(say)
    room = Room.open(site, door)
    server: _Server | None = None
    try:
        app = create(room)
        config = uvicorn.Config(
            app,
            host=HOST,
            port=port,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_config=None,  # an exception's words may hold values of a table
            log_level="critical",
            timeout_graceful_shutdown=2,
        )
        server = _Server(config, idle_s=idle_min * 60, browser=browser and os.geteuid() != 0, say=say)
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    except SystemExit:
        raise UsageError(
            "PAGE-PORT", f"port {port} cannot be used", hint="another --port, or none for a free one"
        ) from None
    finally:
        if server is not None:
            server.forget_link()
        room.close()


class _Server(uvicorn.Server):
    """Says the link once the port is known, and ends by itself."""

    def __init__(self, config: uvicorn.Config, *, idle_s: float, browser: bool, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._idle_s, self._browser, self._say = idle_s, browser, say
        self._link: Path | None = None
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.should_exit or not self.servers:
            return
        app: Any = self.config.app
        port = int(self.servers[0].sockets[0].getsockname()[1])
        app.state.port = port
        link = f"http://{HOST}:{port}/open?key={app.state.room.door.key}"
        self._say("This hospital's page is on this machine only. The link is good once, in one browser:")
        self._say(f"  {link}")
        self._say(f"It ends with Ctrl-C, or after {self._idle_s / 60:g} minutes in which nobody looks.")
        self._watch = asyncio.create_task(self._end_when_idle(app))
        if self._browser:
            # The browser's command line is seen by every user of the machine: it gets a file's name and not the key.
            self._link = _link_file(link)
            await asyncio.to_thread(_open, self._link)

    async def _end_when_idle(self, app: Any) -> None:
        while not self.should_exit:
            await asyncio.sleep(LOOK_EVERY_S)
            busy = app.state.room.checking.running or app.state.room.reporting.running
            if not busy and time.monotonic() - app.state.touched > self._idle_s:
                self._say("Nobody has looked for a while: the page is closed.")
                self.should_exit = True

    def forget_link(self) -> None:
        if self._link is not None:
            self._link.unlink(missing_ok=True)


def _link_file(link: str) -> Path:
    """A page that leads to the link, readable by this user only."""
    handle, name = tempfile.mkstemp(prefix="cohortium-page-", suffix=".html")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(
            f'<!doctype html><meta http-equiv="refresh" content="0;url={link}"><p><a href="{link}">Open</a></p>\n'
        )
    return Path(name)


def _open(path: Path) -> None:
    with contextlib.suppress(Exception):
        webbrowser.open(path.as_uri())

"""Live pages: one watcher for each run that somebody looks at, and a stream of server-sent events for each viewer.

    watcher (a thread)   looks at most once a second at what a run's pages are made of, renders what changed, tells all
    stream               event "part" {id, html}; "end" when the run has ended; a comment each 15 s; ends with the
                         session, with the server, and when the viewer goes

A watcher ends with its last viewer. What it renders is the same for every viewer: nothing in it depends on an account.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

POLL_S = 1.0
BEAT_S = 15.0
CHECK_S = 60.0
MOST_STREAMS = 20
"""Open streams of one account; a browser closes those of pages that nobody looks at."""

Look = Callable[[], Any]
"""What the parts are made of, cheaply: as long as two looks are equal, nothing is rendered."""
Render = Callable[[], tuple[Mapping[str, str], bool]]
"""({id: html}, whether the run has ended)."""
Fit = Callable[[str, str], str | None]
"""(part, html) as this viewer's page wants it; None where the page has no such part."""


class TooManyStreams(Exception):
    """The account has as many as it may have."""


@dataclass(eq=False, kw_only=True)
class Viewer:
    """One stream. News wait in `news` by the part's id: a viewer that reads slowly gets the newest of each."""

    loop: asyncio.AbstractEventLoop
    account: str
    news: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, parts: Mapping[str, str], *, ended: bool) -> None:
        with self.lock:
            self.news.update(parts)
            self.ended = ended
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def take(self) -> tuple[dict[str, str], bool]:
        with self.lock:
            news, self.news = self.news, {}
            return news, self.ended

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and the stream with it
            self.loop.call_soon_threadsafe(self.woken.set)


class Watcher:
    """Looks at one run for all who watch it."""

    def __init__(self, name: str, look: Look, render: Render, *, poll_s: float) -> None:
        self._look, self._render, self._poll_s = look, render, poll_s
        self._viewers: set[Viewer] = set()
        self._parts: dict[str, str] = {}
        self._ended = False
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.rendered = 0
        self._thread = threading.Thread(target=self._watch, name=f"watch {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, viewer: Viewer) -> None:
        """A new viewer gets every part as it is now."""
        with self._lock:
            self._viewers.add(viewer)
            parts, ended = dict(self._parts), self._ended
        if parts:
            viewer.tell(parts, ended=ended)

    def remove(self, viewer: Viewer) -> int:
        """How many viewers are left."""
        with self._lock:
            self._viewers.discard(viewer)
            return len(self._viewers)

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            viewers = list(self._viewers)
        for viewer in viewers:
            viewer.close()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _watch(self) -> None:
        before: Any = None
        while not self._stop.is_set():
            try:
                now = self._look()
                if now != before:
                    self._tell(*self._render())
                    before = now
            except Exception:
                # A file that is being replaced, a register that is busy: the next look sees it. A page that lags is
                # better than a watcher that died while its page still says "live".
                before = None
            self._stop.wait(self._poll_s)

    def _tell(self, parts: Mapping[str, str], ended: bool) -> None:
        self.rendered += 1
        with self._lock:
            new = {name: html for name, html in parts.items() if self._parts.get(name) != html}
            self._parts, changed = dict(parts), ended != self._ended
            self._ended = ended
            viewers = list(self._viewers) if new or changed else []
        for viewer in viewers:
            viewer.tell(new, ended=ended)


class Live:
    """All watchers of one application."""

    def __init__(
        self, *, poll_s: float = POLL_S, beat_s: float = BEAT_S, check_s: float = CHECK_S, most: int = MOST_STREAMS
    ) -> None:
        self.poll_s, self.beat_s, self.check_s, self.most = poll_s, beat_s, check_s, most
        self._watchers: dict[str, Watcher] = {}
        self._streams: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def watchers(self) -> Mapping[str, Watcher]:
        with self._lock:
            return dict(self._watchers)

    def streams(self) -> int:
        """How many are open now."""
        with self._lock:
            return sum(self._streams.values())

    def join(self, name: str, account: str, look: Look, render: Render) -> tuple[Watcher, Viewer]:
        """Begin to watch; call it on the event loop. Raises TooManyStreams."""
        viewer = Viewer(loop=asyncio.get_running_loop(), account=account)
        with self._lock:
            if self._closed or self._streams.get(account, 0) >= self.most:
                raise TooManyStreams
            self._streams[account] = self._streams.get(account, 0) + 1
            watcher = self._watchers.get(name)
            fresh = watcher is None
            if watcher is None:
                watcher = self._watchers[name] = Watcher(name, look, render, poll_s=self.poll_s)
            watcher.add(viewer)
        if fresh:
            watcher.start()
        return watcher, viewer

    def leave(self, name: str, watcher: Watcher, viewer: Viewer) -> None:
        with self._lock:
            left = self._streams.get(viewer.account, 1) - 1
            self._streams[viewer.account] = left
            if left <= 0:
                del self._streams[viewer.account]
            if watcher.remove(viewer) == 0:
                watcher.close()
                if self._watchers.get(name) is watcher:
                    del self._watchers[name]

    def close(self) -> None:
        """End every stream and every thread. The server calls it before it waits for its connections."""
        with self._lock:
            self._closed = True
            watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.close()

    async def events(self, viewer: Viewer, *, fit: Fit, lasts: Callable[[], bool]) -> AsyncIterator[str]:
        """The events of one viewer, until it ends. lasts: whether the viewer's session still does."""
        clock = asyncio.get_running_loop().time
        checked = clock()
        yield "retry: 5000\n\n"
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(viewer.woken.wait(), timeout=min(self.beat_s, self.check_s))
            woken = viewer.woken.is_set()
            viewer.woken.clear()
            if viewer.closed:
                return
            if clock() - checked >= self.check_s:
                checked = clock()
                if not await asyncio.to_thread(lasts):
                    return
            news, ended = viewer.take()
            for part, told in news.items():
                html = fit(part, told)
                if html is not None:
                    yield event("part", json.dumps({"id": part, "html": html}))
            if ended:
                yield event("end", "{}")
                return
            if not woken:
                yield ": still here\n\n"


class EventStream(StreamingResponse):
    """The answer that a browser's EventSource reads. left: called once when it ends, however it ends."""

    def __init__(self, content: AsyncIterator[str], *, left: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def event(name: str, data: str) -> str:
    """One server-sent event; data is one line, as JSON is."""
    return f"event: {name}\ndata: {data}\n\n"

"""Live pages: one watcher for all viewers, parts only when they changed, and an end with session, run and server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from console_worlds import desk_over, signed_in
from run_worlds import answered, of_state, world

from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk
from cohortium.server.console.live import Live, TooManyStreams, Viewer, Watcher
from cohortium.server.console.pages import runs as pages
from cohortium.server.console.prices import Price, Prices

FAST: dict[str, float] = {"poll_s": 0.01, "beat_s": 5.0, "check_s": 5.0}


class Source:
    """What a watcher looks at, by hand."""

    def __init__(self) -> None:
        self.parts, self.ended, self.looks, self.broken = {"a": "1", "b": "1"}, False, 0, 0

    def look(self) -> Any:
        self.looks += 1
        if self.broken:
            self.broken -= 1
            raise OSError("a file that is being replaced")
        return dict(self.parts), self.ended

    def render(self) -> tuple[dict[str, str], bool]:
        return dict(self.parts), self.ended


async def until(done: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


class Stream:
    """A viewer whose events are gathered as they come."""

    def __init__(self, live: Live, source: Source, *, account: str = "ann", lasts: Callable[[], bool] = lambda: True):
        self.live, self.told, self.done = live, [], False  # type: ignore[var-annotated]
        self.watcher, self.viewer = live.join("run", account, source.look, source.render)
        self._events = live.events(self.viewer, fit=lambda part, html: html, lasts=lasts)
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for text in self._events:
            self.told.append(text)
        self.done = True
        self.leave()

    def leave(self) -> None:
        self.live.leave("run", self.watcher, self.viewer)

    def parts(self) -> list[tuple[str, str]]:
        found = [json.loads(text.split("data: ")[1]) for text in self.told if text.startswith("event: part")]
        return [(part["id"], part["html"]) for part in found]


def test_every_part_at_first_and_then_only_what_changed() -> None:
    async def story() -> None:
        live, source = Live(**FAST), Source()  # type: ignore[arg-type]
        stream = Stream(live, source)
        await until(lambda: len(stream.parts()) == 2)
        source.parts["b"] = "2"
        await until(lambda: len(stream.parts()) == 3)
        assert stream.parts() == [("a", "1"), ("b", "1"), ("b", "2")]
        looks = source.looks
        await until(lambda: source.looks > looks + 5)
        assert len(stream.parts()) == 3 and stream.watcher.rendered == 2, "nothing is rendered while nothing changes"
        live.close()
        await until(lambda: stream.done)

    asyncio.run(story())


def test_viewers_share_one_watcher_and_the_last_one_ends_it() -> None:
    async def story() -> None:
        live, source = Live(**FAST), Source()  # type: ignore[arg-type]
        first = Stream(live, source)
        await until(lambda: len(first.parts()) == 2)
        second = Stream(live, source)
        await until(lambda: len(second.parts()) == 2)
        assert second.watcher is first.watcher and len(live.watchers()) == 1
        assert first.watcher.rendered == 1, "a new viewer gets what is there"
        thread = first.watcher
        first.leave()
        assert live.watchers() and thread._thread.is_alive()
        second.leave()
        await asyncio.to_thread(thread.join, 2.0)
        assert not live.watchers() and not thread._thread.is_alive()

    asyncio.run(story())


def test_a_stream_ends_with_its_run() -> None:
    async def story() -> None:
        live, source = Live(**FAST), Source()  # type: ignore[arg-type]
        stream = Stream(live, source)
        await until(lambda: len(stream.parts()) == 2)
        source.parts["a"], source.ended = "the end", True
        await until(lambda: stream.done)
        assert stream.parts()[-1] == ("a", "the end") and stream.told[-1] == "event: end\ndata: {}\n\n"
        assert not live.watchers()

    asyncio.run(story())


def test_a_stream_ends_with_its_session() -> None:
    async def story() -> None:
        live, source, signed = Live(poll_s=0.01, beat_s=5.0, check_s=0.05), Source(), [True]
        stream = Stream(live, source, lasts=lambda: signed[0])
        await until(lambda: len(stream.parts()) == 2)
        await asyncio.sleep(0.2)
        assert not stream.done
        signed[0] = False
        source.parts["a"] = "nothing that a signed-out tab may have"
        await until(lambda: stream.done)
        late = [html for _, html in stream.parts() if "signed-out" in html]
        assert len(late) <= 1, "at most what came before the check"
        source.parts["a"] = "later"
        await asyncio.sleep(0.1)
        assert "later" not in str(stream.told)

    asyncio.run(story())


def test_a_busy_run_does_not_put_off_the_check_of_a_session() -> None:
    """Each event wakes the stream; the check goes by the clock, not by silence."""

    async def story() -> None:
        live, source = Live(poll_s=0.005, beat_s=5.0, check_s=0.1), Source()
        stream = Stream(live, source, lasts=lambda: False)
        for at in range(200):
            source.parts["a"] = str(at)
            await asyncio.sleep(0.005)
            if stream.done:
                return
        raise AssertionError("it went on for a second")

    asyncio.run(story())


def test_a_silent_stream_beats() -> None:
    async def story() -> None:
        live, source = Live(poll_s=0.01, beat_s=0.03, check_s=5.0), Source()
        stream = Stream(live, source)
        await until(lambda: stream.told.count(": still here\n\n") >= 2)
        live.close()
        await until(lambda: stream.done)

    asyncio.run(story())


def test_an_account_has_a_limit_and_gives_back_what_it_leaves() -> None:
    async def story() -> None:
        live, source = Live(most=2, **FAST), Source()  # type: ignore[arg-type]
        streams = [Stream(live, source), Stream(live, source)]
        with pytest.raises(TooManyStreams):
            Stream(live, source)
        other = Stream(live, source, account="bea")
        streams[0].leave()
        streams[0] = Stream(live, source)
        live.close()
        await until(lambda: all(stream.done for stream in (*streams, other)))
        with pytest.raises(TooManyStreams):
            Stream(live, source)  # a server that ends takes nobody in

    asyncio.run(story())


def test_a_look_that_fails_is_made_again() -> None:
    async def story() -> None:
        live, source = Live(**FAST), Source()  # type: ignore[arg-type]
        source.broken = 3
        stream = Stream(live, source)
        await until(lambda: len(stream.parts()) == 2)
        source.broken = 2
        source.parts["a"] = "after"
        await until(lambda: ("a", "after") in stream.parts())
        live.close()
        await until(lambda: stream.done)

    asyncio.run(story())


def test_who_reads_slowly_gets_the_newest_of_each_part() -> None:
    async def story() -> None:
        source = Source()
        watcher = Watcher("x", source.look, source.render, poll_s=1.0)
        viewer = Viewer(loop=asyncio.get_running_loop(), account="ann")
        watcher.add(viewer)
        for at in range(1000):
            viewer.tell({"a": str(at)}, ended=False)
        assert viewer.take() == ({"a": "999"}, False) and viewer.take() == ({}, False)

    asyncio.run(story())


# ---- over the wire -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with desk_over(world(tmp_path_factory.mktemp("live"))) as found:
        yield found


@pytest.fixture(autouse=True)
def no_pricing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prices, "of", lambda self, plan: Price(facts={"stages": []}, curves=()))
    monkeypatch.setattr(Prices, "charged", lambda self, folder, mirror, done: 0.25)


@contextmanager
def served(desk: Desk, live: Live) -> Iterator[str]:
    """A real server: a test client would wait for the end of a stream that has none."""
    pages._live[desk] = live
    place = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create(desk), log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[place]), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        live.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
        pages._live.pop(desk, None)


def cookies(desk: Desk, role: str = "coordinator", site: str = "") -> dict[str, str]:
    return {"cookie": f"cohortium-session={signed_in(desk, role, site=site).cookies['cohortium-session']}"}


def read(lines: Iterator[str], wanted: str, seconds: float = 10.0) -> list[str]:
    end, found = time.monotonic() + seconds, []
    for line in lines:
        found.append(line)
        if wanted in line:
            return found
        assert time.monotonic() < end
    raise AssertionError(f"the stream ended without {wanted}: {found[-3:]}")


def test_a_page_is_told_of_each_release_and_of_another_state_until_it_goes(desk: Desk) -> None:
    made, run = desk.consortium, of_state(desk.consortium, "running").run
    live = Live(poll_s=0.02, beat_s=0.2, check_s=5.0)
    with served(desk, live) as base, httpx.Client(base_url=base, headers=cookies(desk), timeout=10) as client:
        with client.stream("GET", f"/runs/{run}/events", params={"was": "running"}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-store"
            lines = answer.iter_lines()
            read(lines, f"run-attempts-{run}")
            answered(made, run, [0])
            told = read(lines, "1 of 21 answered")
            assert any(f"run-progress-{run}" in line for line in told)
            desk.register.set_run(run, state="stopping", message="stop was asked for")
            assert any("stopping now. Load the page again" in line for line in read(lines, f"run-again-{run}"))
            assert "csrf" not in "".join(told)
            assert len(live.watchers()) == 1
        end = time.monotonic() + 5
        while live.watchers():
            assert time.monotonic() < end, "the viewer went, its watcher stays"
            time.sleep(0.02)
        desk.register.set_run(run, state="running", message="")


def test_only_one_part_where_only_one_is_wanted_and_an_ended_run_ends_its_stream(desk: Desk) -> None:
    run = of_state(desk.consortium, "finished").run
    answer = signed_in(desk).get(f"/runs/{run}/events", params={"only": "progress"})
    parts = [json.loads(line[6:])["id"] for line in answer.text.splitlines() if line.startswith('data: {"id')]
    assert parts == [f"run-progress-{run}"] and answer.text.endswith("event: end\ndata: {}\n\n")
    assert signed_in(desk).get(f"/runs/{run}/events", params={"only": "csrf"}).status_code == 422


def test_signing_out_ends_the_stream_and_watching_keeps_nobody_signed_in(desk: Desk) -> None:
    run, live = of_state(desk.consortium, "running").run, Live(poll_s=0.02, beat_s=5.0, check_s=0.1)
    looked: list[bool] = []
    session = desk.accounts.session

    def spied(token: str, *, awake: bool = True) -> Any:
        looked.append(awake)
        return session(token, awake=awake)

    headers = cookies(desk, "site", "site-01")
    with served(desk, live) as base, httpx.Client(base_url=base, headers=headers, timeout=10) as client:
        with client.stream("GET", f"/runs/{run}/events") as answer:
            lines = answer.iter_lines()
            read(lines, f"run-attempts-{run}")
            desk.accounts.session = spied  # type: ignore[method-assign]
            try:
                time.sleep(0.4)
                assert looked and not any(looked)
                desk.accounts.end_all("site-site-01")
                list(lines)
            finally:
                desk.accounts.session = session  # type: ignore[method-assign]
        assert client.get(f"/runs/{run}/events").status_code == 401


def test_too_many_streams_of_one_account_are_refused(desk: Desk) -> None:
    run, live = of_state(desk.consortium, "running").run, Live(most=1, **FAST)  # type: ignore[arg-type]
    with (
        served(desk, live) as base,
        httpx.Client(base_url=base, headers=cookies(desk), timeout=10) as client,
        client.stream("GET", f"/runs/{run}/events") as answer,
    ):
        lines = answer.iter_lines()
        read(lines, f"run-attempts-{run}")
        refused = client.get(f"/runs/{run}/events")
        assert refused.status_code == 429 and refused.text.startswith("LIVE-MANY")


def test_the_server_ends_at_once_though_somebody_watches(desk: Desk) -> None:
    run, live = of_state(desk.consortium, "running").run, Live(**FAST)  # type: ignore[arg-type]
    with (
        httpx.Client(headers=cookies(desk), timeout=10) as client,
        served(desk, live) as base,
        client.stream("GET", f"{base}/runs/{run}/events") as answer,
    ):
        lines = answer.iter_lines()
        read(lines, f"run-attempts-{run}")
        begun = time.monotonic()
        live.close()
        list(lines)
        assert time.monotonic() - begun < 1.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch ")]

"""Streams bring every question once and every answer, whatever happens to links, couriers, hubs and ServerApps."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming import FAST_SERVER, KEEP_ALIVE, EchoGuard, World, answer, until

from cohortium.client.guard_port import SocketGuard
from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.protocol.flower import Refusal
from cohortium.server import stream as server_stream
from cohortium.server.runs import RunFolder, drive
from cohortium.server.stream import StreamCourier
from cohortium.server.transport import Absence
from cohortium.simulations import run as simulation

Make = Callable[..., World]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Make]:
    made: list[World] = []

    def make(*sites: str, **options: Any) -> World:
        made.append(World(tmp_path, sites or ("a", "b", "c"), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(courier: StreamCourier, names: Any, what: bytes = b"question", **options: Any) -> dict[str, bytes]:
    return courier.exchange(dict.fromkeys(names, what), **{"timeout_s": 15.0, **options})


def good(names: Any, what: bytes = b"question") -> dict[str, bytes]:
    return {site: answer(site, what) for site in names}


def started(world: World, **options: Any) -> StreamCourier:
    courier = world.courier(**options)
    assert courier.discover(world.names, timeout_s=30.0) == tuple(sorted(world.names))
    return courier


def test_there_and_back(world: Make) -> None:
    here = world("c", "a", "b")
    # Nobody asks again for a stream that a busy machine is slow to open.
    courier = started(here, timings=server_stream.Timings(**{**_dict(FAST_SERVER), "reopen_s": 30.0}))
    assert courier.sites == courier.connected == ("a", "b", "c")
    for number in range(20):
        what = b"%d" % number * 20_000
        assert ask(courier, "abc", what) == good("abc", what) and courier.absent == {}
    assert ask(courier, "a") == good("a")
    assert ask(courier, "ax") == good("a") and courier.absent == {"x": Absence.UNKNOWN}
    assert [len(here.guards[site].handled) for site in "abc"] == [22, 20, 20]
    assert [what for what, _ in here.asked].count("stream") == 3, "Flower is asked once a site"
    courier.close()
    until(lambda: not any(streams.running() for streams in here.streams.values()))


def test_an_exchange_waits_for_nothing_but_the_answers(world: Make) -> None:
    """No sleep on the way: a hundred exchanges in a fraction of what one poll a message would take."""
    here = world()
    courier = started(here)
    began = time.monotonic()
    for _ in range(100):
        ask(courier, "abc")
    assert time.monotonic() - began < 100 * server_stream.LOOK_S / 5


def test_links_cut_at_random_bytes(world: Make) -> None:
    """Each question reaches a living courier's guard once, and each exchange is complete and exact."""
    here = world()
    courier, dice = started(here), random.Random(3)
    for number in range(40):
        here.proxies[dice.choice("abc")].cut_after(dice.randint(1, 60_000))
        what = b"%d" % number + dice.randbytes(15_000)
        assert ask(courier, "abc", what) == good("abc", what), (number, courier.absent)
    assert [len(here.guards[site].handled) for site in "abc"] == [40] * 3
    assert sum(proxy.accepted for proxy in here.proxies.values()) > 10


@pytest.mark.parametrize("moment", ["before", "while the guard works", "after", "for a while"])
def test_a_link_cut_at_each_moment(world: Make, moment: str) -> None:
    here = world()
    courier = started(here)
    proxy = here.proxies["b"]
    if moment == "while the guard works":
        here.guards["b"].before = lambda envelope: (proxy.cut(), time.sleep(0.05))
    elif moment == "for a while":
        proxy.refusing = True
        proxy.cut()
        threading.Timer(0.5, proxy.heal).start()
    elif moment == "before":
        proxy.cut()
    assert ask(courier, "abc", b"1") == good("abc", b"1")
    if moment == "after":
        proxy.cut()
    assert ask(courier, "abc", b"2") == good("abc", b"2")
    assert here.guards["b"].handled == [b"1", b"2"]


def test_a_stalled_link_is_noticed(world: Make) -> None:
    """Nothing closes, nothing arrives: only the unanswered ping tells."""
    here = world("a", "b")
    courier = started(here)
    here.proxies["a"].stall()
    began = time.monotonic()
    threading.Timer(2.0, here.proxies["a"].heal).start()
    assert ask(courier, "ab") == good("ab")
    assert 1.0 < time.monotonic() - began < 8.0
    assert len(here.guards["a"].handled) == 1


def test_a_quiet_stream_stays_open(world: Make) -> None:
    """Pings with nothing between them, for longer than a server that takes them for an attack would bear."""
    here = world("a", "b")
    courier = started(here)
    time.sleep(12 * KEEP_ALIVE.ping_s)
    assert courier.connected == ("a", "b") and [proxy.accepted for proxy in here.proxies.values()] == [1, 1]
    assert ask(courier, "ab") == good("ab")


def test_two_of_five_stalled(world: Make) -> None:
    here = world("a", "b", "c", "d", "e")
    courier = started(here)
    for site in "bd":
        here.proxies[site].stall()
    began = time.monotonic()
    assert ask(courier, "abcde", quorum=3, grace_s=0.3) == good("ace")
    assert 0.3 <= time.monotonic() - began < 1.5
    assert courier.absent == {"b": Absence.STOPPED, "d": Absence.STOPPED}
    assert ask(courier, "abcde", b"2", timeout_s=0.5) == good("ace", b"2")
    assert courier.absent == {"b": Absence.TIMEOUT, "d": Absence.TIMEOUT}
    for site in "bd":
        here.proxies[site].heal()
    until(lambda: ask(courier, "abcde", b"3", timeout_s=1.0) == good("abcde", b"3"), timeout_s=15)
    assert ask(courier, "abcde", b"4") == good("abcde", b"4")


def test_late_answers_are_ignored(world: Make) -> None:
    here = world("a", "b")
    courier = started(here)
    gate = threading.Event()
    here.guards["a"].before = lambda envelope: gate.wait(10) if envelope == b"1" else None
    assert ask(courier, "ab", b"1", timeout_s=0.3) == good("b", b"1")
    gate.set()
    assert ask(courier, "ab", b"2") == good("ab", b"2")
    assert courier.ignored == 1


def test_a_courier_that_was_killed_comes_back(world: Make) -> None:
    """Its streams are gone with it; Flower's message, asked again, makes new ones with the unanswered question."""
    here = world()
    courier = started(here)
    ask(courier, "abc", b"1")
    here.streams["b"].close()
    here.streams["b"] = here.new_streams("b")
    assert ask(courier, "abc", b"2") == good("abc", b"2")
    assert here.asked.count(("stream", "b")) == 2


def test_a_courier_killed_over_a_question_is_asked_again(world: Make) -> None:
    here = world()
    courier = started(here)
    killed = threading.Event()

    def die(envelope: bytes) -> None:
        if not killed.is_set():
            killed.set()
            old, here.streams["b"] = here.streams["b"], here.new_streams("b")
            old.close()

    here.guards["b"].before = die
    assert ask(courier, "abc") == good("abc") and killed.is_set()


def test_a_site_without_a_stream_is_not_waited_for_for_ever(world: Make) -> None:
    here = world()
    courier = started(here, timings=server_stream.Timings(**{**_dict(FAST_SERVER), "lost_s": 0.6}))
    here.deaf.add("b")
    here.streams["b"].close()
    began = time.monotonic()
    assert ask(courier, "abc", timeout_s=30.0) == good("ac")
    assert 0.4 < time.monotonic() - began < 3.0 and courier.absent == {"b": Absence.TIMEOUT}
    began = time.monotonic()
    assert ask(courier, "abc", timeout_s=30.0) == good("ac")
    assert time.monotonic() - began < 0.4, "it is known to be away"
    here.streams["b"] = here.new_streams("b")
    here.deaf.clear()
    until(lambda: "b" in courier.connected)
    assert ask(courier, "abc") == good("abc")


def _dict(timings: server_stream.Timings) -> dict[str, float]:
    return {name: getattr(timings, name) for name in timings.__slots__}


def test_a_guard_that_fails_is_refused_by_code(world: Make) -> None:
    here = world("a", "b")
    courier = started(here)

    def fail(envelope: bytes) -> None:
        raise ValueError("patient 17, HIV positive")

    here.guards["a"].before = fail
    assert ask(courier, "ab") == good("b") and courier.absent == {"a": Absence.REFUSED}
    here.guards["a"].before = lambda envelope: None
    assert ask(courier, "ab") == good("ab")


def test_the_hub_restarts_in_the_middle(world: Make) -> None:
    """Neither questions nor answers are mixed up by the new hub's fresh numbers; Flower is not needed."""
    here = world()
    courier = started(here, timings=server_stream.Timings(**{**_dict(FAST_SERVER), "reopen_s": 30.0}))
    for number in range(3):
        ask(courier, "abc", b"%d" % number)
    done = threading.Event()

    def restart() -> None:
        here.stop_hub()
        time.sleep(0.2)
        here.start_hub()
        done.set()

    def restarts_once(envelope: bytes) -> None:
        here.guards["b"].before = lambda envelope: None
        threading.Thread(target=restart).start()
        assert done.wait(5)

    here.guards["b"].before = restarts_once
    assert ask(courier, "abc", b"x") == good("abc", b"x")
    assert here.asked.count(("stream", "b")) == 1
    for number in range(3):
        assert ask(courier, "abc", b"y%d" % number) == good("abc", b"y%d" % number)


def test_a_new_server_app_replaces_the_old_one(world: Make) -> None:
    here = world()
    first = started(here)
    held = threading.Event()
    here.guards["a"].before = lambda envelope: held.wait(10) if envelope == b"old" else None
    failed: list[str] = []

    def wait() -> None:
        with pytest.raises(PeerUnreachable) as caught:
            ask(first, "abc", b"old")
        failed.append(caught.value.code)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: len(here.guards["b"].handled) == 1)
    second = here.courier()
    threading.Timer(0.3, held.set).start()
    assert second.discover("abc", timeout_s=30.0) == ("a", "b", "c")
    waiting.join(10)
    assert failed == ["RUN-REPLACED"]
    assert ask(second, "abc", b"new") == good("abc", b"new")
    first.close()  # its farewell must not end the new one's streams
    assert ask(second, "abc", b"newer") == good("abc", b"newer")


def test_a_server_app_that_died_is_started_again(world: Make) -> None:
    here = world()
    first = started(here)
    first._hub._over.set()
    first._over = True
    first._hub.again()  # as when its process is killed: no farewell
    second = started(here)
    assert ask(second, "abc") == good("abc")


def test_a_courier_started_twice(world: Make) -> None:
    """The newest is the one that counts; the older does not come back."""
    here = world("a", "b")
    courier = started(here)
    old, twin = here.streams["a"], here.new_streams("a")
    ticket = courier._tickets["a"]
    assert twin.open("run-1", ticket) is None
    until(lambda: not old.running())
    assert ask(courier, "ab") == good("ab")
    assert twin.running() == ("run-1",)


def test_no_courier_is_asked_before_the_hub_knows_the_run(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is slow to hear who takes part would turn couriers away, and they are asked again seconds later."""
    here = world()
    hear = here.hub._hear
    monkeypatch.setattr(here.hub, "_hear", lambda *of: (time.sleep(0.3), hear(*of))[1])
    courier = here.courier(timings=server_stream.Timings(**{**_dict(FAST_SERVER), "reopen_again_s": 60.0}))
    assert courier.discover("abc", timeout_s=5.0) == ("a", "b", "c")
    assert [site for what, site in here.asked if what == "stream"] == ["a", "b", "c"]


def test_too_few(world: Make) -> None:
    here = world()
    here.deaf.add("c")
    quick = server_stream.Timings(**{**_dict(FAST_SERVER), "opening_s": 5.0})
    with pytest.raises(PeerUnreachable) as caught:
        here.courier(timings=quick).discover("abc", timeout_s=5.0)
    assert caught.value.code == "GRID-TOO-FEW-SITES"
    assert here.courier(timings=quick).discover("abc", timeout_s=5.0, quorum=2) == ("a", "b")
    here.deaf.clear()
    here.proxies["c"].refusing = True
    with pytest.raises(PeerUnreachable) as caught:
        here.courier(run="run-2", timings=quick).discover("abc", timeout_s=5.0)
    assert caught.value.code == "STREAM-TOO-FEW" and caught.value.where == ("c",)
    late = here.courier(run="run-3", timings=quick)
    assert late.discover("abc", timeout_s=5.0, quorum=2) == ("a", "b")
    here.proxies["c"].heal()
    until(lambda: late.connected == ("a", "b", "c"))
    assert ask(late, "abc") == good("abc")


def test_no_hub(world: Make) -> None:
    here = world()
    here.stop_hub()
    quick = server_stream.Timings(**{**_dict(FAST_SERVER), "opening_s": 0.3})
    courier = here.courier(timings=quick)
    with pytest.raises(PeerUnreachable) as caught:
        courier.discover("abc", timeout_s=0.3)
    assert caught.value.code == "HUB-DOWN" and "serve" in caught.value.hint
    here.start_hub()


def test_stopped_while_it_waits(world: Make) -> None:
    here = world("a", "b")
    stop, later = threading.Event(), threading.Event()
    courier = started(here, stop=stop)
    here.guards["a"].before = lambda envelope: later.wait(10)
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(PeerUnreachable) as caught:
        ask(courier, "ab")
    assert caught.value.code == "RUN-STOPPED" and time.monotonic() - began < 2.0
    later.set()


def test_what_is_too_large_is_not_sent(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("a", "b")
    courier = started(here)
    monkeypatch.setattr(server_stream, "MOST_RELAY_BYTES", 1000)
    messages = {"a": b"x" * 1001, "b": b"x" * 1000}
    assert list(courier.exchange(messages, timeout_s=30.0)) == ["b"]
    assert courier.absent == {"a": Absence.NOT_SENT}
    monkeypatch.setattr("cohortium.client.stream.MOST_RELAY_BYTES", 1000)
    assert ask(courier, "ab", b"x" * 990) == {} and set(courier.absent.values()) == {Absence.REFUSED}
    assert ask(courier, "ab") == good("ab")


def test_a_run_needs_a_name(world: Make) -> None:
    with pytest.raises(UsageError):
        world().courier(run="a\nb")


def test_guards_are_other_threads_business(world: Make) -> None:
    """Two runs at once over the same couriers and hub do not touch each other."""
    here = world("a", "b", guards={"a": EchoGuard("a"), "b": EchoGuard("b")})
    one, two = started(here), started(here, run="run-2")
    for number in range(10):
        assert ask(one, "ab", b"1-%d" % number) == good("ab", b"1-%d" % number)
        assert ask(two, "ab", b"2-%d" % number) == good("ab", b"2-%d" % number)
    two.close()
    assert ask(one, "ab") == good("ab")


def test_refusals_are_few_words() -> None:
    assert {str(code) for code in Refusal} == {
        "COURIER-NO-GUARD",
        "COURIER-GUARD-FAILED",
        "COURIER-BAD-PARCEL",
        "COURIER-NO-STREAM",
        "COURIER-TOO-LARGE",
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_whole_run_over_streams_gives_the_same_model(
    simulate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Four guards in processes of their own, the whole of `drive`: byte for byte the in-process engine's model.

    On the way every link is cut after each release, and the hub is started again.
    """
    prepared = simulate(split="iid:4", generator="joined", rounds=3, survivors=3, run=False)
    whole = prepared.parent / "whole"
    shutil.copytree(prepared, whole)
    simulation.run(whole)
    names = RunFolder(root=prepared).plan().sites
    folder = tmp_path_factory.mktemp("s")
    guards = {site: GuardProcess(prepared / "sites" / site, folder / f"{site}.sock") for site in names}
    ports = {site: SocketGuard(folder / f"{site}.sock", patience_s=60.0) for site in names}
    here = World(folder, names, guards=ports)
    try:
        for port in ports.values():
            until(lambda port=port: port.path.exists(), timeout_s=60)
        releases: list[int] = []

        def trouble(event: dict[str, Any]) -> None:
            if event["event"] != "release":
                return
            releases.append(event["index"])
            for proxy in here.proxies.values():
                proxy.cut_after(1000 * len(releases))
            if len(releases) == 2:
                here.stop_hub()
                here.start_hub()

        with here.courier(run=str(RunFolder(root=prepared).facts()["run"])) as courier:
            drive(courier, prepared, on_event=trouble)
        assert len(releases) == RunFolder(root=prepared).plan().releases
    finally:
        here.close()
        for guard in guards.values():
            guard.stop()
    models = [RunFolder(root=root).model().to_arrays()[0] for root in (prepared, whole)]
    assert {name: value.tobytes() for name, value in models[0].items()} == {
        name: value.tobytes() for name, value in models[1].items()
    }


class GuardProcess:
    def __init__(self, directory: Path, socket: Path) -> None:
        command = [sys.executable, "-m", "cohortium.client.guard_service", str(directory), str(socket)]
        self._process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def stop(self) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0

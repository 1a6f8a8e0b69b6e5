"""The hub believes nobody: names come from certificates, tickets from the ServerApp, and frames have limits."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from streaming import Service, until

from cohortium.common.errors import Refused
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.relaying import Code
from cohortium.common.protocol.sockets import local_options
from cohortium.server.hub import MOST_IDLE, MOST_OPENING, Hub, serve_hub

TICKET, OTHER = bytes(range(16)), bytes(range(1, 17))


class Call:
    """A raw call to the hub: frames in by `say`, frames out by `hear`."""

    def __init__(self, method: Any) -> None:
        self._out: SimpleQueue[Any] = SimpleQueue()
        self._in: SimpleQueue[Any] = SimpleQueue()
        self._call = method(iter(self._out.get, None))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for frame in self._call:
                self._in.put(frame)
        except grpc.RpcError as error:
            self._in.put(error)
        self._in.put(None)

    def say(self, frame: Any) -> None:
        self._out.put(frame)

    def hear(self, timeout_s: float = 5.0) -> Any:
        return self._in.get(timeout=timeout_s)

    def again(self, frame: Any) -> None:
        """To be heard once more."""
        self._in.put(frame)

    def silent(self, seconds: float = 0.1) -> bool:
        time.sleep(seconds)
        return self._in.empty()

    def end(self) -> None:
        self._call.cancel()


class Switchboard:
    def __init__(self, folder: Path, **options: Any) -> None:
        self.hub = Hub(**{"opening_s": 1.0, "linger_s": 0.3, "max_envelope_bytes": 1000, **options})
        self.socket = folder / "hub.sock"
        self.server = serve_hub(self.hub, self.socket)
        self._services: dict[str, Service] = {}
        self._channels = [grpc.insecure_channel(f"unix:{self.socket}", options=local_options())]
        self._calls: list[Call] = []

    def relay(self, site: str = "a", *frames: pb.Frame) -> Call:
        if site not in self._services:
            self._services[site] = Service(lambda: self.hub, site)
        self._channels.append(grpc.insecure_channel(f"127.0.0.1:{self._services[site].port}"))
        return self._call(rpc.ConsortiumStub(self._channels[-1]).Relay, frames)

    def open(self, site: str = "a", *, run: str = "r", ticket: bytes = TICKET, **more: Any) -> Call:
        return self.relay(site, pb.Frame(run=run, ticket=ticket, **more))

    def opened(self, site: str = "a", **more: Any) -> Call:
        call = self.open(site, **more)
        assert not call.hear().code
        return call

    def app(self, *sites: str, ticket: bytes = TICKET, run: str = "r") -> Call:
        frames = [pb.HubFrame(run=run, site=site, code=Code.ATTACH, ticket=ticket) for site in sites]
        before = self.hub._runs.get(run)
        old = None if before is None else before.attachment
        call = self._call(rpc.HubStub(self._channels[0]).Attach, frames)
        until(lambda: run in self.hub._runs and self.hub._runs[run].attachment not in (None, old))
        until(lambda: set(sites) <= set(self.hub._runs[run].lines))
        # One word for each site that is named; that one has no stream is what most tests begin with.
        for word in [call.hear() for _ in sites]:
            assert word.code in (Code.CONNECTED, Code.LOST), word
            if word.code == Code.CONNECTED:
                call.again(word)
        return call

    def _call(self, method: Any, frames: Any) -> Call:
        call = Call(method)
        self._calls.append(call)
        for frame in frames:
            call.say(frame)
        return call

    def close(self) -> None:
        for call in self._calls:
            call.end()
        self.hub.close()
        self.server.stop(0).wait()
        for service in self._services.values():
            service.stop()
        for channel in self._channels:
            channel.close()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Switchboard]:
    made = Switchboard(tmp_path)
    yield made
    made.close()


def ask(exchange: int, envelope: bytes = b"question", site: str = "a", run: str = "r") -> pb.HubFrame:
    return pb.HubFrame(run=run, site=site, exchange=exchange, envelope=envelope)


def test_a_server_app_hears_of_each_site_that_the_hub_knows_now(board: Switchboard) -> None:
    """So that it asks no courier to come before the hub would let it in."""
    app = board._call(rpc.HubStub(board._channels[0]).Attach, ())
    assert app.silent()
    for site in ("a", "b"):
        app.say(pb.HubFrame(run="r", site=site, code=Code.ATTACH, ticket=TICKET))
        assert app.hear() == pb.HubFrame(run="r", site=site, code=Code.LOST)
        assert not board.open(site).hear().code
        assert app.hear() == pb.HubFrame(run="r", site=site, code=Code.CONNECTED)


def test_there_and_back(board: Switchboard) -> None:
    app = board.app("a", "b")
    courier = board.opened()
    assert app.hear() == pb.HubFrame(run="r", site="a", code=Code.CONNECTED)
    assert board.hub.connected("r") == ("a",) and board.hub.connected("other") == ()
    app.say(ask(7))
    question = courier.hear()
    assert (question.seq, question.ack, question.envelope) == (1, 0, b"question")
    courier.say(pb.Frame(seq=1, ack=1, envelope=b"answer"))
    assert app.hear() == pb.HubFrame(run="r", site="a", exchange=7, envelope=b"answer")
    courier.say(pb.Frame(seq=1, ack=1, envelope=b"answer"))  # twice
    courier.say(pb.Frame(seq=9, ack=1, envelope=b"answer to nothing"))
    app.say(ask(8))
    assert (courier.hear().ack, app.silent()) == (1, True)
    courier.say(pb.Frame(seq=2, code="COURIER-GUARD-FAILED"))
    assert app.hear() == pb.HubFrame(run="r", site="a", exchange=8, code="COURIER-GUARD-FAILED")
    app.say(pb.HubFrame(run="r", code=Code.END))
    assert app.hear().code == Code.END and app.hear() is None
    assert courier.hear().code == Code.END and courier.hear() is None
    assert board.open().hear().code == Code.UNKNOWN_RUN


@pytest.mark.parametrize(
    ("site", "run", "ticket", "code"),
    [
        ("a", "r", OTHER, Code.WRONG_TICKET),
        ("a", "r", b"", Code.WRONG_TICKET),
        ("a", "r", TICKET[:15], Code.WRONG_TICKET),
        ("b", "r", TICKET, Code.UNKNOWN_RUN),  # a member that the run does not name, even with another's ticket
        ("a", "s", TICKET, Code.UNKNOWN_RUN),
        ("a", "", TICKET, Code.UNKNOWN_RUN),
    ],
)
def test_who_may_not(board: Switchboard, site: str, run: str, ticket: bytes, code: str) -> None:
    app = board.app("a")
    call = board.open(site, run=run, ticket=ticket)
    assert call.hear().code == code and call.hear() is None
    assert app.silent() and board.hub.connected("r") == ()


def test_a_tickets_owner_cannot_be_another_site(board: Switchboard) -> None:
    app = board.app("a", "b")
    del app
    board.hub._runs["r"].lines["b"].ticket = OTHER
    assert board.open("b", ticket=TICKET).hear().code == Code.WRONG_TICKET


def test_an_envelope_that_is_too_large_ends_the_stream(board: Switchboard) -> None:
    app, courier = board.app("a"), board.opened()
    app.hear()
    app.say(ask(1, b"x" * 1000))
    courier.hear()
    courier.say(pb.Frame(seq=1, envelope=b"x" * 1001))
    assert app.hear() == pb.HubFrame(run="r", site="a", exchange=1, code="COURIER-BAD-FRAME")
    assert courier.hear().code == Code.TOO_LARGE
    assert app.hear().code == Code.LOST
    app.say(ask(2, b"x" * 1001))
    assert app.hear().code == Code.BAD_FRAME and app.hear() is None


@pytest.mark.parametrize("code", ["patient 17 is HIV positive", "COURIER-x", "COURIER-" + "X" * 41, "CONNECTED"])
def test_only_a_couriers_codes_pass(board: Switchboard, code: str) -> None:
    app, courier = board.app("a"), board.opened()
    app.hear()
    for number, frame in enumerate((pb.Frame(code=code), pb.Frame(), pb.Frame(code="COURIER-NO-GUARD", envelope=b"x"))):
        app.say(ask(number + 1))
        courier.hear()
        frame.seq = number + 1
        courier.say(frame)
        assert app.hear() == pb.HubFrame(run="r", site="a", exchange=number + 1, code="COURIER-BAD-FRAME")


@pytest.mark.parametrize("seq", [0, 1, 2**64 - 1])
def test_a_flood_of_frames_ends_the_stream(board: Switchboard, seq: int) -> None:
    app, courier = board.app("a"), board.opened()
    app.hear()
    for _ in range(MOST_IDLE + 1):
        courier.say(pb.Frame(seq=seq, ack=5))
    assert courier.hear().code == Code.BAD_FRAME
    assert app.hear().code == Code.LOST


def test_a_stream_has_to_say_what_it_wants(board: Switchboard) -> None:
    board.app("a")
    silent = [board.relay() for _ in range(MOST_OPENING)]
    until(lambda: board.hub._opening["a"] == MOST_OPENING)
    assert board.relay().hear().code == Code.BUSY
    assert board.relay("b").silent(0.2), "another site is not held up"
    assert [call.hear().code for call in silent] == [Code.BAD_FRAME] * MOST_OPENING
    until(lambda: "a" not in board.hub._opening)
    board.opened()


def test_an_opening_that_has_what_was_never_sent_is_refused(board: Switchboard) -> None:
    board.app("a")
    call = board.relay(
        "a", pb.Frame(run="r", ticket=TICKET, ack=5, envelope=board.hub._runs["r"].lines["a"].asking.numbering)
    )
    assert call.hear().code == Code.BAD_FRAME, "an acknowledgement of what was never sent"


def test_the_newest_stream_wins(board: Switchboard) -> None:
    app, old = board.app("a"), board.opened()
    app.hear()
    app.say(ask(1))
    assert old.hear().seq == 1
    new = board.opened()
    assert old.hear().code == Code.SUPERSEDED and old.hear() is None
    assert new.hear().seq == 1, "what is unanswered is asked again"
    new.say(pb.Frame(seq=1, envelope=b"answer"))
    said = [app.hear() for _ in range(3)]
    assert [(f.code, f.envelope) for f in said] == [("LOST", b""), ("CONNECTED", b""), ("", b"answer")]


def test_a_revoked_site_is_cut_off(board: Switchboard) -> None:
    app, courier, other = board.app("a", "b"), board.opened("a"), board.opened("b")
    silent = board.relay("a")
    until(lambda: board.hub._opening["a"] == 1)
    board.hub.revoke("a")
    assert courier.hear().code == Code.REVOKED and silent.hear().code == Code.REVOKED
    assert board.hub.connected("r") == ("b",) and other.silent()
    assert {app.hear().code for _ in range(3)} == {Code.CONNECTED, Code.LOST}


def test_a_second_server_app_takes_over(board: Switchboard) -> None:
    first = board.app("a", "b", "c")
    a, b, c = board.opened("a"), board.opened("b"), board.opened("c")
    first.say(ask(1, site="b"))
    assert b.hear().seq == 1
    second = board.app("a", "b", ticket=OTHER)
    while (frame := first.hear()) and frame.code == Code.CONNECTED:
        pass
    assert frame.code == Code.REPLACED and first.hear() is None
    assert a.hear().code == Code.END and b.hear().code == Code.END
    assert board.open("a").hear().code == Code.WRONG_TICKET
    board.opened("a", ticket=OTHER)
    assert second.hear() == pb.HubFrame(run="r", site="a", code=Code.CONNECTED)
    second.say(ask(1))
    assert c.hear().code == Code.END, "a site of the earlier attempt that this one does not name"


def test_the_same_attempt_keeps_its_streams(board: Switchboard) -> None:
    first, courier = board.app("a"), board.opened()
    first.hear()
    first.say(ask(1))
    courier.hear()
    first.end()
    second = board.app("a")
    assert second.hear().code == Code.CONNECTED and courier.silent()
    second.say(ask(1))  # repeated: it is the same question
    second.say(ask(2, b"the next"))
    assert (question := courier.hear()).seq == 2 and question.envelope == b"the next"
    courier.say(pb.Frame(seq=1, envelope=b"answer"))
    assert second.hear() == pb.HubFrame(run="r", site="a", exchange=1, envelope=b"answer")


def test_streams_wait_a_little_for_a_server_app_that_died(board: Switchboard) -> None:
    app, courier = board.app("a"), board.opened()
    app.hear()
    app.end()
    assert courier.silent(0.15)
    assert courier.hear().code == Code.END
    assert "r" not in board.hub._runs


@pytest.mark.parametrize(
    "frame",
    [
        pb.HubFrame(run="r", site="a", exchange=1, envelope=b"x"),
        pb.HubFrame(run="r", site="a", code=Code.ATTACH, ticket=b"short"),
        pb.HubFrame(run="", site="a", code=Code.ATTACH, ticket=TICKET),
        pb.HubFrame(run="r", site="", code=Code.ATTACH, ticket=TICKET),
    ],
)
def test_a_server_app_that_makes_no_sense_is_let_go(board: Switchboard, frame: pb.HubFrame) -> None:
    call = board._call(rpc.HubStub(board._channels[0]).Attach, [frame])
    assert call.hear().code == Code.BAD_FRAME and call.hear() is None


def test_a_server_app_that_does_not_read_is_let_go(board: Switchboard) -> None:
    board.app("a")
    attachment = board.hub._runs["r"].attachment
    assert attachment is not None
    with board.hub._lock:
        for _ in range(100):
            board.hub._tell(board.hub._runs["r"], "a", code=Code.LOST)
        assert attachment.over == Code.SLOW


def test_a_new_stream_takes_the_questions_of_meanwhile(board: Switchboard) -> None:
    app = board.app("a")
    for exchange in (1, 2, 3):
        app.say(ask(exchange, b"q%d" % exchange))
    until(lambda: board.hub._runs["r"].lines["a"].asking.sent == 3)
    courier = board.opened()
    assert [courier.hear().envelope for _ in range(2)] == [b"q2", b"q3"], "nobody waits for the first any more"


def test_the_socket_is_for_its_owner_and_one_hub(board: Switchboard) -> None:
    assert stat.S_IMODE(board.socket.stat().st_mode) == 0o600
    with pytest.raises(Refused) as caught:
        serve_hub(Hub(), board.socket)
    assert caught.value.code == "SOCKET-BUSY"


def test_a_closed_hub_lets_go_without_a_code(board: Switchboard) -> None:
    app, courier = board.app("a"), board.opened()
    app.hear()
    board.hub.close()
    assert courier.hear() is None, "no code: the courier looks for the next hub"
    assert app.hear() in (None, pb.HubFrame(run="r", site="a", code=Code.LOST))
    assert board.relay().hear() is None


def test_many_sites_at_once(board: Switchboard) -> None:
    sites = [f"s{number}" for number in range(8)]
    app = board.app(*sites)
    with ThreadPoolExecutor(8) as pool:
        couriers = dict(zip(sites, pool.map(board.opened, sites), strict=True))
    heard: set[tuple[str, int, bytes]] = set()
    for exchange in range(1, 21):
        for site in sites:
            app.say(ask(exchange, f"{site}{exchange}".encode(), site))
        for site in sites:
            question = couriers[site].hear(30.0)
            couriers[site].say(pb.Frame(seq=question.seq, ack=question.seq, envelope=question.envelope + b"!"))
        # As a run does: of a site with two questions open, the hub forgets the older at a third.
        while len(heard) < 8 * exchange:
            frame = app.hear(30.0)
            if frame.exchange:
                heard.add((frame.site, frame.exchange, frame.envelope))
    assert heard == {(s, e, f"{s}{e}!".encode()) for s in sites for e in range(1, 21)}

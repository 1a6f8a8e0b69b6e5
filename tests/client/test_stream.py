"""The courier's end: it opens what it is asked for, comes back by itself, and says nothing but fixed codes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from streaming import FAST, EchoGuard, until

from cohortium.client import stream as client_stream
from cohortium.client.stream import Streams, Timings
from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.flower import Refusal
from cohortium.common.protocol.relaying import Code, invitation

TICKET, OTHER = bytes(range(16)), bytes(range(1, 17))
Frames = Iterator[pb.Frame]


class Script(rpc.ConsortiumServicer):
    """A coordinator that does with each stream what the next function of its script says; the last one stays."""

    def __init__(self, *acts: Callable[[pb.Frame, Frames, grpc.ServicerContext], Frames]) -> None:
        self._acts, self.openings = list(acts), list[pb.Frame]()
        self._server = grpc.server(ThreadPoolExecutor(8))
        rpc.add_ConsortiumServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Relay(self, request_iterator: Frames, context: grpc.ServicerContext) -> Frames:
        self.openings.append(next(request_iterator))
        act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
        yield from act(self.openings[-1], request_iterator, context)

    def stop(self) -> None:
        self._server.stop(0).wait()


def code(word: str) -> Any:
    return lambda first, frames, context: iter([pb.Frame(code=word)])


def hello(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
    """A stream that stands, and is silent."""
    yield pb.Frame(envelope=b"n")
    for _ in frames:
        pass


def hang(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
    for _ in frames:
        pass
    yield from ()


def abort(status: grpc.StatusCode) -> Any:
    def act(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        context.abort(status, "CODE")
        yield from ()

    return act


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[Script, Streams]]]:
    closing: list[Any] = []

    def make(*acts: Any, guard: Any = None, timings: Timings = FAST) -> tuple[Script, Streams]:
        script = Script(*acts)
        target = f"127.0.0.1:{script.port}"
        streams = Streams(guard=guard or EchoGuard("a"), channel=lambda: grpc.insecure_channel(target), timings=timings)
        closing.extend([streams.close, script.stop])
        return script, streams

    yield make
    for close in closing:
        close()


Make = Callable[..., tuple[Script, Streams]]
QUICK = Timings(first_wait_s=0.02, longest_wait_s=0.1, opening_s=0.6, greeting_s=0.3, unknown_s=0.5, patience_s=2.0)


def test_opened_once(made: Make) -> None:
    script, streams = made(hello)
    assert streams.invited(invitation("r", TICKET)) is None and streams.running() == ("r",)
    assert streams.open("r", TICKET) is None
    assert [(o.run, o.ticket, o.ack, o.envelope) for o in script.openings] == [("r", TICKET, 0, b"")]
    streams.close()
    until(lambda: streams.running() == ())


@pytest.mark.parametrize("said", [b"", b"{}", invitation("r", TICKET[1:]), invitation("x" * 201, TICKET)])
def test_a_message_that_asks_for_nothing(made: Make, said: bytes) -> None:
    script, streams = made(hello)
    assert streams.invited(said) is Refusal.BAD_PARCEL and not script.openings


@pytest.mark.parametrize("word", [Code.WRONG_TICKET, Code.UNKNOWN_RUN, Code.REVOKED, Code.END, "A-NEW-WORD"])
def test_refused_by_a_code_it_does_not_come_again(made: Make, word: str) -> None:
    script, streams = made(code(word), timings=QUICK)
    began = time.monotonic()
    assert streams.open("r", TICKET) is Refusal.NO_STREAM
    assert time.monotonic() - began < 0.5, "a refusal is not waited out"
    time.sleep(0.2)
    assert len(script.openings) == 1 and streams.running() == ()


@pytest.mark.parametrize(
    "status",
    [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT],
)
def test_a_site_that_is_shut_out_does_not_come_again(made: Make, status: grpc.StatusCode) -> None:
    script, streams = made(abort(status))
    assert streams.open("r", TICKET) is Refusal.NO_STREAM
    time.sleep(0.2)
    assert len(script.openings) == 1


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAUTHENTICATED,  # a certificate that has just been renewed
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
    ],
)
def test_what_may_pass_is_tried_again(made: Make, status: grpc.StatusCode) -> None:
    script, streams = made(abort(status), code(Code.BUSY), hello)
    assert streams.open("r", TICKET) is None and len(script.openings) == 3


def test_a_coordinator_that_takes_the_call_and_says_nothing(made: Make) -> None:
    script, streams = made(hang, hello, timings=QUICK)
    assert streams.open("r", TICKET) is None
    assert len(script.openings) == 2
    _, other = made(hang, timings=QUICK)
    began = time.monotonic()
    assert other.open("r", TICKET) is Refusal.NO_STREAM and time.monotonic() - began < 2.0
    assert other.running() == ()


def test_superseded_it_does_not_come_again(made: Make) -> None:
    def superseded(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        yield pb.Frame(envelope=b"n")
        yield pb.Frame(code=Code.SUPERSEDED)

    script, streams = made(superseded)
    streams.open("r", TICKET)
    until(lambda: streams.running() == ())
    time.sleep(0.2)
    assert len(script.openings) == 1


def test_a_hub_that_forgot_the_run_is_given_a_moment(made: Make) -> None:
    def breaks(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        yield pb.Frame(envelope=b"n")

    script, streams = made(breaks, code(Code.UNKNOWN_RUN), code(Code.UNKNOWN_RUN), hello, timings=QUICK)
    assert streams.open("r", TICKET) is None
    until(lambda: len(script.openings) == 4)
    assert streams.running() == ("r",)
    script, streams = made(breaks, code(Code.UNKNOWN_RUN), timings=QUICK)
    streams.open("r", TICKET)
    until(lambda: streams.running() == (), timeout_s=3.0)


def test_a_coordinator_that_is_gone_for_good(made: Make) -> None:
    script, streams = made(hello, timings=QUICK)
    streams.open("r", TICKET)
    script.stop()
    time.sleep(0.3)
    assert streams.running() == ("r",)
    until(lambda: streams.running() == (), timeout_s=5.0)


def test_a_late_message_of_an_earlier_attempt_ends_nothing(made: Make) -> None:
    def by_ticket(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        return (
            hello(first, frames, context) if first.ticket == TICKET else code(Code.WRONG_TICKET)(first, frames, context)
        )

    script, streams = made(by_ticket)
    assert streams.open("r", TICKET) is None
    assert streams.open("r", OTHER) is Refusal.NO_STREAM
    assert streams.running() == ("r",) and streams.open("r", TICKET) is None and len(script.openings) == 2


def test_a_new_attempt_takes_the_place_of_the_old(made: Make) -> None:
    ended = threading.Event()

    def watched(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        if first.ticket == TICKET:
            context.add_callback(ended.set)
        yield from hello(first, frames, context)

    _, streams = made(watched)
    assert streams.open("r", TICKET) is None and streams.open("r", OTHER) is None
    assert ended.wait(5) and streams.running() == ("r",)


def test_a_coordinator_cannot_open_streams_without_end(made: Make) -> None:
    _, streams = made(hello)
    said = [streams.open(f"r{number}", TICKET) for number in range(client_stream.MOST_RELAYS // 2)]
    assert set(said) == {None}
    streams._opening += client_stream.MOST_RELAYS // 2
    assert streams.open("one-more", TICKET) is Refusal.NO_STREAM
    assert streams.open("r0", TICKET) is None


def test_answers_outlive_links_and_duplicates_are_dropped(made: Make) -> None:
    """The stream breaks before the answer is taken; the next link gets it, and nothing is asked of the guard twice."""
    got: list[pb.Frame] = []

    def first_link(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        yield pb.Frame(envelope=b"n")
        yield pb.Frame(seq=1, envelope=b"q1")
        until(lambda: guard.handled)

    def second_link(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        yield pb.Frame(envelope=b"n")
        yield pb.Frame(seq=1, envelope=b"q1")
        yield pb.Frame(seq=2, ack=0, envelope=b"q2")
        yield pb.Frame(seq=0, envelope=b"no question")
        for frame in frames:
            got.append(frame)

    guard = EchoGuard("a")
    script, streams = made(first_link, second_link, guard=guard)
    assert streams.open("r", TICKET) is None
    until(lambda: len(got) == 2)
    assert [(frame.seq, frame.envelope[-2:]) for frame in got] == [(1, b"q1"), (2, b"q2")]
    assert guard.handled == [b"q1", b"q2"]
    assert (script.openings[1].ack, script.openings[1].envelope) == (1, b"n")
    streams.reconnect()
    until(lambda: len(script.openings) == 3)
    assert script.openings[2].ack == 2


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ValueError("patient 17, HIV positive"), Refusal.GUARD_FAILED),
        (SystemExit("patient 17, HIV positive"), Refusal.GUARD_FAILED),
        (PeerUnreachable("GUARD-DOWN", "at /home/clinic/guard.sock"), Refusal.NO_GUARD),
        (PeerUnreachable("GUARD-FAILED", "x"), Refusal.GUARD_FAILED),
        (None, Refusal.GUARD_FAILED),  # an empty answer
    ],
)
def test_only_a_code_leaves(made: Make, failure: BaseException | None, said: Refusal) -> None:
    got: list[pb.Frame] = []

    class Failing(EchoGuard):
        def handle(self, envelope: bytes) -> bytes:
            if failure is not None:
                raise failure
            return b""

    def act(first: pb.Frame, frames: Frames, context: grpc.ServicerContext) -> Frames:
        yield pb.Frame(envelope=b"n")
        yield pb.Frame(seq=1, envelope=b"q1")
        got.append(next(frames))
        yield pb.Frame(seq=2, envelope=b"q2")
        got.append(next(frames))

    _, streams = made(act, hello, guard=Failing("a"))
    streams.open("r", TICKET)
    until(lambda: len(got) == 2)
    assert got[0] == pb.Frame(seq=1, ack=1, code=said)
    assert got[1] == pb.Frame(seq=2, ack=2, code=said), "the stream lives on"


def test_no_certificate_yet(made: Make) -> None:
    """The channel cannot even be made, at first."""
    script, _ = made(hello)
    tries = 0

    def channel() -> grpc.Channel:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise UsageError("KEY-MISSING", "no leaf") if tries == 1 else FileNotFoundError("leaf.key")
        return grpc.insecure_channel(f"127.0.0.1:{script.port}")

    streams = Streams(guard=EchoGuard("a"), channel=channel, timings=FAST)
    assert streams.open("r", TICKET) is None and tries == 3
    streams.close()


def test_waits_grow_and_differ_between_sites() -> None:
    waited: dict[bytes, list[float]] = {}
    for ticket in (TICKET, OTHER):
        relay = client_stream._Relay("r", ticket, EchoGuard("a"), lambda: grpc.insecure_channel("x"), Timings())
        waited[ticket] = []
        relay._changed.wait_for = lambda what, seconds, ticket=ticket: waited[ticket].append(seconds)  # type: ignore
        for attempt in range(12):
            relay._wait(attempt)
    for seconds in waited.values():
        assert seconds[0] <= 0.2 and 5.0 <= seconds[-1] <= 10.0 and max(seconds) <= 10.0
        assert sum(seconds[:4]) < 4.0, "a short break is over soon"
    assert waited[TICKET] != waited[OTHER]


def test_the_relay_stays_thin() -> None:
    heavy = "torch pandas pyarrow scipy sklearn ray sqlite3 cohortium.client.guard cohortium.client.records"
    tops = ("cohortium.client.stream", "cohortium.client.guard_port")
    test = (
        f"import sys, {', '.join(tops)}\n"
        f"found = [name for name in {heavy.split()!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", test], check=True, timeout=60, cwd=Path("/"))
    # The port to the guard needs not even Flower or numpy.
    test = (
        "import sys, cohortium.client.guard_port\n"
        "found = [name for name in ('flwr', 'numpy') if name in sys.modules]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", test], check=True, timeout=60, cwd=Path("/"))

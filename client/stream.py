"""The courier's end of the fast path: envelopes of one run between the coordinator's hub and the guard.

A Flower message asks for a stream; from then on a thread relays until the hub says that the run is over. A link that
breaks is opened again, with waits that grow, and goes on where it stopped (common/protocol/relaying.py). The courier
connects to the coordinator's address of its own configuration and to nothing that a message names.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from cohortium.common.errors import CohortiumError, ProtocolError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.flower import Refusal
from cohortium.common.protocol.relaying import TICKET_BYTES, Answering, Code, check_run, read_invitation
from cohortium.common.protocol.service import MOST_RELAY_BYTES

if TYPE_CHECKING:
    from cohortium.client.app import GuardPort

MOST_RELAYS = 16
FINAL = frozenset(
    {Code.END, Code.SUPERSEDED, Code.WRONG_TICKET, Code.REVOKED, Code.BAD_FRAME, Code.TOO_LARGE, Code.UNKNOWN_RUN}
)
# Not UNAUTHENTICATED: a certificate that ended is renewed, and the next attempt shows the new one.
_REFUSED = frozenset(
    {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds. first_wait, longest_wait: before a broken link is opened again, growing from one to the other; a part
    of it is cut off, different for each site. opening: how long Flower's message waits for the stream. greeting: how
    long the hub may take to answer an opening. unknown: how long a hub that came back may not know the run yet.
    patience: after so long without a link the run is taken for dead; Flower can always ask for it anew."""

    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    opening_s: float = 20.0
    greeting_s: float = 15.0
    unknown_s: float = 30.0
    patience_s: float = 3600.0


class Streams:
    """The streams of one hospital's courier, at most one a run.

    guard: the port to the guard; it is used by several threads. channel: a new connection to the coordinator, made
    afresh for each attempt, so that a renewed certificate is used by the next one.
    """

    def __init__(
        self, *, guard: GuardPort, channel: Callable[[], grpc.Channel], timings: Timings | None = None
    ) -> None:
        self._guard, self._channel, self._timings = guard, channel, timings or Timings()
        self._lock = threading.Lock()
        self._relays: dict[str, _Relay] = {}
        self._opening = 0

    def invited(self, said: bytes) -> Refusal | None:
        """`open` for what a Flower message said."""
        try:
            run, ticket = read_invitation(said)
        except ProtocolError:
            return Refusal.BAD_PARCEL
        return self.open(run, ticket)

    def open(self, run: str, ticket: bytes) -> Refusal | None:
        """Have a stream for this run, at the latest after `opening_s`; None, or the code that says there is none.

        With the ticket of a stream that is there, or is just coming back, this waits for that one.
        """
        if not check_run(run) or len(ticket) != TICKET_BYTES:
            return Refusal.BAD_PARCEL
        with self._lock:
            self._relays = {name: relay for name, relay in self._relays.items() if relay.alive}
            known = self._relays.get(run)
            if known is None or known.ticket != ticket:
                if len(self._relays) + self._opening >= MOST_RELAYS:
                    return Refusal.NO_STREAM
                self._opening += 1
        if known is not None and known.ticket == ticket:
            return None if known.connect(self._timings.opening_s) else Refusal.NO_STREAM
        relay = _Relay(run, ticket, self._guard, self._channel, self._timings)
        relay.start()
        stands = relay.connect(self._timings.opening_s)
        leaving: _Relay | None = relay
        with self._lock:
            self._opening -= 1
            if stands:
                # Only now: a late message with the ticket of an earlier attempt must not end the stream of this one.
                leaving, self._relays[run] = self._relays.get(run), relay
        if leaving is not None:
            leaving.close()
        return None if stands else Refusal.NO_STREAM

    def running(self) -> tuple[str, ...]:
        """The runs that have a stream, or are getting it back, sorted."""
        with self._lock:
            return tuple(sorted(name for name, relay in self._relays.items() if relay.alive))

    def reconnect(self) -> None:
        """Open every link anew, as after a new certificate; nothing is lost by it."""
        with self._lock:
            relays = list(self._relays.values())
        for relay in relays:
            relay.cut()

    def close(self) -> None:
        """End all streams; an answer that the guard is working on is not waited for."""
        with self._lock:
            relays, self._relays = list(self._relays.values()), {}
        for relay in relays:
            relay.close()


class _Relay:
    """One run's stream: a thread that opens it, hands questions to the guard one by one, and opens it again."""

    def __init__(
        self, run: str, ticket: bytes, guard: GuardPort, channel: Callable[[], grpc.Channel], timings: Timings
    ) -> None:
        self.run, self.ticket = run, ticket
        self._guard, self._channel, self._timings = guard, channel, timings
        self._state = Answering()
        self._changed = threading.Condition()
        self._connected = False
        self._over = False
        self._hurry = False
        self._known = False
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._keep, name="relay", daemon=True)

    @property
    def alive(self) -> bool:
        return not self._over

    def start(self) -> None:
        self._thread.start()

    def connect(self, timeout_s: float) -> bool:
        """Wait until the stream stands; a wait between two attempts is cut short."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._connected or self._over, timeout_s)
            return self._connected and not self._over

    def cut(self) -> None:
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self.cut()

    # ---- the thread -----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Open the link until the hub or `close` ends it."""
        attempt, last = 0, time.monotonic()
        try:
            while not self._over:
                was_there, final = self._once()
                now = time.monotonic()
                if was_there:
                    attempt, last = 0, now
                if final == Code.UNKNOWN_RUN and self._known and now - last < self._timings.unknown_s:
                    final = ""  # a hub that was restarted hears of the run in a moment
                if final or now - last > self._timings.patience_s:
                    return
                self._wait(attempt)
                attempt += 1
        finally:
            with self._changed:
                self._over, self._connected = True, False
                self._changed.notify_all()

    def _wait(self, attempt: int) -> None:
        longest = min(self._timings.first_wait_s * 2.0 ** min(attempt, 30), self._timings.longest_wait_s)
        # Sites that lost the coordinator together do not all come back together: up to half of the wait is cut off.
        drawn = hashlib.sha256(self.ticket + attempt.to_bytes(8, "big")).digest()[0] / 256
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._hurry, longest * (1 - drawn / 2))
            self._hurry = False

    def _once(self) -> tuple[bool, str]:
        """One link from its opening to its end: (whether it stood, the final code or "")."""
        stood, final = False, ""
        link = _Link()
        channel: grpc.Channel | None = None
        try:
            channel = self._channel()
            call = rpc.ConsortiumStub(channel).Relay(self._up(link))  # type: ignore[no-untyped-call]
            self._call = call
            if self._over:
                return False, ""
            # A server that takes the call and then says nothing must not hold us for ever.
            greeting = threading.Timer(self._timings.greeting_s, call.cancel)
            greeting.daemon = True
            greeting.start()
            try:
                first = next(call, None)
            finally:
                greeting.cancel()
            if first is None:
                return False, ""
            if first.code:
                return False, _final(first.code)
            stood = self._known = True
            self._stands(link, first)
            for frame in call:
                if frame.code:
                    final = _final(frame.code)
                    break
                self._question(frame)
                if not self.alive:
                    break
        except grpc.RpcError as error:
            ended = cast("object", error)  # what a stub raises is a Call as well, which the type stubs deny
            if isinstance(ended, grpc.Call) and ended.code() in _REFUSED:
                final = Code.REVOKED
        except (CohortiumError, OSError, ValueError):
            pass  # no channel now: an unreadable certificate, a broken network; the next attempt may find better
        finally:
            with self._changed:
                link.over, self._connected, self._call = True, False, None
                self._changed.notify_all()
            if channel is not None:
                channel.close()
        return stood, final

    def _stands(self, link: _Link, first: pb.Frame) -> None:
        with self._changed:
            self._state.resume(first.ack, first.envelope)
            link.cursor, link.open = first.ack, True
            self._connected = True
            self._changed.notify_all()

    def _up(self, link: _Link) -> Iterator[pb.Frame]:
        """What goes to the hub on one link: the opening, then answers as they come."""
        state = self._state
        yield pb.Frame(run=self.run, ticket=self.ticket, ack=state.received, envelope=state.numbering)
        while True:
            with self._changed:
                while not link.over and not (link.open and state.after(link.cursor) is not None):
                    self._changed.wait()
                if link.over:
                    return
                number = state.after(link.cursor)
                assert number is not None
                link.cursor = number
                envelope, code = state.kept[number]
                frame = pb.Frame(seq=number, ack=state.received, envelope=envelope, code=code)
            yield frame

    def _question(self, frame: pb.Frame) -> None:
        number = frame.seq
        with self._changed:
            self._state.acknowledged(frame.ack)
            if number == 0 or not self._state.take(number):
                return
        envelope, code = self._asked(frame.envelope)
        with self._changed:
            self._state.answer(number, envelope, code)
            self._changed.notify_all()

    def _asked(self, envelope: bytes) -> tuple[bytes, str]:
        """The guard's answer, or the fixed code in its place."""
        try:
            answer = self._guard.handle(envelope)
        except BaseException as error:
            down = isinstance(error, CohortiumError) and error.code == "GUARD-DOWN"
            return b"", Refusal.NO_GUARD if down else Refusal.GUARD_FAILED
        if not answer:
            return b"", Refusal.GUARD_FAILED
        return (answer, "") if len(answer) <= MOST_RELAY_BYTES else (b"", Refusal.TOO_LARGE)


@dataclass(slots=True)
class _Link:
    """One attempt's place in the answers; shared with the thread that sends."""

    cursor: int = 0
    open: bool = False
    over: bool = False


def _final(code: str) -> str:
    """The code if it ends the stream for good. BUSY does not, and a newer hub's new word is no reason to come again."""
    with contextlib.suppress(ValueError):
        if Code(code) not in FINAL:
            return ""
    return code

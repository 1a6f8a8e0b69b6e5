"""Envelopes to sites and back over streams: Flower asks each courier once to open one, the hub carries the rest.

The ServerApp's process talks to the hub over a Unix socket and to Flower's Grid only to ask for streams: at the start,
and again for a site whose stream has been lost for some seconds. So a courier, a guard, a hub or a link that dies comes
back into the run at the next question, and what was asked meanwhile counts as unanswered, as with any other transport.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import grpc

from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.relaying import TICKET_BYTES, Code, check_run, invitation
from cohortium.common.protocol.service import MOST_RELAY_BYTES
from cohortium.common.protocol.sockets import local_options
from cohortium.server.transport import Absence, GridCourier

LOOK_S = 0.5
"""How often a wait looks whether the run was stopped; answers wake it at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds. reopen: how long a stream may be lost before Flower is asked for it again; reopen_again: between two
    such asks. message: how long one ask holds up the next; it stays valid for longer. opening: what discover grants the
    streams after the hellos. lost: an exchange waits no longer than this for a site without a stream. hub: between two
    attempts to reach it."""

    reopen_s: float = 2.0
    reopen_again_s: float = 5.0
    message_s: float = 10.0
    opening_s: float = 40.0
    lost_s: float = 60.0
    hub_s: float = 0.2


class StreamCourier:
    """A RunCourier over the hub: discover() first, then exchange(), then close().

    grid: the courier over Flower's Grid, used for nothing but hellos and asking for streams. socket: the hub's.
    stop: when set, the next wait raises PeerUnreachable RUN-STOPPED. absent: why sites are missing from the last
    exchange. ignored: how many answers came that nobody waited for.
    """

    def __init__(
        self,
        grid: GridCourier,
        *,
        socket: Path,
        run: str,
        stop: threading.Event | None = None,
        timings: Timings | None = None,
    ) -> None:
        if not check_run(run):
            raise UsageError("STREAM-RUN", "that cannot be the name of a run", where=(run[:80],))
        self._grid, self._run = grid, run
        self._stop, self._timings = stop or threading.Event(), timings or Timings()
        self._changed = threading.Condition()
        self._tickets: dict[str, bytes] = {}
        self._lost: dict[str, float] = {}  # site without a stream -> since when
        self._asked: dict[str, float] = {}  # when Flower was last asked for a site's stream
        self._named: set[str] = set()  # sites that the hub knows by this attempt's ticket
        self._exchange = 0
        self._waiting: dict[str, bytes] = {}  # this exchange's questions without an answer
        self._answers: dict[str, tuple[bytes, str]] = {}
        self._over = self._replaced = False
        self._threads: list[threading.Thread] = []
        self._hub = _HubLink(socket, self._timings.hub_s, self._attachments, self._heard, self._down)
        self.absent: dict[str, Absence] = {}
        self.ignored = 0

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that said hello, sorted; not all of them need have a stream at the moment."""
        return tuple(sorted(self._tickets))

    @property
    def connected(self) -> tuple[str, ...]:
        """The sites that have a stream now, sorted."""
        with self._changed:
            return tuple(sorted(set(self._tickets) - set(self._lost)))

    def discover(self, expected: Collection[str], *, timeout_s: float, quorum: int | None = None) -> tuple[str, ...]:
        """Say hello over Flower, ask each site that is there for a stream, wait until all have one or time is up.

        Returns the sites that have a stream, sorted. Raises what GridCourier.discover raises, and PeerUnreachable
        STREAM-TOO-FEW where fewer than `quorum` (default: all expected) have a stream in time; HUB-DOWN without a hub.
        """
        deadline = time.monotonic() + timeout_s
        found = self._grid.discover(expected, timeout_s=timeout_s, quorum=quorum)
        now = time.monotonic()
        with self._changed:
            # New tickets for each attempt: couriers of an earlier one cannot answer for this.
            self._tickets = {site: secrets.token_bytes(TICKET_BYTES) for site in found}
            self._lost = dict.fromkeys(found, now)
            self._asked, self._named = {}, set()
        if not self._threads:
            self._threads.append(_started(self._hub.keep, "hub-link"))
            self._threads.append(_started(self._reopen, "stream-opener"))
        else:
            self._hub.again()
        with self._changed:
            # Those who need a moment more than Flower's hello gets the stream's own opening time on top.
            deadline = max(deadline, now + self._timings.opening_s)
            self._await(lambda: not self._lost, deadline)
            there = sorted(set(self._tickets) - set(self._lost))
        if not there and not self._hub.there:
            raise PeerUnreachable(
                "HUB-DOWN", "the hub does not answer", hint="`cohortium serve` runs it; start that, then resume the run"
            )
        if len(there) < (len(set(expected)) if quorum is None else quorum):
            raise PeerUnreachable(
                "STREAM-TOO-FEW",
                f"{len(there)} of {len(set(expected))} sites opened a stream within {timeout_s:g} s",
                where=tuple(sorted(set(expected) - set(there))),
                hint="can these sites reach the coordinator's service port? `cohortium site check` there says so; "
                "or run over Flower alone: --transport flower",
            )
        return tuple(there)

    def exchange(
        self,
        messages: Mapping[str, bytes],
        *,
        timeout_s: float,
        quorum: int | None = None,
        grace_s: float = 5.0,
        label: str = "",
    ) -> dict[str, bytes]:
        """Send each site its envelope; the envelopes that came back, keyed by site, in sorted order.

        Waits as GridCourier.exchange does: until every site answered or is known to be absent, at most timeout_s; with
        `quorum`, at most grace_s more after so many came. A site without a stream is waited for until it has been
        without for `lost_s`. label is for people; it is not sent.
        """
        started = time.monotonic()
        deadline, late = started + timeout_s, Absence.TIMEOUT
        absent: dict[str, Absence] = {}
        with self._changed:
            self._exchange += 1
            self._answers = {}
            self._waiting = {}
            for site in sorted(messages):
                if site not in self._tickets:
                    absent[site] = Absence.UNKNOWN
                elif len(messages[site]) > MOST_RELAY_BYTES:
                    absent[site] = Absence.NOT_SENT
                elif self._gone(site, started):
                    absent[site] = late
                else:
                    self._waiting[site] = messages[site]
            for site in self._waiting:
                self._hub.say(self._question(site))
            while self._waiting:
                if quorum is not None and len(self._envelopes()) >= quorum:
                    if time.monotonic() + grace_s < deadline:
                        deadline, late = time.monotonic() + grace_s, Absence.STOPPED
                    quorum = None
                before = len(self._waiting)
                self._await(lambda: len(self._waiting) < before, deadline, lambda now: self._given_up(now, absent))  # noqa: B023
                if time.monotonic() >= deadline:
                    break
            absent |= dict.fromkeys(self._waiting, late)
            self._waiting = {}
            absent |= {site: Absence.REFUSED for site, (_, code) in self._answers.items() if code}
            self.absent = absent
            return dict(sorted(self._envelopes().items()))

    def close(self) -> None:
        """End the sites' streams and let the hub go."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._hub.end(pb.HubFrame(run=self._run, code=Code.END))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- waiting --------------------------------------------------------------------------------------------

    def _await(
        self, done: Callable[[], bool], deadline: float, also: Callable[[float], bool] = lambda now: False
    ) -> None:
        """With the lock: wait until `done`, or the deadline, or until `also`, which is asked now and then."""
        while not done():
            if self._replaced:
                raise PeerUnreachable("RUN-REPLACED", "another process drives this run now")
            if self._stop.is_set():
                raise PeerUnreachable("RUN-STOPPED", "the run was stopped while it waited for sites")
            now = time.monotonic()
            if now >= deadline or also(now):
                return
            self._changed.wait(min(deadline - now, LOOK_S))

    def _given_up(self, now: float, absent: dict[str, Absence]) -> bool:
        """Take sites whose stream has been lost for too long out of this exchange; whether there were any."""
        gone = [site for site in self._waiting if self._gone(site, now)]
        for site in gone:
            del self._waiting[site]
            absent[site] = Absence.TIMEOUT
        return bool(gone)

    def _gone(self, site: str, now: float) -> bool:
        return now - self._lost.get(site, now) >= self._timings.lost_s

    def _envelopes(self) -> dict[str, bytes]:
        return {site: envelope for site, (envelope, code) in self._answers.items() if not code}

    # ---- the hub --------------------------------------------------------------------------------------------

    def _question(self, site: str) -> pb.HubFrame:
        return pb.HubFrame(run=self._run, site=site, exchange=self._exchange, envelope=self._waiting[site])

    def _attachments(self, use: Callable[[Sequence[pb.HubFrame]], None]) -> None:
        """What a new connection to the hub begins with: who takes part, and what is still unanswered."""
        with self._changed:
            named = [
                pb.HubFrame(run=self._run, site=site, code=Code.ATTACH, ticket=ticket)
                for site, ticket in self._tickets.items()
            ]
            self._named = set()
            use([*named, *(self._question(site) for site in self._waiting)])
            self._changed.notify_all()

    def _down(self) -> None:
        """The hub is gone, and with it every stream, until it says otherwise."""
        with self._changed:
            now = time.monotonic()
            for site in self._tickets:
                self._lost.setdefault(site, now)
            self._changed.notify_all()

    def _heard(self, frame: pb.HubFrame) -> bool:
        """One frame of the hub; False where another ServerApp drives this run now."""
        site, code = frame.site, frame.code
        with self._changed:
            if frame.exchange:
                if frame.exchange == self._exchange and site in self._waiting:
                    del self._waiting[site]
                    self._answers[site] = (frame.envelope, code)
                else:
                    self.ignored += 1
            elif code in (Code.CONNECTED, Code.LOST) and site in self._tickets:
                self._named.add(site)
                if code == Code.CONNECTED:
                    self._lost.pop(site, None)
                else:
                    self._lost.setdefault(site, time.monotonic())
            elif code == Code.REPLACED:
                self._replaced = True
            self._changed.notify_all()
        return code != Code.REPLACED

    # ---- Flower ---------------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        """In a thread of its own, the only one that uses the Grid after discover: ask for streams that are missing."""
        while True:
            with self._changed:
                if self._over:
                    return
                now = time.monotonic()
                due = [site for site in self._lost if self._due(site, now)] if self._hub.there else []
                if not due:
                    self._changed.wait(LOOK_S)
                    continue
                self._asked |= dict.fromkeys(due, now)
                tickets = {site: self._tickets[site] for site in due}
            # The SuperLink may be away for a while; the run goes on with the streams that stand.
            with contextlib.suppress(Exception):
                self._grid.invite(
                    {site: invitation(self._run, ticket) for site, ticket in tickets.items()},
                    wait_s=self._timings.message_s,
                )

    def _due(self, site: str, now: float) -> bool:
        """Not before the hub has heard of the site: a courier that comes first is turned away, and asked again late."""
        if site not in self._named:
            return False
        asked = self._asked.get(site)
        if asked is None:
            return True
        return now - self._lost[site] >= self._timings.reopen_s and now - asked >= self._timings.reopen_again_s


class _HubLink:
    """The connection to the hub, made again whenever it breaks.

    begin(use): gives `use` the frames that a connection begins with, while no other frame can be said. heard(frame):
    False ends it all. down(): the connection is gone.
    """

    def __init__(
        self,
        socket: Path,
        again_s: float,
        begin: Callable[[Callable[[Sequence[pb.HubFrame]], None]], None],
        heard: Callable[[pb.HubFrame], bool],
        down: Callable[[], None],
    ) -> None:
        self._path, self._again_s = Path(socket), again_s
        self._begin, self._heard, self._down = begin, heard, down
        self._outbox: SimpleQueue[pb.HubFrame | None] = SimpleQueue()
        self._call: grpc.Call | None = None
        self._over, self._ended = threading.Event(), threading.Event()
        self.there = False

    def say(self, frame: pb.HubFrame) -> None:
        """On its way if the hub is there; else the next connection begins with what is still to be said."""
        self._outbox.put(frame)

    def again(self) -> None:
        """Begin a new connection: what it begins with has changed."""
        call = self._call
        if call is not None:
            call.cancel()

    def end(self, farewell: pb.HubFrame, *, wait_s: float = 5.0) -> None:
        """The last word; waits a moment for the hub to have heard it."""
        self._over.set()
        if self.there:
            self._outbox.put(farewell)
            self._ended.wait(wait_s)
        self.again()

    def keep(self) -> None:
        """In a thread: connect, listen, connect again."""
        try:
            while self._once() and not self._over.wait(self._again_s):
                pass
        finally:
            self._ended.set()

    def _once(self) -> bool:
        """One connection; False when it was the last."""
        outbox: SimpleQueue[pb.HubFrame | None] = SimpleQueue()
        channel = grpc.insecure_channel(f"unix:{self._path.absolute()}", options=local_options())

        def use(frames: Sequence[pb.HubFrame]) -> None:
            for frame in frames:
                outbox.put(frame)
            self._outbox, self.there = outbox, True

        try:
            grpc.channel_ready_future(channel).result(timeout=5.0)
            self._begin(use)
            self._call = call = rpc.HubStub(channel).Attach(iter(outbox.get, None))  # type: ignore[no-untyped-call]
            for frame in call:
                if not self._heard(frame) or frame.code == Code.END:
                    return False
        except (grpc.RpcError, grpc.FutureTimeoutError):
            pass
        finally:
            self.there, self._call = False, None
            self._down()
            outbox.put(None)
            channel.close()
        return True


def _started(work: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread

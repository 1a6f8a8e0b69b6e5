"""The switchboard between the run's ServerApp and the sites' streams. It never looks into an envelope.

    ServerApp --Attach (Unix socket)--> Hub <--Relay (mutual TLS, common/protocol/consortium.proto)-- couriers

A run is known here while a ServerApp is attached, and a little longer, so that one that was cut off finds its streams
again. A site speaks for the name in its certificate and for no other, in runs that name it, with the ticket of that
run's current attempt.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.relaying import MOST_UNANSWERED, TICKET_BYTES, Asking, Code, check_run
from cohortium.common.protocol.service import MOST_RELAY_BYTES
from cohortium.common.protocol.sockets import bind, local_options, only_one

MOST_RUNS = 32
MOST_SITES = 200
MOST_OPENING = 4
"""Streams of one site that have not said yet what they want."""
MOST_IDLE = 64
"""Frames in a row that answer nothing."""
NUMBERING_BYTES = 16
_COURIER_CODE = re.compile(r"COURIER-[A-Z-]{1,40}")
_BAD_ANSWER = "COURIER-BAD-FRAME"
_GONE = ""


@dataclass(kw_only=True, slots=True, eq=False)
class _Stream:
    """One Relay call. over: None while it lives, then the code that ends it, or _GONE."""

    site: str
    wake: threading.Condition
    opening: pb.Frame | None = None
    run: str = ""
    line: _Line | None = None
    cursor: int = 0
    idle: int = 0
    counted: bool = False
    over: str | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class _Line:
    """One site of one run: what outlives a stream."""

    ticket: bytes
    asking: Asking
    stream: _Stream | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class _Attachment:
    """One Attach call: a ServerApp. outbox: (site, exchange, envelope, code)."""

    wake: threading.Condition
    run: str = ""
    named: set[str] = field(default_factory=set)
    asked: bool = False
    outbox: deque[tuple[str, int, bytes, str]] = field(default_factory=deque)
    over: str | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class _Run:
    lines: dict[str, _Line] = field(default_factory=dict)
    attachment: _Attachment | None = None
    farewell: threading.Timer | None = None


class Hub:
    """One for the whole process. Every method may be called from any thread.

    max_envelope_bytes: nothing longer passes. opening_s: how long a new stream may be silent. linger_s: how long
    streams wait for a ServerApp that went without a word.
    """

    def __init__(
        self, *, max_envelope_bytes: int = MOST_RELAY_BYTES, opening_s: float = 10.0, linger_s: float = 60.0
    ) -> None:
        self.max_envelope_bytes = max_envelope_bytes
        self._opening_s, self._linger_s = opening_s, linger_s
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        self._opening: Counter[str] = Counter()
        self._attachments: set[_Attachment] = set()
        self._streams: set[_Stream] = set()
        self._held: list[int] = []
        self._closed = False

    # ---- for the service ------------------------------------------------------------------------------------

    def relay(self, site: str, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        """One stream of a site whose certificate has been checked. Ends with a frame that holds a code, or without one
        where the courier should come again. Holds a thread of the server as long as it lives."""
        stream = _Stream(site=site, wake=threading.Condition(self._lock))
        with self._lock:
            if self._closed:
                return
            busy = self._opening[site] >= MOST_OPENING
            if not busy:
                self._opening[site] += 1
                stream.counted = True
                self._streams.add(stream)
        if busy:
            yield pb.Frame(code=Code.BUSY)
            return
        try:
            if not context.add_callback(lambda: self._end(stream, _GONE)):
                return
            _start(lambda: self._listen(stream, frames), "relay")
            said = self._opened(stream)
            if said is not None:
                yield said
            while (down := self._next(stream)) is not None:
                yield down
            if stream.over:
                yield pb.Frame(code=stream.over)
        finally:
            self._end(stream, _GONE)
            with self._lock:
                self._settle(stream)
                self._streams.discard(stream)

    def attach(self, frames: Iterator[pb.HubFrame], context: grpc.ServicerContext) -> Iterator[pb.HubFrame]:
        """One ServerApp, from its first ATTACH to its END."""
        attachment = _Attachment(wake=threading.Condition(self._lock))
        with self._lock:
            if self._closed:
                return
            self._attachments.add(attachment)
        try:
            if not context.add_callback(lambda: self._detach(attachment, _GONE)):
                return
            _start(lambda: self._hear(attachment, frames), "attach")
            while True:
                with self._lock:
                    while not attachment.outbox and attachment.over is None:
                        attachment.wake.wait()
                    if attachment.over is not None:
                        break
                    site, exchange, envelope, code = attachment.outbox.popleft()
                yield pb.HubFrame(run=attachment.run, site=site, exchange=exchange, envelope=envelope, code=code)
            if attachment.over:
                yield pb.HubFrame(run=attachment.run, code=attachment.over)
        finally:
            self._detach(attachment, _GONE)
            with self._lock:
                self._attachments.discard(attachment)

    def revoke(self, site: str) -> None:
        """Cut every stream of a site. That no new one is opened is the service's business."""
        with self._lock:
            for stream in [stream for stream in self._streams if stream.site == site]:
                self._finish(stream, Code.REVOKED)

    def connected(self, run: str) -> tuple[str, ...]:
        """The sites that have a stream in this run, sorted."""
        with self._lock:
            lines = self._runs[run].lines if run in self._runs else {}
            return tuple(sorted(site for site, line in lines.items() if line.stream is not None))

    def hold(self, lock: int) -> None:
        """Keep the lock of a socket that this hub is served on until `close`."""
        self._held.append(lock)

    def close(self) -> None:
        """Let all streams go without a code: their couriers look for the next hub."""
        with self._lock:
            self._closed = True
            for stream in list(self._streams):
                self._finish(stream, _GONE)
            for attachment in list(self._attachments):
                attachment.over = _GONE
                attachment.wake.notify_all()
            for run in self._runs.values():
                if run.farewell is not None:
                    run.farewell.cancel()
            held, self._held = self._held, []
        for lock in held:
            os.close(lock)

    # ---- couriers -------------------------------------------------------------------------------------------

    def _opened(self, stream: _Stream) -> pb.Frame | None:
        """Wait for the courier's first frame and connect it; the hub's own first frame, None if refused."""
        with self._lock:
            stream.wake.wait_for(lambda: stream.opening is not None or stream.over is not None, self._opening_s)
            self._settle(stream)
            if stream.over is not None:
                return None
            if stream.opening is None:
                stream.over = Code.BAD_FRAME
                return None
            first = stream.opening
            run = self._runs.get(first.run)
            line = None if run is None else run.lines.get(stream.site)
            if run is None or line is None:
                # A site that the run does not name learns no more than one that guesses a name.
                stream.over = Code.UNKNOWN_RUN
                return None
            if not hmac.compare_digest(line.ticket, first.ticket):
                stream.over = Code.WRONG_TICKET
                return None
            try:
                stream.cursor = line.asking.resume(first.ack, first.envelope)
            except ProtocolError:
                stream.over = Code.BAD_FRAME
                return None
            if line.stream is not None:
                self._finish(line.stream, Code.SUPERSEDED)
            stream.run, stream.line, line.stream = first.run, line, stream
            self._tell(run, stream.site, code=Code.CONNECTED)
            return pb.Frame(ack=line.asking.received, envelope=line.asking.numbering)

    def _settle(self, stream: _Stream) -> None:
        """With the lock: this stream no longer counts as one that is opening."""
        if stream.counted:
            stream.counted = False
            self._opening[stream.site] -= 1
            if not self._opening[stream.site]:
                del self._opening[stream.site]

    def _next(self, stream: _Stream) -> pb.Frame | None:
        """The next question to this site, as soon as there is one; None at the stream's end."""
        with self._lock:
            while stream.over is None and stream.line is not None:
                found = stream.line.asking.after(stream.cursor)
                if found is not None:
                    stream.cursor, envelope = found
                    received = stream.line.asking.received
                    break
                stream.wake.wait()
            else:
                return None
        return pb.Frame(seq=stream.cursor, ack=received, envelope=envelope)

    def _listen(self, stream: _Stream, frames: Iterator[pb.Frame]) -> None:
        with contextlib.suppress(Exception):  # the call was cancelled, or the link broke
            for frame in frames:
                if not self._answer(stream, frame):
                    return  # a code is on its way down
        self._end(stream, _GONE)

    def _answer(self, stream: _Stream, frame: pb.Frame) -> bool:
        """One frame from a courier; False when nothing more of it is wanted."""
        number, envelope, code = frame.seq, frame.envelope, frame.code
        with self._lock:
            if stream.over is not None:
                return False
            if stream.opening is None:
                stream.opening = frame
                stream.wake.notify_all()
                return True
            if stream.line is None:
                self._finish(stream, Code.BAD_FRAME)
                return False
            exchange = stream.line.asking.answered(number)
            if exchange is None:
                stream.idle += 1
                if stream.idle > MOST_IDLE:
                    self._finish(stream, Code.BAD_FRAME)
                return stream.over is None
            stream.idle = 0
            too_large = len(envelope) > self.max_envelope_bytes
            if too_large or bool(code) == bool(envelope) or (code and not _COURIER_CODE.fullmatch(code)):
                envelope, code = b"", _BAD_ANSWER
            self._tell(self._runs[stream.run], stream.site, exchange=exchange, envelope=envelope, code=code)
            if too_large:
                self._finish(stream, Code.TOO_LARGE)
            return not too_large

    def _end(self, stream: _Stream, code: str) -> None:
        with self._lock:
            self._finish(stream, code)

    def _finish(self, stream: _Stream, code: str) -> None:
        """With the lock: this stream is over. The first code counts."""
        if stream.over is None:
            stream.over = code
            stream.wake.notify_all()
        line, stream.line = stream.line, None
        if line is not None and line.stream is stream:
            line.stream = None
            run = self._runs.get(stream.run)
            if run is not None and run.lines.get(stream.site) is line:
                self._tell(run, stream.site, code=Code.LOST)

    # ---- ServerApps -----------------------------------------------------------------------------------------

    def _tell(self, run: _Run, site: str, *, exchange: int = 0, envelope: bytes = b"", code: str = "") -> None:
        """With the lock: a word to the run's ServerApp, if one is there."""
        attachment = run.attachment
        if attachment is None or attachment.over is not None:
            return
        attachment.outbox.append((site, exchange, envelope, code))
        if len(attachment.outbox) > 2 * (MOST_UNANSWERED + 2) * len(run.lines) + MOST_IDLE:
            attachment.over = Code.SLOW
        attachment.wake.notify_all()

    def _hear(self, attachment: _Attachment, frames: Iterator[pb.HubFrame]) -> None:
        with contextlib.suppress(Exception):
            for frame in frames:
                with self._lock:
                    code = self._obey(attachment, frame)
                if code is not None:
                    self._detach(attachment, code)
                    return
        self._detach(attachment, _GONE)

    def _obey(self, attachment: _Attachment, frame: pb.HubFrame) -> str | None:
        """With the lock: one frame of a ServerApp; the code that ends its call, or None."""
        if attachment.over is not None:
            return attachment.over
        if frame.code == Code.ATTACH:
            return self._name(attachment, frame)
        run = self._runs.get(attachment.run)
        if run is None or run.attachment is not attachment or frame.run != attachment.run:
            return Code.BAD_FRAME
        if frame.code == Code.END:
            self._forget(attachment.run)
            return Code.END
        if not attachment.asked:
            attachment.asked = True
            for site in [site for site in run.lines if site not in attachment.named]:
                self._drop(run, site)  # sites of an earlier attempt
        line = run.lines.get(frame.site)
        if frame.code or line is None or len(frame.envelope) > self.max_envelope_bytes:
            return Code.BAD_FRAME
        line.asking.ask(frame.exchange, frame.envelope)
        if line.stream is not None:
            line.stream.wake.notify_all()
        return None

    def _name(self, attachment: _Attachment, frame: pb.HubFrame) -> str | None:
        """With the lock: a site and its ticket. The same ticket keeps what an earlier call of this attempt had."""
        if not check_run(frame.run) or not frame.site or len(frame.ticket) != TICKET_BYTES:
            return Code.BAD_FRAME
        if not attachment.run:
            if frame.run not in self._runs and len(self._runs) >= MOST_RUNS:
                return Code.BUSY
            run = self._runs.setdefault(frame.run, _Run())
            if run.farewell is not None:
                run.farewell.cancel()
                run.farewell = None
            if run.attachment is not None:
                run.attachment.over = Code.REPLACED
                run.attachment.wake.notify_all()
            attachment.run, run.attachment = frame.run, attachment
        run = self._runs.get(frame.run) or _Run()
        if run.attachment is not attachment or len(attachment.named) >= MOST_SITES:
            return Code.BAD_FRAME
        line = run.lines.get(frame.site)
        if line is not None and not hmac.compare_digest(line.ticket, frame.ticket):
            self._drop(run, frame.site)
            line = None
        if line is None:
            asking = Asking(numbering=secrets.token_bytes(NUMBERING_BYTES))
            line = run.lines[frame.site] = _Line(ticket=frame.ticket, asking=asking)
        attachment.named.add(frame.site)
        # Either word says that a courier may come now: before, it would be told that nobody knows the run.
        self._tell(run, frame.site, code=Code.LOST if line.stream is None else Code.CONNECTED)
        return None

    def _detach(self, attachment: _Attachment, code: str) -> None:
        """A ServerApp has gone; its streams wait a little for the next call of the same attempt."""
        with self._lock:
            if attachment.over is None:
                attachment.over = code
            attachment.wake.notify_all()
            run = self._runs.get(attachment.run)
            if run is None or run.attachment is not attachment or self._closed:
                return
            run.attachment = None
            run.farewell = threading.Timer(self._linger_s, self._expire, (attachment.run, run))
            run.farewell.daemon = True
            run.farewell.start()

    def _expire(self, name: str, run: _Run) -> None:
        with self._lock:
            if self._runs.get(name) is run and run.attachment is None:
                self._forget(name)

    def _forget(self, name: str) -> None:
        run = self._runs.pop(name)
        for site in list(run.lines):
            self._drop(run, site)
        run.attachment = None

    def _drop(self, run: _Run, site: str) -> None:
        line = run.lines.pop(site)
        if line.stream is not None:
            self._finish(line.stream, Code.END)


class _HubService(rpc.HubServicer):
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def Attach(self, request_iterator: Iterator[pb.HubFrame], context: grpc.ServicerContext) -> Iterator[pb.HubFrame]:
        return self._hub.attach(request_iterator, context)


def serve_hub(hub: Hub, socket: Path) -> grpc.Server:
    """The hub's Unix socket, mode 0600, started. Stop it with `server.stop` and `hub.close`.

    Refused SOCKET-BUSY where another process serves this socket; UsageError SOCKET-PATH.
    """
    lock = only_one(socket.with_suffix(".lock"))
    try:
        server = grpc.server(
            ThreadPoolExecutor(max_workers=MOST_RUNS, thread_name_prefix="hub"),
            options=local_options(max_envelope_bytes=hub.max_envelope_bytes),
            maximum_concurrent_rpcs=MOST_RUNS,
        )
        rpc.add_HubServicer_to_server(_HubService(hub), server)  # type: ignore[no-untyped-call]
        bind(server, socket, mode=0o600)
        server.start()
    except BaseException:
        os.close(lock)
        raise
    hub.hold(lock)
    return server


def _start(work: Callable[[], None], name: str) -> None:
    threading.Thread(target=work, name=f"hub-{name}", daemon=True).start()

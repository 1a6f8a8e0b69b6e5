"""The courier: the Flower ClientApp of a hospital. It holds no data and no keys and understands no envelope.

It takes the envelope out of a message, hands it to the guard, and sends back the guard's bytes; or, asked once, it
opens a stream to the coordinator that does the same without Flower. Whatever goes wrong, one of few fixed codes leaves
and no text: Flower would send an exception's words to the server verbatim. Nothing here imports torch, pandas or the
data code; the guard does.

Where the guard and the coordinator are is the hospital's word alone, in the courier's environment:
    COHORTIUM_GUARD_SOCKET   the guard's Unix socket
    COHORTIUM_COURIER_DIR    the courier's directory, with its certificate and the coordinator's address
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cohortium.common.protocol.flower import CARRY, HELLO, STREAM, Parcel, Refusal, reply, unpack

if TYPE_CHECKING:
    from cohortium.client.stream import Streams

SOCKET = "COHORTIUM_GUARD_SOCKET"
DIRECTORY = "COHORTIUM_COURIER_DIR"


class GuardPort(Protocol):
    """The guard as the courier sees it: a name for routing, and bytes to bytes."""

    @property
    def site(self) -> str: ...

    def handle(self, envelope: bytes) -> bytes: ...

    def close(self) -> None: ...


Opener = Callable[[Path], GuardPort]


def open_in_process(directory: Path) -> GuardPort:
    """The guard of a site's directory, in this process and in no other: simulations only."""
    from cohortium.client.guard import open_guard

    return open_guard(directory)


def open_shared(directory: Path) -> GuardPort:
    """The same where several processes take turns at one site, as on Ray."""
    from cohortium.client.guard import open_shared_guard

    return open_shared_guard(directory)


def open_socket(socket: Path) -> GuardPort:
    """The guard behind a Unix socket: the field."""
    from cohortium.client.guard_port import SocketGuard

    return SocketGuard(socket)


@dataclass(frozen=True, kw_only=True, slots=True)
class Courier:
    """The three handlers, and where to find the guard.

    directories: in a simulation the site directory of each partition; empty in the field, where only the
    hospital's own environment and node configuration say where the guard is. The run's configuration is never
    asked: the coordinator writes that one. streams: None for those of this process's environment.
    A module-level class, so that Ray pickles it by reference and the guards stay cached in its workers.
    """

    directories: tuple[Path, ...] = ()
    opener: Opener = open_in_process
    streams: Streams | None = None

    def hello(self, message: Message, context: Context) -> Message:
        """Which site is this? The label only; a guard that cannot be opened says so by code."""
        try:
            parcel = Parcel(site=self._guard(context).site)
        except KeyboardInterrupt:
            raise
        except BaseException:
            parcel = Parcel(refusal=Refusal.NO_GUARD)
        return reply(parcel, to=message)

    def carry(self, message: Message, context: Context) -> Message:
        """Envelope in, envelope out, or a fixed code."""
        return reply(self._carry(message, context), to=message)

    def stream(self, message: Message, context: Context) -> Message:
        """Open, or get back, the stream of a run; answers when it stands."""
        return reply(self._stream(message, context), to=message)

    def _stream(self, message: Message, context: Context) -> Parcel:
        try:
            said = unpack(message.content).envelope
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Parcel(refusal=Refusal.BAD_PARCEL)
        try:
            guard = self._guard(context)
            site = guard.site
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Parcel(refusal=Refusal.NO_GUARD)
        try:
            refusal = (self.streams or _streams(guard)).invited(said)
        except KeyboardInterrupt:
            raise
        except BaseException:
            refusal = Refusal.NO_STREAM
        return Parcel(refusal=refusal) if refusal is not None else Parcel(site=site)

    def _carry(self, message: Message, context: Context) -> Parcel:
        # BaseException, because SystemExit too would reach the server with its text. Ctrl-C has no text and
        # must stop a simulation.
        try:
            envelope = unpack(message.content).envelope
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Parcel(refusal=Refusal.BAD_PARCEL)
        try:
            guard = self._guard(context)
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Parcel(refusal=Refusal.NO_GUARD)
        try:
            return Parcel(envelope=guard.handle(envelope), site=guard.site)
        except BaseException as error:
            # What the guard holds in memory may be half done: the next message opens it again from disk.
            _forget(guard)
            if isinstance(error, KeyboardInterrupt):
                raise
            return Parcel(refusal=Refusal.GUARD_FAILED)

    def _guard(self, context: Context) -> GuardPort:
        directory = context.node_config.get("site-directory")
        if directory is None and not self.directories:
            return _opened_socket(str(context.node_config.get("guard-socket") or os.environ[SOCKET]))
        if directory is None:
            directory = self.directories[int(context.node_config["partition-id"])]
        return _opened(Path(str(directory)), self.opener)


# Ray may run any site's message in any of its processes, so guards are cached per process and keep their
# state on disk; each guard checks for itself that what it remembers is what the disk says. The directory's
# inode is part of the key: a directory that was deleted and made anew is another site.
_open_guards: dict[tuple[str, int, int], GuardPort] = {}
_lock = threading.Lock()


def _opened(directory: Path, opener: Opener) -> GuardPort:
    status = os.stat(directory)
    key = (str(directory), status.st_dev, status.st_ino)
    with _lock:
        guard = _open_guards.get(key)
        if guard is None:
            guard = _open_guards[key] = opener(directory)
        return guard


# In the field a process is one hospital's courier: one guard, one set of streams. A guard that was started again
# is found under the same name; its port sees to that itself.
_sockets: dict[str, GuardPort] = {}
_field_streams: list[Streams] = []


def _opened_socket(path: str) -> GuardPort:
    with _lock:
        if path not in _sockets:
            _sockets[path] = open_socket(Path(path))
        return _sockets[path]


def _streams(guard: GuardPort) -> Streams:
    """This process's streams, to the coordinator that the courier's directory names."""
    from cohortium.client.connect import open_channel
    from cohortium.client.stream import Streams

    directory = Path(os.environ[DIRECTORY])
    with _lock:
        if not _field_streams:
            _field_streams.append(Streams(guard=guard, channel=lambda: open_channel(directory)))
        return _field_streams[0]


def reconnect_streams() -> None:
    """Open the links of this process's streams anew: its certificate was renewed."""
    with _lock:
        known = list(_field_streams)
    for streams in known:
        streams.reconnect()


def _forget(guard: GuardPort) -> None:
    with _lock:
        if guard in _sockets.values():
            return  # it keeps nothing in this process, and a stream may be using it
        for key in [key for key, known in _open_guards.items() if known is guard]:
            del _open_guards[key]
    _close(guard)


def close_guards() -> None:
    """Close every guard and stream that this process opened; a simulation does so at its end."""
    with _lock:
        streams = list(_field_streams)
        guards = [*_open_guards.values(), *_sockets.values()]
        _field_streams.clear()
        _open_guards.clear()
        _sockets.clear()
    for stream in streams:
        stream.close()
    for guard in guards:
        _close(guard)


def _close(guard: GuardPort) -> None:
    # A guard that failed may fail again while it closes; its disk is the truth.
    with contextlib.suppress(Exception):
        guard.close()


def courier_app(courier: Courier) -> ClientApp:
    """The ClientApp around a courier."""
    client = ClientApp()
    client.query(HELLO)(courier.hello)
    client.query(CARRY)(courier.carry)
    client.query(STREAM)(courier.stream)
    return client


app = courier_app(Courier())

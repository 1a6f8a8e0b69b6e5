"""How Cohortium's own gRPC connections behave, the same at both ends: sizes, keep-alive, Unix sockets.

A dead link is noticed within keepalive_s + answer_s (20 s unless told otherwise), by the end that waits and by the end
that could send. No message is larger than an envelope may be.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cohortium.common.errors import Refused, UsageError
from cohortium.common.protocol.messages import MAX_ENVELOPE_BYTES

if TYPE_CHECKING:
    import grpc

Options = list[tuple[str, int]]

FRAME_ROOM_BYTES = 64 * 1024
"""What a frame holds beside its envelope."""
LONGEST_SOCKET_PATH = 107
CONNECTION_AGE_S = 12 * 3600
"""Connections are made anew before the certificate that opened them ends; streams resume."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepAlive:
    """ping_s: how long a connection may be silent before it is asked. answer_s: how long the answer may take."""

    ping_s: float = 10.0
    answer_s: float = 10.0

    def __post_init__(self) -> None:
        if not (self.ping_s > 0 and self.answer_s > 0):
            raise UsageError("SOCKET-KEEPALIVE", "keep-alive times are more than 0 seconds")


DEFAULT = KeepAlive()


def client_options(keep_alive: KeepAlive = DEFAULT, *, max_envelope_bytes: int = MAX_ENVELOPE_BYTES) -> Options:
    """Options of a channel across the network."""
    return [
        *_sizes(max_envelope_bytes),
        *_pings(keep_alive),
        # A coordinator that is back is found within seconds, and without asking the name servers for more than a name.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", 0),  # what may be sent again is decided by sequence numbers, not by the library
    ]


def server_options(keep_alive: KeepAlive = DEFAULT, *, max_envelope_bytes: int = MAX_ENVELOPE_BYTES) -> Options:
    """Options of a server across the network."""
    return [
        *_sizes(max_envelope_bytes),
        *_pings(keep_alive),
        # Without this a server takes its clients' pings for an attack and closes their connections.
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * keep_alive.ping_s / 2)),
        ("grpc.max_connection_age_ms", 1000 * CONNECTION_AGE_S),
        ("grpc.max_connection_age_grace_ms", 60_000),
        ("grpc.so_reuseport", 0),  # a second server on the same port fails instead of taking half the calls
    ]


def local_options(*, max_envelope_bytes: int = MAX_ENVELOPE_BYTES) -> Options:
    """Options of both ends of a Unix socket: no pings, because the kernel tells when a process is gone."""
    return [
        *_sizes(max_envelope_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def _sizes(max_envelope_bytes: int) -> Options:
    most = max_envelope_bytes + FRAME_ROOM_BYTES
    return [("grpc.max_receive_message_length", most), ("grpc.max_send_message_length", most)]


def _pings(keep_alive: KeepAlive) -> Options:
    return [
        ("grpc.keepalive_time_ms", round(1000 * keep_alive.ping_s)),
        ("grpc.keepalive_timeout_ms", round(1000 * keep_alive.answer_s)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def bind(server: grpc.Server, path: Path, *, mode: int) -> None:
    """Let a server listen on a Unix socket of that mode. UsageError SOCKET-PATH where none can be made.

    The socket appears under its name with its final mode: it is made in a private folder and moved, so that nobody can
    connect in between, and one that a crash left behind is replaced. The caller holds `only_one` for the name.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        made = Path(folder) / "s"
        if len(os.fsencode(made)) > LONGEST_SOCKET_PATH or len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            raise UsageError(
                "SOCKET-PATH",
                f"the path of a Unix socket may have {LONGEST_SOCKET_PATH} characters",
                where=(str(path),),
                hint="use a directory with a shorter path",
            )
        try:
            server.add_insecure_port(f"unix:{made}")
            os.chmod(made, mode)
            os.replace(made, path)
        except (RuntimeError, OSError):
            raise UsageError("SOCKET-PATH", "no Unix socket can be made there", where=(str(path),)) from None


def unbind(path: Path) -> None:
    """Remove a socket's name; its server must have stopped."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def only_one(path: Path) -> int:
    """Take the lock file of a service and write our process id into it; the descriptor holds the lock.

    Refused SOCKET-BUSY where another process has it. The system lets it go when the process ends, however it ends.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Refused(
            "SOCKET-BUSY",
            "another process of this service is running",
            where=(str(path),),
            hint="stop the process whose id is in that file, or wait for it to end",
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock

"""A public port of the coordinator: TLS 1.3 with certificates that may change while it serves, limits, no extras.

gRPC's health and reflection services are not there, because nothing but the given handlers is added.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc

from cohortium.common.errors import PeerUnreachable, Refused, UsageError
from cohortium.common.protocol.certificates import server_credentials
from cohortium.common.protocol.sockets import KeepAlive, server_options

PROBE_S = 5.0
_HANDSHAKE = 22
"""The first byte of a TLS record that goes on with a handshake (RFC 8446, 5.1)."""


class Listening:
    """A running server and the port it has. Ends as a grpc.Server does."""

    def __init__(self, server: grpc.Server, port: int, on_stop: Callable[[], None]) -> None:
        self.server, self.port, self._on_stop = server, port, on_stop

    def stop(self, grace: float | None = None) -> threading.Event:
        """Take no new call; open ones end within `grace` seconds. The event is set when all have."""
        self._on_stop()
        return self.server.stop(grace)

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """True if the time ran out first."""
        return self.server.wait_for_termination(timeout)


def listen(
    handlers: Sequence[grpc.GenericRpcHandler],
    *,
    host: str,
    port: int,
    chain: Path | bytes,
    key: Path | bytes,
    root: bytes,
    require_client: bool,
    threads: int,
    connections: int,
    most_bytes: int,
    on_stop: Callable[[], None] = lambda: None,
) -> Listening:
    """Serve, and prove on the port itself that TLS 1.2 is refused before anybody is told of it.

    host: an address to listen on; port 0 takes a free one. Raises UsageError PORT-BUSY, Refused TLS-VERSION.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_workers=threads, thread_name_prefix="call"),
        handlers=list(handlers),
        maximum_concurrent_rpcs=threads,
        options=[
            *server_options(KeepAlive(), max_envelope_bytes=most_bytes),
            ("grpc.max_concurrent_streams", 32),
            ("grpc.max_metadata_size", 8 * 1024),
            ("grpc.max_allowed_incoming_connections", connections),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 10 * 60_000),
        ],
    )
    address = f"[{host}]" if ":" in host else host
    try:
        got = server.add_secure_port(
            f"{address}:{port}", server_credentials(chain, key, root, require_client=require_client)
        )
    except RuntimeError:
        got = 0
    if not got:
        raise UsageError(
            "PORT-BUSY",
            f"no server can listen on {address}:{port}",
            hint="another process has the port, or the address is not one of this machine",
        )
    server.start()
    there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        if not answers(there, got, ssl.TLSVersion.TLSv1_3) or answers(there, got, ssl.TLSVersion.TLSv1_2):
            raise Refused(
                "TLS-VERSION",
                "this process cannot refuse TLS 1.2",
                hint="import cohortium.common.protocol.certificates before anything that imports grpc",
            )
    except OSError:
        server.stop(None)
        raise PeerUnreachable("PORT-PROBE", "the port that was opened cannot be reached from here") from None
    except Refused:
        server.stop(None)
        raise
    return Listening(server, got, on_stop)


def answers(host: str, port: int, version: ssl.TLSVersion, *, timeout_s: float = PROBE_S) -> bool:
    """Whether a server goes on with a handshake of exactly this TLS version: it answers our hello with its own.

    A whole handshake would not tell: where a client certificate is wanted it fails for the lack of one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = context.wrap_bio(inward, outward)
    with suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    end = time.monotonic() + timeout_s
    with socket.create_connection((host, port), timeout_s) as link:
        link.settimeout(max(0.1, end - time.monotonic()))
        try:
            link.sendall(outward.read())
            first = link.recv(1)
        except ConnectionError:
            return False
    return first[:1] == bytes([_HANDSHAKE])

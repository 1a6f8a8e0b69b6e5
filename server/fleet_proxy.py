"""The public door to Flower's Fleet API: TLS 1.3, ten paths, known SuperNodes; everything else is an empty 404.

The SuperLink serves its Control API (start and stop runs, register nodes; no login), its Runtime API and its docs on
the port of the Fleet API. So that port stays on the loopback interface, and sites reach this listener instead. A
request passes only as `POST` of exactly one of PATHS, byte for byte as it stands on the request line: no query, no
absolute address, no `//`, `..` or `%2e` that this side and the SuperLink might read differently.

Before a byte of a body is read, the head must carry the signature of a SuperNode's key over a fresh time stamp (what
Flower's node authentication sends anyhow) and the key must be one that `known` lets in: revoking a site works with
its next request, and a stranger cannot make the SuperLink hold large bodies in memory. Flower checks again behind us.

A certificate renewed on disk is taken up within RELOAD_S, for new connections; those that stand are not dropped.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import ssl
import threading
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h11
import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from cohortium.common.errors import PeerUnreachable
from cohortium.common.protocol.messages import MAX_ENVELOPE_BYTES

FLEET = "/v1/fleet/"
SMALL = 1 << 20
# What a registered SuperNode calls, and how much it may send. An envelope travels as one object.
PATHS: dict[bytes, int] = {
    f"{FLEET}{name}".encode(): most
    for name, most in {
        "activate-node": SMALL,
        "deactivate-node": SMALL,
        "send-node-heartbeat": SMALL,
        "pull-messages": SMALL,
        "push-messages": SMALL,
        "get-run": SMALL,
        "get-fab": SMALL,
        "push-object": MAX_ENVELOPE_BYTES + SMALL,
        "pull-object": SMALL,
        "confirm-message-received": SMALL,
    }.items()
}
# A SuperNode's main loop ends for good on an answer of 500 here; on 503 it tries again.
RETRIED = frozenset({b"/v1/fleet/pull-messages", b"/v1/fleet/send-node-heartbeat"})
KEY, SIGNATURE, TIMESTAMP = b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"
RELOAD_S = 5.0
# Flower's own tolerance for a time stamp's age.
STAMP_AGE_S = 305.0
STAMP_AHEAD_S = 5.0

Known = Callable[[bytes], bool]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """connections, per_address: open at once. handshake_s, head_s: for a new connection's TLS and first request.
    idle_s: between requests. body_s: for each piece of a body. answer_s: for the SuperLink. large_bodies: bodies
    above SMALL that are under way at once."""

    connections: int = 1024
    per_address: int = 256
    handshake_s: float = 10.0
    head_s: float = 10.0
    idle_s: float = 30.0
    body_s: float = 30.0
    answer_s: float = 60.0
    large_bodies: int = 8


class FleetProxy:
    """The running listener."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        chain: Path,
        key: Path,
        upstream: str,
        upstream_ca: Path,
        known: Known,
        limits: Limits,
    ) -> None:
        self._host, self.port, self._chain, self._key = host, port, chain, key
        self._upstream, self._upstream_ca, self._known, self._limits = upstream, upstream_ca, known, limits
        self._loop = asyncio.new_event_loop()
        self._ready, self._stopping = threading.Event(), asyncio.Event()
        self._failure: BaseException | None = None
        self._stamp: object = None
        self._thread = threading.Thread(target=self._run, name="fleet-proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise PeerUnreachable(
                "FLEET-PROXY",
                f"the Fleet port {self._host}:{self.port} could not be opened",
                where=(str(self._chain), str(self._key)),
                hint="is the port taken, and do certificate and key belong together?",
            ) from self._failure

    def stop(self) -> None:
        """Close the port and every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        context = self._context()
        state = ServerState()
        verify = ssl.create_default_context(cafile=str(self._upstream_ca))
        timeout = httpx.Timeout(self._limits.answer_s, connect=5.0)
        most = httpx.Limits(max_connections=self._limits.connections, max_keepalive_connections=64)
        # trust_env: the hop is the loopback interface, so no proxy of the environment may come between.
        async with httpx.AsyncClient(
            base_url=f"https://{self._upstream}", verify=verify, timeout=timeout, limits=most, trust_env=False
        ) as client:
            forward = _Forward(client=client, known=self._known, limits=self._limits)
            config = Config(
                forward,
                http="h11",
                ws="none",
                lifespan="off",
                interface="asgi3",
                proxy_headers=False,
                server_header=False,
                date_header=False,
                access_log=False,
                log_config=None,
                timeout_keep_alive=max(1, int(self._limits.idle_s)),
                h11_max_incomplete_event_size=16384,
            )
            config.load()
            addresses: Counter[str] = Counter()
            server = await self._loop.create_server(
                lambda: _Connection(config, state, self._limits, addresses),
                self._host,
                self.port,
                ssl=context,
                ssl_handshake_timeout=self._limits.handshake_s,
                ssl_shutdown_timeout=2.0,
            )
            self.port = int(server.sockets[0].getsockname()[1])
            self._ready.set()
            try:
                while not self._stopping.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), RELOAD_S)
                    self._reload(context)
            finally:
                server.close()
                for connection in list(state.connections):
                    connection.transport.abort()
                for task in list(state.tasks):
                    task.cancel()
                await asyncio.gather(*state.tasks, return_exceptions=True)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["http/1.1"])
        self._stamp = self._stamps()
        context.load_cert_chain(self._chain, self._key)
        return context

    def _stamps(self) -> object:
        return tuple((path.stat().st_mtime_ns, path.stat().st_ino) for path in (self._chain, self._key))

    def _reload(self, context: ssl.SSLContext) -> None:
        """Take up a renewed certificate; half-written files are left for the next look."""
        try:
            stamp = self._stamps()
            if stamp == self._stamp:
                return
            # A trial first: a chain and a key that do not belong together would leave the live context useless.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
            context.load_cert_chain(self._chain, self._key)
            self._stamp = stamp
        except (OSError, ssl.SSLError):
            return


def start_fleet_proxy(
    *,
    host: str,
    port: int,
    chain: Path,
    key: Path,
    upstream: str,
    upstream_ca: Path,
    known: Known = lambda _: True,
    limits: Limits | None = None,
) -> FleetProxy:
    """Open the public Fleet port; PeerUnreachable FLEET-PROXY if that fails.

    port 0 takes a free one (see .port). chain, key: PEM files of the coordinator's own leaf. upstream, upstream_ca:
    SuperLink.address and SuperLink.ca. known: whether a SuperNode's public key (PEM, as superlink.public_key_pem
    gives it) may come in; asked with every request, so it should be quick.
    """
    proxy = FleetProxy(
        host=host,
        port=port,
        chain=chain,
        key=key,
        upstream=upstream,
        upstream_ca=upstream_ca,
        known=known,
        limits=limits or Limits(),
    )
    proxy.start()
    return proxy


class _Connection(H11Protocol):
    """uvicorn's HTTP connection with what it lacks: limits per address, and an end for heads that never end."""

    def __init__(self, config: Config, state: ServerState, limits: Limits, addresses: Counter[str]) -> None:
        super().__init__(config, state, {})
        self._limits, self._addresses = limits, addresses
        self._address: str | None = None
        self._too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peer = (transport.get_extra_info("peername") or ("",))[0]
        if len(self.connections) > self._limits.connections or self._addresses[peer] >= self._limits.per_address:
            transport.abort()
            return
        self._address = peer
        self._addresses[peer] += 1
        self._arm(self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._address is not None:
            self._addresses[self._address] -= 1
            if not self._addresses[self._address]:
                del self._addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()

    def on_response_complete(self) -> None:
        self._arm(self._limits.idle_s)
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:
            self._disarm()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._too_slow = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None


class _Forward:
    """The ASGI application: what passes, passes on to the SuperLink; the rest is a status without a body."""

    def __init__(self, *, client: httpx.AsyncClient, known: Known, limits: Limits) -> None:
        self._client, self._known, self._limits = client, known, limits
        self._large = asyncio.Semaphore(limits.large_bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: bytes = scope.get("raw_path", b"")
        most = PATHS.get(path)
        if scope["type"] != "http" or scope["method"] != "POST" or most is None or scope["query_string"]:
            await _status(send, 404)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if not _signed(headers, self._known):
            await _status(send, 401)
            return
        size = _size(headers)
        if size is None or size > most:
            await _status(send, 411 if size is None else 413)
            return
        async with self._large if size > SMALL else contextlib.nullcontext():
            await self._forward(path, headers, size, receive, send)

    async def _forward(
        self, path: bytes, headers: list[tuple[bytes, bytes]], size: int, receive: Receive, send: Send
    ) -> None:
        passed = [(name, value) for name, value in headers if name in (b"content-type", b"accept") or _flwr(name)]
        passed += [(b"content-length", str(size).encode()), (b"accept-encoding", b"identity")]
        body = _body(receive, self._limits.body_s)
        request = self._client.build_request("POST", path.decode(), headers=passed, content=body)
        try:
            response = await self._client.send(request, stream=True)
        except _Gone:
            return
        except (httpx.HTTPError, TimeoutError, h11.LocalProtocolError):
            await _status(send, 503)
            return
        try:
            if response.status_code >= 500 and path in RETRIED:
                await _status(send, 503)
                return
            kept = [
                (name.lower(), value)
                for name, value in response.headers.raw
                if name.lower() in (b"content-type", b"content-length") or _flwr(name.lower())
            ]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await response.aclose()


class _Gone(Exception):
    """The site hung up while it sent its body."""


async def _body(receive: Receive, piece_s: float) -> AsyncIterator[bytes]:
    more = True
    while more:
        event = await asyncio.wait_for(receive(), piece_s)
        if event["type"] != "http.request":
            raise _Gone
        more = event.get("more_body", False)
        if piece := event.get("body", b""):
            yield piece


async def _status(send: Send, status: int) -> None:
    # The body that was not read is not waited for either: the connection closes.
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _flwr(name: bytes) -> bool:
    return name.startswith(b"flwr-") and name != b"flwr-task-token"


def _size(headers: list[tuple[bytes, bytes]]) -> int | None:
    """The body's announced size; None where there is none, or where it would come in chunks of unknown number."""
    sizes = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    return int(sizes[0]) if len(sizes) == 1 and not chunked and sizes[0].isdigit() else None


def _signed(headers: list[tuple[bytes, bytes]], known: Known) -> bool:
    """Whether the head carries a known key's signature over a fresh time stamp, each header once."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in (KEY, SIGNATURE, TIMESTAMP):
            if name in found:
                return False
            found[name] = value
    try:
        pem = b64decode(found[KEY], validate=True)
        signed_at = datetime.fromisoformat(found[TIMESTAMP].decode("ascii"))
        age_s = (datetime.now(UTC) - signed_at).total_seconds()
        if not -STAMP_AHEAD_S < age_s < STAMP_AGE_S or not known(pem):
            return False
        key = serialization.load_pem_public_key(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(b64decode(found[SIGNATURE], validate=True), found[TIMESTAMP], ec.ECDSA(hashes.SHA256()))
        return True
    except (KeyError, ValueError, TypeError, UnicodeError, binascii.Error, InvalidSignature):
        return False

"""The public Fleet port lets ten paths of known SuperNodes through, and nothing else reaches the SuperLink."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cohortium.common.errors import PeerUnreachable
from cohortium.server import fleet_proxy
from cohortium.server.fleet_proxy import PATHS, FleetProxy, Limits, start_fleet_proxy
from cohortium.server.superlink import write_loopback_certificates

PULL = "/v1/fleet/pull-messages"
OBJECT = "/v1/fleet/push-object"
# What the SuperLink also serves on its port, and ways to write a path that a second reader may read differently.
CLOSED = (
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-task-input",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/",
    "/v1/fleet",
    "/docs",
    "/openapi.json",
    "/health",
    "/responses",
    "/",
    "*",
    "//v1/fleet/pull-messages",
    "/v1//fleet/pull-messages",
    "/v1/fleet//pull-messages",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/./pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/%66leet/pull-messages",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages;x",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages#x",
    "/V1/FLEET/PULL-MESSAGES",
    "\\v1\\fleet\\pull-messages",
    "http://127.0.0.1/v1/control/start-run",
    "https://127.0.0.1/v1/fleet/pull-messages",
    "@127.0.0.1/v1/control/start-run",
)


class Upstream(ThreadingHTTPServer):
    """In the SuperLink's place: writes down what reaches it and answers as told."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.seen: list[tuple[str, str, dict[str, str], int]] = []
        self.status, self.answer = 200, b"answer"
        super().__init__(("127.0.0.1", 0), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "loopback.pem", folder / "loopback.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def do_POST(self) -> None:
        left = int(self.headers["content-length"])
        size = left
        while left:
            left -= len(self.rfile.read(min(left, 1 << 16)))
        server = self.server
        assert isinstance(server, Upstream)
        if not server.status:
            self.close_connection = True
            return
        server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, size))
        self.send_response(server.status)
        for name, value in (
            ("content-type", "application/protobuf"),
            ("content-length", str(len(server.answer))),
            ("set-cookie", "x=1"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(server.answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


class Node:
    """A SuperNode's key, and requests signed with it."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.pem = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def headers(self, *, age_s: float = 0.0) -> dict[str, str]:
        stamp = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
        return {
            "flwr-public-key": b64encode(self.pem).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": b64encode(self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        }


class Door:
    """The proxy under test, its upstream, and raw requests to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.node, self.known = folder, Node(), set[bytes]()
        self.known.add(self.node.pem)
        write_loopback_certificates(folder)
        self.upstream = Upstream(folder)
        self.proxy = self.open()

    def open(self, limits: Limits | None = None) -> FleetProxy:
        return start_fleet_proxy(
            host="127.0.0.1",
            port=0,
            chain=self.folder / "loopback.pem",
            key=self.folder / "loopback.key",
            upstream=f"127.0.0.1:{self.upstream.server_port}",
            upstream_ca=self.folder / "ca.pem",
            known=lambda pem: pem in self.known,
            limits=limits,
        )

    def limit(self, **limits: float) -> None:
        self.proxy.stop()
        self.proxy = self.open(Limits(**limits))  # type: ignore[arg-type]

    def connect(self, **versions: ssl.TLSVersion) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        for name, version in versions.items():
            setattr(context, name, version)
        raw = socket.create_connection(("127.0.0.1", self.proxy.port), timeout=10)
        return context.wrap_socket(raw, server_hostname="127.0.0.1")

    def raw(self, request: bytes) -> bytes:
        with self.connect() as wire:
            wire.sendall(request)
            return _read(wire)

    def post(
        self, target: str, body: bytes = b"x", *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> bytes:
        signed = self.node.headers() if headers is None else headers
        return self.raw(_request(method, target, {"content-length": str(len(body)), **signed}, body))

    def close(self) -> None:
        self.proxy.stop()
        self.upstream.shutdown()
        self.upstream.server_close()


def _request(method: str, target: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "host: h", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _read(wire: ssl.SSLSocket) -> bytes:
    """One response: its head, and as much body as it announces."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = wire.recv(65536)
        if not piece:
            return got
        got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    size = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0)
    while len(body) < size:
        piece = wire.recv(65536)
        if not piece:
            break
        body += piece
    return head + b"\r\n\r\n" + body


def _status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    made = Door(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One door for requests that change nothing."""
    made = Door(tmp_path_factory.mktemp("door"))
    try:
        yield made
    finally:
        made.close()


def test_each_fleet_path_passes_with_its_body_and_its_signature(door: Door) -> None:
    for path in PATHS:
        answer = door.post(path.decode(), b"body")
        assert _status(answer) == 200 and answer.endswith(b"\r\n\r\nanswer")
        assert b"set-cookie" not in answer.lower() and b"server:" not in answer.lower()
    assert [path.encode() for _, path, _, _ in door.upstream.seen] == list(PATHS)
    assert all(size == 4 and "flwr-signature" in headers for _, _, headers, size in door.upstream.seen)


def test_only_what_flower_needs_goes_on(door: Door) -> None:
    extra = {"cookie": "a", "x-forwarded-for": "1.2.3.4", "authorization": "b", "flwr-task-token": "t", "flwr-x": "y"}
    door.post(PULL, headers=door.node.headers() | extra)
    _, _, headers, _ = door.upstream.seen[0]
    assert not {"cookie", "x-forwarded-for", "authorization", "flwr-task-token"} & set(headers)
    assert headers["flwr-x"] == "y"


@pytest.mark.parametrize("target", CLOSED)
def test_everything_else_is_an_empty_404(shared: Door, target: str) -> None:
    answer = shared.post(target)
    # h11 refuses a few of these as no HTTP at all.
    assert _status(answer) in (404, 400)
    if _status(answer) == 404:
        assert answer.endswith(b"\r\n\r\n")
    assert shared.upstream.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "DELETE", "CONNECT", "PATCH", "post"])
def test_only_post_passes(shared: Door, method: str) -> None:
    assert _status(shared.post(PULL, method=method)) == 404
    assert shared.upstream.seen == []


def test_a_web_socket_upgrade_and_a_second_request_in_the_body_do_not_pass(door: Door) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "content-length": "0"}
    assert _status(door.raw(_request("GET", PULL, upgrade))) == 404
    hidden = _request("POST", "/v1/control/start-run", {"content-length": "0"})
    door.post(PULL, hidden)
    both = door.node.headers() | {"content-length": "3", "transfer-encoding": "chunked"}
    assert _status(door.raw(_request("POST", PULL, both, b"0\r\n\r\n" + hidden))) in (400, 411)
    assert [path for _, path, _, _ in door.upstream.seen] == [PULL]


def test_a_stranger_gets_401_before_its_body_is_read(door: Door) -> None:
    stranger, good = Node().headers(), door.node.headers()
    mixed = good | {"flwr-signature": stranger["flwr-signature"]}
    late, early = door.node.headers(age_s=400), door.node.headers(age_s=-60)
    twice = [("flwr-public-key", stranger["flwr-public-key"]), *good.items()]
    for headers in ({}, stranger, mixed, late, early, good | {"flwr-public-key": "!"}, good | {"flwr-timestamp": "x"}):
        announced = _request("POST", OBJECT, {"content-length": "100000000", **headers})
        assert _status(door.raw(announced)) == 401
    lines = "\r\n".join(["POST /v1/fleet/push-object HTTP/1.1", "host: h", *(f"{k}: {v}" for k, v in twice)])
    assert _status(door.raw(f"{lines}\r\ncontent-length: 5\r\n\r\n".encode())) == 401
    assert door.upstream.seen == []


def test_a_revoked_node_is_refused_with_its_next_request(door: Door) -> None:
    with door.connect() as wire:
        for expected in (200, 401):
            wire.sendall(_request("POST", PULL, {"content-length": "1", **door.node.headers()}, b"x"))
            assert _status(_read(wire)) == expected
            door.known.clear()


def test_sizes_are_limited_and_must_be_announced(door: Door) -> None:
    signed = door.node.headers()
    assert _status(door.raw(_request("POST", PULL, {"content-length": str((1 << 20) + 1), **signed}))) == 413
    assert _status(door.raw(_request("POST", OBJECT, {"content-length": str(1 << 40), **signed}))) == 413
    assert _status(door.raw(_request("POST", PULL, {"transfer-encoding": "chunked", **signed}, b"1\r\nx\r\n"))) == 411
    assert _status(door.raw(_request("POST", PULL, signed))) == 411
    assert door.upstream.seen == []
    big = b"x" * 5_000_000
    assert _status(door.post(OBJECT, big)) == 200
    assert door.upstream.seen[-1][3] == len(big)


def test_the_superlink_being_away_or_broken_is_a_503_that_a_supernode_tries_again(door: Door) -> None:
    door.upstream.status = 500
    assert _status(door.post(PULL)) == 503
    assert _status(door.post(OBJECT)) == 500
    door.upstream.status = 412
    assert _status(door.post(PULL)) == 412
    door.upstream.status = 0
    assert _status(door.post(PULL)) == 503


def test_only_tls_1_3_is_spoken(door: Door) -> None:
    with door.connect() as wire:
        assert wire.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        door.connect(maximum_version=ssl.TLSVersion.TLSv1_2)
    with socket.create_connection(("127.0.0.1", door.proxy.port), timeout=5) as plain, pytest.raises(OSError):
        plain.sendall(_request("POST", PULL, {"content-length": "0"}))
        if not plain.recv(100).startswith(b"HTTP"):
            raise ConnectionError


def test_a_head_or_a_body_that_never_ends_ends(door: Door) -> None:
    door.limit(head_s=0.4, idle_s=1.0, body_s=0.4, handshake_s=0.4)
    start = time.monotonic()
    with door.connect() as wire:
        for _ in range(30):
            try:
                wire.sendall(b"POST /v1/fleet/pull" if _ == 0 else b"-")
                time.sleep(0.05)
            except OSError:
                break
        assert _gone(wire)
    with door.connect() as wire:
        wire.sendall(_request("POST", PULL, {"content-length": "10", **door.node.headers()}, b"x"))
        assert _status(_read(wire)) == 503
    with socket.create_connection(("127.0.0.1", door.proxy.port), timeout=5) as silent:
        assert silent.recv(10) == b""
    assert time.monotonic() - start < 5
    assert _status(door.post(PULL)) == 200


def test_an_idle_connection_is_closed_and_a_slow_second_head_too(door: Door) -> None:
    door.limit(idle_s=0.5)
    with door.connect() as wire:
        wire.sendall(_request("POST", PULL, {"content-length": "1", **door.node.headers()}, b"x"))
        assert _status(_read(wire)) == 200
        wire.sendall(b"POST /v1")
        assert _gone(wire)


def _gone(wire: ssl.SSLSocket) -> bool:
    try:
        wire.settimeout(4)
        return wire.recv(100) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_one_address_cannot_take_every_connection(door: Door) -> None:
    door.limit(per_address=3, head_s=60.0)
    held = [door.connect() for _ in range(3)]
    time.sleep(0.1)
    try:
        with door.connect() as fourth:
            assert _gone(fourth)
    finally:
        for wire in held:
            wire.close()
    time.sleep(0.2)
    assert _status(door.post(PULL)) == 200


def test_a_renewed_certificate_is_taken_up_and_nobody_is_cut_off(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_proxy, "RELOAD_S", 0.05)
    door.limit()
    with door.connect() as before:
        old = before.getpeercert(binary_form=True)
        # Half a renewal: a chain whose key has not come yet is not served.
        other = door.folder / "other"
        other.mkdir()
        write_loopback_certificates(other)
        key = (door.folder / "loopback.key").read_bytes()
        (door.folder / "loopback.pem").write_bytes((other / "loopback.pem").read_bytes())
        time.sleep(0.3)
        with door.connect() as same:
            assert same.getpeercert(binary_form=True) == old
        assert (door.folder / "loopback.key").read_bytes() == key
        (door.folder / "loopback.key").write_bytes((other / "loopback.key").read_bytes())
        upstream_ca = (door.folder / "ca.pem").read_bytes()
        (door.folder / "ca.pem").write_bytes(upstream_ca + (other / "ca.pem").read_bytes())
        deadline = time.monotonic() + 5
        new = old
        while new == old and time.monotonic() < deadline:
            with door.connect() as after:
                new = after.getpeercert(binary_form=True)
        assert new != old
        before.sendall(_request("POST", PULL, {"content-length": "1", **door.node.headers()}, b"x"))
        assert _status(_read(before)) == 200


def test_a_port_that_is_taken_or_a_key_of_another_leaf_is_said(door: Door) -> None:
    with pytest.raises(PeerUnreachable, match="FLEET-PROXY"):
        start_fleet_proxy(
            host="127.0.0.1",
            port=door.proxy.port,
            chain=door.folder / "loopback.pem",
            key=door.folder / "loopback.key",
            upstream="127.0.0.1:1",
            upstream_ca=door.folder / "ca.pem",
        )

"""The processes of a consortium in tests: `python net_child.py coordinator|guard|leaky-guard|courier …`.

They run the product's own code. What differs is told here and nowhere else: a dead link is noticed within a second or
so instead of twenty, so that a case takes seconds; a courier can be told to hold the next answer back for a moment.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cohortium  # noqa: F401  before gRPC: it decides there which TLS is spoken
from cohortium.common.protocol.sockets import KeepAlive, client_options

PINGS = KeepAlive(ping_s=0.5, answer_s=0.7)


def coordinator(folder: Path, host: str) -> None:
    """Service and hub, until stdin ends."""
    from cohortium.common.protocol.signing import generate
    from cohortium.server import listening
    from cohortium.server.hub import Hub, serve_hub
    from cohortium.server.pki import Issuer
    from cohortium.server.register import Register
    from cohortium.server.service import start_service

    really = listening.grpc.server
    fast = {
        "grpc.keepalive_time_ms": round(1000 * PINGS.ping_s),
        "grpc.keepalive_timeout_ms": round(1000 * PINGS.answer_s),
        "grpc.http2.min_ping_interval_without_data_ms": 100,  # the field's service allows no such hurry
    }

    def server(*args: Any, options: Any = (), **more: Any) -> Any:
        return really(*args, options=list({**dict(options), **fast}.items()), **more)

    hub = Hub()
    local = serve_hub(hub, folder / "hub.sock")
    with patch.object(listening.grpc, "server", server):
        service = start_service(
            host=host,
            port=0,
            issuer=Issuer.load(folder / "pki"),
            register=Register(folder / "register.db"),
            hub=hub,
            backing=None,  # type: ignore[arg-type]  # nothing here asks for status or rows
            server_chain=folder / "pki" / "server.pem",
            server_key=folder / "pki" / "server.key",
            coordinator_key_public=generate().public_key(),
            consortium="rare-tumours",
        )
    print("ready", service.port, flush=True)
    sys.stdin.read()
    service.stop(0)
    local.stop(0)


class Held:
    """The guard's port; the answer after `hold` is kept until `go`."""

    def __init__(self, guard: Any) -> None:
        self._guard = guard
        self._hold = False
        self._go = threading.Event()

    @property
    def site(self) -> str:
        return str(self._guard.site)

    def hold(self) -> None:
        self._go.clear()
        self._hold = True

    def go(self) -> None:
        self._go.set()

    def handle(self, envelope: bytes) -> bytes:
        answer: bytes = self._guard.handle(envelope)
        if self._hold:
            self._hold = False
            print("holding", flush=True)
            self._go.wait(60)
        return answer

    def close(self) -> None:
        self._guard.close()


def courier(folder: Path, socket: Path) -> None:
    """The streams of a hospital's courier, with its own certificate and configuration; Flower's words come on stdin."""
    from cohortium.client import connect
    from cohortium.client.guard_port import SocketGuard
    from cohortium.client.stream import Streams, Timings

    guard = Held(SocketGuard(socket, patience_s=60.0))
    timings = Timings(first_wait_s=0.05, longest_wait_s=0.4, opening_s=5.0, greeting_s=2.0, unknown_s=10.0)

    def invite(words: str) -> None:
        print("invited", streams.invited(bytes.fromhex(words)) or "", flush=True)

    with patch.object(connect, "client_options", partial(client_options, PINGS)):
        streams = Streams(guard=guard, channel=lambda: connect.open_channel(folder), timings=timings)
        print("ready", flush=True)
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "invite":
                threading.Thread(target=invite, args=(rest,), daemon=True).start()
            else:
                {"hold": guard.hold, "go": guard.go}[word]()
        streams.close()


def guard(folder: Path, socket: Path) -> None:
    """The product's guard process, as its main does it."""
    from cohortium.client.guard_service import harden, serve_guard

    harden()
    serve_guard(folder, socket, ready=lambda: print("ready", flush=True))


def leaky_guard(folder: Path, socket: Path) -> None:
    """A guard with a planted bug: the words of its refusals leave in the place of their codes."""
    from cohortium.client.guard import Guard

    really = Guard._refuse

    def refuse(self: Any, code: str, local_code: str, sentence: str) -> bytes:
        error = sys.exc_info()[1]
        said = " ".join(map(str, getattr(error, "where", ()))) + f" {sentence} {getattr(error, 'hint', '')}"
        return really(self, said[:900], local_code, sentence)

    with patch.object(Guard, "_refuse", refuse):
        guard(folder, socket)


def main(words: list[str]) -> None:
    match words:
        case ["coordinator", folder, host]:
            coordinator(Path(folder), host)
        case ["courier", folder, socket]:
            courier(Path(folder), Path(socket))
        case ["guard", folder, socket]:
            guard(Path(folder), Path(socket))
        case ["leaky-guard", folder, socket]:
            leaky_guard(Path(folder), Path(socket))
        case _:
            sys.exit(f"not a process of these tests: {words}")


if __name__ == "__main__":
    main(sys.argv[1:])

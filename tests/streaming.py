"""A hub, sites with streams to it, and a network between them that can be cut: for tests of the fast path."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cohortium.client.app import Courier
from cohortium.client.stream import Streams, Timings
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.sockets import KeepAlive, client_options, server_options
from cohortium.server import stream as server_stream
from cohortium.server.hub import Hub, serve_hub
from cohortium.server.stream import StreamCourier
from cohortium.server.transport import GridCourier
from cohortium.simulations.grid import InProcessGrid

FAST = Timings(first_wait_s=0.02, longest_wait_s=0.2, opening_s=5.0, greeting_s=2.0, unknown_s=5.0)
FAST_SERVER = server_stream.Timings(
    reopen_s=0.3, reopen_again_s=0.5, message_s=2.0, opening_s=5.0, lost_s=20.0, hub_s=0.05
)
KEEP_ALIVE = KeepAlive(ping_s=0.3, answer_s=0.7)


class Service(rpc.ConsortiumServicer):
    """What the coordinator's service does for one site: it says who called."""

    def __init__(self, hub: Callable[[], Hub], site: str) -> None:
        self._hub, self._site = hub, site
        self._server = grpc.server(ThreadPoolExecutor(16), options=server_options(KEEP_ALIVE))
        rpc.add_ConsortiumServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Relay(self, request_iterator: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        return self._hub().relay(self._site, request_iterator, context)

    def stop(self) -> None:
        self._server.stop(0).wait()


class Proxy:
    """A TCP link: `cut` breaks it, `stall` swallows what is sent, `cut_after` breaks it after so many bytes."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._left: int | None = None
        self.accepted = 0
        self.refusing = False
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                if self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._left = None
                        target.sendall(data[: len(data) // 2])
                        self.cut()
                        return
                target.sendall(data)
        with self._lock:
            self._open -= {source, target}
        _close(source, target)

    def cut(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        _close(*ends)

    def cut_after(self, count: int) -> None:
        self._left = count

    def stall(self) -> None:
        self._flows.clear()

    def heal(self) -> None:
        self.refusing = False
        self._flows.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()
        self._flows.set()


def _close(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # close alone says nothing while another thread still reads
        end.close()


@dataclass
class EchoGuard:
    """A guard for tests: answers, counts, and does what `before` says first."""

    site: str
    before: Callable[[bytes], None] = lambda envelope: None
    handled: list[bytes] = field(default_factory=list)

    def handle(self, envelope: bytes) -> bytes:
        self.before(envelope)
        self.handled.append(envelope)
        return answer(self.site, envelope)

    def close(self) -> None:
        pass


def answer(site: str, envelope: bytes) -> bytes:
    return site.encode() + b":" + hashlib.sha256(envelope).digest() + envelope


class World:
    """Sites behind proxies, a hub on its socket, an in-process Flower grid that brings hellos and asks for streams."""

    def __init__(self, folder: Path, sites: Sequence[str], guards: dict[str, Any] | None = None, **hub: Any) -> None:
        self.folder, self.names, self._options = folder, tuple(sites), hub
        self.socket = folder / "hub.sock"
        self.guards: dict[str, Any] = guards or {site: EchoGuard(site) for site in sites}
        self.start_hub()
        self.services = {site: Service(lambda: self.hub, site) for site in sites}
        self.proxies = {site: Proxy(self.services[site].port) for site in sites}
        self.streams = {site: self.new_streams(site) for site in sites}
        self.asked: list[tuple[str, str]] = []
        self.deaf: set[str] = set()
        self._couriers: list[StreamCourier] = []
        self._more: list[Streams] = []
        for site in sites:
            (folder / site).mkdir(exist_ok=True)

    def new_streams(self, site: str) -> Streams:
        target = f"127.0.0.1:{self.proxies[site].port}"
        made = Streams(
            guard=self.guards[site],
            channel=lambda: grpc.insecure_channel(target, options=client_options(KEEP_ALIVE)),
            timings=FAST,
        )
        if hasattr(self, "_more"):
            self._more.append(made)
        return made

    def start_hub(self) -> None:
        self.hub = Hub(**{"opening_s": 2.0, "linger_s": 5.0, **self._options})
        self.hub_server = serve_hub(self.hub, self.socket)

    def stop_hub(self) -> None:
        self.hub.close()
        self.hub_server.stop(0).wait()

    def grid(self) -> GridCourier:
        directories = tuple(self.folder / site for site in self.names)

        def handler(action: str) -> Callable[[Message, Context], Message]:
            def handle(message: Message, context: Context) -> Message:
                site = self.names[int(context.node_config["partition-id"])]
                self.asked.append((action, site))
                if site in self.deaf:
                    raise RuntimeError
                courier = Courier(
                    directories=directories, opener=lambda d: self.guards[d.name], streams=self.streams[site]
                )
                return {"hello": courier.hello, "stream": courier.stream}[action](message, context)

            return handle

        app = ClientApp()
        app.query("hello")(handler("hello"))
        app.query("stream")(handler("stream"))
        return GridCourier(InProcessGrid(app, self.names, wire=False))

    def courier(self, run: str = "run-1", **options: Any) -> StreamCourier:
        made = StreamCourier(self.grid(), socket=self.socket, run=run, **{"timings": FAST_SERVER, **options})
        self._couriers.append(made)
        return made

    def close(self) -> None:
        for courier in self._couriers:
            courier.close()
        for streams in [*self.streams.values(), *self._more]:
            streams.close()
        self.stop_hub()
        for service in self.services.values():
            service.stop()
        for proxy in self.proxies.values():
            proxy.close()


def until(what: Callable[[], Any], *, timeout_s: float = 10.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)

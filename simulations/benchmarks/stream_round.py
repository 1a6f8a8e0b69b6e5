"""A whole secure-sum round of DP-SGD over streams: 4 sites, 50 thousand parameters, everything a process of its own.

    python -m cohortium.simulations.benchmarks.stream_round [--rounds N] [--json]

Four guards, four couriers, the coordinator's service with its hub (mutual TLS on loopback, the real checks of every
call) and the ServerApp's process share this machine. Flower's part, one message a site, is left to the in-process grid:
it happens once a run. What is printed beside the round's median is where its time goes: in the guards (the slowest site
of each exchange), between ServerApp and guards, in the ServerApp itself; and what each kind of process costs in CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cohortium.client.guard_port import SocketGuard
from cohortium.client.stream import Streams
from cohortium.common.protocol import certificates
from cohortium.common.protocol.flower import Parcel, Refusal, reply, unpack
from cohortium.common.protocol.sockets import client_options
from cohortium.server.runs import RunFolder
from cohortium.server.stream import StreamCourier
from cohortium.server.transport import GridCourier
from cohortium.simulations.benchmarks import secure_round
from cohortium.simulations.benchmarks.timing import Figure
from cohortium.simulations.grid import InProcessGrid

SITES = 4
BINS, HIDDEN = 40, 64
LIMIT_S = 0.5
CONSORTIUM = "speed"
MODULE = "cohortium.simulations.benchmarks.stream_round"
WITHIN_S = 120.0


def figures(*, rounds: int = 30, warm_up: int = 3) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="c") as name, contextlib.ExitStack() as stack:
        yield _measure(Path(name), rounds, warm_up, stack)


def _measure(folder: Path, rounds: int, warm_up: int, stack: contextlib.ExitStack) -> Figure:
    stack.enter_context(patch.object(secure_round, "SITES", SITES))  # the same consortium, with as many sites
    world = secure_round._world(folder, BINS, HIDDEN, rounds + warm_up)
    address = _coordinator(folder, world.plan.sites)
    service = stack.enter_context(_process("coordinator", str(folder)))
    port = int(service.readline())
    guards: dict[str, subprocess.Popen[Any]] = {}
    couriers: dict[str, _Child] = {}
    for site in world.plan.sites:
        socket = folder / f"{site}.sock"
        guards[site] = stack.enter_context(_guard(world.out / "sites" / site, socket))
        couriers[site] = stack.enter_context(_process("courier", str(folder), site, f"{address}:{port}"))
    for child in couriers.values():
        assert child.readline() == "ready"
    kinds: dict[str, list[subprocess.Popen[Any]]] = {
        "guards": list(guards.values()),
        "couriers": [child.process for child in couriers.values()],
        "coordinator": [service.process],
    }
    run = str(RunFolder(root=world.out).facts()["run"])
    courier = _Timed(_grid(couriers, world.plan.sites), socket=folder / "hub.sock", run=run)
    stack.callback(courier.close)
    walls: list[float] = []
    own: list[float] = []
    labels: dict[str, list[float]] = {}
    with secure_round._asking(courier, world) as ask:  # type: ignore[arg-type]
        for turn in range(rounds + warm_up):
            if turn == warm_up:
                before, cpu = time.process_time(), {kind: _cpu(ps) for kind, ps in kinds.items()}
                for child in couriers.values():
                    child.say("forget")
            courier.spent.clear()
            started = time.perf_counter()
            ask()
            wall = time.perf_counter() - started
            if turn >= warm_up:
                walls.append(wall)
                own.append(wall - sum(courier.spent.values()))
                for label, seconds in courier.spent.items():
                    labels.setdefault(label, []).append(seconds)
    spent = {kind: (_cpu(ps) - cpu[kind]) / rounds for kind, ps in kinds.items()}
    spent["ServerApp"] = (time.process_time() - before) / rounds
    handled = [json.loads(child.ask("times")) for child in couriers.values()]
    return Figure(
        name="stream-round",
        what=f"median of {rounds} secure-sum rounds of {world.query.dim} numbers, {SITES} sites, over streams",
        value=median(walls),
        unit="s",
        limit=LIMIT_S,
        details={
            "p90_ms": 1e3 * sorted(walls)[int(0.9 * len(walls))],
            **{f"{label}_ms": 1e3 * median(seconds) for label, seconds in labels.items()},
            **_in_guards(handled, sorted(labels, key=ORDER.index)),
            "serverapp_alone_ms": 1e3 * median(own),
            **{f"cpu_{kind}_ms": 1e3 * seconds for kind, seconds in spent.items()},
            "cores": os.cpu_count(),
        },
    )


ORDER = ("prepare", "mask", "agree", "unmask")


def _in_guards(handled: Sequence[Sequence[float]], labels: Sequence[str]) -> dict[str, float]:
    """The slowest guard of each exchange, median over rounds: what no transport could save."""
    out = {}
    for at, label in enumerate(labels):
        slowest = [max(times) for times in zip(*(site[at :: len(labels)] for site in handled), strict=False)]
        out[f"{label}_slowest_guard_ms"] = 1e3 * median(slowest)
    return out


class _Timed(StreamCourier):
    """spent: seconds of each exchange of a round, by the last word of its label."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spent: dict[str, float] = {}

    def exchange(self, messages: Mapping[str, bytes], **kwargs: Any) -> dict[str, bytes]:
        started = time.perf_counter()
        try:
            return super().exchange(messages, **kwargs)
        finally:
            word = str(kwargs.get("label", "")).rpartition("/")[2]
            self.spent[word] = self.spent.get(word, 0.0) + time.perf_counter() - started


# ---- processes ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Child:
    """One process and its two pipes."""

    process: subprocess.Popen[str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def readline(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "a process of the benchmark ended"
        return line.strip()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> str:
        with self.lock:
            self.say(line)
            return self.readline()


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[_Child]:
    with subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    ) as process:
        try:
            yield _Child(process)
        finally:
            process.kill()


@contextlib.contextmanager
def _guard(directory: Path, socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "cohortium.client.guard_service", str(directory), str(socket)]
    with subprocess.Popen(command, env=_environment()) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _environment() -> dict[str, str]:
    # Four hospitals share this machine; each of them alone would use all of it.
    return {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def _cpu(processes: Sequence[subprocess.Popen[Any]]) -> float:
    """CPU seconds so far."""
    tick, total = os.sysconf("SC_CLK_TCK"), 0.0
    for process in processes:
        words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(words[11]) + int(words[12])) / tick
    return total


def _coordinator(folder: Path, sites: Sequence[str]) -> str:
    """Root, issuer, members and their certificates; the address that the service's certificate names."""
    from cohortium.server.pki import Issuer, create_issuer, create_root
    from cohortium.server.register import Register

    (folder / "root").mkdir(mode=0o700)
    (folder / "pki").mkdir(mode=0o700)
    passphrase = "for a benchmark only"
    create_root(folder / "root", name=CONSORTIUM, passphrase=passphrase)
    create_issuer(folder / "root", folder / "pki", passphrase=passphrase)
    issuer, register = Issuer.load(folder / "pki"), Register(folder / "register.db")
    chain, key = issuer.server_leaf(["localhost", "127.0.0.1"])
    (folder / "server.pem").write_bytes(chain)
    (folder / "server.key").touch(mode=0o600)
    (folder / "server.key").write_bytes(key)
    for site in sites:
        identity, officer = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        register.enrol(
            name=site,
            role="site",
            identity=identity.public_key().public_bytes_raw(),
            officer=officer.public_key().public_bytes_raw(),
            supernode=f"ssh-ed25519 {identity.public_key().public_bytes_raw().hex()}",
        )
        mine = certificates.new_key()
        csr = certificates.make_csr(mine, consortium=CONSORTIUM, role="site", name=site)
        (folder / f"{site}.pem").write_bytes(issuer.sign_csr(csr, role="site", name=site))
        (folder / f"{site}.key").touch(mode=0o600)
        (folder / f"{site}.key").write_bytes(certificates.key_pem(mine))
    register.close()
    return "localhost"


def _serve(folder: Path) -> None:
    """The coordinator's process: the service and the hub."""
    from cohortium.server.hub import Hub, serve_hub
    from cohortium.server.pki import Issuer
    from cohortium.server.register import Register
    from cohortium.server.service import start_service

    hub = Hub()
    server = serve_hub(hub, folder / "hub.sock")
    service = start_service(
        host="127.0.0.1",
        port=0,
        issuer=Issuer.load(folder / "pki"),
        register=Register(folder / "register.db"),
        hub=hub,
        backing=None,  # type: ignore[arg-type]
        server_chain=folder / "server.pem",
        server_key=folder / "server.key",
        coordinator_key_public=Ed25519PrivateKey.generate().public_key(),
        consortium=CONSORTIUM,
    )
    print(service.port, flush=True)
    sys.stdin.read()
    service.stop(0)
    server.stop(0)


class _Stopwatch:
    """The guard's port, and how long each answer took."""

    def __init__(self, guard: SocketGuard) -> None:
        self._guard = guard
        self.times: list[float] = []

    @property
    def site(self) -> str:
        return self._guard.site

    def handle(self, envelope: bytes) -> bytes:
        started = time.perf_counter()
        answer = self._guard.handle(envelope)
        self.times.append(time.perf_counter() - started)
        return answer

    def close(self) -> None:
        self._guard.close()


def _relay(folder: Path, site: str, target: str) -> None:
    """A courier's process: its streams, and who asks for them on stdin."""
    root, chain, key = ((folder / name).read_bytes() for name in ("root/root.pem", f"{site}.pem", f"{site}.key"))
    credentials = certificates.channel_credentials(root, chain, key)
    guard = _Stopwatch(SocketGuard(folder / f"{site}.sock", patience_s=WITHIN_S))
    deadline = time.monotonic() + WITHIN_S
    while not (folder / f"{site}.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    streams = Streams(guard=guard, channel=lambda: grpc.secure_channel(target, credentials, options=client_options()))
    print("ready", flush=True)
    for line in sys.stdin:
        match line.strip():
            case "times":
                print(json.dumps(guard.times), flush=True)
            case "forget":
                guard.times.clear()
            case invitation:
                print(streams.invited(bytes.fromhex(invitation)) or "", flush=True)
    streams.close()


def _grid(couriers: Mapping[str, _Child], sites: Sequence[str]) -> GridCourier:
    """Flower's part in process: hellos, and asking for streams."""
    app = ClientApp()

    def hello(message: Message, context: Context) -> Message:
        return reply(Parcel(site=sites[int(context.node_config["partition-id"])]), to=message)

    def stream(message: Message, context: Context) -> Message:
        site = sites[int(context.node_config["partition-id"])]
        refusal = couriers[site].ask(unpack(message.content).envelope.hex())
        return reply(Parcel(refusal=Refusal(refusal)) if refusal else Parcel(site=site), to=message)

    app.query("hello")(hello)
    app.query("stream")(stream)
    return GridCourier(InProcessGrid(app, sites))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit code 1 where the limit does not hold."""
    given = sys.argv[1:] if arguments is None else arguments
    match given:
        case ["coordinator", folder]:
            _serve(Path(folder))
            return 0
        case ["courier", folder, site, target]:
            _relay(Path(folder), site, target)
            return 0
    parser = argparse.ArgumentParser(prog="stream_round", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(given)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    held = True
    for figure in figures(rounds=options.rounds):
        held = held and figure.holds
        if options.json:
            print(json.dumps(figure.to_json()))
            continue
        print(f"{figure.name}: {figure.value:.3f} s (limit {figure.limit} s) {'holds' if figure.holds else 'FAILS'}")
        print(f"    {figure.what}")
        for name, value in figure.details.items():
            print(f"    {name:28} {value:9.1f}" if isinstance(value, float) else f"    {name:28} {value}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

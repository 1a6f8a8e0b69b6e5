"""One exchange over Flower's own messages: 4 sites, node authentication, TLS through the Fleet proxy, our couriers.

Everything is real but the guards, which give back what they get: SuperLink, Fleet proxy, SuperNodes, couriers and the
ServerApp are processes of their own on this machine. What is measured is what a run with `--transport flower` waits
for in each exchange, and how long a run takes from its start to the ServerApp's first line.

    python -m cohortium.simulations.benchmarks.flower_exchange [exchanges] [--stock-pace]
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message

from cohortium.client.courier import run_courier
from cohortium.common.errors import PeerUnreachable
from cohortium.common.processes import stopping
from cohortium.common.protocol.flower import HELLO, Parcel, reply, unpack
from cohortium.server.app import coordinator_app, quick_pulls
from cohortium.server.fleet_proxy import FleetProxy, start_fleet_proxy
from cohortium.server.superlink import SHIM, SuperLink, write_loopback_certificates
from cohortium.server.transport import GridCourier

SITES = ("east", "north", "south", "west")
CARRY_BYTES = 400_000
EXCHANGES = 20
WITHIN_S = 300.0
MODULE = "cohortium.simulations.benchmarks.flower_exchange"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A consortium on one machine, without guards."""

    root: Path
    link: SuperLink
    proxy: FleetProxy
    couriers: dict[str, subprocess.Popen[bytes]]


def write_courier(directory: Path, *, name: str, fleet_address: str, root_pem: bytes) -> str:
    """A courier's directory with a SuperNode key of its own; returns the public key in OpenSSH's form."""
    directory.mkdir(mode=0o700, parents=True)
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    (directory / "supernode").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    (directory / "supernode").chmod(0o600)
    (directory / "root.pem").write_bytes(root_pem)
    settings = {
        "name": name,
        "consortium": "benchmark",
        "service_address": "127.0.0.1:1",
        "fleet_address": fleet_address,
        "enrol_address": "127.0.0.1:1",
        "coordinator_key": "00" * 32,
        "socket": str(directory / "guard.sock"),
    }
    (directory / "courier.toml").write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


@contextlib.contextmanager
def consortium(root: Path, *, sites: Sequence[str] = SITES, stock_pace: bool = False) -> Iterator[Setting]:
    """SuperLink, Fleet proxy and one echoing courier a site, until the block ends."""
    tls = root / "tls"
    tls.mkdir(parents=True)
    write_loopback_certificates(tls)
    link = SuperLink.start(root / "superlink")
    proxy: FleetProxy | None = None
    couriers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        proxy = start_fleet_proxy(
            host="127.0.0.1",
            port=0,
            chain=tls / "loopback.pem",
            key=tls / "loopback.key",
            upstream=link.address,
            upstream_ca=link.ca,
        )
        for site in sites:
            directory = root / site
            public = write_courier(
                directory,
                name=site,
                fleet_address=f"127.0.0.1:{proxy.port}",
                root_pem=(tls / "ca.pem").read_bytes(),
            )
            link.register_supernode(site, public)
            command = [sys.executable, "-m", MODULE, "--courier", str(directory)]
            with open(directory / "courier.log", "ab") as log:
                couriers[site] = subprocess.Popen(
                    [*command, *(["--stock-pace"] if stock_pace else [])],
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
        wait_until_online(link, sites)
        yield Setting(root=root, link=link, proxy=proxy, couriers=couriers)
    finally:
        for process in couriers.values():
            process.send_signal(signal.SIGTERM)
        for process in couriers.values():
            process.wait(30)
        if proxy is not None:
            proxy.stop()
        link.stop()


def wait_until_online(link: SuperLink, sites: Sequence[str], within_s: float = 90.0) -> None:
    """Wait for the sites' SuperNodes; PeerUnreachable BENCH-OFFLINE if one does not come."""
    deadline = time.monotonic() + within_s
    while any(link.supernodes().get(site) != "online" for site in sites):
        if time.monotonic() > deadline:
            raise PeerUnreachable("BENCH-OFFLINE", f"SuperNodes: {link.supernodes()}")
        time.sleep(0.2)


def write_app(folder: Path, attribute: str = "app") -> Path:
    """The run's app with another ServerApp in it: the one of this module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text((SHIM / "pyproject.toml").read_text())
    (folder / "cohortium_run.py").write_text(f"from {MODULE} import {attribute} as _app\n\napp = _app\n")
    return folder


def finish(link: SuperLink, run: int, within_s: float = WITHIN_S) -> str:
    """Wait for the run's end; its last status."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        status = link.run_status(run)
        if status.startswith("finished"):
            return status
        time.sleep(0.25)
    return link.run_status(run)


# ---- in the ServerApp's process -----------------------------------------------------------------------------


def _measure(courier: GridCourier, context: Context) -> None:
    out = Path(str(context.run_config["run-directory"]))
    began = time.time()
    exchanges = int(str(context.run_config["hub"]) or EXCHANGES)
    if context.run_config["transport"] == "flower":
        quick_pulls()
    courier.discover(SITES, timeout_s=120.0)
    seconds: dict[int, list[float]] = {1: [], CARRY_BYTES: []}
    absent = 0
    for size, taken in seconds.items():
        for number in range(exchanges):
            envelopes = {site: os.urandom(size) for site in SITES}
            start = time.monotonic()
            got = courier.exchange(envelopes, timeout_s=60.0, label=f"carry-{number}")
            taken.append(time.monotonic() - start)
            absent += sum(got.get(site) != envelopes[site] for site in SITES)
    figures = {"began": began, "small_s": seconds[1], "large_s": seconds[CARRY_BYTES], "absent": absent}
    out.write_text(json.dumps(figures))


app = coordinator_app(_measure)


# ---- in the couriers' processes -----------------------------------------------------------------------------


def echo(name: str) -> object:
    """A ClientApp that says its name to a hello and gives an envelope back as it came."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type.endswith(HELLO):
            return reply(Parcel(site=name), to=message)
        return reply(Parcel(envelope=unpack(message.content).envelope, site=name), to=message)

    return answer


def _courier(directory: Path, stock_pace: bool) -> None:
    stop = threading.Event()
    with stopping(stop):
        run_courier(directory, stop, app=echo(directory.name), stock_pace=stock_pace)  # type: ignore[arg-type]


# ---- the benchmark ------------------------------------------------------------------------------------------


def measure(exchanges: int = EXCHANGES, *, stock_pace: bool = False) -> list[tuple[str, float]]:
    """(what, seconds) of one consortium; stock_pace: with Flower's own sleeps between messages."""
    with tempfile.TemporaryDirectory() as folder, consortium(Path(folder), stock_pace=stock_pace) as setting:
        out, began = setting.root / "figures.json", time.time()
        run = setting.link.start_run(
            {"run-directory": str(out), "hub": str(exchanges), "transport": "stock" if stock_pace else "flower"},
            app=write_app(setting.root / "app"),
        )
        status = finish(setting.link, run)
        if not out.exists():
            log = (setting.root / "superlink" / "superlink.log").read_text()
            raise PeerUnreachable("BENCH-RUN", f"the run ended as {status}\n{log[-2000:]}")
        figures = json.loads(out.read_text())
    return [
        ("from start_run to the ServerApp's first line, s", figures["began"] - began),
        *_figures("1 byte to each site and back", figures["small_s"]),
        *_figures(f"{CARRY_BYTES // 1000} kB to each site and back", figures["large_s"]),
        ("answers that were missing or wrong", figures["absent"]),
    ]


def _figures(what: str, seconds: list[float]) -> list[tuple[str, float]]:
    return [(f"{what}, p50, s", median(seconds)), (f"{what}, p90, s", quantiles(seconds, n=10)[-1])]


if __name__ == "__main__":
    if "--courier" in sys.argv:
        os.umask(0o077)
        _courier(Path(sys.argv[2]), "--stock-pace" in sys.argv)
    else:
        numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
        for figure in measure(*numbers, stock_pace="--stock-pace" in sys.argv):
            print(f"{figure[1]:8.2f}  {figure[0]}")

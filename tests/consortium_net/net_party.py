"""A consortium of processes: its sites' directories, their guards and couriers, the coordinator's service with its hub.

    FOLDER/base/sites/NAME      what a guard owns (made as a simulation makes it, with a seed: a rehearsal)
    FOLDER/couriers/NAME        what a courier owns
    FOLDER/coordinator          root, issuer, register, hub.sock, mirror.db, runs/RUN
    FOLDER/said                 what each process printed

The ServerApp's part, `drive`, runs in the test's process. Flower's part is left out, as in tests/streaming.py: hellos
and the one message that asks for a stream go through a pipe, and only while the site's link is up.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from consortium import NAME, enrol_member, leaf, make_pki
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cohortium.client.approval import approve
from cohortium.client.policy import Policy
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.flower import Parcel, Refusal, reply, unpack
from cohortium.common.protocol.messages import canonical, seal
from cohortium.common.protocol.signing import generate, load_private, save_private, save_public
from cohortium.common.study import Study
from cohortium.server.planning import plan_for
from cohortium.server.register import Register
from cohortium.server.runs import RunFolder, new_run_id
from cohortium.server.transport import GridCourier
from cohortium.simulations.grid import InProcessGrid
from cohortium.simulations.run import Request, prepare

CHILD = Path(__file__).with_name("net_child.py")
SEED = 5
START_S = 120.0


class Child:
    """One process that talks in lines. What it prints beside its answers is kept in a file."""

    def __init__(self, command: Sequence[str], said: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "ERROR"}
        environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        self._said = open(said, "ab")  # noqa: SIM115  open as long as the process
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment
        )
        self._heard: dict[str, Queue[str]] = {word: Queue() for word in ("ready", "invited", "holding")}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.write(line)
            self._said.flush()
            word, _, rest = line.decode(errors="replace").strip().partition(" ")
            if word in self._heard:
                self._heard[word].put(rest)

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        with self._lock, contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def wait(self, word: str, *, timeout_s: float = START_S) -> str:
        """The rest of the next line that begins with this word."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._heard[word].get(timeout=0.5)
            except Empty:
                assert self.process.poll() is None, f"{self.process.args} ended: see {self._said.name}"
                assert time.monotonic() < deadline, f"{self.process.args} did not say {word!r} in time"

    def leave(self) -> None:
        """Ask it to end; `stop` waits."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.leave()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        self._said.close()


def python(*words: str | Path, within: Sequence[str] = ()) -> list[str]:
    return [*within, sys.executable, str(CHILD), *map(str, words)]


class Party:
    """The directories of a consortium and, once started, its processes.

    table, study: as tests/small.py writes them. host: the coordinator's address. Sites are called site-1, site-2, …
    """

    def __init__(self, folder: Path, *, study: Path, table: Path, sites: int, host: str = "127.0.0.1") -> None:
        self.folder, self.host = folder, host
        self.base, self.coordinator = folder / "base", folder / "coordinator"
        plan = prepare(Request(study=study, table=table, split=f"iid:{sites}", out=self.base, seed=SEED))
        self.sites = plan.sites
        self.children: dict[str, Child] = {}
        self.officers = {site: generate() for site in self.sites}
        self.port = 0
        self.between: dict[str, Path] = {}
        (folder / "said").mkdir()
        (self.coordinator / "runs").mkdir(parents=True, mode=0o700)
        issuer = make_pki(self.coordinator, hosts=(host,))
        with contextlib.closing(Register(self.coordinator / "register.db")) as register:
            for site in self.sites:
                enrol_member(register, site)
                self._courier(site, issuer.root_pem, leaf(issuer, site))
        for site, officer in self.officers.items():
            shutil.rmtree(self.site(site) / "approved")  # by an officer whose key nobody has any more
            (self.site(site) / "officer.pub").unlink()
            save_public(officer.public_key(), self.site(site) / "officer.pub")
            # Room for all the runs of a test.
            self.policy(site, lifetime_epsilon=1e5, generators=("joined", "mixture"))

    def _courier(self, site: str, root: bytes, own: Any) -> None:
        place = self.folder / "couriers" / site
        place.mkdir(parents=True, mode=0o700)
        (place / "root.pem").write_bytes(root)
        (place / "leaf.pem").write_bytes(own.chain)
        (place / "leaf.key").touch(mode=0o600)
        (place / "leaf.key").write_bytes(own.key)

    def site(self, site: str) -> Path:
        return self.base / "sites" / site

    def policy(self, site: str, **changes: Any) -> None:
        """Change a site's site.toml; its guard reads it when it starts."""
        path = self.site(site) / "site.toml"
        policy = replace(Policy.load(path), **changes)
        path.unlink()
        policy.save(path)

    def new_run(self, study: Path, *, name: str | None = None) -> Path:
        """A run's folder, approved by every officer. name: None for the one that `simulate` would give it."""
        made = Study.load(study)
        plan, _, _ = plan_for(made, self.sites, noise=True)
        run = new_run_id(made.id, seed=SEED) if name is None else name
        root = self.coordinator / "runs" / run
        root.mkdir(mode=0o700)
        made.schema.save(root / "dictionary.json")
        (root / "study.toml").write_text(made.to_toml(dictionary="dictionary.json"), encoding="utf-8")
        (root / "plan.json").write_bytes(canonical(plan.to_json()) + b"\n")
        key = load_private(self.base / "coordinator.key")
        save_private(key, root / "coordinator.key")
        facts = {**RunFolder(root=self.base).facts(), "run": run, "consortium": NAME, "mirror": "../../mirror.db"}
        (root / "run.json").write_text(json.dumps(facts))
        message = proposal_message(run=run, plan=plan, identities=facts["public_keys"], schema=made.schema)
        (root / "proposal.bin").write_bytes(seal(message, key))
        for site, officer in self.officers.items():
            approve(self.site(site), seal(message, key), officer, check_table=False)
        return root

    def plan(self, root: Path) -> Plan:
        return RunFolder(root=root).plan()

    # ---- processes ------------------------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        child = self._start("coordinator", python("coordinator", self.coordinator, self.host))
        self.port = int(child.wait("ready"))

    def start_site(self, site: str, *, within: Sequence[str] = (), port: int = 0) -> None:
        """Guard and courier of a site. port: another than the service's own."""
        place = self.folder / "couriers" / site
        (place / "courier.toml").write_text(f'service_address = "{self.host}:{port or self.port}"\n')
        self.start_guard(site, within=within)
        self._start(f"courier-{site}", python("courier", place, self.courier_socket(site), within=within))

    def start_guard(self, site: str, *, within: Sequence[str] = (), kind: str = "guard") -> Child:
        """kind: which guard (see net_child)."""
        return self._start(f"guard-{site}", python(kind, self.site(site), self.guard_socket(site), within=within))

    def guard_socket(self, site: str) -> Path:
        return self.folder / f"{site}.sock"

    def courier_socket(self, site: str) -> Path:
        """Where the courier looks for its guard: the guard's own socket, or what a test put before it."""
        return self.between.get(site, self.guard_socket(site))

    def ready(self) -> None:
        for name, child in self.children.items():
            if name != "coordinator":
                child.wait("ready")

    def _start(self, name: str, command: Sequence[str]) -> Child:
        self.children[name] = Child(command, self.folder / "said" / name)
        return self.children[name]

    def stop(self) -> None:
        for child in self.children.values():
            child.leave()
        for child in self.children.values():
            child.stop()
        self.children.clear()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Whatever was started in here is stopped in the end."""
        try:
            yield
        finally:
            self.stop()

    def grid(self, *, is_cut: Callable[[str], bool] = lambda site: False) -> GridCourier:
        """Flower's part: who is there, and the message that asks a courier for its stream."""

        def reached(context: Context) -> str:
            site = self.sites[int(context.node_config["partition-id"])]
            if is_cut(site):
                raise ConnectionError
            return site

        def hello(message: Message, context: Context) -> Message:
            return reply(Parcel(site=reached(context)), to=message)

        def stream(message: Message, context: Context) -> Message:
            site = reached(context)
            child = self.children[f"courier-{site}"]
            child.say("invite " + unpack(message.content).envelope.hex())
            refusal = child.wait("invited", timeout_s=30.0)
            return reply(Parcel(refusal=Refusal(refusal)) if refusal else Parcel(site=site), to=message)

        app = ClientApp()
        app.query("hello")(hello)
        app.query("stream")(stream)
        return GridCourier(InProcessGrid(app, self.sites, wire=False, threads=len(self.sites)))

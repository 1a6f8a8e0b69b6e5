"""`cohortium serve`: one long-running process that starts, watches and stops everything of the coordinator.

    public      service (mutual TLS) · enrolment (server's certificate) · Fleet paths (TLS), each on its own port
    this host   SuperLink on the loopback interface (a child process) · hub on a Unix socket
    people      the console (a child process), once somebody has an account: docs/console.md
    inside      the conductor's thread; renewal of the own leaf; revocations made effective everywhere

Whatever dies is started again. What it knows is on disk, so killing it loses nothing but time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# First of all that loads gRPC: it switches TLS 1.2 off for this process.
from cohortium.common.protocol import certificates  # isort: skip

from cohortium.common.errors import CohortiumError, PeerUnreachable, UsageError
from cohortium.common.modes import make_private, refuse_all
from cohortium.common.protocol.sockets import only_one
from cohortium.server.backing import LiveBacking
from cohortium.server.conduct import Conductor
from cohortium.server.console.child import ConsoleChild
from cohortium.server.consortium import TRANSPORTS, Consortium
from cohortium.server.pki import LEAF_HOURS, Issuer
from cohortium.server.register import Member, Register
from cohortium.server.runs import RunFolder
from cohortium.server.seen import Seen

TICK_S = 1.0
GRACE_S = 2.0
LONGEST_BACK_OFF_S = 60.0
ISSUER_WARNING = timedelta(days=14)

Say = Callable[[str, str], None]
"""(event, text): one line for the operator."""


class Interrupted(Exception):
    """The service stops; the run's end is written again when it comes back."""


def serve(
    consortium: Consortium,
    *,
    transport: str = "stream",
    stop: threading.Event | None = None,
    say: Say = lambda event, text: None,
    console: bool = True,
) -> None:
    """Run until `stop` is set. say("ready", …) when every listener is up; without the console if it cannot.

    Refused MODE-OPEN (others may read a key), DISK-FULL, SOCKET-BUSY (another serve of this directory);
    PeerUnreachable when a port is taken or Flower does not start. Everything started is stopped in every case.
    """
    if transport not in TRANSPORTS:
        raise UsageError("TRANSPORT", f"there is no transport {transport!r}", hint="stream or flower")
    stop = stop or threading.Event()
    refuse_all(consortium.secrets())
    consortium.refuse_full_disk()
    os.umask(0o077)
    lock = only_one(consortium.root / "serve.lock")
    try:
        with contextlib.ExitStack() as stack:
            service = _Service(consortium, stop, say, transport, console=console)
            service.start(stack)
            say("ready", f"{consortium.name}: members {consortium.addresses.service}, {transport} transport")
            service.watch()
            say("stopping", "runs go on from their last release when the service is back")
    finally:
        os.close(lock)


class _Engine:
    """The SuperLink of the moment, for the conductor: it may be away, and come back as another process."""

    def __init__(self) -> None:
        self.link: Any = None

    def _there(self) -> Any:
        if self.link is None or not self.link.alive:
            raise PeerUnreachable("SUPERLINK-DOWN", "Flower's SuperLink is being started again")
        return self.link

    def start_run(self, run_config: Mapping[str, str], /) -> int:
        return int(self._there().start_run(run_config))

    def run_status(self, run_id: int, /) -> str:
        return str(self._there().run_status(run_id))

    def stop_run(self, run_id: int, /) -> None:
        self._there().stop_run(run_id)

    def let_in(self, member: Member) -> None:
        self._there().register_supernode(member.name, member.supernode)

    def shut_out(self, name: str) -> None:
        self._there().unregister(name)


class _Service:
    def __init__(
        self, consortium: Consortium, stop: threading.Event, say: Say, transport: str, *, console: bool = False
    ) -> None:
        self._consortium, self._stop, self._say, self._transport = consortium, stop, say, transport
        self._console = ConsoleChild(consortium.root, say) if console else None
        self._engine = _Engine()
        self._register: Register = consortium.register()
        self._seen = Seen(consortium.root / "seen.json")
        self._nodes = _Nodes(self._register, self._seen)
        self._let_in: dict[str, str] = {}
        self._shut_out: set[str] = set()
        self._back_off_s, self._not_before = 1.0, 0.0
        self._warned = 0.0
        self._hub: Any = None
        self._start_link: Callable[[], Any] = _no_link

    # ---- start ----------------------------------------------------------------------------------------------

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start everything; the stack stops it, last started first."""
        from cohortium.server.fleet_proxy import start_fleet_proxy
        from cohortium.server.hub import Hub, serve_hub
        from cohortium.server.service import start_enrolment, start_service
        from cohortium.server.superlink import SuperLink

        consortium, addresses = self._consortium, self._consortium.addresses
        stack.callback(self._register.close)
        stack.callback(self._seen.flush)
        self._renew(at_start=True)
        make_private(consortium.superlink)
        self._hub = Hub()
        stack.callback(self._hub.close)
        hub_server = serve_hub(self._hub, consortium.hub)
        stack.callback(lambda: hub_server.stop(GRACE_S).wait())
        self._say("started", "hub")
        self._start_link = lambda: SuperLink.start(
            consortium.superlink, port=addresses.superlink_port, consortium=consortium.root
        )
        self._engine.link = self._start_link()
        stack.callback(lambda: self._engine.link.stop())
        self._say("started", f"SuperLink on {self._engine.link.address}")
        self._reconcile()
        proxy = start_fleet_proxy(
            host=addresses.listen,
            port=addresses.fleet_port,
            chain=consortium.chain,
            key=consortium.chain_key,
            upstream=self._engine.link.address,
            upstream_ca=self._engine.link.ca,
            known=self._nodes,
        )
        stack.callback(proxy.stop)
        self._say("started", f"Fleet paths on {addresses.listen}:{addresses.fleet_port}")
        shared: dict[str, Any] = {
            "host": addresses.listen,
            "issuer": lambda: noting(consortium.issuer(), self._seen),  # read anew: a new one takes over at once
            "register": self._register,
            "server_chain": consortium.chain,
            "server_key": consortium.chain_key,
            "coordinator_key_public": consortium.key().public_key(),
            "consortium": consortium.name,
        }
        backing = LiveBacking(consortium, self._register, self._seen)
        members = start_service(
            port=addresses.service_port, hub=self._hub, backing=backing, on_call=self._called, **shared
        )
        stack.callback(lambda: members.stop(GRACE_S).wait())
        self._say("started", f"service on {addresses.listen}:{addresses.service_port}")
        enrolment = start_enrolment(
            port=addresses.enrol_port,
            addresses=addresses,
            on_enrolled=self._enrolled,
            **shared,
        )
        stack.callback(lambda: enrolment.stop(GRACE_S).wait())
        self._say("started", f"enrolment on {addresses.listen}:{addresses.enrol_port}")
        conductor = threading.Thread(target=self._conduct, name="conductor", daemon=True)
        conductor.start()
        stack.callback(conductor.join, 30.0)
        stack.callback(self._stop.set)
        if self._console is not None:
            stack.callback(self._console.stop)
            self._console.start()

    # ---- while it runs --------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look after the children and the certificates until the stop."""
        while not self._stop.wait(TICK_S):
            try:
                self._revive()
                self._reconcile()
                self._renew()
                if self._console is not None:
                    self._console.look()
            except CohortiumError as error:
                self._complain(f"{error.code}: {error.sentence}")
            except Exception as error:  # the watch goes on: a service that is half there is worse than a line too many
                self._complain(f"an error we did not foresee: {type(error).__name__}")

    def _conduct(self) -> None:
        conductor = Conductor(
            consortium=self._consortium,
            register=self._register,
            engine=self._engine,
            finish=self._finish,
            transport=self._transport,
            say=lambda run, state, message: self._say("run", f"{run}: {state}. {message}"),
        )
        while not self._stop.wait(TICK_S):
            try:
                conductor.tick()
            except Interrupted:
                return
            except CohortiumError as error:
                self._complain(f"{error.code}: {error.sentence}")
            except Exception as error:
                self._complain(f"an error we did not foresee: {type(error).__name__}")

    def _finish(self, folder: RunFolder, mirror: Path) -> None:
        """The end of a run in a process of its own: it wants a model's memory, and the service shall not wait."""
        with open(self._consortium.root / "finish.log", "ab") as log:
            command = [sys.executable, "-m", "cohortium.server.finish", "run", str(folder.root), str(mirror)]
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
            try:
                while child.poll() is None:
                    if self._stop.wait(0.2):
                        raise Interrupted
            finally:
                if child.poll() is None:
                    child.terminate()
                said, _ = child.communicate()
        if child.returncode:
            facts = _json(said)
            raise CohortiumError(
                str(facts.get("error", "FINISH")),
                str(facts.get("sentence", "the run's end broke down: see finish.log")),
            )

    def _revive(self) -> None:
        """A SuperLink that ended is started again, later and later; its runs count as failed, and are resumed."""
        if self._engine.link.alive:
            self._back_off_s = 1.0
            return
        if time.monotonic() < self._not_before:
            return
        self._say("restart", "Flower's SuperLink ended; starting it again")
        self._not_before = time.monotonic() + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)
        self._let_in.clear()
        self._engine.link = self._start_link()

    def _reconcile(self) -> None:
        """Flower and the hub know who is a member: also of those who were enrolled or revoked while they were away."""
        members = self._register.members()
        for member in members:
            if member.role == certificates.SITE and member.active:
                self._shut_out.discard(member.name)
                if self._let_in.get(member.name) != member.supernode:
                    self._engine.let_in(member)
                    self._let_in[member.name] = member.supernode
        for member in members:
            if not member.active and member.name not in self._shut_out:
                self._hub.revoke(member.name)
                self._engine.shut_out(member.name)
                self._let_in.pop(member.name, None)
                self._shut_out.add(member.name)
                self._say("revoked", member.name)

    def _called(self, name: str, version: str) -> None:
        self._seen.saw(name, **({"version": version} if version else {}))

    def _enrolled(self, member: Member, version: str) -> None:
        """Called by the enrolment service: the site's SuperNode may come at once."""
        self._say("enrolled", f"{member.name}, request {member.request}" if member.request else member.name)
        self._called(member.name, version)
        with contextlib.suppress(CohortiumError):  # `_reconcile` tries again
            self._engine.let_in(member)
            self._let_in[member.name] = member.supernode

    def _renew(self, *, at_start: bool = False) -> None:
        chain, now = self._consortium.chain, datetime.now(UTC)
        due = not chain.exists() or certificates.renew_at(chain.read_bytes()) <= now
        if due:
            self._consortium.renew_leaf()
            if not at_start:
                self._say("renewed", "the coordinator's own certificate")
        issuer_ends = self._consortium.issuer().expires if due or at_start else None
        if issuer_ends is not None and issuer_ends - now < ISSUER_WARNING:
            self._complain(
                f"the issuer ends on {issuer_ends:%Y-%m-%d}: fetch the root and run "
                f"cohortium consortium issuer {self._consortium.root}"
            )

    def _complain(self, text: str) -> None:
        """A warning, at most one a minute: what is wrong now is wrong in a second, too."""
        if time.monotonic() - self._warned >= 60.0 or self._warned == 0.0:
            self._warned = time.monotonic()
            self._say("warning", text)


@dataclass(frozen=True, kw_only=True, slots=True)
class _NotingIssuer(Issuer):
    """The issuer, which notes until when each member's certificate holds, for `sites list`."""

    seen: Seen

    def sign_csr(
        self, csr: bytes, *, role: str, name: str, hours: float = LEAF_HOURS, now: datetime | None = None
    ) -> bytes:
        chain = Issuer.sign_csr(self, csr, role=role, name=name, hours=hours, now=now)
        self.seen.saw(name, certificate_until=int(certificates.expires(chain).timestamp()))
        return chain


def noting(issuer: Issuer, seen: Seen) -> Issuer:
    return _NotingIssuer(
        consortium=issuer.consortium,
        certificate=issuer.certificate,
        key=issuer.key,
        root_pem=issuer.root_pem,
        seen=seen,
    )


def _no_link() -> Any:
    raise PeerUnreachable("SUPERLINK-DOWN", "Flower's SuperLink was never started")


class _Nodes:
    """Whether a SuperNode's key (PEM) is that of a member: asked with every request on the Fleet port."""

    def __init__(self, register: Register, seen: Seen) -> None:
        self._register, self._seen = register, seen
        self._known: dict[bytes, tuple[str, str]] = {}
        self._looked = 0.0

    def __call__(self, pem: bytes) -> bool:
        if pem not in self._known and time.monotonic() - self._looked > 1.0:
            self._load()
        name, supernode = self._known.get(pem, ("", ""))
        member = self._register.member(name) if name else None
        if member is None or not member.active or member.supernode != supernode:
            return False
        self._seen.saw(name)
        return True

    def _load(self) -> None:
        from cohortium.server.superlink import public_key_pem

        self._looked = time.monotonic()
        found = {}
        for member in self._register.members():
            with contextlib.suppress(CohortiumError):
                found[public_key_pem(member.supernode)] = (member.name, member.supernode)
        self._known = found


def _json(said: bytes) -> dict[str, Any]:
    try:
        value = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return value if isinstance(value, dict) else {}

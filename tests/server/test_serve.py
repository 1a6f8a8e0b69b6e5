"""`serve`: refusals before anything starts, members known everywhere, children that die and are stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conducting import SITES, make, say_yes, study_of
from consortium import PASSPHRASE, supernode

from cohortium.common.errors import CheckFailed, CohortiumError, PeerUnreachable, Refused, UsageError
from cohortium.common.protocol import certificates
from cohortium.common.protocol.certificates import make_csr, new_key
from cohortium.common.protocol.sockets import only_one
from cohortium.server import serve as module
from cohortium.server.backing import LiveBacking
from cohortium.server.consortium import Addresses, Consortium
from cohortium.server.pki import Issuer
from cohortium.server.seen import Seen, load
from cohortium.server.serve import Interrupted, _Engine, _Nodes, _Service, noting, serve
from cohortium.server.superlink import free_port, public_key_pem


@pytest.fixture
def made(tmp_path: Path) -> Consortium:
    return make(tmp_path / "consortium")


def refusal(made: Consortium, **options: Any) -> CohortiumError:
    with pytest.raises(CohortiumError) as caught:
        serve(made, stop=threading.Event(), **options)
    assert not made.superlink.exists() and not made.hub.exists(), "nothing was started"
    return caught.value


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [".", "root", "root/root.key", "pki", "pki/issuer.key", "pki/server.key", "coordinator.key"]
)
def test_what_others_may_use_is_refused(made: Consortium, name: str) -> None:
    path = made.root / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o040)
    error = refusal(made)
    assert error.code == "MODE-OPEN" and "chmod" in error.hint


def test_a_second_serve_is_refused(made: Consortium) -> None:
    lock = only_one(made.root / "serve.lock")
    try:
        assert isinstance(refusal(made), Refused)
    finally:
        os.close(lock)


def test_a_full_disk_is_refused(made: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1e8}))
    assert refusal(made).code == "DISK-FULL"


def test_an_unknown_transport_is_refused(made: Consortium) -> None:
    assert isinstance(refusal(made, transport="pigeon"), UsageError)


# ---- parts ---------------------------------------------------------------------------------------------------


def test_the_fleet_port_knows_members_and_forgets_the_revoked(made: Consortium, tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.json")
    nodes, register = _Nodes(made.register(), seen), made.register()
    pem = public_key_pem(supernode(SITES[0]))
    assert nodes(pem) and not nodes(public_key_pem(supernode("stranger"))) and not nodes(b"")
    seen.flush()
    assert set(load(tmp_path / "seen.json")) == {SITES[0]}
    register.revoke(SITES[0])
    assert not nodes(pem), "with the next request"
    old = register.member(SITES[0])
    assert old is not None
    keys = {"identity": b"i" * 32, "officer": b"o" * 32, "supernode": supernode("another key")}
    register.enrol(name=SITES[0], role="site", **keys)
    assert not nodes(pem), "the key before last"
    nodes._looked = 0.0
    assert nodes(public_key_pem(supernode("another key")))


def test_sites_list_learns_when_a_certificate_ends(made: Consortium, tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.json")
    issuer = noting(made.issuer(), seen)
    csr = make_csr(new_key(), consortium=made.name, role="site", name=SITES[0])
    chain = issuer.sign_csr(csr, role="site", name=SITES[0])
    seen.flush()
    ends = load(tmp_path / "seen.json")[SITES[0]]["certificate_until"]
    assert isinstance(issuer, Issuer) and ends == int(certificates.expires(chain).timestamp())


def test_the_own_leaf_is_renewed_in_time(made: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    service = _Service(made, threading.Event(), lambda event, text: said.append((event, text)), "stream")
    before = made.chain.read_bytes()
    service._renew()
    assert made.chain.read_bytes() == before and not said

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return certificates.renew_at(before)

    monkeypatch.setattr(module, "datetime", Later)
    service._renew()
    assert made.chain.read_bytes() != before and said == [("renewed", "the coordinator's own certificate")]


def test_the_end_of_the_issuer_is_announced(made: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "ISSUER_WARNING", made.issuer().expires - datetime.now(UTC))
    _Service(made, threading.Event(), lambda _, text: said.append(text), "stream")._renew(at_start=True)
    assert len(said) == 1 and "cohortium consortium issuer" in said[0]


def test_a_superlink_that_is_away(made: Consortium) -> None:
    engine = _Engine()
    for call in (lambda: engine.start_run({}), lambda: engine.run_status(1), lambda: engine.stop_run(1)):
        with pytest.raises(PeerUnreachable, match="SUPERLINK-DOWN"):
            call()


def test_members_are_let_in_and_shut_out_once(made: Consortium) -> None:
    """Whatever command or service changed the register, Flower and the hub hear of it within a tick."""

    class Link:
        alive = True

        def __init__(self) -> None:
            self.calls: list[tuple[str, str]] = []

        def register_supernode(self, name: str, key: str) -> int:
            self.calls.append(("in", name))
            return 1

        def unregister(self, name: str) -> None:
            self.calls.append(("out", name))

    class FakeHub:
        def __init__(self) -> None:
            self.cut: list[str] = []

        def revoke(self, site: str) -> None:
            self.cut.append(site)

    service = _Service(made, threading.Event(), lambda event, text: None, "stream")
    link, hub = Link(), FakeHub()
    service._engine.link, service._hub = link, hub
    service._reconcile()
    service._reconcile()
    assert link.calls == [("in", site) for site in SITES]
    made.register().revoke(SITES[1])
    service._reconcile()
    service._reconcile()
    assert link.calls[3:] == [("out", SITES[1])] and hub.cut == [SITES[1]]


def test_the_end_of_a_run_is_another_process(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"))
    stop = threading.Event()
    service = _Service(made, stop, lambda event, text: None, "stream")
    with pytest.raises(CohortiumError, match="RUN-UNFINISHED"):
        service._finish(made.folder(run), made.mirror)
    stop.set()
    with pytest.raises(Interrupted):
        service._finish(made.folder(run), made.mirror)


# ---- what members ask ----------------------------------------------------------------------------------------


def test_status_rows_and_stop(made: Consortium, tmp_path: Path) -> None:
    register, seen = made.register(), Seen(tmp_path / "seen.json")
    backing, member = LiveBacking(made, register, seen), register.member(SITES[0])
    run = made.propose(study_of(tmp_path / "study"))
    assert backing.status(run, member)["state"] == "proposed"
    assert [row["run"] for row in backing.status(None, member)["runs"]] == [run]
    register.enrol(name="weber", role="researcher", identity=b"", officer=b"", supernode="")
    assert backing.status(None, register.member("weber")) == {"runs": []}
    with pytest.raises(Refused, match="RUN-UNFINISHED"):
        backing.rows(run, 0, "csv")
    for rows, format in ((0, "xlsx"), (-1, "csv"), (10**12, "csv")):
        with pytest.raises(UsageError):
            backing.rows(run, rows, format)
    say_yes(made, run)
    register.set_run(run, state="finished")
    (made.runs / run / "synthetic.csv").write_bytes(b"a,b\n" * 100_000)
    pieces = list(backing.rows(run, 0, "csv"))
    assert len(pieces) == 2 and b"".join(pieces) == b"a,b\n" * 100_000
    with pytest.raises(PeerUnreachable, match="UNAVAILABLE"):
        backing.rows(run, 7, "csv")  # there is no model
    assert not list(made.runs.glob("rows-*"))
    other = made.propose(tmp_path / "study" / "study.toml")
    backing.stop(other)
    assert register.run_row(other).state == "stopping"


def test_a_stranger_gets_no_cosignature(made: Consortium, tmp_path: Path) -> None:
    backing = LiveBacking(made, made.register(), Seen(tmp_path / "seen.json"))
    with pytest.raises(Refused, match="MEMBER-UNKNOWN"):
        backing.witness("stranger", "text")
    with pytest.raises((CheckFailed, CohortiumError)):
        backing.witness(SITES[0], "no checkpoint")


# ---- the whole -----------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Consortium, subprocess.Popen[bytes], Path]]:
    """`cohortium serve --json` as a process, ready."""
    ports = [free_port() for _ in range(4)]
    names = ("service_port", "enrol_port", "fleet_port", "superlink_port")
    addresses = Addresses(host="127.0.0.1", listen="127.0.0.1", **dict(zip(names, ports, strict=True)))
    made = Consortium.create(tmp_path / "c", name="whole", addresses=addresses, passphrase=PASSPHRASE)
    log = tmp_path / "serve.log"
    command = [sys.executable, "-m", "cohortium.simulations.cli", "serve", str(made.root), "--json"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: b"\nready\n" in log.read_bytes() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield made, process, log
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def heard(log: Path, event: str) -> list[str]:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line["text"] for line in lines if line["event"] == event]


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    direct = [int(child) for path in found for child in path.read_text().split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


@pytest.mark.slow
def test_serve_from_ready_to_the_end(served: tuple[Consortium, subprocess.Popen[bytes], Path]) -> None:
    """Ports as documented, a SuperLink that is killed comes back, a revocation is heard, SIGTERM leaves nothing."""
    made, process, log = served
    addresses = made.addresses
    for port in (addresses.service_port, addresses.enrol_port, addresses.fleet_port, addresses.superlink_port):
        socket.create_connection(("127.0.0.1", port), 5).close()
    assert stat.S_IMODE(made.hub.stat().st_mode) == 0o600
    register = made.register()
    register.enrol(name="north", role="site", identity=b"n" * 32, officer=b"o" * 32, supernode=supernode("north"))
    wanted = str(made.superlink).encode()
    link = next(pid for pid in children(process.pid) if wanted in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(link, signal.SIGKILL)
    until(lambda: heard(log, "restart"), 30)
    register.revoke("north")
    until(lambda: heard(log, "revoked") == ["north"], 120)
    everybody = children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 and heard(log, "stopping")
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everybody), 20)

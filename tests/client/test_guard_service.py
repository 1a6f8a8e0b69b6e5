"""The guard's process: one socket, one message at a time, no words, no memory on disk; killed, it comes back."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hospital import RUN, Ward, key, plan, stage, ward
from streaming import until

from cohortium.client import guard_service
from cohortium.client.guard_port import SocketGuard
from cohortium.client.guard_service import serve_guard
from cohortium.common.errors import PeerUnreachable, Refused
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.common.protocol.sockets import local_options
from cohortium.strategies.base import COORDINATOR

SECRET = "patient 17, HIV positive"


class Process:
    """A guard of its own."""

    def __init__(self, directory: Path, socket: Path) -> None:
        self.directory, self.socket = directory, socket
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cohortium.client.guard_service", str(self.directory), str(self.socket)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return ward(tmp_path_factory.mktemp("w"), plan(["a"], stages=[stage("one", "counts", 0)]))


@pytest.fixture(scope="module")
def running(site: Ward) -> Iterator[Process]:
    process = Process(site.directory("a"), site.folder / "guard.sock")
    yield process
    if process.process.poll() is None:
        process.stop()


def hello() -> bytes:
    return seal(Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0}), key(COORDINATOR))


def answered(envelope: bytes) -> Message:
    return unseal(envelope, key("a").public_key(), sender="a")


def test_it_answers(running: Process) -> None:
    with SocketGuard(running.socket, patience_s=60.0) as port:
        assert answered(port.handle(hello())).kind in ("site.hello", "site.refused")
        assert port.site == "a"
        assert answered(port.handle(b"nonsense")).fields == {"code": "BAD-ENVELOPE"}
    assert stat.S_IMODE(running.socket.stat().st_mode) == 0o660


def test_its_only_socket_is_the_one_of_unix(running: Process) -> None:
    with SocketGuard(running.socket, patience_s=60.0) as port:
        port.handle(hello())
        found = _sockets(running.process.pid)
        unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
        # A connection may have ended between the two looks: what is no longer open was nothing else.
        found &= _sockets(running.process.pid) | unix
    assert found, "this test can see what a process has open"
    assert found <= unix, "a socket that is no Unix socket"


def test_another_socket_would_be_seen() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
        assert not _sockets(os.getpid()) <= unix


def _sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets; of a guard only root may look."""
    folder = Path(f"/proc/{pid}/fd")
    if not os.access(folder, os.R_OK):
        pytest.skip("a guard's descriptors are hidden from its own user, as they should be")
    found = set()
    for descriptor in folder.iterdir():
        with contextlib.suppress(OSError):
            name = os.readlink(descriptor)
            if name.startswith("socket:["):
                found.add(name[8:-1])
    return found


def test_its_memory_stays_in_memory(running: Process) -> None:
    with SocketGuard(running.socket, patience_s=60.0) as port:
        port.handle(hello())
    assert resource.prlimit(running.process.pid, resource.RLIMIT_CORE) == (0, 0)
    # PR_SET_DUMPABLE 0 shows: its files in /proc belong to root, whoever runs it.
    assert Path(f"/proc/{running.process.pid}/mem").stat().st_uid == 0


@pytest.mark.slow
def test_hardened() -> None:
    code = "from cohortium.client.guard_service import harden; harden(); import ctypes, os\n"
    code += "assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0; assert os.umask(0) == 0o077"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_second_guard_of_the_directory_refuses_to_start(running: Process, site: Ward) -> None:
    with SocketGuard(running.socket, patience_s=60.0) as port:
        assert port.site == "a"
        with pytest.raises(Refused) as caught:
            serve_guard(site.directory("a"), site.folder / "other.sock")
        assert caught.value.code == "SOCKET-BUSY" and not (site.folder / "other.sock").exists()
        assert (site.directory("a") / "guard.pid").read_text() == f"{running.process.pid}\n"
        assert port.site == "a"


@pytest.mark.slow
def test_killed_it_is_started_again_and_the_courier_notices_nothing(running: Process) -> None:
    with SocketGuard(running.socket, patience_s=60.0) as port:
        before = answered(port.handle(hello()))
        running.kill()
        threading.Timer(0.3, running.start).start()
        assert answered(port.handle(hello())).kind == before.kind
    with SocketGuard(running.socket, patience_s=0.3) as port:
        assert running.stop() == 0 and not running.socket.exists()
        began = time.monotonic()
        with pytest.raises(PeerUnreachable) as caught:
            port.handle(hello())
        assert caught.value.code == "GUARD-DOWN" and time.monotonic() - began < 2.0
        assert str(running.socket) in caught.value.where


def test_a_directory_that_is_no_site_is_said_so(tmp_path: Path) -> None:
    # In words, on the hospital's own terminal; nothing listens.
    code = guard_service.main([str(tmp_path), str(tmp_path / "g.sock")])
    assert code != 0 and not (tmp_path / "g.sock").exists()


# ---- in this process, with guards that misbehave ------------------------------------------------------------


class Fake:
    """Stands for Guard."""

    opened = 0
    handled: list[bytes]
    do: Callable[[bytes], bytes]

    def __init__(self, directory: Path) -> None:
        type(self).opened += 1
        self.site, self.closed = "fake", False

    def handle(self, envelope: bytes) -> bytes:
        return type(self).do(envelope)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Path]]:
    stop = threading.Event()
    threads: list[threading.Thread] = []
    monkeypatch.setattr(guard_service, "Guard", Fake)

    def start(do: Callable[[bytes], bytes]) -> Path:
        Fake.opened, Fake.do = 0, staticmethod(do)  # type: ignore[assignment]
        ready = threading.Event()
        threads.append(
            threading.Thread(
                target=serve_guard, args=(tmp_path, tmp_path / "g.sock"), kwargs={"ready": ready.set, "stop": stop}
            )
        )
        threads[-1].start()
        assert ready.wait(10)
        return tmp_path / "g.sock"

    yield start
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not (tmp_path / "g.sock").exists()


@pytest.mark.parametrize("failure", [ValueError(SECRET), SystemExit(SECRET), KeyboardInterrupt(SECRET), MemoryError()])
def test_a_failure_leaves_without_words(serve: Callable[[Any], Path], failure: BaseException) -> None:
    def do(envelope: bytes) -> bytes:
        if envelope == b"fail":
            raise failure
        return b"fine"

    socket = serve(do)
    with grpc.insecure_channel(f"unix:{socket}", options=local_options()) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rpc.GuardStub(channel).Handle(pb.Envelope(envelope=b"fail"), timeout=10)
        said = caught.value
        assert (said.code(), said.details()) == (grpc.StatusCode.INTERNAL, "GUARD-FAILED")
        assert SECRET not in repr(said) and SECRET not in repr(said.trailing_metadata())
    with SocketGuard(socket) as port:
        with pytest.raises(PeerUnreachable) as wrong:
            port.handle(b"fail")
        assert wrong.value.code == "GUARD-FAILED" and SECRET not in repr(wrong.value.lines())
        assert port.handle(b"well") == b"fine"
        assert Fake.opened == 3, "each failed guard was given up, and opened again from disk"


def test_one_message_at_a_time(serve: Callable[[Any], Path]) -> None:
    inside = most = 0
    names = set()
    lock = threading.Lock()

    def do(envelope: bytes) -> bytes:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            names.add(threading.current_thread().name)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return envelope

    socket = serve(do)
    with SocketGuard(socket) as port:
        results: list[bytes] = []
        threads = [threading.Thread(target=lambda n=n: results.append(port.handle(b"%d" % n))) for n in range(6)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        assert port.site == "fake" and time.monotonic() - began < 0.5
        for thread in threads:
            thread.join(10)
    assert sorted(results) == [b"%d" % n for n in range(6)] and most == 1 and len(names) == 1


def test_the_name_is_told_while_it_works(serve: Callable[[Any], Path]) -> None:
    gate = threading.Event()
    socket = serve(lambda envelope: (gate.wait(10) and b"x") or b"")
    with SocketGuard(socket) as port:
        thread = threading.Thread(target=port.handle, args=(b"q",))
        thread.start()
        time.sleep(0.1)
        assert port.site == "fake"
        gate.set()
        thread.join(10)


def test_an_answer_that_takes_too_long(serve: Callable[[Any], Path]) -> None:
    socket = serve(lambda envelope: time.sleep(0.5) or b"late")
    with SocketGuard(socket, answer_s=0.1) as port:
        with pytest.raises(PeerUnreachable) as caught:
            port.handle(b"q")
        assert caught.value.code == "GUARD-FAILED"


def test_a_port_that_is_closed_waits_no_longer(tmp_path: Path) -> None:
    port = SocketGuard(tmp_path / "none.sock", patience_s=30.0)
    failed: list[str] = []

    def handle() -> None:
        with pytest.raises(PeerUnreachable) as caught:
            port.handle(b"q")
        failed.append(caught.value.code)

    thread = threading.Thread(target=handle)
    thread.start()
    time.sleep(0.2)
    port._stop.set()
    thread.join(5)
    assert failed == ["GUARD-DOWN"]
    port.close()


def test_what_is_too_large_does_not_come_in(serve: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    small = lambda: local_options(max_envelope_bytes=1000)  # noqa: E731
    monkeypatch.setattr(guard_service, "local_options", small)
    seen: list[int] = []
    socket = serve(lambda envelope: seen.append(len(envelope)) or b"x")
    with SocketGuard(socket) as port:
        with pytest.raises(PeerUnreachable):
            port.handle(b"x" * 200_000)
        assert port.handle(b"x" * 1000) == b"x" and seen == [1000]


@pytest.mark.slow
def test_the_ledger_is_closed_on_a_sigterm(tmp_path: Path) -> None:
    """The next process can write it, and what was left for later is on disk."""
    site = ward(tmp_path, plan(["a"], stages=[stage("one", "counts", 0)]))
    process = Process(site.directory("a"), tmp_path / "g.sock")
    with SocketGuard(process.socket, patience_s=60.0) as port:
        port.handle(hello())
        assert process.stop() == 0
    guard = site.guard("a")
    guard.handle(hello())
    until(lambda: not process.socket.exists())
    site.close()

"""The console as a process: what it says and logs, its port, its proxies; and `serve`, which starts and stops it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conducting import make
from console_worlds import PASSWORD
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from cohortium.common.errors import CohortiumError
from cohortium.common.protocol.sockets import only_one
from cohortium.server import serve as serve_module
from cohortium.server.console import child as module
from cohortium.server.console.accounts import COORDINATOR, Accounts
from cohortium.server.console.child import ConsoleChild
from cohortium.server.console.running import run, served
from cohortium.server.console.settings import Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("running") / "consortium").root


@pytest.fixture
def port(root: Path) -> Iterator[int]:
    """A free port, written into console.toml."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number = int(found.getsockname()[1])
    (root / "console.toml").write_text(f"[console]\nport = {number}\n")
    yield number
    (root / "console.toml").unlink()


def first_account(root: Path) -> None:
    accounts = Accounts(root / "console" / "accounts.db")
    accounts.add(f"p{time.monotonic_ns()}", role=COORDINATOR, password=PASSWORD)
    accounts.close()


def until(true: Callable[[], Any], within_s: float = 60.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


# ---- the process ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_life_of_a_console_under_serve(root: Path, port: int) -> None:
    """Nobody has an account; somebody gets one, the port is taken; it answers; it is killed and comes back; it ends."""
    said: list[tuple[str, str]] = []
    child = ConsoleChild(root, lambda event, text: said.append((event, text)))
    try:
        child.start()
        child.look()
        assert child.pid is None and len(said) == 1, "one line, once"
        assert said[0][0] == "console" and f"cohortium console user add {root} NAME" in said[0][1]

        first_account(root)
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))
            other.listen()
            child.start()
            assert len(said) == 2 and said[1][0] == "warning" and "CONSOLE-PORT" in said[1][1]
            assert f"port = {port + 1}" in said[1][1], "the fix"
            until(lambda: not child.alive)
            child.look()
            assert not child.alive, "not at once again"
        until(lambda: (child.look(), child.alive)[1])
        child.start()
        assert said[2:] == [("started", f"console on http://127.0.0.1:{port}")] and answers(port), "ready means ready"
        page = httpx.get(f"http://127.0.0.1:{port}/", headers={"accept": "text/html"}, trust_env=False)
        assert page.status_code == 303 and page.headers["location"] == "/sign-in?next=%2F"
        assert "server" not in page.headers
        strange = httpx.get(f"http://127.0.0.1:{port}/sign-in", headers={"host": "evil.example"}, trust_env=False)
        assert strange.status_code == 421
        httpx.post(f"http://127.0.0.1:{port}/sign-in", data={"name": "secret name", "password": "x"}, trust_env=False)
        log = until(lambda: [line for line in _log(root) if line.get("method") == "POST"])
        assert log[-1]["route"] == "/sign-in" and log[-1]["status"] == 403 and log[-1]["code"] == "WEB-ACCESS"
        text = (root / "console" / "console.log").read_text()
        assert "secret name" not in text and "127.0.0.1:" not in text.replace(f"127.0.0.1:{port}", "")
        assert (root / "console" / "console.log").stat().st_mode & 0o077 == 0

        with pytest.raises(CohortiumError, match="SOCKET-BUSY"):
            run(root)  # a second one of the same folder

        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: not child.alive)
        child.look()
        assert said[3][0] == "restart"
        until(lambda: (child.look(), answers(port))[1])

        pid = child.pid
        child.stop()
        assert not answers(port) and pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert _log(root)[-1]["event"] == "stopped", "it closed its books"
    finally:
        child.stop()


def _log(root: Path) -> list[dict[str, Any]]:
    path = root / "console" / "console.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_why_it_does_not_run_is_an_error_with_its_line(root: Path) -> None:
    (root / "console.toml").write_text("[console]\nprot = 1\n")
    try:
        with pytest.raises(CohortiumError, match="STUDY-UNKNOWN"):
            run(root)
    finally:
        (root / "console.toml").unlink()
    lock = only_one(root / "console.lock")
    os.close(lock)


def test_a_port_that_is_taken(root: Path, port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(CohortiumError) as caught:
            run(root)
    assert caught.value.code == "CONSOLE-PORT" and caught.value.exit_code == 4 and "[console] port" in caught.value.hint
    os.close(only_one(root / "console.lock"))


# ---- the supervisor, with a process that a test plays --------------------------------------------------------


class Played:
    """A child that lives as long as the test says and says what it says."""

    def __init__(self, *lines: bytes) -> None:
        read, write = os.pipe()
        os.write(write, b"".join(lines))
        os.close(write)
        self.stdout = os.fdopen(read, "rb")
        self.returncode: int | None = None
        self.pid = 1

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, _: float | None = None) -> int:
        self.returncode = self.returncode or 0
        return self.returncode

    def send_signal(self, _: int) -> None:
        self.returncode = 0


def test_it_comes_back_later_and_later_and_at_once_after_a_steady_life(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_account(root)
    now, started, played = [0.0], [], []

    def launch(*_: Any, **__: Any) -> Played:
        started.append(now[0])
        played.append(Played(b'{"ready": "x"}\n'))
        return played[-1]

    monkeypatch.setattr(module.subprocess, "Popen", launch)
    child = ConsoleChild(root, lambda *_: None, clock=lambda: now[0])
    for _ in range(200):
        child.look()
        played[-1].returncode = 1
        now[0] += 1.0
    waits = [round(b - a) for a, b in itertools.pairwise(started)]
    assert waits[:6] == [2, 3, 5, 9, 17, 33] and max(waits) <= 62
    while len(started) < 10:
        now[0] += 1.0
        child.look()
    for _ in range(100):
        now[0] += 1.0
        child.look()  # it lives
    played[-1].returncode, count = 1, len(started)
    for _ in range(3):
        child.look()
        now[0] += 1.0
    assert len(started) == count + 1
    child.stop()


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b"\xff\xfe\n", b""])
def test_what_it_cannot_read_does_no_harm(root: Path, monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    first_account(root)
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: Played(line))
    said: list[tuple[str, str]] = []
    child = ConsoleChild(root, lambda event, text: said.append((event, text)))
    child.start(within_s=5)
    assert said == []
    child.stop()


def test_serve_has_a_console_unless_it_is_told_not_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wiring: looked after every tick, before "ready" at the start; --no-console leaves it out."""
    from cohortium.server.consortium import Consortium

    looked: list[str] = []
    monkeypatch.setattr(ConsoleChild, "look", lambda self: looked.append("look"))
    stop = threading.Event()
    for wanted in (True, False):
        stop.clear()
        looked.clear()
        service = serve_module._Service(Consortium(root), stop, lambda *_: None, "stream", console=wanted)
        for name in ("_revive", "_reconcile", "_renew"):
            monkeypatch.setattr(service, name, lambda: None)
        monkeypatch.setattr(serve_module, "TICK_S", 0.01)
        thread = threading.Thread(target=service.watch)
        thread.start()
        time.sleep(0.1)
        stop.set()
        thread.join()
        assert bool(looked) is wanted


# ---- behind a proxy ------------------------------------------------------------------------------------------


async def whoami(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope)
    host = request.client.host if request.client else ""
    await PlainTextResponse(f"{request.url.scheme} {host}")(scope, receive, send)


def through(settings: Settings, *, peer: str, **headers: str) -> tuple[int, str]:
    app: ASGIApp = served(whoami, settings)
    client = TestClient(app, base_url="http://console.example.org", client=(peer, 1234))
    answer = client.get("/x", headers={name.replace("_", "-"): value for name, value in headers.items()})
    return answer.status_code, answer.text


BEHIND = Settings(behind_tls=True, names=("console.example.org",), proxies=("10.0.0.7", "10.1.0.0/24"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "seen"),
    [
        ("10.0.0.7", "198.51.100.4", "198.51.100.4"),
        ("10.1.0.9", "198.51.100.4, 10.0.0.7", "198.51.100.4"),
        ("10.0.0.7", "127.0.0.1, 198.51.100.4", "198.51.100.4"),  # what the visitor wrote in front counts for nothing
        ("10.0.0.7", "10.0.0.7, 198.51.100.4", "198.51.100.4"),
        ("10.0.0.7", "2001:db8::1", "2001:db8::1"),
    ],
)
def test_a_known_proxy_says_from_where_somebody_comes(peer: str, forwarded: str, seen: str) -> None:
    found = through(BEHIND, peer=peer, x_forwarded_for=forwarded, x_forwarded_proto="https")
    assert found == (200, f"https {seen}")


@pytest.mark.parametrize("peer", ["198.51.100.4", "127.0.0.1", "10.0.0.8"])
def test_nobody_comes_past_the_proxy(peer: str) -> None:
    status, text = through(BEHIND, peer=peer, x_forwarded_for="10.0.0.7", x_forwarded_proto="https")
    assert status == 403 and "proxies" in text


@pytest.mark.parametrize("headers", [{}, {"x_forwarded_proto": "http"}, {"x_forwarded_proto": "gopher"}])
def test_what_came_to_the_proxy_in_the_clear_is_not_served(headers: dict[str, str]) -> None:
    status, text = through(BEHIND, peer="10.0.0.7", x_forwarded_for="198.51.100.4", **headers)
    assert status == 403 and "https" in text


def test_without_a_proxy_nobody_says_from_where_he_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    found = through(Settings(), peer="127.0.0.1", x_forwarded_for="198.51.100.4", x_forwarded_proto="https")
    assert found == (200, "http 127.0.0.1")

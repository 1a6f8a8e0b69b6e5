"""The supervisor: both parts run, either comes again after a pause, a person is called when needed, both stop."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hospital import key, plan, policy, proposal, table

from cohortium.client import join as joining
from cohortium.client.approval import approve
from cohortium.client.join import Part, Supervisor, environment, join
from cohortium.client.site import Site, new_site
from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_private

LIVES = "import signal, sys, time; print({word!r}, flush=True)\nwhile True: time.sleep(0.05)"
GUARD = "import os, socket, sys, time\nend = socket.socket(socket.AF_UNIX); end.bind({path!r}); end.listen()\n"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = new_site(tmp_path / "s", policy=policy("a"), identity=key("a"), officer=key("officer of a").public_key())
    make_private(made.courier)
    return made


def fake(site: Site, guard: str = "", courier: str = "") -> Callable[[Site, Part], list[str]]:
    """Processes that behave like the two without their weight."""
    first = GUARD.format(path=str(site.socket)) + (guard or LIVES.format(word="guard"))
    texts = {"guard": first, "courier": courier or LIVES.format(word="12:00 courier: connected")}

    def commands(_: Site, part: Part) -> list[str]:
        if part == "guard":
            site.socket.unlink(missing_ok=True)
        return [sys.executable, "-c", texts[part]]

    return commands


def steps(supervisor: Supervisor, until: Callable[[], bool], *, at_most_s: float = 10.0) -> int:
    ends = time.monotonic() + at_most_s
    while time.monotonic() < ends:
        code = supervisor.step()
        if code or until():
            return code
        time.sleep(0.02)
    raise AssertionError("it did not come so far in time")


def pid(supervisor: Supervisor, part: Part) -> int:
    process = supervisor.parts[part].process
    assert process is not None
    return process.pid


def gone(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_both_start_and_say_that_they_are_ready_and_both_stop(site: Site) -> None:
    said: list[str] = []
    supervisor = Supervisor(site, say=said.append, commands=fake(site))
    steps(supervisor, lambda: any(line.startswith("ready:") for line in said))
    assert said.index("guard is ready") < said.index("courier is ready")  # the courier finds a guard
    numbers = [pid(supervisor, part) for part in ("guard", "courier")]
    supervisor.stop()
    assert all(gone(number) for number in numbers)
    assert (site.logs / "courier.log").read_text() == "12:00 courier: connected\n"
    assert stat.S_IMODE((site.logs / "courier.log").stat().st_mode) == 0o600


@pytest.mark.parametrize("part", ["guard", "courier"])
def test_a_killed_part_comes_again_and_the_other_lives_on(part: Part, site: Site) -> None:
    said: list[str] = []
    supervisor = Supervisor(site, say=said.append, commands=fake(site))
    steps(supervisor, lambda: all(child.ready for child in supervisor.parts.values()))
    other: Part = "courier" if part == "guard" else "guard"
    first, kept = pid(supervisor, part), pid(supervisor, other)
    os.kill(first, signal.SIGKILL)
    steps(supervisor, lambda: supervisor.parts[part].starts == 2 and supervisor.parts[part].ready)
    assert pid(supervisor, part) != first and pid(supervisor, other) == kept
    assert any("signal SIGKILL" in line and "again in 1 s" in line for line in said)
    supervisor.stop()


def test_pauses_double_up_to_a_minute_and_are_forgotten_after_good_minutes(site: Site) -> None:
    now = [0.0]
    ends = fake(site, courier="raise SystemExit(1)")
    supervisor = Supervisor(site, parts=("courier",), commands=ends, clock=lambda: now[0])
    child, pauses = supervisor.parts["courier"], []
    for _ in range(9):
        starts = child.starts
        steps(supervisor, lambda: child.process is None and child.starts == starts + 1)  # noqa: B023
        pauses.append(child.pause)
        now[0] = child.due
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    steps(supervisor, lambda: child.process is not None)
    now[0] += joining.WELL_AFTER_S + 1
    steps(supervisor, lambda: child.process is None)
    assert child.pause == joining.FIRST_PAUSE_S
    supervisor.stop()


@pytest.mark.parametrize("code", [2, 3])
def test_what_a_person_has_to_repair_ends_both_with_its_words(code: int, site: Site) -> None:
    said: list[str] = []
    text = f"import sys; print('MODE-OPEN: group or others may use it'); sys.exit({code})"
    supervisor = Supervisor(site, say=said.append, commands=fake(site, courier=text))
    stop = threading.Event()
    late = threading.Timer(20, stop.set)  # a supervisor that goes on for ever fails this test and does not hang it
    late.start()
    code_found = supervisor.run(stop)
    late.cancel()
    assert code_found == code
    assert any("MODE-OPEN" in line for line in said)
    assert all(child.process is None for child in supervisor.parts.values())


def test_one_that_does_not_listen_to_sigterm_is_killed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "STOP_WITHIN_S", 0.5)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LIVES.format(word="connected")
    supervisor = Supervisor(site, commands=fake(site, courier=deaf))
    steps(supervisor, lambda: all(child.ready for child in supervisor.parts.values()))
    number = pid(supervisor, "courier")
    supervisor.stop()
    assert gone(number)


def test_a_socket_that_a_crash_left_behind_is_no_guard(site: Site) -> None:
    subprocess.run([sys.executable, "-c", GUARD.format(path=str(site.socket))], check=True)
    time.sleep(0.2)
    said: list[str] = []
    supervisor = Supervisor(site, say=said.append, commands=lambda *_: [sys.executable, "-c", LIVES.format(word="x")])
    for _ in range(10):
        supervisor.step()
        time.sleep(0.02)
    assert supervisor.parts["courier"].process is None and "guard is ready" not in said
    supervisor.stop()


def test_logs_are_rotated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "LOG_BYTES", 2000)
    talks = "for i in range(1000): print('line', i)\nprint('connected', flush=True)\n" + LIVES.format(word="x")
    supervisor = Supervisor(site, parts=("courier",), commands=fake(site, courier=talks))
    steps(supervisor, lambda: supervisor.parts["courier"].ready)
    supervisor.stop()
    files = sorted(site.logs.iterdir())
    assert 1 < len(files) <= joining.LOG_FILES and all(path.stat().st_size <= 2000 for path in files)


def test_the_environment_is_a_short_list(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET", "WARD_PASSWORD", "HTTPS_PROXY", "COHORTIUM_OFFICER"):
        monkeypatch.setenv(name, "x")
    found = environment(site, "guard"), environment(site, "courier")
    for one in found:
        assert not {"AWS_SECRET", "COHORTIUM_OFFICER", "WARD_PASSWORD"} & set(one)
        assert one["FLWR_TELEMETRY_ENABLED"] == "0" and one["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert "HTTPS_PROXY" not in found[0] and "HTTPS_PROXY" in found[1]
    policy("a", table="postgresql://r@h/d", query="SELECT 1", password="env:WARD_PASSWORD").save(site.policy_path)
    assert "WARD_PASSWORD" in environment(site, "guard") and "WARD_PASSWORD" not in environment(site, "courier")


def test_nothing_starts_with_an_open_key_or_after_leaving(site: Site) -> None:
    site.guard.chmod(0o750)
    with pytest.raises(Refused, match="MODE-OPEN"):
        join(site)
    site.guard.chmod(0o700)
    (site.courier / "leaf.key").touch(mode=0o644)
    with pytest.raises(Refused, match="MODE-OPEN"):
        join(site)
    with pytest.raises(UsageError, match="SITE-USERS"):
        join(site, guard_user="0")
    site.left.touch()
    with pytest.raises(Refused, match="SITE-LEFT"):
        join(site)


@pytest.mark.slow
def test_join_supervises_the_real_guard_and_ends_on_sigterm(site: Site) -> None:
    table(30, prefix="a").to_parquet(site.guard / "data.parquet")
    approve(site.guard, proposal(plan()), key("officer of a"))
    process = subprocess.Popen(
        [sys.executable, "-m", "cohortium.client.cli", "join", str(site.root), "--only", "guard"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = ""
        while "ready:" not in line:
            line = process.stderr.readline()
            assert line, "it ended before it was ready"
        from cohortium.client.guard_port import SocketGuard

        with SocketGuard(site.socket) as guard:
            assert guard.site == "a"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not site.socket.exists()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
def test_children_end_with_a_supervisor_that_was_killed(site: Site) -> None:
    text = (
        "import sys, threading; from pathlib import Path\n"
        "from cohortium.client.join import Supervisor; from cohortium.client.site import Site\n"
        f"site = Site(Path({str(site.root)!r}))\n"
        f"words = 'import time; print(\"connected\", flush=True); time.sleep(600)'\n"
        "one = Supervisor(site, parts=('courier',), commands=lambda *_: [sys.executable, '-c', words])\n"
        "one.step(); print(one.parts['courier'].process.pid, flush=True); threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 10
    while not _ended(child):
        assert time.monotonic() < ends, "the child outlived its supervisor"
        time.sleep(0.05)


def _ended(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True

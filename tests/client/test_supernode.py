"""SuperNode and courier as processes: who they let near, what ends them, and how soon they are back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest

from cohortium.client import supernode
from cohortium.client.supernode import TAKEN_FOR_S, Pace, _clean_ends, load_key, sign_off, start_supernode
from cohortium.common.errors import UsageError
from cohortium.simulations.benchmarks.flower_exchange import (
    MODULE,
    Setting,
    consortium,
    finish,
    wait_until_online,
    write_courier,
)

SITE = "north"
PLANTED = "COHORTIUM_TEST_PLANTED"


def test_the_pace_is_quick_while_messages_come_and_flowers_own_when_idle() -> None:
    slept: list[float] = []
    pace = Pace(slept.append)
    pace(3.0)
    assert slept == [3.0]
    for _ in range(20):
        pace(0.5)
    assert slept[1] < 0.03 and slept[20] == 0.5 and sum(slept[1:6]) < 0.5
    slept.clear()
    for _ in range(60):
        pace(3.0)
    assert slept[0] == pytest.approx(0.1) and slept[-1] == 3.0 and slept == sorted(slept)
    pace(0.5)
    pace(3.0)
    assert slept[-2] < 0.03 and slept[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("step", ["pull_object", "confirm_message_received"])
def test_a_run_that_ends_while_its_message_is_fetched_leaves_nothing_behind(step: str) -> None:
    """Flower's own fetching, with a SuperLink whose run ends at one of its steps."""
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode.start_client_internal import _pull_and_store_message

    message = MagicMock()
    message.metadata = SimpleNamespace(run_id=1, group_id="discover", message_id="m", message_type="query.hello")

    def ended(*_: object) -> bytes:
        raise RunNotRunningException

    def fetch(pull_and_store: Callable[..., int | None]) -> tuple[MagicMock, int | None]:
        state, store = MagicMock(), MagicMock()
        store.preregister.return_value = ["object"]
        calls = {"pull_object": lambda run, name: b"bytes", "confirm_message_received": lambda run, name: None}
        got = pull_and_store(
            state=state,
            object_store=store,
            node_config={},
            receive=lambda: (message, MagicMock()),
            get_run=ended,
            get_fab=ended,
            trusted_entities=None,
            **{**calls, step: ended},
        )
        return state, got

    state, got = fetch(_pull_and_store_message)
    assert got is None and state.create_task.called and not state.finish_task.called, "Flower mends it: take ours away"
    state, got = fetch(_clean_ends(_pull_and_store_message, RunNotRunningException))
    assert got is None and state.finish_task.call_args.kwargs["sub_status"] == "failed"
    state.delete_messages.assert_called_once_with(message_ids=["m"])


def test_files_that_are_missing_or_no_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="COURIER-MISSING"):
        start_supernode(tmp_path, fleet_address="127.0.0.1:1")
    (tmp_path / "supernode").write_text("no key")
    with pytest.raises(UsageError, match="SUPERNODE-KEY"):
        load_key(tmp_path / "supernode")


def test_signing_off_without_a_known_node_is_not_needed_and_without_a_superlink_impossible(tmp_path: Path) -> None:
    write_courier(tmp_path / "c", name=SITE, fleet_address="127.0.0.1:1", root_pem=_root(tmp_path))
    assert sign_off(tmp_path / "c", fleet_address="127.0.0.1:1")
    (tmp_path / "c" / "supernode.id").write_text("7")
    assert not sign_off(tmp_path / "c", fleet_address="127.0.0.1:1")


def _root(folder: Path) -> bytes:
    from cohortium.server.superlink import write_loopback_certificates

    write_loopback_certificates(folder)
    return (folder / "ca.pem").read_bytes()


def test_little_of_the_environment_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PLANTED, "PYTHONPATH", "PYTHONSTARTUP", "SSL_CERT_FILE", "HTTP_PROXY", "FLWR_TELEMETRY_ENABLED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://way-out:3128")
    made = supernode._environment(tmp_path)
    assert not {PLANTED, "PYTHONPATH", "PYTHONSTARTUP", "SSL_CERT_FILE", "HTTP_PROXY"} & set(made)
    assert made["FLWR_TELEMETRY_ENABLED"] == "0" and made["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert made["HTTPS_PROXY"] == "http://way-out:3128"
    assert made["FLWR_HOME"].startswith(str(tmp_path)) and made["HOME"].startswith(str(tmp_path))


# ---- with Flower --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    os.environ[PLANTED] = "PATIENT-4711"
    try:
        with consortium(tmp_path_factory.mktemp("field"), sites=(SITE,)) as setting:
            yield setting
    finally:
        del os.environ[PLANTED]


def supernode_of(courier: int) -> psutil.Process:
    (found,) = [p for p in psutil.Process(courier).children() if "cohortium.client.supernode" in p.cmdline()]
    return found


def courier_of(field: Setting) -> int:
    return field.couriers[SITE].pid


@pytest.mark.slow
def test_the_supernode_listens_on_loopback_and_knows_nothing_of_our_environment(field: Setting) -> None:
    process = supernode_of(courier_of(field))
    addresses = {c.laddr.ip for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}
    variables = process.environ()
    assert PLANTED not in variables and variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert process.cwd() == str(field.root / SITE)
    directory = field.root / SITE
    for _ in range(600):  # it is written once the SuperLink has answered
        if (directory / "supernode.id").exists():
            break
        time.sleep(0.1)
    for name in ("superexec.secret", "supernode.log", "supernode.id"):
        assert (directory / name).stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_hostile_bundle_is_answered_and_never_opened(field: Setting, tmp_path: Path) -> None:
    """The run ships modules that make a file when anything imports them; the answers come all the same."""
    made = tmp_path / "made-by-the-bundle"
    app = tmp_path / "app"
    app.mkdir()
    evil = f"open({str(made)!r}, 'w').close()\n"
    (app / "pyproject.toml").write_text(
        '[project]\nname = "cohortium-run"\nversion = "1.0.1"\nlicense = "Apache-2.0"\n'
        '[tool.flwr.app]\npublisher = "cohortium"\n[tool.flwr.app.components]\nserverapp = "good:app"\n'
        'clientapp = "evil:app"\n[tool.flwr.app.config]\nrun-directory = ""\n'
    )
    (app / "good.py").write_text("from tests_one_exchange import app as _app\n\napp = _app\n")
    (app / "tests_one_exchange.py").write_text(
        "import json, pathlib\n"
        "from cohortium.server.app import coordinator_app\n"
        "def work(courier, context):\n"
        "    courier.discover(['north'], timeout_s=60)\n"
        "    got = courier.exchange({'north': b'envelope'}, timeout_s=60)\n"
        "    pathlib.Path(context.run_config['run-directory']).write_bytes(got.get('north', b'absent'))\n"
        "app = coordinator_app(work)\n"
    )
    for name in ("evil.py", "sitecustomize.py", "client.py"):
        (app / name).write_text(evil)
    out = tmp_path / "answer"
    run = field.link.start_run({"run-directory": str(out)}, app=app)
    assert finish(field.link, run) == "finished:completed"
    assert out.read_bytes() == b"envelope"
    assert not made.exists()
    assert not (field.root / SITE / "home" / "flwr" / "apps").exists()


@pytest.mark.slow
def test_a_supernode_that_was_killed_is_back_long_before_flower_would_let_it(field: Setting) -> None:
    """Planted bug that turns this red: leave `sign_off` out of the courier, and Flower answers 412 for 60 s."""
    first = supernode_of(courier_of(field))
    first.send_signal(signal.SIGKILL)
    start = time.monotonic()
    deadline = start + TAKEN_FOR_S - 10
    while time.monotonic() < deadline:
        again = [p for p in psutil.Process(courier_of(field)).children() if p.pid != first.pid]
        log = (field.root / SITE / "supernode.log").read_bytes()
        if again and log.count(b"SuperNode ID:") == 2 and field.link.supernodes()[SITE] == "online":
            break
        time.sleep(0.2)
    else:
        pytest.fail("the SuperNode did not come back")
    assert b"Exit Code: 305" not in (field.root / SITE / "supernode.log").read_bytes()


@pytest.mark.slow
def test_a_courier_that_was_killed_takes_its_supernode_along_and_can_be_started_again(field: Setting) -> None:
    process = field.couriers[SITE]
    node = supernode_of(process.pid)
    process.kill()
    process.wait()
    node.wait(10)
    command = [sys.executable, "-m", MODULE, "--courier", str(field.root / SITE)]
    field.couriers[SITE] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(1)
    wait_until_online(field.link, [SITE], within_s=TAKEN_FOR_S - 10)


@pytest.mark.slow
def test_a_revoked_supernode_is_refused_and_told_to_stop_ends_both(field: Setting) -> None:
    process = field.couriers[SITE]
    node = supernode_of(process.pid)
    field.link.unregister(SITE)
    node.wait(20)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(20) == 0
    assert time.monotonic() - start < 15
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(field.root / SITE) in (p.info["cmdline"] or [])]


@pytest.mark.slow
def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cohortium.client.courier", *arguments], capture_output=True, text=True, timeout=60
        )

    assert run().returncode == 2
    ended = run(str(tmp_path))
    assert ended.returncode == 2 and "COURIER-SETTINGS" in ended.stderr
    settings = dict.fromkeys(("name", "consortium", "coordinator_key"), "x")
    settings |= dict.fromkeys(("service_address", "fleet_address", "enrol_address"), "127.0.0.1:1")
    settings["socket"] = str(tmp_path / "guard.sock")
    (tmp_path / "courier.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    ended = run(str(tmp_path))
    assert ended.returncode == 2 and "COURIER-MISSING" in ended.stderr

"""The supervised SuperLink: loopback only, node authentication on, little environment, our app bundle."""

from __future__ import annotations

import ast
import fcntl
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.cli.build import build_fab_from_disk

from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.server import superlink
from cohortium.server.superlink import SHIM, SuperLink, public_key_pem
from cohortium.simulations.benchmarks.flower_exchange import finish

PLANTED = "COHORTIUM_TEST_PLANTED"


def openssh(key: object) -> str:
    public = key.public_key()  # type: ignore[attr-defined]
    made: bytes = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return made.decode()


def p384() -> str:
    return openssh(ec.generate_private_key(ec.SECP384R1()))


def test_the_bundle_of_a_run_holds_no_code_but_a_name() -> None:
    content = build_fab_from_disk(SHIM)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if not name.startswith(".info/")]
        assert sorted(names) == ["cohortium_run.py", "pyproject.toml"]
        module = ast.parse(archive.read("cohortium_run.py"))
    assert [type(part) for part in module.body] == [ast.Expr, ast.ImportFrom, ast.Assign]
    assert build_fab_from_disk(SHIM) == content


def test_a_supernodes_key_is_p_384_or_refused() -> None:
    assert public_key_pem(p384()).startswith(b"-----BEGIN PUBLIC KEY-----")
    for other in (
        openssh(ed25519.Ed25519PrivateKey.generate()),
        openssh(ec.generate_private_key(ec.SECP256R1())),
        "",
        "no key",
    ):
        with pytest.raises(UsageError, match="SUPERNODE-KEY"):
            public_key_pem(other)


# ---- with Flower --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("consortium")
    (root / "runs").mkdir()
    return root


@pytest.fixture(scope="module")
def link(consortium: Path) -> Iterator[SuperLink]:
    os.environ[PLANTED] = "x"
    try:
        made = SuperLink.start(consortium / "superlink", consortium=consortium)
    finally:
        del os.environ[PLANTED]
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.slow
def test_it_listens_on_the_loopback_interface_only_and_keeps_to_its_folder(link: SuperLink) -> None:
    family = [psutil.Process(link.pid), *psutil.Process(link.pid).children(recursive=True)]
    listening = {
        (c.laddr.ip, c.laddr.port)
        for process in family
        for c in process.net_connections(kind="inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", link.port)}
    for process in family:
        variables = process.environ()
        assert PLANTED not in variables and variables["FLWR_TELEMETRY_ENABLED"] == "0"
        assert variables["HOME"].startswith(str(link.folder)) and variables["FLWR_HOME"].startswith(str(link.folder))
    for name in ("state.db", "loopback.key", "superlink.log", "lock"):
        assert (link.folder / name).stat().st_mode & 0o077 == 0, name
    assert link.folder.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_supernode_without_a_registered_key_is_refused(link: SuperLink) -> None:
    url = f"https://{link.address}/v1/fleet/pull-messages"
    headers = {"content-type": "application/x-protobuf"}
    context = ssl.create_default_context(cafile=str(link.ca))
    assert httpx.post(url, content=b"", headers=headers, verify=context).status_code in (400, 401, 415)
    register = url.replace("pull-messages", "register-node")
    assert not httpx.post(register, content=b"", headers=headers, verify=context).is_success


@pytest.mark.slow
def test_supernodes_are_registered_once_replaced_and_forgotten(link: SuperLink) -> None:
    first, second = p384(), p384()
    one = link.register_supernode("east", first)
    assert link.register_supernode("east", first) == one
    assert link.supernodes() == {"east": "registered"}
    assert link.register_supernode("east", second) != one
    assert link.supernodes() == {"east": "registered"}
    link.unregister("east")
    link.unregister("nobody")
    assert link.supernodes() == {}


@pytest.mark.slow
def test_a_run_outside_the_consortium_fails_and_says_only_a_code(link: SuperLink, tmp_path: Path) -> None:
    run = link.start_run({"run-directory": str(tmp_path), "transport": "flower"})
    assert finish(link, run) == "finished:failed"
    link.stop_run(run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_cannot_be_driven_leaves_a_line_for_people(link: SuperLink, consortium: Path) -> None:
    root = consortium / "runs" / "r1"
    root.mkdir()
    run = link.start_run({"run-directory": str(root), "transport": "flower"})
    assert link.run_status(run).split(":")[0] in ("pending", "starting", "running")
    assert finish(link, run) == "finished:failed"
    (line,) = [json.loads(text) for text in (root / "run" / "events.jsonl").read_text().splitlines()]
    assert line["event"] == "failed" and line["code"] == "STUDY-FILE"


@pytest.mark.slow
def test_a_setting_that_the_app_does_not_name_is_refused(link: SuperLink) -> None:
    with pytest.raises(PeerUnreachable, match="SUPERLINK-CALL"):
        link.start_run({"another": "x"})
    with pytest.raises(PeerUnreachable, match="SUPERLINK-CALL"):
        link.run_status(5)


@pytest.mark.slow
def test_a_run_can_be_stopped(link: SuperLink, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((SHIM / "pyproject.toml").read_text())
    (tmp_path / "cohortium_run.py").write_text(
        "import time\nfrom cohortium.server.app import coordinator_app\n"
        "_app = coordinator_app(lambda grid, context: time.sleep(120))\napp = _app\n"
    )
    run = link.start_run({"run-directory": "/x"}, app=tmp_path)
    while link.run_status(run) in ("pending", "starting"):
        time.sleep(0.2)
    link.stop_run(run)
    assert finish(link, run, within_s=30) == "finished:stopped"


@pytest.mark.slow
def test_a_new_start_keeps_who_is_registered_and_the_address(link: SuperLink) -> None:
    public, ca, address = p384(), link.ca.read_bytes(), link.address
    node = link.register_supernode("south", public)
    link.stop()
    assert not link.alive
    again = SuperLink.start(link.folder)
    try:
        assert (again.address, again.ca.read_bytes()) == (address, ca)
        assert again.register_supernode("south", public) == node
    finally:
        again.stop()


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_superlink_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cohortium.server.superlink import SuperLink;"
        "link = SuperLink.start(Path(sys.argv[1])); print(link.pid, flush=True); time.sleep(100)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(family) >= 2
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive and len(gone) == len(family)


def test_a_port_or_a_folder_that_is_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "STOP_WITHIN_S", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PeerUnreachable, match="SUPERLINK-BUSY"):
            SuperLink.start(tmp_path, port=taken.getsockname()[1])
    with open(tmp_path / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PeerUnreachable, match="SUPERLINK-BUSY"):
            SuperLink.start(tmp_path)

"""Both images are built for real, without network, and run from compose.consortium.yml: a coordinator and a hospital.

Needs root and Debian's buildah, debootstrap and crun; takes minutes. `container_engine` says what of the compose file
is carried out and what only a real engine does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from container_engine import Buildah, Engine, compose

ROOT = Path(__file__).parents[2]
BASE = "localhost/debian:bookworm"
SITE = "cleveland"
GUARD, COURIER, IT = f"guard-{SITE}", f"courier-{SITE}", f"it-{SITE}"
MAY_WRITE = {
    "coordinator": {"/consortium", "/invitations"},
    GUARD: {"/site/guard", "/site/run"},
    COURIER: {"/site/courier"},
}
PASSPHRASE = "correct horse battery staple"
MARKER = "PLANTED-IN-A-RECORD"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(os.geteuid() != 0, reason="building and running images needs root"),
]


def lap(what: str, since: float) -> None:
    print(f"{what}: {time.monotonic() - since:.0f} s")


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """Both images, built from a clean copy of the files that git knows or would add."""
    for program in ("buildah", "debootstrap", "crun"):
        assert shutil.which(program), f"{program} is missing: apt-get install buildah debootstrap crun"
    place = tmp_path_factory.mktemp("images")
    context, rootfs = place / "context", place / "rootfs"
    context.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, files)):
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name)
    since = time.monotonic()
    include = "--include=ca-certificates,python3,python3-venv"
    with open(place / "debootstrap.log", "wb") as log:
        debian = subprocess.Popen(
            ["debootstrap", "--variant=minbase", include, "bookworm", rootfs], stdout=log, stderr=log
        )
    wheels = ["sh", context / "docker" / "wheelhouse.sh"]
    done = subprocess.run(wheels, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert debian.wait() == 0, (place / "debootstrap.log").read_text()[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
    lap("base system and wheelhouse", since)
    found = Buildah.at(place / "storage")
    try:
        since = time.monotonic()
        found.base(rootfs, BASE)
        lap("base image", since)
        for name in ("server", "client"):
            since = time.monotonic()
            file = context / "docker" / f"{name}.Dockerfile"
            found.build(file, context=context, tag=f"localhost/cohortium/{name}:0.2.0", base=BASE)
            lap(f"{name} image ({found.driver} storage)", since)
        shutil.rmtree(rootfs)
        yield found
    finally:
        found.close()
        shutil.rmtree(place, ignore_errors=True)


def folder(path: Path, uid: int, mode: int = 0o700) -> Path:
    path.mkdir(parents=True)
    os.chown(path, uid, uid)
    os.chmod(path, mode)
    return path


@pytest.fixture(scope="module")
def engine(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The coordinator and one hospital, enrolled and running, as docs/containers.md sets them up."""
    trial = tmp_path_factory.mktemp("trial")
    for outer in (trial, *list(trial.parents)[:2]):
        os.chmod(outer, 0o755)  # pytest's own folders; the containers' users pass through
    folder(trial / "invitations", 49999)
    folder(trial / "volumes" / "consortium", 49999)
    folder(trial / "sites" / SITE, 0)
    data = folder(trial / "data" / SITE, 0, 0o755)
    table = pd.read_parquet(ROOT / "simulations" / "data" / "heart.parquet")
    table = table[table["hospital"] == "Cleveland"].drop(columns="hospital").assign(note=MARKER)
    table.to_parquet(data / "records.parquet")
    os.chmod(data / "records.parquet", 0o644)
    project = compose(ROOT / "docker" / "compose.consortium.yml", {"COHORTIUM_TRIAL": str(trial)})
    found = Engine(buildah=buildah, folder=trial, project=project, hosts=("coordinator",))
    since = time.monotonic()
    try:
        create = ["consortium", "init", "/consortium", "--name", "trial", "--host", "coordinator"]
        found.run("coordinator", *create, "--passphrase", "env:ROOT", variables={"ROOT": PASSPHRASE})
        found.network = found.up("coordinator").pid
        paper = f"/invitations/{SITE}.invitation"
        found.exec("coordinator", "cohortium", "sites", "invite", "/consortium", SITE, "--out", paper)
        policy = ["--lifetime-epsilon", "10", "--lifetime-delta", "1e-6", "--unit", "row", "--hospitals", "1"]
        policy += ["--minimum-sites", "3", "--minimum-colluders", "1", "--minimum-patients", "50"]
        policy += ["--generator", "joined", "--strategy", "secure-sum", "--evaluation"]
        found.run(IT, "init", "/site", "--invitation", paper, "--table", "/data/records.parquet", *policy)
        found.up(GUARD)
        found.up(COURIER)
        lap("a coordinator and a hospital", since)
        yield found
    finally:
        found.close()


def shell(engine: Engine, service: str, script: str) -> str:
    return engine.exec(service, "sh", "-c", script, check=False).stdout


def test_courier_reaches_the_coordinator_and_its_guard(engine: Engine) -> None:
    until = time.monotonic() + 180
    while "connected" not in engine.said(COURIER):
        assert time.monotonic() < until, engine.said(COURIER)
        time.sleep(0.5)
    (member,) = json.loads(engine.exec("coordinator", "cohortium", "sites", "list", "/consortium", "--json").stdout)
    assert (member["name"], member["state"]) == (SITE, "enrolled")
    name = "from cohortium.client.guard_port import SocketGuard; from pathlib import Path; "
    name += "print(SocketGuard(Path('/site/run/guard.sock')).site)"
    assert engine.exec(COURIER, "python", "-c", name).stdout.strip() == SITE


def test_hospital_it_can_check_it_all(engine: Engine) -> None:
    found = json.loads(engine.run(IT, "check", "/site", "--json"))
    assert {row["check"]: row["problem"] for row in found if row["word"] == "fail"} == {}
    for service in (GUARD, COURIER):  # the tool gave every directory back
        assert engine.exec(service, "python", "/app/healthcheck.py", "socket", "/site/run/guard.sock").returncode == 0
    assert shell(engine, GUARD, "find /site/guard ! -user guard") == ""
    assert shell(engine, COURIER, "find /site/courier ! -user app") == ""


@pytest.mark.parametrize("service", ["coordinator", GUARD, COURIER])
def test_processes_have_no_privilege_and_nowhere_to_write(engine: Engine, service: str) -> None:
    status = dict(
        line.split(":\t", 1) for line in shell(engine, service, "cat /proc/1/status").splitlines() if ":\t" in line
    )
    uid = 49998 if service == GUARD else 49999
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(uid)] * 4
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # -xdev: the image's own file system, and the places where something else is mounted.
    found = shell(engine, service, "find / -xdev -writable ! -type l ! -path '/proc/*' 2>/dev/null").split()
    assert set(found) == {"/tmp"} | MAY_WRITE[service]
    assert "Read-only" in shell(engine, service, "touch /app/x 2>&1")
    assert shell(engine, service, "touch /tmp/x && echo yes") == "yes\n"
    assert shell(engine, service, "cp /bin/true /tmp/t && /tmp/t || echo no").strip().endswith("no")


def test_guard_has_no_network(engine: Engine) -> None:
    devices = shell(engine, GUARD, "cat /proc/net/dev").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]
    assert shell(engine, GUARD, "tail -n +2 /proc/net/route; tail -n +2 /proc/net/tcp; tail -n +2 /proc/net/tcp6") == ""
    connect = "import socket; socket.create_connection(('127.0.0.1', 7441), 2)"
    assert "refused" in engine.exec(GUARD, "python", "-c", connect, check=False).stderr
    assert engine.exec(COURIER, "python", "-c", connect, check=False).returncode == 0  # the check itself has power


def test_guard_cannot_change_the_records(engine: Engine) -> None:
    assert shell(engine, GUARD, "ls /data").split() == ["records.parquet"]
    assert "Read-only" in shell(engine, GUARD, "touch /data/x 2>&1")


def test_courier_sees_neither_records_nor_keys(engine: Engine) -> None:
    assert sorted(shell(engine, COURIER, "ls -A /site").split()) == ["courier", "run"]
    assert shell(engine, COURIER, "ls -A /data /invitations").split() == ["/data:", "/invitations:"]
    assert shell(engine, COURIER, "grep -rl PLANTED-IN-A -s /site /data /app /tmp /run /var") == ""
    assert (
        shell(engine, COURIER, "ls /proc | grep -E '^[0-9]+$' | xargs -I P cat /proc/P/cmdline").count("guard_service")
        == 0
    )
    # It may connect to the socket, and put nothing beside it.
    assert shell(engine, COURIER, "touch /site/run/x 2>&1 || echo no").endswith("no\n")
    # The guard's container sees them, so the search above would have.
    assert (
        MARKER.encode()
        in Path(engine.project["services"][GUARD]["volumes"][2]["source"], "records.parquet").read_bytes()
    )
    assert sorted(shell(engine, GUARD, "ls -A /site").split()) == ["guard", "run"]


@pytest.mark.parametrize("name", ["server", "client"])
def test_image_is_small_and_tells_nothing(buildah: Buildah, name: str) -> None:
    found = buildah.config(f"localhost/cohortium/{name}:0.2.0")
    config = found["Docker"]["config"]
    assert (config["User"], config["WorkingDir"]) == ("49999:49999", "/app")
    assert config["Entrypoint"] == ["cohortium"] and config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    told = json.dumps(found)
    assert "PIP_INDEX_URL" not in told and "PIP_EXTRA" not in told
    container = buildah("from", "--pull-never", f"localhost/cohortium/{name}:0.2.0")
    root = Path(buildah("mount", container))
    venv = root / "python" / "venv"
    (site_packages,) = venv.glob("lib/python3.*/site-packages")
    assert (site_packages / "cohortium").is_dir() and (site_packages / "torch").is_dir()
    assert not [
        p.name
        for p in (venv / "bin").glob("*")
        if p.name.startswith(("pip", "uv", "easy_install")) and p.name != "uvicorn"
    ]
    assert not (site_packages / "pip").exists()
    assert not (root / "src").exists() or not any((root / "src").iterdir())
    assert not (root / "wheels").exists() or not any((root / "wheels").iterdir())
    assert (site_packages / "duckdb").is_dir() == (name == "client")
    size = int(subprocess.run(["du", "-sm", root], capture_output=True, text=True, check=True).stdout.split()[0])
    print(f"{name} image: {size} MB")
    assert size < 1900
    buildah("rm", container)


def test_both_stop_when_told(engine: Engine) -> None:
    """Last: SIGTERM ends each of them in time and in order."""
    for service in (COURIER, GUARD, "coordinator"):
        since = time.monotonic()
        assert engine.stop(service) == 0
        lap(f"{service} stopped", since)

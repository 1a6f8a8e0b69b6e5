"""The courier answers the SuperNode's tasks with the installed ClientApp, whatever the run's app bundle holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from cohortium.client import courier, guard_port
from cohortium.client.courier import CourierSettings, TaskLoop, installed_app
from cohortium.common.errors import UsageError
from cohortium.common.protocol.flower import CARRY, HELLO, Parcel, Refusal, pack, reply, unpack

SECRET = b"s" * 32
RUN, NODE = 77, 5
SETTINGS = {
    "name": "north",
    "consortium": "heart",
    "service_address": "127.0.0.1:1",
    "fleet_address": "127.0.0.1:2",
    "enrol_address": "127.0.0.1:3",
    "coordinator_key": "00" * 32,
    "socket": "/run/guard.sock",
}


class FakeNode:
    """Flower's own Runtime API of a SuperNode, in this process; messages are put in by hand."""

    def __init__(self) -> None:
        self.factory = NodeStateFactory(ObjectStoreFactory())
        self.state = self.factory.state()
        self.state.set_node_id(NODE)
        config = uvicorn.Config(create_app(self.factory, SECRET), host="127.0.0.1", port=0, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.address = f"127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def give(self, message: Message, fab: bytes = b"no zip at all", *, broken: bool = False) -> None:
        """As flwr.supernode does it: run, bundle, context, task, message, objects."""
        digest = hashlib.sha256(fab).hexdigest()
        run = Run.create_empty(RUN)
        run.fab_id, run.fab_version, run.fab_hash = "evil/app", "1.0.0", digest
        context = Context(run_id=RUN, node_id=NODE, node_config={}, state=RecordDict(), run_config={}, series_id=0)
        self.state.set_run_series_context(0, context)
        self.state.store_run(run)
        self.state.store_fab(Fab(digest, fab, {}))
        assert self.state.create_task(task_type="flwr-clientapp", run_id=RUN, fab_hash=digest)
        message.metadata.__dict__["_message_id"] = message.object_id
        store = self.state.object_store
        store.verify = not broken  # type: ignore[attr-defined]
        store.preregister(RUN, get_object_tree(message))
        for name, item in get_all_nested_objects(message).items():
            store.put(name, item.deflate() if not broken else b"Message 3\x00xyz")
        self.state.store_message(message)

    def answers(self) -> list[Message]:
        """The replies, whole."""
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        found = []
        for message in self.state.get_messages_legacy(is_reply=True):
            store = self.state.object_store
            tree = store.get_object_tree(message.metadata.message_id)
            contents = {name: store.get(name) for name in _ids(tree)}
            found.append(inflate_object_from_contents(message.metadata.message_id, contents))
        return found

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(5)


def _ids(tree: object) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _ids(child))]  # type: ignore[attr-defined]


def ask(action: str, parcel: Parcel, *, kind: str = "query") -> Message:
    metadata = Metadata(
        run_id=RUN,
        message_id="",
        src_node_id=1,
        dst_node_id=NODE,
        reply_to_message_id="",
        group_id="label",
        created_at=time.time(),
        ttl=600.0,
        message_type=f"{kind}.{action}",
    )
    return Message(metadata=metadata, content=pack(parcel))


def bundle(creates: Path) -> bytes:
    """An app bundle, as Flower builds them, whose every module makes a file when it is imported."""
    evil = f"open({str(creates)!r}, 'w').close()\napp = None\n"
    pyproject = (
        '[project]\nname = "app"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "evil"\n'
        '[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n[tool.flwr.app.config]\n'
    )
    files = {"pyproject.toml": pyproject} | dict.fromkeys(("evil.py", "cohortium.py", "sitecustomize.py"), evil)
    manifest = [f"{name},{hashlib.sha256(t.encode()).hexdigest()},{len(t) * 8}" for name, t in files.items()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in {**files, ".info/CONTENT": "\n".join(manifest)}.items():
            archive.writestr(name, text)
    return out.getvalue()


def echo(message: Message, context: Context) -> Message:
    return reply(Parcel(envelope=unpack(message.content).envelope, site="north"), to=message)


@pytest.fixture
def node() -> Iterator[FakeNode]:
    made = FakeNode()
    try:
        yield made
    finally:
        made.close()


def serve(node: FakeNode, app: Callable[[Message, Context], Message] = echo, *, secret: bytes = SECRET) -> bool:
    """One step of the loop; whether there was a task."""
    tasks = TaskLoop(address=node.address, secret=secret, app=app)
    try:
        return tasks.step()
    finally:
        tasks.close()


def test_a_message_is_answered_by_the_given_app(node: FakeNode) -> None:
    envelope = os.urandom(300_000)
    assert not serve(node)
    node.give(ask(CARRY, Parcel(envelope=envelope)))
    assert serve(node)
    (answer,) = node.answers()
    assert unpack(answer.content) == Parcel(envelope=envelope, site="north")
    assert not serve(node)


def test_many_messages_one_after_the_other(node: FakeNode) -> None:
    for number in range(3):
        node.give(ask(CARRY, Parcel(envelope=bytes([number]))))
        assert serve(node)
        (answer,) = node.answers()
        assert unpack(answer.content).envelope == bytes([number])


def test_the_runs_bundle_is_neither_installed_nor_imported(
    node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug that turns this red: install_from_fab and get_load_client_app_fn, as Flower's own process does."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    made = tmp_path / "made-by-the-bundle"
    path, modules = list(sys.path), set(sys.modules)
    node.give(ask(CARRY, Parcel(envelope=b"x")), bundle(made))
    assert serve(node)
    assert unpack(node.answers()[0].content).envelope == b"x"
    assert not made.exists() and not (tmp_path / "home").exists()
    assert sys.path == path and "evil" not in set(sys.modules) - modules


@pytest.mark.parametrize("error", [ValueError, RuntimeError, SystemExit, KeyboardInterrupt, RecursionError])
def test_an_exceptions_text_stays_here(node: FakeNode, error: type[BaseException]) -> None:
    def broken(message: Message, context: Context) -> Message:
        raise error("PATIENT-4711")

    node.give(ask(CARRY, Parcel(envelope=b"x")))
    assert serve(node, broken)
    (answer,) = node.answers()
    assert unpack(answer.content) == Parcel(refusal=Refusal.BAD_PARCEL)
    (task,) = node.state.get_tasks()
    assert task.status.sub_status == "completed" and task.status.details == ""
    assert b"4711" not in b"".join(bytes(item.deflate()) for item in get_all_nested_objects(answer).values())


@pytest.mark.parametrize(("kind", "action"), [("train", "default"), ("query", "unknown"), ("evaluate", "x")])
def test_the_installed_app_refuses_what_it_does_not_know_by_code(node: FakeNode, kind: str, action: str) -> None:
    node.give(ask(action, Parcel(envelope=b"x"), kind=kind))
    assert serve(node, installed_app())
    assert unpack(node.answers()[0].content).refusal is Refusal.BAD_PARCEL


def test_the_installed_app_without_a_guard_says_so_by_code(
    node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHORTIUM_GUARD_SOCKET", str(tmp_path / "nobody.sock"))
    monkeypatch.setattr(guard_port, "NAME_TIMEOUT_S", 0.2)
    node.give(ask(HELLO, Parcel()))
    assert serve(node, installed_app())
    assert unpack(node.answers()[0].content).refusal is Refusal.NO_GUARD


def test_a_message_whose_objects_are_damaged_is_refused_by_code(node: FakeNode) -> None:
    node.give(ask(CARRY, Parcel(envelope=b"x")), broken=True)
    assert serve(node)
    assert unpack(node.answers()[0].content).refusal is Refusal.BAD_PARCEL


def test_without_the_secret_no_task_is_given(node: FakeNode) -> None:
    node.give(ask(CARRY, Parcel(envelope=b"x")))
    with pytest.raises(Exception, match=r"401|403"):
        serve(node, secret=b"another")
    assert node.answers() == []


def test_a_long_task_gives_signs_of_life(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "HEARTBEAT_S", 0.02)
    beats: list[int] = []
    seen = node.state.acknowledge_task_heartbeat
    monkeypatch.setattr(node.state, "acknowledge_task_heartbeat", lambda task: beats.append(task) or seen(task))

    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.3)
        return echo(message, context)

    node.give(ask(CARRY, Parcel(envelope=b"x")))
    assert serve(node, slow)
    assert len(beats) >= 3 and len(node.answers()) == 1


def test_the_loop_waits_for_a_supernode_that_is_not_up_and_stops_when_told(node: FakeNode) -> None:
    stop = threading.Event()
    tasks = TaskLoop(address="127.0.0.1:9", secret=SECRET, app=echo)
    worker = threading.Thread(target=tasks.run, args=(stop, lambda: True))
    worker.start()
    time.sleep(0.3)
    assert worker.is_alive()
    stop.set()
    worker.join(2)
    assert not worker.is_alive()


def test_the_courier_imports_neither_torch_nor_data_code() -> None:
    code = (
        "import sys, json; import cohortium.client.courier as c; c.installed_app();"
        "print(json.dumps(sorted(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = set(json.loads(out))
    banned = {"torch", "pandas", "pyarrow", "sklearn", "scipy", "duckdb", "sqlalchemy.orm", "opacus", "dp_accounting"}
    # Flower's SQL state comes along with flwr.cli; no driver of a data source does.
    assert not banned & modules
    ours = {name for name in modules if name.startswith("cohortium.client.")}
    assert (
        not {f"cohortium.client.{name}" for name in ("guard", "gate", "records", "sources", "loading", "vault")} & ours
    )
    assert not {
        name for name in modules if name.startswith(("cohortium.common.generators", "cohortium.common.privacy"))
    }


# ---- settings and renewal -----------------------------------------------------------------------------------


def _write(folder: Path, settings: dict[str, object]) -> Path:
    (folder / "courier.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    return folder


def test_settings_are_read(tmp_path: Path) -> None:
    read = CourierSettings.load(_write(tmp_path, dict(SETTINGS)))
    assert read.name == "north" and read.socket == Path("/run/guard.sock")


def test_a_supernode_that_was_killed_with_its_superlink_is_signed_off_as_soon_as_that_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when its time is up, a minute later."""
    stop, answers = threading.Event(), [False, False, True]

    class Started(Exception):
        pass

    def start(*_: object, **__: object) -> None:
        raise Started

    for name in (courier.SOCKET, courier.DIRECTORY):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(courier, "_signed_off", lambda settings: answers.pop(0))
    monkeypatch.setattr(courier, "SIGN_OFF_AGAIN_S", 0.01)
    monkeypatch.setattr(courier, "start_supernode", start)
    started = time.monotonic()
    with pytest.raises(Started):
        courier.run_courier(_write(tmp_path, dict(SETTINGS)), stop)
    stop.set()
    assert answers == [] and time.monotonic() - started < 5


@pytest.mark.parametrize("change", [*({name: ""} for name in SETTINGS), {"socket": "guard.sock"}, {"name": 3}])
def test_a_setting_that_is_missing_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        CourierSettings.load(_write(tmp_path, {**SETTINGS, **change}))
    assert caught.value.code == "COURIER-SETTINGS" and next(iter(change)) in caught.value.where[0]
    with pytest.raises(UsageError, match="COURIER-SETTINGS"):
        CourierSettings.load(tmp_path / "nowhere")


def leaf(begins: datetime, hours: float) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(hours=hours))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_certificate_that_is_due_is_renewed_and_a_failure_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    (tmp_path / "leaf.pem").write_bytes(leaf(now - timedelta(hours=20), 24))
    asked: list[Path] = []

    def renew(directory: Path) -> None:
        asked.append(directory)
        if len(asked) == 1:
            raise OSError("PATIENT-4711")
        (directory / "leaf.pem").write_bytes(leaf(now, 24))
        stop.set()

    monkeypatch.setattr(courier, "RENEW_AGAIN_S", 0.05)
    monkeypatch.setattr(courier, "_renewal", lambda: renew)
    stop = threading.Event()
    worker = threading.Thread(target=courier._renew, args=(tmp_path, stop))
    worker.start()
    worker.join(10)
    assert asked == [tmp_path, tmp_path]
    said = capsys.readouterr().err
    assert "not renewed (OSError)" in said and "4711" not in said


@pytest.mark.parametrize("name", ["", "leaf.key", "leaf.key.next", "supernode", "superexec.secret"])
def test_a_courier_does_not_start_with_keys_that_others_may_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    started: list[Path] = []
    limits: list[object] = []
    monkeypatch.setattr(courier, "run_courier", lambda directory, stop: started.append(directory))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append((what, limit)))
    place = tmp_path / "courier"
    place.mkdir(mode=0o700)
    (place / "leaf.key").touch(mode=0o600)
    umask = os.umask(0)
    try:
        assert courier.main([str(place)]) == 0 and started == [place.resolve()]
        assert limits == [(resource.RLIMIT_CORE, (0, 0))]
        (place / name).touch()
        (place / name).chmod(0o710 if not name else 0o640)
        assert courier.main([str(place)]) == 3 and len(started) == 1
    finally:
        os.umask(umask)
    assert "MODE-OPEN" in capsys.readouterr().err

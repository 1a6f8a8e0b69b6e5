"""The courier brings bytes both ways, and lets out nothing but fixed codes."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from cohortium.client import app as client_app
from cohortium.client.app import Courier, close_guards, courier_app
from cohortium.common.protocol.flower import (
    CARRY,
    HELLO,
    STREAM,
    Parcel,
    Refusal,
    blank_context,
    pack,
    request,
    unpack,
)

SECRET = "patient 17, HIV positive"


class Guard:
    opened: ClassVar[list[Guard]] = []

    def __init__(self, directory: Path) -> None:
        self.site = directory.name
        self.closed = False
        Guard.opened.append(self)

    def handle(self, envelope: bytes) -> bytes:
        match envelope:
            case b"raise":
                raise ValueError(SECRET)
            case b"exit":
                raise SystemExit(SECRET)
            case b"interrupt":
                raise KeyboardInterrupt
            case b"long":
                return b"x" * 11
        return b"answer to " + envelope

    def close(self) -> None:
        self.closed = True
        raise RuntimeError(SECRET)  # a guard that cannot even close must not hurt


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    Guard.opened = []
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    yield
    close_guards()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    directory = tmp_path / "ulm"
    directory.mkdir()
    return directory


def context(**node_config: str | int) -> Context:
    return blank_context(run_id=7, node_id=3, node_config=node_config, run_config={})


def ask(courier: Courier, where: Context, envelope: bytes = b"q", action: str = CARRY) -> Message:
    message = request(Parcel(envelope=envelope), node_id=3, action=action, label="r", ttl_s=60)
    return courier_app(courier)(message, where)


def everything_in(message: Message) -> bytes:
    children = b"".join(child.deflate() for child in (message.content.children or {}).values())
    return message.deflate() + message.content.deflate() + children


def test_bytes_both_ways(site: Path) -> None:
    courier = Courier(directories=(site,), opener=Guard)
    where = context(**{"partition-id": 0})
    assert unpack(ask(courier, where, action=HELLO).content) == Parcel(site="ulm")
    assert unpack(ask(courier, where).content) == Parcel(envelope=b"answer to q", site="ulm")
    assert len(Guard.opened) == 1


@pytest.mark.parametrize("envelope", [b"raise", b"exit"])
def test_only_a_code_leaves(site: Path, envelope: bytes) -> None:
    courier = Courier(directories=(site,), opener=Guard)
    where = context(**{"partition-id": 0})
    answer = ask(courier, where, envelope)
    assert unpack(answer.content) == Parcel(refusal=Refusal.GUARD_FAILED)
    assert SECRET.encode() not in everything_in(answer)
    assert not where.state, "nothing may stay in Flower's own store"
    # The failed guard is given up; the next message finds the state that is on disk.
    assert Guard.opened[0].closed
    assert unpack(ask(courier, where).content).envelope == b"answer to q"
    assert len(Guard.opened) == 2


def test_too_long_an_answer_is_a_code_too(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cohortium.common.protocol.flower.MAX_ENVELOPE_BYTES", 10)
    answer = ask(Courier(opener=Guard), context(**{"site-directory": str(site)}), b"long")
    assert unpack(answer.content) == Parcel(refusal=Refusal.GUARD_FAILED)


def test_ctrl_c_stops(site: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(Courier(directories=(site,), opener=Guard), context(**{"partition-id": 0}), b"interrupt")


def test_a_message_with_a_second_record_is_refused_unread(site: Path) -> None:
    message = request(Parcel(envelope=b"q"), node_id=3, action=CARRY, label="", ttl_s=60)
    message.content["config"] = ConfigRecord({"site-directory": "/elsewhere"})
    courier = Courier(directories=(site,), opener=Guard)
    answer = courier_app(courier)(message, context(**{"partition-id": 0}))
    assert unpack(answer.content).refusal is Refusal.BAD_PARCEL
    assert not Guard.opened
    message.content = RecordDict({"cohortium": MetricRecord({"loss": 1.0})})
    assert unpack(courier.carry(message, context()).content).refusal is Refusal.BAD_PARCEL


@pytest.mark.parametrize(
    "node_config",
    [{}, {"partition-id": 5}, {"partition-id": "x"}, {"site-directory": "/nowhere/at/all"}],
)
@pytest.mark.parametrize("action", [HELLO, CARRY])
def test_no_guard(site: Path, node_config: dict[str, str | int], action: str) -> None:
    answer = ask(Courier(directories=(site,), opener=Guard), context(**node_config), action=action)
    assert unpack(answer.content) == Parcel(refusal=Refusal.NO_GUARD)
    assert b"nowhere" not in everything_in(answer)


def test_the_coordinators_run_configuration_does_not_choose_the_guard(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    where = context(**{"partition-id": 0})
    where.run_config = {"site-directory": str(other), "partition-id": 0}
    answer = ask(Courier(directories=(site,), opener=Guard), where, action=HELLO)
    assert unpack(answer.content).site == "ulm"


def test_a_directory_made_anew_is_opened_anew(site: Path, tmp_path: Path) -> None:
    courier = Courier(directories=(site,), opener=Guard)
    ask(courier, context(**{"partition-id": 0}))
    site.rename(tmp_path / "kept")  # keeps the inode, so that the new directory cannot get the same one
    site.mkdir()
    ask(courier, context(**{"partition-id": 0}))
    shutil.rmtree(tmp_path / "kept")
    assert len(Guard.opened) == 2


def test_close_guards_closes_all(site: Path) -> None:
    ask(Courier(opener=Guard), context(**{"site-directory": str(site)}))
    close_guards()
    assert [guard.closed for guard in Guard.opened] == [True]


def test_other_message_types_are_unknown(site: Path) -> None:
    for kind in ("train", "evaluate", "query", "query.shell"):
        message = Message(pack(Parcel()), 3, kind)
        with pytest.raises(ValueError):
            client_app.app(message, context(**{"site-directory": str(site)}))


def test_ray_can_send_it() -> None:
    courier = Courier(directories=(Path("/a"),))
    assert pickle.loads(pickle.dumps(courier.carry)).__self__ == courier


# ---- the field: a socket and streams ------------------------------------------------------------------------


class Streams:
    """Stands for client/stream.Streams."""

    def __init__(self, said: Refusal | BaseException | None = None) -> None:
        self.said, self.asked = said, list[bytes]()

    def invited(self, said: bytes) -> Refusal | None:
        self.asked.append(said)
        if isinstance(self.said, BaseException):
            raise self.said
        return self.said

    def close(self) -> None:
        self.asked.append(b"closed")


def test_a_stream_is_opened_on_request(site: Path) -> None:
    streams: Any = Streams()
    courier = Courier(directories=(site,), opener=Guard, streams=streams)
    where = context(**{"partition-id": 0})
    assert unpack(ask(courier, where, b"invitation", STREAM).content) == Parcel(site="ulm")
    assert streams.asked == [b"invitation"] and not where.state


@pytest.mark.parametrize(
    ("said", "leaves"),
    [
        (Refusal.NO_STREAM, Refusal.NO_STREAM),
        (Refusal.BAD_PARCEL, Refusal.BAD_PARCEL),
        (ValueError(SECRET), Refusal.NO_STREAM),
        (SystemExit(SECRET), Refusal.NO_STREAM),
    ],
)
def test_no_stream_is_a_code(site: Path, said: Any, leaves: Refusal) -> None:
    streams: Any = Streams(said)
    courier = Courier(directories=(site,), opener=Guard, streams=streams)
    answer = ask(courier, context(**{"partition-id": 0}), b"invitation", STREAM)
    assert unpack(answer.content) == Parcel(refusal=leaves)
    assert SECRET.encode() not in everything_in(answer)


def test_no_stream_without_a_guard(site: Path) -> None:
    streams: Any = Streams()
    courier = Courier(directories=(site,), opener=Guard, streams=streams)
    assert unpack(ask(courier, context(**{"partition-id": 5}), b"i", STREAM).content).refusal is Refusal.NO_GUARD
    message = request(Parcel(envelope=b"i"), node_id=3, action=STREAM, label="", ttl_s=60)
    message.content = RecordDict({"cohortium": MetricRecord({"loss": 1.0})})
    assert unpack(courier.stream(message, context(**{"partition-id": 0})).content).refusal is Refusal.BAD_PARCEL
    assert streams.asked == []


def test_a_simulation_opens_no_stream(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(client_app.DIRECTORY, raising=False)
    courier = Courier(directories=(site,), opener=Guard)
    answer = ask(courier, context(**{"partition-id": 0}), b"invitation", STREAM)
    assert unpack(answer.content).refusal is Refusal.NO_STREAM


def test_in_the_field_the_environment_names_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket of the environment, or of the SuperNode's own configuration, never of the run's."""
    opened: list[Path] = []

    class Port(Guard):
        def __init__(self, socket: Path) -> None:
            super().__init__(socket)
            opened.append(socket)

    monkeypatch.setattr(client_app, "open_socket", Port)
    monkeypatch.setenv(client_app.SOCKET, str(tmp_path / "guard.sock"))
    where = context()
    where.run_config = {"guard-socket": "/tmp/elsewhere", client_app.SOCKET: "/tmp/elsewhere"}
    assert unpack(ask(Courier(), where).content).envelope == b"answer to q"
    assert unpack(ask(Courier(), where, b"raise").content).refusal is Refusal.GUARD_FAILED
    assert unpack(ask(Courier(), where).content).envelope == b"answer to q"
    assert opened == [tmp_path / "guard.sock"], "a port outlives its guard's failures"
    ask(Courier(), context(**{"guard-socket": str(tmp_path / "other.sock")}))
    assert opened[1:] == [tmp_path / "other.sock"]
    close_guards()
    assert all(port.closed for port in Guard.opened)


def test_a_simulation_takes_no_notice_of_the_environment(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client_app.SOCKET, "/nowhere/guard.sock")
    courier = Courier(directories=(site,), opener=Guard)
    assert unpack(ask(courier, context(**{"partition-id": 0}), action=HELLO).content) == Parcel(site="ulm")


def test_the_fields_streams_are_this_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: Any = Streams()
    monkeypatch.setattr(client_app, "open_socket", lambda socket: Guard(socket))
    monkeypatch.setenv(client_app.SOCKET, "/run/ulm/guard.sock")
    monkeypatch.setenv(client_app.DIRECTORY, "/etc/ulm")
    monkeypatch.setattr(client_app, "_field_streams", [streams])
    assert unpack(ask(Courier(), context(), b"invitation", STREAM).content).refusal is None
    close_guards()
    assert streams.asked == [b"invitation", b"closed"]


def test_the_courier_stays_thin() -> None:
    heavy = "torch pandas pyarrow scipy sklearn ray cohortium.client.guard cohortium.client.records sqlite3"
    code = (
        "import sys, cohortium.client.app\n"
        f"found = [name for name in {heavy.split()!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

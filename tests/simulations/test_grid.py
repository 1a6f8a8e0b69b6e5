"""The in-process grid: repeatable, no real waiting, and every fault of the script does what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cohortium.client.app import Courier, close_guards, courier_app
from cohortium.common.errors import UsageError
from cohortium.common.protocol.flower import CARRY, Parcel, request, unpack
from cohortium.server.transport import Absence, GridCourier
from cohortium.simulations.faults import Fault, Faults
from cohortium.simulations.grid import InProcessGrid

NAMES = ("a", "b", "c", "d")
ALL = frozenset(NAMES)


class Diary:
    """A guard that writes down what it is asked and answers with the number of the entry."""

    def __init__(self, directory: Path) -> None:
        self.site, self.file = directory.name, directory / "diary"

    def handle(self, envelope: bytes) -> bytes:
        if envelope == b"die":
            raise SystemExit("patient 17")
        if envelope == b"slow":
            time.sleep(0.02 if self.site == "a" else 0.0)
        with self.file.open("ab") as diary:
            diary.write(envelope + b"\n")
        entries = self.file.read_bytes().splitlines()
        return b"%d:" % len(entries) + envelope

    def close(self) -> None: ...


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    for name in NAMES:
        (tmp_path / name).mkdir()
    yield tmp_path
    close_guards()


def start(home: Path, *script: Fault, wire: bool = False, threads: int = 1) -> tuple[InProcessGrid, GridCourier]:
    client = courier_app(Courier(directories=tuple(home / name for name in NAMES), opener=Diary))
    grid = InProcessGrid(client, NAMES, faults=Faults(script), wire=wire, threads=threads)
    courier = GridCourier(grid)
    courier.discover(NAMES, timeout_s=60, quorum=0)
    return grid, courier


def ask(courier: GridCourier, envelope: bytes, label: str = "", timeout_s: float = 60.0) -> dict[str, bytes]:
    return courier.exchange(dict.fromkeys(NAMES, envelope), timeout_s=timeout_s, label=label)


def diary(home: Path, site: str) -> list[bytes]:
    file = home / site / "diary"
    return file.read_bytes().splitlines() if file.exists() else []


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("threads", [1, 4])
def test_all_sites_answer_in_order(home: Path, wire: bool, threads: int) -> None:
    grid, courier = start(home, wire=wire, threads=threads)
    assert courier.sites == NAMES
    for at in range(1, 4):
        assert list(ask(courier, b"slow").items()) == [(name, b"%d:slow" % at) for name in NAMES]
    grid.close()
    assert grid.now() == 0.0


def test_sites_compute_side_by_side(home: Path) -> None:
    class Meeting(Diary):
        def handle(self, envelope: bytes) -> bytes:
            met.wait(timeout=10)
            return envelope

    met = threading.Barrier(4)
    client = courier_app(Courier(directories=tuple(home / name for name in NAMES), opener=Meeting))
    courier = GridCourier(InProcessGrid(client, NAMES, threads=4))
    courier.discover(NAMES, timeout_s=60)
    assert set(ask(courier, b"q")) == ALL


# One exchange "one", then "two" in which site b suffers, then "three".
# kind, more settings, b's answer in "two" (None: absent, and why), b's answer in "three", b's diary
LIVES: list[tuple[str, dict[str, float], bytes | Absence, bytes, str]] = [
    ("absent", {}, Absence.FLOWER, b"2:3", "1 3"),
    ("lost", {}, Absence.TIMEOUT, b"2:3", "1 3"),
    ("reply-lost", {}, Absence.TIMEOUT, b"3:3", "1 2 3"),
    ("late", {"seconds": 10.0}, b"2:2", b"3:3", "1 2 3"),
    ("late", {"seconds": 100.0}, Absence.TIMEOUT, b"3:3", "1 2 3"),
    ("twice", {}, b"2:2", b"4:3", "1 2 2 3"),
    ("held", {}, Absence.TIMEOUT, b"2:3", "1 3 2"),
    ("replay", {}, b"3:2", b"4:3", "1 1 2 3"),
    ("stale", {}, b"1:1", b"3:3", "1 2 3"),
    ("tamper-request", {"bit": 0}, b"2:3", b"3:3", "1 3 3"),
    ("tamper-reply", {"bit": 16}, b"2:3", b"3:3", "1 2 3"),
    ("crash", {}, Absence.FLOWER, b"2:3", "1 3"),
    ("crash-after", {}, Absence.FLOWER, b"3:3", "1 2 3"),
]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize(("kind", "more", "second", "third", "written"), LIVES)
def test_every_fault_does_what_it_says(
    home: Path,
    kind: str,
    more: dict[str, float],
    second: bytes | Absence,
    third: bytes,
    written: str,
    wire: bool,
    threads: int,
) -> None:
    fault = Fault(kind=kind, site="b", label="two", **more)  # type: ignore[arg-type]
    grid, courier = start(home, fault, wire=wire, threads=threads)
    began = time.perf_counter()
    ask(courier, b"1", "one")
    got = ask(courier, b"2", "two")
    if isinstance(second, Absence):
        assert "b" not in got and courier.absent == {"b": second}
    else:
        assert got["b"] == second and courier.absent == {}
    assert {name: got[name] for name in "acd"} == dict.fromkeys("acd", b"2:2"), "the others notice nothing"
    assert ask(courier, b"3", "three") == {"a": b"3:3", "b": third, "c": b"3:3", "d": b"3:3"}
    grid.close()
    assert diary(home, "b") == written.encode().split()
    assert time.perf_counter() - began < 5, "simulated waiting takes no time"
    assert grid.now() < 62


def test_an_apps_exception_is_an_error_reply_and_ctrl_c_is_not(home: Path) -> None:
    class App:
        def __call__(self, message: object, context: object) -> object:
            raise error

    courier = GridCourier(InProcessGrid(App(), NAMES))  # type: ignore[arg-type]
    courier._nodes = {"a": 1}
    error: BaseException = RuntimeError("patient 17")
    assert courier.exchange({"a": b""}, timeout_s=1) == {} and courier.absent == {"a": Absence.FLOWER}
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        courier.exchange({"a": b""}, timeout_s=1)


def test_a_guard_that_exits_is_refused_by_code(home: Path) -> None:
    _, courier = start(home)
    assert courier.exchange({"a": b"die", "b": b"1"}, timeout_s=60) == {"b": b"1:1"}
    assert courier.absent == {"a": Absence.REFUSED}


def test_hello_can_fail_too(home: Path) -> None:
    lost_once, gone = (
        Fault(kind="lost", site="b", label="discover"),
        Fault(kind="absent", site="c", times=None),
    )
    _, courier = start(home, lost_once, gone)
    assert courier.sites == ("a", "b", "d"), "b's second hello arrives, c never answers"


def test_the_script_counts_per_site_and_line() -> None:
    faults = Faults(
        [
            Fault(kind="lost", site="[ab]", label="*/masks", skip=1, times=2),
            Fault(kind="absent", site="b", times=None),
        ]
    )
    fates = [fate and fate.kind for fate in (faults.next("a", f"{r}/masks") for r in range(4))]
    assert fates == [None, "lost", "lost", None]
    fates = [fate and fate.kind for fate in (faults.next("b", f"{r}/masks") for r in range(4))]
    assert fates == ["absent", "lost", "lost", "absent"]
    assert faults.next("c", "0/masks") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "explode"},
        {"kind": "lost", "skip": -1},
        {"kind": "lost", "times": 0},
        {"kind": "tamper-reply", "bit": -1},
        {"kind": "late"},
        {"kind": "lost", "seconds": 3.0},
    ],
)
def test_a_bad_script_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Fault(**wrong)  # type: ignore[arg-type]


def test_sent_messages_are_copies(home: Path) -> None:
    """A site that changes what it received must not change what the server sent."""

    class App:
        def __call__(self, message: object, context: object) -> object:
            message.content.clear()  # type: ignore[attr-defined]
            raise RuntimeError

    for wire in (False, True):
        grid = InProcessGrid(App(), NAMES, wire=wire)  # type: ignore[arg-type]
        message = request(Parcel(envelope=b"x"), node_id=1, action=CARRY, label="", ttl_s=1)
        grid.push_messages([message])
        assert unpack(message.content).envelope == b"x"

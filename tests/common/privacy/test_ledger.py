"""The ledger: states, each release once, append-only, crashes. 200 real SIGKILLs are in crash_loop.py."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cohortium.common.errors import CheckFailed, CohortiumError, Refused, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
EVENT = Event.gaussian(1.5)
PLAN, DIGEST = "0" * 64, "1" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger.db", "Long Beach", KEY, clock=lambda: 0) as made:
        yield made


def reserve(ledger: Ledger, release: str = "0", run: str = "r") -> chain.Line:
    return ledger.reserve(run=run, release_id=release, event=EVENT, count=2, plan_digest=PLAN, purpose="test")


def test_a_release_is_on_disk_before_reserve_returns(ledger: Ledger) -> None:
    line = reserve(ledger)
    reader = Ledger.open(ledger.path)  # another connection sees what is committed only
    assert reader.state("r", "0") == "RESERVED"
    assert reader.head() == ledger.head()
    assert reader.head().hash == line.hash
    assert reader.charged_events() == [(EVENT, 2)]


def test_each_release_once_in_a_run(ledger: Ledger) -> None:
    reserve(ledger)
    before = ledger.head()
    with pytest.raises(Refused) as refusal:
        ledger.reserve(run="r", release_id="0", attempt=1, event=EVENT, count=1, plan_digest=PLAN, purpose="again")
    assert refusal.value.code == "LEDGER-ONCE"
    assert ledger.head() == before
    reserve(ledger, run="another run")
    assert len(ledger.charged_events()) == 2
    assert len(ledger.charged_events("r")) == 1


STATES = ("RESERVED", "RUNNING", "SEALED", "UNMASKED", "RELEASED", "BURNED", "VOID")
ALLOWED = {
    ("RESERVED", "RUNNING"),
    ("RESERVED", "SEALED"),
    ("RESERVED", "BURNED"),
    ("RUNNING", "SEALED"),
    ("RUNNING", "BURNED"),
    ("SEALED", "UNMASKED"),
    ("SEALED", "RELEASED"),
    ("SEALED", "VOID"),
    ("UNMASKED", "RELEASED"),
    ("UNMASKED", "VOID"),
}
PATHS = {
    "RESERVED": (),
    "RUNNING": ("RUNNING",),
    "SEALED": ("SEALED",),
    "UNMASKED": ("SEALED", "UNMASKED"),
    "RELEASED": ("SEALED", "RELEASED"),
    "BURNED": ("BURNED",),
    "VOID": ("SEALED", "VOID"),
}


@pytest.mark.parametrize("start", STATES)
@pytest.mark.parametrize("end", STATES)
def test_only_the_transitions_of_the_design(ledger: Ledger, start: str, end: str) -> None:
    reserve(ledger)
    for step in PATHS[start]:
        ledger.advance("r", "0", step, DIGEST if step == "SEALED" else None)
    before = ledger.head()
    if (start, end) in ALLOWED:
        ledger.advance("r", "0", end, DIGEST)
        assert ledger.state("r", "0") == end
    else:
        with pytest.raises(Refused):
            ledger.advance("r", "0", end, DIGEST)
        assert (ledger.state("r", "0"), ledger.head()) == (start, before)
    assert ledger.charged_events() == [(EVENT, 2)]  # charged whatever became of it
    assert Ledger.open(ledger.path).head() == ledger.head()


def test_sealing_names_its_bytes(ledger: Ledger) -> None:
    reserve(ledger)
    for wrong in (None, "", "abc", "G" * 64, "A" * 64):
        with pytest.raises(CohortiumError):
            ledger.advance("r", "0", "SEALED", wrong)
    ledger.advance("r", "0", "SEALED", DIGEST)
    assert ledger.digest("r", "0") == DIGEST
    ledger.advance("r", "0", "RELEASED", "2" * 64)  # the survivor set does not replace the bytes' digest
    assert ledger.digest("r", "0") == DIGEST
    assert ledger.book.entries["r", "0"].ballot == "2" * 64


def test_a_survivor_set_is_named_once(ledger: Ledger) -> None:
    """By the vote; what closes the release names the same or none."""
    reserve(ledger)
    ledger.advance("r", "0", "SEALED", DIGEST)
    ledger.advance("r", "0", "UNMASKED", "2" * 64)
    before = ledger.head()
    with pytest.raises(Refused, match="LEDGER-STATE"):
        ledger.advance("r", "0", "UNMASKED", "3" * 64)
    with pytest.raises(Refused, match="LEDGER-BALLOT"):
        ledger.advance("r", "0", "RELEASED", "3" * 64)
    assert ledger.head() == before and ledger.book.entries["r", "0"].ballot == "2" * 64
    ledger.advance("r", "0", "RELEASED", "2" * 64)
    assert ledger.state("r", "0") == "RELEASED"


def test_a_later_line_is_written_with_the_next_and_cannot_wait_twice(ledger: Ledger) -> None:
    reserve(ledger)
    with pytest.raises(Refused):
        ledger.advance("r", "0", "RELEASED", later=True)
    ledger.advance("r", "0", "SEALED", DIGEST)
    with pytest.raises(Refused):
        ledger.advance("r", "0", "VOID", later=True)
    ledger.advance("r", "0", "RELEASED", later=True)
    with pytest.raises(Refused):
        ledger.advance("r", "0", "RELEASED", later=True)
    assert Ledger.open(ledger.path).state("r", "0") == "SEALED"
    reserve(ledger, "1")
    assert Ledger.open(ledger.path).state("r", "0") == "RELEASED"
    assert [line.body["kind"] for line in ledger.lines()] == [
        "open",
        "reserve",
        "advance",
        "advance",
        "reserve",
    ]


def test_a_refused_line_keeps_the_ones_that_wait(ledger: Ledger) -> None:
    reserve(ledger)
    ledger.advance("r", "0", "SEALED", DIGEST)
    ledger.advance("r", "0", "RELEASED", later=True)
    with pytest.raises(Refused):
        reserve(ledger)
    assert ledger.state("r", "0") == "SEALED"
    ledger.flush()
    assert Ledger.open(ledger.path).state("r", "0") == "RELEASED"


def test_opening_burns_what_a_crash_left(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.db", "A", KEY) as ledger:
        for name in ("reserved", "running", "sealed"):
            reserve(ledger, name)
        ledger.advance("r", "running", "RUNNING")
        ledger.advance("r", "sealed", "SEALED", DIGEST)
    with Ledger.open(tmp_path / "l.db") as reader:  # reading burns nothing
        assert reader.state("r", "reserved") == "RESERVED"
    with Ledger.open(tmp_path / "l.db", KEY) as ledger:
        assert [ledger.state("r", n) for n in ("reserved", "running", "sealed")] == [
            "BURNED",
            "BURNED",
            "SEALED",
        ]
        assert len(ledger.charged_events()) == 3
        with pytest.raises(Refused, match="LEDGER-ONCE"):
            reserve(ledger, "reserved")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE lines SET body = '{}' WHERE n = 1",
        "UPDATE lines SET n = 7 WHERE n = 1",
        "DELETE FROM lines WHERE n = 1",
        "DELETE FROM lines",
        "INSERT OR REPLACE INTO lines VALUES (1, '{}', 'x', 'y')",
        "INSERT INTO lines VALUES (9, '{}', 'x', 'y')",
    ],
)
def test_the_table_is_append_only(ledger: Ledger, statement: str) -> None:
    reserve(ledger)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute(statement)
    other.close()
    assert Ledger.open(ledger.path).head() == ledger.head()


def test_one_writer_at_a_time(ledger: Ledger) -> None:
    with pytest.raises(Refused, match="LEDGER-BUSY"):
        Ledger.open(ledger.path, KEY)
    ledger.close()
    Ledger.open(ledger.path, KEY).close()


def test_wrong_openings_are_refused(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="LEDGER-FILE"):
        Ledger.open(tmp_path / "missing.db")
    ledger.close()
    with pytest.raises(CheckFailed, match="LEDGER-KEY"):
        Ledger.open(ledger.path, OTHER)
    with pytest.raises(Refused, match="LEDGER-EXISTS"):
        Ledger.create(ledger.path, "Long Beach", KEY)
    (tmp_path / "junk.db").write_bytes(b"not a database at all" * 200)
    with pytest.raises(CheckFailed, match="LEDGER-FILE"):
        Ledger.open(tmp_path / "junk.db")
    with Ledger.open(ledger.path) as reader, pytest.raises(Refused, match="LEDGER-READONLY"):
        reader.note("start")


def test_a_creation_that_crashed_can_be_repeated(tmp_path: Path) -> None:
    half = sqlite3.connect(tmp_path / "l.db")
    half.execute("PRAGMA journal_mode=WAL")
    half.close()
    with Ledger.create(tmp_path / "l.db", "A", KEY) as ledger:
        assert ledger.head().size == 1


def test_damage_in_the_database_is_found(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.db", "A", KEY) as ledger:
        reserve(ledger)
        reserve(ledger, "1")
    raw = sqlite3.connect(tmp_path / "l.db", isolation_level=None)
    raw.execute("DROP TRIGGER lines_no_update")
    raw.execute("UPDATE lines SET body = replace(body, '\"count\":2', '\"count\":1') WHERE n = 1")
    raw.close()
    with pytest.raises(CheckFailed, match="LEDGER-HASH"):
        Ledger.open(tmp_path / "l.db")


def test_notes_charge_nothing_and_hold_no_floats(ledger: Ledger) -> None:
    ledger.note("start", run="r", sites=["A", "B"])
    assert ledger.charged_events() == []
    assert ledger.book.notes[0]["fields"] == {"run": "r", "sites": ["A", "B"]}
    before = ledger.head()
    with pytest.raises(CohortiumError, match="MSG-FLOAT"):
        ledger.note("start", epsilon=1.0)
    assert ledger.head() == before
    assert Ledger.open(ledger.path).head() == before


STEPS = st.lists(st.tuples(st.sampled_from(["reserve", "later", *STATES]), st.integers(0, 2)), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_random_operations_leave_disk_and_memory_equal(tmp_path_factory: pytest.TempPathFactory, steps) -> None:
    path = tmp_path_factory.mktemp("random") / "l.db"
    with Ledger.create(path, "A", KEY, clock=lambda: 0) as ledger:
        charged = 0
        for step, number in steps:
            try:
                if step == "reserve":
                    reserve(ledger, str(number))
                    charged += 1
                elif step == "later":
                    ledger.advance("r", str(number), "RELEASED", later=True)
                else:
                    ledger.advance("r", str(number), step, DIGEST)
            except Refused:
                pass
        ledger.flush()
        book, head = chain.replay(Ledger.open(path).lines(), owner="A", public=KEY.public_key())
        assert head == ledger.head().hash
        assert {k: e.state for k, e in book.entries.items()} == {k: e.state for k, e in ledger.book.entries.items()}
        assert len(ledger.charged_events()) == charged


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    """Never under-counted, nothing sent that is not recorded, nothing left unfinished, none run twice."""
    script = Path(__file__).with_name("crash_loop.py")
    # A killed process loses nothing that it wrote, synced or not: memory does as well as a disk, only faster.
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=base) as folder:
        command = [sys.executable, str(script), folder, "200", "7"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bad"] == 0
    assert found["charged"] >= found["touched"] > 100  # the loop did work between the kills
    assert found["kills"] == 200
    assert found["burned"] > 10  # and the kills did hit it in the middle

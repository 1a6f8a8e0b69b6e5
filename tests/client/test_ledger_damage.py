"""Disks and clocks that fail under a whole guard: refused by a code, named in the site's log, nothing answered twice.

What must hold after every damage: a release that was answered is never answered with other bytes, and a charge that
left the hospital's door is still a charge. A refusal is always allowed. Roll-back, fork and copy are in
test_witness.py; the chain alone is in tests/common/privacy.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hospital import RUN, Ward, counts, key, plan, stage, ward

from cohortium.client import guard as guard_module
from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.privacy import chain
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.messages import Message
from cohortium.strategies.base import COORDINATOR, ask_message

DAY = 86_400
FILES = ("ledger.db", "vault.db", "witness.db")
ASK = [ask_message(RUN, index, counts(), mirrored=0) for index in range(3)]
THREE = [stage(name, "counts", at) for at, name in enumerate(("one", "two", "three"))]


def log(consortium: Ward) -> list[str]:
    path = consortium.directory("a") / "guard.log"
    return [json.loads(line)["local"] for line in path.read_text().splitlines()] if path.exists() else []


def hello(**fields: Any) -> Message:
    return Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0, **fields})


class Damaged:
    """A hospital that answered two releases and lost power: its files as they lay on the disk, logs included."""

    def __init__(self, folder: Path) -> None:
        self.ward = ward(folder, plan(stages=THREE, epsilon=50.0), seed=None, lifetime_epsilon=50.0)
        self.place = self.ward.directory("a")
        self.answers = [self.ward.say("a", ASK[index]) for index in (0, 1)]
        assert [answer.kind for answer in self.answers] == ["site.noised"] * 2
        self.lines = self.ward.guard("a")._ledger_().head().size
        names = [f"{name}{tail}" for name in FILES for tail in ("", "-wal")]
        self.files = {name: (self.place / name).read_bytes() for name in names if (self.place / name).exists()}
        self.ward.kill("a")

    def put(self, **changed: bytes) -> None:
        """The crash again, with some files other than they were."""
        self.ward.kill("a")
        (self.place / "guard.log").unlink(missing_ok=True)
        for name in FILES:
            for tail in ("", "-wal", "-shm"):
                (self.place / f"{name}{tail}").unlink(missing_ok=True)
        for name, data in {**self.files, **changed}.items():
            (self.place / name).write_bytes(data)

    def end_cleanly(self) -> None:
        """Instead of the crash: the logs are moved into the files."""
        self.put()
        assert self.ward.say("a", ASK[0]) == self.ward.say("a", ASK[0])
        self.ward.close()
        self.files = {name: (self.place / name).read_bytes() for name in FILES if (self.place / name).exists()}

    def holds(self, what: str) -> str:
        """Ask for all again: the same bytes or a refusal, and no charge is lost where the guard goes on."""
        for index in (0, 1):
            again = self.ward.say("a", ASK[index])
            assert again.kind == "site.refused" or again == self.answers[index], f"{what}: another answer to {index}"
        new = self.ward.say("a", ASK[2])
        self.ward.kill("a")
        if new.kind == "site.refused":
            assert new.fields["code"] in ("REFUSED-LEDGER", "GUARD-INTERNAL", "REFUSED"), (what, new.fields)
            return log(self.ward)[-1]
        with Ledger.open(self.place / "ledger.db") as ledger:
            assert {"0", "1", "2"} == {release for _, release in ledger.book.entries}, f"{what}: a charge is gone"
        return ""


@pytest.fixture
def damaged(tmp_path: Path) -> Damaged:
    return Damaged(tmp_path)


# ---- truncated and flipped files ----------------------------------------------------------------------------


def test_after_a_crash_alone_everything_goes_on(damaged: Damaged) -> None:
    assert {"ledger.db-wal", "vault.db-wal"} <= set(damaged.files), "nothing would be tested"
    damaged.put()
    assert damaged.holds("nothing changed") == ""


def test_a_truncated_log_of_the_ledger(damaged: Damaged) -> None:
    """Committed lines are gone with it: the vault names a line that is missing, and the guard stops."""
    whole = damaged.files["ledger.db-wal"]
    found = {}
    for end in [0, 31, *range(32, len(whole), len(whole) // 24)]:
        damaged.put(**{"ledger.db-wal": whole[:end]})
        found[end] = damaged.holds(f"log cut at {end}")
    assert found[0] == "LEDGER-ROLLBACK"
    assert set(found.values()) <= {"LEDGER-ROLLBACK", "LEDGER-EMPTY", "LEDGER-FILE", "GUARD-ONCE", ""}


def test_both_logs_truncated_is_a_roll_back_that_the_coordinator_sees(damaged: Damaged) -> None:
    """Ledger and vault went back together, so they fit: now it takes a witness."""
    damaged.put(**{"ledger.db-wal": b"", "vault.db-wal": b""})
    reply = damaged.ward.say("a", hello(mirrored=damaged.lines))
    assert reply.fields == {"code": "REFUSED-LEDGER"} and log(damaged.ward)[-1] == "LEDGER-BEHIND"
    assert damaged.ward.say("a", ask_message(RUN, 0, counts(), mirrored=damaged.lines)).kind == "site.refused"


@pytest.mark.parametrize("name", ["ledger.db", "vault.db", "ledger.db-wal", "vault.db-wal"])
def test_a_flipped_bit(damaged: Damaged, name: str) -> None:
    """Forty places in each file: found, or in a byte that means nothing. The logs as a crash leaves them, the files
    as a clean end does; a log of the vault that loses its end is an older vault, and that may be put back."""
    if name.endswith(".db"):
        damaged.end_cleanly()
    whole = damaged.files[name]
    rng = random.Random(name)
    found: dict[str, int] = {}
    for at in rng.sample(range(len(whole)), 40):
        bad = bytearray(whole)
        bad[at] ^= 1 << rng.randrange(8)
        damaged.put(**{name: bytes(bad)})
        code = damaged.holds(f"{name}: bit in byte {at}")
        found[code] = found.get(code, 0) + 1
    assert sum(found.values()) == 40
    assert name == "vault.db-wal" or set(found) - {""}, "no flip was found: the test looks in the wrong place"


def test_the_bits_that_matter_are_found(damaged: Damaged) -> None:
    """Aimed: a charge's count in the ledger, a sealed answer in the vault, both folded into their files first."""
    damaged.end_cleanly()
    clean = damaged.files
    for name, needle, code in (
        ("ledger.db", b'"count":1', "LEDGER-HASH"),
        ("ledger.db", b'"release":"1"', "LEDGER-FORM"),
        ("ledger.db", b'"release":"1', "LEDGER-HASH"),
        ("vault.db", b"start/run-1", "VAULT-DAMAGED"),
        ("vault.db", b"site.noised", "VAULT-DAMAGED"),
    ):
        at = clean[name].rindex(needle) + len(needle) - 1
        bad = bytearray(clean[name])
        bad[at] ^= 2
        damaged.files = {**clean, name: bytes(bad)}
        damaged.put()
        assert damaged.holds(f"{name}: {needle!r}") == code
    damaged.files = clean
    damaged.put()
    assert damaged.holds("as it was") == ""


def test_a_vault_without_checksums_would_send_what_is_in_it(damaged: Damaged) -> None:
    """Power of the test above, and a second line behind it: the ledger's digest of the sealed bytes."""
    from planting import planted

    from cohortium.client.vault import Vault

    damaged.put()
    damaged.ward.kill("a")
    vault = Vault(damaged.place / "vault.db")
    sealed = vault.get("sealed") or b""
    vault.close()
    import sqlite3

    with contextlib.closing(sqlite3.connect(damaged.place / "vault.db", isolation_level=None)) as db:
        db.execute("UPDATE vault SET value = ? WHERE name = 'sealed'", (sealed[:-1] + bytes([sealed[-1] ^ 1]),))
    assert damaged.ward.say("a", ASK[1]).fields == {"code": "REFUSED-LEDGER"}
    damaged.ward.kill("a")
    with planted(Vault.__init__, ("if _checksum(name, value) != checksum:", "if False:")):
        assert damaged.ward.say("a", ASK[1]).fields == {"code": "REFUSED"}
    assert log(damaged.ward) == ["VAULT-DAMAGED", "GUARD-ONCE"]


def test_a_vault_that_is_lost_loses_rounds_and_never_a_charge(damaged: Damaged) -> None:
    damaged.put()
    damaged.ward.kill("a")
    for path in damaged.place.glob("vault.db*"):
        path.unlink()
    assert damaged.holds("no vault") == "WITNESS-START"
    assert damaged.ward.start() == ("a",)
    assert [damaged.ward.say("a", ASK[index]).kind for index in (0, 1, 2)] == ["site.refused"] * 2 + ["site.noised"]
    damaged.ward.close()


# ---- disks that take nothing more ---------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_disk(folder: Path) -> Iterator[Path]:
    """A file system of 2 MB of one's own, in memory; skips where that is not allowed."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting takes rights that this user lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
        while True:
            file.write(bytes(512))
            file.flush()


@contextlib.contextmanager
def moved(consortium: Ward, disk: Path) -> Iterator[None]:
    """The site's directory on another disk, under its old name."""
    place = consortium.directory("a")
    shutil.copytree(place, disk / "a")
    shutil.rmtree(place)
    place.symlink_to(disk / "a")
    try:
        yield
    finally:
        consortium.close()


def refused_for_want_of_disk(consortium: Ward, message: Message) -> None:
    reply = consortium.say("a", message)
    assert reply.kind == "site.refused" and reply.fields["code"] in ("GUARD-INTERNAL", "REFUSED-LEDGER")


def test_a_full_disk(tmp_path: Path) -> None:
    """Before the charge: nothing is charged. Between charge and seal: charged, burned, never answered."""
    consortium = ward(tmp_path / "ward", plan(stages=THREE), seed=None)
    with tiny_disk(tmp_path / "disk") as disk, moved(consortium, disk):
        filler = disk / "filler"
        fill(disk)
        with mock.patch.object(guard_module, "release") as computing:
            for message in (hello(), ASK[0]):
                refused_for_want_of_disk(consortium, message)
        assert not computing.called
        filler.unlink()
        assert consortium.ask("a", 0, counts()).kind == "site.noised"
        really = guard_module.release

        def then_full(**given: Any) -> Any:
            fill(disk)
            return really(**given)

        with mock.patch.object(guard_module, "release", then_full):
            refused_for_want_of_disk(consortium, ASK[1])
        assert consortium.say("a", ASK[1]).kind == "site.refused"
        filler.unlink()
        assert consortium.ask("a", 1, counts()).fields == {"code": "REFUSED"}
        assert consortium.ask("a", 2, counts()).kind == "site.noised"
        assert {consortium.state("a", index) for index in (0, 2)} <= {"SEALED", "RELEASED"}
        assert consortium.state("a", 1) == "BURNED"
        assert [code for code in log(consortium) if code.startswith(("DISK-", "LEDGER-DISK"))]


def test_a_disk_that_ends_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """By the system's limit on file sizes, so without any rights: wherever the write breaks off, once or refused."""
    consortium = ward(tmp_path, plan(stages=THREE), seed=None)
    place = consortium.directory("a")
    assert consortium.ask("a", 0, counts()).kind == "site.noised"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max((place / f"{name}-wal").stat().st_size for name in ("ledger.db", "vault.db"))
    kinds = []
    for more in range(0, 40_000, 2_500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + more, hard))
        try:
            reply = consortium.ask("a", 1, counts())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kinds.append(reply.kind)
        consortium.kill("a")
    again = consortium.ask("a", 1, counts())
    answers = {"site.noised"} & {*kinds, again.kind}
    assert kinds[0] == "site.refused"
    assert consortium.state("a", 1) in (("SEALED", "RELEASED") if answers else ("BURNED",))
    assert consortium.ask("a", 2, counts()).kind == "site.noised"
    consortium.close()


def test_a_read_only_disk(tmp_path: Path) -> None:
    consortium = ward(tmp_path / "ward", plan(), seed=None)
    with tiny_disk(tmp_path / "disk") as disk, moved(consortium, disk):
        assert consortium.ask("a", 0, counts()).kind == "site.noised"
        consortium.kill("a")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with mock.patch.object(guard_module, "release") as computing:
            for message in (hello(), ASK[0], ASK[1]):
                refused_for_want_of_disk(consortium, message)
        assert not computing.called
        consortium.kill("a")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert consortium.ask("a", 1, counts()).kind == "site.noised"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for this user")
def test_files_that_may_only_be_read(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), seed=None)
    place = consortium.directory("a")
    for path in [*place.iterdir(), place]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        refused_for_want_of_disk(consortium, ASK[0])
    finally:
        place.chmod(0o700)
        for path in place.iterdir():
            path.chmod(0o700 if path.is_dir() else 0o600)
    assert consortium.ask("a", 0, counts()).kind == "site.noised"
    consortium.close()


# ---- clocks -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clock(ahead_s: float) -> Iterator[None]:
    now = time.time
    with mock.patch("time.time", lambda: now() + ahead_s):
        yield


@pytest.mark.parametrize("days", [-2, 2])
def test_a_clock_that_is_off_is_refused_at_the_hello(tmp_path: Path, days: int) -> None:
    """By the coordinator's time, before a line is written: nobody has to mend a ledger afterwards."""
    consortium = ward(tmp_path, plan(), seed=None)
    at = int(time.time())
    consortium.guard("a")
    before = consortium.guard("a")._ledger_().head() if days > 0 else None
    with clock(days * DAY), mock.patch.object(guard_module, "load_records") as reading:
        assert consortium.say("a", hello(at=at)).fields == {"code": "REFUSED-CLOCK"}
    assert not reading.called and log(consortium) == ["CLOCK-SKEW" if days > 0 else "CLOCK-BACK"]
    assert before is None or consortium.guard("a")._ledger_().head() == before
    assert consortium.say("a", hello(at=at)).kind == "site.hello"
    consortium.close()


def test_a_clock_that_goes_back_two_days_within_a_run(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), seed=None)
    with clock(-2 * DAY), mock.patch.object(guard_module, "load_records") as reading:
        for message in (hello(), ASK[0]):
            assert consortium.say("a", message).fields == {"code": "REFUSED-CLOCK"}
            consortium.kill("a")
    assert not reading.called and set(log(consortium)) == {"CLOCK-BACK"}
    assert consortium.ask("a", 0, counts()).kind == "site.noised"
    consortium.close()


def test_a_clock_that_a_time_server_corrects_is_no_trouble(tmp_path: Path) -> None:
    """An hour back: the lines get the time of the line before, so time never runs backwards in the ledger."""
    consortium = ward(tmp_path, plan(), seed=None)
    with clock(-3600):
        assert consortium.ask("a", 0, counts()).kind == "site.noised"
        consortium.close()  # which writes a line too
    times = at_of(consortium)
    assert times == sorted(times) and times[-1] == times[2]


def at_of(consortium: Ward) -> list[int]:
    with Ledger.open(consortium.directory("a") / "ledger.db") as ledger:
        return [line.body["at"] for line in ledger.lines()]


def test_a_clock_two_days_ahead_is_written_and_has_to_be_accepted_back(tmp_path: Path) -> None:
    """Nothing tells it from two days without work. Once it is right again, the ledger waits for the officer's word."""
    consortium = ward(tmp_path, plan(), seed=None)
    with clock(2 * DAY):
        assert consortium.ask("a", 0, counts()).kind == "site.noised"
        consortium.kill("a")
    assert consortium.ask("a", 1, counts()).fields == {"code": "REFUSED-CLOCK"}
    consortium.kill("a")
    path = consortium.directory("a") / "ledger.db"
    with pytest.raises(Refused, match="CLOCK-BACK"), Ledger.open(path, key("a")) as ledger:
        ledger.note("anything")
    with Ledger.open(path, key("a")) as ledger:
        ledger.accept_clock()
    assert consortium.ask("a", 1, counts()).kind == "site.noised"
    assert consortium.start() == ("a",)  # the coordinator's mirror takes the note too
    consortium.close()
    times = at_of(consortium)
    assert max(times) - times[-1] > DAY
    with Ledger.open(path) as ledger:
        chain.replay(ledger.lines(), owner="a", public=key("a").public_key())
        assert [note["about"] for note in ledger.book.notes].count(chain.CLOCK) == 1


def test_no_other_line_may_be_older_than_the_one_before(tmp_path: Path) -> None:
    """Whoever verifies a ledger sees a clock that was turned back, also by its owner."""
    now = 10 * DAY
    with Ledger.create(tmp_path / "l.db", "a", key("a"), clock=lambda: now) as ledger:
        body = {"kind": "note", "about": "x", "fields": {}, "n": 1, "owner": "a", "at": now - 1}
        with pytest.raises(CohortiumError, match="LEDGER-TIME"):
            ledger.book.apply(body)
        ledger.book.apply({**body, "about": chain.CLOCK})

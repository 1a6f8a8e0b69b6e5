"""The coordinator's mirror: keeps what verifies; refuses forks, gaps, rollbacks and strangers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger
from cohortium.server.mirror import Mirror

KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32) for n, name in enumerate("AB")}


def reserve(ledger: Ledger, release: str) -> None:
    event = Event.gaussian(2.0)
    ledger.reserve(run="r", release_id=release, event=event, count=1, plan_digest="0" * 64, purpose="p")


def sent(ledger: Ledger, start: int = 0) -> list[dict[str, Any]]:
    return [line.to_json() for line in ledger.lines(start)]


@pytest.fixture
def site(tmp_path: Path) -> Any:
    with Ledger.create(tmp_path / "a.db", "A", KEYS["A"], clock=lambda: 0) as ledger:
        reserve(ledger, "0")
        yield ledger


@pytest.fixture
def mirror(tmp_path: Path) -> Any:
    with Mirror(tmp_path / "mirror.db", {name: key.public_key() for name, key in KEYS.items()}) as made:
        yield made


def test_new_lines_are_kept_and_known_ones_pass(tmp_path: Path, site: Ledger, mirror: Mirror) -> None:
    assert mirror.head("A") is None
    assert mirror.receive("A", sent(site)) == 2
    assert mirror.receive("A", sent(site)) == 0
    reserve(site, "1")
    assert mirror.receive("A", sent(site, mirror.size("A") - 1)) == 1
    assert mirror.head("A") == site.head()
    assert mirror.book("A").charged_events("r") == site.charged_events("r")
    mirror.export("A", tmp_path / "copy.jsonl")
    site.export(tmp_path / "own.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == (tmp_path / "own.jsonl").read_bytes()
    again = Mirror(tmp_path / "mirror.db", {"A": KEYS["A"].public_key()})
    assert again.head("A") == site.head()
    again.close()


def test_gaps_changed_lines_and_wrong_signatures_are_refused(site: Ledger, mirror: Mirror) -> None:
    reserve(site, "1")
    lines = sent(site)
    forged = chain.sign(lines[1]["hash"], KEYS["B"])
    cases = [
        ("MIRROR-GAP", [lines[0], lines[2]]),
        ("MIRROR-HASH", [lines[0], lines[1] | {"body": lines[1]["body"] | {"count": 2}}]),
        ("MIRROR-SIGNATURE", [lines[0], lines[1] | {"signature": forged}]),
        ("LEDGER-FORM", [lines[0], {"body": {}}]),
        ("LEDGER-FORM", [{**lines[0], "hash": 7}]),
    ]
    for code, wrong in cases:
        with pytest.raises(CheckFailed) as refusal:
            mirror.receive("A", wrong)
        assert refusal.value.code == code
        assert mirror.size("A") == 0  # nothing of a bad batch stays, not even its good lines
    with pytest.raises(CheckFailed, match="MIRROR-SIGNATURE"):
        mirror.receive("B", lines)
    with pytest.raises(CheckFailed, match="MIRROR-OWNER"):
        mirror.receive("C", lines)
    assert mirror.receive("A", lines) == 3


def test_a_fork_is_found(tmp_path: Path, site: Ledger, mirror: Mirror) -> None:
    site.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "fork.db")
    with Ledger.open(tmp_path / "a.db", KEYS["A"], clock=lambda: 0) as one:
        reserve(one, "1")
        mirror.receive("A", sent(one))
    with Ledger.open(tmp_path / "fork.db", KEYS["A"], clock=lambda: 0) as two:
        reserve(two, "another")
        with pytest.raises(CheckFailed, match="MIRROR-FORK"):
            mirror.receive("A", sent(two))
        reserve(two, "more")
        with pytest.raises(CheckFailed, match="MIRROR-HASH"):
            mirror.receive("A", sent(two, mirror.size("A")))


def test_a_restored_backup_is_found_although_it_verifies(tmp_path: Path, site: Ledger, mirror: Mirror) -> None:
    site.close()
    backup = tmp_path / "backup.db"
    shutil.copy(tmp_path / "a.db", backup)
    with Ledger.open(tmp_path / "a.db", KEYS["A"], clock=lambda: 0) as live:
        reserve(live, "1")
        mirror.receive("A", sent(live))
        assert mirror.confirm("A", live.checkpoint()) == live.head()
    with Ledger.open(backup, KEYS["A"], clock=lambda: 0) as old:  # burns release 0: one line behind the live one
        with pytest.raises(CheckFailed, match="MIRROR-ROLLBACK"):
            mirror.confirm("A", old.checkpoint())
        while old.head().size < mirror.size("A"):
            old.note("catching up")
        with pytest.raises(CheckFailed, match="MIRROR-FORK"):
            mirror.confirm("A", old.checkpoint())
    with pytest.raises(CheckFailed, match="CHECKPOINT-"):
        mirror.confirm("A", "forged")


def test_the_owner_cannot_break_the_rules_even_with_its_key(site: Ledger, mirror: Mirror) -> None:
    mirror.receive("A", sent(site))
    body = {"kind": "advance", "run": "r", "release": "0", "state": "RELEASED", "digest": "", "n": 2}
    body |= {"owner": "A", "at": 0}
    head = chain.link(site.head().hash, body)
    line = chain.Line(body=body, hash=head, signature=chain.sign(head, KEYS["A"]))
    with pytest.raises(CheckFailed, match="LEDGER-STATE"):
        mirror.receive("A", [line.to_json()])
    assert mirror.head("A") == site.head()

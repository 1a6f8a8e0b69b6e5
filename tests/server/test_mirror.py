"""The coordinator's mirror: keeps what verifies; refuses forks, gaps, rollbacks and strangers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger
from cohortium.server.mirror import Mirror
from cohortium.server.witnesses import between_runs

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


# ---- as a witness -------------------------------------------------------------------------------------------


def test_what_is_co_signed_was_seen_to_its_last_line(site: Ledger, mirror: Mirror) -> None:
    public, coordinator = KEYS["A"].public_key(), KEYS["B"]
    with pytest.raises(CheckFailed, match="MIRROR-AHEAD"):
        mirror.cosign("A", site.checkpoint(), coordinator)
    assert mirror.seen("A") is None
    mirror.receive("A", sent(site))
    note = site.checkpoint()
    word = mirror.cosign("A", note, coordinator)
    given = {"owner": public, "witness": "coordinator", "public": coordinator.public_key()}
    assert witness.cosigned(site.head(), word, **given)
    assert mirror.seen("A") == note
    reserve(site, "1")
    assert mirror.seen("A") == note
    mirror.receive("A", sent(site, 2))
    with pytest.raises(CheckFailed, match="MIRROR-ROLLBACK"):
        mirror.cosign("A", note, coordinator)
    mirror.cosign("A", site.checkpoint(), coordinator)
    assert chain.verify_checkpoint(mirror.seen("A") or "", public) == site.head()


def test_growth_is_shown_without_the_lines(site: Ledger, mirror: Mirror) -> None:
    before = site.head()
    for number in range(1, 4):
        reserve(site, str(number))
    mirror.receive("A", sent(site))
    proof = mirror.digests("A", before.size, site.head().size)
    assert len(proof) == 3 * 32
    witness.check_extends(before, site.head(), proof)
    witness.check_extends(None, before, mirror.digests("A", 0, before.size))


def test_between_runs_a_site_asks_by_itself(site: Ledger, mirror: Mirror) -> None:
    assert between_runs(mirror, "A", site.checkpoint(), KEYS["B"]) == []
    mirror.receive("A", sent(site))
    (word,) = between_runs(mirror, "A", site.checkpoint(), KEYS["B"])
    assert word.startswith("coordinator ") and len(word) == len("coordinator ") + 128
    with pytest.raises(CheckFailed, match="CHECKPOINT-FORM"):
        between_runs(mirror, "A", "x", KEYS["B"])
    old = site.checkpoint()
    reserve(site, "1")
    mirror.receive("A", sent(site, 2))
    with pytest.raises(CheckFailed, match="MIRROR-ROLLBACK"):
        between_runs(mirror, "A", old, KEYS["B"])


def test_two_that_have_the_mirror_open_see_each_others_lines(tmp_path: Path, site: Ledger, mirror: Mirror) -> None:
    """Two runs of one consortium, and the service that answers sites meanwhile."""
    with Mirror(tmp_path / "mirror.db", {"A": KEYS["A"].public_key()}) as other:
        mirror.receive("A", sent(site))
        assert other.size("A") == 2 and other.receive("A", sent(site)) == 0
        reserve(site, "1")
        assert other.receive("A", sent(site, 2)) == 1
        assert mirror.head("A") == site.head()
        fork = sent(site, 2)[0]
        with pytest.raises(CheckFailed, match="MIRROR-FORK"):
            mirror.receive("A", [fork | {"signature": "00" * 64}])
        assert mirror.size("A") == other.size("A") == 3


def test_many_threads_write_one_mirror(tmp_path: Path, site: Ledger, mirror: Mirror) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for number in range(1, 40):
        reserve(site, str(number))
    lines = sent(site)
    with ThreadPoolExecutor(4) as pool, Mirror(tmp_path / "mirror.db", mirror._keys) as other:
        list(pool.map(lambda end: (mirror if end % 2 else other).receive("A", lines[:end]), range(1, len(lines) + 1)))
        assert mirror.size("A") == other.size("A") == len(lines)
    assert mirror.head("A") == site.head()


def test_a_new_key_is_a_new_ledger_and_the_old_one_stays(tmp_path: Path, site: Ledger, mirror: Mirror) -> None:
    mirror.receive("A", sent(site))
    mirror.cosign("A", site.checkpoint(), KEYS["B"])
    new = Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32)
    with (
        Ledger.create(tmp_path / "new.db", "A", new, clock=lambda: 0) as ledger,
        Mirror(tmp_path / "mirror.db", {"A": new.public_key()}) as later,
    ):
        assert later.size("A") == 0 and later.seen("A") is None
        assert later.receive("A", sent(ledger)) == 1
        later.cosign("A", ledger.checkpoint(), KEYS["B"])
        assert later.head("A") == ledger.head()
    assert mirror.size("A") == 2 and mirror.seen("A") == site.checkpoint()


def test_signed_nonsense_is_one_sites_nonsense(site: Ledger, mirror: Mirror) -> None:
    """Lines that fit the chain and are signed, but of a form that no guard writes: a code, nothing stored, no crash."""
    mirror.receive("A", sent(site))
    for change in (
        {"kind": "advance", "run": [], "release": {}, "state": "SEALED", "digest": ""},
        {"kind": "advance", "run": "r", "release": "0", "state": [], "digest": 7},
        {
            "kind": "reserve",
            "run": "r",
            "release": "9",
            "attempt": 0,
            "event": 7,
            "count": 1,
            "plan": "",
            "purpose": "",
        },
        {"kind": [], "about": {}, "fields": []},
        {"kind": "note", "about": "x", "fields": {}, "at": None},
    ):
        body = {"n": 2, "owner": "A", "at": 0} | change
        head = chain.link(site.head().hash, body)
        line = chain.Line(body=body, hash=head, signature=chain.sign(head, KEYS["A"]))
        with pytest.raises(CheckFailed):
            mirror.receive("A", [line.to_json()])
        assert mirror.size("A") == 2
    for note in ("\ud800\n1\nx\n\n— a b", site.checkpoint().replace("/A", "/\ud800")):
        with pytest.raises(CheckFailed, match="CHECKPOINT-"):
            mirror.confirm("A", note)

"""Exported ledgers: every kind of damage is found, and checkpoints verify or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.messages import canonical

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = KEY.public_key()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    with Ledger.create(tmp_path / "l.db", "A", KEY, clock=lambda: 0) as ledger:
        for number in range(4):
            ledger.reserve(
                run="r",
                release_id=str(number),
                event=Event.gaussian(2.0),
                count=1,
                plan_digest="0" * 64,
                purpose="p",
            )
            ledger.advance("r", str(number), "SEALED", "1" * 64)
        ledger.export(tmp_path / "l.jsonl")
    return tmp_path / "l.jsonl"


def verify(path: Path) -> tuple[chain.Book, str]:
    return chain.replay(chain.read_jsonl(path), owner="A", public=PUBLIC)


def test_a_good_export_verifies_without_the_database(exported: Path) -> None:
    book, head = verify(exported)
    assert (book.size, len(book.charged_events())) == (9, 4)
    assert len(head) == 64


def test_every_flipped_bit_is_found(exported: Path) -> None:
    """Every 7th byte of the file, one bit each: about 500 flips."""
    good = exported.read_bytes()
    for at in range(0, len(good), 7):
        exported.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(CheckFailed):
            verify(exported)


def test_lines_removed_swapped_repeated_or_cut_are_found(exported: Path) -> None:
    lines = exported.read_bytes().splitlines(keepends=True)
    head = verify(exported)[1]
    for at in range(len(lines) - 1):
        for changed in (
            lines[:at] + lines[at + 1 :],
            [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
            [*lines[: at + 1], *lines[at:]],
        ):
            exported.write_bytes(b"".join(changed))
            with pytest.raises(CheckFailed):
                verify(exported)
    exported.write_bytes(b"".join(lines)[:-1])
    with pytest.raises(CheckFailed, match="LEDGER-FORM"):
        verify(exported)
    exported.write_bytes(b"")
    with pytest.raises(CheckFailed, match="LEDGER-EMPTY"):
        verify(exported)
    # Whole lines cut off at the end leave a valid older ledger: only somebody who saw the newer one can tell.
    exported.write_bytes(b"".join(lines[:-1]))
    assert verify(exported)[1] != head


def test_a_wrong_signature_key_or_owner_is_found(exported: Path) -> None:
    lines = [chain.Line.from_json(json.loads(text)) for text in exported.read_text().splitlines()]
    with pytest.raises(CheckFailed, match="LEDGER-SIGNATURE"):
        chain.replay(lines, owner="A", public=OTHER.public_key())
    with pytest.raises(CheckFailed, match="LEDGER-OWNER"):
        chain.replay(lines, owner="B", public=PUBLIC)
    forged = [
        chain.Line(body=line.body, hash=line.hash, signature=chain.sign(line.hash, OTHER)) if line.number == 3 else line
        for line in lines
    ]
    with pytest.raises(CheckFailed, match="LEDGER-SIGNATURE"):
        chain.replay(forged, owner="A", public=PUBLIC)


def test_a_signed_chain_that_breaks_the_rules_is_found() -> None:
    """The owner itself cannot sign away a charge: the rules are replayed by whoever verifies."""
    public = PUBLIC.public_bytes_raw().hex()
    common = {"owner": "A", "at": 0}
    reserve = {
        "kind": "reserve",
        "run": "r",
        "release": "0",
        "attempt": 0,
        "event": Event.gaussian(1.0).to_json(),
        "count": 1,
        "plan": "0" * 64,
        "purpose": "p",
    }
    advance = {"kind": "advance", "run": "r", "release": "0", "digest": "1" * 64}
    opening = {"kind": "open", "format": chain.FORMAT, "public_key": public}
    bad = [
        [reserve],
        [opening, opening],
        [opening, reserve, reserve],
        [opening, advance | {"state": "SEALED"}],
        [opening, reserve, advance | {"state": "NONE"}],
        [opening, reserve, advance | {"state": "RELEASED"}],
        [opening, reserve, advance | {"state": "BURNED"}, advance | {"state": "SEALED"}],
        [opening, reserve | {"count": 0}],
        [opening, reserve | {"count": -1}],
        [opening, reserve | {"event": {"kind": "laplace", "scale": "0x1p+0"}}],
        [opening, reserve | {"extra": 1}],
        [opening | {"public_key": OTHER.public_key().public_bytes_raw().hex()}],
    ]
    for bodies in bad:
        lines, head = [], None
        for number, body in enumerate(bodies):
            whole = common | body | {"n": number}
            head = chain.link(head, whole)
            lines.append(chain.Line(body=whole, hash=head, signature=chain.sign(head, KEY)))
        with pytest.raises(CheckFailed):
            chain.replay(lines, owner="A", public=PUBLIC)


def test_checkpoints(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.db", "Long Beach/é", KEY) as ledger:
        text = ledger.checkpoint()
        head = ledger.head()
    assert chain.verify_checkpoint(text, PUBLIC, owner="Long Beach/é") == head
    origin, size, root, empty, mark, end = text.split("\n")
    assert (size, empty, end) == ("1", "", "")
    assert " " not in origin
    assert mark.startswith(f"— {origin} ")
    with pytest.raises(CheckFailed, match="CHECKPOINT-SIGNATURE"):
        chain.verify_checkpoint(text, OTHER.public_key())
    with pytest.raises(CheckFailed, match="CHECKPOINT-OWNER"):
        chain.verify_checkpoint(text, PUBLIC, owner="A")
    for broken in (
        text.replace("\n1\n", "\n2\n"),
        text.replace("\n1\n", "\n01\n"),
        text.replace(root, root.swapcase()),
        text[:-5],
        "",
        "a\nb\nc\n\nd",
    ):
        with pytest.raises(CheckFailed, match="CHECKPOINT"):
            chain.verify_checkpoint(broken, PUBLIC)


def test_a_body_has_one_spelling(exported: Path) -> None:
    text = exported.read_bytes()
    exported.write_bytes(text.replace(b'{"body"', b'{ "body"', 1))
    with pytest.raises(CheckFailed, match="LEDGER-FORM"):
        verify(exported)
    value = json.loads(text.splitlines()[0])
    assert canonical(value) == text.splitlines()[0]

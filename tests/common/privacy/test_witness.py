"""The rules of witnesses: how many it takes, what a proof shows, what a co-signature says."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.chain import Checkpoint
from cohortium.common.privacy.ledger import Ledger

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32) for n in range(3)]
OWNER, WITNESS, OTHER = KEYS
HEAD = Checkpoint(owner="A", size=7, hash="ab" * 32)


def test_two_starts_always_share_an_honest_witness() -> None:
    """Any two sets of k of the n - 1 others have more than c in common, for every n and c that a plan allows."""
    for sites in range(3, 101):
        for colluders in range(sites - 1):
            enough = witness.needed(sites=sites, colluders=colluders)
            assert 2 * enough - (sites - 1) > colluders and enough <= sites - 1
            assert 2 * (enough - 1) - (sites - 1) <= colluders, "one fewer would do"
    assert [witness.needed(sites=n, colluders=0) for n in (1, 2, 3, 4, 5)] == [0, 0, 2, 2, 3]


def test_the_rule_by_counting_sets() -> None:
    for sites, colluders in ((3, 0), (4, 1), (5, 0), (5, 2), (6, 1)):
        enough = witness.needed(sites=sites, colluders=colluders)
        sets = [set(s) for s in itertools.combinations(range(sites - 1), enough)]
        assert min(len(one & two) for one in sets for two in sets) > colluders


def test_those_who_must_be_there_at_the_beginning() -> None:
    assert witness.quorum(sites=1, survivors=0, colluders=0) == witness.quorum(sites=2, survivors=0, colluders=0) == 1
    assert witness.quorum(sites=4, survivors=3, colluders=0) == 3
    assert witness.quorum(sites=5, survivors=3, colluders=0) == 4
    assert witness.quorum(sites=5, survivors=5, colluders=1) == 5


def test_a_co_signature_is_of_one_head_one_key_and_one_witness() -> None:
    signed = witness.cosign(HEAD, owner=OWNER.public_key(), witness="B", key=WITNESS)
    given = {"owner": OWNER.public_key(), "witness": "B", "public": WITNESS.public_key()}
    assert witness.cosigned(HEAD, signed, **given)
    for change in ({"size": 8}, {"hash": "ac" * 32}, {"owner": "C"}):
        assert not witness.cosigned(dataclasses.replace(HEAD, **change), signed, **given)
    for key, value in (("owner", OTHER.public_key()), ("witness", "C"), ("public", OTHER.public_key())):
        assert not witness.cosigned(HEAD, signed, **{**given, key: value})
    for word in ("", "00" * 64, signed[:-2], signed.upper(), None, 7, [signed]):
        assert not witness.cosigned(HEAD, word, **given)


@pytest.fixture
def heads(tmp_path: Path) -> tuple[list[Checkpoint], list[bytes]]:
    """The head after each of five lines, and the lines' digests."""
    with Ledger.create(tmp_path / "l.db", "A", OWNER, clock=lambda: 0) as ledger:
        found = [ledger.head()]
        for number in range(4):
            ledger.note("more", number=number)
            found.append(ledger.head())
        return found, [chain.body_digest(line.body) for line in ledger.lines()]


def refused(seen: Checkpoint | None, claimed: Checkpoint, proof: bytes) -> str:
    try:
        witness.check_extends(seen, claimed, proof)
    except CheckFailed as error:
        return error.code
    return ""


def test_growth_is_shown_by_digests_alone(heads: tuple[list[Checkpoint], list[bytes]]) -> None:
    found, digests = heads
    for start, end in itertools.combinations_with_replacement(range(len(found)), 2):
        proof = b"".join(digests[start + 1 : end + 1])
        assert refused(found[start], found[end], proof) == ""
        if proof:
            assert refused(found[start], found[end], proof[:-32]) == refused(found[start], found[end], b"") != ""
            assert refused(found[start], found[end], bytes(len(proof))) == witness.FORK
    assert refused(None, found[2], b"".join(digests[:3])) == ""
    assert refused(None, found[2], b"") == refused(None, found[2], b"x" * 95) == witness.PROOF


def test_shorter_and_other_ledgers_are_refused(heads: tuple[list[Checkpoint], list[bytes]]) -> None:
    found, digests = heads
    assert refused(found[3], found[2], b"") == refused(found[3], found[2], digests[3]) == witness.ROLLBACK
    other = dataclasses.replace(found[3], hash="00" * 32)
    assert refused(found[3], other, b"") == witness.FORK
    assert refused(other, found[4], digests[4]) == witness.FORK

"""Invitations survive copying or say that they did not; proofs hold for exactly what was signed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from consortium import NAME, make_pki, signer, supernode

from cohortium.common.errors import CohortiumError, ProtocolError, UsageError
from cohortium.common.protocol.certificates import make_csr, new_key
from cohortium.common.protocol.invitation import (
    Invitation,
    check_identity,
    check_rotation,
    prove_identity,
    sign_rotation,
    token_bytes,
    token_hash,
    token_text,
)

TOKEN = token_text(bytes(range(16)))


@pytest.fixture(scope="module")
def invitation(tmp_path_factory: pytest.TempPathFactory) -> Invitation:
    root: Path = tmp_path_factory.mktemp("pki")
    return Invitation(
        consortium=NAME,
        name="north",
        role="site",
        enrol_address="coordinator.example.org:7433",
        root_pem=make_pki(root).root_pem,
        token=TOKEN,
        valid_until=datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    )


def test_text_and_back(invitation: Invitation) -> None:
    assert Invitation.from_text(invitation.to_text()) == invitation
    mailed = "Dear colleague,\r\n" + invitation.to_text().replace("\n", "\r\n  ") + "\r\nRegards"
    assert Invitation.from_text(mailed) == invitation


def test_a_damaged_invitation_is_refused(invitation: Invitation) -> None:
    lines = invitation.to_text().splitlines()
    for at in range(len(lines)):
        with pytest.raises(UsageError, match="INVITE-TEXT"):
            Invitation.from_text("\n".join(lines[:at] + lines[at + 1 :]))
    for at in range(1, len(lines) - 1):
        swapped = lines[at][::-1]
        with pytest.raises(UsageError, match="INVITE-TEXT"):
            Invitation.from_text("\n".join([*lines[:at], swapped, *lines[at + 1 :]]))


@pytest.mark.parametrize(
    "change",
    [{"name": "No"}, {"role": "service"}, {"enrol_address": "x"}, {"root_pem": b"x"}, {"token": "A"},
     {"valid_until": datetime(2030, 1, 1)}],
)  # fmt: skip
def test_bad_values_are_refused(invitation: Invitation, change: dict[str, object]) -> None:
    with pytest.raises(CohortiumError):
        replace(invitation, **change)  # type: ignore[arg-type]


def test_it_ends(invitation: Invitation) -> None:
    until = invitation.valid_until
    assert not invitation.expired(until - timedelta(seconds=1))
    assert invitation.expired(until)


def test_its_token_is_in_no_repr(invitation: Invitation) -> None:
    assert TOKEN not in repr(invitation)


def test_a_token_has_128_bits_however_it_is_typed() -> None:
    assert token_bytes(TOKEN) == bytes(range(16))
    assert token_bytes(TOKEN.lower().replace("-", " ")) == bytes(range(16))
    assert token_hash(TOKEN) == token_hash(TOKEN.replace("-", ""))
    for bad in ("", TOKEN[:-1], TOKEN + "A", TOKEN.replace("A", "1"), "é" * 26):
        with pytest.raises(UsageError, match="INVITE-TEXT"):
            token_bytes(bad)


def test_a_proof_is_bound_to_all_that_is_enrolled() -> None:
    """Red when any field is left out of the statement."""
    csr = make_csr(new_key(), consortium=NAME, role="site", name="north")
    officer, key = signer("officer").public_key(), signer("north")
    good = {"token": TOKEN, "csr": csr, "officer": officer.public_bytes_raw(), "supernode": supernode("north")}
    proof = prove_identity(key, token=TOKEN, csr=csr, officer=officer, supernode=supernode("north"))
    check_identity(key.public_key(), proof, **good)  # type: ignore[arg-type]
    others = {
        "token": token_text(bytes(16)),
        "csr": make_csr(new_key(), consortium=NAME, role="site", name="north"),
        "officer": signer("another").public_key().public_bytes_raw(),
        "supernode": supernode("south"),
    }
    for name, other in others.items():
        with pytest.raises(ProtocolError, match="ENROL-PROOF"):
            check_identity(key.public_key(), proof, **(good | {name: other}))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="ENROL-PROOF"):
        check_identity(signer("south").public_key(), proof, **good)  # type: ignore[arg-type]


def test_a_rotation_is_bound_to_site_old_and_new() -> None:
    old, new = signer("old").public_key(), signer("new").public_key()
    signature = sign_rotation(signer("old"), site="north", old=old, new=new)
    check_rotation(old, signature, site="north", old=old, new=new)
    for site, first, second in (("south", old, new), ("north", new, old), ("north", old, signer("x").public_key())):
        with pytest.raises(ProtocolError, match="ROTATE-PROOF"):
            check_rotation(old, signature, site=site, old=first, new=second)
    same = sign_rotation(signer("old"), site="north", old=old, new=old)
    with pytest.raises(ProtocolError, match="ROTATE-PROOF"):
        check_rotation(old, same, site="north", old=old, new=old)

"""An invitation and what is signed about keys: enrolment, and the change of a site's identity.

The coordinator hands an invitation over by a way that hospital IT trusts (in person, by telephone, an encrypted
mail). It names the consortium, whom it invites, where to enrol and the root certificate to trust, and holds a token
that works once. The server keeps a hash of the token only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CohortiumError, ProtocolError, UsageError
from cohortium.common.protocol.certificates import MEMBER_ROLES, SITE, Owner, fingerprint
from cohortium.common.protocol.messages import canonical, digest
from cohortium.common.protocol.signing import sign_statement, verify_statement

TOKEN_BYTES = 16
ENROLMENT, ROTATION = "enrolment", "identity-rotation"
_BEGIN, _END = "-----BEGIN COHORTIUM INVITATION-----", "-----END COHORTIUM INVITATION-----"
_FORMAT = "cohortium-invitation/1"
_TOKEN_DOMAIN = b"cohortium/invitation-token/1\x00"
_MOST_CHARACTERS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """Who is invited to what. enrol_address: host:port. root_pem: the certificate to trust. valid_until: UTC."""

    consortium: str
    name: str
    role: str
    enrol_address: str
    root_pem: bytes
    token: str = field(repr=False)  # a secret: never in a log or a traceback
    valid_until: datetime

    def __post_init__(self) -> None:
        Owner(consortium=self.consortium, role=self.role, name=self.name)
        fingerprint(self.root_pem)
        token_bytes(self.token)
        if self.role not in MEMBER_ROLES or self.valid_until.tzinfo is None or ":" not in self.enrol_address:
            raise _unreadable()
        object.__setattr__(self, "valid_until", self.valid_until.replace(microsecond=0))  # as its text has it

    @property
    def root_fingerprint(self) -> str:
        """What both ends read to each other before the invitation is used."""
        return fingerprint(self.root_pem)

    def expired(self, now: datetime | None = None) -> bool:
        return (now or datetime.now(UTC)) >= self.valid_until

    def to_text(self) -> str:
        """The block to copy or to store as a file. Whoever has it can enrol in the invited name: keep it secret."""
        body = canonical(
            {
                "format": _FORMAT,
                "consortium": self.consortium,
                "name": self.name,
                "role": self.role,
                "enrol_address": self.enrol_address,
                "root": self.root_pem.decode("ascii"),
                "token": self.token,
                "valid_until": int(self.valid_until.timestamp()),
            }
        )
        # The digest finds a line lost in copying; it protects against nobody.
        coded = base64.b64encode(hashlib.sha256(body).digest()[:8] + body).decode("ascii")
        return "\n".join([_BEGIN, *(coded[i : i + 76] for i in range(0, len(coded), 76)), _END, ""])

    @classmethod
    def from_text(cls, text: str) -> Self:
        """An invitation of its block, whatever stands around it. UsageError INVITE-TEXT when it is damaged."""
        try:
            if len(text) > _MOST_CHARACTERS:
                raise ValueError
            inner, end, _ = text.split(_BEGIN, 1)[1].partition(_END)
            if not end:
                raise ValueError
            data = base64.b64decode("".join(inner.split()), validate=True)
            check, body = data[:8], data[8:]
            if hashlib.sha256(body).digest()[:8] != check:
                raise ValueError
            found: dict[str, Any] = json.loads(body)
            if found.pop("format") != _FORMAT:
                raise ValueError
            root, until = found.pop("root").encode("ascii"), datetime.fromtimestamp(found.pop("valid_until"), UTC)
            return cls(root_pem=root, valid_until=until, **found)
        except (
            IndexError,
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            binascii.Error,
            OverflowError,
            OSError,
            CohortiumError,
        ):
            raise _unreadable() from None


def _unreadable() -> UsageError:
    return UsageError(
        "INVITE-TEXT",
        "the invitation cannot be read",
        hint="copy the whole block, from BEGIN to END, or ask the coordinator for a new invitation",
    )


# ---- tokens -------------------------------------------------------------------------------------------------


def token_text(token: bytes) -> str:
    """128 bits in base 32, in groups of four."""
    text = base64.b32encode(token).decode("ascii").rstrip("=")
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def token_bytes(text: str) -> bytes:
    """The 16 bytes of a token, however it is grouped; UsageError INVITE-TEXT."""
    plain = "".join(text.replace("-", " ").split()).upper()
    try:
        token = base64.b32decode(plain + "=" * (-len(plain) % 8)) if len(plain) == 26 else b""
    except (binascii.Error, ValueError):
        token = b""
    if len(token) != TOKEN_BYTES:
        raise _unreadable()
    return token


def token_hash(text: str) -> bytes:
    """What the server keeps of a token. 128 random bits need no salt and no slow hash."""
    return hashlib.sha256(_TOKEN_DOMAIN + token_bytes(text)).digest()


# ---- what is signed -----------------------------------------------------------------------------------------


def prove_identity(
    identity: Ed25519PrivateKey, *, token: str, csr: bytes, officer: Ed25519PublicKey, supernode: str
) -> bytes:
    """The identity's signature over everything that is enrolled with it: whoever sends the request has the key,
    and none of the other keys can be exchanged on the way."""
    statement = _enrolment(token, csr, identity.public_key().public_bytes_raw(), officer.public_bytes_raw(), supernode)
    return sign_statement(identity, ENROLMENT, statement)


def check_identity(
    identity: Ed25519PublicKey, proof: bytes, *, token: str, csr: bytes, officer: bytes, supernode: str
) -> None:
    """Return if the proof fits, raise ProtocolError ENROL-PROOF if not."""
    statement = _enrolment(token, csr, identity.public_bytes_raw(), officer, supernode)
    verify_statement(identity, ENROLMENT, statement, proof, code="ENROL-PROOF")


def _enrolment(token: str, csr: bytes, identity: bytes, officer: bytes, supernode: str) -> dict[str, Any]:
    return {
        "token": token_hash(token).hex(),
        "csr": digest(csr),
        "identity": identity.hex(),
        "officer": officer.hex(),
        "supernode": supernode,
    }


def sign_rotation(key: Ed25519PrivateKey, *, site: str, old: Ed25519PublicKey, new: Ed25519PublicKey) -> bytes:
    """One of the three signatures (old key, new key, officer) that change a site's identity."""
    return sign_statement(key, ROTATION, _rotation(site, old, new))


def check_rotation(
    signer: Ed25519PublicKey, signature: bytes, *, site: str, old: Ed25519PublicKey, new: Ed25519PublicKey
) -> None:
    """Return if the signature fits, raise ProtocolError ROTATE-PROOF if not."""
    if old.public_bytes_raw() == new.public_bytes_raw():
        raise ProtocolError("ROTATE-PROOF", "the new identity is the old one")
    verify_statement(signer, ROTATION, _rotation(site, old, new), signature, code="ROTATE-PROOF")


def _rotation(site: str, old: Ed25519PublicKey, new: Ed25519PublicKey) -> dict[str, Any]:
    return {"role": SITE, "site": site, "old": old.public_bytes_raw().hex(), "new": new.public_bytes_raw().hex()}

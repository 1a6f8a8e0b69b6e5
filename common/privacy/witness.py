"""Witnesses: why a rolled-back or copied ledger cannot start a run, although it verifies by itself.

A witness remembers the newest checkpoint that it saw of each ledger, and co-signs the next one only if it is not
shorter, not another one of the same length, and shown to extend the old one. A hospital begins a run only with the
coordinator's co-signature and those of k of the n - 1 other hospitals of the plan:

    k = ceil((n + c) / 2)   from 3 hospitals on, c: how many of the others may work together with the coordinator
    k = 0                   with 1 or 2: the coordinator is the only witness

Any two starts then have 2k - (n - 1) > c other hospitals in common, so at least one honest hospital saw the newer
head before it is asked to co-sign the older one, and refuses, even if the coordinator and c hospitals lie.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Checkpoint, is_hex
from cohortium.common.protocol.messages import canonical

_COSIGN = b"cohortium/ledger-witness/1\x00"
ROLLBACK, FORK, PROOF = "WITNESS-ROLLBACK", "WITNESS-FORK", "WITNESS-PROOF"
"""Why a witness does not co-sign; the only words that it says about another hospital's ledger."""


def needed(*, sites: int, colluders: int) -> int:
    """How many other hospitals must co-sign before a hospital begins a run of a plan."""
    return 0 if sites < 3 else min(sites - 1, -(-(sites + colluders) // 2))


def quorum(*, sites: int, survivors: int, colluders: int) -> int:
    """How many hospitals must be there when a run begins; while it runs, `survivors` are enough."""
    return max(survivors, 1, needed(sites=sites, colluders=colluders) + 1)


def cosign(head: Checkpoint, *, owner: Ed25519PublicKey, witness: str, key: Ed25519PrivateKey) -> str:
    """A witness's signature over a head that it has written down, hex."""
    return key.sign(_statement(head, owner, witness)).hex()


def cosigned(
    head: Checkpoint, signature: object, *, owner: Ed25519PublicKey, witness: str, public: Ed25519PublicKey
) -> bool:
    """Whether the witness signed this very head of this very key's ledger."""
    if not (isinstance(signature, str) and is_hex(signature, 64)):
        return False
    try:
        public.verify(bytes.fromhex(signature), _statement(head, owner, witness))
    except InvalidSignature:
        return False
    return True


def check_extends(seen: Checkpoint | None, claimed: Checkpoint, proof: bytes) -> None:
    """Return if `claimed` may follow what was `seen`; CheckFailed WITNESS-... says why not.

    proof: digests of the bodies of the lines in between (of all lines, where nothing was seen), 32 bytes each.
    """
    size, head = (0, chain.EMPTY) if seen is None else (seen.size, seen.hash)
    if claimed.size < size:
        raise CheckFailed(ROLLBACK, "a ledger is shorter than it was: an older one was put back")
    if claimed.size == size:
        if claimed.hash != head:
            raise CheckFailed(FORK, "two ledgers of one owner, of the same length")
        return
    if len(proof) != chain.DIGEST_BYTES * (claimed.size - size):
        raise CheckFailed(PROOF, "it was not shown that a ledger only grew")
    if chain.extend(head, proof) != claimed.hash:
        raise CheckFailed(FORK, "a ledger does not go on from where it stood")


def _statement(head: Checkpoint, owner: Ed25519PublicKey, witness: str) -> bytes:
    return _COSIGN + canonical(
        {
            "witness": witness,
            "owner": head.owner,
            "key": owner.public_bytes_raw().hex(),
            "size": head.size,
            "hash": head.hash,
        }
    )

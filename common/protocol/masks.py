"""Masks over Z_2^64: one keystream per pair of sites, one per site itself.

Every mask is an AES-256-CTR keystream (NIST SP 800-38A) whose key HKDF-SHA256 (RFC 5869) derives from a
secret of this round and from everything that both ends must agree on: the round's parameters, the roster, the
pair. Sites that were told different rosters therefore hold masks that do not cancel: their sum is noise. Each
key is used for one keystream from counter zero.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.fixedpoint import Ring
from cohortium.common.protocol.messages import canonical

_CHUNK = 1 << 14  # elements: keystream and target stay in the cache together
_ZEROS = bytes(8 * _CHUNK)


def derive(secret: bytes, purpose: str, **bound: object) -> bytes:
    """32-byte key from a secret, for one purpose, bound to the named public values (HKDF-SHA256's info)."""
    info = canonical({"domain": "cohortium/secure-sum/1", "purpose": purpose, **bound})
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """X25519 shared secret (RFC 7748). A point of small order, where the secret is zero, is SUM-KEY."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError("SUM-KEY", "a public key gives no shared secret") from None


def self_key(seed: bytes, *, context: str, roster: str, site: str) -> bytes:
    """Key of a site's own mask b_u (Bonawitz et al. 2017, section 4)."""
    return derive(seed, "self-mask", context=context, roster=roster, site=site)


def pair_key(private: X25519PrivateKey, public: bytes, *, context: str, roster: str, a: str, b: str) -> bytes:
    """Key of the mask that sites a and b share; the same from both ends and in either order."""
    return derive(agree(private, public), "pair-mask", context=context, roster=roster, pair=sorted((a, b)))


def add_keystream(total: Ring, key: bytes, *, subtract: bool = False) -> None:
    """Add the keystream of a key to total (uint64 [d], in place, mod 2^64)."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(8 * _CHUNK + 16)  # update_into wants a block of slack
    values = np.frombuffer(buffer, dtype="<u8", count=_CHUNK)
    operation = np.subtract if subtract else np.add
    for start in range(0, total.size, _CHUNK):
        part = total[start : start + _CHUNK]
        stream.update_into(_ZEROS[: 8 * part.size], buffer)
        operation(part, values[: part.size], out=part)


def add_pair_mask(
    total: Ring, private: X25519PrivateKey, public: bytes, *, context: str, roster: str, site: str, peer: str
) -> None:
    """Add what `site` adds for `peer`: the pair's keystream, with + at the lower name and − at the higher.

    So the two ends cancel; and a server that learned a dropped site's key cancels a survivor's part by adding
    what the dropped site would have added.
    """
    key = pair_key(private, public, context=context, roster=roster, a=site, b=peer)
    add_keystream(total, key, subtract=site > peer)

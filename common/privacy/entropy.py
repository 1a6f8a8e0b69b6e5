"""Keys and keystreams: where every random bit that protects a patient comes from.

Noise, masks and sampling are expanded by AES-256-CTR from keys that a site derives for one purpose, one run and
one release. In the field the key material is fresh from the operating system each time; a rehearsal may swap in
`SeededEntropy`, whose results are reproducible and therefore never private.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Purpose:
    """What one key is for: no two keys share a Purpose, so no keystream is ever used twice.

    label: "noise", "sampling", "masks", "channel"
    run: the run's id; release: the release's index in the plan; step: local step inside one release
    head: the site's ledger head at the moment of reservation (hex); ties the key to the reservation
    """

    label: str
    run: str
    release: int
    step: int = 0
    head: str = ""

    def info(self, *, with_head: bool) -> bytes:
        head = self.head if with_head else ""
        return "\x1f".join(("cohortium/1", self.label, self.run, str(self.release), str(self.step), head)).encode()


class Entropy(Protocol):
    """Gives one 32-byte key per purpose. `private` is False where keys can be computed by somebody else."""

    private: bool

    def key(self, purpose: Purpose) -> bytes: ...


class SystemEntropy:
    """Keys from the operating system, bound to their purpose by HKDF-SHA256 (RFC 5869)."""

    private = True

    def key(self, purpose: Purpose) -> bytes:
        return _hkdf(os.urandom(KEY_BYTES), purpose.info(with_head=True))


class SeededEntropy:
    """Reproducible keys for rehearsals and tests: anyone who knows the seed can remove the noise.

    Sampling keys do not depend on the site, so that a patient is sampled alike however patients are split over
    sites (the bit-for-bit test federated = pooled needs this); all other keys do.
    """

    private = False

    def __init__(self, *, seed: int, site: str) -> None:
        self._root = hashlib.sha256(f"cohortium/rehearsal/{seed}".encode()).digest()
        self._site = site

    def key(self, purpose: Purpose) -> bytes:
        scope = "" if purpose.label == "sampling" else self._site
        return _hkdf(self._root, purpose.info(with_head=False) + b"\x1f" + scope.encode())


def _hkdf(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


class Keystream:
    """AES-256-CTR under one key, read once from front to back."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError("a keystream's key has 32 bytes")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def bytes(self, count: int) -> bytes:
        return self._encryptor.update(bytes(count))

    def words(self, count: int) -> np.ndarray:
        """count uniform integers in 0 .. 2^64 − 1."""
        return np.frombuffer(self.bytes(8 * count), dtype="<u8")


class Material:
    """Labelled random bytes under one key, for protocol code that draws several secrets in a round."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def bytes_for(self, label: str, length: int) -> bytes:
        return Keystream(_hkdf(self.key, b"cohortium/material/1\x1f" + label.encode())).bytes(length)


def patient_uniforms(key: bytes, identity: np.ndarray) -> np.ndarray:
    """One uniform 64-bit integer per patient: AES_key(identity), a pseudorandom permutation of distinct blocks.

    identity: uint8 [patients, 16]. A patient's draw depends on the key and on that patient alone, never on who
    else is in the table, on order or on batches: this is what makes it Poisson sampling.
    """
    if identity.ndim != 2 or identity.shape[1] != 16 or identity.dtype != np.uint8:
        raise ValueError("identity is uint8 [patients, 16]")
    # ECB on purpose: each block is one patient's 128-bit identity and is used as a function, not as a cipher.
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = encryptor.update(np.ascontiguousarray(identity).tobytes())
    return np.frombuffer(blocks, dtype="<u8")[::2].copy()

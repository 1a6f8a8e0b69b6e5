"""Ed25519 identities: who signed what, and for which purpose.

A site's identity is one long-lived Ed25519 key (RFC 8032). Envelopes are signed in `messages`; statements
that other sites must verify although a server relays them are signed here, each with its purpose in front, so
that a signature made for one purpose never fits another.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import ProtocolError, UsageError
from cohortium.common.protocol.messages import canonical, digest

SEED_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64


def generate() -> Ed25519PrivateKey:
    """A fresh identity from the operating system's randomness."""
    return Ed25519PrivateKey.generate()


def from_seed(seed: bytes) -> Ed25519PrivateKey:
    """The identity of a 32-byte seed (RFC 8032's private key); for tests and for stored keys."""
    if len(seed) != SEED_BYTES:
        raise UsageError("KEY-FORMAT", "an Ed25519 seed has 32 bytes")
    return Ed25519PrivateKey.from_private_bytes(seed)


def public_from_raw(raw: bytes) -> Ed25519PublicKey:
    """The public key of its 32 raw bytes."""
    if len(raw) != PUBLIC_BYTES:
        raise UsageError("KEY-FORMAT", "an Ed25519 public key has 32 bytes")
    return Ed25519PublicKey.from_public_bytes(raw)


def fingerprint(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key in groups of four hex digits, to be compared by telephone."""
    text = digest(public.public_bytes_raw())
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def save_private(key: Ed25519PrivateKey, path: Path) -> None:
    """Write a new PEM file (PKCS #8) with mode 0600, flushed to disk; never overwrites (KEY-EXISTS)."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(path, pem, 0o600)


def save_public(public: Ed25519PublicKey, path: Path) -> None:
    """Write a new PEM file with mode 0644; never overwrites (KEY-EXISTS)."""
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(path, pem, 0o644)


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key from PEM or 32 raw bytes.

    Raises UsageError: KEY-MISSING, KEY-MODE (group or others may read it), KEY-FORMAT.
    """
    data = _read(path, private=True)
    if len(data) == SEED_BYTES:
        return from_seed(data)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _unreadable(path) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _unreadable(path)
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key from PEM or 32 raw bytes. Raises UsageError: KEY-MISSING, KEY-FORMAT."""
    data = _read(path, private=False)
    if len(data) == PUBLIC_BYTES:
        return public_from_raw(data)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _unreadable(path) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _unreadable(path)
    return key


def sign_statement(key: Ed25519PrivateKey, purpose: str, statement: dict[str, Any]) -> bytes:
    """64-byte signature of a statement for one purpose."""
    return key.sign(_preimage(purpose, statement))


def verify_statement(
    public: Ed25519PublicKey, purpose: str, statement: dict[str, Any], signature: bytes, *, code: str
) -> None:
    """Return if the signature fits, raise ProtocolError(code) if not."""
    try:
        public.verify(signature, _preimage(purpose, statement))
    except InvalidSignature:
        raise ProtocolError(code, f"the signature under a {purpose} does not fit its signer") from None


def _preimage(purpose: str, statement: dict[str, Any]) -> bytes:
    # The zero byte ends the purpose: no purpose is a prefix of another's preimage.
    return b"cohortium/" + purpose.encode("ascii") + b"/1\x00" + canonical(statement)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    # O_EXCL: a key is never overwritten, and the mode holds from the first moment on.
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise UsageError(
            "KEY-EXISTS", "a key file is never overwritten", where=(str(path),), hint="choose another path"
        ) from None
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask says
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, *, private: bool) -> bytes:
    try:
        with path.open("rb") as file:
            # Ask the open file, not the path: what is checked is what is read.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if private and mode & 0o077:
                raise UsageError(
                    "KEY-MODE",
                    f"group or others may use this private key (mode {mode:04o})",
                    where=(str(path),),
                    hint=f"chmod 600 {path}",
                )
            return file.read(1 << 16)
    except OSError:
        raise UsageError("KEY-MISSING", "the key file cannot be read", where=(str(path),)) from None


def _unreadable(path: Path) -> UsageError:
    return UsageError("KEY-FORMAT", "not an Ed25519 key in PEM (unencrypted) or 32 raw bytes", where=(str(path),))

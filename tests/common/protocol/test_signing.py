"""Identities: files that nobody else may read, and signatures that fit one purpose only."""

from __future__ import annotations

import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from cohortium.common.errors import ProtocolError, UsageError
from cohortium.common.protocol import signing

# RFC 8032, section 7.1, test 2
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNED_72 = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_rfc_8032_vector() -> None:
    key = signing.from_seed(SEED)
    assert key.public_key().public_bytes_raw().hex() == PUBLIC
    assert key.sign(b"\x72").hex() == SIGNED_72


def test_private_key_round_trips_with_mode_0600_whatever_the_umask(tmp_path) -> None:
    key, path = signing.generate(), tmp_path / "site.key"
    before = os.umask(0)
    try:
        signing.save_private(key, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signing.load_private(path).private_bytes_raw() == key.private_bytes_raw()


def test_public_key_round_trips_from_pem_and_raw(tmp_path) -> None:
    public = signing.generate().public_key()
    signing.save_public(public, tmp_path / "a")
    (tmp_path / "b").write_bytes(public.public_bytes_raw())
    for name in "ab":
        assert signing.load_public(tmp_path / name) == public


def test_raw_private_key_is_read(tmp_path) -> None:
    path = tmp_path / "raw.key"
    path.write_bytes(SEED)
    path.chmod(0o600)
    assert signing.load_private(path).public_key().public_bytes_raw().hex() == PUBLIC


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_private_key_that_others_may_use_is_refused(tmp_path, mode) -> None:
    path = tmp_path / "site.key"
    signing.save_private(signing.generate(), path)
    path.chmod(mode)
    with pytest.raises(UsageError) as caught:
        signing.load_private(path)
    assert caught.value.code == "KEY-MODE"
    assert "chmod 600" in caught.value.hint


def test_a_key_file_is_never_overwritten(tmp_path) -> None:
    path = tmp_path / "site.key"
    signing.save_private(signing.from_seed(SEED), path)
    with pytest.raises(UsageError) as caught:
        signing.save_private(signing.generate(), path)
    assert caught.value.code == "KEY-EXISTS"
    assert signing.load_private(path).private_bytes_raw() == SEED


def _rsa_pem() -> bytes:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"-----BEGIN PRIVATE KEY-----\nAAAA\n", "rsa"])
def test_other_files_are_refused(tmp_path, content) -> None:
    path = tmp_path / "key"
    path.write_bytes(_rsa_pem() if content == "rsa" else content)
    path.chmod(0o600)
    for load in (signing.load_private, signing.load_public):
        with pytest.raises(UsageError) as caught:
            load(path)
        assert caught.value.code == "KEY-FORMAT"
    with pytest.raises(UsageError) as caught:
        signing.load_private(tmp_path / "absent")
    assert caught.value.code == "KEY-MISSING"


def test_wrong_lengths_are_refused() -> None:
    for make in (signing.from_seed, signing.public_from_raw):
        with pytest.raises(UsageError):
            make(bytes(31))


def test_a_statement_fits_its_purpose_signer_and_content_only() -> None:
    key, other = signing.from_seed(SEED), signing.generate()
    statement = {"run": "r", "round": 1}
    signature = signing.sign_statement(key, "vote", statement)
    signing.verify_statement(key.public_key(), "vote", statement, signature, code="X")
    for public, purpose, said in (
        (other.public_key(), "vote", statement),
        (key.public_key(), "prepare", statement),
        (key.public_key(), "vote", {"run": "r", "round": 2}),
        (key.public_key(), "vote", {"run": "r", "round": "1"}),
    ):
        with pytest.raises(ProtocolError) as caught:
            signing.verify_statement(public, purpose, said, signature, code="X")
        assert caught.value.code == "X"


def test_a_statement_is_never_an_envelope() -> None:
    """Both are signed by the same key, so their preimages may not meet."""
    from cohortium.common.protocol import messages

    for purpose in ("envelope", "channel-key", "round-prepare", "survivor-vote"):
        preimage = signing._preimage(purpose, {"a": 1})
        assert not preimage.startswith(messages._DOMAIN + messages.MAGIC)


def test_fingerprint_reads_aloud() -> None:
    text = signing.fingerprint(signing.public_from_raw(bytes.fromhex(PUBLIC)))
    assert len(text.split()) == 16
    assert text != signing.fingerprint(signing.generate().public_key())

"""Masks and channels against published vectors and against an independent construction."""

from __future__ import annotations

import hashlib
import hmac
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import channels
from cohortium.common.protocol.masks import add_keystream, add_pair_mask, agree, derive, pair_key, self_key

BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
SHARED = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def _private(seed: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def test_x25519_rfc_7748_section_6_1() -> None:
    assert agree(X25519PrivateKey.from_private_bytes(BOB), ALICE_PUBLIC).hex() == SHARED


def test_x25519_rfc_7748_section_5_2_iterated() -> None:
    k = u = bytes([9]) + bytes(31)
    for step in range(1, 1001):
        k, u = agree(X25519PrivateKey.from_private_bytes(k), u), k
        if step == 1:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


@pytest.mark.parametrize("point", [bytes(32), bytes([1]) + bytes(31)])
def test_points_of_small_order_are_refused(point) -> None:
    with pytest.raises(ProtocolError, match="SUM-KEY"):
        agree(_private(1), point)


def _hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    out, block = b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([i]), "sha256")
        out += block
    return out[:length]


def test_hkdf_rfc_5869_case_1_and_ours_equals_it() -> None:
    okm = _hkdf(bytes([0x0B]) * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")
    info = json.dumps({"a": "1", "domain": "cohortium/secure-sum/1", "purpose": "p"}, separators=(",", ":")).encode()
    assert derive(b"secret", "p", a="1") == _hkdf(b"secret", b"", info, 32)


def test_aes_256_ctr_sp_800_38a_f_5_5() -> None:
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    assert stream.update(plain).hex() == ("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")


@pytest.mark.parametrize("size", [1, 2, 3, 16383, 16384, 16385, 40001])
def test_the_keystream_is_aes_of_the_counters_whatever_the_chunks(size) -> None:
    key = bytes(range(32))
    blocks = b"".join(i.to_bytes(16, "big") for i in range(-(-size // 2)))
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
    expected = np.frombuffer(stream, "<u8")[:size]
    start = np.arange(size, dtype=np.uint64) * np.uint64(2**63 - 3)
    total = start.copy()
    add_keystream(total, key)
    assert np.array_equal(total, start + expected)
    add_keystream(total, key, subtract=True)
    assert np.array_equal(total, start)


BOUND = {"context": "c", "roster": "r"}


def test_pair_masks_cancel_and_only_between_the_two_ends() -> None:
    one, two, three = _private(1), _private(2), _private(3)
    total = np.zeros(100, np.uint64)
    add_pair_mask(total, one, _public(two), site="a", peer="b", **BOUND)
    assert np.count_nonzero(total) == 100
    other = total.copy()
    add_pair_mask(total, two, _public(one), site="b", peer="a", **BOUND)
    assert not total.any()
    add_pair_mask(other, three, _public(one), site="b", peer="a", **BOUND)
    assert other.any()


def test_a_pair_key_is_bound_to_all_that_both_ends_must_agree_on() -> None:
    one, two = _private(1), _public(_private(2))
    base = {"context": "c", "roster": "r", "a": "a", "b": "b"}
    keys = [pair_key(one, two, **base)]
    for name in base:
        keys.append(pair_key(one, two, **{**base, name: "other"}))
    keys.append(pair_key(one, _public(_private(3)), **base))
    assert len(set(keys)) == 6
    assert pair_key(one, two, **{**base, "a": "b", "b": "a"}) == keys[0]


def test_a_self_key_is_bound_to_its_round_roster_and_site() -> None:
    base = {"context": "c", "roster": "r", "site": "a"}
    keys = [self_key(b"s" * 32, **base), self_key(b"t" * 32, **base)]
    keys += [self_key(b"s" * 32, **{**base, name: "other"}) for name in base]
    assert len(set(keys)) == 5


# ---- channels --------------------------------------------------------------------------------------------


def test_chacha20_poly1305_rfc_8439_section_2_8_2() -> None:
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    out = ChaCha20Poly1305(bytes(range(0x80, 0xA0))).encrypt(
        bytes.fromhex("070000004041424344454647"), plain, bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    )
    assert out[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert out[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


SENDER, RECEIVER = _private(7), _private(8)
PLACE = {"context": "c", "round_key": b"k" * 32, "sender": "a", "receiver": "b"}
SHARES = (b"s" * 33, b"t" * 33)


def test_shares_reach_their_receiver() -> None:
    sealed = channels.seal_shares(SHARES, private=SENDER, public=_public(RECEIVER), **PLACE)
    assert len(sealed) == channels.SEALED_BYTES
    assert channels.open_shares(sealed, private=RECEIVER, public=_public(SENDER), **PLACE) == SHARES


@pytest.mark.parametrize("name", ["context", "round_key", "sender", "receiver"])
def test_shares_open_in_their_place_only(name) -> None:
    sealed = channels.seal_shares(SHARES, private=SENDER, public=_public(RECEIVER), **PLACE)
    moved = {**PLACE, name: b"x" * 32 if name == "round_key" else "x"}
    with pytest.raises(ProtocolError, match="SUM-SEAL"):
        channels.open_shares(sealed, private=RECEIVER, public=_public(SENDER), **moved)


def test_every_flipped_bit_and_other_keys_are_refused() -> None:
    sealed = channels.seal_shares(SHARES, private=SENDER, public=_public(RECEIVER), **PLACE)
    for bit in range(0, 8 * len(sealed), 7):
        bent = bytearray(sealed)
        bent[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="SUM-SEAL"):
            channels.open_shares(bytes(bent), private=RECEIVER, public=_public(SENDER), **PLACE)
    with pytest.raises(ProtocolError, match="SUM-SEAL"):
        channels.open_shares(sealed, private=_private(9), public=_public(SENDER), **PLACE)


def test_no_two_aead_keys_are_alike_in_a_round(consortium, labelled, monkeypatch) -> None:
    """The nonce is always zero, which is sound only as long as this holds."""
    seen = []

    def recording(key: bytes) -> ChaCha20Poly1305:
        seen.append(hashlib.sha256(key).digest())
        return ChaCha20Poly1305(key)

    monkeypatch.setattr(channels, "ChaCha20Poly1305", recording)
    world = consortium(5)
    for number in (1, 2):
        for name in world.names:
            world.site(world.params(round=number), name).prepare(labelled((number, name)))
    assert len(seen) == len(set(seen)) == 2 * 5 * 4


def test_a_directory_takes_signed_keys_of_this_run_once_each(consortium) -> None:
    world, other = consortium(3), consortium(3, run_id="run-2")
    keys = world.channel_keys
    swapped = channels.ChannelKey(
        run_id=keys[0].run_id, site=keys[0].site, public=keys[1].public, signature=keys[0].signature
    )
    stranger = channels.ChannelKey(run_id="run-1", site="nobody", public=bytes(32), signature=bytes(64))
    for bad, code in (
        ([other.channel_keys[0]], "SUM-CONTEXT"),
        ([keys[0], keys[0]], "SUM-SENDER"),
        ([stranger], "SUM-SENDER"),
        ([swapped], "SUM-SIGNATURE"),
    ):
        with pytest.raises(ProtocolError) as caught:
            channels.Directory.verified(run_id="run-1", identities=world.publics, keys=bad)
        assert caught.value.code == code
    relabelled = channels.ChannelKey(
        run_id="run-1",
        site=keys[0].site,
        public=other.channel_keys[0].public,
        signature=other.channel_keys[0].signature,
    )
    with pytest.raises(ProtocolError, match="SUM-SIGNATURE"):
        channels.Directory.verified(run_id="run-1", identities=world.publics, keys=[relabelled])


def test_channel_messages_round_trip(consortium) -> None:
    keys = consortium(4).channel_keys
    assert channels.ChannelKey.from_message(keys[0].to_message()) == keys[0]
    relayed = channels.ChannelKeys(run_id="run-1", keys=keys)
    assert channels.ChannelKeys.from_message(relayed.to_message()) == relayed

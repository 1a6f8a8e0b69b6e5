"""Keys and keystreams: published vectors, one key a purpose, patients' draws that depend on nobody else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cohortium.common.privacy.entropy import (
    Keystream,
    Material,
    Purpose,
    SeededEntropy,
    SystemEntropy,
    _hkdf,
    patient_uniforms,
)

BASE = {"label": "noise", "run": "r", "release": 1, "step": 2, "head": "ab"}
OTHERS = [
    {"label": "masks"},
    {"run": "s"},
    {"release": 2},
    {"step": 3},
    {"head": "ac"},
    {"run": "r\x1f1", "release": 2},
    {"release": 12, "step": 0},
]


def test_the_keystream_is_aes_256_in_counter_mode() -> None:
    """Block i of the stream is the AES-256 of i: the zero block under the zero key, and every later counter.

    The cipher itself is NIST's: SP 800-38A F.5.5 gives the output for its key and first counter block.
    """
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    assert aes(key, bytes(range(0xF0, 0x100))).hex() == "0bdf7df1591716335e9a8b15c860c502"
    assert Keystream(bytes(32)).bytes(16).hex() == "dc95c078a2408989ad48a21492842087"
    blocks = Keystream(key).bytes(16 * 300)
    assert all(blocks[16 * i : 16 * i + 16] == aes(key, i.to_bytes(16, "big")) for i in range(300))


def aes(key: bytes, block: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def test_the_stream_goes_on_where_it_stopped_and_never_repeats() -> None:
    stream, other = Keystream(bytes(32)), Keystream(bytes(32))
    pieces = b"".join(stream.bytes(n) for n in (1, 15, 16, 33, 1000))
    assert pieces == other.bytes(1065)
    blocks = [pieces[i : i + 16] for i in range(0, 1040, 16)]
    assert len(set(blocks)) == len(blocks)
    words = Keystream(bytes(32)).words(2)
    assert words.dtype == np.uint64 and words.tobytes() == Keystream(bytes(32)).bytes(16)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(bytes(length))


def test_hkdf_is_rfc_5869() -> None:
    """Test case 3 (no salt, no info), cut to 32 bytes."""
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert _hkdf(b"\x0b" * 22, b"").hex() == expected


def test_two_purposes_never_share_a_name() -> None:
    names = [Purpose(**(BASE | other)).info(with_head=True) for other in [{}, *OTHERS]]  # type: ignore[arg-type]
    assert len(set(names)) == len(names)


def test_the_systems_keys_are_fresh_even_for_the_same_purpose() -> None:
    entropy, purpose = SystemEntropy(), Purpose(**BASE)  # type: ignore[arg-type]
    keys = {entropy.key(purpose) for _ in range(100)}
    assert len(keys) == 100 and all(len(key) == 32 for key in keys)
    assert entropy.private


def test_a_rehearsals_keys_are_fixed_by_seed_site_and_purpose_and_only_there() -> None:
    def key(seed: int = 1, site: str = "a", **other: object) -> bytes:
        return SeededEntropy(seed=seed, site=site).key(Purpose(**(BASE | other)))  # type: ignore[arg-type]

    assert key() == key() and not SeededEntropy(seed=1, site="a").private
    different = [key(), key(seed=2), key(site="b"), *(key(**o) for o in OTHERS if "head" not in o)]
    assert len(set(different)) == len(different)
    assert key(head="zz") == key(), "a resumed rehearsal has another head and must draw the same noise"
    assert key(label="sampling") == key(label="sampling", site="b"), "a patient is sampled alike wherever"


def test_material_gives_other_bytes_for_other_labels() -> None:
    material = Material(bytes(32))
    assert material.bytes_for("x", 40) == material.bytes_for("x", 40)
    assert len({material.bytes_for(label, 32) for label in ("x", "y", "x/y", "")}) == 4
    assert Material(b"\x01" * 32).bytes_for("x", 32) != material.bytes_for("x", 32)


def identities(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def test_a_patients_draw_depends_on_key_and_identity_alone() -> None:
    some, key = identities(500), bytes(range(32))
    draws = patient_uniforms(key, some)
    order = np.random.default_rng(1).permutation(500)
    assert np.array_equal(patient_uniforms(key, some[order]), draws[order])
    assert np.array_equal(patient_uniforms(key, some[7:9]), draws[7:9])
    more = np.concatenate([identities(100, seed=2), some])
    assert np.array_equal(patient_uniforms(key, more)[100:], draws)
    assert not np.array_equal(patient_uniforms(bytes(32), some), draws)


def test_draws_are_uniform_and_independent_between_keys() -> None:
    """20,000 patients; KS and correlation. False alarm below 2e-7."""
    some = identities(20_000)
    one, other = (patient_uniforms(bytes([k]) * 32, some).astype(float) / 2.0**64 for k in (1, 2))
    assert stats.kstest(one, "uniform").pvalue > 1e-7
    assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(20_000)
    sequential = np.zeros((20_000, 16), np.uint8)
    sequential[:, :4] = np.arange(20_000, dtype="<u4").view(np.uint8).reshape(-1, 4)
    assert stats.kstest(patient_uniforms(bytes(32), sequential) / 2.0**64, "uniform").pvalue > 1e-7


@pytest.mark.parametrize("bad", [np.zeros(16, np.uint8), np.zeros((2, 15), np.uint8), np.zeros((2, 16), np.int64)])
def test_identities_of_another_shape_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="identity"):
        patient_uniforms(bytes(32), bad)


def test_nobody_draws_nothing() -> None:
    assert patient_uniforms(bytes(32), np.zeros((0, 16), np.uint8)).shape == (0,)

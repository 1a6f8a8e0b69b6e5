"""Shamir's secret sharing over a prime field (Shamir 1979, "How to share a secret").

A secret is the value at 0 of a random polynomial of degree t-1; party number i = 1, 2, ... holds its value
at i. Any t shares give the secret; t-1 shares fit every secret equally well. The shares carry no proof that
they lie on one polynomial: whoever reconstructs compares the secret with a commitment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cohortium.common.errors import ProtocolError

PRIME = 2**256 + 297  # the smallest prime above 2^256: every 32-byte string is an element
SHARE_BYTES = 33
DRAW_BYTES = 64  # for one coefficient; reduced mod PRIME: within 2^-255 of uniform


def split(
    secret: int, *, threshold: int, parties: Sequence[int], randomness: bytes, prime: int = PRIME
) -> dict[int, int]:
    """Shares {party: value} of a secret, 0 <= secret < prime; parties are distinct numbers in 1..prime-1.

    randomness: fresh uniform bytes, 64 for each of the threshold-1 coefficients. Raises SHARE-RANGE.
    """
    _check(parties, threshold, prime)
    if not 0 <= secret < prime:
        raise ProtocolError("SHARE-RANGE", "the secret is no element of the field")
    if len(randomness) != DRAW_BYTES * (threshold - 1):
        raise ProtocolError("SHARE-RANGE", "64 random bytes a coefficient, no more and no fewer")
    draws = [randomness[i : i + DRAW_BYTES] for i in range(0, len(randomness), DRAW_BYTES)]
    coefficients = [secret, *(int.from_bytes(draw, "big") % prime for draw in draws)]
    return {party: _horner(coefficients, party, prime) for party in parties}


def weights(parties: Sequence[int], *, prime: int = PRIME) -> dict[int, int]:
    """Lagrange weights at 0: secret = Σ weight_i · share_i over exactly these parties."""
    _check(parties, len(parties), prime)
    out = {}
    for i in parties:
        top, bottom = 1, 1
        for j in parties:
            if j != i:
                top = top * j % prime
                bottom = bottom * (j - i) % prime
        out[i] = top * pow(bottom, -1, prime) % prime
    return out


def combine(shares: Mapping[int, int], lagrange: Mapping[int, int], *, prime: int = PRIME) -> int:
    """The secret from the shares of exactly the parties that `lagrange` (see weights) was made for."""
    return sum(weight * shares[party] for party, weight in lagrange.items()) % prime


def _horner(coefficients: Sequence[int], x: int, prime: int) -> int:
    value, limit = 0, prime**4
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
        if value > limit:  # a party's number is small, so the costly remainder is not needed at every step
            value %= prime
    return value % prime


def _check(parties: Sequence[int], threshold: int, prime: int) -> None:
    if not 1 <= threshold <= len(parties):
        raise ProtocolError("SHARE-RANGE", "the threshold lies between 1 and the number of parties")
    if len(set(parties)) != len(parties) or not all(0 < party < prime for party in parties):
        # Party 0 would hold the secret itself; a party named twice would make a weight divide by zero.
        raise ProtocolError("SHARE-RANGE", "parties are distinct numbers from 1 on")

"""Shamir shares: any t give the secret, t-1 tell nothing; both by counting on a small field."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.shamir import DRAW_BYTES, PRIME, SHARE_BYTES, combine, split, weights


def _random(seed: object, threshold: int) -> bytes:
    return hashlib.shake_256(repr(seed).encode()).digest(DRAW_BYTES * (threshold - 1))


def _coefficients(values: tuple[int, ...]) -> bytes:
    return b"".join(v.to_bytes(DRAW_BYTES, "big") for v in values)


def test_the_prime_is_prime_and_the_smallest_above_2_256() -> None:
    def composite(n: int) -> bool:  # Miller-Rabin with the first 12 primes as witnesses
        d, s = n - 1, 0
        while d % 2 == 0:
            d, s = d // 2, s + 1
        for a in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            x = pow(a, d, n)
            if x in (1, n - 1):
                continue
            for _ in range(s - 1):
                x = x * x % n
                if x == n - 1:
                    break
            else:
                return True
        return False

    assert not composite(PRIME)
    assert all(composite(n) for n in range(2**256 + 1, PRIME, 2))
    assert (PRIME - 1).bit_length() <= 8 * SHARE_BYTES


@given(
    secret=st.integers(0, 2**256 - 1),
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_any_t_shares_give_the_secret(secret, n, seed, data) -> None:
    t = data.draw(st.integers(1, n))
    parties = data.draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n, unique=True))
    shares = split(secret, threshold=t, parties=parties, randomness=_random(seed, t))
    chosen = data.draw(st.permutations(parties))[:t]
    assert combine(shares, weights(chosen)) == secret


def test_every_polynomial_on_a_small_field_against_brute_force() -> None:
    """p = 7, t = 3, all 7·7·7 polynomials, all 3-subsets of 5 parties."""
    p, parties = 7, [1, 2, 3, 4, 5]
    for secret, a, b in product(range(p), repeat=3):
        shares = split(secret, threshold=3, parties=parties, randomness=_coefficients((a, b)), prime=p)
        assert shares == {x: (secret + a * x + b * x * x) % p for x in parties}
        for chosen in combinations(parties, 3):
            assert combine(shares, weights(chosen, prime=p), prime=p) == secret


@pytest.mark.parametrize("p,t", [(5, 2), (7, 3), (11, 3)])
def test_fewer_than_t_shares_fit_every_secret_equally_often(p, t) -> None:
    """Exact count: over all polynomials, what t-1 parties see is the same multiset for every secret."""
    parties = list(range(1, p))[:4]
    for seen in combinations(parties, t - 1):
        views = []
        for secret in range(p):
            count: Counter[tuple[int, ...]] = Counter()
            for rest in product(range(p), repeat=t - 1):
                shares = split(secret, threshold=t, parties=parties, randomness=_coefficients(rest), prime=p)
                count[tuple(shares[x] for x in seen)] += 1
            views.append(count)
        assert all(view == views[0] for view in views)
        assert set(views[0].values()) == {1}
    # The count has power: with t shares the views of two secrets do not meet at all.
    for seen in combinations(parties, t):
        a, b = (
            {
                tuple(
                    split(secret, threshold=t, parties=parties, randomness=_coefficients(rest), prime=p)[x]
                    for x in seen
                )
                for rest in product(range(p), repeat=t - 1)
            }
            for secret in (0, 1)
        )
        assert not a & b


def test_t_minus_one_shares_do_not_reconstruct() -> None:
    secret = 12345
    shares = split(secret, threshold=3, parties=[1, 2, 3, 4], randomness=_random("s", 3))
    assert combine(shares, weights([1, 2])) != secret


@pytest.mark.parametrize(
    "secret,threshold,parties",
    [(-1, 2, [1, 2]), (PRIME, 2, [1, 2]), (1, 0, [1, 2]), (1, 3, [1, 2]), (1, 2, [0, 1]), (1, 2, [1, 1])],
)
def test_what_cannot_be_shared_is_refused(secret, threshold, parties) -> None:
    with pytest.raises(ProtocolError, match="SHARE-RANGE"):
        split(secret, threshold=threshold, parties=parties, randomness=_random(0, max(threshold, 1)))


def test_short_randomness_is_refused() -> None:
    with pytest.raises(ProtocolError, match="SHARE-RANGE"):
        split(1, threshold=3, parties=[1, 2, 3], randomness=bytes(DRAW_BYTES))

"""What the server sees of one site is uniform noise, and no splitting of the sites gets around that.

The uniformity test: in each of 64 rounds a victim masks the same vector of 512 equal values, and the server
uses all that it can get hold of without breaking the rules. Each of the 8 bytes of what is left is compared
with the uniform distribution by chi-square (255 degrees of freedom, 32,768 draws), and so is the difference
between consecutive rounds (a reused mask would make it constant). Rejected below p = 1e-6 divided by the 16
tests: at most one false alarm in a million runs; the seeds are fixed, so there is none at all. The planted
weakenings show that the test has power.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import secure_sum, shamir
from cohortium.common.protocol.masks import add_keystream, add_pair_mask, self_key
from cohortium.common.protocol.round_messages import (
    VOTE_PURPOSE,
    RevealRequest,
    RoundParams,
    SurvivorSet,
    SurvivorVote,
)
from cohortium.common.protocol.signing import sign_statement

ROUNDS, DIM, FALSE_ALARM = 64, 512, 1e-6


def looks_uniform(view: np.ndarray) -> bool:
    """uint64 [rounds, dim]: neither a byte of it nor of its round-to-round difference stands out."""
    worst = 1.0
    for values in (view, view[1:] - view[:-1]):
        for byte in range(8):
            digits = (values.ravel() >> np.uint64(8 * byte)).astype(np.uint8)
            worst = min(worst, float(stats.chisquare(np.bincount(digits, minlength=256)).pvalue))
    return worst >= FALSE_ALARM / 16


def test_the_uniformity_test_keeps_its_false_alarm_rate_and_has_power() -> None:
    rng = np.random.default_rng(1)
    uniform = rng.integers(0, 2**64, (ROUNDS, DIM), dtype=np.uint64)
    assert looks_uniform(uniform)
    # A bias of a tenth in one bit of 64 is seen; so are 63-bit masks, and one mask used in all rounds.
    biased = uniform | (rng.random((ROUNDS, DIM)) < 0.1).astype(np.uint64)
    assert not looks_uniform(biased)
    assert not looks_uniform(uniform >> np.uint64(1))
    assert not looks_uniform(np.repeat(uniform[:1], ROUNDS, axis=0))
    # p-values of true uniforms are uniform: the stated rate is the rate.
    pvalues = [
        stats.chisquare(np.bincount(rng.integers(0, 256, ROUNDS * DIM), minlength=256)).pvalue for _ in range(200)
    ]
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def _view(consortium, labelled, knows: str, *, seed: object = "view") -> np.ndarray:
    """What is left of the victim's masked vector in the eyes of the server, for each round.

    knows "masked": the vector as it comes. "dropped": the victim was called dropped, its round key was
    reconstructed and all its pair masks removed. "survived": the seed was reconstructed and removed.
    """
    world = consortium(3)
    victim = world.names[1]
    out = np.zeros((ROUNDS, DIM), np.uint64)
    vector = np.full(DIM, 7, np.uint64)
    for number in range(ROUNDS):
        params = world.params(round=number, dim=DIM)
        sites = {s: world.site(params, s) for s in world.names}
        server = world.server(params)
        for s, site in sites.items():
            server.add_prepared(site.prepare(labelled((seed, s, number))))
        roster = server.roster()[victim]
        memory = sites[victim]._memory
        private = X25519PrivateKey.from_private_bytes(bytes.fromhex(memory.round_private))
        masked = sites[victim].mask(roster, vector)
        total = np.frombuffer(masked.values, "<u8").astype(np.uint64)
        bound = {"context": masked.context, "roster": masked.roster}
        if knows == "survived":
            key = self_key(bytes.fromhex(memory.seed), site=victim, **bound)
            secure_sum.add_keystream(total, key, subtract=True)
        if knows == "dropped":
            for peer in roster.announced:
                if peer.site != victim:
                    # The server adds what would cancel: the victim's masks once more with the other sign.
                    minus = np.zeros(DIM, np.uint64)
                    secure_sum.add_pair_mask(minus, private, peer.round_key, site=victim, peer=peer.site, **bound)
                    total -= minus
        out[number] = total
    return out


@pytest.mark.parametrize("knows", ["masked", "dropped", "survived"])
def test_the_view_of_one_site_is_uniform(knows, consortium, labelled) -> None:
    assert looks_uniform(_view(consortium, labelled, knows))


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _short(total: np.ndarray, key: bytes, *, subtract: bool = False) -> None:
    """A 32-bit mask in the 64-bit ring."""
    mask = np.zeros_like(total)
    add_keystream(mask, key)
    mask &= np.uint64(2**32 - 1)
    np.subtract(total, mask, out=total) if subtract else np.add(total, mask, out=total)


def _constant_key(seed: bytes, **bound: object) -> bytes:
    return bytes(32)


WEAKENINGS = {
    # name: (what the server knows, what is planted)
    "no mask at all": ("masked", {"add_keystream": _nothing, "add_pair_mask": _nothing}),
    "no self mask": ("dropped", {"add_keystream": _nothing}),
    "no pair masks": ("survived", {"add_pair_mask": _nothing}),
    "half of the bits": ("dropped", {"add_keystream": _short}),
    "one self mask for all rounds": ("dropped", {"self_key": _constant_key}),
}


@pytest.mark.parametrize("name", WEAKENINGS)
def test_a_planted_weakening_is_seen(name, consortium, labelled, monkeypatch) -> None:
    knows, patches = WEAKENINGS[name]
    for attribute, planted in patches.items():
        monkeypatch.setattr(secure_sum, attribute, planted)
    assert not looks_uniform(_view(consortium, labelled, knows))


def test_two_sites_that_mask_alike_cannot_be_told_from_two_that_do_not(consortium, labelled) -> None:
    """Only the sum shows: the differences between two victims' masked vectors are uniform as well."""
    world = consortium(3)
    out = np.zeros((ROUNDS, DIM), np.uint64)
    for number in range(ROUNDS):
        params = world.params(round=number, dim=DIM)
        sites = {s: world.site(params, s) for s in world.names}
        server = world.server(params)
        for s, site in sites.items():
            server.add_prepared(site.prepare(labelled(("pair", s, number))))
        rosters = server.roster()
        first, second = (
            np.frombuffer(sites[s].mask(rosters[s], np.zeros(DIM, np.uint64)).values, "<u8") for s in world.names[:2]
        )
        out[number] = first - second
    assert looks_uniform(out)


# ---- the attack that the threshold rule is there for ------------------------------------------------------


def _split_attack(consortium, labelled, t: int) -> np.ndarray | None:
    """Four honest sites mask; a server tells two of them that A, B stayed and two that C, D did.

    Returns A's bare vector if the server gets it, None if the sites refuse.
    """
    world = consortium(4)
    params = world.params(dim=16)
    if t != params.survivors:
        params = replace(params)
        # Only a test can make such a round: the constructor refuses it.
        object.__setattr__(params, "survivors", t)
    sites = {s: world.site(params, s) for s in world.names}
    server = world.server(params)
    vectors = world.vectors(params)
    for s, site in sites.items():
        server.add_prepared(site.prepare(labelled(s)))
    rosters = server.roster()
    masked = {s: sites[s].mask(rosters[s], vectors[s]) for s in world.names}
    a, b, c, d = world.names
    roster = masked[a].roster
    revealed = {}
    try:
        for half in ((a, b), (c, d)):
            chosen = SurvivorSet(context=params.digest(), roster=roster, survivors=half)
            votes = {s: sites[s].sign_survivors(chosen).signature for s in half}
            for s in half:
                revealed[s] = sites[s].reveal(RevealRequest(chosen=chosen, votes=votes))
    except ProtocolError as error:
        assert error.code == "SUM-TOO-FEW"
        return None
    numbers = {s: i for i, s in enumerate(world.names, 1)}

    def secret(helpers, kind: str) -> bytes:
        lagrange = shamir.weights([numbers[s] for s in helpers])
        shares = {numbers[s]: int.from_bytes(getattr(revealed[s], kind)[a], "big") for s in helpers}
        return shamir.combine(shares, lagrange).to_bytes(32, "big")

    total = np.frombuffer(masked[a].values, "<u8").astype(np.uint64)
    bound = {"context": params.digest(), "roster": roster}
    add_keystream(total, self_key(secret((a, b), "seed_shares"), site=a, **bound), subtract=True)
    private = X25519PrivateKey.from_private_bytes(secret((c, d), "key_shares"))
    minus = np.zeros(16, np.uint64)
    for peer in rosters[a].announced:
        if peer.site != a:
            add_pair_mask(minus, private, peer.round_key, site=a, peer=peer.site, **bound)
    total -= minus
    assert np.array_equal(total, vectors[a])
    return total


def test_a_server_that_splits_the_sites_gets_nothing(consortium, labelled) -> None:
    assert _split_attack(consortium, labelled, 3) is None


def test_without_the_threshold_rule_the_same_server_gets_a_bare_vector(consortium, labelled) -> None:
    """The attack is real: with t = n/2, which RoundParams refuses, it succeeds."""
    names = consortium(4).names
    with pytest.raises(ProtocolError, match="SUM-PARAMS"):
        RoundParams(run_id="r", round=1, sites=names, survivors=2, colluders=0, dim=16)
    assert _split_attack(consortium, labelled, 2) is not None


def test_colluders_that_sign_everything_do_not_help(consortium, labelled) -> None:
    """n = 5, c = 1, t = 4: the colluder votes for both sets; the four honest sites cannot be split."""
    world = consortium(5)
    params = world.params(c=1)
    assert params.survivors == 4
    sites = {s: world.site(params, s) for s in world.names}
    server = world.server(params)
    for s, site in sites.items():
        server.add_prepared(site.prepare(labelled(s)))
    rosters, vectors = server.roster(), world.vectors(params)
    masked = {s: sites[s].mask(rosters[s], vectors[s]) for s in world.names}
    bad, *honest = world.names
    roster = masked[bad].roster
    answered = 0
    for left in honest:  # every set of four that leaves one honest site out
        chosen = SurvivorSet(
            context=params.digest(), roster=roster, survivors=tuple(s for s in world.names if s != left)
        )
        draft = SurvivorVote(context=chosen.context, ballot=chosen.digest(), site=bad, signature=bytes(64))
        votes = {bad: sign_statement(world.identities[bad], VOTE_PURPOSE, draft.statement())}
        for s in chosen.survivors[1:]:
            try:
                votes[s] = sites[s].sign_survivors(chosen).signature
            except ProtocolError as error:
                assert error.code in ("SUM-SURVIVORS-TWICE", "SUM-PHASE")
        for s in chosen.survivors[1:]:
            try:
                sites[s].reveal(RevealRequest(chosen=chosen, votes=votes))
                answered += 1
            except ProtocolError as error:
                assert error.code in ("SUM-SURVIVORS-TWICE", "SUM-TOO-FEW", "SUM-PHASE")
    assert answered == 3  # the first set's three honest voters, and nobody else ever

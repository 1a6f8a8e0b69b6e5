"""The secure sum equals the plain sum of whoever stayed, or the round is void; across every interruption."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import messages
from cohortium.common.protocol.round_messages import (
    Masked,
    Prepared,
    Revealed,
    RevealRequest,
    Roster,
    RoundParams,
    SurvivorSet,
    SurvivorVote,
    minimum_survivors,
)
from cohortium.common.protocol.secure_sum import Phase


def _plain(vectors: dict[str, np.ndarray], names) -> np.ndarray:
    total = np.zeros_like(next(iter(vectors.values())))
    for name in names:
        total += vectors[name]
    return total


@pytest.mark.parametrize("n", range(2, 11))
def test_equals_the_plain_sum_for_every_number_of_sites(n, consortium, midway) -> None:
    world = consortium(n)
    round_ = midway(world, world.params(dim=33), "revealed")
    for revealed in round_.revealed.values():
        round_.server.add_revealed(revealed)
    assert np.array_equal(round_.server.sum(), _plain(round_.vectors, world.names))
    assert round_.server.sum() is round_.server.sum()


def test_equals_the_plain_sum_for_forty_sites_of_which_ten_drop_out(consortium, labelled) -> None:
    world = consortium(40)
    params = world.params(t=28, c=10, dim=20_000)
    server = world.server(params)
    sites = {s: world.site(params, s) for s in world.names}
    vectors = world.vectors(params)
    for name, site in sites.items():
        server.add_prepared(site.prepare(labelled(name)))
    rosters = server.roster()
    stay = world.names[5:35]
    for name in stay:
        server.add_masked(sites[name].mask(rosters[name], vectors[name]))
    chosen = server.survivors()
    for name in stay[2:]:
        server.add_vote(sites[name].sign_survivors(chosen))
    request = server.reveal_request()
    for name in stay[2:]:
        server.add_revealed(sites[name].reveal(request))
    assert np.array_equal(server.sum(), _plain(vectors, stay))


# ---- every way in which five sites can drop out ----------------------------------------------------------

STAYS, BEFORE_MASK, BEFORE_VOTE, BEFORE_REVEAL = range(4)


def test_all_drop_outs_of_five_sites_at_every_phase(consortium, midway) -> None:
    """All 4^5 fates. At least t at every phase: the exact sum of those who masked; else void, then."""
    world = consortium(5)
    params = world.params(t=3, dim=5)
    start = midway(world, params, "prepared")
    masked = {s: start.sites[s].mask(start.rosters[s], start.vectors[s]) for s in world.names}
    after_mask = {s: site.to_state() for s, site in start.sites.items()}
    votes: dict[tuple[str, tuple[str, ...]], tuple[SurvivorVote, bytes]] = {}
    finished = 0
    for fates in product(range(4), repeat=5):
        fate = dict(zip(world.names, fates))
        server = world.server(params)
        # The prepares were verified by `start`; verifying them 1,024 times more would only cost time.
        server._announced, server._roster, server._phase = (
            start.server._announced,
            start.server._roster,
            "mask",
        )
        here = [s for s in world.names if fate[s] != BEFORE_MASK]
        for s in here:
            server.add_masked(masked[s])
        if len(here) < 3:
            _void(server.survivors, server)
            continue
        chosen = server.survivors()
        voters = [s for s in here if fate[s] != BEFORE_VOTE]
        sites = {}
        for s in voters:
            key = (s, chosen.survivors)
            if key not in votes:
                site = world.restore(after_mask[s], s)
                votes[key] = site.sign_survivors(chosen), site.to_state()
            vote, state = votes[key]
            server.add_vote(vote)
            sites[s] = state
        if len(voters) < 3:
            _void(server.reveal_request, server)
            continue
        request = server.reveal_request()
        helpers = [s for s in voters if fate[s] != BEFORE_REVEAL]
        for s in helpers:
            server.add_revealed(world.restore(sites[s], s).reveal(request))
        if len(helpers) < 3:
            _void(server.sum, server)
            continue
        assert np.array_equal(server.sum(), _plain(start.vectors, here))
        finished += 1
    assert finished == 106  # Σ over survivors ⊇ voters ⊇ helpers with at least 3 of 5 each


@pytest.mark.parametrize("present", range(6))
def test_drop_outs_before_prepare(present, consortium, labelled) -> None:
    world = consortium(5)
    params = world.params(t=3)
    server, vectors = world.server(params), world.vectors(params)
    sites = {s: world.site(params, s) for s in world.names[:present]}
    for s, site in sites.items():
        server.add_prepared(site.prepare(labelled(s)))
    assert server.waiting_for() == world.names[present:]
    if present < 3:
        _void(server.roster, server)
        return
    rosters = server.roster()
    assert set(rosters) == set(sites)
    for s, site in sites.items():
        server.add_masked(site.mask(rosters[s], vectors[s]))
    chosen = server.survivors()
    for site in sites.values():
        server.add_vote(site.sign_survivors(chosen))
    request = server.reveal_request()
    for site in sites.values():
        server.add_revealed(site.reveal(request))
    assert np.array_equal(server.sum(), _plain(vectors, sites))
    assert server.survivor_names == tuple(sites)


def test_a_site_that_never_opened_a_channel_is_left_out(consortium, labelled) -> None:
    world = consortium(5, mute=("site-002",))
    params = world.params(t=3)
    server, vectors = world.server(params), world.vectors(params)
    with pytest.raises(ProtocolError, match="SUM-KEY"):
        world.site(params, "site-002")
    here = [s for s in world.names if s != "site-002"]
    sites = {s: world.site(params, s) for s in here}
    for s in here:
        server.add_prepared(sites[s].prepare(labelled(s)))
    rosters = server.roster()
    for s in here[:3]:
        server.add_masked(sites[s].mask(rosters[s], vectors[s]))
    chosen = server.survivors()
    for s in here[:3]:
        server.add_vote(sites[s].sign_survivors(chosen))
    request = server.reveal_request()
    for s in here[:3]:
        server.add_revealed(sites[s].reveal(request))
    assert np.array_equal(server.sum(), _plain(vectors, here[:3]))


def _void(step, server) -> None:
    with pytest.raises(ProtocolError) as caught:
        step()
    assert caught.value.code == "SUM-TOO-FEW"
    assert server.void
    assert server.waiting_for() == ()
    for again in (server.roster, server.survivors, server.reveal_request, server.sum):
        with pytest.raises(ProtocolError, match="SUM-VOID"):
            again()


# ---- parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 99, 100])
def test_the_threshold_rule_at_its_edge(n, consortium) -> None:
    names = tuple(f"s{i:03d}" for i in range(n))
    for c in range(n):
        t = minimum_survivors(n, c)
        assert 2 * t > n + c >= 2 * (t - 1)
        for survivors in (t - 1, t):
            make = lambda t=survivors, c=c: RoundParams(  # noqa: E731
                run_id="r", round=1, sites=names, survivors=t, colluders=c, dim=1
            )
            if survivors == t and t <= n:
                make()
            else:
                with pytest.raises(ProtocolError, match="SUM-PARAMS"):
                    make()


@pytest.mark.parametrize(
    "change",
    [
        {"sites": ("a",)},
        {"sites": ("b", "a", "c")},
        {"sites": ("a", "a", "b")},
        {"sites": ("", "a", "b")},
        {"sites": tuple(f"{i:03d}" for i in range(101)), "survivors": 60},
        {"run_id": ""},
        {"round": -1},
        {"dim": 0},
        {"dim": 2**24 + 1},
        {"survivors": 4},
        {"survivors": True},
        {"survivors": 2.0},
        {"colluders": -1},
        {"colluders": 3, "survivors": 3},
    ],
)
def test_bad_parameters_are_refused(change) -> None:
    good = {
        "run_id": "r",
        "round": 0,
        "sites": ("a", "b", "c"),
        "survivors": 2,
        "colluders": 0,
        "dim": 1,
    }
    RoundParams(**good)
    with pytest.raises(ProtocolError, match="SUM-PARAMS"):
        RoundParams(**{**good, **change})


def test_every_parameter_changes_the_context() -> None:
    good = {
        "run_id": "r",
        "round": 1,
        "sites": ("a", "b", "c", "d"),
        "survivors": 3,
        "colluders": 0,
        "dim": 9,
    }
    others = [
        {"run_id": "s"},
        {"round": 2},
        {"sites": ("a", "b", "c", "e")},
        {"survivors": 4},
        {"colluders": 1},
        {"dim": 8},
    ]
    assert len({RoundParams(**{**good, **o}).digest() for o in ({}, *others)}) == 7


# ---- interruptions ----------------------------------------------------------------------------------------


def test_every_phase_survives_a_new_process_and_a_repeated_request(consortium, labelled) -> None:
    """Each site is rebuilt from its bytes before and after every message, and asked everything twice."""
    world = consortium(4)
    params = world.params(dim=17)
    server, vectors = world.server(params), world.vectors(params)
    sites = {s: world.site(params, s) for s in world.names}
    seen = set()

    def twice(name, ask):
        sites[name] = world.again(sites[name])
        first = ask(sites[name])
        sites[name] = world.again(sites[name])
        phase, state = sites[name].phase, sites[name].to_state()
        second = ask(sites[name])
        assert _bytes(first) == _bytes(second)
        assert (sites[name].phase, sites[name].to_state()) == (phase, state)
        seen.add(phase)
        return second

    seen |= {site.phase for site in sites.values()}
    for s in world.names:
        server.add_prepared(twice(s, lambda site, s=s: site.prepare(labelled(s))))
    rosters = server.roster()
    for s in world.names[:3]:
        server.add_masked(twice(s, lambda site, s=s: site.mask(rosters[s], vectors[s])))
    chosen = server.survivors()
    for s in world.names[:3]:
        server.add_vote(twice(s, lambda site: site.sign_survivors(chosen)))
    request = server.reveal_request()
    for s in world.names[:3]:
        server.add_revealed(twice(s, lambda site: site.reveal(request)))
    assert np.array_equal(server.sum(), _plain(vectors, world.names[:3]))
    assert seen == set(Phase)


def test_secrets_are_erased_as_soon_as_they_are_not_needed(consortium, midway) -> None:
    world = consortium(4)
    round_ = midway(world, world.params(), "masked")
    name = world.names[0]
    site = round_.sites[name]
    private, seed = site._memory.round_private, site._memory.seed
    shares = [*site._memory.seed_shares.values(), *site._memory.key_shares.values()]
    assert private.encode() in site.to_state() and seed.encode() in site.to_state()
    assert len(shares) == 4 + 3  # a site keeps no share of its own key
    vote = site.sign_survivors(round_.chosen)
    assert private.encode() not in site.to_state() and seed.encode() not in site.to_state()
    votes = {s: round_.sites[s].sign_survivors(round_.chosen).signature for s in world.names[1:]}
    request = RevealRequest(chosen=round_.chosen, votes={**votes, name: vote.signature})
    revealed = site.reveal(request)
    left = [s for s in shares if s.encode() in site.to_state()]
    assert sorted(left) == sorted(s.hex() for s in revealed.seed_shares.values())


def test_a_damaged_state_is_refused(consortium, midway) -> None:
    world = consortium(3)
    name = world.names[0]
    state = midway(world, world.params(), "masked").sites[name].to_state()
    assert world.restore(state, name).phase is Phase.MASKED
    for bad in (b"", b"{}", state[:-1], state + b" ", state.replace(b"masked", b"mbsked"), state[65:]):
        with pytest.raises(ProtocolError, match="SUM-STATE"):
            world.restore(bad, name)
    with pytest.raises(ProtocolError, match="SUM-KEY"):
        world.restore(state, world.names[1])


def test_the_vector_is_left_as_it_is(consortium, midway) -> None:
    world = consortium(3)
    round_ = midway(world, world.params(), "prepared")
    name = world.names[0]
    vector = round_.vectors[name]
    vector.flags.writeable = False
    before = vector.copy()
    round_.sites[name].mask(round_.rosters[name], vector)
    assert np.array_equal(vector, before)


# ---- messages ---------------------------------------------------------------------------------------------


def test_every_message_round_trips_through_an_envelope(consortium, midway) -> None:
    world = consortium(4)
    round_ = midway(world, world.params(), "revealed")
    name = world.names[1]
    key = world.identities[name]
    for message, kind in (
        (round_.prepared[name], Prepared),
        (round_.masked[name], Masked),
        (round_.votes[name], SurvivorVote),
        (round_.revealed[name], Revealed),
    ):
        envelope = messages.seal(message.to_message(), key)
        assert kind.from_message(messages.unseal(envelope, key.public_key(), sender=name)) == message
    for message, kind in (
        (round_.rosters[name], Roster),
        (round_.chosen, SurvivorSet),
        (round_.request, RevealRequest),
    ):
        envelope = messages.seal(message.to_message(sender="coordinator"), key)
        read = kind.from_message(messages.unseal(envelope, key.public_key(), sender="coordinator"))
        assert read == message and read.digest() == message.digest()


def _bytes(message) -> bytes:
    return messages._body(message.to_message())


def test_messages_hold_no_secret(consortium, midway) -> None:
    """Before the reveal nothing that leaves a site holds its key, its seed, its vector or an open share."""
    world = consortium(4)
    round_ = midway(world, world.params(), "masked")
    for name, site in round_.sites.items():
        memory = site._memory
        secrets = [memory.round_private, memory.seed, *memory.seed_shares.values()]
        secrets += [*memory.key_shares.values(), round_.vectors[name].tobytes().hex()]
        site.sign_survivors(round_.chosen)
        sent = [round_.prepared[name], round_.masked[name], site.sign_survivors(round_.chosen)]
        for message in sent:
            wire = _bytes(message)
            for secret in secrets:
                assert secret.encode() not in wire and bytes.fromhex(secret) not in wire

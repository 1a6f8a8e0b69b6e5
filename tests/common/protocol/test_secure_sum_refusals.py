"""Tampered, replayed, reordered, re-keyed: each is refused by its code and changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import messages, secure_sum, shamir
from cohortium.common.protocol.channels import ChannelKey, ChannelKeys
from cohortium.common.protocol.masks import add_keystream, add_pair_mask, self_key
from cohortium.common.protocol.round_messages import (
    PREPARE_PURPOSE,
    VOTE_PURPOSE,
    Announced,
    Masked,
    Prepared,
    Revealed,
    RevealRequest,
    Roster,
    RoundParams,
    SurvivorSet,
    SurvivorVote,
    roster_digest,
)
from cohortium.common.protocol.signing import sign_statement

A, B, C, D, E = (f"site-{i:03d}" for i in range(5))


class Stage:
    """Five sites, t = 4, c = 1: this round at a phase, and the whole of the round before for replays."""

    def __init__(self, consortium, midway, phase: str) -> None:
        self.world = consortium(5)
        self.params = self.world.params(round=2, c=1)
        self.now = midway(self.world, self.params, phase, seed="now")
        self.before = midway(self.world, self.world.params(round=1, c=1), "revealed", seed="before")
        self.me = self.now.sites[A]

    def announce(self, site: str, round_key: bytes, context: str | None = None) -> Announced:
        """A prepare that `site` really signs, with a round key of its choice."""
        draft = Announced(site=site, round_key=round_key, seed_commitment=bytes(32), signature=bytes(64))
        statement = draft.statement(context or self.params.digest())
        return replace(draft, signature=sign_statement(self.world.identities[site], PREPARE_PURPOSE, statement))

    def roster(self, *announced: Announced, **change: object) -> Roster:
        """My roster with these prepares in place of the sites' own."""
        new = {a.site: a for a in announced}
        mine = self.now.rosters[A]
        return replace(mine, announced=tuple(new.get(a.site, a) for a in mine.announced), **change)

    def vote(self, site: str, chosen: SurvivorSet) -> bytes:
        draft = SurvivorVote(context=chosen.context, ballot=chosen.digest(), site=site, signature=bytes(64))
        return sign_statement(self.world.identities[site], VOTE_PURPOSE, draft.statement())


def refused(code: str, state, act) -> None:
    """act() is refused with this code; whatever state() shows is as before."""
    before = state()
    with pytest.raises(ProtocolError) as caught:
        act()
    assert caught.value.code == code, caught.value
    assert state() == before


# ---- what a site refuses ----------------------------------------------------------------------------------


def _subset(roster: Roster, names: set[str]) -> Roster:
    return Roster(
        context=roster.context,
        announced=tuple(a for a in roster.announced if a.site in names),
        sealed={s: blob for s, blob in roster.sealed.items() if s in names},
        question=roster.question,
    )


def _swapped(sealed, a: str, b: str):
    return {**sealed, a: sealed[b], b: sealed[a]}


ROSTERS = {
    "replayed whole": ("SUM-CONTEXT", lambda s: s.before.rosters[A]),
    "replayed, with this round's context": (
        "SUM-ROSTER",
        lambda s: replace(s.before.rosters[A], context=s.params.digest()),
    ),
    "one prepare replayed": (
        "SUM-SIGNATURE",
        lambda s: s.roster(s.before.prepared[B].announced),
    ),
    "one prepare re-keyed": (
        "SUM-SIGNATURE",
        lambda s: s.roster(replace(s.now.prepared[B].announced, round_key=bytes([9]) * 32)),
    ),
    "one commitment tampered": (
        "SUM-SIGNATURE",
        lambda s: s.roster(replace(s.now.prepared[B].announced, seed_commitment=bytes(32))),
    ),
    "one prepare under another's name": (
        "SUM-SIGNATURE",
        lambda s: s.roster(replace(s.now.prepared[C].announced, site=B)),
    ),
    "a prepare signed for another run's context": (
        "SUM-SIGNATURE",
        lambda s: s.roster(s.announce(B, bytes([9]) * 32, context="00" * 32)),
    ),
    "my own prepare re-keyed, with my valid signature": (
        "SUM-ROSTER",
        lambda s: s.roster(s.announce(A, bytes([9]) * 32)),
    ),
    "without me": ("SUM-ROSTER", lambda s: _subset(s.now.rosters[A], {B, C, D, E})),
    "reordered": (
        "SUM-ROSTER",
        lambda s: s.roster() and replace(s.roster(), announced=s.roster().announced[::-1]),
    ),
    "one twice": (
        "SUM-ROSTER",
        lambda s: replace(s.roster(), announced=(s.roster().announced[0], *s.roster().announced)),
    ),
    "a stranger": (
        "SUM-ROSTER",
        lambda s: replace(
            s.roster(),
            announced=(*s.roster().announced, replace(s.roster().announced[0], site="zzz")),
        ),
    ),
    "too few": ("SUM-TOO-FEW", lambda s: _subset(s.now.rosters[A], {A, B, C})),
    "a peer copies my round key": (
        "SUM-KEY",
        lambda s: s.roster(s.announce(B, s.now.prepared[A].announced.round_key)),
    ),
    "a peer announces a point of small order": (
        "SUM-SEAL",  # its shares are bound to the round key it announced before
        lambda s: s.roster(s.announce(B, bytes(32))),
    ),
    "shares swapped between peers": (
        "SUM-SEAL",
        lambda s: s.roster(sealed=_swapped(s.now.rosters[A].sealed, B, C)),
    ),
    "shares meant for another": (
        "SUM-SEAL",
        lambda s: s.roster(sealed={**s.now.rosters[A].sealed, B: s.now.rosters[C].sealed[B]}),
    ),
    "shares of the round before": (
        "SUM-SEAL",
        lambda s: s.roster(sealed={**s.now.rosters[A].sealed, B: s.before.rosters[A].sealed[B]}),
    ),
    "shares missing": (
        "SUM-SEAL",
        lambda s: s.roster(sealed={p: b for p, b in s.now.rosters[A].sealed.items() if p != B}),
    ),
    "shares too many": (
        "SUM-SEAL",
        lambda s: s.roster(sealed={**s.now.rosters[A].sealed, A: s.now.rosters[A].sealed[B]}),
    ),
}


@pytest.mark.parametrize("name", ROSTERS)
def test_a_site_refuses_the_roster(name, consortium, midway) -> None:
    code, make = ROSTERS[name]
    stage = Stage(consortium, midway, "prepared")
    refused(code, stage.me.to_state, lambda: stage.me.mask(make(stage), stage.now.vectors[A]))
    # Nothing was used up: the true roster is still answered.
    stage.me.mask(stage.now.rosters[A], stage.now.vectors[A])


def test_a_round_key_of_small_order_is_refused_even_with_fitting_shares(consortium, labelled) -> None:
    """A site whose round key is a zero point would share a mask that everybody knows."""
    world = consortium(3)
    params = world.params()
    sites = {s: world.site(params, s) for s in world.names}
    server = world.server(params)
    for s, site in sites.items():
        prepared = site.prepare(labelled(s))
        if s == B:
            draft = replace(prepared.announced, round_key=bytes(32))
            signature = sign_statement(world.identities[B], PREPARE_PURPOSE, draft.statement(params.digest()))
            sealed = {
                peer: secure_sum.seal_shares(
                    (bytes(33), bytes(33)),
                    private=world.channels[B],
                    public=world.directory.channels[peer],
                    context=params.digest(),
                    round_key=bytes(32),
                    sender=B,
                    receiver=peer,
                )
                for peer in prepared.sealed
            }
            prepared = replace(prepared, announced=replace(draft, signature=signature), sealed=sealed)
        server.add_prepared(prepared)
    roster = server.roster()[A]
    vector = world.vectors(params)[A]
    refused("SUM-KEY", sites[A].to_state, lambda: sites[A].mask(roster, vector))


def test_a_site_masks_once(consortium, midway) -> None:
    stage = Stage(consortium, midway, "masked")
    me, vector = stage.me, stage.now.vectors[A]
    fewer = _subset(stage.now.rosters[A], {A, B, C, D})
    refused("SUM-ROSTER-TWICE", me.to_state, lambda: me.mask(fewer, vector))
    other = vector.copy()
    other[0] += np.uint64(1)
    refused("SUM-MASK-TWICE", me.to_state, lambda: me.mask(stage.now.rosters[A], other))


@pytest.mark.parametrize("vector", [np.zeros(7, np.uint64), np.zeros(8, np.int64), np.zeros((2, 4), np.uint64)])
def test_a_site_masks_only_a_vector_of_the_plan(vector, consortium, midway) -> None:
    stage = Stage(consortium, midway, "prepared")
    refused("SUM-VECTOR", stage.me.to_state, lambda: stage.me.mask(stage.now.rosters[A], vector))


SETS = {
    "replayed": ("SUM-CONTEXT", lambda s: s.before.chosen),
    "of another roster": ("SUM-ROSTER-TWICE", lambda s: replace(s.now.chosen, roster="00" * 32)),
    "without me": ("SUM-SURVIVORS", lambda s: replace(s.now.chosen, survivors=(B, C, D, E))),
    "reordered": ("SUM-SURVIVORS", lambda s: replace(s.now.chosen, survivors=(B, A, C, D))),
    "one twice": ("SUM-SURVIVORS", lambda s: replace(s.now.chosen, survivors=(A, A, B, C, D))),
    "a stranger": ("SUM-SURVIVORS", lambda s: replace(s.now.chosen, survivors=(A, B, C, D, "zzz"))),
    "too few": ("SUM-TOO-FEW", lambda s: replace(s.now.chosen, survivors=(A, B, C))),
}


@pytest.mark.parametrize("name", SETS)
def test_a_site_refuses_the_survivor_set(name, consortium, midway) -> None:
    code, make = SETS[name]
    stage = Stage(consortium, midway, "masked")
    refused(code, stage.me.to_state, lambda: stage.me.sign_survivors(make(stage)))
    stage.me.sign_survivors(stage.now.chosen)


def test_a_site_signs_one_survivor_set(consortium, midway) -> None:
    stage = Stage(consortium, midway, "voted")
    other = replace(stage.now.chosen, survivors=(A, B, C, D))
    refused("SUM-SURVIVORS-TWICE", stage.me.to_state, lambda: stage.me.sign_survivors(other))
    votes = {s: stage.vote(s, other) for s in (A, B, C, D)}
    request = RevealRequest(chosen=other, votes=votes)
    refused("SUM-SURVIVORS-TWICE", stage.me.to_state, lambda: stage.me.reveal(request))


def _votes(stage: Stage, **change: bytes) -> RevealRequest:
    return replace(stage.now.request, votes={**stage.now.request.votes, **change})


def _only(stage: Stage, *names: str) -> RevealRequest:
    return replace(stage.now.request, votes={s: stage.now.request.votes[s] for s in names})


REQUESTS = {
    "replayed": ("SUM-CONTEXT", lambda s: s.before.request),
    "too few signatures": ("SUM-TOO-FEW", lambda s: _only(s, A, B, C)),
    "no signatures": ("SUM-TOO-FEW", lambda s: _only(s)),
    "a signature of the round before": (
        "SUM-SIGNATURE",
        lambda s: _votes(s, **{B: s.before.votes[B].signature}),
    ),
    "a signature under another set": (
        "SUM-SIGNATURE",
        lambda s: _votes(s, **{B: s.vote(B, replace(s.now.chosen, survivors=(A, B, C, D)))}),
    ),
    "one site's signature for two": (
        "SUM-SIGNATURE",
        lambda s: _votes(s, **{B: s.now.votes[C].signature}),
    ),
    "a signature of zeros": ("SUM-SIGNATURE", lambda s: _votes(s, **{B: bytes(64)})),
    "a stranger's signature": ("SUM-SENDER", lambda s: _votes(s, zzz=bytes(64))),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_site_refuses_to_reveal(name, consortium, midway) -> None:
    code, make = REQUESTS[name]
    stage = Stage(consortium, midway, "voted")
    refused(code, stage.me.to_state, lambda: stage.me.reveal(make(stage)))
    stage.me.reveal(stage.now.request)


def test_a_dropped_site_cannot_vote(consortium, midway, labelled) -> None:
    stage = Stage(consortium, midway, "prepared")
    now, server = stage.now, stage.now.server
    for s in (A, B, C, D):
        server.add_masked(now.sites[s].mask(now.rosters[s], now.vectors[s]))
    chosen = server.survivors()
    votes = {s: now.sites[s].sign_survivors(chosen).signature for s in (A, B, C, D)}
    votes[E] = stage.vote(E, chosen)
    request = RevealRequest(chosen=chosen, votes=votes)
    refused("SUM-SENDER", stage.me.to_state, lambda: stage.me.reveal(request))


def test_a_site_reveals_once_and_one_share_of_each(consortium, midway) -> None:
    """First with E gone; afterwards no request, however well signed, gets the other share of anybody."""
    stage = Stage(consortium, midway, "prepared")
    now, server = stage.now, stage.now.server
    for s in (A, B, C, D):
        server.add_masked(now.sites[s].mask(now.rosters[s], now.vectors[s]))
    now.sites[E].mask(now.rosters[E], now.vectors[E])
    chosen = server.survivors()
    votes = {s: now.sites[s].sign_survivors(chosen).signature for s in (A, B, C, D)}
    request = RevealRequest(chosen=chosen, votes=votes)
    first = stage.me.reveal(request)
    assert set(first.seed_shares) == {A, B, C, D} and set(first.key_shares) == {E}
    assert stage.me.reveal(request) == first

    everyone = replace(chosen, survivors=(A, B, C, D, E))
    full = RevealRequest(chosen=everyone, votes={s: stage.vote(s, everyone) for s in (A, B, C, D, E)})
    refused("SUM-SURVIVORS-TWICE", stage.me.to_state, lambda: stage.me.reveal(full))
    other = RevealRequest(chosen=chosen, votes={**votes, B: bytes(64)})
    refused("SUM-REVEAL-TWICE", stage.me.to_state, lambda: stage.me.reveal(other))
    assert not stage.me._memory.seed_shares and not stage.me._memory.key_shares


CALLS = {
    "prepare": lambda s, labelled: s.me.prepare(labelled(0)),
    "mask": lambda s, labelled: s.me.mask(s.now.rosters[A], s.now.vectors[A]),
    "sign": lambda s, labelled: s.me.sign_survivors(s.now.chosen),
    "reveal": lambda s, labelled: s.me.reveal(s.now.request),
}
ALLOWED = {
    "prepared": {"prepare", "mask"},
    "masked": {"mask", "sign"},
    "voted": {"sign", "reveal"},
    "revealed": {"reveal"},
}


@pytest.mark.parametrize("phase", ALLOWED)
def test_a_site_refuses_messages_out_of_order(phase, consortium, midway, labelled) -> None:
    stage = Stage(consortium, midway, "revealed")  # all messages exist; then my site goes back to `phase`
    full = stage.now
    stage.me = midway(stage.world, stage.params, phase, seed="now").sites[A]
    for name, call in CALLS.items():
        stage.now = full
        if name in ALLOWED[phase]:
            call(stage, labelled)
            stage.me = midway(stage.world, stage.params, phase, seed="now").sites[A]
        else:
            refused("SUM-PHASE", stage.me.to_state, lambda call=call: call(stage, labelled))


def test_a_new_site_answers_a_prepare_only(consortium, midway, labelled) -> None:
    stage = Stage(consortium, midway, "revealed")
    stage.me = stage.world.site(stage.params, A)
    for name in ("mask", "sign", "reveal"):
        refused("SUM-PHASE", stage.me.to_state, lambda name=name: CALLS[name](stage, labelled))


def test_too_few_channel_keys_stop_a_prepare(consortium, labelled) -> None:
    world = consortium(5, mute=(C, D, E))
    site = world.site(world.params(), A)
    refused("SUM-TOO-FEW", site.to_state, lambda: site.prepare(labelled(0)))


def test_a_round_needs_its_own_run_and_known_sites(consortium, midway) -> None:
    world, other = consortium(5), consortium(5, run_id="run-2")
    three = consortium(3)
    nothing = lambda: None  # noqa: E731
    refused("SUM-CONTEXT", nothing, lambda: other.site(world.params(), A))
    refused("SUM-CONTEXT", nothing, lambda: other.server(world.params()))
    refused("SUM-SENDER", nothing, lambda: three.site(world.params(), A))
    refused("SUM-SENDER", nothing, lambda: three.server(world.params()))
    refused(
        "SUM-PARAMS",
        nothing,
        lambda: secure_sum.SiteRound(
            params=three.params(),
            site=E,
            identity=world.identities[E],
            channel=world.channels[E],
            directory=world.directory,
        ),
    )
    refused(
        "SUM-KEY",
        nothing,
        lambda: secure_sum.SiteRound(
            params=world.params(),
            site=A,
            identity=world.identities[B],
            channel=world.channels[A],
            directory=world.directory,
        ),
    )


# ---- what the server refuses ------------------------------------------------------------------------------


def _seen(server) -> object:
    slots = [getattr(server, name) for name in server.__slots__ if name not in ("_directory", "_total")]
    return repr(slots), server._total.tobytes()


def test_the_server_refuses_prepares(consortium, midway) -> None:
    stage = Stage(consortium, midway, "prepared")
    server, own = stage.world.server(stage.params), stage.now.prepared
    short = {p: b for p, b in own[B].sealed.items() if p != C}
    for code, prepared in (
        ("SUM-CONTEXT", stage.before.prepared[B]),
        ("SUM-SIGNATURE", replace(stage.before.prepared[B], context=own[B].context)),
        ("SUM-SIGNATURE", replace(own[B], announced=replace(own[C].announced, site=B))),
        ("SUM-SENDER", replace(own[B], announced=replace(own[B].announced, site="zzz"))),
        ("SUM-SEAL", replace(own[B], sealed=short)),
        ("SUM-SEAL", replace(own[B], sealed={**own[B].sealed, B: bytes(82)})),
    ):
        refused(code, lambda: _seen(server), lambda p=prepared: server.add_prepared(p))
    server.add_prepared(own[B])
    refused("SUM-DUPLICATE", lambda: _seen(server), lambda: server.add_prepared(own[B]))


def test_the_server_refuses_masked_vectors(consortium, midway) -> None:
    stage = Stage(consortium, midway, "prepared")
    now, server = stage.now, stage.now.server
    good = now.sites[A].mask(now.rosters[A], now.vectors[A])
    for code, masked in (
        ("SUM-CONTEXT", stage.before.masked[A]),
        ("SUM-ROSTER", replace(stage.before.masked[A], context=good.context)),
        ("SUM-ROSTER", replace(good, roster="00" * 32)),
        ("SUM-VECTOR", replace(good, values=good.values[:-8])),
        ("SUM-VECTOR", replace(good, values=good.values + bytes(8))),
        ("SUM-SENDER", replace(good, site="zzz")),
    ):
        refused(code, lambda: _seen(server), lambda m=masked: server.add_masked(m))
    server.add_masked(good)
    refused("SUM-DUPLICATE", lambda: _seen(server), lambda: server.add_masked(good))


def test_a_masked_vector_cannot_be_forged_in_transit(consortium, midway) -> None:
    """Masked and Revealed carry no signature of their own: their envelope does."""
    stage = Stage(consortium, midway, "masked")
    keys = stage.world.publics
    envelope = messages.seal(stage.now.masked[A].to_message(), stage.world.identities[A])
    bent = bytearray(envelope)
    bent[-100] ^= 1
    for code, data, key, sender in (
        ("MSG-SIGNATURE", bytes(bent), keys[A], A),
        ("MSG-SIGNATURE", envelope, keys[B], B),
        ("MSG-SENDER", envelope, keys[A], B),
    ):
        with pytest.raises(ProtocolError) as caught:
            messages.unseal(data, key, sender=sender)
        assert caught.value.code == code


def test_the_server_refuses_votes(consortium, midway) -> None:
    stage = Stage(consortium, midway, "masked")
    now, server = stage.now, stage.now.server
    good = now.sites[A].sign_survivors(now.chosen)
    for code, vote in (
        ("SUM-CONTEXT", stage.before.votes[A]),
        ("SUM-SURVIVORS", replace(stage.before.votes[A], context=good.context)),
        ("SUM-SIGNATURE", replace(good, site=B)),
        ("SUM-SIGNATURE", replace(good, signature=stage.before.votes[A].signature)),
        ("SUM-SENDER", replace(good, site="zzz")),
    ):
        refused(code, lambda: _seen(server), lambda v=vote: server.add_vote(v))
    server.add_vote(good)
    refused("SUM-DUPLICATE", lambda: _seen(server), lambda: server.add_vote(good))


def test_the_server_refuses_shares(consortium, midway) -> None:
    stage = Stage(consortium, midway, "voted")
    now, server = stage.now, stage.now.server
    good = now.sites[A].reveal(now.request)
    large = (shamir.PRIME).to_bytes(33, "big")
    fewer = {p: s for p, s in good.seed_shares.items() if p != B}
    for code, revealed in (
        ("SUM-SURVIVORS", replace(good, ballot="00" * 32)),
        ("SUM-SHARE", replace(good, seed_shares=fewer)),
        ("SUM-SHARE", replace(good, seed_shares=fewer, key_shares={B: bytes(33)})),
        ("SUM-SHARE", replace(good, seed_shares={**good.seed_shares, B: large})),
        ("SUM-SENDER", replace(good, site="zzz")),
        ("SUM-CONTEXT", replace(good, context=stage.before.params.digest())),
    ):
        refused(code, lambda: _seen(server), lambda r=revealed: server.add_revealed(r))
    server.add_revealed(good)
    refused("SUM-DUPLICATE", lambda: _seen(server), lambda: server.add_revealed(good))


@pytest.mark.parametrize("gone", [False, True])
def test_wrong_shares_make_the_round_void_instead_of_a_wrong_sum(gone, consortium, midway) -> None:
    """A lying helper: its share of a survivor's seed, or of a dropped site's key, is off by one."""
    stage = Stage(consortium, midway, "prepared")
    now, server = stage.now, stage.now.server
    here = (A, B, C, D) if gone else (A, B, C, D, E)
    for s in here:
        server.add_masked(now.sites[s].mask(now.rosters[s], now.vectors[s]))
    chosen = server.survivors()
    for s in here:
        server.add_vote(now.sites[s].sign_survivors(chosen))
    request = server.reveal_request()
    for s in here:
        revealed = now.sites[s].reveal(request)
        if s == B:
            which = "key_shares" if gone else "seed_shares"
            shares = dict(getattr(revealed, which))
            shares[E] = (int.from_bytes(shares[E], "big") ^ 1).to_bytes(33, "big")
            revealed = replace(revealed, **{which: shares})
        server.add_revealed(revealed)
    with pytest.raises(ProtocolError) as caught:
        server.sum()
    assert caught.value.code == "SUM-SHARE" and E in caught.value.sentence
    assert server.void


@pytest.mark.parametrize("equivocate", [True, False])
def test_an_equivocating_roster_gives_neither_a_sum_nor_shares(equivocate, consortium, midway) -> None:
    """Two sites are told of A..E, the others of A..D. Their masks do not cancel and their votes do not meet.

    The server here even knows every seed, and the key of the absent E; with one roster for all that gives the
    sum (so the attack is a real one), with two it gives nothing.
    """
    stage = Stage(consortium, midway, "prepared")
    now, here = stage.now, (A, B, C, D)
    told = {s: _subset(now.rosters[s], set(here)) if equivocate and s in (C, D) else now.rosters[s] for s in here}
    masked = {s: now.sites[s].mask(told[s], now.vectors[s]) for s in here}
    total = np.zeros(stage.params.dim, np.uint64)
    gone = X25519PrivateKey.from_private_bytes(bytes.fromhex(now.sites[E]._memory.round_private))
    for s, m in masked.items():
        total += np.frombuffer(m.values, "<u8")
        bound = {"context": m.context, "roster": m.roster}
        seed = bytes.fromhex(now.sites[s]._memory.seed)
        add_keystream(total, self_key(seed, site=s, **bound), subtract=True)
        if E in told[s].sites:
            add_pair_mask(total, gone, now.prepared[s].announced.round_key, site=E, peer=s, **bound)
    equal = total == sum(now.vectors[s] for s in here)
    if not equivocate:
        assert equal.all()
        return
    assert not equal.any()
    assert len({m.roster for m in masked.values()}) == 2
    server = now.server
    server.add_masked(masked[A])
    refused("SUM-ROSTER", lambda: _seen(server), lambda: server.add_masked(masked[C]))
    chosen = SurvivorSet(context=masked[A].context, roster=masked[A].roster, survivors=here)
    now.sites[A].sign_survivors(chosen)
    refused("SUM-ROSTER-TWICE", now.sites[C].to_state, lambda: now.sites[C].sign_survivors(chosen))


def test_the_server_keeps_its_order(consortium, midway) -> None:
    stage = Stage(consortium, midway, "revealed")
    now = stage.now
    fresh = stage.world.server(stage.params)
    for act in (
        fresh.survivors,
        fresh.reveal_request,
        fresh.sum,
        lambda: fresh.add_masked(now.masked[A]),
        lambda: fresh.add_vote(now.votes[A]),
        lambda: fresh.add_revealed(now.revealed[A]),
        lambda: now.server.add_prepared(now.prepared[A]),
        lambda: now.server.add_masked(now.masked[A]),
        now.server.roster,
        now.server.survivors,
    ):
        refused("SUM-PHASE", lambda: (_seen(fresh), _seen(now.server)), act)
    empty = stage.world.server(stage.params)
    with pytest.raises(ProtocolError, match="SUM-TOO-FEW"):
        empty.roster()
    refused("SUM-VOID", lambda: _seen(empty), lambda: empty.add_prepared(now.prepared[A]))


# ---- malformed messages -----------------------------------------------------------------------------------

KINDS = (
    ChannelKey,
    ChannelKeys,
    Prepared,
    Roster,
    Masked,
    SurvivorSet,
    SurvivorVote,
    RevealRequest,
    Revealed,
)


def _all_messages(consortium, midway) -> list[tuple[type, messages.Message]]:
    stage = Stage(consortium, midway, "revealed")
    now = stage.now
    said = (
        stage.world.channel_keys[0],
        ChannelKeys(run_id="run-1", keys=stage.world.channel_keys),
        now.prepared[A],
        now.rosters[A],
        now.masked[A],
        now.chosen,
        now.votes[A],
        now.request,
        now.revealed[A],
    )
    return [(kind, message.to_message()) for kind, message in zip(KINDS, said)]


def test_every_other_shape_of_every_message_is_refused(consortium, midway) -> None:
    """Each field in turn is dropped, doubled, or replaced by each of many wrong values."""
    wrong = [None, 0, -1, True, "", "x", "AB" * 32, "ab" * 31, "zz" * 32, " " + "ab" * 32, "x" * 101]
    wrong += [[], [[]], [1], [["a"]], [["a", "b"]], ["b", "a"], ["a", "a"], {"a": 1}, {"a": "ab"}]
    tried = 0
    for kind, message in _all_messages(consortium, midway):
        assert kind.from_message(message).to_message() == message
        bad = [replace(message, kind="sum.other")]
        bad += [replace(message, fields={**message.fields, "more": 1})]
        bad += [replace(message, blobs={**message.blobs, "x" * 101: bytes(82)})]
        for name in message.fields:
            rest = {k: v for k, v in message.fields.items() if k != name}
            bad += [replace(message, fields=rest)]
            bad += [replace(message, fields={**rest, name: value}) for value in wrong]
        for name in list(message.blobs)[:1]:
            if kind is not Masked:  # its length is the round's business: SUM-VECTOR
                bad += [replace(message, blobs={**message.blobs, name: bytes(n)}) for n in (0, 81, 83)]
        for message_ in bad:
            try:
                parsed = kind.from_message(message_)
            except ProtocolError as error:
                assert error.code in ("SUM-FORMAT", "SUM-KIND"), error
                tried += 1
            else:
                # A run named "x" or an empty list is a shape the wire admits; checks of content come later.
                assert parsed.to_message() == message_
    assert tried > 350


def test_every_code_of_the_protocol_has_a_test() -> None:
    """A new refusal that no test names turns this red."""
    ours, folder = Path(__file__).parent, Path(secure_sum.__file__).parent
    named = "".join(path.read_text(encoding="utf-8") for path in sorted(ours.glob("test_*.py")))
    codes = set()
    for module in ("secure_sum", "round_messages", "channels", "masks", "wire", "shamir", "fixedpoint"):
        text = (folder / f"{module}.py").read_text(encoding="utf-8")
        codes |= set(re.findall(r'"((?:SUM|SHARE|FIXED)-[A-Z-]+)"', text))
    assert len(codes) >= 22
    assert not {code for code in codes if code not in named}


def test_a_roster_digest_names_keys_not_signatures(consortium, midway) -> None:
    stage = Stage(consortium, midway, "prepared")
    announced = stage.now.rosters[A].announced
    context = stage.params.digest()
    resigned = (replace(announced[0], signature=bytes(64)), *announced[1:])
    rekeyed = (replace(announced[0], round_key=bytes(32)), *announced[1:])
    name = roster_digest(context, announced)
    assert roster_digest(context, resigned) == name
    assert roster_digest(context, rekeyed) != name
    assert roster_digest("00" * 32, announced) != name


def test_parameters_read_back_only_from_their_own_shape(consortium) -> None:
    fields = consortium(3).params().to_fields()
    assert RoundParams.from_fields(fields) == consortium(3).params()
    with pytest.raises(ProtocolError, match="SUM-FORMAT"):
        RoundParams.from_fields({**fields, "more": 1})

"""Random worlds: drop-outs anywhere with an honest server, and a hostile server with colluding sites.

Failures that must come: any step with fewer than t sites is SUM-TOO-FEW and the round is void; anything that
breaks a site's rules is a ProtocolError. What must never come: another exception, a wrong sum, one site's
shares of both kinds for one peer, t shares of both secrets of an honest site.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import messages
from cohortium.common.protocol.round_messages import (
    VOTE_PURPOSE,
    Masked,
    Prepared,
    Revealed,
    RevealRequest,
    Roster,
    SurvivorSet,
    SurvivorVote,
    minimum_survivors,
)
from cohortium.common.protocol.signing import sign_statement

STEADY = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def _relay(message, sender_key, sender: str, kind):
    """Over the wire and back: sealed, opened, parsed."""
    envelope = messages.seal(message.to_message(), sender_key)
    return kind.from_message(messages.unseal(envelope, sender_key.public_key(), sender=sender))


@given(data=st.data())
@settings(STEADY, max_examples=80)
def test_random_drop_outs_give_the_exact_sum_or_a_void_round(data, consortium, labelled) -> None:
    n = data.draw(st.integers(3, 7), label="n")
    c = data.draw(st.integers(0, n - 2), label="c")
    lowest = minimum_survivors(n, c)
    t = data.draw(st.integers(lowest, n), label="t")
    world = consortium(n)
    params = world.params(t=t, c=c, dim=data.draw(st.integers(1, 5), label="dim"))
    leaves = {s: data.draw(st.sampled_from([9, 9, 9, 0, 1, 2, 3]), label=f"{s} leaves") for s in world.names}
    restarts = data.draw(st.sets(st.integers(0, 3)), label="restarts")
    server, vectors = world.server(params), world.vectors(params, data.draw(st.integers(0, 9)))
    sites = {s: world.site(params, s) for s in world.names}

    def step(phase: int, close):
        """The sites still there, rebuilt if this phase has a restart; then the server's step or its void."""
        if phase in restarts:
            sites.update({s: world.again(site) for s, site in sites.items()})
        return [s for s in world.names if leaves[s] > phase], close

    def closes(close, here):
        try:
            out = close()
        except ProtocolError as error:
            assert error.code == "SUM-TOO-FEW" and len(here) < t and server.void
            return None
        assert len(here) >= t
        return out

    here, close = step(0, server.roster)
    for s in data.draw(st.permutations(here), label="order"):
        prepared = sites[s].prepare(labelled((s, n)))
        server.add_prepared(_relay(prepared, world.identities[s], s, Prepared))
    if (rosters := closes(close, here)) is None:
        return
    here, close = step(1, server.survivors)
    for s in data.draw(st.permutations(here), label="order"):
        roster = Roster.from_message(rosters[s].to_message())
        masked = sites[s].mask(roster, vectors[s])
        server.add_masked(_relay(masked, world.identities[s], s, Masked))
    if (chosen := closes(close, here)) is None:
        return
    summed = tuple(here)
    here, close = step(2, server.reveal_request)
    for s in here:
        vote = sites[s].sign_survivors(SurvivorSet.from_message(chosen.to_message()))
        server.add_vote(_relay(vote, world.identities[s], s, SurvivorVote))
    if (request := closes(close, here)) is None:
        return
    here, close = step(3, server.sum)
    for s in here:
        revealed = sites[s].reveal(RevealRequest.from_message(request.to_message()))
        server.add_revealed(_relay(revealed, world.identities[s], s, Revealed))
    total = closes(close, here)
    if total is not None:
        assert server.survivor_names == summed
        assert np.array_equal(total, np.sum([vectors[s] for s in summed], axis=0, dtype=np.uint64))


class Hostile:
    """A server that keeps none of its rules, holds c sites in its hand and remembers every answer."""

    def __init__(self, world, params, labelled, old) -> None:
        self.world, self.params = world, params
        self.sites = {s: world.site(params, s) for s in world.names}
        self.prepared = {s: site.prepare(labelled((s, "now"))) for s, site in self.sites.items()}
        self.old = old  # a round that went before, for replays
        self.colluders = set(world.names[: params.colluders])
        self.honest = [s for s in world.names if s not in self.colluders]
        self.vectors = world.vectors(params)
        self.rosters: list[str] = []
        self.masked: dict[str, set[bytes]] = {s: set() for s in self.honest}
        self.signed: dict[str, set[tuple[str, ...]]] = {s: set() for s in self.honest}
        self.votes: dict[tuple[str, tuple[str, ...]], dict[str, bytes]] = {}
        self.revealed: dict[str, set[bytes]] = {s: set() for s in self.honest}
        self.seeds: dict[str, set[str]] = {s: set() for s in world.names}  # victim: who gave a share
        self.keys: dict[str, set[str]] = {s: set() for s in world.names}

    def roster(self, to: str, names: tuple[str, ...], trick: str) -> None:
        announced = tuple(self.prepared[s].announced for s in names)
        if trick == "rekey" and names:
            announced = (replace(announced[0], round_key=bytes([3]) * 32), *announced[1:])
        if trick == "replay" and names:
            announced = (self.old.prepared[names[0]].announced, *announced[1:])
        sealed = {s: self.prepared[s].sealed[to] for s in names if s != to}
        if trick == "reseal" and sealed:
            sealed[min(sealed)] = self.old.prepared[min(sealed)].sealed[to]
        told = Roster(context=self.params.digest(), announced=announced, sealed=sealed)
        masked = self.sites[to].mask(told, self.vectors[to])
        self.rosters.append(masked.roster)
        self.masked[to].add(masked.values)

    def survivors(self, to: str, names: tuple[str, ...], roster: str) -> None:
        chosen = SurvivorSet(context=self.params.digest(), roster=roster, survivors=names)
        vote = self.sites[to].sign_survivors(chosen)
        self.signed[to].add((roster, *names))
        self.votes.setdefault((roster, names), {})[to] = vote.signature

    def reveal(self, to: str, names: tuple[str, ...], roster: str, trick: str) -> None:
        chosen = SurvivorSet(context=self.params.digest(), roster=roster, survivors=names)
        votes = dict(self.votes.get((roster, names), {}))
        for s in self.colluders & set(names):  # they sign whatever is wanted
            draft = SurvivorVote(context=chosen.context, ballot=chosen.digest(), site=s, signature=bytes(64))
            votes[s] = sign_statement(self.world.identities[s], VOTE_PURPOSE, draft.statement())
        if trick == "forge":
            votes |= {s: bytes(64) for s in names if s not in votes}
        if trick == "replay":
            votes |= {s: self.old.votes[s].signature for s in names if s not in votes}
        if trick == "stale":  # signatures that were given for other sets
            for other in self.votes.values():
                votes |= {s: signature for s, signature in other.items() if s in names and s not in votes}
        answer = self.sites[to].reveal(RevealRequest(chosen=chosen, votes=votes))
        self.revealed[to].add(messages._body(answer.to_message()))
        assert not set(answer.seed_shares) & set(answer.key_shares)
        for victim in answer.seed_shares:
            self.seeds[victim].add(to)
        for victim in answer.key_shares:
            self.keys[victim].add(to)

    def bare_vectors(self) -> list[str]:
        """Honest sites of which t shares of both secrets are out; and every other rule, asserted."""
        t = self.params.survivors
        for s in self.honest:
            assert len(self.masked[s]) <= 1
            assert len(self.signed[s]) <= 1
            assert len(self.revealed[s]) <= 1
            assert not self.seeds[s] & self.keys[s]
        # Colluders hold shares of both kinds from the prepare on.
        return [
            s
            for s in self.honest
            if len(self.seeds[s] | self.colluders) >= t and len(self.keys[s] | self.colluders) >= t
        ]


def _attack(seed: int, consortium, midway, labelled, *, t: int | None = None, n: int | None = None) -> Hostile:
    """A random hostile run; the seed names it. t: a threshold that RoundParams would refuse."""
    rng = random.Random(seed)
    n = n or rng.randint(3, 5)
    c = 0 if t else rng.randint(0, n - 2)
    world = consortium(n)
    params = world.params(round=2, c=c)
    if t:
        object.__setattr__(params, "survivors", t)
    hostile = Hostile(world, params, labelled, _old(consortium, midway, n))
    # A server with a purpose: mostly one roster, mostly one of two survivor sets (colluders in both).
    favourite = world.names if rng.random() < 0.8 else tuple(sorted(rng.sample(world.names, n - 1)))
    halves = [set(hostile.honest[: n // 2]), set(hostile.honest[-(n // 2) :])]
    sets = [tuple(sorted(half | hostile.colluders)) for half in halves]
    sets += [world.names, favourite]
    if rng.random() < 0.5:
        rng.shuffle(sets)
    for phase in ("roster", "survivors", "reveal", "any"):
        targets = rng.sample(hostile.honest, len(hostile.honest)) + rng.choices(hostile.honest, k=n)
        for to in targets:
            move = phase if phase != "any" else rng.choice(("roster", "survivors", "reveal"))
            names = tuple(s for s in world.names if rng.random() < 0.8)
            roster = rng.choice(hostile.rosters) if hostile.rosters else "00" * 32
            before = hostile.sites[to].to_state()
            try:
                if move == "roster":
                    names = favourite if rng.random() < 0.9 else names
                    hostile.roster(to, names, rng.choice(("",) * 6 + ("rekey", "replay", "reseal")))
                elif move == "survivors":
                    names = rng.choice([s for s in sets[:2] if to in s] or sets) if rng.random() < 0.9 else names
                    hostile.survivors(to, names, roster)
                else:
                    own = [key for key, votes in hostile.votes.items() if to in votes]
                    roster, names = rng.choice(own) if own and rng.random() < 0.8 else (roster, names)
                    hostile.reveal(to, names, roster, rng.choice(("", "", "forge", "replay", "stale")))
            except ProtocolError as error:
                assert error.code.startswith("SUM-"), seed
                assert hostile.sites[to].to_state() == before, seed
            if not t and rng.random() < 0.3:  # a broken threshold does not survive the constructor
                hostile.sites[to] = world.again(hostile.sites[to])
    return hostile


def test_a_hostile_server_gets_coded_refusals_and_no_bare_vector(consortium, midway, labelled) -> None:
    revealed = opened = 0
    for seed in range(100):
        hostile = _attack(seed, consortium, midway, labelled)
        assert not hostile.bare_vectors(), seed
        revealed += sum(len(answers) for answers in hostile.revealed.values())
        opened += any(len(hostile.seeds[s] | hostile.colluders) >= hostile.params.survivors for s in hostile.honest)
    # The moves are not all refused: shares do leave, and some worlds come to a sum.
    assert revealed > 50 and opened > 10, (revealed, opened)


def test_the_same_moves_get_a_bare_vector_where_the_threshold_rule_is_broken(consortium, midway, labelled) -> None:
    """Power: with t = n/2, which RoundParams refuses, random moves find the split of the sites."""
    found = [seed for seed in range(60) if _attack(seed, consortium, midway, labelled, n=4, t=2).bare_vectors()]
    assert len(found) >= 2, found


_OLD: dict[int, object] = {}


def _old(consortium, midway, n: int):
    if n not in _OLD:
        world = consortium(n)
        _OLD[n] = midway(world, world.params(round=1), "voted", seed="old")
    return _OLD[n]

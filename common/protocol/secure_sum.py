"""The secure sum: a server learns the sum of the sites' vectors mod 2^64 and nothing about the summands.

Double masking on the complete graph after Bonawitz et al. 2017 ("Practical Secure Aggregation for
Privacy-Preserving Machine Learning", figure 4 with the consistency check for an active server). A site sends
    y_u = x_u + PRG(b_u) + Σ_{v>u} PRG(s_uv) − Σ_{v<u} PRG(s_uv)   mod 2^64
with a self mask from its seed b_u and pair masks from X25519 secrets s_uv of fresh round keys. Shamir shares
of b_u and of the round key lie with the peers: for a site that stayed they give b_u, for one that dropped out
its key, never both, or the server could unmask a vector that it only claims not to have received.

Both roles stand here side by side, as state machines without I/O, clock or randomness of their own:
    SiteRound    NEW → prepare → PREPARED → mask → MASKED → sign_survivors → VOTED → reveal → REVEALED
    ServerRound  PREPARE → roster → MASK → survivors → VOTE → reveal_request → REVEAL → sum → DONE
Envelopes are opened by the caller (messages.unseal), so a message's site is the one that signed it.
A refused message raises ProtocolError with a stable code and changes nothing; a round with too few sites is
void: it is never finished, a new round with a new number is a new start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import shamir
from cohortium.common.protocol.channels import Directory, open_shares, seal_shares
from cohortium.common.protocol.fixedpoint import Ring
from cohortium.common.protocol.masks import add_keystream, add_pair_mask, derive, self_key
from cohortium.common.protocol.messages import canonical, digest
from cohortium.common.protocol.round_messages import (
    NO_QUESTION,
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
from cohortium.common.protocol.signing import sign_statement, verify_statement
from cohortium.common.protocol.wire import LabelledBytes

_STATE_VERSION = 1


class Phase(StrEnum):
    NEW = "new"
    PREPARED = "prepared"
    MASKED = "masked"
    VOTED = "voted"
    REVEALED = "revealed"


@dataclass(kw_only=True, slots=True)
class _Memory:
    """All that a site remembers of a round, as text, so that it can be written down between two messages."""

    phase: str = Phase.NEW.value
    announced: list[str] = field(default_factory=list)
    sealed: dict[str, str] = field(default_factory=dict)  # for a repeated prepare
    round_private: str = ""  # erased with the vote: no repeated mask afterwards
    seed: str = ""  # erased with the vote
    seed_shares: dict[str, str] = field(default_factory=dict)  # by dealer; erased with the reveal
    key_shares: dict[str, str] = field(default_factory=dict)
    roster: list[str] = field(default_factory=list)
    roster_digest: str = ""
    masked: str = ""  # SHA-256 of the masked vector
    survivors: list[str] = field(default_factory=list)
    vote: str = ""
    request: str = ""
    revealed_seeds: dict[str, str] = field(default_factory=dict)
    revealed_keys: dict[str, str] = field(default_factory=dict)


class SiteRound:
    """One site in one round.

    Guarantees, whatever the server sends: one vector under one roster; a signature under one survivor set
    that holds this site and at least t of the roster; shares only against t signatures under that set; for
    each peer a share of its seed or of its key, never both; shares leave once. An identical repetition of a
    request is answered with identical bytes; anything else is refused.
    The guarantees hold across crashes only if `to_state()` is on disk before the answer leaves, and if an old
    state is never restored over a newer one.
    """

    __slots__ = ("_agreed", "_channel", "_context", "_directory", "_identity", "_memory", "params", "site")

    def __init__(
        self,
        *,
        params: RoundParams,
        site: str,
        identity: Ed25519PrivateKey,
        channel: X25519PrivateKey,
        directory: Directory,
    ) -> None:
        if site not in params.sites:
            raise ProtocolError("SUM-PARAMS", "this site is not one of the round's sites")
        if directory.run_id != params.run_id:
            raise ProtocolError("SUM-CONTEXT", "the channel keys belong to another run")
        if any(name not in directory.identities for name in params.sites):
            raise ProtocolError("SUM-SENDER", "a site of the round has no known identity")
        own = directory.identities[site].public_bytes_raw(), directory.channels.get(site)
        mine = identity.public_key().public_bytes_raw(), channel.public_key().public_bytes_raw()
        if own != mine:
            raise ProtocolError("SUM-KEY", "the directory holds another key for this site")
        self.params = params
        self.site = site
        self._identity = identity
        self._channel = channel
        self._directory = directory
        self._agreed = directory.agreed.setdefault(site, {})  # `own` and `mine` agree: the key is this one
        self._context = params.digest()
        self._memory = _Memory()

    @property
    def phase(self) -> Phase:
        return Phase(self._memory.phase)

    # ---- the four answers -------------------------------------------------------------------------------

    def prepare(self, entropy: LabelledBytes) -> Prepared:
        """Fresh round key and seed, and their shares for all peers with a channel key."""
        memory = self._memory
        if self.phase is Phase.NEW:
            self._draw(entropy)
        elif self.phase is not Phase.PREPARED:
            raise _out_of_order()
        return Prepared(
            context=self._context,
            announced=Announced.from_row(list(memory.announced)),
            sealed={peer: bytes.fromhex(text) for peer, text in memory.sealed.items()},
        )

    def mask(self, roster: Roster, vector: Ring, *, question: str = NO_QUESTION) -> Masked:
        """The vector (uint64 [dim], left as it is) under the masks of exactly this roster.

        question: digest of the query that the vector answers; a roster for another one is refused.
        """
        memory = self._memory
        if self.phase not in (Phase.PREPARED, Phase.MASKED):
            raise _out_of_order()
        if vector.dtype != np.uint64 or vector.shape != (self.params.dim,):
            raise ProtocolError("SUM-VECTOR", f"the vector is not uint64 of length {self.params.dim}")
        self._check_context(roster.context)
        if roster.question != question:
            raise ProtocolError("SUM-QUESTION", "the roster is for another question than this vector answers")
        name = roster.digest()
        repeated = self.phase is Phase.MASKED
        if repeated and name != memory.roster_digest:
            raise ProtocolError("SUM-ROSTER-TWICE", "this round is already masked under another roster")
        if not repeated:
            self._check_roster(roster)
            opened = self._open_all(roster)

        total = vector.astype(np.uint64)
        seed = bytes.fromhex(memory.seed)
        add_keystream(total, self_key(seed, context=self._context, roster=name, site=self.site))
        private = X25519PrivateKey.from_private_bytes(bytes.fromhex(memory.round_private))
        for peer in roster.announced:
            if peer.site != self.site:
                add_pair_mask(
                    total,
                    private,
                    peer.round_key,
                    context=self._context,
                    roster=name,
                    site=self.site,
                    peer=peer.site,
                )
        values = total.astype("<u8", copy=False).tobytes()
        if repeated:
            if digest(values) != memory.masked:
                raise ProtocolError("SUM-MASK-TWICE", "this round has already masked another vector")
        else:
            memory.seed_shares |= {peer: seed.hex() for peer, (seed, _) in opened.items()}
            memory.key_shares |= {peer: key.hex() for peer, (_, key) in opened.items()}
            memory.roster, memory.roster_digest = list(roster.sites), name
            memory.masked = digest(values)
            memory.sealed = {}
            memory.phase = Phase.MASKED.value
        return Masked(context=self._context, roster=name, site=self.site, values=values)

    def sign_survivors(self, chosen: SurvivorSet) -> SurvivorVote:
        """This round's one signature under a survivor set."""
        memory = self._memory
        if self.phase not in (Phase.MASKED, Phase.VOTED):
            raise _out_of_order()
        self._check_chosen(chosen)
        if self.phase is Phase.VOTED:
            if list(chosen.survivors) != memory.survivors:
                raise ProtocolError("SUM-SURVIVORS-TWICE", "this round is already signed for another set")
        else:
            vote = self._vote(chosen, self.site, bytes(64))
            memory.vote = sign_statement(self._identity, VOTE_PURPOSE, vote.statement()).hex()
            memory.survivors = list(chosen.survivors)
            memory.round_private = memory.seed = ""
            memory.phase = Phase.VOTED.value
        return self._vote(chosen, self.site, bytes.fromhex(memory.vote))

    def reveal(self, request: RevealRequest) -> Revealed:
        """One share of each site of the roster, against t valid signatures under the set signed here."""
        memory = self._memory
        if self.phase not in (Phase.VOTED, Phase.REVEALED):
            raise _out_of_order()
        self._check_chosen(request.chosen)
        if list(request.chosen.survivors) != memory.survivors:
            raise ProtocolError("SUM-SURVIVORS-TWICE", "this round is signed for another set")
        asked = request.digest()
        if self.phase is Phase.REVEALED:
            if asked != memory.request:
                raise ProtocolError("SUM-REVEAL-TWICE", "this round has already answered another request")
        else:
            self._check_votes(request)
            stayed = set(memory.survivors)
            memory.revealed_seeds = {p: memory.seed_shares[p] for p in memory.roster if p in stayed}
            memory.revealed_keys = {p: memory.key_shares[p] for p in memory.roster if p not in stayed}
            memory.seed_shares, memory.key_shares = {}, {}
            memory.request = asked
            memory.phase = Phase.REVEALED.value
        return Revealed(
            context=self._context,
            ballot=request.chosen.digest(),
            site=self.site,
            seed_shares={p: bytes.fromhex(text) for p, text in memory.revealed_seeds.items()},
            key_shares={p: bytes.fromhex(text) for p, text in memory.revealed_keys.items()},
        )

    # ---- the state between two messages -----------------------------------------------------------------

    def to_state(self) -> bytes:
        """The round as bytes, its secrets included (not the identity, not the channel key): mode 0600."""
        body = canonical(
            {
                "version": _STATE_VERSION,
                "params": self.params.to_fields(),
                "site": self.site,
                "memory": {name: getattr(self._memory, name) for name in _Memory.__slots__},
            }
        )
        return digest(body).encode("ascii") + b"\n" + body

    @classmethod
    def from_state(
        cls,
        state: bytes,
        *,
        identity: Ed25519PrivateKey,
        channel: X25519PrivateKey,
        directory: Directory,
    ) -> SiteRound:
        """The round as it was. Raises SUM-STATE for bytes that `to_state` did not write."""
        checksum, _, body = state.partition(b"\n")
        if checksum != digest(body).encode("ascii"):
            raise ProtocolError("SUM-STATE", "the round's state is damaged")
        read = json.loads(body)
        if read.get("version") != _STATE_VERSION:
            raise ProtocolError("SUM-STATE", "the round's state is of another version")
        self = cls(
            params=RoundParams.from_fields(read["params"]),
            site=read["site"],
            identity=identity,
            channel=channel,
            directory=directory,
        )
        self._memory = _Memory(**read["memory"])
        return self

    # ---- checks -----------------------------------------------------------------------------------------

    def _draw(self, entropy: LabelledBytes) -> None:
        params, memory = self.params, self._memory
        parties = _parties(params, self._directory)
        if len(parties) < params.survivors:
            raise _too_few("channel keys", len(parties), params.survivors)
        label = f"secure-sum/{params.run_id}/{params.round}/{self.site}"
        private = entropy.bytes_for(f"{label}/round-key", 32)
        seed = entropy.bytes_for(f"{label}/seed", 32)
        shares = []
        for name, secret in (("seed", seed), ("round-key", private)):
            dealt = shamir.split(
                int.from_bytes(secret, "big"),
                threshold=params.survivors,
                parties=list(parties.values()),
                randomness=entropy.bytes_for(f"{label}/{name}/shares", shamir.DRAW_BYTES * (params.survivors - 1)),
            )
            shares.append({p: dealt[i].to_bytes(shamir.SHARE_BYTES, "big") for p, i in parties.items()})
        seed_shares, key_shares = shares

        round_key = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
        unsigned = Announced(
            site=self.site,
            round_key=round_key,
            seed_commitment=_commit(seed, self._context, self.site),
            signature=bytes(64),
        )
        signature = sign_statement(self._identity, PREPARE_PURPOSE, unsigned.statement(self._context))
        memory.announced = [*unsigned.to_row()[:3], signature.hex()]
        memory.sealed = {
            peer: seal_shares(
                (seed_shares[peer], key_shares[peer]),
                private=self._channel,
                public=self._directory.channels[peer],
                context=self._context,
                round_key=round_key,
                sender=self.site,
                receiver=peer,
                agreed=self._agreed,
            ).hex()
            for peer in parties
            if peer != self.site
        }
        # The own key share is not kept: a site never signs a set without itself, so it never reveals it.
        memory.seed_shares = {self.site: seed_shares[self.site].hex()}
        memory.round_private, memory.seed = private.hex(), seed.hex()
        memory.phase = Phase.PREPARED.value

    def _check_context(self, context: str) -> None:
        if context != self._context:
            raise ProtocolError("SUM-CONTEXT", "the message belongs to another run, round or parameters")

    def _check_roster(self, roster: Roster) -> None:
        present = roster.sites
        if any(a >= b for a, b in pairwise(present)) or not set(present) <= set(self.params.sites):
            raise ProtocolError("SUM-ROSTER", "the roster names an unknown site, or one twice, or out of order")
        if len(present) < self.params.survivors:
            raise _too_few("sites in the roster", len(present), self.params.survivors)
        mine = self._memory.announced
        if not any(a.to_row()[:3] == mine[:3] for a in roster.announced):
            raise ProtocolError("SUM-ROSTER", "the roster does not hold this site's own prepare")
        keys = set()
        for announced in roster.announced:
            verify_statement(
                self._directory.identities[announced.site],
                PREPARE_PURPOSE,
                announced.statement(self._context),
                announced.signature,
                code="SUM-SIGNATURE",
            )
            keys.add(announced.round_key)
        if len(keys) != len(present):
            raise ProtocolError("SUM-KEY", "two sites of the roster announce the same round key")

    def _open_all(self, roster: Roster) -> dict[str, tuple[bytes, bytes]]:
        # Now and not at the reveal: a share that cannot be opened must stop the vector, not strand it.
        peers = [a for a in roster.announced if a.site != self.site]
        if set(roster.sealed) != {a.site for a in peers}:
            raise ProtocolError("SUM-SEAL", "sealed shares do not come from exactly the peers of the roster")
        opened = {}
        for peer in peers:
            if peer.site not in self._directory.channels:
                raise ProtocolError("SUM-SEAL", f"{peer.site} has no channel key in this run")
            opened[peer.site] = open_shares(
                roster.sealed[peer.site],
                private=self._channel,
                public=self._directory.channels[peer.site],
                context=self._context,
                round_key=peer.round_key,
                sender=peer.site,
                receiver=self.site,
                agreed=self._agreed,
            )
        return opened

    def _check_chosen(self, chosen: SurvivorSet) -> None:
        self._check_context(chosen.context)
        if chosen.roster != self._memory.roster_digest:
            raise ProtocolError("SUM-ROSTER-TWICE", "the survivors belong to another roster")
        stayed = chosen.survivors
        if any(a >= b for a, b in pairwise(stayed)) or not set(stayed) <= set(self._memory.roster):
            raise ProtocolError("SUM-SURVIVORS", "survivors are sites of the roster, in order, each once")
        if self.site not in stayed:
            raise ProtocolError("SUM-SURVIVORS", "the survivor set does not hold this site")
        if len(stayed) < self.params.survivors:
            raise _too_few("survivors", len(stayed), self.params.survivors)

    def _check_votes(self, request: RevealRequest) -> None:
        if not set(request.votes) <= set(request.chosen.survivors):
            raise ProtocolError("SUM-SENDER", "a signature of a site that is not in the survivor set")
        if len(request.votes) < self.params.survivors:
            raise _too_few("signatures", len(request.votes), self.params.survivors)
        ballot = request.chosen.digest()  # of all names, so once and not for every vote
        for site, signature in request.votes.items():
            verify_statement(
                self._directory.identities[site],
                VOTE_PURPOSE,
                SurvivorVote(context=self._context, ballot=ballot, site=site, signature=signature).statement(),
                signature,
                code="SUM-SIGNATURE",
            )

    def _vote(self, chosen: SurvivorSet, site: str, signature: bytes) -> SurvivorVote:
        return SurvivorVote(context=self._context, ballot=chosen.digest(), site=site, signature=signature)


class ServerRound:
    """The server in one round: collects, verifies, names sets, removes masks.

    It keeps one running sum, not the masked vectors. The sites cannot trust it and need not: all it checks
    protects the result, not the records. Each step that ends with fewer than t sites makes the round void
    (SUM-TOO-FEW, then SUM-VOID for ever).
    """

    __slots__ = (
        "_announced",
        "_chosen",
        "_context",
        "_directory",
        "_masked",
        "_phase",
        "_prepared",
        "_result",
        "_revealed",
        "_roster",
        "_total",
        "_votes",
        "params",
    )

    def __init__(self, *, params: RoundParams, directory: Directory) -> None:
        if directory.run_id != params.run_id:
            raise ProtocolError("SUM-CONTEXT", "the channel keys belong to another run")
        if any(name not in directory.identities for name in params.sites):
            raise ProtocolError("SUM-SENDER", "a site of the round has no known identity")
        self.params = params
        self._context = params.digest()
        self._directory = directory
        self._phase = "prepare"
        self._prepared: dict[str, Prepared] = {}
        self._announced: dict[str, Announced] = {}
        self._roster = ""
        self._total: Ring = np.zeros(params.dim, np.uint64)
        self._masked: set[str] = set()
        self._chosen: SurvivorSet | None = None
        self._votes: dict[str, bytes] = {}
        self._revealed: dict[str, Revealed] = {}
        self._result: Ring | None = None

    @property
    def void(self) -> bool:
        return self._phase == "void"

    @property
    def survivor_names(self) -> tuple[str, ...]:
        """Whose vectors the sum holds; empty before `survivors()`."""
        return self._chosen.survivors if self._chosen else ()

    def waiting_for(self) -> tuple[str, ...]:
        """The sites whose next message this phase may still take."""
        expected: Mapping[str, tuple[set[str], set[str]]] = {
            "prepare": (set(_parties(self.params, self._directory)), set(self._prepared)),
            "mask": (set(self._announced), self._masked),
            "vote": (set(self.survivor_names), set(self._votes)),
            "reveal": (set(self._votes), set(self._revealed)),
        }
        asked, came = expected.get(self._phase, (set(), set()))
        return tuple(sorted(asked - came))

    def add_prepared(self, prepared: Prepared) -> None:
        site = prepared.announced.site
        self._admit("prepare", prepared.context, site, set(self.params.sites), set(self._prepared))
        if set(prepared.sealed) != set(_parties(self.params, self._directory)) - {site}:
            raise ProtocolError("SUM-SEAL", "shares are not sealed to exactly the peers with channel keys")
        verify_statement(
            self._directory.identities[site],
            PREPARE_PURPOSE,
            prepared.announced.statement(self._context),
            prepared.announced.signature,
            code="SUM-SIGNATURE",
        )
        self._prepared[site] = prepared

    def roster(self, question: str = NO_QUESTION) -> dict[str, Roster]:
        """Close the prepares: for each site that takes part, the roster to send to it."""
        self._advance("prepare", "mask", len(self._prepared), "sites prepared")
        present = sorted(self._prepared)
        self._announced = {site: self._prepared[site].announced for site in present}
        announced = tuple(self._announced.values())
        self._roster = roster_digest(self._context, announced, question)
        rosters = {
            site: Roster(
                context=self._context,
                announced=announced,
                sealed={peer: self._prepared[peer].sealed[site] for peer in present if peer != site},
                question=question,
            )
            for site in present
        }
        self._prepared = {}
        return rosters

    def add_masked(self, masked: Masked) -> None:
        self._admit("mask", masked.context, masked.site, set(self._announced), self._masked)
        if masked.roster != self._roster:
            raise ProtocolError("SUM-ROSTER", "the vector is masked under another roster")
        if len(masked.values) != 8 * self.params.dim:
            raise ProtocolError("SUM-VECTOR", f"the masked vector has not {self.params.dim} entries")
        np.add(self._total, np.frombuffer(masked.values, dtype="<u8"), out=self._total)
        self._masked.add(masked.site)

    def survivors(self) -> SurvivorSet:
        """Close the masked vectors: the set to be signed by each of its sites."""
        self._advance("mask", "vote", len(self._masked), "masked vectors")
        self._chosen = SurvivorSet(context=self._context, roster=self._roster, survivors=tuple(sorted(self._masked)))
        return self._chosen

    def add_vote(self, vote: SurvivorVote) -> None:
        self._admit("vote", vote.context, vote.site, set(self.survivor_names), set(self._votes))
        if self._chosen is None or vote.ballot != self._chosen.digest():
            raise ProtocolError("SUM-SURVIVORS", "the signature is for another survivor set")
        verify_statement(
            self._directory.identities[vote.site],
            VOTE_PURPOSE,
            vote.statement(),
            vote.signature,
            code="SUM-SIGNATURE",
        )
        self._votes[vote.site] = vote.signature

    def reveal_request(self) -> RevealRequest:
        """Close the votes: the request to send to each site that voted."""
        self._advance("vote", "reveal", len(self._votes), "signatures")
        assert self._chosen is not None
        return RevealRequest(chosen=self._chosen, votes=dict(self._votes))

    def add_revealed(self, revealed: Revealed) -> None:
        self._admit("reveal", revealed.context, revealed.site, set(self._votes), set(self._revealed))
        assert self._chosen is not None
        if revealed.ballot != self._chosen.digest():
            raise ProtocolError("SUM-SURVIVORS", "the shares are for another survivor set")
        stayed = set(self.survivor_names)
        if set(revealed.seed_shares) != stayed or set(revealed.key_shares) != set(self._announced) - stayed:
            raise ProtocolError("SUM-SHARE", "the shares are not one for each site of the roster")
        for share in (*revealed.seed_shares.values(), *revealed.key_shares.values()):
            if int.from_bytes(share, "big") >= shamir.PRIME:
                raise ProtocolError("SUM-SHARE", "a share is no element of the field")
        self._revealed[revealed.site] = revealed

    def sum(self) -> Ring:
        """Close the reveals: Σ of the survivors' vectors mod 2^64, uint64 [dim]; the same if asked again.

        Raises SUM-TOO-FEW, or SUM-SHARE if shares do not give what a site committed to: the round is void.
        """
        if self._result is not None:
            return self._result
        self._advance("reveal", "done", len(self._revealed), "sites that revealed shares")
        helpers = sorted(self._revealed)[: self.params.survivors]
        numbers = _parties(self.params, self._directory)
        lagrange = shamir.weights([numbers[site] for site in helpers])
        bound = {"context": self._context, "roster": self._roster}
        stayed = self.survivor_names
        # Every secret is checked before the first mask is touched.
        seeds: dict[str, bytes] = {}
        keys: dict[str, X25519PrivateKey] = {}
        for site, announced in self._announced.items():
            table = {
                numbers[h]: (
                    self._revealed[h].seed_shares[site] if site in stayed else self._revealed[h].key_shares[site]
                )
                for h in helpers
            }
            secret = shamir.combine({i: int.from_bytes(share, "big") for i, share in table.items()}, lagrange)
            if secret >= 2**256:
                raise self._wrong_shares(site)
            raw = secret.to_bytes(32, "big")
            if site in stayed:
                if _commit(raw, self._context, site) != announced.seed_commitment:
                    raise self._wrong_shares(site)
                seeds[site] = raw
            else:
                keys[site] = X25519PrivateKey.from_private_bytes(raw)
                if keys[site].public_key().public_bytes_raw() != announced.round_key:
                    raise self._wrong_shares(site)
        for site, seed in seeds.items():
            add_keystream(self._total, self_key(seed, site=site, **bound), subtract=True)
        for gone, private in keys.items():
            for site in stayed:
                add_pair_mask(self._total, private, self._announced[site].round_key, site=gone, peer=site, **bound)
        self._result = self._total
        self._result.flags.writeable = False
        return self._result

    def _wrong_shares(self, site: str) -> ProtocolError:
        self._phase = "void"
        return ProtocolError("SUM-SHARE", f"the shares of {site} do not give what it committed to")

    def _admit(self, phase: str, context: str, site: str, known: set[str], seen: set[str]) -> None:
        if self._phase == "void":
            raise _void()
        if context != self._context:
            raise ProtocolError("SUM-CONTEXT", "the message belongs to another run, round or parameters")
        if self._phase != phase:
            raise _out_of_order()
        if site not in known:
            raise ProtocolError("SUM-SENDER", "the sender takes no part in this phase")
        if site in seen:
            raise ProtocolError("SUM-DUPLICATE", "the sender has already answered in this phase")

    def _advance(self, phase: str, to: str, count: int, what: str) -> None:
        if self._phase == "void":
            raise _void()
        if self._phase != phase:
            raise _out_of_order()
        if count < self.params.survivors:
            self._phase = "void"
            raise _too_few(what, count, self.params.survivors)
        self._phase = to


def _parties(params: RoundParams, directory: Directory) -> dict[str, int]:
    """The Shamir number of each site that has a channel key: its place in the plan's list, from 1."""
    return {site: i for i, site in enumerate(params.sites, 1) if site in directory.channels}


def _commit(seed: bytes, context: str, site: str) -> bytes:
    # Hiding because the seed has 256 bits of its own randomness.
    return derive(seed, "seed-commitment", context=context, site=site)


def _out_of_order() -> ProtocolError:
    return ProtocolError("SUM-PHASE", "the message does not belong to this phase of the round")


def _void() -> ProtocolError:
    return ProtocolError("SUM-VOID", "the round is void", hint="start a new round with a new number")


def _too_few(what: str, count: int, needed: int) -> ProtocolError:
    return ProtocolError(
        "SUM-TOO-FEW",
        f"{count} {what}, {needed} needed",
        left="the round is void; what it was charged stays charged",
    )

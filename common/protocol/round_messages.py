"""What is said in one round of the secure sum: the parameters and the seven messages, in their order.

    site → server   Prepared        my round key, a commitment to my self-mask seed, shares sealed to peers
    server → site   Roster          the prepares of all who take part, and the shares sealed to you
    site → server   Masked          my vector under its masks
    server → site   SurvivorSet     whose masked vectors I hold
    site → server   SurvivorVote    my signature under that set
    server → site   RevealRequest   the set with at least t such signatures
    site → server   Revealed        for each peer one share: of its seed if it survived, of its key if not
Every message carries the digest of the round's parameters (its context), so it fits one run, round, list of
sites, threshold and length only. The envelope (messages.seal) is signed by its sender; what a server relays
(prepares, votes) carries a signature of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.channels import SEALED_BYTES
from cohortium.common.protocol.messages import Message, canonical, digest
from cohortium.common.protocol.shamir import SHARE_BYTES
from cohortium.common.protocol.wire import (
    MAX_NAME,
    expect,
    hexadecimal,
    malformed,
    names,
    rows,
    sha,
    table,
    text,
)

MAX_SITES = 100
MAX_DIM = 2**24
COORDINATOR = "coordinator"
PREPARE_PURPOSE = "round-prepare"
VOTE_PURPOSE = "survivor-vote"
NO_QUESTION = "0" * 64
"""The question of a sum that answers none: tests of the protocol alone."""


def minimum_survivors(sites: int, colluders: int) -> int:
    """The smallest t with t > (n+c)/2: two sets of t sites then share an honest one."""
    return (sites + colluders) // 2 + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundParams:
    """What all parties of a round agree on beforehand.

    sites: sorted names, 2..100 (two only in tests). survivors: t, the sites that must stay to the end.
    colluders: c, the sites that may side with the server. dim: length of the vector.

    Guarantees: t > (n+c)/2. A server together with c sites then cannot collect t shares of both secrets of a
    site, nor t signatures under two survivor sets (Bonawitz et al. 2017, section 6.2). Else SUM-PARAMS.
    """

    run_id: str
    round: int
    sites: tuple[str, ...]
    survivors: int
    colluders: int
    dim: int

    def __post_init__(self) -> None:
        n = len(self.sites)
        if not 2 <= n <= MAX_SITES or any(a >= b for a, b in pairwise(self.sites)):
            raise _params(f"sites are 2 to {MAX_SITES} distinct names in ascending order")
        if not all(0 < len(name) <= MAX_NAME for name in (*self.sites, self.run_id)):
            raise _params(f"names of sites and runs have 1 to {MAX_NAME} characters")
        for value, low, high in (
            (self.round, 0, 2**63),
            (self.dim, 1, MAX_DIM),
            (self.colluders, 0, n - 1),
            (self.survivors, 1, n),
        ):
            if type(value) is not int or not low <= value <= high:
                raise _params("round, dim, colluders or survivors out of range")
        if 2 * self.survivors <= n + self.colluders:
            raise _params(
                f"{self.survivors} survivors of {n} sites with {self.colluders} colluders: "
                f"t > (n+c)/2 asks for at least {minimum_survivors(n, self.colluders)}"
            )

    def to_fields(self) -> dict[str, object]:
        return {
            "run": self.run_id,
            "round": self.round,
            "sites": list(self.sites),
            "survivors": self.survivors,
            "colluders": self.colluders,
            "dim": self.dim,
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> RoundParams:
        """The parameters of `to_fields`; SUM-PARAMS or SUM-FORMAT for anything else."""
        if set(fields) != {"run", "round", "sites", "survivors", "colluders", "dim"}:
            raise malformed("parameters of a round have other fields")
        return cls(
            run_id=text(fields["run"]),
            round=fields["round"],
            sites=names(fields["sites"]),
            survivors=fields["survivors"],
            colluders=fields["colluders"],
            dim=fields["dim"],
        )

    def digest(self) -> str:
        """The context that every message, signature and key of the round is bound to."""
        return digest(canonical({"protocol": "cohortium/secure-sum/1", **self.to_fields()}))


def _params(sentence: str) -> ProtocolError:
    return ProtocolError("SUM-PARAMS", sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Announced:
    """The public part of a prepare: X25519 round key, commitment to the seed (32 bytes each), signature."""

    site: str
    round_key: bytes
    seed_commitment: bytes
    signature: bytes

    def statement(self, context: str) -> dict[str, object]:
        return {
            "context": context,
            "site": self.site,
            "round_key": self.round_key.hex(),
            "seed_commitment": self.seed_commitment.hex(),
        }

    def to_row(self) -> list[str]:
        return [self.site, self.round_key.hex(), self.seed_commitment.hex(), self.signature.hex()]

    @classmethod
    def from_row(cls, row: list[object]) -> Announced:
        return cls(
            site=text(row[0]),
            round_key=hexadecimal(row[1], 32),
            seed_commitment=hexadecimal(row[2], 32),
            signature=hexadecimal(row[3], 64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A site enters a round. sealed: {peer: 82 bytes that only the peer can open}."""

    context: str
    announced: Announced
    sealed: Mapping[str, bytes]

    def to_message(self) -> Message:
        _, *announced = self.announced.to_row()
        fields = {"context": self.context, "announced": announced}
        return Message(kind="sum.prepared", sender=self.announced.site, fields=fields, blobs=dict(self.sealed))

    @classmethod
    def from_message(cls, message: Message) -> Prepared:
        fields = expect(message, "sum.prepared", {"context", "announced"}, blobs=True)
        (row,) = rows([fields["announced"]], 3)
        return cls(
            context=sha(fields["context"]),
            announced=Announced.from_row([message.sender, *row]),
            sealed=_sealed(message.blobs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """Who takes part and what is asked, as told to one site. sealed: {peer: what the peer sealed to this site}.

    question: digest of the query that the vectors answer. The masks are bound to it, so a coordinator that asks
    sites different things in one round (to single one out, or to thin the noise) gets masks that do not cancel.
    """

    context: str
    announced: tuple[Announced, ...]
    sealed: Mapping[str, bytes]
    question: str = NO_QUESTION

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(a.site for a in self.announced)

    def digest(self) -> str:
        """Names the roster; equal for all sites that were told the same keys and asked the same.

        Signatures are left out, because a signer can make several that fit.
        """
        return roster_digest(self.context, self.announced, self.question)

    def to_message(self, *, sender: str = COORDINATOR) -> Message:
        listed = [a.to_row() for a in self.announced]
        fields = {"context": self.context, "announced": listed, "question": self.question}
        return Message(kind="sum.roster", sender=sender, fields=fields, blobs=dict(self.sealed))

    @classmethod
    def from_message(cls, message: Message) -> Roster:
        fields = expect(message, "sum.roster", {"context", "announced", "question"}, blobs=True)
        announced = tuple(Announced.from_row(row) for row in rows(fields["announced"], 4))
        names([a.site for a in announced])
        return cls(
            context=sha(fields["context"]),
            announced=announced,
            sealed=_sealed(message.blobs),
            question=sha(fields["question"]),
        )


def roster_digest(context: str, announced: tuple[Announced, ...], question: str = NO_QUESTION) -> str:
    return digest(canonical({"question": question, "roster": [a.statement(context) for a in announced]}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """A site's masked vector: dim little-endian uint64."""

    context: str
    roster: str
    site: str
    values: bytes

    def to_message(self) -> Message:
        fields = {"context": self.context, "roster": self.roster}
        return Message(kind="sum.masked", sender=self.site, fields=fields, blobs={"values": self.values})

    @classmethod
    def from_message(cls, message: Message) -> Masked:
        fields = expect(message, "sum.masked", {"context", "roster"}, blobs=True)
        if set(message.blobs) != {"values"}:
            raise malformed("a masked vector has one blob")
        return cls(
            context=sha(fields["context"]),
            roster=sha(fields["roster"]),
            site=message.sender,
            values=message.blobs["values"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivorSet:
    """The sites whose masked vectors the server holds, under one roster."""

    context: str
    roster: str
    survivors: tuple[str, ...]

    def to_fields(self) -> dict[str, object]:
        return {"context": self.context, "roster": self.roster, "survivors": list(self.survivors)}

    def digest(self) -> str:
        return digest(canonical({"ballot": self.to_fields()}))

    def to_message(self, *, sender: str = COORDINATOR) -> Message:
        return Message(kind="sum.survivors", sender=sender, fields=self.to_fields())

    @classmethod
    def from_message(cls, message: Message) -> SurvivorSet:
        fields = expect(message, "sum.survivors", {"context", "roster", "survivors"})
        return cls(
            context=sha(fields["context"]),
            roster=sha(fields["roster"]),
            survivors=names(fields["survivors"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivorVote:
    """A site's one signature of the round under a survivor set; ballot: the set's digest."""

    context: str
    ballot: str
    site: str
    signature: bytes

    def statement(self) -> dict[str, str]:
        return {"context": self.context, "ballot": self.ballot, "site": self.site}

    def to_message(self) -> Message:
        fields = {"context": self.context, "ballot": self.ballot, "signature": self.signature.hex()}
        return Message(kind="sum.vote", sender=self.site, fields=fields)

    @classmethod
    def from_message(cls, message: Message) -> SurvivorVote:
        fields = expect(message, "sum.vote", {"context", "ballot", "signature"})
        return cls(
            context=sha(fields["context"]),
            ballot=sha(fields["ballot"]),
            site=message.sender,
            signature=hexadecimal(fields["signature"], 64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RevealRequest:
    """The survivor set again, with {site: signature} of those who voted for it."""

    chosen: SurvivorSet
    votes: Mapping[str, bytes]

    def digest(self) -> str:
        return digest(canonical({"request": self.to_message().fields}))

    def to_message(self, *, sender: str = COORDINATOR) -> Message:
        votes = {site: signature.hex() for site, signature in self.votes.items()}
        return Message(kind="sum.reveal", sender=sender, fields={**self.chosen.to_fields(), "votes": votes})

    @classmethod
    def from_message(cls, message: Message) -> RevealRequest:
        fields = expect(message, "sum.reveal", {"context", "roster", "survivors", "votes"})
        chosen = SurvivorSet(
            context=sha(fields["context"]),
            roster=sha(fields["roster"]),
            survivors=names(fields["survivors"]),
        )
        return cls(chosen=chosen, votes=table(fields["votes"], 64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Revealed:
    """One share (33 bytes) for each site of the roster: of survivors' seeds, of the others' round keys."""

    context: str
    ballot: str
    site: str
    seed_shares: Mapping[str, bytes]
    key_shares: Mapping[str, bytes]

    def to_message(self) -> Message:
        fields = {
            "context": self.context,
            "ballot": self.ballot,
            "seeds": {site: share.hex() for site, share in self.seed_shares.items()},
            "keys": {site: share.hex() for site, share in self.key_shares.items()},
        }
        return Message(kind="sum.revealed", sender=self.site, fields=fields)

    @classmethod
    def from_message(cls, message: Message) -> Revealed:
        fields = expect(message, "sum.revealed", {"context", "ballot", "seeds", "keys"})
        return cls(
            context=sha(fields["context"]),
            ballot=sha(fields["ballot"]),
            site=message.sender,
            seed_shares=table(fields["seeds"], SHARE_BYTES),
            key_shares=table(fields["keys"], SHARE_BYTES),
        )


def _sealed(blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    for name, blob in blobs.items():
        text(name)
        if len(blob) != SEALED_BYTES:
            raise malformed(f"sealed shares have {SEALED_BYTES} bytes")
    return dict(blobs)

"""THE DOOR. Everything that leaves a hospital is checked, charged, recorded and signed in this one file.

    open   before the records are read: plan approved, release not yet answered, cap holds; charge it ON DISK
    send   the only function that makes bytes for the outside: an envelope of a kind and with the fields listed in
           OUTBOUND, and numbers that come from records only as a `Released` (noised) that `open` has charged

Nothing else in this package signs an envelope or writes to a socket (tests/test_layers.py keeps it so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.client.policy import Policy
from cohortium.common.errors import ProtocolError, Refused
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.budget import Mode
from cohortium.common.privacy.cap import private
from cohortium.common.privacy.chain import REHEARSAL, Checkpoint
from cohortium.common.privacy.entropy import Purpose, SystemEntropy
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.privacy.release import Released
from cohortium.common.protocol.channels import SEALED_BYTES
from cohortium.common.protocol.messages import Message, digest, seal
from cohortium.common.queries import AnyQuery, Gradient

OUTBOUND: dict[str, frozenset[str]] = {
    # kind: exactly these fields. Only the two kinds of CARRIES_RECORDS hold numbers made from records.
    "site.hello": frozenset({"run", "plan", "lines", "channel", "checkpoint", "witnessed"}),
    "site.witnessed": frozenset({"run", "signatures", "refused"}),
    "site.started": frozenset({"run"}),
    "sum.prepared": frozenset({"context", "announced"}),
    "sum.masked": frozenset({"context", "roster"}),
    "sum.vote": frozenset({"context", "ballot", "signature"}),
    "site.revealed": frozenset({"revealed", "lines", "prepared"}),
    "site.noised": frozenset({"run", "index", "lattice", "lines"}),
    "site.finished": frozenset({"run", "lines", "checkpoint"}),
    "site.refused": frozenset({"code"}),
}
CARRIES_RECORDS = {"sum.masked": "secure-sum", "site.noised": "local"}
"""In which trust mode each may leave: a site's share of the noise alone does not protect a plain sum."""
CARRIES_SHARES = frozenset({"sum.prepared", "site.revealed"})
"""Kinds that may hold shares sealed to peers, each of one fixed length. No other kind has blobs."""
MAX_TEXT = 1024
MAX_NUMBER = 2**53
MAX_CLIP_L2 = 2.0**20
"""No honest query clips so late. Its noise would grow alike, so it is no leak; but nobody meant to ask it."""
MAX_STARTS = 1000
"""How often one run may be begun or resumed: nobody fills a hospital's disk with lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Permit:
    """A release that is charged and may now be computed and sent once."""

    run: str
    index: int
    stage: Stage
    mode: Mode
    head: str  # the ledger's head after the reservation: names the noise's key


class Gate:
    """One hospital's door."""

    def __init__(self, *, policy: Policy, ledger: Ledger | None, key: Ed25519PrivateKey) -> None:
        """ledger: None where it cannot be opened; such a door lets only refusals out."""
        self._policy, self._book, self._key = policy, ledger, key

    @property
    def _ledger(self) -> Ledger:
        if self._book is None:
            raise Refused("GATE-LEDGER", "nothing but a refusal leaves without a ledger")
        return self._book

    def open(self, *, plan: Plan, run: str, index: int, query: AnyQuery, codes: Sequence[int]) -> Permit:
        """Check the query against the approved plan, then charge it. On disk before this returns.

        codes: how many fine codes each modelled column of the approved dictionary has.
        Raises Refused or ProtocolError with a code; nothing was charged then.
        """
        stage = self.check(plan=plan, index=index, query=query, codes=codes)
        line = self._ledger.reserve(
            run=run,
            release_id=str(index),
            event=stage.event,
            count=stage.steps,
            plan_digest=plan.digest,
            purpose=stage.name,
        )
        return Permit(run=run, index=index, stage=stage, mode=plan.mode, head=line.hash)

    def check(self, *, plan: Plan, index: int, query: AnyQuery, codes: Sequence[int]) -> Stage:
        """The stage of the approved plan that the query belongs to; nothing is charged and no record is needed.

        Raises as `open` does: whatever can be refused is refused here, so also before the table is opened.
        """
        self._policy.check(plan)
        stage = plan.stage_of(index)
        steps = query.local.steps if isinstance(query, Gradient) and query.local is not None else 1
        local = isinstance(query, Gradient) and query.local is not None
        if (query.kind, query.part, steps) != (stage.kind, stage.part, stage.steps):
            raise Refused("GATE-NOT-IN-PLAN", "the plan has another kind, part or number of steps there")
        if local and plan.mode != "local":
            raise Refused("GATE-NOT-IN-PLAN", "local steps need the trust mode `local`")
        if query.dim > stage.max_dim:
            raise Refused("GATE-SIZE", "the answer would be larger than the plan says")
        if query.clip_norm_l2 > MAX_CLIP_L2:
            raise Refused("GATE-CLIP", "the query clips later than any that makes sense")
        # What is refused must be settled here, by public facts: later a refusal could depend on the records.
        query.check_codes(codes)
        self._check_cap(plan, stage)
        return stage

    def _check_cap(self, plan: Plan, stage: Stage) -> None:
        if not plan.private:
            return  # a rehearsal without noise has no price that a cap could hold; policy.check allowed it
        book = self._ledger.book
        rehearsed = any(note["about"] == REHEARSAL for note in book.notes)
        if self._policy.rehearsal is None and (
            rehearsed or any(e.kind == "non-private" for e, _ in book.charged_events())
        ):
            raise Refused(
                "GATE-CAP",
                "something was computed here without noise, or with noise from a seed: no cap can hold any more",
                hint="a rehearsal's ledger is not a hospital's: start with a new site directory",
            )
        if not self._policy.cap.allows([*private(self._ledger.charged_events()), (stage.event, stage.steps)]):
            raise Refused(
                "GATE-CAP",
                "this release would pass the hospital's lifetime cap",
                hint="[policy] lifetime_epsilon is the officer's to raise",
            )

    def send(self, message: Message, *, permit: Permit | None = None, released: Released | None = None) -> bytes:
        """The signed envelope of a message that may leave.

        A message made from records needs its permit and the noised `Released` it was made from. The caller stores
        the envelope and then calls `sealed`; until that is on disk it must not hand it to the courier.
        """
        if OUTBOUND.get(message.kind) != frozenset(message.fields):
            raise ProtocolError("GATE-KIND", "a message of that kind or with those fields does not leave")
        _check_fields(message.fields)
        if self._book is None and message.kind != "site.refused":
            raise Refused("GATE-LEDGER", "nothing but a refusal leaves without a ledger")
        if message.kind not in CARRIES_RECORDS:
            if permit is not None or released is not None:
                raise ProtocolError("GATE-PERMIT", "nothing but a release leaves with a permit")
            shares = message.blobs.values() if message.kind in CARRIES_SHARES else ()
            if len(shares) != len(message.blobs) or any(len(share) != SEALED_BYTES for share in shares):
                raise ProtocolError("GATE-KIND", "bytes that are no sealed shares do not leave")
            return seal(message, self._key)
        if permit is None or released is None:
            raise ProtocolError("GATE-PERMIT", "numbers from records leave with a permit")
        _check_release(message, permit, released)
        return seal(message, self._key)

    def sealed(self, permit: Permit, envelope: bytes) -> None:
        """Record that exactly these bytes may leave; from now on only they, however often."""
        self._ledger.advance(permit.run, str(permit.index), "SEALED", digest=digest(envelope))

    def rehearse(self, run: str) -> None:
        """Sign, before anything is asked, that a run is a rehearsal: nobody can later call it private."""
        if not self._ledger.book.noted(REHEARSAL, run):
            self._ledger.note(REHEARSAL, run=run)

    def starts(self, run: str, plan: Plan) -> str:
        """Write a line that no copy of this ledger can have too, and give the signed checkpoint that ends in it.

        With `tell_cap` in the policy the line also says the lifetime cap: an officer's number, not the records'. The
        nonce is the operating system's, in a rehearsal as well: it protects the ledger and touches no release.
        """
        if len(self._ledger.book.noted(chain.START, run)) >= MAX_STARTS:
            raise Refused("GATE-STARTS", f"this run was begun {MAX_STARTS} times", hint="start a new run")
        nonce = SystemEntropy().key(Purpose(label="start", run=run, release=0))[:16].hex()
        told = {"cap": self._policy.cap.to_json()} if self._policy.tell_cap else {}
        self._ledger.note(chain.START, run=run, plan=plan.digest, nonce=nonce, **told)
        return self._ledger.checkpoint()

    def begun(self, run: str) -> Checkpoint:
        """The head that ends in the newest start of a run: the one that witnesses have to confirm."""
        starts = self._ledger.book.noted(chain.START, run)
        if starts:
            size = int(starts[-1]["n"]) + 1
            return Checkpoint(owner=self._ledger.owner, size=size, hash=self._ledger.hash_at(size))
        raise Refused("WITNESS-START", "this run was not begun here")

    def cosign(self, head: Checkpoint, owner: Ed25519PublicKey) -> str:
        """This hospital's word that a head is the newest it saw of another's ledger; it was written down before."""
        return witness.cosign(head, owner=owner, witness=self._policy.name, key=self._key)

    def voted(self, run: str, index: int, *, ballot: str) -> None:
        """Record the one survivor set that this site signs. On disk before this returns, so before the vote leaves.

        The ledger's word stands whatever became of the round's own memory: another set is refused for ever.
        """
        entry = self._ledger.book.entries.get((run, str(index)))
        if entry is not None and entry.ballot:
            if entry.ballot != ballot:
                raise Refused("GATE-BALLOT", "this site signed another survivor set for this release")
            return
        self._ledger.advance(run, str(index), "UNMASKED", digest=ballot)

    def released(self, run: str, index: int, *, ballot: str = "") -> None:
        """Record that the release is over."""
        # May wait for the next line: losing it leaves SEALED, and only the same bytes can be sent again.
        self._ledger.advance(run, str(index), "RELEASED", digest=ballot or None, later=True)


def _check_release(message: Message, permit: Permit, released: Released) -> None:
    if CARRIES_RECORDS[message.kind] != permit.mode:
        raise ProtocolError("GATE-MODE", "a release leaves masked in secure-sum, and plain in local mode only")
    if (released.event, released.count) != (permit.stage.event, permit.stage.steps):
        raise ProtocolError("GATE-EVENT", "what was run is not what was charged")
    if set(message.blobs) != {"values"} or len(message.blobs["values"]) != 8 * len(released.values):
        raise ProtocolError("GATE-KIND", "a release leaves as one vector of its length")
    # In local mode these very numbers leave; in secure-sum these very numbers must not.
    plain = message.blobs["values"] == released.values.astype("<i8").tobytes()
    if plain != (permit.mode == "local"):
        raise ProtocolError("GATE-MASK", "the bytes are not the release in the form its trust mode asks for")


def _check_fields(value: Any, depth: int = 0) -> None:
    """Fields are words and small integers of the protocol: no floats, nothing long, nothing nested deeply."""
    if depth > 6 or not isinstance(value, (str, int, list, dict, type(None))) or isinstance(value, bool):
        raise ProtocolError("GATE-FIELD", "a field of a type that does not leave")
    if (isinstance(value, str) and len(value) > MAX_TEXT) or (isinstance(value, int) and abs(value) > MAX_NUMBER):
        raise ProtocolError("GATE-FIELD", "a field that is too long to leave")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_fields(key, depth + 1)
            _check_fields(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_fields(item, depth + 1)

"""The guard: the hospital's process that owns records, keys and ledger. Envelope in, envelope out.

It answers the releases of a plan that its officer approved, each once. All of its state is on disk before an
answer leaves, so it may be killed between any two instructions and opened again, in this process or another.
Whatever goes wrong, the outside learns one code of `CODES`; the words stay in the site's own log.

A run begins with three messages: `run.hello`, answered by a checkpoint of a ledger that just got a line with a nonce;
`run.witness`, in which this site confirms the others' ledgers; `run.start`, in which it gets their confirmation of its
own and counts it. Before that no question is answered (common/privacy/witness.py says how many it takes, and why).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cohortium.client.approval import PAUSED, approval_files, load_approved
from cohortium.client.gate import Gate
from cohortium.client.loading import load_records
from cohortium.client.policy import Policy
from cohortium.client.vault import Vault
from cohortium.client.witness import MAX_NOTE, Witness
from cohortium.common.encoding import Records, grids
from cohortium.common.errors import CohortiumError, ProtocolError, Refused
from cohortium.common.logs import entry
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.entropy import (
    Entropy,
    Material,
    Purpose,
    SeededEntropy,
    SystemEntropy,
    patient_uniforms,
)
from cohortium.common.privacy.ledger import CLOCK_SLACK_S, Ledger
from cohortium.common.privacy.release import Released, release
from cohortium.common.proposals import COORDINATOR, Proposal
from cohortium.common.protocol.channels import ChannelKeys, Directory, open_channel
from cohortium.common.protocol.fixedpoint import to_ring
from cohortium.common.protocol.messages import Message, canonical, content_digest, digest, unseal
from cohortium.common.protocol.round_messages import RevealRequest, Roster, RoundParams, SurvivorSet
from cohortium.common.protocol.secure_sum import Phase, SiteRound
from cohortium.common.protocol.signing import load_private, public_from_raw
from cohortium.common.queries import Part, from_wire

CODES = {
    # first letters of an error's code -> what the outside may learn
    "MSG": "BAD-ENVELOPE",
    "WIRE": "BAD-ENVELOPE",
    "QUERY": "BAD-QUERY",
    "PLAN": "BAD-PLAN",
    "PROPOSAL": "BAD-PLAN",
    "GUARD": "REFUSED",
    "POLICY": "REFUSED-POLICY",
    "GATE": "REFUSED",
    "CAP": "REFUSED-CAP",
    "LEDGER": "REFUSED-LEDGER",
    # The site's disk or its past is not what it should be; which of them, and how, is for its own people.
    "WITNESS": "REFUSED-LEDGER",
    "VAULT": "REFUSED-LEDGER",
    "CHECKPOINT": "BAD-ENVELOPE",
    "CLOCK": "REFUSED-CLOCK",
    "APPROVAL": "REFUSED",
    "GUARD-PAUSED": "REFUSED-PAUSED",
    "SUM": "BAD-ROUND",
    "RELEASE": "BAD-QUERY",
    "NETWORK": "BAD-QUERY",
    "FIXED": "BAD-ROUND",
    # One word for whatever the table is like, too few patients included: which of them it is stays at the site.
    "TABLE": "REFUSED-DATA",
    "DICT": "REFUSED-DATA",
    "DATA": "REFUSED-DATA",
    "SOURCE": "REFUSED-DATA",
    "POLICY-PATIENTS": "REFUSED-DATA",
}
INTERNAL = "GUARD-INTERNAL"
_STARTED = frozenset({"run.prepare", "run.ask", "run.survivors", "run.reveal"})
"""What is answered only in a run that witnesses let begin."""
MOST_LOG_BYTES = 16 * 1024 * 1024
_WORD = re.compile(r"[A-Z][A-Z-]{2,39}")


def open_guard(directory: Path) -> Guard:
    """The guard of a site's directory; keeps its ledger open (one process per site)."""
    return Guard(directory)


def open_shared_guard(directory: Path) -> Guard:
    """The same, but lets the ledger go after every message: engines that move a site between processes."""
    return Guard(directory, shared=True)


class Guard:
    """One hospital. `handle` is the whole interface."""

    def __init__(self, directory: Path, *, shared: bool = False) -> None:
        self._directory = Path(directory)
        self._read_settings()
        self._key = load_private(self._directory / "site.key")
        self._shared = shared
        self._ledger: Ledger | None = None
        self._vault: Vault | None = None
        self._witness: Witness | None = None
        self._proposal: Proposal | None = None
        self._approval: tuple[tuple[int, int, int], ...] = ()  # the approval's files, as they were when they were read
        self._records: dict[str, dict[Part, Records]] = {}
        self._opened: tuple[Proposal, bytes, bytes, X25519PrivateKey, Directory] | None = None
        self._thread = threading.Lock()

    @property
    def site(self) -> str:
        return self._policy.name

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, also where one fails
            for opened in (self._ledger, self._vault, self._witness):
                if opened is not None:
                    stack.callback(opened.close)
            self._ledger = self._vault = self._witness = None

    def handle(self, envelope: bytes) -> bytes:
        """Answer one envelope of the coordinator. Never raises for what the outside sent; never explains."""
        with self._thread:
            try:
                with self._alone():
                    answer = self._answer(envelope)
            except OSError as error:  # not even the lock can be had
                answer = self._refuse(INTERNAL, *_failure(error))
            self._count(answer)
            return answer

    def _read_settings(self) -> None:
        stamp = _stamp(self._directory)
        self._policy = Policy.load(self._directory / "site.toml")
        self._coordinator = public_from_raw(bytes.fromhex(self._policy.coordinator_key))
        seed = self._policy.rehearsal.seed if self._policy.rehearsal else None
        self._entropy: Entropy = SystemEntropy() if seed is None else SeededEntropy(seed=seed, site=self.site)
        self._settings = stamp

    def _take_up_settings(self) -> None:
        """What the officer changes in site.toml or officer.pub holds from the next message on: a lower cap, another
        key. A file that cannot be read refuses every message until it can."""
        if _stamp(self._directory) != self._settings:
            self._forget()
            self._read_settings()

    def _answer(self, envelope: bytes) -> bytes:
        try:
            self._take_up_settings()
            message = unseal(envelope, self._coordinator, sender=COORDINATOR)
            return self._dispatch(message)
        except CohortiumError as error:
            code = CODES.get(error.code) or CODES.get(error.code.split("-")[0], INTERNAL)
            return self._refuse(code, error.code, error.sentence)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            return self._refuse("BAD-ENVELOPE", type(error).__name__, "a message's field is missing or malformed")
        except Exception as error:  # no memory, a full disk, a bug: the words may hold data, so only the class
            self._forget()
            return self._refuse(INTERNAL, *_failure(error))
        finally:
            if self._shared:
                self._forget_files()

    def _forget(self) -> None:
        """Let go of all that is in memory: after a failure only the disk is true. What was reserved burns."""
        self._proposal = self._opened = None
        self._records = {}
        self._forget_files()

    def _forget_files(self) -> None:
        # A full disk may keep the ledger's last line from being written; without it the same bytes are sent again.
        with contextlib.suppress(Exception):
            self.close()

    # ---- messages -------------------------------------------------------------------------------------------

    def _dispatch(self, message: Message) -> bytes:
        if os.path.lexists(self._directory / PAUSED):
            raise Refused("GUARD-PAUSED", "this site is paused", hint="cohortium site unpause")
        fields = message.fields
        proposal = self._approved(fields["run"])
        handlers = {
            "run.hello": self._hello,
            "run.witness": self._cosign,
            "run.start": self._start,
            "run.prepare": self._prepare,
            "run.ask": self._ask,
            "run.survivors": self._survivors,
            "run.reveal": self._reveal,
            "run.finish": self._finish,
        }
        if message.kind not in handlers:
            raise ProtocolError("MSG-KIND", "a guard does not know that kind of message")
        self._ledger_().check_clock()
        if "mirrored" in fields and _int(message, "mirrored") > self._ledger_().head().size:
            raise Refused(
                "LEDGER-BEHIND",
                "the coordinator has more lines of this ledger than there are here: an older one was put back",
                hint="bring the newest ledger back, or enrol anew with a new key",
            )
        if message.kind in _STARTED:
            self._check_started(proposal.run)
        return handlers[message.kind](proposal, message)

    def _hello(self, proposal: Proposal, message: Message) -> bytes:
        self._check_past(message)
        channel = None
        if proposal.plan.mode == "secure-sum" and not self._closed(proposal.run):
            private = self._vault_().get(f"channel/{proposal.run}")
            material = Material(private or self._entropy.key(Purpose(label="channel", run=proposal.run, release=0)))
            _, public = open_channel(run_id=proposal.run, site=self.site, identity=self._key, entropy=material)
            if private is None:
                self._store({f"channel/{proposal.run}": material.key})
            channel = public.to_message().fields
        # The table is read and checked now: a hospital that cannot take part says so before anything is charged.
        self._load(proposal)
        if self._policy.rehearsal is not None:
            self._gate().rehearse(proposal.run)
        checkpoint = self._gate().starts(proposal.run, proposal.plan)
        others = {site: public for site, public in proposal.identities.items() if site != self.site}
        fields = {
            "run": proposal.run,
            "plan": proposal.plan.digest,
            "lines": self._lines(message),
            "channel": channel,
            "checkpoint": checkpoint,
            "witnessed": self._witness_().sizes(others),
        }
        return self._gate().send(Message(kind="site.hello", sender=self.site, fields=fields))

    def _check_past(self, message: Message) -> None:
        """Is this the ledger that this site signed for before, and is it today? Before a line is written or a record
        read. The proof is the site's own signature, which the coordinator kept; nobody else can have made it."""
        at, seen, ledger = message.fields.get("at"), message.fields.get("seen"), self._ledger_()
        if at is not None and abs(_whole(at) - int(time.time())) > CLOCK_SLACK_S:
            raise Refused(
                "CLOCK-SKEW",
                "this machine's clock and the coordinator's are more than a day apart",
                hint="set this machine's clock by a time server; if it is right, tell the coordinator",
            )
        if seen is None:
            return
        if not isinstance(seen, str) or len(seen) > MAX_NOTE:
            raise ProtocolError("MSG-FIELD", "a checkpoint is a short text")
        known = chain.verify_checkpoint(seen, self._key.public_key(), owner=self.site)
        if known.size > ledger.head().size:
            raise Refused(
                "LEDGER-ROLLBACK",
                f"this site signed for {known.size} lines before, and its ledger has {ledger.head().size}",
                hint="an older ledger was put back: bring the newest one back, or enrol anew with a new key",
            )
        if ledger.hash_at(known.size) != known.hash:
            raise Refused(
                "LEDGER-FORK",
                f"this site signed for another line {known.size - 1} before: its ledger was copied and both were used",
                hint="stop the copy; only the one that the coordinator has seen may go on",
            )

    def _cosign(self, proposal: Proposal, message: Message) -> bytes:
        """Confirm the others' ledgers, each that is no shorter than before and goes on from where it stood."""
        proofs = {n.removeprefix("proof/"): b for n, b in message.blobs.items() if n.startswith("proof/")}
        found = self._witness_().examine(
            message.fields["checkpoints"], proofs, identities=proposal.identities, own=self.site
        )
        for site, code in found.refused.items():
            self._note(code, f"the ledger of {site!r} was not confirmed")
        gate = self._gate()
        signatures = {site: gate.cosign(head, proposal.identities[site]) for site, head in found.heads.items()}
        fields = {"run": proposal.run, "signatures": signatures, "refused": found.refused}
        return gate.send(Message(kind="site.witnessed", sender=self.site, fields=fields))

    def _start(self, proposal: Proposal, message: Message) -> bytes:
        """Count who confirmed the checkpoint of the newest hello; with enough, the run may begin here."""
        head, plan, public = self._gate().begun(proposal.run), proposal.plan, self._key.public_key()
        signatures, refused = message.fields["signatures"], message.fields["refused"]
        said = "".join(
            f"; {site}: {code}"
            for site, code in sorted(refused.items())
            if site in {COORDINATOR, *plan.sites} and _WORD.fullmatch(code)
        )
        if not witness.cosigned(
            head, signatures.get(COORDINATOR), owner=public, witness=COORDINATOR, public=self._coordinator
        ):
            raise Refused("WITNESS-COORDINATOR", f"the coordinator did not confirm this ledger{said}")
        others = {site: key for site, key in proposal.identities.items() if site != self.site}
        count = sum(
            witness.cosigned(head, signatures.get(site), owner=public, witness=site, public=key)
            for site, key in others.items()
        )
        # In `local` mode a plan names no colluders; whom this hospital does not trust is its own policy's word.
        colluders = max(plan.colluders, self._policy.minimum_colluders)
        enough = witness.needed(sites=len(plan.sites), colluders=colluders)
        if count < enough:
            raise Refused("WITNESS-FEW", f"{count} other sites confirmed this ledger, {enough} are needed{said}")
        self._store({f"start/{proposal.run}": f"{head.size} {head.hash}".encode()})
        return self._gate().send(Message(kind="site.started", sender=self.site, fields={"run": proposal.run}))

    def _check_started(self, run: str) -> None:
        """The confirmed start holds, over restarts too, as long as the ledger goes on from it."""
        kept = self._vault_().get(f"start/{run}")
        if kept is None or not self._goes_on_from(kept):
            raise Refused("WITNESS-START", "no witnesses have confirmed this site's ledger in this run")

    def _goes_on_from(self, kept: bytes) -> bool:
        size, _, line_hash = kept.decode().partition(" ")
        return self._ledger_().hash_at(int(size)) == line_hash

    def _prepare(self, proposal: Proposal, message: Message) -> bytes:
        if "channels" in message.fields:
            keys = ChannelKeys.from_message(
                Message(kind="sum.channels", sender=COORDINATOR, fields=message.fields["channels"])
            )
            self._set_channels(proposal, keys)
        if self._closed(proposal.run):
            raise ProtocolError("SUM-PHASE", "this run is over here, and its keys are gone")
        round_ = self._new_round(proposal, _int(message, "index"), _int(message, "dim"))
        said = round_.prepare(self._material(proposal.run, round_.params.round))
        self._keep(round_)
        return self._gate().send(said.to_message())

    def _ask(self, proposal: Proposal, message: Message) -> bytes:
        index, plan = _int(message, "index"), proposal.plan
        blobs = {n.removeprefix("query/"): b for n, b in message.blobs.items() if n.startswith("query/")}
        query = from_wire(message.fields["kind"], message.fields["query"], blobs)
        question = content_digest(message.fields["kind"], message.fields["query"], blobs)
        asked = digest(canonical([question, message.fields.get("roster")]))
        state = self._ledger_().state(proposal.run, str(index))
        if state != "NONE":
            return self._again(proposal.run, index, asked, state)
        round_ = None
        if plan.mode == "secure-sum":
            round_ = self._round(proposal, index)
            if round_.phase is not Phase.PREPARED or round_.params.dim != query.dim:
                raise ProtocolError("SUM-PHASE", "this site is not prepared for that round and length")
        codes = [grid.size for grid in grids(proposal.schema)]
        if proposal.run not in self._records:  # what is refused is refused before the table is opened
            self._gate().check(plan=plan, index=index, query=query, codes=codes)
        records = self._load(proposal)[query.part]
        permit = self._gate().open(plan=plan, run=proposal.run, index=index, query=query, codes=codes)
        released = release(
            query=query,
            records=records,
            mechanism=permit.stage.mechanism(shares=plan.shares),
            entropy=self._entropy,
            run=proposal.run,
            index=index,
            head=permit.head,
        )
        if round_ is not None:
            leaving = self._masked(round_, released, message, question)
        else:
            fields = {
                "run": proposal.run,
                "index": index,
                "lattice": released.lattice.hex(),
                "lines": self._lines(message),
            }
            values = released.values.astype("<i8").tobytes()
            leaving = Message(kind="site.noised", sender=self.site, fields=fields, blobs={"values": values})
        envelope = self._gate().send(leaving, permit=permit, released=released)
        kept: dict[str, bytes | None] = {"sealed": envelope, "asked": f"{proposal.run}/{index}/{asked}".encode()}
        if round_ is not None:
            kept[_round_name(round_.params)] = round_.to_state()
        self._store(kept)
        self._gate().sealed(permit, envelope)
        if round_ is None:
            self._gate().released(proposal.run, index)
        return envelope

    def _again(self, run: str, index: int, asked: str, state: str) -> bytes:
        """The same question again gets the same sealed bytes, never a second draw; any other is refused."""
        if (
            state in ("SEALED", "UNMASKED", "RELEASED")
            and self._vault_().get("asked") == f"{run}/{index}/{asked}".encode()
        ):
            envelope = self._vault_().get("sealed")
            # The digest that the release was sealed with is the ledger's word on which bytes those are.
            if envelope is not None and self._ledger_().digest(run, str(index)) == digest(envelope):
                return envelope
        raise Refused("GUARD-ONCE", "this release was answered before, or was lost in a crash and stays charged")

    def _masked(self, round_: SiteRound, released: Released, message: Message, question: str) -> Message:
        peers = {n.removeprefix("roster/"): b for n, b in message.blobs.items() if n.startswith("roster/")}
        roster = Roster.from_message(
            Message(kind="sum.roster", sender=COORDINATOR, fields=message.fields["roster"], blobs=peers)
        )
        vector = to_ring(released.values, parties=len(round_.params.sites))
        return round_.mask(roster, vector, question=question).to_message()

    def _survivors(self, proposal: Proposal, message: Message) -> bytes:
        index = _int(message, "index")
        round_ = self._round(proposal, index)
        chosen = SurvivorSet.from_message(
            Message(kind="sum.survivors", sender=COORDINATOR, fields=message.fields["survivors"])
        )
        vote = round_.sign_survivors(chosen)
        # The ledger first: it refuses a second set even where an older vault was put back over this one.
        self._gate().voted(proposal.run, index, ballot=vote.ballot)
        self._keep(round_)
        return self._gate().send(vote.to_message())

    def _reveal(self, proposal: Proposal, message: Message) -> bytes:
        index, run = _int(message, "index"), proposal.run
        asked = digest(json.dumps([index, message.fields["reveal"]], sort_keys=True).encode()).encode()
        if self._closed(run):
            # The last answer of a run that is over: the same request gets the same bytes, and no key is needed.
            answer = self._vault_().get(f"last/{run}")
            if answer is None or self._vault_().get(f"closed/{run}") != asked:
                raise ProtocolError("SUM-PHASE", "this run is over here, and its keys are gone")
            return answer
        round_ = self._round(proposal, index)
        request = RevealRequest.from_message(
            Message(kind="sum.reveal", sender=COORDINATOR, fields=message.fields["reveal"])
        )
        revealed = round_.reveal(request)
        kept: dict[str, bytes | None] = {_round_name(round_.params): round_.to_state()}
        prepared, blobs = None, {}
        if message.fields.get("next") is not None:
            # The next round's keys ride on this answer and save an exchange.
            next_index, dim = (_whole(v) for v in message.fields["next"])
            following = self._new_round(proposal, next_index, dim)
            said = following.prepare(self._material(run, next_index)).to_message()
            prepared, blobs = said.fields, said.blobs
            kept[_round_name(following.params)] = following.to_state()
        # Rounds before this one are over, also those that this site dropped out of: their secrets go.
        done = [f"round/{run}/{i}" for i in range(index)]
        kept |= dict.fromkeys(set(done) & set(self._vault_().names(f"round/{run}/")))
        self._store(kept)
        if self._ledger_().state(run, str(index)) != "RELEASED":
            self._gate().released(run, index, ballot=request.chosen.digest())
        fields = {"revealed": revealed.to_message().fields, "lines": self._lines(message), "prepared": prepared}
        answer = self._gate().send(Message(kind="site.revealed", sender=self.site, fields=fields, blobs=blobs))
        if index == proposal.plan.releases - 1:
            self._erase(run, asked=asked, last=answer)
        return answer

    def _erase(self, run: str, *, asked: bytes = b"", last: bytes | None = None) -> None:
        """Forget a run's keys for ever: with them, what was recorded on the way could still be opened years later.

        last: the last answer, kept because the coordinator may have died before it arrived; it holds no secret.
        """
        vault = self._vault_()
        names = [*vault.names(f"round/{run}/"), f"channel/{run}", f"channels/{run}"]
        closed: dict[str, bytes | None] = {f"closed/{run}": asked, f"last/{run}": last}
        self._store(dict.fromkeys(names) | closed)
        self._opened = None

    def _closed(self, run: str) -> bool:
        return self._vault_().get(f"closed/{run}") is not None

    def _finish(self, proposal: Proposal, message: Message) -> bytes:
        run, last = proposal.run, str(proposal.plan.releases - 1)
        self._ledger_().flush()
        if proposal.plan.mode == "secure-sum":
            # An interrupted run says farewell too and goes on later: its keys stay until the coordinator says that
            # this was the end, or the plan's last release is over here.
            over = self._ledger_().state(run, last) in ("RELEASED", "BURNED", "VOID")
            if message.fields.get("final") is True or (over and not self._closed(run)):
                self._erase(run)
        self._ledger_().export(self._directory / "ledger.jsonl")
        fields = {"run": run, "lines": self._lines(message), "checkpoint": self._ledger_().checkpoint()}
        return self._gate().send(Message(kind="site.finished", sender=self.site, fields=fields))

    # ---- what the guard owns --------------------------------------------------------------------------------

    def _approved(self, run: Any) -> Proposal:
        # An approval that the officer takes back, by removing its files, ends with the next message.
        files = approval_files(self._directory, str(run))
        if self._proposal is None or self._proposal.run != run or self._approval != files:
            self._proposal = None
            found = load_approved(self._directory, self._policy, str(run))
            self._policy.check(found.plan)  # again: what an officer signed by mistake is not read a record for
            self._proposal, self._approval = found, files
        return self._proposal

    def _load(self, proposal: Proposal) -> dict[Part, Records]:
        if proposal.run not in self._records:
            plan = proposal.plan
            records = load_records(
                self._directory, self._policy, schema=proposal.schema, unit=plan.unit, exclude=proposal.exclude
            )
            self._check_table(proposal.run, records)
            records = dataclasses.replace(records, full_rows=plan.rows_per_patient)
            held = held_out(records, study=plan.study, share=plan.holdout)
            self._records = {proposal.run: {"train": records.subset(~held), "holdout": records.subset(held)}}
        return self._records[proposal.run]

    def _check_table(self, run: str, records: Records) -> None:
        """One run, one table: its releases are priced as looks at the same patients."""
        found = _digest_of(records)
        known = self._vault_().get(f"table/{run}")
        if known is None:
            self._store({f"table/{run}": found})
        elif known != found:
            raise Refused(
                "TABLE-CHANGED",
                "the table is not the one that this run began with",
                hint="put the table of the run's beginning back, or ask the coordinator for a new run",
            )

    def _ledger_(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger.open(self._directory / "ledger.db", self._key)
            kept = self._vault_().get(self._head_name)
            if kept is not None and not self._goes_on_from(kept):
                self.close()
                raise Refused(
                    "LEDGER-ROLLBACK",
                    "the guard's memory names a line that its ledger does not have: one of the two was put back",
                    where=(str(self._directory),),
                    hint="bring the newest ledger back, or enrol anew with a new key",
                )
        return self._ledger

    def _store(self, values: Mapping[str, bytes | None]) -> None:
        """Put into the vault, with the ledger's head at this moment: of ledger and vault neither can go back alone."""
        head = self._ledger_().head()
        self._vault_().put({**values, self._head_name: f"{head.size} {head.hash}".encode()})

    @property
    def _head_name(self) -> str:
        # A ledger belongs to its key: after a change of keys the new one owes nothing to the old one's head.
        return f"ledger/{self._key.public_key().public_bytes_raw().hex()[:16]}"

    def _witness_(self) -> Witness:
        if self._witness is None:
            self._witness = Witness(self._directory / "witness.db")
        return self._witness

    def _vault_(self) -> Vault:
        if self._vault is None:
            self._vault = Vault(self._directory / "vault.db")
        return self._vault

    def _gate(self) -> Gate:
        return Gate(policy=self._policy, ledger=self._ledger_(), key=self._key)

    def _lines(self, message: Message) -> list[dict[str, Any]]:
        """The signed ledger lines that the coordinator's mirror does not have yet."""
        self._ledger_().flush()
        return [line.to_json() for line in self._ledger_().lines(_int(message, "mirrored"))]

    def _set_channels(self, proposal: Proposal, keys: ChannelKeys) -> None:
        """The run's channel keys are fixed by the first list that is signed in order; another is refused."""
        Directory.verified(run_id=proposal.run, identities=proposal.identities, keys=keys.keys)
        packed = json.dumps(keys.to_message().fields, sort_keys=True).encode()
        known = self._vault_().get(f"channels/{proposal.run}")
        if known is not None and known != packed:
            raise ProtocolError("SUM-KEY", "this run already has other channel keys")
        if known is None:
            self._store({f"channels/{proposal.run}": packed})

    def _directory_of(self, proposal: Proposal) -> tuple[X25519PrivateKey, Directory]:
        packed, key = self._vault_().get(f"channels/{proposal.run}"), self._vault_().get(f"channel/{proposal.run}")
        if packed is None or key is None:
            raise ProtocolError("SUM-PHASE", "this run has no channel keys yet")
        # The same bytes on disk under the same proposal were verified before.
        if self._opened is not None and self._opened[0] is proposal and self._opened[1:3] == (packed, key):
            return self._opened[3:]
        fields = json.loads(packed)
        keys = ChannelKeys.from_message(Message(kind="sum.channels", sender=COORDINATOR, fields=fields))
        channel, _ = open_channel(run_id=proposal.run, site=self.site, identity=self._key, entropy=Material(key))
        found = Directory.verified(run_id=proposal.run, identities=proposal.identities, keys=keys.keys)
        self._opened = (proposal, packed, key, channel, found)
        return channel, found

    def _new_round(self, proposal: Proposal, index: int, dim: int) -> SiteRound:
        """A round's state: the one on disk where it exists, so that its keys are drawn once."""
        plan = proposal.plan
        stage = plan.stage_of(index)
        if plan.mode != "secure-sum" or not 1 <= dim <= stage.max_dim:
            raise ProtocolError("SUM-PARAMS", "no secure sum of that length in this plan")
        params = RoundParams(
            run_id=proposal.run,
            round=index,
            sites=plan.sites,
            survivors=plan.survivors,
            colluders=plan.colluders,
            dim=dim,
        )
        channel, directory = self._directory_of(proposal)
        state = self._vault_().get(_round_name(params))
        if state is not None:
            known = SiteRound.from_state(state, identity=self._key, channel=channel, directory=directory)
            if known.params == params:
                return known
            if known.phase is not Phase.PREPARED:
                raise ProtocolError("SUM-PHASE", "this round is under way with another length")
        return SiteRound(params=params, site=self.site, identity=self._key, channel=channel, directory=directory)

    def _round(self, proposal: Proposal, index: int) -> SiteRound:
        state = self._vault_().get(f"round/{proposal.run}/{index}")
        if state is None:
            raise ProtocolError("SUM-PHASE", "this site did not prepare that round")
        channel, directory = self._directory_of(proposal)
        return SiteRound.from_state(state, identity=self._key, channel=channel, directory=directory)

    def _keep(self, round_: SiteRound) -> None:
        self._store({_round_name(round_.params): round_.to_state()})

    def _material(self, run: str, index: int) -> Material:
        return Material(self._entropy.key(Purpose(label="masks", run=run, release=index)))

    # ---- failures -------------------------------------------------------------------------------------------

    def _refuse(self, code: str, local_code: str, sentence: str) -> bytes:
        self._note(local_code, sentence, code=code)
        gate = Gate(policy=self._policy, ledger=None, key=self._key)  # the ledger may be what failed
        return gate.send(Message(kind="site.refused", sender=self.site, fields={"code": code}))

    def _note(self, local_code: str, sentence: str, *, code: str = "") -> None:
        """A line in the site's own log."""
        facts: dict[str, Any] = {"local": local_code, **({"sent": code} if code else {})}
        line = entry("GUARD-REFUSED" if code else "GUARD-NOTED", sentence, site=self.site, **facts)
        self._log("guard.log", line.json())

    def _count(self, answer: bytes) -> None:
        """A line about an envelope that is handed out: when, kind, run, how many bytes; none of its words."""
        header = json.loads(answer[8 : 8 + int.from_bytes(answer[4:8], "big")])
        facts = {"kind": header["kind"], "run": header["fields"].get("run", ""), "bytes": len(answer)}
        self._log("sent.log", json.dumps({"at": int(time.time()), **facts, "sha256": digest(answer)}))

    def _log(self, name: str, line: str) -> None:
        # A full disk must not turn a refusal into an exception with words.
        path = self._directory / name
        with contextlib.suppress(OSError):
            if path.exists() and path.stat().st_size > MOST_LOG_BYTES:  # refusals alone shall not fill the disk
                os.replace(path, path.with_name(f"{name}.1"))
            with open(path, "a", encoding="utf-8") as log:
                log.write(line + "\n")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One message at a time per site, over all processes; the system lets the lock go with the process."""
        lock = os.open(self._directory / "guard.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def held_out(records: Records, *, study: str, share: float) -> np.ndarray:
    """bool [patients]: who is kept for evaluation."""
    return is_held_out(records.identity, study=study, share=share)


def is_held_out(identity: np.ndarray, *, study: str, share: float) -> np.ndarray:
    """bool [patients]: a public function of a patient's identity alone, so that both parts are disjoint for ever."""
    if share <= 0:
        return np.zeros(len(identity), dtype=bool)
    key = hashlib.sha256(b"cohortium/holdout/1\x00" + study.encode()).digest()
    return patient_uniforms(key, identity) < np.uint64(int(share * 2**64))


def _digest_of(records: Records) -> bytes:
    """SHA-256 of everything in a table that a query can see. Stays in the vault."""
    sha = hashlib.sha256()
    for array in (records.codes, records.patient, records.identity, records.rows_per_patient):
        sha.update(f"{array.dtype.str} {array.shape}\x00".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.digest()


def _stamp(directory: Path) -> tuple[tuple[int, int, int] | None, ...]:
    """What the system says of the files that hold the officer's word."""
    found: list[tuple[int, int, int] | None] = []
    for name in ("site.toml", "officer.pub"):
        try:
            status = os.stat(directory / name)
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except FileNotFoundError:
            found.append(None)
    return tuple(found)


def _failure(error: Exception) -> tuple[str, str]:
    """(local code, sentence) of what the guard did not foresee, without a word of the error's own text."""
    name = getattr(error, "sqlite_errorname", None) if isinstance(error, sqlite3.Error) else None
    if isinstance(error, OSError) and error.errno is not None:
        name = errno.errorcode.get(error.errno)
    if name is not None:
        return f"DISK-{name}", "the guard's disk is full, read-only or damaged; nothing is answered until it is not"
    return type(error).__name__, "the guard failed; it starts again from its disk"


def _round_name(params: RoundParams) -> str:
    return f"round/{params.run_id}/{params.round}"


def _int(message: Message, name: str) -> int:
    return _whole(message.fields[name])


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ProtocolError("MSG-FIELD", "a field should be an integer of at least 0")
    return value

"""An officer's approval of one plan for one run: what the guard needs before it answers anything.

A proposal is an envelope signed by the coordinator: plan, run, the sites' public keys, the dictionary. The officer
approves it by a signature; both lie in the site's directory under approved/RUN/ and are verified at every start.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.client.policy import Policy
from cohortium.common.errors import ProtocolError, Refused
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import Message, digest, unseal
from cohortium.common.protocol.signing import (
    load_private,
    load_public,
    public_from_raw,
    sign_statement,
    verify_statement,
)
from cohortium.common.schema import Schema

COORDINATOR = "coordinator"
PURPOSE = "plan-approval"
_RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What the coordinator signed."""

    run: str
    plan: Plan
    identities: dict[str, Ed25519PublicKey]
    schema: Schema
    exclude: tuple[str, ...]  # columns that a table may have and the study leaves out
    envelope: bytes


def proposal_message(
    *, run: str, plan: Plan, identities: dict[str, str], schema: Schema, exclude: tuple[str, ...] = ()
) -> Message:
    """The proposal before it is sealed. identities: site -> hex of its Ed25519 key."""
    return Message(
        kind="study.proposal",
        sender=COORDINATOR,
        fields={"run": run, "plan": plan.to_json(), "identities": identities, "exclude": list(exclude)},
        blobs={"dictionary": json.dumps(schema.to_dict(), sort_keys=True).encode()},
    )


def read_proposal(envelope: bytes, coordinator: Ed25519PublicKey) -> Proposal:
    """A proposal, verified: signed by this coordinator, and plan, dictionary and keys fit together."""
    message = unseal(envelope, coordinator, sender=COORDINATOR)
    if message.kind != "study.proposal":
        raise ProtocolError("PROPOSAL-FORM", "not a proposal")
    try:
        run, plan = message.fields["run"], Plan.from_json(message.fields["plan"])
        schema = Schema.from_dict(json.loads(message.blobs["dictionary"]))
        exclude = tuple(str(name) for name in message.fields["exclude"])
        identities = {s: public_from_raw(bytes.fromhex(k)) for s, k in message.fields["identities"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise ProtocolError("PROPOSAL-FORM", "the proposal cannot be read") from None
    if not (isinstance(run, str) and _RUN.fullmatch(run)):
        raise ProtocolError("PROPOSAL-FORM", "a run's id is lower-case letters, digits and dashes")
    if schema.digest() != plan.dictionary_digest:
        raise ProtocolError("PROPOSAL-DICTIONARY", "the dictionary is not the one that the plan names")
    if set(identities) != set(plan.sites):
        raise ProtocolError("PROPOSAL-SITES", "the proposal's keys are not those of the plan's sites")
    if len({key.public_bytes_raw() for key in identities.values()}) != len(identities):
        # One party under two names would sign two votes and hold two shares.
        raise ProtocolError("PROPOSAL-KEYS", "two sites of the proposal have the same key")
    return Proposal(run=run, plan=plan, identities=identities, schema=schema, exclude=exclude, envelope=envelope)


def approve(site: Path, envelope: bytes, officer: Ed25519PrivateKey, *, check_table: bool = True) -> Proposal:
    """Check a proposal against the site's policy and put the officer's signature beside it.

    check_table: read the site's table as the guard will, so that the officer meets what is wrong with it, and in
    words, before the coordinator can learn by a refusal that something is. False where that was done already.
    """
    policy = Policy.load(site / "site.toml")
    proposal = read_proposal(envelope, public_from_raw(bytes.fromhex(policy.coordinator_key)))
    policy.check(proposal.plan)
    policy.check_peers(proposal.identities)
    if load_private(site / "site.key").public_key() != proposal.identities[policy.name]:
        raise Refused(
            "PROPOSAL-OWN-KEY",
            "the proposal gives this site another key than its own",
            hint="send the coordinator this site's public key again",
        )
    # The officer approves an ε; the guard will answer stages. Here they are held against each other.
    if proposal.plan.private and proposal.plan.price() > proposal.plan.epsilon * (1 + 1e-9):
        raise Refused("PROPOSAL-PRICE", "the plan's releases cost more than the epsilon that it states")
    folder = site / "approved" / proposal.run
    # A run's id names keys and charges: what was approved under it is never exchanged for something else.
    if (folder / "proposal.bin").exists() and (folder / "proposal.bin").read_bytes() != envelope:
        raise Refused(
            "PROPOSAL-EXISTS",
            "another proposal was approved here under this run's id",
            where=(str(folder),),
            hint="ask the coordinator for a new run",
        )
    if check_table:
        from cohortium.client.loading import load_records

        load_records(site, policy, schema=proposal.schema, unit=proposal.plan.unit, exclude=proposal.exclude)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "proposal.bin").write_bytes(envelope)
    (folder / "approval.sig").write_bytes(sign_statement(officer, PURPOSE, _statement(policy.name, proposal)))
    return proposal


def approval_files(site: Path, run: str) -> tuple[tuple[int, int, int], ...]:
    """What the system says of an approval's files: they are there, and are those that were read before."""
    if not _RUN.fullmatch(run):
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here")
    try:
        found = [os.stat(site / "approved" / run / name) for name in ("proposal.bin", "approval.sig")]
    except OSError:
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here") from None
    return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in found)


def load_approved(site: Path, policy: Policy, run: str) -> Proposal:
    """The approved proposal of a run; Refused GUARD-NOT-APPROVED without the officer's valid signature."""
    if not _RUN.fullmatch(run):
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here")
    folder = site / "approved" / run
    try:
        envelope, signature = (folder / "proposal.bin").read_bytes(), (folder / "approval.sig").read_bytes()
    except OSError:
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here") from None
    proposal = read_proposal(envelope, public_from_raw(bytes.fromhex(policy.coordinator_key)))
    officer = load_public(site / "officer.pub")
    verify_statement(officer, PURPOSE, _statement(policy.name, proposal), signature, code="GUARD-NOT-APPROVED")
    policy.check_peers(proposal.identities)
    if proposal.run != run:
        raise Refused("GUARD-NOT-APPROVED", "the approval is for another run")
    return proposal


def _statement(site: str, proposal: Proposal) -> dict[str, str]:
    return {"site": site, "run": proposal.run, "plan": proposal.plan.digest, "proposal": digest(proposal.envelope)}

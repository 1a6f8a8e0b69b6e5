"""A study proposed to hospitals: what the coordinator signs, and what an officer's signature stands under."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import Message, digest, unseal
from cohortium.common.protocol.signing import public_from_raw
from cohortium.common.schema import Schema

COORDINATOR = "coordinator"
KIND = "study.proposal"
APPROVAL = "plan-approval"
"""The purpose that an officer signs for."""
_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def is_run_id(name: str) -> bool:
    """Whether a run may be called this; it names folders, so it can lead nowhere else."""
    return bool(_RUN_ID.fullmatch(name))


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
    *, run: str, plan: Plan, identities: Mapping[str, str], schema: Schema, exclude: Iterable[str] = ()
) -> Message:
    """The proposal before it is sealed. identities: site -> hex of its Ed25519 key."""
    return Message(
        kind=KIND,
        sender=COORDINATOR,
        fields={"run": run, "plan": plan.to_json(), "identities": dict(identities), "exclude": list(exclude)},
        blobs={"dictionary": json.dumps(schema.to_dict(), sort_keys=True).encode()},
    )


def read_proposal(envelope: bytes, coordinator: Ed25519PublicKey) -> Proposal:
    """A proposal, verified: signed by this coordinator, and plan, dictionary and keys fit together."""
    message = unseal(envelope, coordinator, sender=COORDINATOR)
    if message.kind != KIND:
        raise ProtocolError("PROPOSAL-FORM", "not a proposal")
    try:
        run, plan = message.fields["run"], Plan.from_json(message.fields["plan"])
        schema = Schema.from_dict(json.loads(message.blobs["dictionary"]))
        exclude = tuple(str(name) for name in message.fields["exclude"])
        identities = {s: public_from_raw(bytes.fromhex(k)) for s, k in message.fields["identities"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise ProtocolError("PROPOSAL-FORM", "the proposal cannot be read") from None
    if not (isinstance(run, str) and is_run_id(run)):
        raise ProtocolError("PROPOSAL-FORM", "a run's id is lower-case letters, digits and dashes")
    if schema.digest() != plan.dictionary_digest:
        raise ProtocolError("PROPOSAL-DICTIONARY", "the dictionary is not the one that the plan names")
    if set(identities) != set(plan.sites):
        raise ProtocolError("PROPOSAL-SITES", "the proposal's keys are not those of the plan's sites")
    if len({key.public_bytes_raw() for key in identities.values()}) != len(identities):
        # One party under two names would sign two votes and hold two shares.
        raise ProtocolError("PROPOSAL-KEYS", "two sites of the proposal have the same key")
    return Proposal(run=run, plan=plan, identities=identities, schema=schema, exclude=exclude, envelope=envelope)


def approval_statement(site: str, proposal: Proposal) -> dict[str, Any]:
    """What an officer of `site` approves; the site adds when, and until when."""
    return {"site": site, "run": proposal.run, "plan": proposal.plan.digest, "proposal": digest(proposal.envelope)}

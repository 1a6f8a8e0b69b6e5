"""What the officer's commands and the hospital's page do alike: get a proposal, sign it and tell, say no and tell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.client.site import Site
from cohortium.common.errors import Refused, UsageError
from cohortium.common.proposals import Proposal, read_proposal
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.signing import public_from_raw

if TYPE_CHECKING:
    from cohortium.client.deciding import Decided
    from cohortium.client.inspection import Inspection


def verified(site: Site, envelope: bytes) -> Proposal:
    """A proposal that this site's coordinator signed; ProtocolError for any other."""
    return read_proposal(envelope, public_from_raw(bytes.fromhex(site.policy().coordinator_key)))


def fetch(site: Site, run: str | None, file: Path | None = None) -> tuple[Proposal, str]:
    """A verified proposal, of a file or of the coordinator, and the coordinator's word about its state ("": a file)."""
    from cohortium.client import calls

    if file is not None:
        try:
            envelope, state = file.read_bytes(), ""
        except OSError:
            raise UsageError("PROPOSAL-FILE", "the proposal's file cannot be read", where=(str(file),)) from None
    else:
        offered = calls.proposal(site, str(run))
        envelope, state = offered.envelope, offered.state
    proposal = verified(site, envelope)
    if run is not None and proposal.run != run:
        raise Refused("PROPOSAL-RUN", f"this is a proposal for run {proposal.run!r}", hint="name that run")
    return proposal, state


def approve(
    site: Site,
    found: Inspection,
    officer: Ed25519PrivateKey,
    *,
    expires: int,
    pin_peers: bool = False,
    tell: bool = True,
) -> tuple[Decided, bool]:
    """Approve what was inspected. (what lies on disk now, whether the coordinator was told).

    tell: say it to the coordinator, where the approval is complete and the enrolled officer is among the signers.
    """
    from cohortium.client import calls, deciding

    decided = deciding.decide(site, found, officer, expires=expires, pin_peers=pin_peers)
    told = decided.complete and decided.notice is not None and tell
    if told and decided.notice is not None:
        named = digest(found.proposal.envelope)
        calls.say_approved(site, run=found.proposal.run, proposal=named, signature=decided.notice)
    return decided, told


def decline(site: Site, proposal: Proposal, *, tell: bool = True) -> bool:
    """Take an approval back where there is one (what is returned), and say no to the coordinator."""
    from cohortium.client import calls
    from cohortium.client.approval import withdraw

    taken_back = withdraw(site.guard, proposal.run)
    if tell:
        named = digest(proposal.envelope)
        calls.say_approved(site, run=proposal.run, proposal=named, signature=b"", declined=True)
    return taken_back

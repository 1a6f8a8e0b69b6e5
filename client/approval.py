"""An officer's approval of one plan for one run: what the guard needs before it answers anything.

A proposal is an envelope signed by the coordinator: plan, run, the sites' public keys, the dictionary. The officer
approves it by a signature over site, run, plan, proposal and expiry. Both lie under approved/RUN/:
    proposal.bin   the envelope, byte for byte
    approval.sig   JSON: the statement, and each officer's signature over it
    notice.sig     the enrolled officer's signature for the coordinator
Signatures are verified whenever a file has changed; expiry, the pause and the clock are asked at every message.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.client.policy import Policy
from cohortium.common.errors import ProtocolError, Refused, UsageError
from cohortium.common.modes import make_like_parent, write_private
from cohortium.common.privacy.chain import is_hex
from cohortium.common.proposals import APPROVAL, Proposal, approval_statement, is_run_id, read_proposal
from cohortium.common.protocol.messages import canonical
from cohortium.common.protocol.signing import (
    load_private,
    load_public,
    public_from_raw,
    sign_statement,
    verify_statement,
)

PAUSED = "paused"
"""While a file of this name lies in the guard's directory, the guard refuses everything."""
DAY_S = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Approval:
    """What approval.sig holds. at, expires: seconds since 1970; expires 0: never (rehearsals)."""

    statement: dict[str, Any]
    signatures: dict[str, str]  # hex of an officer's key -> hex of the signature

    @property
    def at(self) -> int:
        return int(self.statement["at"])

    @property
    def expires(self) -> int:
        return int(self.statement["expires"])

    def over(self, now: int) -> bool:
        return self.expires != 0 and now >= self.expires

    def to_bytes(self) -> bytes:
        return canonical({"statement": self.statement, "signatures": self.signatures}) + b"\n"

    @classmethod
    def from_bytes(cls, raw: bytes) -> Approval:
        """Its form only; ProtocolError GUARD-NOT-APPROVED for anything else."""
        try:
            value = json.loads(raw)
            statement, signatures = value["statement"], value["signatures"]
            fits = set(statement) == {"site", "run", "plan", "proposal", "at", "expires"}
            fits = fits and all(type(statement[name]) is int and statement[name] >= 0 for name in ("at", "expires"))
            fits = fits and all(is_hex(k, 32) and is_hex(v, 64) for k, v in signatures.items())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise ProtocolError("GUARD-NOT-APPROVED", "the approval's file cannot be read")
        return cls(statement=statement, signatures=signatures)

    def signers(self, officers: Mapping[str, Ed25519PublicKey]) -> list[str]:
        """Hex of the officers whose signatures fit."""
        found = []
        for name, public in officers.items():
            if name in self.signatures:
                signature = bytes.fromhex(self.signatures[name])
                try:
                    verify_statement(public, APPROVAL, self.statement, signature, code="GUARD-NOT-APPROVED")
                except ProtocolError:
                    continue
                found.append(name)
        return found


def officers_of(site: Path, policy: Policy) -> dict[str, Ed25519PublicKey]:
    """Who may approve here: site.toml's list, or the one key in officer.pub."""
    if policy.officers is not None:
        return {key: public_from_raw(bytes.fromhex(key)) for key in policy.officers}
    public = load_public(site / "officer.pub")
    return {public.public_bytes_raw().hex(): public}


def check_proposal(site: Path, envelope: bytes, *, check_table: bool = True) -> Proposal:
    """A proposal held against everything that this site demands, as `approve` does it; nothing is written.

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
    return proposal


def approve(
    site: Path,
    envelope: bytes,
    officer: Ed25519PrivateKey,
    *,
    check_table: bool = True,
    expires: int = 0,
    now: int | None = None,
) -> Proposal:
    """Check a proposal against the site's policy and put the officer's signature beside it.

    expires: seconds since 1970; 0 is never, for rehearsals. Where several officers must sign, a later one signs what
    the first one wrote, its expiry included. Raises Refused APPROVAL-OFFICER for a key that is no officer's here.
    """
    at = int(time.time()) if now is None else now
    policy = Policy.load(site / "site.toml")
    proposal = check_proposal(site, envelope, check_table=check_table)
    officers = officers_of(site, policy)
    signer = officer.public_key().public_bytes_raw().hex()
    if signer not in officers:
        raise Refused(
            "APPROVAL-OFFICER",
            "this key is not an officer's of this site",
            hint="sign with the key of officer.pub, or list the key in [policy] officers",
        )
    if expires != 0 and expires <= at:
        raise UsageError("APPROVAL-EXPIRED", "the approval would be over before it begins", hint="--expires 30d")
    folder = site / "approved" / proposal.run
    approval = _open_statement(folder, proposal, policy, officers, signer, at)
    if approval is None:
        said = approval_statement(policy.name, proposal) | {"at": at, "expires": expires}
        approval = Approval(statement=said, signatures={})
    signature = sign_statement(officer, APPROVAL, approval.statement).hex()
    signed = Approval(statement=approval.statement, signatures={**approval.signatures, signer: signature})
    # Whole files, put in place at once: the guard may look at any moment.
    make_like_parent(make_like_parent(folder.parent) / folder.name)
    write_private(folder / "proposal.bin", envelope)
    write_private(folder / "approval.sig", signed.to_bytes())
    if officer.public_key() == load_public(site / "officer.pub"):
        write_private(
            folder / "notice.sig", sign_statement(officer, APPROVAL, approval_statement(policy.name, proposal))
        )
    return proposal


def notice(site: Path, run: str) -> bytes | None:
    """The enrolled officer's signature that the coordinator is shown: 64 bytes, or None where another one signed.

    It stands under site, run, plan and proposal only: for the guard it is no approval, because that has its times.
    """
    try:
        return (site / "approved" / run / "notice.sig").read_bytes()
    except OSError:
        return None


def _open_statement(
    folder: Path,
    proposal: Proposal,
    policy: Policy,
    officers: Mapping[str, Ed25519PublicKey],
    signer: str,
    now: int,
) -> Approval | None:
    """An approval that other officers have signed and that waits for this one."""
    try:
        found = Approval.from_bytes((folder / "approval.sig").read_bytes())
    except (OSError, ProtocolError):
        return None
    signers = found.signers(officers)
    waiting = signer not in signers and 0 < len(signers) < policy.officers_needed
    same = approval_statement(policy.name, proposal).items() <= found.statement.items()
    return found if waiting and same and not found.over(now) else None


def withdraw(site: Path, run: str) -> bool:
    """Take an approval back; it ends with the guard's next message. What was charged stays. False: there was none."""
    if not is_run_id(run):
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here")
    path = site / "approved" / run / "approval.sig"
    if not path.exists():
        return False
    os.replace(path, path.with_name("approval.withdrawn"))
    return True


def approvals(site: Path) -> dict[str, Approval | None]:
    """Every run that was ever approved here; None: taken back, or its file cannot be read."""
    found: dict[str, Approval | None] = {}
    for folder in sorted((site / "approved").glob("*/")):
        try:
            found[folder.name] = Approval.from_bytes((folder / "approval.sig").read_bytes())
        except (OSError, ProtocolError):
            found[folder.name] = None
    return found


def approval_files(site: Path, run: str, *, now: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """What the system says of an approval's files: they are there, and are those that were read before.

    Asked at every message. Raises Refused: GUARD-PAUSED while hospital IT has stopped the guard; GUARD-NOT-APPROVED
    without the files, or once the approval has expired; CLOCK-BACK when the clock is before the approval.
    """
    if not is_run_id(run):
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here")
    if os.path.lexists(site / PAUSED):
        raise Refused("GUARD-PAUSED", "this site is paused", hint="cohortium site unpause")
    folder = site / "approved" / run
    try:
        found = [os.stat(folder / name) for name in ("proposal.bin", "approval.sig")]
        approval = Approval.from_bytes((folder / "approval.sig").read_bytes())
    except OSError:
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here") from None
    clock = int(time.time()) if now is None else now
    if approval.over(clock):
        raise Refused("GUARD-NOT-APPROVED", "the approval of this run has expired", hint="cohortium site approve")
    refuse_clock(clock, not_before=approval.at)
    return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in found)


def load_approved(site: Path, policy: Policy, run: str, *, now: int | None = None) -> Proposal:
    """The approved proposal of a run; Refused GUARD-NOT-APPROVED without enough officers' valid signatures."""
    if not is_run_id(run):
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here")
    folder = site / "approved" / run
    try:
        envelope, signed = (folder / "proposal.bin").read_bytes(), (folder / "approval.sig").read_bytes()
    except OSError:
        raise Refused("GUARD-NOT-APPROVED", "no such run was approved here") from None
    approval = Approval.from_bytes(signed)
    proposal = read_proposal(envelope, public_from_raw(bytes.fromhex(policy.coordinator_key)))
    said = approval_statement(policy.name, proposal) | {"at": approval.at, "expires": approval.expires}
    if approval.statement != said:
        raise ProtocolError("GUARD-NOT-APPROVED", "the approval is for another site, run or proposal")
    if len(approval.signers(officers_of(site, policy))) < policy.officers_needed:
        raise ProtocolError("GUARD-NOT-APPROVED", "the officers' signatures under the approval are missing or wrong")
    policy.check_peers(proposal.identities)
    if proposal.run != run:
        raise Refused("GUARD-NOT-APPROVED", "the approval is for another run")
    clock = int(time.time()) if now is None else now
    if approval.over(clock):
        raise Refused("GUARD-NOT-APPROVED", "the approval of this run has expired", hint="cohortium site approve")
    refuse_clock(clock, not_before=approval.at)
    return proposal


def refuse_clock(now: int, *, not_before: int) -> None:
    """Raise Refused CLOCK-BACK when the clock is more than a day before the officer signed.

    A clock that was set back would give an expired approval its life again. The ledger asks the same of its lines.
    """
    if now < not_before - DAY_S:
        raise Refused(
            "CLOCK-BACK",
            "the clock of this machine is more than a day before this run's approval",
            hint="set the clock (timedatectl set-ntp true) and start again",
        )

"""What the officer and hospital IT decide: approve, decline, pause, leave, pin the peers' keys."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.client import calls
from cohortium.client.approval import Approval, approvals, approve, notice, officers_of, withdraw
from cohortium.client.inspection import Inspection
from cohortium.client.policy import Policy
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.common.modes import write_private
from cohortium.common.protocol.messages import digest
from cohortium.common.study import toml_text

_SPAN = re.compile(r"([1-9][0-9]{0,4})([hdw])")
_UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
LONGEST_S = 366 * 86_400


def seconds(span: str) -> int:
    """ "12h", "30d" or "8w" in seconds, at most a year; UsageError APPROVE-EXPIRES."""
    match = _SPAN.fullmatch(span)
    length = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < length <= LONGEST_S:
        raise UsageError(
            "APPROVE-EXPIRES", "an approval holds for some hours, days or weeks, a year at most", hint="--expires 30d"
        )
    return length


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """An approval as it lies on disk now. notice: what the coordinator is shown; None: the enrolled officer did not
    sign."""

    run: str
    expires: int
    signed_by: tuple[str, ...]
    needed: int
    notice: bytes | None

    @property
    def complete(self) -> bool:
        return len(self.signed_by) >= self.needed

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "expires": self.expires,
            "signed_by": list(self.signed_by),
            "officers_needed": self.needed,
            "complete": self.complete,
        }


def refuse_objections(found: Inspection, *, pin_peers: bool = False) -> None:
    """Raise the first thing that forbids an approval, by the policy or by the cap."""
    for error in found.objections:
        if not (pin_peers and error.code == "POLICY-PEERS"):
            raise error
    if not found.fits and found.proposal.plan.private:
        raise Refused(
            "APPROVE-CAP",
            "this run would pass the hospital's lifetime cap: the guard would refuse in the middle of it",
            left=f"{max(0.0, 1 - found.now.used):.1%} of the cap is left",
            hint="ask for a study with a smaller epsilon; [policy] lifetime_epsilon is the officer's to raise",
        )


def decide(
    site: Site, found: Inspection, officer: Ed25519PrivateKey, *, expires: int, pin_peers: bool = False
) -> Decided:
    """Sign, after everything that `approve` checks, the table included. pin_peers: first, so that it is checked too."""
    run = found.proposal.run
    before = site.policy_path.read_bytes()
    if pin_peers:
        if found.proposal.plan.sites and officer.public_key().public_bytes_raw().hex() not in officers_of(
            site.guard, found.policy
        ):
            raise Refused("APPROVAL-OFFICER", "this key is not an officer's of this site")
        pin(site, found)
    try:
        approve(site.guard, found.proposal.envelope, officer, expires=expires)
    except BaseException:
        if pin_peers:
            write_private(site.policy_path, before)  # nothing was approved, so nothing is pinned either
        raise
    policy = site.policy()
    signed = Approval.from_bytes((site.guard / "approved" / run / "approval.sig").read_bytes())
    return Decided(
        run=run,
        expires=signed.expires,
        signed_by=tuple(signed.signers(officers_of(site.guard, policy))),
        needed=policy.officers_needed,
        notice=notice(site.guard, run),
    )


def pin(site: Site, found: Inspection) -> None:
    """Write the keys of a run's other sites into [policy] peers, beside those that are there; comments stay.

    Refused POLICY-PEERS where a name that is known has another key now: that is for a person to look at.
    """
    policy = site.policy()
    keys = dict(policy.peers or ())
    for name, key in found.proposal.identities.items():
        text = key.public_bytes_raw().hex()
        if name == policy.name:
            continue
        if keys.get(name, text) != text:
            raise Refused(
                "POLICY-PEERS",
                f"{name!r} has another key than the one that was pinned",
                where=(str(site.policy_path),),
                hint="compare its fingerprint by telephone; if it rotated its key, correct the line by hand",
            )
        keys[name] = text
    wanted = replace(policy, peers=tuple(sorted(keys.items())))
    pairs = ", ".join(f"{toml_text(name)} = {toml_text(key)}" for name, key in sorted(keys.items()))
    line = f"peers = {{{pairs}}}"
    text = site.policy_path.read_text(encoding="utf-8")
    kept = re.sub(r"(?m)^peers *=.*\n?", "", text)
    edited = re.sub(r"(?m)^\[policy\][^\n]*$", lambda found: f"{found[0]}\n{line}", kept, count=1)
    old = site.policy_path.read_bytes()
    write_private(site.policy_path, edited.encode())
    try:
        if Policy.load(site.policy_path) == wanted:
            return
    except CohortiumError:
        pass
    write_private(site.policy_path, old)
    raise UsageError(
        "PIN-PEERS", "site.toml could not be edited", where=(str(site.policy_path),), hint=f"under [policy]: {line}"
    )


def pause(site: Site) -> None:
    """The guard refuses everything from the next message on."""
    write_private(site.paused, f"{int(time.time())}\n".encode())


def unpause(site: Site) -> None:
    site.paused.unlink(missing_ok=True)


def leave(site: Site, *, tell: bool) -> dict[str, Any]:
    """End every approval, refuse everything, tell the coordinator no to each open proposal. Ledger and keys stay."""
    withdrawn = [run for run in approvals(site.guard) if withdraw(site.guard, run)]
    pause(site)
    write_private(site.left, f"{int(time.time())}\n".encode())
    told, why = False, ""
    if tell:
        try:
            for offered in calls.proposals(site):
                if offered.state != "declined":
                    _decline(site, offered)
            told = True
        except (CohortiumError, OSError) as error:
            why = error.code if isinstance(error, CohortiumError) else type(error).__name__
    return {"withdrawn": withdrawn, "told": told, "why": why, "ledger": os.fspath(site.guard / "ledger.db")}


def _decline(site: Site, offered: calls.Offered) -> None:
    try:
        calls.say_approved(site, run=offered.run, proposal=digest(offered.envelope), signature=b"", declined=True)
    except Refused:  # a run that is under way no longer asks; the withdrawn approval ends it here
        return

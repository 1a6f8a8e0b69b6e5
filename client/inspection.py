"""What a proposal would take out of this hospital, what it costs, and what is left: for the officer's eyes.

Everything here is computed from the proposal, site.toml and the ledger; no record is read. The lifetime cap is a
Renyi filter at one order (common/privacy/accountant), so it is shown as a share used up, beside the ε that the
ledger's events have together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cohortium.client.approval import Approval, officers_of
from cohortium.client.policy import Policy
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.cap import private
from cohortium.common.privacy.chain import REHEARSAL
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import Proposal
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.signing import fingerprint

Charges = Sequence[tuple[Event, int]]
KINDS = {
    "counts": "noised counts of patients in bins",
    "moments": "noised sums of bounded features of patients",
    "gradient": "a noised sum of clipped gradients",
    "tallies": "noised counts of patients in bins made from several columns",
    "sums": "noised sums of clipped features of patients",
    "estimates": "a noised sum of clipped scores of a regression",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """How a ledger stands against its site's lifetime cap. epsilon: at the cap's δ; used: share of the cap, 0 to 1."""

    epsilon: float
    used: float
    non_private: bool

    def to_json(self) -> dict[str, Any]:
        shown = "inf" if math.isinf(self.epsilon) else self.epsilon
        return {"epsilon": shown, "cap_used": min(self.used, 1e9), "non_private": self.non_private}


def account(policy: Policy, charges: Charges) -> Account:
    """The account of some charges under a policy's cap."""
    charges = list(charges)
    return Account(
        epsilon=epsilon(charges, delta=policy.lifetime_delta, hospitals=policy.hospitals),
        used=policy.cap.used(charges),
        non_private=any(event.kind == "non-private" for event, _ in charges),
    )


def fits(policy: Policy, charges: Charges) -> bool:
    """Whether all charges together stay inside the cap, by the rule of the gate."""
    return policy.cap.allows(private(charges))


def read_charges(site: Site) -> list[tuple[Event, int]]:
    with Ledger.open(site.guard / "ledger.db") as ledger:
        return ledger.charged_events()


def was_rehearsed(site: Site, charged: Charges) -> bool:
    """Whether this ledger ever held a rehearsal: the gate then refuses everything under a real policy."""
    with Ledger.open(site.guard / "ledger.db") as ledger:
        noted = any(note["about"] == REHEARSAL for note in ledger.book.notes)
    return noted or any(event.kind == "non-private" for event, _ in charged)


def unanswered(site: Site, proposal: Proposal) -> list[tuple[Event, int]]:
    """What a run would still charge here: the releases of its plan that its ledger does not hold yet."""
    with Ledger.open(site.guard / "ledger.db") as ledger:
        left = []
        for stage in proposal.plan.stages:
            open_ = sum(
                ledger.state(proposal.run, str(index)) == "NONE"
                for index in range(stage.first, stage.first + stage.repeats)
            )
            left.append((stage.event, open_ * stage.steps))
        return left


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """All that `site inspect` prints."""

    proposal: Proposal
    policy: Policy
    now: Account
    after: Account
    fits: bool
    objections: tuple[CohortiumError, ...]
    approval: Approval | None
    signers: tuple[str, ...]
    state: str = ""  # the coordinator's word: open, approved, declined; "" for a proposal from a file

    def peers(self) -> list[dict[str, str]]:
        """Every site of the run: name, fingerprint, and whether this hospital knows the key."""
        known = None if self.policy.peers is None else dict(self.policy.peers)
        found = []
        for name, key in sorted(self.proposal.identities.items()):
            if name == self.policy.name:
                word = "this site"
            elif known is None:
                word = "not pinned"
            else:
                word = "known" if known.get(name) == key.public_bytes_raw().hex() else "UNKNOWN"
            found.append({"site": name, "fingerprint": fingerprint(key), "known": word})
        return found

    def to_json(self) -> dict[str, Any]:
        plan = self.proposal.plan
        return {
            "run": self.proposal.run,
            "study": plan.study,
            "state": self.state,
            "proposal": digest(self.proposal.envelope),
            "plan": plan.digest,
            "generator": plan.generator,
            "mode": plan.mode,
            "unit": plan.unit,
            "rows_per_patient": plan.rows_per_patient,
            "columns": [column.name for column in self.proposal.schema.columns],
            "left_out": list(self.proposal.exclude),
            "leaves": leaves(plan),
            "bytes_at_most": plan.bytes_per_site(),
            "statement": plan.statement().sentence(),
            "run_epsilon": plan.price() if plan.private else "inf",
            "run_delta": plan.delta,
            "cap": {"epsilon": self.policy.lifetime_epsilon, "delta": self.policy.lifetime_delta},
            "charged_now": self.now.to_json(),
            "charged_after": self.after.to_json(),
            "fits": self.fits,
            "sites": self.peers(),
            "objections": [error.as_json() for error in self.objections],
            "approval": None
            if self.approval is None
            else {"at": self.approval.at, "expires": self.approval.expires, "signed_by": list(self.signers)},
        }


def leaves(plan: Plan) -> list[dict[str, Any]]:
    """Each stage of a plan as what leaves by it. numbers: at most, a release; bytes: at most, the stage."""
    cumulated = {stage.name: value for stage, value in plan.cumulated()} if plan.private else {}
    return [
        {
            "stage": stage.name,
            "what": KINDS[stage.kind],
            "why": stage.purpose,
            "patients": "held out" if stage.part == "holdout" else "training",
            "releases": stage.repeats,
            "numbers": stage.max_dim,
            "bytes": 8 * stage.max_dim * stage.repeats,
            "noise_multiplier": stage.noise_multiplier,
            "sampling_rate": stage.event.probability if plan.private else 1.0,
            "epsilon_so_far": cumulated.get(stage.name, "inf"),
        }
        for stage in plan.stages
    ]


def inspect(site: Site, proposal: Proposal, *, state: str = "") -> Inspection:
    """Hold a verified proposal against this site's policy and ledger. Objections are collected, not raised."""
    policy = site.policy()
    objections: list[CohortiumError] = []
    checks: list[Callable[[], None]] = [
        partial(policy.check, proposal.plan),
        partial(policy.check_peers, proposal.identities),
    ]
    for check in checks:
        try:
            check()
        except CohortiumError as error:
            objections.append(error)
    charged = read_charges(site)
    if policy.rehearsal is None and was_rehearsed(site, charged):
        objections.append(
            Refused(
                "GATE-CAP",
                "something was computed here without noise, or with noise from a seed: the guard will refuse",
                hint="a rehearsal's ledger is not a hospital's: start with a new site directory",
            )
        )
    more = unanswered(site, proposal)
    after = [*charged, *more]
    approval: Approval | None = None
    signers: tuple[str, ...] = ()
    try:
        folder = site.guard / "approved" / proposal.run
        approval = Approval.from_bytes((folder / "approval.sig").read_bytes())
        signers = tuple(approval.signers(officers_of(site.guard, policy)))
    except (OSError, CohortiumError):
        approval = None
    return Inspection(
        proposal=proposal,
        policy=policy,
        now=account(policy, charged),
        after=account(policy, after),
        fits=fits(policy, after),
        objections=tuple(objections),
        approval=approval,
        signers=signers,
        state=state,
    )

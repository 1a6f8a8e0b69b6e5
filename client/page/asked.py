"""What is asked next: open proposals, a plan in words, and what is different from the last plan that was approved."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cohortium.client.inspection import KINDS, Inspection
from cohortium.client.page.ledger_view import Papers, approved_at
from cohortium.client.proposals import verified
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.privacy.budget import WHOLE, rounded_up
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.proposals import Proposal, is_run_id
from cohortium.common.protocol.signing import fingerprint

FRESH_S = 30.0
MOST_FILES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One verified proposal. state: the coordinator's word; "" for one from a file."""

    proposal: Proposal
    state: str


@dataclass
class Offers:
    """The coordinator's open proposals, asked for when somebody looks; and those from files. One lock."""

    site: Site
    clock: Callable[[], float] = time.monotonic
    _found: dict[str, Offer] = field(default_factory=dict)
    _wrong: tuple[str, ...] = ()
    _at: float | None = None
    _files: dict[str, Offer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self, *, fresh: bool = False) -> tuple[list[Offer], tuple[str, ...]]:
        """(proposals, runs whose proposal is not this coordinator's). Raises as calls.proposals does."""
        from cohortium.client import calls

        with self._lock:
            if fresh or self._at is None or self.clock() - self._at > FRESH_S:
                found, wrong = {}, []
                for offered in calls.proposals(self.site):
                    try:
                        proposal = verified(self.site, offered.envelope)
                    except CohortiumError:
                        wrong.append(offered.run)
                        continue
                    if proposal.run != offered.run:
                        wrong.append(offered.run)
                        continue
                    found[offered.run] = Offer(proposal=proposal, state=offered.state)
                self._found, self._wrong, self._at = found, tuple(wrong), self.clock()
            return list(self._found.values()), self._wrong

    def known(self) -> list[Offer]:
        """What is known without asking anybody."""
        with self._lock:
            return [*self._found.values(), *(o for run, o in self._files.items() if run not in self._found)]

    def has(self, run: str) -> bool:
        """Whether a proposal is known without asking anybody."""
        return run in self._files or run in self._found

    def one(self, run: str) -> Offer:
        """UsageError RUN-UNKNOWN where neither the coordinator nor a file has it."""
        if not is_run_id(run):
            raise _unknown(run)
        if run in self._files:
            return self._files[run]
        for fresh in (False, True):
            self.all(fresh=fresh)
            if run in self._found:
                break
        else:
            raise _unknown(run)
        return self._found[run]

    def add(self, envelope: bytes) -> Proposal:
        """A proposal from a file, verified; kept until the page ends."""
        proposal = verified(self.site, envelope)
        with self._lock:
            if len(self._files) >= MOST_FILES:
                self._files.pop(next(iter(self._files)))
            self._files[proposal.run] = Offer(proposal=proposal, state="")
        return proposal

    def forget(self) -> None:
        """After an action: ask again."""
        self._at = None


def _unknown(run: str) -> UsageError:
    return UsageError("RUN-UNKNOWN", "there is no open proposal of that name", hint="look at what is asked next")


# ---- the plan in words --------------------------------------------------------------------------------------


def in_words(plan: Plan, *, site: str) -> list[str]:
    """A plan as sentences that an officer can hold against a letter."""
    whom = "each row" if plan.unit == "row" else f"each patient (column {plan.unit}, all of a patient's rows together)"
    said = [
        f"Study {plan.study}: {plan.rows:,} synthetic patients, made by the generator {plan.generator}.",
        f"It protects {whom}, who may have records in {_count(plan.hospitals, 'hospital')}.",
        f"Who takes part: {', '.join(plan.sites)}. This hospital is {site}.",
    ]
    if plan.mode == "secure-sum":
        said.append(
            f"Trust mode secure-sum: the coordinator sees the sum of all hospitals only. {plan.survivors} of "
            f"{len(plan.sites)} have to stay to the end of a round, and up to {plan.colluders} may side with the "
            "coordinator."
        )
    else:
        said.append("Trust mode local: this hospital's noise protects by itself, whoever else is dishonest.")
    said += [f"{stage_in_words(stage)}." for stage in plan.stages]
    if plan.holdout:
        said.append(f"{plan.holdout:.0%} of the patients are held out of training and are asked for scores only.")
    if plan.rows_per_patient > 1:
        said.append(f"The first {plan.rows_per_patient} rows of a patient count in full.")
    said.append(
        f"Together at most ε = {rounded_up(plan.price())} at δ = {plan.delta:g}."
        if plan.private
        else "There is no noise in it: it is a rehearsal and protects nobody."
    )
    return said


def stage_in_words(stage: Stage) -> str:
    often = "once" if stage.repeats == 1 else f"{stage.repeats:,} times"
    who = "of held-out patients" if stage.part == "holdout" else "of training patients"
    some = "" if stage.rate == WHOLE else f", a random {stage.rate / WHOLE:.1%} of them each time"
    return (
        f"{stage.name}: {KINDS[stage.kind]}, {often}, {who}{some}, at most {stage.max_dim:,} numbers, "
        f"noise {stage.noise_multiplier:.3g} times what one patient can change ({stage.purpose})"
    )


def _count(number: int, thing: str) -> str:
    return f"one {thing}" if number == 1 else f"{number} {thing}s"


# ---- what is different --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """what, then and now as texts. weaker: whether this hospital's patients are protected less by it; None: neither."""

    what: str
    before: str
    after: str
    weaker: bool | None = None


def last_approved(site: Site, papers: Papers, proposal: Proposal) -> tuple[Proposal, int] | None:
    """The newest approved proposal of the same study under another run, and when it was approved."""
    found = [
        (approved_at(site, other.run), other)
        for other in papers.proposals.values()
        if other.plan.study == proposal.plan.study and other.run != proposal.run
    ]
    if not found:
        return None
    at, newest = max(found, key=lambda pair: (pair[0], pair[1].run))
    return newest, at


def differences(old: Proposal, new: Proposal) -> list[Difference]:
    """Everything of the plan, the columns and the hospitals' keys that is not as it was."""
    found = _values(old.plan, new.plan)
    found += _sites(old, new)
    found += _stages(old.plan, new.plan)
    before, after = set(old.schema.names), set(new.schema.names)
    if before != after:
        found += [Difference(what="columns added", before="", after=", ".join(sorted(after - before)), weaker=True)] * (
            after - before != set()
        )
        found += [Difference(what="columns removed", before=", ".join(sorted(before - after)), after="")] * (
            before - after != set()
        )
    elif old.plan.dictionary_digest != new.plan.dictionary_digest:
        found.append(
            Difference(
                what="dictionary", before=_short(old.plan.dictionary_digest), after=_short(new.plan.dictionary_digest)
            )
        )
    if set(old.exclude) != set(new.exclude):
        left = [", ".join(sorted(one.exclude)) or "none" for one in (old, new)]
        found.append(Difference(what="columns left out", before=left[0], after=left[1]))
    return found


def _values(old: Plan, new: Plan) -> list[Difference]:
    """Plain settings. A third part: whether a larger value protects less (True) or more (False)."""
    shown: tuple[tuple[str, str, bool | None, Callable[[Plan], object]], ...] = (
        ("ε of the study", "{:g}", True, lambda plan: plan.epsilon),
        ("δ", "{:g}", True, lambda plan: plan.delta),
        ("generator", "{}", None, lambda plan: plan.generator),
        ("trust mode", "{}", None, lambda plan: plan.mode),
        ("hospitals that must stay", "{}", None, lambda plan: plan.survivors),
        ("hospitals that may collude", "{}", False, lambda plan: plan.colluders),
        ("unit", "{}", None, lambda plan: plan.unit),
        ("hospitals of one patient", "{}", False, lambda plan: plan.hospitals),
        ("held out", "{:.0%}", None, lambda plan: plan.holdout),
        ("synthetic patients", "{:,}", None, lambda plan: plan.rows),
        ("rows of a patient that count in full", "{}", None, lambda plan: plan.rows_per_patient),
    )
    found = []
    for what, form, larger_is_weaker, value in shown:
        before, after = value(old), value(new)
        if before != after:
            weaker = None if larger_is_weaker is None else (after > before) == larger_is_weaker  # type: ignore[operator]
            found.append(Difference(what=what, before=form.format(before), after=form.format(after), weaker=weaker))
    return found


def _sites(old: Proposal, new: Proposal) -> list[Difference]:
    before, after = _prints(old), _prints(new)
    found = [Difference(what="hospital joins", before="", after=name) for name in sorted(after.keys() - before.keys())]
    found += [
        Difference(what="hospital leaves", before=name, after="") for name in sorted(before.keys() - after.keys())
    ]
    found += [
        Difference(what=f"key of {name}", before=before[name], after=after[name])
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    return found


def _prints(proposal: Proposal) -> Mapping[str, str]:
    return {name: fingerprint(key) for name, key in proposal.identities.items()}


def _stages(old: Plan, new: Plan) -> list[Difference]:
    before, after = ({stage.name: stage for stage in plan.stages} for plan in (old, new))
    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        then, now = before.get(name), after.get(name)
        if then is None and now is not None:
            found.append(Difference(what=f"stage {name}", before="", after=stage_in_words(now), weaker=True))
        elif now is None and then is not None:
            found.append(Difference(what=f"stage {name}", before=stage_in_words(then), after="", weaker=False))
        elif then is not None and now is not None and _bare(then) != _bare(now):
            found.append(Difference(what=f"stage {name}", before=stage_in_words(then), after=stage_in_words(now)))
    return found


def _bare(stage: Stage) -> dict[str, object]:
    return {name: value for name, value in stage.to_json().items() if name != "first"}


def _short(text: str) -> str:
    return text[:12]


# ---- what it costs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Shares of the lifetime cap, 0 to 1 and above; ε at the cap's δ as it is printed."""

    before: float
    after: float
    epsilon_before: float
    epsilon_after: float
    fits: bool


def bars(found: Inspection) -> Bars:
    return Bars(
        before=found.now.used,
        after=found.after.used,
        epsilon_before=found.now.epsilon,
        epsilon_after=found.after.epsilon,
        fits=found.fits,
    )

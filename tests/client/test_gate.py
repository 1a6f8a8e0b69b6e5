"""The door: what is refused costs nothing, what leaves was charged, and nothing leaves in another form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pytest
from hospital import RUN, counts, gradient, key, moments, people, plan, policy, sizes, stage

from cohortium.client.gate import CARRIES_RECORDS, CARRIES_SHARES, MAX_TEXT, OUTBOUND, Gate, Permit
from cohortium.client.policy import Rehearsal
from cohortium.common.errors import CohortiumError, ProtocolError, Refused
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.cap import Cap
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.privacy.release import Released
from cohortium.common.protocol.channels import SEALED_BYTES
from cohortium.common.protocol.messages import Message, digest, unseal
from cohortium.common.queries import AnyQuery, LocalSteps


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger.db", "a", key("a"), clock=lambda: 0) as made:
        yield made


def gate(ledger: Ledger, **options: Any) -> Gate:
    return Gate(policy=policy("a", **options), ledger=ledger, key=key("a"))


def opened(ledger: Ledger, agreed: Plan, query: AnyQuery, *, index: int = 0, **options: Any) -> Permit:
    return gate(ledger, **options).open(plan=agreed, run=RUN, index=index, query=query, codes=sizes())


# ---- open ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        checks.check_a_release_is_charged_on_disk_before_it_is_computed,
        checks.check_the_lifetime_cap_counts_what_was_spent_before,
        checks.check_the_cap_is_always_counted_for_the_policys_number_of_hospitals,
        checks.check_whether_a_question_is_answered_does_not_depend_on_the_records,
    ],
    ids=lambda check: check.__name__,
)
def test_guarantee(check: Callable[[], None]) -> None:
    checks.passes(check)


def test_a_permit_names_the_charge(ledger: Ledger) -> None:
    permit = opened(ledger, plan(), counts())
    assert ledger.state(RUN, "0") == "RESERVED" and permit.head == ledger.head().hash
    assert ledger.charged_events() == [(Event.gaussian(20.0), 1)]
    assert ledger.lines()[-1].body["plan"] == plan().digest


LOCAL = LocalSteps(steps=3, learning_rate=0.1, denominator=10.0)
STEPS = stage("one", "gradient", 0, steps=3)
REFUSED: dict[str, tuple[str, Plan, AnyQuery, dict[str, Any]]] = {
    "another kind": ("GATE-NOT-IN-PLAN", plan(), moments(), {}),
    "another part": ("GATE-NOT-IN-PLAN", plan(), counts(part="holdout"), {}),
    "no steps where the plan has some": ("GATE-NOT-IN-PLAN", plan(stages=[STEPS]), gradient(), {}),
    "steps where the plan has none": (
        "GATE-NOT-IN-PLAN",
        plan(stages=[stage("one", "gradient", 0)]),
        gradient(local=LOCAL),
        {},
    ),
    "steps in a secure sum": (
        "GATE-NOT-IN-PLAN",
        plan(("a", "b", "c"), mode="secure-sum", stages=[STEPS]),
        gradient(local=LOCAL),
        {},
    ),
    "a larger answer": ("GATE-SIZE", plan(stages=[stage("one", "counts", 0, max_dim=110)]), counts(), {}),
    "an index beyond the plan": ("PLAN-INDEX", plan(), counts(), {"index": 2}),
    "a negative index": ("PLAN-INDEX", plan(), counts(), {"index": -1}),
    "a plan without this hospital": ("POLICY-SITE", plan(("b",)), counts(), {}),
    "a generator that is not allowed": ("POLICY-GENERATOR", plan(generator="joined"), counts(), {}),
    "too few sites": ("POLICY-SITES", plan(), counts(), {"minimum_sites": 2}),
    "a mode that is not allowed": ("POLICY-STRATEGY", plan(), counts(), {"strategies": ("secure-sum",)}),
    "no noise": ("POLICY-NOISE", plan(stages=[stage("one", "counts", 0, noise_multiplier=0.0)]), counts(), {}),
    "a looser delta": ("POLICY-DELTA", plan(delta=1e-4), counts(), {}),
    "over the cap": ("GATE-CAP", plan(stages=[stage("one", "counts", 0, noise_multiplier=0.1)]), counts(), {}),
    "maps of another dictionary": ("QUERY-SHAPE", plan(), counts(), {"codes": (3, 4, 102, 3)}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_costs_nothing(why: str, ledger: Ledger) -> None:
    code, agreed, query, options = REFUSED[why]
    given = {"index": options.pop("index", 0), "codes": options.pop("codes", sizes())}
    before = ledger.head()
    with pytest.raises(CohortiumError) as caught:
        gate(ledger, **options).open(plan=agreed, run=RUN, query=query, **given)
    assert caught.value.code == code
    assert ledger.head() == before and not ledger.charged_events()


def test_a_release_is_opened_once(ledger: Ledger) -> None:
    opened(ledger, plan(), counts())
    with pytest.raises(Refused, match="LEDGER-ONCE"):
        opened(ledger, plan(), counts())
    assert len(ledger.charged_events()) == 1


def test_all_steps_of_a_local_release_are_charged(ledger: Ledger) -> None:
    opened(ledger, plan(stages=[STEPS]), gradient(local=LOCAL))
    assert ledger.charged_events() == [(Event.gaussian(20.0), 3)]


def test_after_something_without_noise_a_cap_holds_nothing_any_more(ledger: Ledger) -> None:
    ledger.reserve(
        run="old",
        release_id="0",
        event=Event.non_private(),
        count=1,
        plan_digest="0" * 64,
        purpose="rehearsal",
    )
    with pytest.raises(Refused, match="GATE-CAP"):
        opened(ledger, plan(), counts())
    opened(ledger, plan(), counts(), rehearsal=Rehearsal(seed=1))


def test_after_noise_from_a_seed_a_cap_holds_nothing_any_more(ledger: Ledger) -> None:
    """Whoever knows the seed takes the noise away; taking [rehearsal] out of site.toml does not make that undone."""
    gate(ledger, rehearsal=Rehearsal(seed=1)).rehearse(RUN)
    with pytest.raises(Refused, match="GATE-CAP"):
        opened(ledger, plan(), counts())
    opened(ledger, plan(), counts(), rehearsal=Rehearsal(seed=1))


# ---- send ---------------------------------------------------------------------------------------------------

PERMITS = {"secure-sum": ("a", "b", "c"), "local": ("a",)}


def permit_and_release(ledger: Ledger, mode: str = "local") -> tuple[Permit, Released]:
    permit = opened(ledger, plan(PERMITS[mode], mode=mode), counts())
    answer = checks.released(counts(), people(5), noise=20.0)
    return permit, answer


def message(kind: str, **change: Any) -> Message:
    fields: dict[str, Any] = dict.fromkeys(OUTBOUND[kind], "x")
    return Message(kind=kind, sender="a", fields=fields | change.pop("fields", {}), **change)


def refuse(code: str, made: Gate, said: Message, **given: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        made.send(said, **given)
    assert caught.value.code == code


def test_a_release_leaves_as_it_was_charged_and_is_sealed_once(ledger: Ledger) -> None:
    permit, answer = permit_and_release(ledger)
    said = message("site.noised", blobs={"values": answer.values.astype("<i8").tobytes()})
    envelope = gate(ledger).send(said, permit=permit, released=answer)
    assert unseal(envelope, key("a").public_key(), sender="a") == said
    gate(ledger).sealed(permit, envelope)
    assert ledger.state(RUN, "0") == "SEALED" and ledger.digest(RUN, "0") == digest(envelope)
    with pytest.raises(Refused, match="LEDGER-STATE"):
        gate(ledger).sealed(permit, envelope + b"x")
    assert ledger.digest(RUN, "0") == digest(envelope)


@pytest.mark.parametrize("kind", ["", "site.metrics", "site.counts", "sum.contribution", "run.ask", "study.proposal"])
def test_unknown_kinds_do_not_leave(kind: str, ledger: Ledger) -> None:
    refuse("GATE-KIND", gate(ledger), Message(kind=kind, sender="a", fields={}))


@pytest.mark.parametrize("kind", sorted(OUTBOUND))
def test_a_field_more_or_less_does_not_leave(kind: str, ledger: Ledger) -> None:
    refuse("GATE-KIND", gate(ledger), message(kind, fields={"rows": 920}))
    fields = dict.fromkeys(sorted(OUTBOUND[kind])[1:], "x")
    refuse("GATE-KIND", gate(ledger), Message(kind=kind, sender="a", fields=fields))


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        float("nan"),
        True,
        b"x",
        np.int64(3),
        np.float64(0.1),
        {1, 2},
        (1, 2),
        2**53 + 1,
        -(2**60),
        "x" * (MAX_TEXT + 1),
        [[[[[[[["deep"]]]]]]]],
        {"a": 0.5},
        [[0.5]],
        {0.5: "a"},
        {True: "a"},
    ],
    ids=lambda v: str(v)[:20],
)
def test_floats_and_other_values_do_not_leave(value: Any, ledger: Ledger) -> None:
    for kind in ("site.hello", "site.finished", "site.refused"):
        name = sorted(OUTBOUND[kind])[0]
        refuse("GATE-FIELD", gate(ledger), message(kind, fields={name: value}))


@pytest.mark.parametrize("kind", sorted(set(OUTBOUND) - set(CARRIES_RECORDS)))
def test_bytes_that_are_no_sealed_shares_do_not_leave(kind: str, ledger: Ledger) -> None:
    for blob in (b"", b"x", np.arange(111).tobytes(), bytes(SEALED_BYTES - 1)):
        refuse("GATE-KIND", gate(ledger), message(kind, blobs={"b": blob}))
    if kind in CARRIES_SHARES:
        assert gate(ledger).send(message(kind, blobs={"b": bytes(SEALED_BYTES)}))
    else:
        refuse("GATE-KIND", gate(ledger), message(kind, blobs={"b": bytes(SEALED_BYTES)}))


def test_numbers_from_records_need_their_permit_and_nothing_else_has_one(ledger: Ledger) -> None:
    permit, answer = permit_and_release(ledger)
    values = {"values": answer.values.astype("<i8").tobytes()}
    for kind in sorted(CARRIES_RECORDS):
        refuse("GATE-PERMIT", gate(ledger), message(kind, blobs=values))
        refuse("GATE-PERMIT", gate(ledger), message(kind, blobs=values), permit=permit)
        refuse("GATE-PERMIT", gate(ledger), message(kind, blobs=values), released=answer)
    refuse("GATE-PERMIT", gate(ledger), message("site.hello"), permit=permit, released=answer)


def test_what_was_run_must_be_what_was_charged(ledger: Ledger) -> None:
    permit, answer = permit_and_release(ledger)
    said = message("site.noised", blobs={"values": answer.values.astype("<i8").tobytes()})
    for event, count in ((Event.gaussian(19.9), 1), (Event.non_private(), 1), (Event.gaussian(20.0), 2)):
        other = Released(values=answer.values, lattice=answer.lattice, event=event, count=count)
        refuse("GATE-EVENT", gate(ledger), said, permit=permit, released=other)


def test_a_release_leaves_in_the_form_of_its_trust_mode(tmp_path: Path) -> None:
    """Masked in a secure sum, where the site's share of the noise does not protect it; itself in local mode."""
    for mode in PERMITS:
        with Ledger.create(tmp_path / mode / "ledger.db", "a", key("a")) as ledger:
            permit, answer = permit_and_release(ledger, mode)
            plain, masked = answer.values.astype("<i8").tobytes(), bytes(8 * len(answer.values))
            right, wrong = ("sum.masked", "site.noised") if mode == "secure-sum" else ("site.noised", "sum.masked")
            given = {"permit": permit, "released": answer}
            for blob in (plain, masked):
                refuse("GATE-MODE", gate(ledger), message(wrong, blobs={"values": blob}), **given)
            good, bad = (masked, plain) if mode == "secure-sum" else (plain, masked)
            refuse("GATE-MASK", gate(ledger), message(right, blobs={"values": bad}), **given)
            refuse("GATE-KIND", gate(ledger), message(right, blobs={"values": good[:-8]}), **given)
            refuse("GATE-KIND", gate(ledger), message(right, blobs={"values": good, "more": b""}), **given)
            refuse("GATE-KIND", gate(ledger), message(right), **given)
            assert gate(ledger).send(message(right, blobs={"values": good}), **given)


# ---- starts -------------------------------------------------------------------------------------------------


def test_a_start_says_the_cap_only_where_the_policy_does(ledger: Ledger) -> None:
    gate(ledger).starts(RUN, plan())
    assert set(ledger.lines()[-1].body["fields"]) == {"run", "plan", "nonce"}
    gate(ledger, tell_cap=True).starts(RUN, plan())
    told = ledger.lines()[-1].body["fields"]
    assert set(told) == {"run", "plan", "nonce", "cap"}
    assert Cap.from_json(told["cap"]) == policy("a").cap

"""Approval: only what the coordinator signed and the officer signed, for this site and this run, counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hospital import RUN, key, plan, policy, proposal, schema, stage, table, ward

from cohortium.client.approval import (
    approval_files,
    approvals,
    approve,
    load_approved,
    notice,
    withdraw,
)
from cohortium.common.errors import CohortiumError, ProtocolError, Refused, TableError, UsageError
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import proposal_message, read_proposal
from cohortium.common.protocol.messages import Message, seal
from cohortium.strategies.base import COORDINATOR

OFFICER = "officer of a"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    made = ward(tmp_path, plan(), approved=False)
    made.close()
    return made.directory("a")


def load(site: Path, run: str = RUN) -> Any:
    return load_approved(site, policy("a"), run)


def refused(site: Path, run: str = RUN) -> str:
    with pytest.raises(CohortiumError) as caught:
        load(site, run)
    return caught.value.code


def test_an_approved_proposal_is_found_again(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    found = load(site)
    assert (found.run, found.plan, found.schema) == (RUN, plan(), schema())
    assert set(found.identities) == {"a"}


def test_nothing_is_approved_without_the_officer(site: Path) -> None:
    assert refused(site) == "GUARD-NOT-APPROVED"
    with pytest.raises(Refused, match="APPROVAL-OFFICER"):
        approve(site, proposal(plan()), key("the coordinator's friend"))
    assert refused(site) == "GUARD-NOT-APPROVED"


@pytest.mark.parametrize("run", ["", "..", "../a", "a/b", "RUN-1", "run-2", "x" * 65, "run-1\n", "run_1"])
def test_another_run_is_not_approved(site: Path, run: str) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    assert refused(site, run) == "GUARD-NOT-APPROVED"


def test_an_approval_fits_one_proposal_one_site_and_one_run(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    approve(site, proposal(plan(), run="run-2"), key(OFFICER))
    first, second = site / "approved" / RUN, site / "approved" / "run-2"
    other = proposal(plan(rows=11))

    signature, envelope = (first / "approval.sig").read_bytes(), (first / "proposal.bin").read_bytes()
    (first / "proposal.bin").write_bytes(other)
    assert refused(site) == "GUARD-NOT-APPROVED"  # another plan under the old signature
    (first / "proposal.bin").write_bytes((second / "proposal.bin").read_bytes())
    (first / "approval.sig").write_bytes((second / "approval.sig").read_bytes())
    assert refused(site) == "GUARD-NOT-APPROVED"  # a whole approval moved to another run
    (first / "proposal.bin").write_bytes(envelope)
    (first / "approval.sig").write_bytes(signature)
    load(site)
    with pytest.raises(ProtocolError, match="GUARD-NOT-APPROVED"):  # the same officer's word for another site
        load_approved(site, policy("b"), RUN)
    (first / "approval.sig").write_bytes(b"")
    assert refused(site) == "GUARD-NOT-APPROVED"


def test_a_flipped_bit_anywhere_is_refused(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    path = site / "approved" / RUN / "proposal.bin"
    good = path.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 60)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert refused(site) in ("MSG-SIGNATURE", "GUARD-NOT-APPROVED")


def message(agreed: Plan, **change: Any) -> Message:
    identities = {s: key(s).public_key().public_bytes_raw().hex() for s in agreed.sites}
    made = proposal_message(run=RUN, plan=agreed, identities=identities, schema=schema())
    fields = {**made.fields, **change.pop("fields", {})}
    return Message(
        kind=change.get("kind", made.kind),
        sender=COORDINATOR,
        fields=fields,
        blobs=change.get("blobs", made.blobs),
    )


def other_dictionary() -> bytes:
    return json.dumps(schema().without(["age"]).to_dict()).encode()


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "another kind": ("PROPOSAL-FORM", {"kind": "run.hello"}),
    "a run that is a path": ("PROPOSAL-FORM", {"fields": {"run": "../../etc"}}),
    "a run that is a number": ("PROPOSAL-FORM", {"fields": {"run": 7}}),
    "no plan": ("PLAN-FORMAT", {"fields": {"plan": {}}}),
    "no dictionary": ("PROPOSAL-FORM", {"blobs": {}}),
    "no JSON": ("PROPOSAL-FORM", {"blobs": {"dictionary": b"{"}}),
    "another dictionary": ("PROPOSAL-DICTIONARY", {"blobs": {"dictionary": other_dictionary()}}),
    "other sites' keys": ("PROPOSAL-SITES", {"fields": {"identities": {"b": "00" * 32}}}),
    "one key under two names": ("PROPOSAL-KEYS", {}),
    "keys that are none": ("PROPOSAL-FORM", {"fields": {"identities": {"a": "xyz"}}}),
    "keys that are a list": ("PROPOSAL-FORM", {"fields": {"identities": ["a"]}}),
}


@pytest.mark.parametrize("why", BAD)
def test_a_proposal_that_does_not_fit_together_is_refused(why: str, site: Path) -> None:
    code, change = BAD[why]
    with pytest.raises(CohortiumError) as caught:
        agreed = plan()
        if code == "PROPOSAL-KEYS":
            agreed = plan(("a", "b", "c"))
            twice = key("b").public_key().public_bytes_raw().hex()
            mine = key("a").public_key().public_bytes_raw().hex()
            change = {"fields": {"identities": {"a": mine, "b": twice, "c": twice}}}
        approve(site, seal(message(agreed, **change), key(COORDINATOR)), key(OFFICER))
    assert caught.value.code == code
    assert not (site / "approved").exists()


def test_only_this_coordinators_proposals_are_read(site: Path) -> None:
    with pytest.raises(ProtocolError, match="MSG-SIGNATURE"):
        approve(site, proposal(plan(), signer="somebody"), key(OFFICER))
    with pytest.raises(ProtocolError, match="MSG-SENDER"):
        envelope = seal(Message(kind="study.proposal", sender="a"), key(COORDINATOR))
        read_proposal(envelope, key(COORDINATOR).public_key())


def test_a_plan_that_the_policy_forbids_is_not_approved(site: Path) -> None:
    with pytest.raises(Refused, match="POLICY-GENERATOR"):
        approve(site, proposal(plan(generator="joined")), key(OFFICER))
    with pytest.raises(Refused, match="POLICY-SITE"):
        approve(site, proposal(plan(("b",))), key(OFFICER))
    assert not (site / "approved").exists()


def test_a_proposal_with_another_key_for_this_site_is_not_approved(site: Path) -> None:
    other = key("somebody").public_key().public_bytes_raw().hex()
    with pytest.raises(Refused, match="PROPOSAL-OWN-KEY"):
        approve(site, seal(message(plan(), fields={"identities": {"a": other}}), key(COORDINATOR)), key(OFFICER))
    assert not (site / "approved").exists()


def test_what_was_approved_is_not_exchanged_under_the_same_run(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    approve(site, proposal(plan()), key(OFFICER))  # the very same again is no harm
    with pytest.raises(Refused, match="PROPOSAL-EXISTS"):
        approve(site, proposal(plan(rows=11)), key(OFFICER))
    assert load(site).plan == plan()


def test_only_known_peers_where_the_officer_lists_them(site: Path) -> None:
    three = plan(("a", "b", "c"), mode="secure-sum")
    known = {name: key(name).public_key().public_bytes_raw().hex() for name in ("b", "c")}
    other = {**known, "c": key("somebody").public_key().public_bytes_raw().hex()}
    for peers in ({"b": known["b"]}, other, {}):
        policy("a", peers=tuple(sorted(peers.items()))).save(site / "site.toml")
        with pytest.raises(Refused, match="POLICY-PEERS"):
            approve(site, proposal(three), key(OFFICER))
    pinned = policy("a", peers=tuple(sorted(known.items())))
    pinned.save(site / "site.toml")
    approve(site, proposal(three), key(OFFICER))
    assert load_approved(site, pinned, RUN).plan == three
    with pytest.raises(Refused, match="POLICY-PEERS"):  # a key that the officer strikes out later
        load_approved(site, policy("a", peers=()), RUN)


def test_a_plan_against_fewer_colluders_than_the_officer_wants_is_not_approved(site: Path) -> None:
    policy("a", minimum_colluders=1).save(site / "site.toml")
    with pytest.raises(Refused, match="POLICY-COLLUDERS"):
        approve(site, proposal(plan(("a", "b", "c"), mode="secure-sum")), key(OFFICER))


def test_the_officer_sees_what_is_wrong_with_the_table_before_the_coordinator_can(site: Path) -> None:
    good = (site / "data.parquet").read_bytes()
    table(10).rename(columns={"age": "years"}).to_parquet(site / "data.parquet")
    with pytest.raises(TableError, match=r"TABLE-COLUMN.*age"):
        approve(site, proposal(plan()), key(OFFICER))
    (site / "data.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UsageError):
        approve(site, proposal(plan()), key(OFFICER))
    (site / "data.parquet").write_bytes(good)
    policy("a", minimum_patients=31).save(site / "site.toml")
    with pytest.raises(Refused, match="POLICY-PATIENTS"):
        approve(site, proposal(plan()), key(OFFICER))
    assert not (site / "approved").exists()
    approve(site, proposal(plan()), key(OFFICER), check_table=False)


def test_rows_are_not_held_out(site: Path) -> None:
    """A plan by hand, since `compile_plan` and the study's reader refuse it earlier."""
    fields = plan(holdout=0.2).to_json() | {"unit": "row"}
    with pytest.raises(ProtocolError, match="PLAN-HOLDOUT"):
        approve(site, seal(message(plan(), fields={"plan": fields}), key(COORDINATOR)), key(OFFICER))


def test_a_plan_that_costs_more_than_it_states_is_not_approved(site: Path) -> None:
    """The officer reads an epsilon; the guard would answer the stages."""
    loud = [stage("one", "counts", 0, noise_multiplier=1.0)]
    honest = plan(stages=loud)
    assert honest.price() < 8
    approve(site, proposal(honest), key(OFFICER))
    with pytest.raises(Refused, match="PROPOSAL-PRICE"):
        approve(site, proposal(plan(stages=loud, epsilon=1.0), run="run-2"), key(OFFICER))


# ---- expiry, pause, several officers ------------------------------------------------------------------------

NOW = 1_800_000_000
DAY = 86_400


def test_an_approval_ends_when_it_said_it_would(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + DAY, now=NOW)
    for now in (NOW, NOW + DAY - 1):
        approval_files(site, RUN, now=now)
        load_approved(site, policy("a"), RUN, now=now)
    for now in (NOW + DAY, NOW + 400 * DAY):
        with pytest.raises(Refused, match="GUARD-NOT-APPROVED"):
            approval_files(site, RUN, now=now)
        with pytest.raises(Refused, match="GUARD-NOT-APPROVED"):
            load_approved(site, policy("a"), RUN, now=now)
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + 5 * DAY, now=NOW + 2 * DAY)  # signed anew
    approval_files(site, RUN, now=NOW + 3 * DAY)
    with pytest.raises(UsageError, match="APPROVAL-EXPIRED"):
        approve(site, proposal(plan()), key(OFFICER), expires=NOW - 1, now=NOW)


def test_the_guard_asks_for_the_expiry_at_every_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ward(tmp_path, plan(), approved=False)
    now = int(time.time())
    approve(made.directory("a"), proposal(plan()), key(OFFICER), expires=now + 100)
    hello = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})
    assert made.say("a", hello).kind == "site.hello"
    monkeypatch.setattr("cohortium.client.approval.time.time", lambda: now + 101)
    assert made.say("a", hello).fields == {"code": "REFUSED"}
    monkeypatch.setattr("cohortium.client.approval.time.time", lambda: now + 99)
    assert made.say("a", hello).kind == "site.hello"
    made.close()


def test_the_expiry_is_signed(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + DAY, now=NOW)
    path = site / "approved" / RUN / "approval.sig"
    for name, value in (("expires", NOW + 99 * DAY), ("expires", 0), ("at", NOW - 1)):
        value_ = json.loads(path.read_bytes())
        value_["statement"][name] = value
        good = path.read_bytes()
        path.write_bytes(json.dumps(value_).encode())
        with pytest.raises(ProtocolError, match="GUARD-NOT-APPROVED"):
            load_approved(site, policy("a"), RUN, now=NOW)
        path.write_bytes(good)
    load_approved(site, policy("a"), RUN, now=NOW)


def test_a_clock_that_was_set_back_gives_no_approval_its_life_again(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + DAY, now=NOW)
    approval_files(site, RUN, now=NOW - DAY + 60)  # time servers correct by less than a day
    for now in (NOW - DAY - 1, NOW - 300 * DAY):
        with pytest.raises(Refused, match="CLOCK-BACK"):
            approval_files(site, RUN, now=now)
        with pytest.raises(Refused, match="CLOCK-BACK"):
            load_approved(site, policy("a"), RUN, now=now)


def test_a_paused_guard_refuses_everything_until_it_is_unpaused(tmp_path: Path) -> None:
    made = ward(tmp_path, plan())
    hello = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})
    assert made.say("a", hello).kind == "site.hello"
    (made.directory("a") / "paused").touch()
    said = made.say("a", hello)
    assert said.kind == "site.refused" and said.fields["code"].startswith("REFUSED")
    assert "paused" in (made.directory("a") / "guard.log").read_text()
    (made.directory("a") / "paused").unlink()
    assert made.say("a", hello).kind == "site.hello"
    made.close()


def officers(*names: str, needed: int) -> dict[str, Any]:
    keys = tuple(key(name).public_key().public_bytes_raw().hex() for name in names)
    return {"officers": keys, "officers_needed": needed}


def test_two_of_three_officers_must_sign(site: Path) -> None:
    rules = policy("a", **officers(OFFICER, "second", "third", needed=2))
    rules.save(site / "site.toml")
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + DAY, now=NOW)
    with pytest.raises(ProtocolError, match="GUARD-NOT-APPROVED"):
        load_approved(site, rules, RUN, now=NOW)
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + DAY, now=NOW)  # twice the same is one
    with pytest.raises(ProtocolError, match="GUARD-NOT-APPROVED"):
        load_approved(site, rules, RUN, now=NOW)
    with pytest.raises(Refused, match="APPROVAL-OFFICER"):
        approve(site, proposal(plan()), key("somebody"), now=NOW)
    approve(site, proposal(plan()), key("third"), expires=NOW + 300 * DAY, now=NOW + 60)
    assert load_approved(site, rules, RUN, now=NOW).plan == plan()
    with pytest.raises(Refused):  # the second signed what the first one wrote, its expiry included
        load_approved(site, rules, RUN, now=NOW + DAY)
    struck = policy("a", **officers(OFFICER, "second", needed=2))
    with pytest.raises(ProtocolError, match="GUARD-NOT-APPROVED"):  # an officer who was struck out counts no more
        load_approved(site, struck, RUN, now=NOW)


def test_one_of_several_officers_is_enough_where_one_is_needed(site: Path) -> None:
    rules = policy("a", **officers("second", "third", needed=1))
    rules.save(site / "site.toml")
    approve(site, proposal(plan()), key("third"))
    load_approved(site, rules, RUN)
    with pytest.raises(Refused, match="APPROVAL-OFFICER"):  # officer.pub no longer counts beside a list
        approve(site, proposal(plan()), key(OFFICER))
    assert notice(site, RUN) is None


def test_what_the_coordinator_is_shown_is_no_approval(site: Path) -> None:
    """The notice leaves the hospital; put into approval.sig, it opens nothing."""
    approve(site, proposal(plan()), key(OFFICER), expires=NOW + DAY, now=NOW)
    path = site / "approved" / RUN / "approval.sig"
    value = json.loads(path.read_bytes())
    shown = notice(site, RUN)
    assert shown is not None and len(shown) == 64
    officer = key(OFFICER).public_key().public_bytes_raw().hex()
    path.write_bytes(json.dumps({"statement": value["statement"], "signatures": {officer: shown.hex()}}).encode())
    with pytest.raises(ProtocolError, match="GUARD-NOT-APPROVED"):
        load_approved(site, policy("a"), RUN, now=NOW)


def test_a_withdrawn_approval_is_gone_and_named(site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    found = approvals(site)[RUN]
    assert found is not None and found.expires == 0
    assert withdraw(site, RUN) and not withdraw(site, RUN)
    assert refused(site) == "GUARD-NOT-APPROVED" and approvals(site) == {RUN: None}
    with pytest.raises(Refused):
        withdraw(site, "../../etc")


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"null", b"\x00" * 64, b'{"statement": [], "signatures": {}}', b"[" * 9999]
)
def test_a_broken_approval_is_none(raw: bytes, site: Path) -> None:
    approve(site, proposal(plan()), key(OFFICER))
    (site / "approved" / RUN / "approval.sig").write_bytes(raw)
    assert refused(site) == "GUARD-NOT-APPROVED"
    with pytest.raises(CohortiumError, match="GUARD-NOT-APPROVED"):
        approval_files(site, RUN)

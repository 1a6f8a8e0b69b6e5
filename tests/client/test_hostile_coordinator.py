"""A coordinator that wants more than was agreed: every attempt ends in a code, before a record is read or charged.

The coordinator holds its own key, so all it says is well signed unless a case says otherwise. `load_records` records
every opening of the site's source. Other code shipped as a FAB is in tests/client/test_courier.py; ledgers that were
rolled back, forked or copied are in test_witness.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import checks
import numpy as np
import pytest
from hospital import RUN, Ward, counts, gradient, key, moments, plan, policy, proposal, schema, stage, ward

from cohortium.client import guard as guard_module
from cohortium.client.approval import Approval, approve
from cohortium.common.errors import CohortiumError, TableError
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.proposals import APPROVAL, approval_statement, proposal_message, read_proposal
from cohortium.common.protocol.messages import Message, canonical, seal, unseal
from cohortium.common.protocol.signing import sign_statement
from cohortium.common.queries import LocalSteps
from cohortium.common.schema import Schema
from cohortium.strategies.base import COORDINATOR, ask_message

SITES = ("a", "b", "c")
HELLO = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})


@pytest.fixture
def opened() -> Iterator[mock.Mock]:
    """The site's source, which notes every time it is opened."""
    with mock.patch.object(guard_module, "load_records", side_effect=guard_module.load_records) as spy:
        yield spy


def charges(consortium: Ward, site: str = "a") -> set[tuple[str, str]]:
    return set(consortium.guard(site)._ledger_().book.entries)


def logged(consortium: Ward, site: str = "a") -> str:
    lines = (consortium.directory(site) / "guard.log").read_text().splitlines()
    return str(json.loads(lines[-1])["local"])


# ---- proposals that no officer should sign ------------------------------------------------------------------

SOUND: dict[str, Any] = {"mode": "secure-sum", "survivors": 3, "colluders": 1}
RULES: dict[str, Any] = {
    "minimum_colluders": 1,
    "minimum_sites": 3,
    "hospitals": 2,
    "strategies": ("secure-sum",),
    "evaluation": False,
}


def sound(**options: Any) -> Plan:
    return plan(SITES, **{**SOUND, "hospitals": 2, "epsilon": 20.0, **options})


def message_of(agreed: Plan, **change: Any) -> Message:
    identities = {site: key(site).public_key().public_bytes_raw().hex() for site in agreed.sites}
    return proposal_message(
        **{"run": RUN, "plan": agreed, "identities": identities, "schema": schema(), **change}  # type: ignore[arg-type]
    )


def other_schema() -> Schema:
    document = schema().to_dict()
    document["fields"][3]["constraints"]["maximum"] = 120
    return Schema.from_dict(document)


def raw(change: Callable[[dict[str, Any]], object]) -> Message:
    """A proposal whose plan was changed after it was built, as no constructor would let it."""
    made = message_of(sound())
    fields = copy.deepcopy(made.fields)
    change(fields)
    return dataclasses.replace(made, fields=fields)


def quiet(**options: Any) -> tuple[Stage, ...]:
    return (stage("one", "counts", 0, **options),)


HOSTILE_PROPOSALS: dict[str, tuple[str, Callable[[], Message]]] = {
    "no noise (sigma 0)": ("POLICY-NOISE", lambda: message_of(sound(stages=quiet(noise_multiplier=0.0)))),
    "less noise than the epsilon it states": (
        "PROPOSAL-PRICE",
        lambda: message_of(sound(epsilon=1.0, stages=quiet(noise_multiplier=1.0))),
    ),
    "everybody sampled (q 1) at the price of a few": (
        "PROPOSAL-PRICE",
        lambda: message_of(sound(epsilon=1.0, stages=quiet(noise_multiplier=3.0, repeats=40))),
    ),
    "negative noise": ("PLAN-STAGE", lambda: raw(lambda f: f["plan"]["stages"][0].update(noise_multiplier="-0x1p+4"))),
    "noise that is no number": (
        "PLAN-STAGE",
        lambda: raw(lambda f: f["plan"]["stages"][0].update(noise_multiplier="nan")),
    ),
    "a sampling rate above one": ("PLAN-STAGE", lambda: raw(lambda f: f["plan"]["stages"][0].update(rate=str(2**65)))),
    "another unit than the patient": ("POLICY-UNIT", lambda: message_of(sound(unit="row"))),
    "priced for fewer hospitals": ("POLICY-HOSPITALS", lambda: message_of(sound(hospitals=1))),
    "noise shared out as if nobody colluded": (
        "POLICY-COLLUDERS",
        lambda: message_of(sound(survivors=3, colluders=0)),
    ),
    "a threshold below the majority": (
        "PLAN-THRESHOLD",
        lambda: raw(lambda f: f["plan"].update(survivors=1, colluders=0)),
    ),
    "as few sites as it likes": (
        "POLICY-SITES",
        lambda: message_of(plan(("a",), **{**SOUND, "survivors": 1, "colluders": 0}, hospitals=2)),
    ),
    "one site under two names": (
        "PROPOSAL-KEYS",
        lambda: raw(lambda f: f["identities"].update(b=f["identities"]["c"])),
    ),
    "a site named twice": ("PLAN-SITES", lambda: raw(lambda f: f["plan"].update(sites=["a", "a", "b"]))),
    "this hospital's key replaced": (
        "PROPOSAL-OWN-KEY",
        lambda: raw(lambda f: f["identities"].update(a=key("evil").public_key().public_bytes_raw().hex())),
    ),
    "a friend in another hospital's place": (
        "POLICY-PEERS",
        lambda: raw(lambda f: f["identities"].update(b=key("evil").public_key().public_bytes_raw().hex())),
    ),
    "keys of other sites than the plan's": (
        "PROPOSAL-SITES",
        lambda: raw(lambda f: f["identities"].update(z=f["identities"].pop("c"))),
    ),
    "a foreign dictionary": ("PROPOSAL-DICTIONARY", lambda: message_of(sound(), schema=other_schema())),
    "held-out patients where they are not to be had": (
        "POLICY-EVALUATION",
        lambda: message_of(sound(holdout=0.2, stages=quiet(part="holdout"))),
    ),
    "everybody's own noise instead of a secure sum": (
        "POLICY-STRATEGY",
        lambda: message_of(sound(mode="local", survivors=0, colluders=0)),
    ),
    "another generator": ("POLICY-GENERATOR", lambda: message_of(sound(generator="autoregressive"))),
    "a looser delta": ("POLICY-DELTA", lambda: message_of(sound(delta=1e-4))),
    "a plan without this hospital": (
        "POLICY-SITE",
        lambda: message_of(dataclasses.replace(sound(), sites=("b", "c", "d"))),
    ),
    "a run's id that leaves its folder": ("PROPOSAL-FORM", lambda: message_of(sound(), run="../../etc")),
    "an ask in a proposal's place": ("PROPOSAL-FORM", lambda: ask_message(RUN, 0, counts(), mirrored=0)),
}
SIGNED_BY_MISTAKE = {"POLICY", "PLAN", "PROPOSAL"} - {"PROPOSAL-PRICE"}


def strict(folder: Path) -> Ward:
    pins = tuple((site, key(site).public_key().public_bytes_raw().hex()) for site in (*SITES, "d"))
    return ward(folder, sound(), approved=False, seed=None, lifetime_epsilon=20.0, peers=pins, **RULES)


def slip_in(consortium: Ward, message: Message, *, signer: str = "officer of a", run: str = RUN) -> None:
    """Put a proposal and a signature under it where the guard looks, past every check of `approve`."""
    envelope = seal(message, key(COORDINATOR))
    folder = consortium.directory("a") / "approved" / run
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = read_proposal(envelope, key(COORDINATOR).public_key())
        said = approval_statement("a", found)
    except CohortiumError:
        said = {"site": "a", "run": run, "plan": "0" * 64, "proposal": "0" * 64}
    statement = said | {"at": int(time.time()), "expires": 0}
    officer = key(signer)
    signature = sign_statement(officer, APPROVAL, statement).hex()
    name = key("officer of a").public_key().public_bytes_raw().hex()
    (folder / "proposal.bin").write_bytes(envelope)
    (folder / "approval.sig").write_bytes(Approval(statement=statement, signatures={name: signature}).to_bytes())


@pytest.mark.parametrize("why", HOSTILE_PROPOSALS)
def test_a_hostile_proposal_is_refused_to_the_officer_and_by_the_guard(
    why: str, tmp_path: Path, opened: mock.Mock
) -> None:
    """Unsigned; with a forged signature; and, where the guard itself can know better, even signed by mistake."""
    code, make = HOSTILE_PROPOSALS[why]
    consortium, message = strict(tmp_path), make()
    with mock.patch("cohortium.client.loading.load_records") as reading, pytest.raises(CohortiumError) as caught:
        approve(consortium.directory("a"), seal(message, key(COORDINATOR)), key("officer of a"))
    assert caught.value.code == code and not reading.called
    asks = [
        HELLO,
        ask_message(RUN, 0, counts(), mirrored=0),
        Message(kind="run.prepare", sender=COORDINATOR, fields={"run": RUN, "index": 0, "dim": 111}),
    ]
    for signer in (None, COORDINATOR, "officer of b", "officer of a"):
        if signer == "officer of a" and code in ("PROPOSAL-PRICE", "PROPOSAL-OWN-KEY"):
            continue  # what the officer alone can judge: then the lifetime cap, and the others' refusal, hold
        if signer is not None:
            slip_in(consortium, message, signer=signer)
        for ask in asks:
            reply = consortium.say("a", ask)
            assert reply.kind == "site.refused" and reply.fields["code"] in checks.REFUSALS, (signer, reply)
    assert not opened.called and not charges(consortium)
    consortium.close()


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE_PROPOSALS) + len(HOSTILE_MESSAGES) >= 50


def test_a_sound_proposal_is_what_these_differ_from(tmp_path: Path) -> None:
    """Or the cases above could be refused for another reason."""
    consortium = strict(tmp_path)
    for site in SITES:
        approve(consortium.directory(site), proposal(sound()), key("officer of " + site), check_table=False)
    assert consortium.start() == SITES
    assert consortium.answer(0, counts()).sites == SITES
    consortium.close()


def test_expired_approvals_and_those_of_the_future(tmp_path: Path, opened: mock.Mock) -> None:
    consortium = ward(tmp_path, plan(), approved=False)
    now = int(time.time())
    place, officer = consortium.directory("a"), key("officer of a")
    approve(place, proposal(plan()), officer, check_table=False, expires=now + 3600, now=now)
    with mock.patch("time.time", lambda: now + 3601.0):
        assert consortium.say("a", HELLO).fields == {"code": "REFUSED"}
    with mock.patch("time.time", lambda: now - 2 * 86_400.0):  # a clock set back gives no approval its life again
        assert consortium.say("a", HELLO).fields == {"code": "REFUSED-CLOCK"}
    assert not opened.called and not charges(consortium)
    assert consortium.say("a", HELLO).kind == "site.hello"
    consortium.close()


def test_a_thousand_runs_more_than_were_approved(tmp_path: Path, opened: mock.Mock) -> None:
    consortium = ward(tmp_path, plan())
    before = charges(consortium)
    opened.reset_mock()
    for number in range(1000):
        run = f"run-{number + 2}"
        fields = {"run": run, "mirrored": 0}
        kind = ("run.hello", "run.start", "run.ask", "run.prepare")[number % 4]
        assert consortium.say("a", Message(kind=kind, sender=COORDINATOR, fields=fields)).fields == {"code": "REFUSED"}
    assert not opened.called and charges(consortium) == before
    assert {p.name for p in (consortium.directory("a") / "approved").iterdir()} == {RUN}
    consortium.close()


def test_a_thousand_approved_runs_stop_at_the_lifetime_cap(tmp_path: Path, opened: mock.Mock) -> None:
    """An officer who signs whatever comes: the cap is the hospital's, over all runs, and refuses before a record is
    used. (A hello reads the table; what it is asked then costs nothing.)"""
    one = plan(stages=quiet(noise_multiplier=3.0))
    consortium = ward(tmp_path, one, seed=None, lifetime_epsilon=4.0)
    answered = 0
    for number in range(12):
        run = f"more-{number}"
        approve(consortium.directory("a"), proposal(one, run=run), key("officer of a"), check_table=False)
        assert consortium.start(run=run) == ("a",)
        reply = consortium.say("a", ask_message(run, 0, counts(), mirrored=0))
        answered += reply.kind == "site.noised"
        if reply.kind == "site.refused":
            assert reply.fields == {"code": "REFUSED"} and logged(consortium) == "GATE-CAP"
    assert 0 < answered < 12 and len(charges(consortium)) == answered
    consortium.close()


# ---- messages in a run that was approved and has begun ------------------------------------------------------

Attempt = Callable[[Ward], list[bytes]]
HOSTILE_MESSAGES: dict[str, tuple[str, str, Attempt]] = {}


def hostile(name: str, code: str, mode: str = "local") -> Callable[[Attempt], Attempt]:
    def note(attempt: Attempt) -> Attempt:
        HOSTILE_MESSAGES[name] = (code, mode, attempt)
        return attempt

    return note


def said(*messages: Message) -> list[bytes]:
    return [seal(message, key(COORDINATOR)) for message in messages]


def question(index: int = 0, query: Any = None, **change: Any) -> Message:
    made = ask_message(RUN, index, query if query is not None else counts(), mirrored=0)
    return dataclasses.replace(made, fields={**made.fields, **change})


for _name, _code, _query in (
    ("another kind of query", "GATE-NOT-IN-PLAN", moments()),
    ("held-out patients where the plan says training", "GATE-NOT-IN-PLAN", counts(part="holdout")),
    (
        "local steps that the plan does not have",
        "GATE-NOT-IN-PLAN",
        gradient(local=LocalSteps(steps=9, learning_rate=0.1, denominator=10.0)),
    ),
    ("a longer answer than was planned", "GATE-SIZE", checks.wide(500)),
):
    hostile(_name, _code)(lambda w, q=_query: said(question(0, q)))


@hostile("more steps than the plan says", "GATE-NOT-IN-PLAN")
def _(w: Ward) -> list[bytes]:
    return said(question(2, gradient(local=LocalSteps(steps=50, learning_rate=0.1, denominator=10.0))))


@hostile("a clip of a thousand million", "GATE-CLIP")
def _(w: Ward) -> list[bytes]:
    return said(question(2, gradient(clip_norm_l2=1e9, local=LocalSteps(steps=3, learning_rate=0.1, denominator=10.0))))


@hostile("a clip that is not a number", "QUERY-CLIP")
def _(w: Ward) -> list[bytes]:
    made = question(2, gradient())
    return said(dataclasses.replace(made, fields={**made.fields, "query": {**made.fields["query"], "clip": "inf"}}))


@hostile("weights beyond every bound", "QUERY-VALUE")
def _(w: Ward) -> list[bytes]:
    made = question(2, gradient())
    blobs = {n: (np.full(len(b) // 4, 1e30, "<f4").tobytes() if "param" in n else b) for n, b in made.blobs.items()}
    assert blobs != made.blobs
    return said(dataclasses.replace(made, blobs=blobs))


@hostile("indices beyond the plan", "PLAN-INDEX")
def _(w: Ward) -> list[bytes]:
    return said(*(question(index) for index in (3, 10**6, 2**52)))


@hostile("indices that are none", "MSG-FIELD")
def _(w: Ward) -> list[bytes]:
    return said(*(question(index=index) for index in (-1, True, "0", None, [0], 2**60, 2**53)))


@hostile("a map that is longer than the column", "QUERY-SHAPE")
def _(w: Ward) -> list[bytes]:
    made = question()
    blobs = {n: b + bytes(4) for n, b in made.blobs.items()}
    return said(dataclasses.replace(made, blobs=blobs))


@hostile("a map that names bins that are not there", "QUERY-SHAPE")
def _(w: Ward) -> list[bytes]:
    made = question()
    blobs = {n: np.full(len(b) // 4, 10**6, "<i4").tobytes() for n, b in made.blobs.items()}
    return said(dataclasses.replace(made, blobs=blobs))


@hostile("a query without its blobs", "QUERY-FORM")
def _(w: Ward) -> list[bytes]:
    return said(dataclasses.replace(question(), blobs={}))


@hostile("kinds that a guard does not know", "MSG-KIND")
def _(w: Ward) -> list[bytes]:
    kinds = ("run.exec", "run.pull", "site.hello", "study.proposal", "sum.masked", "run.asks", "", "run.ask ", "shell")
    return said(*(Message(kind=kind, sender=COORDINATOR, fields=question().fields) for kind in kinds))


@hostile("code in a message", "MSG-KIND")
def _(w: Ward) -> list[bytes]:
    program = b"import os\nos.system('touch /tmp/owned')\n"
    return said(Message(kind="run.app", sender=COORDINATOR, fields={"run": RUN}, blobs={"fab": program}))


@hostile("runs that leave their folder", "GUARD-NOT-APPROVED")
def _(w: Ward) -> list[bytes]:
    names = ("../a/approved/" + RUN, "..", "", ".", RUN + "/", "/" + RUN, RUN + "\0", "run-1/../run-1", None, 7, [RUN])
    return said(*(Message(kind="run.hello", sender=COORDINATOR, fields={"run": run, "mirrored": 0}) for run in names))


@hostile("another site's envelope", "MSG-SIGNATURE")
def _(w: Ward) -> list[bytes]:
    other = dataclasses.replace(question(), sender="b")
    return [seal(other, key("b")), seal(question(), key("b")), seal(question(), key("a"))]


@hostile("the coordinator's key under another name", "MSG-SENDER")
def _(w: Ward) -> list[bytes]:
    return [seal(dataclasses.replace(question(), sender=name), key(COORDINATOR)) for name in ("a", "", "officer of a")]


@hostile("an officer's word instead of the coordinator's", "MSG-SIGNATURE")
def _(w: Ward) -> list[bytes]:
    return [seal(question(), key("officer of a"))]


@hostile("envelopes that are broken off, stretched or turned around", "MSG-")
def _(w: Ward) -> list[bytes]:
    good = said(question())[0]
    return [b"", good[:1], good[:-1], good + b"x", good[::-1], good[:40], b"COH1" * 50, bytes(200)]


@hostile("a header that is far too long", "MSG-")
def _(w: Ward) -> list[bytes]:
    body = b"COH1" + (2**31).to_bytes(4, "big") + bytes(100)
    key_ = key(COORDINATOR)
    return [body + key_.sign(b"cohortium/envelope/1\x00" + body)]


@hostile("a header as deep as a well", "MSG-FORMAT")
def _(w: Ward) -> list[bytes]:
    header = (
        b'{"blobs":[],"fields":'
        + b'{"a":' * 50_000
        + b"1"
        + b"}" * 50_000
        + b',"kind":"run.ask","sender":"coordinator"}'
    )
    body = b"COH1" + len(header).to_bytes(4, "big") + header
    return [body + key(COORDINATOR).sign(b"cohortium/envelope/1\x00" + body)]


@hostile("two spellings of one message", "MSG-FORMAT")
def _(w: Ward) -> list[bytes]:
    made = question()
    header = json.dumps({"kind": made.kind, "sender": made.sender, "fields": made.fields, "blobs": []}).encode()
    assert header != canonical(json.loads(header))
    body = b"COH1" + len(header).to_bytes(4, "big") + header
    return [body + key(COORDINATOR).sign(b"cohortium/envelope/1\x00" + body)]


@hostile("more lines of the ledger than there are", "LEDGER-BEHIND")
def _(w: Ward) -> list[bytes]:
    return said(
        question(mirrored=10**6), Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 999})
    )


@hostile("its own words as the site's past", "CHECKPOINT-")
def _(w: Ward) -> list[bytes]:
    from cohortium.common.privacy import chain

    head = chain.Checkpoint(owner="a", size=10**6, hash="00" * 32)
    notes = [chain.checkpoint_text(head, key(COORDINATOR)), chain.checkpoint_text(head, key("b")), "x"]
    return said(*(dataclasses.replace(HELLO, fields={**HELLO.fields, "seen": note}) for note in notes))


@hostile("a start that nobody confirmed", "WITNESS-")
def _(w: Ward) -> list[bytes]:
    tries = [{}, {COORDINATOR: "00" * 64}, {COORDINATOR: key(COORDINATOR).sign(b"x").hex()}, {"a": "x"}]
    fields = [{"run": RUN, "signatures": some, "refused": {}} for some in tries]
    return said(*(Message(kind="run.start", sender=COORDINATOR, fields=some) for some in fields))


@hostile("a secure sum's messages in local mode", "SUM-")
def _(w: Ward) -> list[bytes]:
    prepare = {"run": RUN, "index": 0, "dim": 111}
    return said(Message(kind="run.prepare", sender=COORDINATOR, fields=prepare))


# ... and of a secure sum

PREPARE = {"run": RUN, "index": 0, "dim": 111}


@hostile("a secure sum asked for in the open", "SUM-PHASE", "secure-sum")
def _(w: Ward) -> list[bytes]:
    return said(question(), question(roster=None), question(roster={}))


@hostile("substituted channel keys", "SUM-SIGNATURE", "secure-sum")
def _(w: Ward) -> list[bytes]:
    """The coordinator puts its own key in b's place, signed by itself, by c, or not at all."""
    from cohortium.common.privacy.entropy import Material
    from cohortium.common.protocol.channels import open_channel

    made = []
    for signer in (COORDINATOR, "c", "evil"):
        keys = []
        for site in SITES:
            owner = key(signer) if site == "b" else key(site)
            _, public = open_channel(run_id=RUN, site=site, identity=owner, entropy=Material(bytes([len(signer)]) * 32))
            keys.append(public)
        fields = {**PREPARE, "channels": guard_module.ChannelKeys(run_id=RUN, keys=tuple(keys)).to_message().fields}
        made.append(Message(kind="run.prepare", sender=COORDINATOR, fields=fields))
    return said(*made)


@hostile("channel keys of an earlier run", "SUM-SIGNATURE", "secure-sum")
def _(w: Ward) -> list[bytes]:
    from cohortium.common.privacy.entropy import Material
    from cohortium.common.protocol.channels import open_channel

    keys = [open_channel(run_id="run-0", site=s, identity=key(s), entropy=Material(bytes(32)))[1] for s in SITES]
    made = guard_module.ChannelKeys(run_id=RUN, keys=tuple(keys)).to_message().fields
    return said(Message(kind="run.prepare", sender=COORDINATOR, fields={**PREPARE, "channels": made}))


@hostile("too few channel keys", "SUM-", "secure-sum")
def _(w: Ward) -> list[bytes]:
    fields = {**PREPARE, "channels": {"run_id": RUN, "keys": []}}
    return said(Message(kind="run.prepare", sender=COORDINATOR, fields=fields))


@hostile("a round before its keys", "SUM-PHASE", "secure-sum")
def _(w: Ward) -> list[bytes]:
    return said(Message(kind="run.prepare", sender=COORDINATOR, fields=PREPARE))


@hostile("a sum of another length than the plan's", "SUM-PARAMS", "secure-sum")
def _(w: Ward) -> list[bytes]:
    return said(
        *(Message(kind="run.prepare", sender=COORDINATOR, fields={**PREPARE, "dim": d}) for d in (0, 2001, 2**40))
    )


@hostile("survivors of a round that never was", "SUM-PHASE", "secure-sum")
def _(w: Ward) -> list[bytes]:
    fields = {"run": RUN, "index": 0, "survivors": {"context": "0" * 64, "survivors": list(SITES)}}
    return said(Message(kind="run.survivors", sender=COORDINATOR, fields=fields))


@hostile("shares of a round that never was", "SUM-PHASE", "secure-sum")
def _(w: Ward) -> list[bytes]:
    fields = {"run": RUN, "index": 0, "mirrored": 0, "reveal": {"context": "0" * 64, "survivors": [], "votes": {}}}
    return said(Message(kind="run.reveal", sender=COORDINATOR, fields=fields))


STAGES = (
    stage("one", "counts", 0, max_dim=113),
    stage("two", "counts", 1, max_dim=113),
    stage("three", "gradient", 2, steps=3),
)


def begun(folder: Path, mode: str) -> Ward:
    if mode == "local":
        return ward(folder, plan(stages=STAGES, epsilon=50.0), lifetime_epsilon=50.0, seed=None)
    return ward(folder, plan(SITES, mode=mode), seed=None)


@pytest.mark.parametrize("why", HOSTILE_MESSAGES)
def test_a_hostile_message_is_refused_before_a_record_is_read(why: str, tmp_path: Path, opened: mock.Mock) -> None:
    code, mode, attempt = HOSTILE_MESSAGES[why]
    consortium = begun(tmp_path, mode)
    opened.reset_mock()
    before, vault = charges(consortium), consortium.guard("a")._vault_().names("")
    for envelope in attempt(consortium):
        reply = unseal(consortium.guard("a").handle(envelope), key("a").public_key(), sender="a")
        assert reply.kind == "site.refused", f"{why}: {reply}"
        assert set(reply.fields) == {"code"} and reply.fields["code"] in checks.REFUSALS - {"GUARD-INTERNAL"}
        assert logged(consortium).startswith(code), (why, logged(consortium))
    assert not opened.called, f"{why}: the table was read"
    assert charges(consortium) == before and consortium.guard("a")._vault_().names("") == vault
    consortium.close()


def test_the_same_index_with_another_question(tmp_path: Path) -> None:
    consortium = begun(tmp_path, "local")
    first = consortium.ask("a", 0, counts())
    for query in (counts(columns=(0,)), counts(columns=(3, 2, 1, 0))):
        assert consortium.ask("a", 0, query).fields == {"code": "REFUSED"}
    assert consortium.ask("a", 0, counts()) == first and charges(consortium) == {(RUN, "0")}
    consortium.close()


def test_noise_that_the_question_brings_along_is_not_heeded(tmp_path: Path) -> None:
    """What is drawn and charged is the approved plan's, whatever else a message says."""
    consortium = begun(tmp_path, "local")
    made = question()
    query = {**made.fields["query"], "noise_multiplier": "0x0p+0", "sigma": 0, "rate": 1}
    asked = dataclasses.replace(made, fields={**made.fields, "query": query, "noise": 0, "plan": "0" * 64})
    reply = consortium.say("a", asked)
    assert reply.kind == "site.noised"
    entry = consortium.guard("a")._ledger_().book.entries[RUN, "0"]
    assert (entry.event, entry.plan) == (consortium.plan.stages[0].event, consortium.plan.digest)
    values = np.frombuffer(reply.blobs["values"], "<i8") * float.fromhex(reply.fields["lattice"])
    assert values.std() > 15 * counts().sensitivity_l2, "σ = 20 was planned; the counts themselves are below 30"
    consortium.close()


def test_indices_out_of_order_are_each_their_own_and_once(tmp_path: Path) -> None:
    """The plan is a list of releases, not a story: any order costs the same, and none is answered twice."""
    consortium = begun(tmp_path, "local")
    steps = gradient(local=LocalSteps(steps=3, learning_rate=0.1, denominator=10.0))
    for index, query in ((2, steps), (0, counts()), (1, counts())):
        assert consortium.ask("a", index, query).kind == "site.noised"
    for index in (0, 1, 2):
        assert consortium.ask("a", index, counts(columns=(1,))).kind == "site.refused"
    assert len(charges(consortium)) == 3
    consortium.close()


def test_two_survivor_sets(tmp_path: Path) -> None:
    checks.passes(checks.check_a_site_signs_one_survivor_set_even_with_an_older_vault)


def test_a_changed_plan_under_the_same_run(tmp_path: Path, opened: mock.Mock) -> None:
    """The coordinator exchanges the approved proposal for one with less noise: no signature fits it."""
    consortium = begun(tmp_path, "local")
    opened.reset_mock()
    worse = plan(stages=[stage("one", "counts", 0, noise_multiplier=2.0)])
    place = consortium.directory("a") / "approved" / RUN
    approved = (place / "proposal.bin").read_bytes()
    (place / "proposal.bin").write_bytes(proposal(worse))
    consortium.kill("a")
    for message in (HELLO, question()):
        assert consortium.say("a", message).fields == {"code": "REFUSED"}
    with pytest.raises(CohortiumError, match="PROPOSAL-EXISTS"):
        (place / "proposal.bin").write_bytes(approved)
        approve(consortium.directory("a"), proposal(worse), key("officer of a"), check_table=False)
    assert not opened.called and not charges(consortium)
    consortium.close()


def test_everything_that_was_said_said_again(tmp_path: Path) -> None:
    """Replays of a whole run, in order and backwards: the ledger does not move but for hellos, nothing new leaves."""
    consortium = begun(tmp_path, "secure-sum")
    heard: list[Message] = []

    def noted(messages: Any, label: str) -> dict[str, Message]:
        heard.append(messages["a"])
        return consortium.exchange(messages, label)

    strategy = consortium.strategy(exchange=noted)
    for index in (0, 1):
        strategy.answer(index, consortium.plan.stage_of(index), counts(), next_dim=counts().dim)
    vectors = {e for e in consortium.sent if b"sum.masked" in e[:200]}
    before = consortium.guard("a")._ledger_().head()
    consortium.sent.clear()
    for message in [*heard, *reversed(heard)]:
        consortium.say("a", message)
    assert consortium.guard("a")._ledger_().head() == before
    assert {e for e in consortium.sent if b"sum.masked" in e[:200]} <= vectors
    consortium.close()


# ---- noise on the line --------------------------------------------------------------------------------------


def mutated(rng: random.Random, envelopes: list[bytes], messages: list[Message]) -> bytes:
    """An envelope of the coordinator's with something wrong: its bytes, or what it says, signed or not."""
    roll = rng.random()
    if roll < 0.4:  # bytes
        bad = bytearray(rng.choice(envelopes))
        for _ in range(rng.randint(1, 8)):
            how = rng.random()
            at = rng.randrange(len(bad) or 1)
            if how < 0.5 and bad:
                bad[at] ^= 1 << rng.randrange(8)
            elif how < 0.7:
                del bad[at : at + rng.randint(1, 64)]
            else:
                bad[at:at] = rng.randbytes(rng.randint(1, 64))
        return bytes(bad)
    message = rng.choice(messages)
    fields, blobs, kind = copy.deepcopy(message.fields), dict(message.blobs), message.kind
    junk = [None, True, -1, 2**60, "", "x" * 3000, [], {}, [[]], {"a": {"b": []}}, "../..", "00" * 32, ["a", "b"], 1]
    for _ in range(rng.randint(1, 4)):
        target: Any = fields
        while isinstance(target, dict) and target and rng.random() < 0.6:
            name = rng.choice(sorted(map(str, target)))
            if isinstance(target.get(name), dict) and target[name]:
                target = target[name]
            else:
                break
        names = sorted(map(str, target))
        how = rng.random()
        if names and how < 0.25:
            target.pop(rng.choice(names))
        elif names and how < 0.8:
            target[rng.choice([*names, "more"])] = copy.deepcopy(rng.choice(junk))
        elif blobs and how < 0.95:
            name = rng.choice(sorted(blobs))
            blobs[name] = rng.choice([b"", blobs[name][:-1], rng.randbytes(min(len(blobs[name]), 4096))])
        else:
            kind = rng.choice(["run.hello", "run.witness", "run.start", "run.prepare", "run.ask", "run.survivors"])
    try:
        return seal(
            Message(kind=kind, sender=rng.choice([COORDINATOR] * 9 + ["a"]), fields=fields, blobs=blobs),
            key(rng.choice([COORDINATOR] * 9 + ["evil"])),
        )
    except CohortiumError:
        return rng.randbytes(100)


def real_messages(folder: Path) -> list[Message]:
    """Every message that site a gets in a run of its own, from hello to farewell."""
    consortium = ward(folder, plan(SITES, mode="secure-sum"), started=False, seed=None)
    heard: list[Message] = []
    handle = guard_module.Guard.handle

    def noted(self: Any, envelope: bytes) -> bytes:
        if self.site == "a":
            heard.append(unseal(envelope, key(COORDINATOR).public_key(), sender=COORDINATOR))
        return handle(self, envelope)

    with mock.patch.object(guard_module.Guard, "handle", noted):
        consortium.start()
        consortium.answer(0, counts())
        consortium.say("a", Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0}))
    consortium.close()
    assert {m.kind for m in heard} >= {"run.hello", "run.witness", "run.start", "run.prepare", "run.ask", "run.reveal"}
    return heard


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ten_thousand_fuzzed_envelopes() -> None:
    """Codes, no exception, no charge, no record read; said to a hospital whose run has not begun, so that even a
    well-formed question that survives the mutation is one too many."""
    with checks.scratch() as folder:
        fuzz(Path(folder), 10_000)


def test_five_hundred_fuzzed_envelopes() -> None:
    with checks.scratch() as folder:
        fuzz(Path(folder), 500)


def fuzz(folder: Path, count: int) -> None:
    messages = real_messages(folder / "real")
    envelopes = [seal(message, key(COORDINATOR)) for message in messages]
    other = ward(folder / "target", plan(SITES, mode="secure-sum"), started=False, seed=None)
    guard, public, rng = other.guard("a"), key("a").public_key(), random.Random(11)
    codes: dict[str, int] = {}
    opened = mock.Mock(side_effect=TableError("TABLE-OPENED", "a record was read"))
    started = time.process_time()
    with mock.patch.object(guard_module, "load_records", opened):
        for _ in range(count):
            bad = mutated(rng, envelopes, messages)
            reply = unseal(guard.handle(bad), public, sender="a")
            if reply.kind != "site.refused":
                assert reply.kind in ("site.witnessed", "site.finished") and not reply.blobs, reply.kind
                codes[reply.kind] = codes.get(reply.kind, 0) + 1
                continue
            assert set(reply.fields) == {"code"} and reply.fields["code"] in checks.REFUSALS and not reply.blobs
            codes[reply.fields["code"]] = codes.get(reply.fields["code"], 0) + 1
    # A hello that is still sound is a hello: it is the one message that may open the table, and here it fails to.
    assert codes.pop("REFUSED-DATA", 0) == opened.call_count < count / 20
    assert codes["BAD-ENVELOPE"] > count / 3 and len(codes) >= 4 and "GUARD-INTERNAL" not in codes
    assert not charges(other)
    assert time.process_time() - started < 60
    other.close()


def test_a_policy_that_became_stricter_counts_at_once(tmp_path: Path, opened: mock.Mock) -> None:
    """site.toml is changed after the approval; the guard starts again and refuses before it reads a record."""
    consortium = begun(tmp_path, "local")
    consortium.kill("a")
    (consortium.directory("a") / "site.toml").unlink()
    policy("a", minimum_sites=2).save(consortium.directory("a") / "site.toml")
    opened.reset_mock()
    for message in (HELLO, question()):
        assert consortium.say("a", message).fields == {"code": "REFUSED-POLICY"}
    assert not opened.called
    consortium.close()

"""The guard: each release once, killed anywhere, asked anything; only codes and noised numbers ever leave."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pytest
from hospital import RUN, Ward, counts, gradient, key, moments, plan, stage, table, ward

from cohortium.client.guard import Guard, held_out, is_held_out, open_shared_guard
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.common.queries import AnyQuery
from cohortium.strategies.base import COORDINATOR, ask_message

HELLO = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})


@pytest.mark.parametrize(
    "check",
    [
        checks.check_a_release_is_answered_once, checks.check_a_crash_never_gives_a_second_answer,
        checks.check_refusals_are_bare_codes, checks.check_training_and_holdout_share_nobody,
        checks.check_a_secure_sum_is_the_plain_sum, checks.check_a_masked_vector_looks_random,
        checks.check_a_replayed_vector_is_not_counted,
    ],
    ids=lambda check: check.__name__,
)  # fmt: skip
def test_guarantee(check: Callable[[], None]) -> None:
    checks.passes(check)


def test_a_crash_in_a_secure_sum_never_gives_a_second_answer() -> None:
    checks.check_a_crash_never_gives_a_second_answer(mode="secure-sum")


# ---- approval and order -------------------------------------------------------------------------------------


def test_a_run_that_was_not_approved_gets_nothing(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), approved=False)
    for message in (HELLO, ask_message(RUN, 0, counts(), mirrored=0)):
        reply = consortium.say("a", message)
        assert (reply.kind, reply.fields) == ("site.refused", {"code": "REFUSED"})
    assert consortium.state("a", 0) == "NONE"
    consortium.close()


def test_the_table_is_checked_before_anything_is_charged(tmp_path: Path) -> None:
    bad = table(10).rename(columns={"age": "years"})
    consortium = ward(tmp_path, plan(), tables={"a": bad})
    for message in (HELLO, ask_message(RUN, 0, counts(), mirrored=0)):
        assert consortium.say("a", message).fields == {"code": "DATA-PROBLEM"}
    assert consortium.state("a", 0) == "NONE"
    consortium.close()


def test_too_few_patients_take_no_part(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), minimum_patients=31)
    assert consortium.say("a", HELLO).fields == {"code": "REFUSED-POLICY"}
    assert consortium.state("a", 0) == "NONE"
    consortium.close()


def test_only_the_coordinators_envelopes_are_read(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan())
    good = seal(HELLO, key(COORDINATOR))
    for envelope in (
        b"",
        b"COH1",
        good[:-1],
        good + b"x",
        seal(HELLO, key("somebody")),
        good[:9] + b"\0" + good[10:],
    ):
        reply = unseal(consortium.guard("a").handle(envelope), key("a").public_key(), sender="a")
        assert reply.fields == {"code": "BAD-ENVELOPE"}
    consortium.close()


def test_other_questions_than_the_plans_are_refused_before_anything_is_charged(tmp_path: Path) -> None:
    consortium = ward(
        tmp_path, plan(stages=[stage("one", "counts", 0, max_dim=110), stage("two", "moments", 1)])
    )
    wrong: list[tuple[int, AnyQuery]] = [
        (0, moments()), (0, counts()), (0, counts(part="holdout", columns=(0,))), (1, counts()), (1, gradient()),
        (2, counts()), (10**6, counts()),
    ]  # fmt: skip
    for index, query in wrong:
        assert consortium.ask("a", index, query).kind == "site.refused"
        assert consortium.state("a", index) == "NONE"
    assert consortium.ask("a", 0, counts(columns=(0,))).kind == "site.noised"
    consortium.close()


def test_a_secure_sum_is_answered_masked_and_only_in_its_round(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(("a", "b", "c"), mode="secure-sum"))
    assert consortium.ask("a", 0, counts()).fields == {"code": "BAD-ROUND"}  # nothing was prepared
    question = checks._question(consortium, "secure-sum")
    for change in ({"roster": None}, {"index": 1}, {"query": counts(columns=(0,)).to_wire()[0]}):
        reply = consortium.say("a", dataclasses.replace(question, fields={**question.fields, **change}))
        assert reply.kind == "site.refused" and set(reply.fields) == {"code"}
    consortium.close()


def test_a_shared_guard_lets_go_after_every_message(tmp_path: Path) -> None:
    """Two guards of one site in turn, as where an engine moves a site between processes: still each once."""
    consortium = ward(tmp_path, plan(), seed=None)
    guards = [open_shared_guard(consortium.directory("a")) for _ in range(2)]
    question = seal(ask_message(RUN, 0, counts(), mirrored=0), key(COORDINATOR))
    answers = {guards[i % 2].handle(question) for i in range(4)}
    assert len(answers) == 1
    other = seal(ask_message(RUN, 0, counts(columns=(0,)), mirrored=0), key(COORDINATOR))
    assert unseal(guards[1].handle(other), key("a").public_key(), sender="a").kind == "site.refused"


def test_the_lines_of_the_ledger_travel_from_where_the_mirror_stands(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan())
    consortium.ask("a", 0, counts())
    fields = consortium.say(
        "a", Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 2})
    ).fields
    assert [line["body"]["n"] for line in fields["lines"]] == [2, 3]
    assert [line["body"]["state"] for line in fields["lines"]] == ["SEALED", "RELEASED"]
    assert (consortium.directory("a") / "ledger.jsonl").exists()
    consortium.close()


def test_who_is_held_out_is_a_public_function_of_the_patient() -> None:
    from hospital import people

    records = people(4000, most_rows=1)
    held = held_out(records, study="ward", share=0.25)
    assert abs(held.mean() - 0.25) < 6 * np.sqrt(0.25 * 0.75 / 4000)
    order = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(is_held_out(records.identity[order], study="ward", share=0.25), held[order])
    assert not held_out(records, study="ward", share=0.0).any()
    assert not np.array_equal(held_out(records, study="other", share=0.25), held)


# ---- nothing but codes and noise leaves ---------------------------------------------------------------------


def planted_table() -> tuple[Any, list[bytes]]:
    """A table whose cells and identifiers hold 1,000 strings that occur nowhere else."""
    rows = table(500, seed=1, most_rows=1)
    names = [f"zq{i:04d}patientname" for i in range(500)]
    words = [f"zx{i:04d}diagnosis" for i in range(500)]
    rows["pid"] = names
    rows.loc[:, "stage"] = words  # outside the dictionary: missing by public rule
    return rows, [text.encode() for text in names + words]


@pytest.mark.parametrize("mode", ["local", "secure-sum"])
def test_no_text_of_the_data_ever_leaves(mode: str, tmp_path: Path) -> None:
    rows, strings = planted_table()
    sites = ("a",) if mode == "local" else ("a", "b", "c")
    some = [stage("one", "counts", 0), stage("two", "moments", 1), stage("three", "gradient", 2)]
    consortium = ward(tmp_path, plan(sites, mode=mode, stages=some), tables=dict.fromkeys(sites, rows))
    strategy = consortium.strategy()
    for index, query in enumerate((counts(), moments(), gradient(path="fast"))):
        strategy.answer(index, consortium.plan.stage_of(index), query)
    broken = table(5)
    broken["age"] = [strings[0].decode()] * len(broken)
    broken.to_parquet(consortium.directory("a") / "data.parquet")
    consortium.kill("a")
    assert consortium.say("a", HELLO).fields == {"code": "DATA-PROBLEM"}
    finish = Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})
    consortium.exchange(dict.fromkeys(sites, finish), "finish")
    consortium.close()
    everything = b"\n".join(consortium.sent)
    assert len(consortium.sent) > 5 and b"site.refused" in everything
    assert not [text for text in strings if text in everything]
    for name in ("data.parquet", str(tmp_path), "dictionary", "Traceback", "Error"):
        assert name.encode() not in everything, name


@pytest.mark.parametrize("mode", ["local", "secure-sum"])
def test_three_thousand_malformed_messages_get_bare_codes_and_cost_nothing(mode: str, tmp_path: Path) -> None:
    """1,500 in each mode, signed by the coordinator so that they get past the envelope: wrong, missing and surplus
    fields and blobs. Only a well-formed question for the other release of the plan may be answered and charged."""
    sites = ("a",) if mode == "local" else ("a", "b", "c")
    consortium = ward(tmp_path, plan(sites, mode=mode))
    real: list[Message] = []

    def note(messages: Any, label: str) -> dict[str, Message]:
        real.append(messages["a"])
        return consortium.exchange(messages, label)

    consortium.strategy(exchange=note).answer(0, consortium.plan.stage_of(0), counts())
    real.append(HELLO)
    rng = random.Random(5)
    junk: list[Any] = [None, -1, 0, 1, 2**70, 10**30, "", "x", "..", "a" * 2000, [], [None], [[]], [1, 2], {}, {"a": 1},
                       True, "00" * 32, ["a", "b", "c"], {"run": RUN}, [[["a"]]]]  # fmt: skip
    outcomes: dict[str, int] = {}
    for _ in range(1500):
        message = rng.choice(real)
        fields, blobs, kind = copy.deepcopy(message.fields), dict(message.blobs), message.kind
        for _ in range(rng.randint(1, 3)):
            target, name = _place(rng, fields)
            roll = rng.random()
            if roll < 0.15 and name in target:
                target.pop(name)
            elif roll < 0.8:
                target[name] = rng.choice(junk)
            elif blobs and roll < 0.95:
                blob = rng.choice(sorted(blobs))
                blobs[blob] = rng.choice([b"", rng.randbytes(len(blobs[blob])), blobs[blob][:-1]])
            else:
                kind = rng.choice(
                    ["run.ask", "run.prepare", "run.reveal", "run.survivors", "run.finish", "x", "run.hello"]
                )
        reply = consortium.say("a", Message(kind=kind, sender=COORDINATOR, fields=fields, blobs=blobs))
        outcomes[reply.kind] = outcomes.get(reply.kind, 0) + 1
        if reply.kind == "site.refused":
            assert (
                set(reply.fields) == {"code"} and reply.fields["code"] in checks.REFUSALS and not reply.blobs
            )
            assert reply.fields["code"] != "GUARD-INTERNAL"
    assert outcomes["site.refused"] > 1000
    charged = consortium.guard("a")._ledger_().book.entries
    assert {entry.release for entry in charged.values()} <= {"0", "1"}
    assert all(entry.state in ("SEALED", "RELEASED") for entry in charged.values()), "a refusal was charged"
    consortium.close()


def _place(rng: random.Random, fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Somewhere in the fields, nested ones included; sometimes a name that is not there."""
    target = fields
    for _ in range(2):
        inner = [v for v in target.values() if isinstance(v, dict) and v]
        if inner and rng.random() < 0.5:
            target = rng.choice(inner)
    return target, rng.choice([*sorted(map(str, target)), "more"])


def test_the_words_of_an_error_stay_in_the_sites_own_log(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), tables={"a": table(10).drop(columns=["sex"])})
    reply = consortium.say("a", HELLO)
    consortium.close()
    assert reply.fields == {"code": "DATA-PROBLEM"}
    entry = json.loads((consortium.directory("a") / "guard.log").read_text().splitlines()[-1])
    assert entry["local"] == "TABLE-COLUMN" and "sex" in entry["sentence"]


# ---- local steps and resumption -----------------------------------------------------------------------------


def test_local_steps_are_charged_and_answered_once(tmp_path: Path) -> None:
    from cohortium.common.queries import LocalSteps

    local = LocalSteps(steps=3, learning_rate=0.1, denominator=10.0)
    consortium = ward(tmp_path, plan(stages=[stage("one", "gradient", 0, steps=3)]), seed=None)
    first = consortium.ask("a", 0, gradient(local=local))
    consortium.kill("a")
    assert first.kind == "site.noised" and consortium.ask("a", 0, gradient(local=local)) == first
    other = LocalSteps(steps=3, learning_rate=0.2, denominator=10.0)
    assert consortium.ask("a", 0, gradient(local=other)).kind == "site.refused"
    assert consortium.guard("a")._ledger_().charged_events()[0][1] == 3
    consortium.close()


def test_a_site_that_died_in_a_secure_sum_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed between every two messages of a round: the sum is what it would have been without."""
    consortium = checks.quiet_ward(str(tmp_path))

    def dying(messages: Any, label: str) -> dict[str, Message]:
        for site in messages:
            consortium.kill(site)
        return consortium.exchange(messages, label)

    strategy = consortium.strategy(exchange=dying)
    for index in (0, 1):
        total = strategy.answer(index, consortium.plan.stage_of(index), counts(), next_dim=counts().dim)
        assert np.array_equal(total.values, checks.plain_sum(consortium, counts(), ("a", "b", "c")))
    consortium.close()


def test_a_finished_rounds_secrets_are_gone(tmp_path: Path) -> None:
    consortium: Ward = checks.quiet_ward(str(tmp_path), releases=3)
    strategy = consortium.strategy()
    for index in range(3):
        strategy.answer(index, consortium.plan.stage_of(index), counts(), next_dim=counts().dim)
    vault = consortium.guard("a")._vault_()
    assert vault.get(f"round/{RUN}/0") is None and vault.get(f"round/{RUN}/1") is None
    last = json.loads(vault.get(f"round/{RUN}/2").partition(b"\n")[2])["memory"]  # type: ignore[union-attr]
    assert last["round_private"] == last["seed"] == "" and last["seed_shares"] == last["key_shares"] == {}
    consortium.close()


def test_a_guard_needs_its_own_directory(tmp_path: Path) -> None:
    from cohortium.common.errors import UsageError

    with pytest.raises(UsageError, match="SITE-MISSING"):
        Guard(tmp_path)

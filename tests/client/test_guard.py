"""The guard: each release once, killed anywhere, asked anything; only codes and noised numbers ever leave."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import checks
import numpy as np
import pytest
from hospital import RUN, Ward, counts, gradient, key, moments, plan, stage, table, ward

from cohortium.client import guard as guard_module
from cohortium.client.guard import Guard, held_out, is_held_out, open_shared_guard
from cohortium.common.errors import CohortiumError
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.common.queries import AnyQuery
from cohortium.strategies.base import COORDINATOR, ask_message

HELLO = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})


@pytest.mark.parametrize(
    "check",
    [
        checks.check_a_release_is_answered_once,
        checks.check_a_crash_never_gives_a_second_answer,
        checks.check_refusals_are_bare_codes,
        checks.check_training_and_holdout_share_nobody,
        checks.check_a_secure_sum_is_the_plain_sum,
        checks.check_a_masked_vector_looks_random,
        checks.check_a_replayed_vector_is_not_counted,
        checks.check_a_site_signs_one_survivor_set_even_with_an_older_vault,
        checks.check_a_finished_run_leaves_no_keys,
    ],
    ids=lambda check: check.__name__,
)
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
    consortium = ward(tmp_path / "bad", plan(), tables={"a": bad})
    assert consortium.say("a", HELLO).fields == {"code": "REFUSED-DATA"}
    assert consortium.say("a", ask_message(RUN, 0, counts(), mirrored=0)).fields == {"code": "REFUSED-LEDGER"}
    assert consortium.state("a", 0) == "NONE"
    consortium.close()
    consortium = ward(tmp_path / "then-bad", plan())
    bad.to_parquet(consortium.directory("a") / "data.parquet")
    for message in (HELLO, ask_message(RUN, 0, counts(), mirrored=0)):
        assert consortium.say("a", message).fields == {"code": "REFUSED-DATA"}
    assert consortium.state("a", 0) == "NONE"
    consortium.close()


def test_a_table_that_changes_within_a_run_is_refused(tmp_path: Path) -> None:
    """A guard that starts again and finds other patients takes no further part: what was priced is one table."""
    consortium = ward(tmp_path, plan())
    assert consortium.ask("a", 0, counts()).kind == "site.noised"
    path = consortium.directory("a") / "data.parquet"
    first = path.read_bytes()
    table(30, seed=99, prefix="a").to_parquet(path)
    consortium.kill("a")
    for message in (HELLO, ask_message(RUN, 1, counts(), mirrored=0)):
        assert consortium.say("a", message).fields == {"code": "REFUSED-DATA"}
        assert log_of(consortium)["local"] == "TABLE-CHANGED"
    assert consortium.state("a", 1) == "NONE"
    path.write_bytes(first)
    consortium.kill("a")
    assert consortium.ask("a", 1, counts()).kind == "site.noised"
    consortium.close()


def log_of(consortium: Ward, site: str = "a") -> dict[str, Any]:
    """The last line of a site's own log."""
    return dict(json.loads((consortium.directory(site) / "guard.log").read_text().splitlines()[-1]))


def test_a_paused_hospital_answers_nothing_and_goes_on_later(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan())
    mark = consortium.directory("a") / "paused"
    mark.touch()
    for message in (HELLO, ask_message(RUN, 0, counts(), mirrored=0)):
        assert consortium.say("a", message).fields == {"code": "REFUSED-PAUSED"}
    assert consortium.state("a", 0) == "NONE"
    mark.unlink()
    assert consortium.ask("a", 0, counts()).kind == "site.noised"
    consortium.close()


def test_too_few_patients_take_no_part(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), minimum_patients=31)
    assert consortium.say("a", HELLO).fields == {"code": "REFUSED-DATA"}
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
    consortium = ward(tmp_path, plan(stages=[stage("one", "counts", 0, max_dim=110), stage("two", "moments", 1)]))
    wrong: list[tuple[int, AnyQuery]] = [
        (0, moments()),
        (0, counts()),
        (0, counts(part="holdout", columns=(0,))),
        (1, counts()),
        (1, gradient()),
        (2, counts()),
        (10**6, counts()),
    ]
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
        "a", Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 4})
    ).fields
    assert [line["body"]["n"] for line in fields["lines"]] == [4, 5]
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
    assert consortium.say("a", HELLO).fields == {"code": "REFUSED-DATA"}
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
    junk: list[Any] = [
        None,
        -1,
        0,
        1,
        2**70,
        10**30,
        "",
        "x",
        "..",
        "a" * 2000,
        [],
        [None],
        [[]],
        [1, 2],
        {},
        {"a": 1},
        True,
        "00" * 32,
        ["a", "b", "c"],
        {"run": RUN},
        [[["a"]]],
    ]
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
                target[name] = copy.deepcopy(rng.choice(junk))  # or a junk dict may come to hold itself
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
            assert set(reply.fields) == {"code"} and reply.fields["code"] in checks.REFUSALS and not reply.blobs
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
    assert reply.fields == {"code": "REFUSED-DATA"}
    entry = json.loads((consortium.directory("a") / "guard.log").read_text().splitlines()[-1])
    assert entry["local"] == "TABLE-COLUMN" and "sex" in entry["text"]


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
        if index < 2:
            assert vault.names("round/") == [f"round/{RUN}/{i}" for i in (index, index + 1)]
            last = json.loads(vault.get(f"round/{RUN}/{index}").partition(b"\n")[2])["memory"]  # type: ignore[union-attr]
            assert last["round_private"] == last["seed"] == "" and last["seed_shares"] == last["key_shares"] == {}
    assert vault.names("round/") == vault.names("channel") == []
    consortium.close()


def test_a_round_that_a_site_dropped_out_of_is_forgotten_too(tmp_path: Path) -> None:
    consortium: Ward = checks.quiet_ward(str(tmp_path), releases=3)

    def lost(messages: Any, label: str) -> dict[str, Message]:
        return consortium.exchange({s: m for s, m in messages.items() if s != "b" or label != "0/agree"}, label)

    strategy = consortium.strategy(exchange=lost)
    with contextlib.suppress(CohortiumError):  # two of three still agree
        strategy.answer(0, consortium.plan.stage_of(0), counts())
    strategy.answer(1, consortium.plan.stage_of(1), counts())
    assert consortium.guard("b")._vault_().names("round/") == [f"round/{RUN}/1"]
    consortium.close()


def test_the_last_answer_can_be_had_again_without_any_key(tmp_path: Path) -> None:
    """The coordinator died before it arrived: the same request gets the same bytes, another none."""
    consortium: Ward = checks.quiet_ward(str(tmp_path), releases=1)
    asked: dict[str, Message] = {}

    def watched(messages: Any, label: str) -> dict[str, Message]:
        asked.update({s: m for s, m in messages.items() if label == "0/unmask"})
        return consortium.exchange(messages, label)

    consortium.strategy(exchange=watched).answer(0, consortium.plan.stage_of(0), counts())
    mine = [e for e in consortium.sent if _is_from(e, "a")]
    first = mine[-1]
    finish = Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0, "final": False})
    for _ in range(2):
        assert consortium.say("a", asked["a"]).kind == "site.revealed" and consortium.sent[-1] == first
        consortium.kill("a")
        assert consortium.say("a", finish).kind == "site.finished"
    reveal = {**asked["a"].fields["reveal"], "votes": {}}
    other = dataclasses.replace(asked["a"], fields={**asked["a"].fields, "reveal": reveal})
    assert consortium.say("a", other).fields == {"code": "BAD-ROUND"}
    # No new keys either: the run is over here.
    assert consortium.say("a", HELLO).fields["channel"] is None
    prepare = Message(kind="run.prepare", sender=COORDINATOR, fields={"run": RUN, "index": 0, "dim": 111})
    assert consortium.say("a", prepare).fields == {"code": "BAD-ROUND"}
    consortium.say("a", dataclasses.replace(finish, fields={**finish.fields, "final": True}))
    assert consortium.say("a", asked["a"]).fields == {"code": "BAD-ROUND"}
    consortium.close()


def _is_from(envelope: bytes, site: str) -> bool:
    with contextlib.suppress(CohortiumError):
        return unseal(envelope, key(site).public_key(), sender=site).sender == site
    return False


def test_an_interrupted_run_keeps_its_keys_and_goes_on(tmp_path: Path) -> None:
    """The farewell is said after an interruption too; only `final` ends a run that is not over here."""
    consortium: Ward = checks.quiet_ward(str(tmp_path), releases=2)
    strategy = consortium.strategy()
    strategy.answer(0, consortium.plan.stage_of(0), counts())
    finish = Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0, "final": False})
    consortium.exchange(dict.fromkeys("abc", finish), "finish")
    assert consortium.guard("a")._vault_().get(f"channel/{RUN}")
    final = dataclasses.replace(finish, fields={**finish.fields, "final": True})
    consortium.say("c", final)
    assert consortium.guard("c")._vault_().names("channel") == consortium.guard("c")._vault_().names("round/") == []
    total = strategy.answer(1, consortium.plan.stage_of(1), counts())  # c counts as gone
    assert total.sites == ("a", "b")
    consortium.close()


def test_an_approval_that_is_taken_back_ends_with_the_next_message(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan())
    assert consortium.ask("a", 0, counts()).kind == "site.noised"
    path = consortium.directory("a") / "approved" / RUN / "approval.sig"
    signature = path.read_bytes()
    path.unlink()
    for message in (HELLO, ask_message(RUN, 1, counts(), mirrored=0), ask_message(RUN, 0, counts(), mirrored=0)):
        assert consortium.say("a", message).fields == {"code": "REFUSED"}
    path.write_bytes(bytes(64))
    assert consortium.say("a", HELLO).fields == {"code": "REFUSED"}
    assert consortium.state("a", 1) == "NONE"
    path.write_bytes(signature)
    assert consortium.ask("a", 1, counts()).kind == "site.noised"
    consortium.close()


@pytest.mark.parametrize(
    "failure", [RuntimeError("p00001"), MemoryError("p00001"), OSError("p00001"), Exception("p00001")]
)
def test_a_failure_inside_leaves_as_a_code_and_burns_what_was_charged(failure: Exception, tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), seed=None)

    def failing(**given: Any) -> Any:
        raise failure

    with mock.patch.object(guard_module, "release", failing):
        assert consortium.ask("a", 0, counts()).fields == {"code": "GUARD-INTERNAL"}
    assert consortium.ask("a", 0, counts()).fields == {"code": "REFUSED"}
    assert consortium.ask("a", 1, counts()).kind == "site.noised"
    consortium.close()
    assert consortium.state("a", 0) == "BURNED"
    assert "p00001" not in (consortium.directory("a") / "guard.log").read_text()


def test_a_guard_without_its_ledger_or_log_still_refuses_by_a_code(tmp_path: Path) -> None:
    from cohortium.common.privacy.ledger import Ledger

    consortium = ward(tmp_path, plan())
    (consortium.directory("a") / "guard.log").mkdir()  # nothing can be written there
    with Ledger.open(consortium.directory("a") / "ledger.db", key("a")):
        assert consortium.say("a", HELLO).fields == {"code": "REFUSED-LEDGER"}
    assert consortium.say("a", HELLO).kind == "site.hello"
    consortium.close()


def test_a_guard_needs_its_own_directory(tmp_path: Path) -> None:
    from cohortium.common.errors import UsageError

    with pytest.raises(UsageError, match="SITE-MISSING"):
        Guard(tmp_path)


# ---- the officer's word --------------------------------------------------------------------------------------


def test_a_running_guard_takes_up_what_the_officer_changes(tmp_path: Path) -> None:
    """A lower cap, a second officer who must sign, another officer's key: from the next message on, without a restart.

    Power: a guard that reads site.toml once answers all of these.
    """
    from hospital import policy

    from cohortium.common.protocol.signing import save_public

    consortium = ward(tmp_path, plan(), seed=None)
    settings = consortium.directory("a") / "site.toml"
    officers = [key(name).public_key().public_bytes_raw().hex() for name in ("officer of a", "another")]
    assert consortium.ask("a", 0, counts()).kind == "site.noised"

    def said() -> object:
        return consortium.ask("a", 1, counts()).fields.get("code")

    policy("a", lifetime_epsilon=0.1).save(settings)
    assert said() == "REFUSED"
    policy("a", officers=tuple(officers), officers_needed=2).save(settings)
    assert said() == "REFUSED"
    policy("a", strategies=("secure-sum",)).save(settings)
    assert said() == "REFUSED-POLICY"
    settings.write_text("[site]\n")
    assert said() == "GUARD-INTERNAL"
    policy("a").save(settings)
    (consortium.directory("a") / "officer.pub").unlink()
    save_public(key("another").public_key(), consortium.directory("a") / "officer.pub")
    assert said() == "REFUSED"
    policy("a", officers=tuple(officers)).save(settings)
    assert consortium.ask("a", 1, counts()).kind == "site.noised"
    consortium.close()


def test_refusals_do_not_fill_the_disk(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan())
    log = consortium.directory("a") / "guard.log"
    with mock.patch.object(guard_module, "MOST_LOG_BYTES", 1000):
        for _ in range(40):
            consortium.guard("a").handle(b"x" * 100)
    assert log.stat().st_size < 1500 and log.with_name("guard.log.1").stat().st_size < 1500
    consortium.close()

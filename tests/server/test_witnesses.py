"""How a run begins at the coordinator: who is told what, who begins, what happens to sites that say nonsense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hospital import RUN, Ward, counts, key, plan, ward

from cohortium.common.privacy import chain, witness
from cohortium.common.protocol.messages import Message
from cohortium.server import witnesses
from cohortium.server.mirror import Mirror
from cohortium.strategies.base import COORDINATOR

SITES = ("a", "b", "c", "d", "e")


class Listening:
    """The sites of a ward behind an exchange that notes what was said, and may change answers."""

    def __init__(self, folder: Path, sites: tuple[str, ...] = SITES, **options: Any) -> None:
        mode = "secure-sum" if len(sites) > 2 else "local"
        self.ward: Ward = ward(folder, plan(sites, mode=mode, **options), started=False)
        self.identities = {site: key(site).public_key() for site in sites}
        self.mirror = Mirror(folder / "mirror.db", self.identities)
        self.asked: dict[str, dict[str, Message]] = {}
        self.refusals: dict[str, str] = {}
        self.changes: dict[tuple[str, str], Any] = {}  # (label, site) -> what to do with a reply

    def exchange(self, messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        self.asked[label] = dict(messages)
        replies = {}
        for site, message in messages.items():
            reply = self.ward.say(site, message)
            change = self.changes.get((label, site))
            if reply.kind == "site.refused":
                self.refusals[site] = str(reply.fields["code"])
            elif change is not None:
                replies |= change(site, reply)
            else:
                replies[site] = reply
        return replies

    def begin(self) -> tuple[str, ...]:
        answered = self.exchange(witnesses.hellos(RUN, self.ward.plan.sites, self.mirror), "hello")
        for site, reply in answered.items():
            self.mirror.receive(site, reply.fields["lines"])
        return witnesses.start(
            plan=self.ward.plan,
            run=RUN,
            key=key(COORDINATOR),
            identities=self.identities,
            mirror=self.mirror,
            exchange=self.exchange,
            answered=answered,
            refusals=self.refusals,
        )

    def close(self) -> None:
        self.mirror.close()
        self.ward.close()


def gone(site: str, reply: Message) -> dict[str, Message]:
    return {}


def test_all_begin_and_nobody_is_shown_a_body(tmp_path: Path) -> None:
    there = Listening(tmp_path)
    assert there.begin() == SITES and not there.refusals
    for site, message in there.asked["witness"].items():
        assert set(message.fields["checkpoints"]) == set(SITES) - {site}
        assert set(message.blobs) == {f"proof/{other}" for other in SITES if other != site}
        for other, note in message.fields["checkpoints"].items():
            head = chain.verify_checkpoint(note, there.identities[other], owner=other)
            assert len(message.blobs[f"proof/{other}"]) == 32 * head.size
            witness.check_extends(None, head, message.blobs[f"proof/{other}"])
    for site, message in there.asked["start"].items():
        assert set(message.fields["signatures"]) == {COORDINATOR, *SITES} - {site}
        assert message.fields["refused"] == {}
    there.close()


def test_the_second_time_only_what_is_new_is_shown(tmp_path: Path) -> None:
    there = Listening(tmp_path)
    there.begin()
    assert there.begin() == SITES
    for message in there.asked["witness"].values():
        assert {len(blob) for blob in message.blobs.values()} == {32}, "one line more: the new start"
    seen = there.asked["hello"]["a"].fields["seen"]
    assert chain.verify_checkpoint(seen, there.identities["a"]).size == there.mirror.size("a") - 1
    there.close()


def test_sites_that_are_away_at_each_step(tmp_path: Path) -> None:
    """k = 3 of 5: one may be silent as a witness; a second, and nobody has enough."""
    for label, missing, expected in (
        ("hello", "e", ("a", "b", "c", "d")),
        ("witness", "e", SITES),
        ("start", "e", ("a", "b", "c", "d")),
        ("witness", "de", ("d", "e")),
    ):
        there = Listening(tmp_path / f"{label}-{missing}")
        there.changes = {(label, site): gone for site in missing}
        begun = there.begin()
        # d and e get three words (a, b, c) each; a, b, c only two of each other.
        assert begun == expected, (label, missing)
        there.close()


def test_words_that_no_guard_would_count_are_left_out(tmp_path: Path) -> None:
    there = Listening(tmp_path)

    def nonsense(site: str, reply: Message) -> dict[str, Message]:
        fields = {**reply.fields, "signatures": {"b": "00" * 64, "c": 7, "z": "x"}, "refused": {"d": "X" * 5000}}
        return {site: dataclasses.replace(reply, fields=fields)}

    there.changes = {("witness", "a"): nonsense}
    assert there.begin() == SITES
    assert "a" not in there.asked["start"]["b"].fields["signatures"]
    assert there.asked["start"]["d"].fields["refused"] == {"a": "X" * 128}
    for value in ([], None, {"b": {}}):

        def shapeless(site: str, reply: Message, value: Any = value) -> dict[str, Message]:
            return {site: dataclasses.replace(reply, fields={**reply.fields, "signatures": value})}

        there.changes = {("witness", "a"): shapeless}
        assert there.begin() == SITES
    there.close()


def test_a_site_whose_ledger_the_mirror_refuses_is_told_and_does_not_begin(tmp_path: Path) -> None:
    there = Listening(tmp_path)

    def other_note(site: str, reply: Message) -> dict[str, Message]:
        head = chain.Checkpoint(owner=site, size=1, hash="00" * 32)
        return {
            site: dataclasses.replace(
                reply, fields={**reply.fields, "checkpoint": chain.checkpoint_text(head, key(site))}
            )
        }

    there.changes = {("hello", "a"): other_note}
    assert there.begin() == ("b", "c", "d", "e")
    assert there.asked["start"]["a"].fields["refused"] == {COORDINATOR: "MIRROR-ROLLBACK"}
    assert all("a" not in message.fields["checkpoints"] for message in there.asked["witness"].values())
    log = (there.ward.directory("a") / "guard.log").read_text()
    assert "MIRROR-ROLLBACK" in log and "WITNESS-COORDINATOR" in log
    there.close()


def test_one_or_two_sites_need_the_coordinator_only(tmp_path: Path) -> None:
    for sites in (("a",), ("a", "b")):
        there = Listening(tmp_path / str(len(sites)), sites)
        assert there.begin() == sites and "witness" not in there.asked
        there.close()


def test_only_those_that_have_begun_are_spoken_to(tmp_path: Path) -> None:
    spoken: list[str] = []

    def exchange(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        spoken.extend(messages)
        return {}

    witnesses.only(exchange, ("a", "c"))(dict.fromkeys(SITES, Message(kind="x", sender=COORDINATOR)), "x")
    assert spoken == ["a", "c"]


def test_a_run_through_these_begins_and_answers(tmp_path: Path) -> None:
    there = Listening(tmp_path)
    assert there.begin() == SITES
    assert there.ward.answer(0, counts()).sites == SITES
    there.close()

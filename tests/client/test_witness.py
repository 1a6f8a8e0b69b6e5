"""Witnessed ledgers through whole guards: what was rolled back, forked or copied begins no run, whoever coordinates.

Power: without `check_extends` at the witnesses the tests of a hostile coordinator fail; without the count at the
site those of too few witnesses; without the nonce the two copies of one ledger; without `seen` the named codes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hospital import RUN, Ward, counts, key, plan, proposal, ward
from planting import planted

from cohortium.client import guard as guard_module
from cohortium.client.approval import approve
from cohortium.client.gate import Gate
from cohortium.client.guard import Guard
from cohortium.client.witness import Witness
from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.chain import Checkpoint
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.messages import Message
from cohortium.strategies.base import COORDINATOR, ask_message

SITES = ("a", "b", "c", "d", "e")
HELLO = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})


def log(consortium: Ward, site: str = "a") -> list[str]:
    """The named codes in a site's own log, oldest first."""
    path = consortium.directory(site) / "guard.log"
    return [json.loads(line)["local"] for line in path.read_text().splitlines()] if path.exists() else []


def says(consortium: Ward, site: str = "a") -> str:
    return str(json.loads((consortium.directory(site) / "guard.log").read_text().splitlines()[-1])["text"])


def made(folder: Path, sites: Sequence[str] = ("a", "b", "c"), **options: Any) -> Ward:
    return ward(folder, plan(sites, mode="secure-sum" if len(sites) > 2 else "local", **options), seed=None)


def another_run(consortium: Ward, run: str = "run-2") -> str:
    for site in consortium.plan.sites:
        place = consortium.directory(site)
        approve(place, proposal(consortium.plan, run=run), key("officer of " + site), check_table=False)
    return run


def backup(consortium: Ward, site: str = "a", name: str = "backup") -> Path:
    """What is on a site's disk now, whole."""
    consortium.kill(site)
    place = consortium.folder / name
    shutil.copytree(consortium.directory(site), place)
    return place


def restore(consortium: Ward, place: Path, site: str = "a") -> None:
    consortium.kill(site)
    shutil.rmtree(consortium.directory(site))
    shutil.copytree(place, consortium.directory(site))


@pytest.fixture
def opened() -> Iterator[mock.Mock]:
    """Counts how often a site's records are read."""
    with mock.patch.object(guard_module, "load_records", side_effect=guard_module.load_records) as spy:
        yield spy


# ---- the rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [("a",), ("a", "b"), ("a", "b", "c")])
def test_nothing_is_answered_before_the_start(tmp_path: Path, sites: tuple[str, ...], opened: mock.Mock) -> None:
    mode = "secure-sum" if len(sites) > 2 else "local"
    consortium = ward(tmp_path, plan(sites, mode=mode), started=False)
    prepare = Message(kind="run.prepare", sender=COORDINATOR, fields={"run": RUN, "index": 0, "dim": 111})
    early = [ask_message(RUN, 0, counts(), mirrored=0), prepare]
    for message in early:
        assert consortium.say("a", message).fields == {"code": "REFUSED-LEDGER"}
    assert log(consortium) == ["WITNESS-START"] * 2 and not opened.called
    assert consortium.say("a", HELLO).kind == "site.hello"
    assert consortium.say("a", early[0]).fields == {"code": "REFUSED-LEDGER"}  # a hello is no start
    assert consortium.start() == sites
    assert consortium.answer(0, counts()).sites == sites
    consortium.close()


def collected(consortium: Ward, site: str, of: Sequence[str], *, run: str = RUN, forget: bool = False) -> Message:
    """A start as a coordinator builds it who signs whatever it gets, and asks the sites in `of` to do so too.

    forget: it does not tell the site what it knows.
    """
    reply = consortium.say(site, Message(kind="run.hello", sender=COORDINATOR, fields={"run": run, "mirrored": 0}))
    assert reply.kind == "site.hello", log(consortium, site)[-1]
    note = str(reply.fields["checkpoint"])
    public = key(site).public_key()
    head = chain.verify_checkpoint(note, public, owner=site)
    digests = [chain.body_digest(line["body"]) for line in reply.fields["lines"]]
    signatures = {COORDINATOR: witness.cosign(head, owner=public, witness=COORDINATOR, key=key(COORDINATOR))}
    refused: dict[str, str] = {}
    for other in of:
        with Witness_(consortium, other) as memory:
            seen = memory.seen(public)
        proof = b"".join(digests[0 if seen is None else seen.size :])
        asked = Message(
            kind="run.witness",
            sender=COORDINATOR,
            fields={"run": run, "checkpoints": {site: note}},
            blobs={f"proof/{site}": proof},
        )
        said = consortium.say(other, asked)
        signatures |= {other: said.fields["signatures"][site]} if site in said.fields["signatures"] else {}
        refused |= {other: said.fields["refused"][site]} if site in said.fields["refused"] else {}
    return start_of(signatures, refused, run=run)


def start_of(signatures: dict[str, Any], refused: dict[str, Any] | None = None, *, run: str = RUN) -> Message:
    fields = {"run": run, "signatures": signatures, "refused": refused or {}}
    return Message(kind="run.start", sender=COORDINATOR, fields=fields)


class Witness_:
    """A site's memory of the others, read beside its guard."""

    def __init__(self, consortium: Ward, site: str) -> None:
        self.memory = Witness(consortium.directory(site) / "witness.db")

    def __enter__(self) -> Witness:
        return self.memory

    def __exit__(self, *_: object) -> None:
        self.memory.close()


def test_the_coordinator_and_enough_others_are_counted(tmp_path: Path) -> None:
    """k = 3 of 5 sites with c = 0: two others are too few, three are enough, nobody counts twice or for another."""
    consortium = ward(tmp_path, plan(SITES, mode="secure-sum"), started=False)
    good = collected(consortium, "a", "bcd").fields["signatures"]
    few = {site: good[site] for site in (COORDINATOR, "b", "c")}
    wrong = [
        {},
        few,
        {site: good[site] for site in "bcd"},
        {**few, "d": good["c"]},
        {**few, "a": good["b"]},
        {**few, "f": good["d"]},
        {**few, "d": good["d"][2:] + good["d"][:2]},
        {**good, COORDINATOR: good["b"]},
        {**few, "d": None, "e": 7},
    ]
    for signatures in wrong:
        assert consortium.say("a", start_of(signatures)).fields == {"code": "REFUSED-LEDGER"}
        assert consortium.say("a", ask_message(RUN, 0, counts(), mirrored=0)).kind == "site.refused"
    assert set(log(consortium)) == {"WITNESS-FEW", "WITNESS-COORDINATOR", "WITNESS-START"}
    assert consortium.say("b", start_of(good)).kind == "site.refused"  # another site's
    assert consortium.say("a", start_of(good)).fields == {"run": RUN}
    assert consortium.say("a", start_of(good)).fields == {"run": RUN}
    consortium.close()


def test_in_local_mode_a_hospital_counts_with_its_own_distrust(tmp_path: Path) -> None:
    """The plan names no colluders (k = 3 of 5); a hospital that does not trust two of the others wants four words."""
    consortium = ward(tmp_path, plan(SITES), started=False, minimum_colluders=2)
    assert consortium.say("a", collected(consortium, "a", "bcd")).fields == {"code": "REFUSED-LEDGER"}
    assert log(consortium)[-1] == "WITNESS-FEW"
    assert consortium.say("a", collected(consortium, "a", "bcde")).kind == "site.started"
    consortium.close()


def test_words_for_an_older_hello_begin_nothing(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(("a", "b", "c"), mode="secure-sum"), started=False)
    first = collected(consortium, "a", "bc")
    second = collected(consortium, "a", "bc")
    assert consortium.say("a", first).fields == {"code": "REFUSED-LEDGER"}
    assert consortium.say("a", second).kind == "site.started"
    consortium.close()


def test_a_start_holds_over_restarts_and_ends_with_its_line(tmp_path: Path) -> None:
    consortium = ward(tmp_path, plan(), started=False)
    before = backup(consortium)
    assert consortium.start() == ("a",)
    for index in (0, 1):
        consortium.kill("a")
        assert consortium.ask("a", index, counts()).kind == "site.noised"
    vault = {p.name: p.read_bytes() for p in backup(consortium, name="later").glob("vault.db*")}
    restore(consortium, before)
    for name, data in vault.items():  # the newer vault beside the older ledger
        (consortium.directory("a") / name).write_bytes(data)
    assert consortium.ask("a", 0, counts()).fields == {"code": "REFUSED-LEDGER"}
    assert log(consortium) == ["LEDGER-ROLLBACK"]
    consortium.close()


def test_a_run_cannot_be_begun_without_end(tmp_path: Path) -> None:
    from cohortium.client import gate

    consortium = ward(tmp_path, plan(), started=False)
    with mock.patch.object(gate, "MAX_STARTS", 3):
        kinds = [consortium.say("a", HELLO).kind for _ in range(5)]
    assert kinds == ["site.hello"] * 3 + ["site.refused"] * 2 and log(consortium)[-1] == "GATE-STARTS"
    consortium.close()


# ---- put back, copied, forked: an honest coordinator --------------------------------------------------------


def test_a_restored_backup_is_refused_before_a_record_is_read(tmp_path: Path, opened: mock.Mock) -> None:
    """Within the run, and in the next; the site is shown its own signature of the newer ledger."""
    consortium = made(tmp_path)
    old = backup(consortium)
    consortium.start()
    consortium.answer(0, counts())
    for site in "abc":
        finish = Message(kind="run.finish", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})
        reply = consortium.say(site, finish)
        assert consortium.mirror is not None
        consortium.mirror.receive(site, reply.fields["lines"])
        consortium.mirror.cosign(site, reply.fields["checkpoint"], key(COORDINATOR))
    restore(consortium, old)
    opened.reset_mock()
    reads = opened.call_count
    assert consortium.start(sites="a") == () and opened.call_count == reads
    assert log(consortium)[-1] in ("LEDGER-BEHIND", "LEDGER-ROLLBACK")
    assert consortium.start() == () and consortium.refusals["a"] == "REFUSED-LEDGER"
    run = another_run(consortium)
    assert consortium.start(run=run) == ()  # three sites of which two are left: k = 2 others are missing for each
    assert consortium.refusals == {"a": "REFUSED-LEDGER", "b": "REFUSED-LEDGER", "c": "REFUSED-LEDGER"}
    assert log(consortium, "b")[-1] == "WITNESS-FEW"
    consortium.close()


def test_the_site_finds_the_roll_back_by_its_own_signature(tmp_path: Path, opened: mock.Mock) -> None:
    consortium = made(tmp_path)
    old = backup(consortium)
    consortium.start()
    assert consortium.mirror is not None
    seen = consortium.mirror.seen("a")
    restore(consortium, old)
    opened.reset_mock()
    fields = {"run": RUN, "mirrored": 0, "seen": seen}
    assert consortium.say("a", Message(kind="run.hello", sender=COORDINATOR, fields=fields)).kind == "site.refused"
    assert log(consortium)[-1] == "LEDGER-ROLLBACK" and not opened.called
    consortium.kill("a")
    with Ledger.open(consortium.directory("a") / "ledger.db", key("a")) as ledger:
        while ledger.head().size <= int(seen.split("\n")[1]):  # type: ignore[union-attr]
            ledger.note("catching up")
    assert consortium.say("a", Message(kind="run.hello", sender=COORDINATOR, fields=fields)).kind == "site.refused"
    assert log(consortium)[-1] == "LEDGER-FORK" and not opened.called
    forged = chain.checkpoint_text(Checkpoint(owner="a", size=99, hash="00" * 32), key("b"))
    for bad in (forged, "x", 7, ["x"]):
        reply = consortium.say("a", Message(kind="run.hello", sender=COORDINATOR, fields={**fields, "seen": bad}))
        assert reply.fields == {"code": "BAD-ENVELOPE"}
    consortium.close()


@pytest.mark.parametrize("order", ["original first", "copy first"])
def test_a_ledger_that_was_copied_to_a_second_host(tmp_path: Path, order: str) -> None:
    """Whichever of the two begins first may go on; the other is refused, for ever, and its people read why."""
    consortium = made(tmp_path)
    copy = backup(consortium)
    original = backup(consortium, name="original")
    first, second = (original, copy) if order == "original first" else (copy, original)
    restore(consortium, first)
    assert consortium.start() == ("a", "b", "c")
    shutil.rmtree(first)
    first = backup(consortium, name="first")
    restore(consortium, second)
    assert "a" not in consortium.start() and log(consortium)[-1] in ("LEDGER-FORK", "LEDGER-ROLLBACK", "LEDGER-BEHIND")
    shutil.rmtree(second)
    second = backup(consortium, name="second")
    restore(consortium, first)
    assert consortium.start() == ("a", "b", "c")
    restore(consortium, second)
    assert "a" not in consortium.start()
    consortium.close()


def test_two_hosts_that_both_said_hello(tmp_path: Path) -> None:
    """Both copies answered before either was confirmed: the nonce has set them apart, and one is confirmed."""
    consortium = made(tmp_path)
    copy = backup(consortium)
    said = collected(consortium, "a", "bc")
    original = backup(consortium, name="original")
    restore(consortium, copy)
    other = collected(consortium, "a", "bc")
    assert set(other.fields["refused"].values()) == {witness.FORK} and set(other.fields["signatures"]) == {COORDINATOR}
    assert consortium.say("a", other).kind == consortium.say("a", said).kind == "site.refused"
    assert log(consortium)[-2:] == ["WITNESS-FEW", "WITNESS-COORDINATOR"]
    restore(consortium, original)
    assert consortium.say("a", said).kind == "site.started"
    consortium.close()


def test_without_the_nonce_two_copies_would_look_alike(tmp_path: Path) -> None:
    """The power of the test before this one: in the same second both copies write the same line, and both begin."""
    clock = mock.patch("time.time", return_value=2e9)
    with clock, planted(Gate.starts, ("[:16].hex()", "[:0].hex()")):
        consortium = made(tmp_path / "alike")
        copy = backup(consortium)
        one = collected(consortium, "a", "bc")
        assert consortium.say("a", one).kind == "site.started"
        restore(consortium, copy)
        two = collected(consortium, "a", "bc")
        assert one == two and consortium.say("a", two).kind == "site.started"
        consortium.close()
    consortium = ward(tmp_path / "a", plan(), started=False)
    nonces = []
    for _ in range(3):
        consortium.say("a", HELLO)
        nonces.append(consortium.guard("a")._ledger_().book.notes[-1]["fields"]["nonce"])
    assert len(set(nonces)) == 3 and {len(nonce) for nonce in nonces} == {32}
    consortium.close()


# ---- a coordinator that hides what it knows, and its friends ------------------------------------------------


@pytest.mark.parametrize("kind", ["rolled back", "forked"])
def test_the_other_hospitals_see_it_when_the_coordinator_looks_away(tmp_path: Path, kind: str) -> None:
    consortium = made(tmp_path, SITES)
    old = backup(consortium)
    consortium.start()
    restore(consortium, old)
    if kind == "forked":
        with Ledger.open(consortium.directory("a") / "ledger.db", key("a")) as ledger:
            for _ in range(5):
                ledger.note("another way")
    message = collected(consortium, "a", "bcde")
    assert set(message.fields["signatures"]) == {COORDINATOR}
    assert consortium.say("a", message).fields == {"code": "REFUSED-LEDGER"}
    assert log(consortium)[-1] == "WITNESS-FEW" and "b: WITNESS-" in says(consortium)
    assert message.fields["refused"]["b"] in (witness.ROLLBACK, witness.FORK)
    assert log(consortium, "b")[-1] == message.fields["refused"]["b"]
    with Witness_(consortium, "b") as memory:
        ((owner, seen, claimed),) = memory.conflicts()
    public = key("a").public_key()
    assert owner == public.public_bytes_raw().hex()
    assert chain.verify_checkpoint(seen, public) != chain.verify_checkpoint(claimed, public)
    consortium.close()


def test_colluders_that_sign_everything_are_not_enough(tmp_path: Path) -> None:
    """n = 5, c = 1: k = 3. Of any three others that confirm, at least one is honest and saw the newer ledger."""
    consortium = ward(tmp_path, plan(SITES, mode="secure-sum", survivors=4, colluders=1), seed=None, started=False)
    old = backup(consortium)
    assert consortium.say("a", collected(consortium, "a", "bcd")).kind == "site.started"  # e did not see it
    restore(consortium, old)
    honest = collected(consortium, "a", "cde")
    assert set(honest.fields["signatures"]) == {COORDINATOR, "e"}, "c and d saw the newer one"
    public = key("a").public_key()
    lie = witness.cosign(consortium.guard("a")._gate().begun(RUN), owner=public, witness="b", key=key("b"))
    message = start_of({**honest.fields["signatures"], "b": lie})
    assert consortium.say("a", message).kind == "site.refused" and log(consortium)[-1] == "WITNESS-FEW"
    assert "2 other sites" in says(consortium)
    consortium.close()


def test_a_witness_that_says_yes_to_everything_would_let_it_pass(tmp_path: Path) -> None:
    """The power of the tests above: with the witnesses' check gone, the restored ledger begins."""
    consortium = made(tmp_path)
    old = backup(consortium)
    consortium.start()
    restore(consortium, old)
    with planted(witness.check_extends, ("if claimed.size < size:", "return\n    if claimed.size < size:")):
        message = collected(consortium, "a", "bc")
        assert consortium.say("a", message).kind == "site.started"
    consortium.close()


def test_a_site_that_does_not_count_would_begin_alone(tmp_path: Path) -> None:
    consortium = made(tmp_path)
    old = backup(consortium)
    consortium.start()
    restore(consortium, old)
    message = collected(consortium, "a", "bc")
    assert consortium.say("a", message).kind == "site.refused"
    with planted(Guard._start, ("if count < enough:", "if False:")):
        assert consortium.say("a", message).kind == "site.started"
    consortium.close()


# ---- a site as a witness ------------------------------------------------------------------------------------


def witnessed(consortium: Ward, site: str, note: Any, proof: bytes = b"", *, of: str = "a") -> Message:
    fields = {"run": RUN, "checkpoints": {of: note}}
    return consortium.say(
        site, Message(kind="run.witness", sender=COORDINATOR, fields=fields, blobs={f"proof/{of}": proof})
    )


def test_a_witness_confirms_what_it_wrote_down_and_remembers(tmp_path: Path) -> None:
    consortium = made(tmp_path)
    public = key("a").public_key()
    with Ledger.open(consortium.directory("a") / "ledger.db", key("a")) as ledger:
        size = ledger.head().size
        for _ in range(3):
            ledger.note("more")
        proof = b"".join(chain.body_digest(line.body) for line in ledger.lines(size))
        head, note = ledger.head(), ledger.checkpoint()
    for bad in (b"", proof[:-32], proof + bytes(32), bytes(len(proof))):
        reply = witnessed(consortium, "b", note, bad)
        assert reply.fields["signatures"] == {} and set(reply.fields["refused"]) == {"a"}
    reply = witnessed(consortium, "b", note, proof)
    assert witness.cosigned(
        head, reply.fields["signatures"]["a"], owner=public, witness="b", public=key("b").public_key()
    )
    consortium.kill("b")
    with Witness_(consortium, "b") as memory:
        assert memory.seen(public) == head
    assert witnessed(consortium, "b", note).fields == reply.fields  # the same again needs no proof
    consortium.close()


def test_a_witness_wants_the_owners_own_note(tmp_path: Path) -> None:
    consortium = made(tmp_path)
    head = Checkpoint(owner="a", size=99, hash="00" * 32)
    for note in (
        chain.checkpoint_text(head, key("b")),
        chain.checkpoint_text(Checkpoint(owner="c", size=99, hash="00" * 32), key("a")),
        "",
        "x" * 5000,
        None,
        7,
        {"a": 1},
    ):
        reply = witnessed(consortium, "b", note)
        assert reply.fields == {"code": "BAD-ENVELOPE"}
    assert witnessed(consortium, "b", chain.checkpoint_text(head, key("a")), of="z").fields == {"code": "BAD-ENVELOPE"}
    own = chain.checkpoint_text(Checkpoint(owner="b", size=99, hash="00" * 32), key("b"))
    assert witnessed(consortium, "b", own, of="b").fields["signatures"] == {}  # nobody witnesses itself
    consortium.close()


def test_one_sites_fork_does_not_stop_the_others(tmp_path: Path) -> None:
    consortium = made(tmp_path, SITES)
    old = backup(consortium)
    assert consortium.start() == SITES
    restore(consortium, old)
    (consortium.folder / "mirror.db").rename(consortium.folder / "lost.db")
    consortium.close()
    for tail in ("-wal", "-shm"):
        (consortium.folder / f"mirror.db{tail}").unlink(missing_ok=True)
    # The coordinator lost its memory and does not know better: the hospitals do.
    assert consortium.start() == ("b", "c", "d", "e")
    assert log(consortium)[-1] == "WITNESS-FEW" and "WITNESS-" in says(consortium)
    consortium.close()


def test_what_a_witness_remembers_proves_itself(tmp_path: Path) -> None:
    """A changed row is refused, not believed: it has to be the owner's own signature."""
    import sqlite3

    consortium = made(tmp_path)
    consortium.kill("b")
    with sqlite3.connect(consortium.directory("b") / "witness.db") as db:
        db.execute("UPDATE seen SET note = replace(note, char(10) || '2' || char(10), char(10) || '1' || char(10))")
        db.execute("UPDATE seen SET note = replace(note, 'A', 'B')")
    db.close()
    assert consortium.say("b", HELLO).fields == {"code": "REFUSED-LEDGER"}
    assert log(consortium, "b")[-1] == "WITNESS-DAMAGED"
    consortium.close()


def test_the_memory_alone(tmp_path: Path) -> None:
    memory = Witness(tmp_path / "witness.db")
    identities = {site: key(site).public_key() for site in "ab"}
    assert memory.sizes(identities) == {} and memory.seen(identities["a"]) is None
    assert memory.examine({}, {}, identities=identities, own="b").heads == {}
    with pytest.raises(KeyError):
        memory.examine({"z": "x"}, {}, identities=identities, own="b")
    with pytest.raises(CheckFailed, match="CHECKPOINT-FORM"):
        memory.examine({"a": "x"}, {}, identities=identities, own="b")
    memory.close()
    assert (tmp_path / "witness.db").stat().st_mode & 0o077 == 0

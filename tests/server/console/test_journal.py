"""The console's journal: what was asked and what came of it; an export that was touched is found."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from consortium import signer
from typer.testing import CliRunner

from cohortium.common.errors import CheckFailed, Refused, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.signing import save_public
from cohortium.server.console.journal import CUT_OFF, OWNER, UNDER_WAY, Journal, verify_journal
from cohortium.server.console.journal_cli import verify_journal_command

KEY = signer("the coordinator")
PUBLIC = KEY.public_key()


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    made = Journal(tmp_path / "journal.db", KEY)
    made.act("ada", "stop", "run-1", "it takes too long", lambda: None, attempt=2)
    with pytest.raises(Refused):
        made.act("ada", "resume", "run-1", "go on please", lambda: _refuse())
    made.note("sign-in", by="bob", address="127.0.0.1")
    yield made
    made.close()


def _refuse() -> None:
    raise Refused("RUN-ENDED", "the run has ended")


# ---- acts ---------------------------------------------------------------------------------------------------------


def test_an_act_has_who_what_about_why_and_outcome(journal: Journal) -> None:
    last, refused, done = journal.acts()
    assert (done.by, done.action, done.on, done.reason, done.outcome) == (
        "ada",
        "stop",
        "run-1",
        "it takes too long",
        "done",
    )
    assert done.facts == {"attempt": "2"} and done.ended is not None and done.number == 1
    assert (refused.outcome, refused.code) == ("refused", "RUN-ENDED")
    assert (last.action, last.by, last.outcome, last.facts) == ("sign-in", "bob", "noted", {"address": "127.0.0.1"})
    journal.note("sign-out", by="bob")
    assert [act.action for act in journal.acts()] == ["sign-out", "sign-in", "resume", "stop"]


def test_what_goes_on_is_under_way_and_what_a_crash_left_is_cut_off(journal: Journal, tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go.wait(10)

    def release() -> None:
        with contextlib.suppress(sqlite3.Error):  # its journal is closed before it ends
            journal.act("ada", "release", "run-1", "it is good", slow)

    thread = threading.Thread(target=release)
    thread.start()
    assert begun.wait(10)
    assert journal.acts()[0].outcome == UNDER_WAY
    journal.close()  # as a kill would
    again = Journal(tmp_path / "journal.db", KEY)
    assert (again.acts()[0].action, again.acts()[0].outcome) == ("release", CUT_OFF)
    again.close()
    go.set()
    thread.join()


def test_an_act_that_breaks_down_is_told(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError):
        journal.act("ada", "divide", "all", "to see what happens", lambda: 1 // 0)
    assert (journal.acts()[0].outcome, journal.acts()[0].code) == ("refused", "INTERNAL")
    with pytest.raises(UsageError, match="ACTION-REASON"):
        journal.act("ada", "stop", "run-1", " - ", lambda: None)


def test_half_a_character_does_not_reach_a_page(journal: Journal) -> None:
    journal.act("ada", "stop", "run-1", "half \ud800 a character", lambda: None)
    assert journal.acts()[0].reason == "half ? a character"


def test_an_edited_file_is_found_while_the_console_runs(journal: Journal, tmp_path: Path) -> None:
    assert journal.verify().problem == "" and journal.verified is not None
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("DROP TRIGGER lines_no_update")
    db.execute("UPDATE lines SET body = replace(body, 'too long', 'too much') WHERE n = 1")
    db.commit()
    assert journal.verify().problem.startswith("LEDGER-HASH: line 1")
    db.execute("UPDATE lines SET body = replace(body, 'too much', 'too long') WHERE n = 1")
    db.execute("DROP TRIGGER lines_no_delete")
    db.execute("DELETE FROM lines WHERE n = (SELECT MAX(n) FROM lines)")
    db.commit()
    db.close()
    assert journal.verify().problem.startswith("LEDGER-HEAD")


# ---- exports ------------------------------------------------------------------------------------------------------


def export(journal: Journal, tmp_path: Path) -> Path:
    journal.export(tmp_path / "export.jsonl")
    return tmp_path / "export.jsonl"


def test_an_export_verifies_with_the_public_key_alone(journal: Journal, tmp_path: Path) -> None:
    path, head = export(journal, tmp_path), journal.head
    assert verify_journal(path, PUBLIC) == head
    for named in (head.hash, head.hash[:20], f"{head.size} {head.hash}"):
        assert verify_journal(path, PUBLIC, head=named) == head
    for named in ("00" * 32, head.hash[:8], f"{head.size + 1} {head.hash}"):
        with pytest.raises(CheckFailed, match="JOURNAL-HEAD"):
            verify_journal(path, PUBLIC, head=named)
    with pytest.raises(CheckFailed, match="LEDGER-SIGNATURE"):
        verify_journal(path, signer("somebody else").public_key())


def _line(texts: list[bytes], at: int, change: Callable[[dict[str, Any]], None]) -> list[bytes]:
    value = json.loads(texts[at])
    change(value)
    texts[at] = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return texts


def _reason(value: dict[str, Any]) -> None:
    value["body"]["fields"]["reason"] = "something nicer"


def _mended(value: dict[str, Any]) -> None:
    """A forger who knows how chains are made, and has no key."""
    _reason(value)
    value["hash"] = "ab" * 32


def _resigned(value: dict[str, Any]) -> None:
    value["signature"] = chain.sign(value["hash"], signer("somebody else"))


TOUCHED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a reason is nicer": (lambda t: _line(t, 1, _reason), "LEDGER-HASH"),
    "with another hash": (lambda t: _line(t, 1, _mended), "LEDGER-HASH"),
    "another signature": (lambda t: _line(t, 2, _resigned), "LEDGER-SIGNATURE"),
    "a line is left out": (lambda t: t[:2] + t[3:], "LEDGER-NUMBER"),
    "two lines change places": (lambda t: [t[0], t[2], t[1], *t[3:]], "LEDGER-NUMBER"),
    "the first line is gone": (lambda t: t[1:], "LEDGER-NUMBER"),
    "the last line is gone": (lambda t: [*t[:-2], t[-1]], "JOURNAL-END"),
    "the end is gone": (lambda t: t[:-1], "JOURNAL-END"),
    "the end and a line are gone": (lambda t: t[:-2], "JOURNAL-END"),
    "a line follows the end": (lambda t: [*t, t[-2]], "JOURNAL-END"),
    "the head is another": (
        lambda t: _line(t, -1, lambda v: v.update(checkpoint=v["checkpoint"].replace("\n6\n", "\n5\n"))),
        "CHECKPOINT-SIGNATURE",
    ),
    "the head is nonsense": (lambda t: [*t[:-1], b'{"checkpoint":"yes"}'], "CHECKPOINT-FORM"),
    "spaces": (lambda t: [t[0].replace(b":", b": ", 1), *t[1:]], "LEDGER-FORM"),
    "nothing": (lambda t: [], "JOURNAL-END"),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_a_touched_export_is_found(journal: Journal, tmp_path: Path, name: str) -> None:
    touch, code = TOUCHED[name]
    path = export(journal, tmp_path)
    texts = path.read_bytes().split(b"\n")[:-1]
    assert len(texts) == 7 and verify_journal(path, PUBLIC)
    path.write_bytes(b"".join(text + b"\n" for text in touch(list(texts))))
    with pytest.raises(CheckFailed) as found:
        verify_journal(path, PUBLIC)
    assert found.value.code == code


def test_an_export_cut_at_any_byte_is_found(journal: Journal, tmp_path: Path) -> None:
    path = export(journal, tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:at])
        with pytest.raises(CheckFailed, match=r"JOURNAL-END|LEDGER-FORM"):
            verify_journal(path, PUBLIC)


def test_another_ledger_of_the_coordinator_is_no_journal(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.db", "coordinator", KEY) as ledger:
        ledger.note("start", run="r")
        lines, end = ledger.lines(), ledger.checkpoint()
    chain.write_jsonl(lines, tmp_path / "export.jsonl")
    with (tmp_path / "export.jsonl").open("a") as file:
        file.write(json.dumps({"checkpoint": end}, separators=(",", ":")) + "\n")
    with pytest.raises(CheckFailed, match="LEDGER-OWNER"):
        verify_journal(tmp_path / "export.jsonl", PUBLIC)
    assert OWNER == "console"


def test_an_older_export_is_told_by_the_head_only(journal: Journal, tmp_path: Path) -> None:
    path = export(journal, tmp_path)
    journal.note("sign-out", by="bob")
    assert verify_journal(path, PUBLIC).size == journal.head.size - 1
    with pytest.raises(CheckFailed, match="JOURNAL-HEAD"):
        verify_journal(path, PUBLIC, head=f"{journal.head.size} {journal.head.hash}")


def test_the_command_checks_a_file(journal: Journal, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(verify_journal_command)
    path = export(journal, tmp_path)
    save_public(PUBLIC, tmp_path / "coordinator.pub")
    runner = CliRunner()
    for key in (journal.public_key, str(tmp_path / "coordinator.pub")):
        found = runner.invoke(app, [str(path), "--key", key, "--head", journal.head.hash, "--json"])
        assert found.exit_code == 0 and json.loads(found.stdout)["size"] == 6
    assert runner.invoke(app, [str(path), "--key", "no key"]).exit_code == 2
    path.write_bytes(path.read_bytes().replace(b"too long", b"too much"))
    found = runner.invoke(app, [str(path), "--key", journal.public_key, "--json"])
    assert found.exit_code == 1 and "LEDGER-HASH" in found.output

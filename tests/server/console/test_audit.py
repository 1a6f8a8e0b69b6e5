"""The Audit page: everything people did is there, filtered right, and an export that was touched is found."""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_worlds import bare, desk_over, signed_in, visitor
from consortium import public
from large_world import NOW, large_world
from starlette.testclient import TestClient

from cohortium.common.errors import CheckFailed, Refused
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.desk import Desk
from cohortium.server.console.journal import ASKED, verify_journal

HOSTILE = '=HYPERLINK("http://example.org")<script>alert(1)</script>'
PATHS = ("/audit", "/api/audit", "/audit/journal.jsonl", "/audit/journal.csv", "/audit/trail.csv")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = large_world(tmp_path_factory.mktemp("audit") / "consortium", sites=4, runs=7, lines=200, seats=3, rounds=1)
    with desk_over(made, clock=lambda: float(NOW)) as desk:
        desk.books.refresh()
        run = desk.register.runs()[0].run
        desk.journal.act("ada", "stop", run, HOSTILE, lambda: None)
        with pytest.raises(Refused):
            desk.journal.act("bob", "revoke", "site-01", "it left us", _refuse)
        desk.journal.note(ASKED, by="ada", action="release", on=run, reason="it is good", folder="release-1")
        desk.journal.note("sign-in", by="bob")
        yield desk


@pytest.fixture(scope="module")
def client(desk: Desk) -> TestClient:
    return signed_in(desk)


def _refuse() -> None:
    raise Refused("MEMBER-UNKNOWN", "nobody of this name takes part")


# ---- who may ------------------------------------------------------------------------------------------------------


def test_coordinators_and_auditors_only(desk: Desk) -> None:
    nobody, member = visitor(desk), signed_in(desk, SITE, site="site-01")
    readers = [signed_in(desk, role) for role in (COORDINATOR, AUDITOR)]
    for path in PATHS:
        assert nobody.get(path).status_code == 303
        assert member.get(path).status_code == 403
        assert [reader.get(path).status_code for reader in readers] == [200, 200]
    assert visitor(desk).post("/audit/verify").status_code == 401
    client = signed_in(desk, AUDITOR)
    assert client.post("/audit/verify").status_code == 403
    assert client.post("/audit/verify", data={"csrf": client.csrf}).status_code == 303  # type: ignore[attr-defined]


# ---- what people did ----------------------------------------------------------------------------------------------


def asked(client: TestClient, **given: str) -> list[tuple[str, str, str]]:
    acts = client.get("/api/audit", params=given).json()["acts"]
    return [(act["by"], act["action"], act["outcome"]) for act in acts if act["action"] not in ("download", "verify")]


def test_acts_are_found_by_person_action_outcome_site_run_and_day(desk: Desk, client: TestClient) -> None:
    run = desk.register.runs()[0].run
    stop, revoke = ("ada", "stop", "done"), ("bob", "revoke", "refused")
    cut, noted = ("ada", "release", "cut off"), ("bob", "sign-in", "noted")
    every = [noted, cut, revoke, stop]
    assert asked(client) == every
    assert asked(client, person="ada") == [cut, stop] and asked(client, person="ad") == []
    assert asked(client, action="stop") == [stop] and asked(client, action="cut off") == [cut]
    assert asked(client, action="MEMBER-UNKNOWN") == [revoke]
    assert asked(client, site="site-01") == [revoke] and asked(client, run=run) == [cut, stop]
    assert asked(client, run=run, action="done") == [stop] and asked(client, run="release-1") == [cut]
    day = client.get("/audit/journal.csv").text.splitlines()[1].split(",")[1][:10]
    assert asked(client, since=day, until=day) == every and asked(client, until="2020-01-01") == []
    assert asked(client, since="2999-01-01") == []


def test_the_page_shows_who_what_why_and_what_was_cut_off(desk: Desk) -> None:
    text = signed_in(desk).get("/audit").text
    assert "cut off" in text and "MEMBER-UNKNOWN" in text and "it left us" in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and " style=" not in text
    assert desk.journal.head.hash in text and desk.journal.public_key in text and "verify-journal" in text


def test_the_trail_tells_of_approvals_runs_and_codes(desk: Desk) -> None:
    client = signed_in(desk)
    failed = next(row.run for row in desk.register.runs() if row.state == "failed")
    traces = client.get("/api/audit", params={"run": failed}).json()["trail"]
    assert {"approved", "RUN-TOO-FEW", "failed"} <= {trace["what"] for trace in traces} | {t["code"] for t in traces}
    assert {trace["run"] for trace in traces} == {failed}
    assert failed in client.get("/audit", params={"run": failed}).text
    assert client.get("/api/audit", params={"person": "ada"}).json()["trail"] == []
    first = client.get("/api/audit").json()
    second = client.get("/api/audit", params={"trail": 50}).json()
    assert first["more_trail"] and second["trail"] and second["trail"] != first["trail"]


# ---- exports ------------------------------------------------------------------------------------------------------


def test_the_signed_export_verifies_offline_and_its_end_is_the_page_s_head(desk: Desk, tmp_path: Path) -> None:
    client = signed_in(desk, AUDITOR)
    answer = client.get("/audit/journal.jsonl")
    assert answer.headers["content-disposition"] == 'attachment; filename="cohortium-journal.jsonl"'
    path = tmp_path / "journal.jsonl"
    path.write_bytes(answer.content)
    facts = client.get("/api/audit").json()
    key = public_from_raw(bytes.fromhex(facts["public_key"]))
    head = f"{facts['head']['size']} {facts['head']['hash']}"
    assert verify_journal(path, key, head=head).size == facts["head"]["size"]
    assert desk.journal.acts()[0].action == "download" and desk.journal.acts()[0].by == AUDITOR
    path.write_bytes(answer.content.replace(b"it left us", b"it was bad"))
    with pytest.raises(CheckFailed, match="LEDGER-HASH"):
        verify_journal(path, key)
    lines = answer.content.split(b"\n")
    path.write_bytes(b"\n".join([*lines[:-3], *lines[-2:]]))
    with pytest.raises(CheckFailed, match="JOURNAL-END"):
        verify_journal(path, key)
    with pytest.raises(CheckFailed, match="LEDGER-SIGNATURE"):
        path.write_bytes(answer.content)
        verify_journal(path, public_from_raw(public("another")))


def test_a_spreadsheet_takes_nothing_for_a_formula(desk: Desk, client: TestClient) -> None:
    text = client.get("/audit/journal.csv").text
    rows = list(csv.DictReader(io.StringIO(text)))
    (stop,) = [row for row in rows if row["action"] == "stop"]
    assert stop["reason"] == "'" + HOSTILE
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]
    some = list(csv.DictReader(io.StringIO(client.get("/audit/journal.csv?person=bob").text)))
    assert {row["person"] for row in some} == {"bob"}
    trail = list(csv.DictReader(io.StringIO(client.get("/audit/trail.csv?site=site-02").text)))
    assert trail and {row["site"] for row in trail} == {"site-02"}


def test_a_journal_that_was_changed_on_disk_is_loud(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        desk.journal.act("ada", "stop", "run-1", "it takes too long", lambda: None)
        desk.journal.verify()
        client = signed_in(desk)
        assert "chain verified" in client.get("/audit").text
        db = sqlite3.connect(desk.journal.path)
        db.execute("DROP TRIGGER lines_no_update")
        db.execute("UPDATE lines SET body = replace(body, 'ada', 'eve') WHERE n = 1")
        db.commit()
        db.close()
        desk.journal.verify()
        text = client.get("/audit").text
        assert "does not verify" in text and "LEDGER-HASH" in text and "chain verified" not in text


@pytest.mark.parametrize(
    "query", ["since=yesterday", "since=2026-02-31", "until=0000-00-00", "start=-1", "trail=x", "person=" + "x" * 201]
)
def test_what_cannot_be_used_is_said(client: TestClient, query: str) -> None:
    for path in ("/audit", "/api/audit"):
        assert client.get(f"{path}?{query}").status_code == 422


@pytest.mark.parametrize(
    "query", ["person=%00", "run=%F0%9F%92%A9", "site=%FF", "since=0001-01-01", "until=9999-12-31", "start=10000000"]
)
def test_odd_but_usable_values_are_answered(client: TestClient, query: str) -> None:
    for path in ("/audit", "/api/audit", "/audit/journal.csv", "/audit/trail.csv"):
        assert client.get(f"{path}?{query}").status_code == 200


def test_before_anything_happened_the_page_says_so(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        client = signed_in(desk)
        assert "Nobody has done anything yet" in client.get("/audit").text
        assert "being gathered" in client.get("/audit").text
        desk.books.refresh()
        assert "enrolled" in client.get("/audit").text

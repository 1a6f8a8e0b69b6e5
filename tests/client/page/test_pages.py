"""What the pages show: facts as the commands have them, words of others escaped, no value of the table anywhere."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hospital import key, plan, proposal, schema, stage, ward
from page_worlds import MARKER, act, enter
from starlette.testclient import TestClient

from cohortium.client.bookkeeping import statement
from cohortium.client.page import asked, left, pictures, policy_words
from cohortium.client.page.kinds import CHARGED, KINDS
from cohortium.client.page.ledger_view import Reader
from cohortium.client.page.room import Room
from cohortium.client.site import Site
from cohortium.common.privacy import chain
from cohortium.common.proposals import read_proposal
from cohortium.common.protocol.messages import canonical, peek_sender
from cohortium.strategies.base import COORDINATOR

PAGES = ("/", "/left", "/asked", "/asked/list", "/asked/count", "/asked/run-2", "/asked/run-dear", "/ledger")
PAGES += ("/ledger?verify=true", "/check", "/check/state", "/report", "/report/state", "/policy", "/journal")
EXPORTS = ("/left.csv", "/left.jsonl", "/ledger.jsonl", "/journal.jsonl", "/api/left", "/api/ledger", "/api/policy")
EXPORTS += ("/api/check", "/api/asked/run-2", "/asked/run-2/proposal.bin")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole(client: TestClient, path: str) -> None:
    shown = client.get(path)
    assert shown.status_code == 200, shown.text[-600:]
    assert "style=" not in shown.text and not re.search(r"\son[a-z]+=", shown.text) and "<script>" not in shown.text
    if shown.text.startswith("<!doctype"):
        assert shown.text.count("<h1>") == 1 and "Nothing on this page leaves this machine" in shown.text
        assert path.startswith(("/journal",)) or "The same in a terminal" in shown.text
        assert (
            shown.headers["cache-control"] == "no-store"
            and "default-src 'none'" in shown.headers["content-security-policy"]
        )


def test_no_value_of_the_table_is_in_any_page_or_export(world: Any, room: Room, client: TestClient) -> None:
    """The marker is in each patient's name; the checks read the table, and so does an approval."""
    assert MARKER.encode() in (world.site.root.parent / "data.parquet").read_bytes()
    act(client, "/check", network="yes")
    room.checking.wait(60)
    assert any(one.name == "data" and one.word == "ok" for one in room.checking.found)
    for path in (*PAGES, *EXPORTS):
        assert MARKER not in client.get(path).text, path


def test_a_table_that_does_not_fit_shows_no_value(world: Any, room: Room, client: TestClient) -> None:
    import pandas as pd

    data = world.site.root.parent / "data.parquet"
    good = data.read_bytes()
    try:
        for column in ("sex", "age", "stage"):
            table = pd.read_parquet(io.BytesIO(good)).astype({column: object})
            table.loc[0, column] = MARKER
            table.astype({column: str}).to_parquet(data)
            act(client, "/check", network="yes")
            room.checking.wait(60)
            failed = any(one.name == "data" and one.word == "fail" for one in room.checking.found)
            assert failed == (column == "age"), column  # a level that the dictionary lacks is one of its own codes
            for path in ("/check", "/api/check", "/left", "/journal"):
                assert MARKER not in client.get(path).text, (column, path)
    finally:
        data.write_bytes(good)


def test_hostile_words_are_words(world: Any, client: TestClient) -> None:
    """The study of run-dear is called by a script and a formula."""
    for path in ("/asked/list", "/asked/run-dear"):
        shown = client.get(path).text
        assert "<script>alert" not in shown and "&lt;script&gt;alert(1)" in shown
    row = left.Row(id="l1", at=0, kind="site.noised", run="r", study="=cmd|' /C calc'!A0", stage="@x", release="0")
    (read,) = csv.DictReader(io.StringIO(left.as_csv([row])))
    assert read["study"] == "'=cmd|' /C calc'!A0" and read["stage"] == "'@x"


@pytest.mark.parametrize(
    "path",
    [
        *("/asked/../ledger.db", "/asked/%2e%2e", "/asked/..%2f..%2fsite.key", "/asked/A", "/asked/x/proposal.bin"),
        *("/report/page/..%2f..%2fsite.key", "/report/page/none", "/static/../app.py", "/static/%2e%2e/%2e%2e/x.py"),
        *("/asked/" + "a" * 65, "/left?page=0", "/left?page=x", "/left?since=2026-1-1", "/left?kind=%00", "/nope"),
    ],
)
def test_odd_addresses_lead_nowhere(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 422)


def test_a_day_that_is_none_is_no_filter(client: TestClient) -> None:
    assert client.get("/left?since=2026-13-45").status_code == 200


# ---- what left ----------------------------------------------------------------------------------------------


def test_what_left_is_what_the_ledger_proves(world: Any, room: Room, client: TestClient) -> None:
    found = client.get("/api/left?run=run-1").json()
    assert [row["kind"] for row in found] == ["site.hello", "site.started", "site.noised", "site.noised"]
    found = [row for row in found if row["made_from_records"]]
    assert [row["numbers_at_most"] for row in found] == [8 * 2000, 8 * 2000]
    assert [row["bytes"] for row in found] == [len(envelope) for envelope in world.ward.sent[-3:-1]]
    total = statement(world.site)["total"]
    assert found[1]["used"] == pytest.approx(total["cap_used"], abs=1e-12)
    assert left.epsilon_at(room.papers(), found[1]["line"]) == total["epsilon"]
    refusals = client.get("/api/left?kind=site.refused").json()
    assert refusals[0]["code"] == "BAD-PLAN" and refusals[0]["bytes"] == len(world.ward.sent[-1])
    exported = client.get("/left.jsonl").text.splitlines()
    assert [json.loads(line) for line in exported] == client.get("/api/left").json()
    assert len(list(csv.DictReader(io.StringIO(client.get("/left.csv").text)))) == len(exported)
    assert client.get("/api/left?since=2999-01-01").json() == []


def test_a_whole_round_of_a_secure_sum(tmp_path: Path) -> None:
    """Masked vector, vote and unmasking are rows; a release that broke off is a charge and no message."""
    from hospital import counts

    made = ward(tmp_path, plan(("a", "b", "c"), mode="secure-sum"), seed=None)
    made.answer(0, counts())
    sizes = [len(envelope) for envelope in made.sent]
    guard = made.guard("a")
    with_query = made.plan.stage_of(1)
    guard._gate().open(plan=made.plan, run="run-1", index=1, query=counts(), codes=[3, 4, 101, 3])
    made.close()
    made.guard("a")._ledger_()
    made.close()
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "a").rename(site / "guard")
    (site / "guard" / "sent.log").unlink()  # what came before the guard kept one
    rows = left.rows(Reader(Site(site)).papers())
    assert [row.kind for row in rows] == ["site.hello"] * 2 + ["sum.masked", "sum.vote", "site.revealed", CHARGED]
    assert [row.records for row in rows] == [False, False, True, False, False, False]
    masked, burned = rows[2], rows[-1]
    assert masked.numbers_at_most == 16_000 and masked.bytes in sizes and masked.state == "SEALED"
    assert burned.bytes is None and burned.state == "BURNED" and burned.share > 0 and burned.stage == with_query.name
    assert burned.used == pytest.approx(masked.share + burned.share)
    for row in rows:
        assert KINDS[row.kind].holds and KINDS[row.kind].cannot


def test_every_message_of_a_round_has_its_bytes(tmp_path: Path) -> None:
    """The guard's log of what it handed out: each envelope of the round is a row, with its very size."""
    from hospital import counts

    made = ward(tmp_path, plan(("a", "b", "c"), mode="secure-sum"), seed=None, started=False)
    made.start()
    made.answer(0, counts())
    made.close()
    sizes = [len(envelope) for envelope in made.sent if peek_sender(envelope) == "a"]
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "a").rename(site / "guard")
    rows = left.rows(Reader(Site(site)).papers())
    assert sorted(row.bytes or 0 for row in rows) == sorted(sizes)
    assert {row.kind for row in rows} == set(KINDS) - {CHARGED, "site.noised", "site.finished", "site.refused"}
    (masked,) = [row for row in rows if row.records]
    assert masked.share > 0 and masked.line is not None and masked.bytes and masked.bytes > 888


def test_every_kind_of_the_gate_has_its_words() -> None:
    from cohortium.client.gate import CARRIES_RECORDS, OUTBOUND

    assert set(KINDS) - {CHARGED} == set(OUTBOUND)
    assert {name for name, kind in KINDS.items() if kind.records} == set(CARRIES_RECORDS)


def test_a_picture_of_time() -> None:
    rows = [left.Row(id=f"l{i}", line=i, at=i * 3600, kind="site.noised", used=i / 10) for i in range(9)]
    rows.append(left.Row(id="r0", at=8 * 3600, kind="site.refused"))
    step, bars = pictures.bars(rows)
    assert step == 3600 and [bar.records for bar in bars] == [1] * 9 and bars[-1].others == 1
    assert [round(bar.used, 1) for bar in bars] == [i / 10 for i in range(9)]
    shown = str(pictures.over_time(rows))
    assert 'role="img"' in shown and "9 messages made from records" in shown and "80% of the lifetime cap" in shown
    assert pictures.over_time([]) == ""
    far = [left.Row(id="l1", line=1, at=0, kind="site.noised"), left.Row(id="l2", line=2, at=9**10, kind="site.noised")]
    assert len(pictures.bars(far)[1]) <= 60


# ---- what is asked ------------------------------------------------------------------------------------------


def test_a_plan_in_words_says_all_that_counts() -> None:
    agreed = plan(("a", "b", "h"), mode="secure-sum", stages=[stage("one", "counts", 0, part="holdout")], holdout=0.2)
    said = " ".join(asked.in_words(agreed, site="h"))
    for word in (
        "Study ward",
        "10 synthetic patients",
        "each patient (column pid",
        "one hospital",
        "a, b, h",
        "2 of 3",
    ):
        assert word in said, word
    for word in (
        "once, of held-out patients",
        "at most 2,000 numbers",
        "noise 20 times",
        "20% of the patients",
        "δ = 1e-06",
    ):
        assert word in said, word
    assert "no noise" in " ".join(asked.in_words(plan(stages=[stage("x", "counts", 0, noise_multiplier=0)]), site="a"))


def test_differences_are_all_shown_and_their_direction() -> None:
    def made(*names: str, **options: Any) -> Any:
        return read_proposal(proposal(plan(names, **options)), key(COORDINATOR).public_key())

    old = made("a", "b")
    assert asked.differences(old, made("a", "b")) == []
    more = [stage("one", "counts", 0, noise_multiplier=5.0), stage("new", "counts", 1)]
    new = made("a", "c", stages=more, epsilon=9.0, hospitals=2, generator="joined", rows=20)
    found = {one.what: one for one in asked.differences(old, new)}
    assert set(found) == {
        *("ε of the study", "generator", "hospitals of one patient", "synthetic patients", "hospital joins"),
        *("hospital leaves", "stage one", "stage two", "stage new"),
    }
    assert found["ε of the study"].weaker is True and found["hospitals of one patient"].weaker is False
    assert found["generator"].weaker is None and found["stage new"].weaker is True
    assert "noise 20 times" in found["stage one"].before and "noise 5 times" in found["stage one"].after
    back = {one.what: one for one in asked.differences(new, old)}
    assert back["ε of the study"].weaker is False and back["hospitals of one patient"].weaker is True


def test_the_proposal_s_page_compares_with_the_last_approved(client: TestClient) -> None:
    shown = client.get("/asked/run-2").text
    assert "Against run run-1" in shown and "stage three" in shown and "stage two" in shown
    facts = client.get("/api/asked/run-2").json()
    assert f"{100 * facts['charged_after']['cap_used']:.1f}% used" in shown and facts["statement"] in shown
    assert "No plan of this study was approved here before" in client.get("/asked/run-dear").text


def test_columns_added_are_said(client: TestClient) -> None:
    from dataclasses import replace

    from cohortium.common.schema import Schema

    old = read_proposal(proposal(plan(("a",))), key(COORDINATOR).public_key())
    wide = Schema.from_dict(
        {**schema().to_dict(), "fields": [*schema().to_dict()["fields"], {"name": "x", "type": "boolean"}]}
    )
    found = asked.differences(old, replace(old, schema=wide))
    assert [(one.what, one.after, one.weaker) for one in found] == [("columns added", "x", True)]


# ---- the site -----------------------------------------------------------------------------------------------


def test_the_ledger_s_download_verifies_alone(world: Any, client: TestClient, tmp_path: Path) -> None:
    exported = tmp_path / "ledger.jsonl"
    exported.write_bytes(client.get("/ledger.jsonl").content)
    book, head = chain.replay(chain.read_jsonl(exported), owner="h", public=key("h").public_key())
    assert head == statement(world.site)["head"]["hash"] and len(book.entries) == 2
    shown = client.get("/ledger?verify=true").text
    assert "every hash and every signature" in shown and head in shown and "confirmed 2 lines when run-1 began" in shown
    assert canonical({"a": 1}) == b'{"a":1}'


def test_a_damaged_ledger_is_told_and_not_shown(world: Any, client: TestClient) -> None:
    path = world.site.guard / "ledger.db"
    good = path.read_bytes()
    try:
        path.write_bytes(good.replace(b'"purpose":"two"', b'"purpose":"too"'))
        for page in ("/left", "/ledger", "/"):
            answer = client.get(page)
            assert answer.status_code == 409 and "LEDGER" in answer.text, page
    finally:
        path.write_bytes(good)
    assert client.get("/ledger").status_code == 200


def test_the_checks_are_shown_one_by_one(room: Room, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from cohortium.client.checks import Check, ok

    go, seen = threading.Event(), threading.Event()

    def steps(network: bool) -> Any:
        yield [ok("first", "is well")]
        seen.set()
        go.wait(10)
        yield [Check(name="second", word="fail", result="no", problem="<b>bad</b>", fix="mend it")]

    room.checking.wait(30)
    monkeypatch.setattr(room.checking, "_steps", steps)
    assert act(client, "/check", network="yes").status_code == 303
    assert seen.wait(10)
    shown = client.get("/check/state").text
    assert "is well" in shown and "mend it" not in shown and "every 700ms" in shown
    go.set()
    room.checking.wait(10)
    shown = client.get("/check/state").text
    assert "mend it" in shown and "1 failed" in shown and "every 700ms" not in shown and "<b>bad" not in shown


def test_a_check_that_breaks_off_says_no_word_of_it(room: Room, client: TestClient, monkeypatch: Any) -> None:
    def steps(network: bool) -> Any:
        yield []
        raise ValueError(MARKER)

    room.checking.wait(30)
    monkeypatch.setattr(room.checking, "_steps", steps)
    act(client, "/check", network="yes")
    room.checking.wait(10)
    shown = client.get("/check/state").text
    assert "broke off" in shown and "ValueError" in shown and MARKER not in shown


def test_the_guard_s_words_stay_in_its_log(world: Any, client: TestClient) -> None:
    log = world.site.guard / "guard.log"
    before = log.read_text()
    sentence = json.loads(before.splitlines()[-1])["text"]
    assert sentence and sentence not in client.get("/left").text + client.get("/left.csv").text
    try:
        odd = {"at": 1, "code": MARKER + "<b>", "local": "x", "sentence": MARKER}
        log.write_text(
            before + json.dumps(odd) + "\nnot json\n" + json.dumps(odd | {"code": "OK", "local": MARKER * 9})
        )
        assert MARKER not in client.get("/api/left").text and client.get("/left").status_code == 200
    finally:
        log.write_text(before)


def test_the_policy_in_words_names_every_setting(room: Room) -> None:
    from cohortium.client.policy import KNOWN

    said = " ".join(rule.setting for rule in policy_words.rules(room.site.policy()))
    assert [name for name in KNOWN["policy"] if name not in said] == []


@pytest.mark.parametrize(
    "rows", ["", "rows.csv", "/etc/passwd", "/nope.csv", "../x.csv", "/tmp/\x07.csv", "--help.csv"]
)
def test_a_report_is_made_of_a_file_of_rows_only(client: TestClient, rows: str) -> None:
    said = act(client, "/report", rows=rows, run="run-1")
    assert said.status_code == 422 and ("REPORT-FILE" in said.text or "WEB-VALUE" in said.text)


def test_what_one_user_does_not_see_is_said(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of the courier: the guard's directory is closed, and nobody is asked to open it."""
    from dataclasses import replace

    from cohortium.client.page import room as room_module
    from cohortium.client.page.door import Door
    from cohortium.client.page.sight import look

    seen = look(world.site)
    shut = tuple(replace(place, open=place.name == "courier", owner=f"{place.name}-user") for place in seen.places)
    monkeypatch.setattr(room_module, "look", lambda site: replace(seen, user="courier-user", places=shut))
    client = enter(world, Room.open(world.site, Door()))
    shown = client.get("/").text
    assert "belongs to the user guard-user" in shown and "sudo -u guard-user cohortium site page" in shown
    assert "so that a broken courier can read neither" in shown and "chmod" not in shown and "2 lines" not in shown
    for path in ("/left", "/ledger", "/asked/run-2", "/left.csv", "/ledger.jsonl", "/journal.jsonl", "/api/policy"):
        answer = client.get(path)
        assert answer.status_code == 403 and "PAGE-SIGHT" in answer.text, path
    for path in ("/asked", "/check", "/report", "/policy", "/journal"):
        assert client.get(path).status_code == 200, path
    assert act(client, "/pause").status_code == 403 and not world.site.paused.exists()

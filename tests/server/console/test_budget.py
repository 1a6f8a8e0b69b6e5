"""The Budget page: whose ledgers are seen by whom, what is loud, and that nothing typed by anybody breaks it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_worlds import bare, desk_over, signed_in, visitor
from consortium import signer
from large_world import NOW, Pen, large_world
from starlette.testclient import TestClient

from cohortium.common.privacy import chain
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.budget_view import budget, steps_of
from cohortium.server.console.desk import Desk

HOSTILE = "<script>alert(1)</script>\"'&"
PAGES = ("/budget", "/api/budget", "/budget/sites/site-01", "/api/budget/sites/site-01")
PARTS = ("/budget/sites/site-01/lines?before=40", "/api/budget/sites/site-01/lines?start=3&limit=5")


def write(made: Any, site: str, *bodies: dict[str, Any]) -> None:
    db = sqlite3.connect(made.mirror)
    n, text = db.execute("SELECT n + 1, line FROM lines WHERE owner = ? ORDER BY n DESC LIMIT 1", (site,)).fetchone()
    last = json.loads(text)
    pen = Pen(owner=site, key=signer(site), n=n, at=last["body"]["at"] + 1, head=bytes.fromhex(last["hash"]))
    for body in bodies:
        pen.write(body)
    db.executemany("INSERT INTO lines VALUES (?, ?, ?, ?)", pen.rows)
    db.commit()
    db.close()


def charge(run: str, event: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = {"run": run, "release": "0", "attempt": 0, "event": event, "count": 1, "plan": "00" * 32}
    return {"kind": "reserve", **fields, "purpose": HOSTILE, **more}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = large_world(tmp_path_factory.mktemp("budget") / "consortium", sites=4, runs=7, lines=360, seats=3, rounds=1)
    write(
        made,
        "site-02",
        {"kind": "note", "about": chain.REHEARSAL, "fields": {"run": f"played {HOSTILE}"}},
        charge(f"played {HOSTILE}", {"kind": "non-private"}),
    )
    with desk_over(made, clock=lambda: float(NOW)) as desk:
        desk.books.refresh()
        desk.books.price(at_once=True)
        yield desk


@pytest.fixture(scope="module")
def client(desk: Desk) -> TestClient:
    return signed_in(desk)


# ---- who sees what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [COORDINATOR, AUDITOR])
def test_coordinator_and_auditor_see_every_site(desk: Desk, role: str) -> None:
    client = signed_in(desk, role)
    text = client.get("/budget").text
    assert all(f'href="/budget/sites/site-0{at}"' in text for at in range(1, 5))
    assert [client.get(path).status_code for path in (*PAGES, *PARTS)] == [200] * 6
    assert len(client.get("/api/budget").json()["sites"]) == 4


def test_a_site_s_member_sees_its_own_ledger_and_no_trace_of_another(desk: Desk) -> None:
    client = signed_in(desk, SITE, site="site-01")
    assert [client.get(path).status_code for path in (*PAGES, *PARTS)] == [200] * 6
    whole = "".join(client.get(path).text for path in (*PAGES, *PARTS))
    assert not re.search("site-0[234]", whole)
    other = desk.books.site("site-03")
    assert other.head not in whole
    for path in (*PAGES[2:], *PARTS):
        hidden, unknown = client.get(path.replace("site-01", "site-03")), client.get(path.replace("site-01", "nobody"))
        assert hidden.status_code == unknown.status_code == 404
        assert hidden.text.replace("site-03", "nobody") == unknown.text
    # What its own site was charged, not what the dearest of all sites was.
    mine = {run["run"]: run for run in client.get("/api/budget").json()["runs"]}
    assert set(mine) == {run.run for run in desk.books.site("site-01").runs}
    assert all(run["sites"] == 1 for run in mine.values())
    assert client.get("/budget/check").status_code == 403 and client.get("/api/budget").json()["check"] is None


def test_nobody_else_sees_anything(desk: Desk) -> None:
    client = visitor(desk)
    for path in (*PAGES, *PARTS, "/budget/check"):
        assert client.get(path).status_code == 303
    assert client.post("/budget/verify").status_code == 401


def test_verify_needs_the_token_and_one_who_sees_everything(desk: Desk) -> None:
    for role, site in ((COORDINATOR, ""), (AUDITOR, ""), (SITE, "site-01")):
        client = signed_in(desk, role, site=site)
        assert client.post("/budget/verify").status_code == 403
        before = desk.books.check.at
        answer = client.post("/budget/verify", data={"csrf": client.csrf})  # type: ignore[attr-defined]
        if role == SITE:
            assert answer.status_code == 403 and desk.books.check.at == before
            continue
        assert answer.status_code == 303
        told = ""
        while desk.books.check.running or not told:
            told += client.get("/budget/check").text
        assert "everything holds" in told or "Verifying" in told
        assert "everything holds" in client.get("/budget/check").text
        assert (desk.journal.acts()[0].action, desk.journal.acts()[0].by) == ("verify", role)


# ---- what it says -------------------------------------------------------------------------------------------------


def test_it_says_what_the_books_say(desk: Desk) -> None:
    facts = signed_in(desk).get("/api/budget").json()
    for site in facts["sites"]:
        book = desk.books.site(site["name"])
        assert (site["size"], site["head"], site["releases"]) == (book.size, book.head, book.releases)
        if site["name"] != "site-02":
            assert site["sources"][0]["epsilon"] == book.lifetime and site["sources"][0]["cap"] is None
    text = signed_in(desk).get("/budget").text
    assert "not told" in text and desk.books.site("site-01").head[:4] in text
    for run in facts["runs"]:
        spent = [each for site in desk.books.sites() for each in site.runs if each.run == run["run"]]
        if run["epsilon"] != "inf":
            assert run["epsilon"] == max(each.epsilon for each in spent) and run["sites"] == len(spent)


def test_a_rehearsal_and_a_run_without_noise_are_loud_and_hostile_names_are_text(desk: Desk) -> None:
    client = signed_in(desk)
    facts = client.get("/api/budget").json()
    (played,) = [run for run in facts["runs"] if run["run"].startswith("played")]
    assert (played["epsilon"], played["rehearsal"]) == ("inf", True)
    for path in ("/budget", "/budget/sites/site-02"):
        text = client.get(path).text
        assert "rehearsal, NOT private" in text and "∞" in text
        assert HOSTILE not in text and "&lt;script&gt;alert(1)" in text
        assert "<script>alert" not in text and " style=" not in text and not re.search(r"\son\w+=", text)


def test_bars_are_parts_of_one_whole(desk: Desk) -> None:
    account = desk.accounts.account("coordinator")
    assert account is not None
    shown = budget(desk, account)
    rows = [row for row in shown.sites if row.segments]
    longest = max(row.book.lifetime for row in rows)
    for row in rows:
        width = sum(part.width for part in row.segments)
        assert width == pytest.approx(100 * row.book.lifetime / longest, abs=0.01)
        ends = [part.x + part.width for part in row.segments]
        assert [part.x for part in row.segments[1:]] == pytest.approx(ends[:-1], abs=0.01)
    assert not next(row for row in shown.sites if row.book.name == "site-02").segments  # ∞ has no length
    steps = steps_of(desk.books.site("site-01"))
    assert steps is not None and steps.path.count("V") == len(desk.books.site("site-01").runs)
    assert steps_of(desk.books.site("site-02")) is None


def test_a_run_over_its_plan_is_loud(tmp_path: Path) -> None:
    made = large_world(tmp_path / "consortium", sites=3, runs=4, lines=120, seats=3, rounds=1)
    run = made.register().runs()[0].run
    plan = made.folder(run).plan()
    dear = {"kind": "gaussian", "noise_multiplier": (0.5).hex()}
    write(made, "site-01", charge(run, dear, release="99", plan=plan.digest))
    with desk_over(made) as desk:
        desk.books.refresh()
        bound = budget(desk, signed_in(desk) and desk.accounts.account("coordinator"))  # type: ignore[arg-type]
        assert not any(row.over for row in bound.runs)  # an upper bound proves nothing
        desk.books.price(at_once=True)
        client = signed_in(desk, name="again")
        assert [each["over"] for each in client.get("/api/budget").json()["runs"] if each["run"] == run] == [True]
        assert "over its plan" in client.get("/budget").text


def test_a_ledger_that_does_not_verify_is_loud(tmp_path: Path) -> None:
    made = large_world(tmp_path / "consortium", sites=3, runs=4, lines=120, seats=3, rounds=1)
    db = sqlite3.connect(made.mirror)
    db.execute("UPDATE lines SET line = replace(line, 'RELEASED', 'UNMASKED') WHERE owner = 'site-01' AND n >= 10")
    db.commit()
    db.close()
    with desk_over(made) as desk:
        desk.books.refresh()
        client = signed_in(desk)
        assert "1 do not verify" in client.get("/budget").text
        page = client.get("/budget/sites/site-01").text
        assert "does not verify" in page and "LEDGER-HASH line" in page
        assert desk.books.verify()
        while desk.books.check.running:
            pass
        assert "LEDGER-HASH" in client.get("/budget/check").text


def test_lines_are_turned_newest_first(desk: Desk) -> None:
    client = signed_in(desk)
    size = desk.books.site("site-01").size
    seen: list[int] = []
    to: str | None = "/budget/sites/site-01/lines"
    while to:
        text = client.get(to).text
        seen += [int(n.replace(",", "")) for n in re.findall(r'<th scope="row">([\d,]+)</th>', text)]
        found = re.search(r'hx-get="([^"]+)"', text)
        to = found and found[1].replace("&amp;", "&")
    assert seen == list(range(size - 1, -1, -1))
    assert client.get("/budget/sites/site-01").text.count('<th scope="row">') == 50


@pytest.mark.parametrize(
    "path",
    [
        "/budget?start=-1",
        "/budget?start=x",
        "/budget/sites/site-01?before=-1",
        "/budget/sites/site-01?key=zz",
        "/budget/sites/site-01/lines?before=99999999999999999999",
        "/api/budget/sites/site-01/lines?limit=100000",
        "/budget?study=" + "x" * 300,
    ],
)
def test_what_cannot_be_used_is_said(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 422


@pytest.mark.parametrize("path", ["/budget/sites/" + "x" * 150, "/budget/sites/%00", "/budget/sites/%F0%9F%92%A9"])
def test_a_name_of_nobody_is_not_found(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_odd_but_usable_values_are_answered(desk: Desk) -> None:
    client = signed_in(desk)
    key = "ab" * 32
    for path in (
        "/budget?study=nothing",
        "/budget?start=1000000",
        f"/budget/sites/site-01?key={key}",
        f"/api/budget/sites/site-01/lines?key={key}",
        "/budget/sites/site-01?before=0",
        "/budget/sites/site-01/lines?before=9007199254740992",
    ):
        assert client.get(path).status_code == 200


def test_before_there_is_anything_the_next_step_is_told(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        client = signed_in(desk)
        assert "being read" in client.get("/budget").text
        desk.books.refresh()
        text = client.get("/budget").text
        assert "No run was charged to anybody yet" in text and "none yet" in text
        assert "No line of this site" in client.get("/budget/sites/site-1").text


def test_it_follows_the_ledgers_while_it_serves(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk, signed_in(desk):
        assert desk.books.wait(20)

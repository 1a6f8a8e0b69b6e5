"""Today: what needs a human, with its code and its fix; what runs; what was published; the first steps."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conducting import say_yes
from console_worlds import bare, desk_over, signed_in, visitor
from consortium import PASSPHRASE
from run_worlds import FakeBooks, answered, of_state, world

from cohortium.common.protocol.release_manifest import Manifest, sign_release
from cohortium.server.console import today_needs, today_view
from cohortium.server.console.desk import Desk
from cohortium.server.console.prices import Prices
from cohortium.server.console.today_needs import BAD, Item
from cohortium.server.console.today_view import today
from cohortium.server.consortium import Addresses, Consortium

DAY = 86_400


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[Desk]:
    made = world(tmp_path_factory.mktemp("today"))
    clock.now = made.issuer().expires.timestamp() - 60 * DAY
    with desk_over(made, clock=clock) as found:
        yield found


@pytest.fixture(autouse=True)
def no_pricing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prices, "of", lambda self, plan: None)


def account(desk: Desk, role: str = "coordinator", site: str = "") -> Any:
    name = f"look-{role}-{site}".strip("-")
    return desk.accounts.account(name) or desk.accounts.add(name, role=role, password=None, site=site)


def items(desk: Desk, role: str = "coordinator", site: str = "") -> dict[str, Item]:
    return {item.code or item.title: item for item in today(desk, account(desk, role, site)).needs}


# ---- what needs a human --------------------------------------------------------------------------------------


def test_a_stopped_run_stands_there_with_its_code_and_what_to_do(desk: Desk) -> None:
    run = of_state(desk.consortium, "running").run
    desk.register.set_run(run, state="stopping", flower_id="", message="RUN-TOO-FEW: 1 of 4 sites can take part.")
    found = items(desk)["RUN-TOO-FEW"]
    assert found.level == BAD and found.about == run and found.text == "1 of 4 sites can take part."
    assert "resume" in found.fix and found.to == f"/runs/{run}"
    desk.register.set_run(run, state="stopping", message="Stopped. Nothing was spent.")
    assert items(desk)[f"{run} is stopped"].level != BAD, "somebody asked for it"
    desk.register.set_run(run, state="running", flower_id="1", message="")


def test_a_failed_run_stands_there_for_a_week(desk: Desk, clock: Clock) -> None:
    row = of_state(desk.consortium, "failed")
    before = clock.now
    try:
        clock.now = row.since + 6 * DAY
        assert items(desk)["RUN-TOO-FEW"].title == f"{row.run} failed"
        clock.now = row.since + 8 * DAY
        assert "RUN-TOO-FEW" not in items(desk)
    finally:
        clock.now = before


def test_officers_who_have_not_approved_are_named_with_since_when(desk: Desk) -> None:
    row = of_state(desk.consortium, "proposed")
    found = items(desk)[f"{row.run} waits for 4 officers"]
    assert "site-01, site-02, site-03, site-04" in found.text and found.since == desk.register.answers(row.run)[0].since
    assert f"{row.run} waits for your officer" in items(desk, "site", "site-01")
    say_yes(desk.consortium, row.run, "site-02")
    assert f"{row.run} waits for 3 officers" in items(desk)
    assert f"{row.run} waits for your officer" not in items(desk, "site", "site-02"), "it has approved"


def test_the_issuers_end_the_disk_and_the_service_are_watched(
    desk: Desk, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"ISSUER-ENDS", "DISK-FULL"}.isdisjoint(items(desk)) and items(desk)["SERVE-DOWN"].level == BAD
    ends, before = desk.consortium.issuer().expires.timestamp(), clock.now
    try:
        clock.now = ends - 13 * DAY
        assert items(desk)["ISSUER-ENDS"].title == "The issuer ends in 13 days"
        clock.now = ends - 15 * DAY
        assert "ISSUER-ENDS" not in items(desk)
        clock.now = ends + DAY
        assert items(desk)["ISSUER-ENDS"].title == "The issuer has ended"
    finally:
        clock.now = before
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(today_needs.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**8))
    assert items(desk)["DISK-FULL"].level == BAD
    monkeypatch.setattr(today_view, "is_served", lambda desk: True)
    assert "SERVE-DOWN" not in items(desk)


def test_sites_that_were_not_heard_of_and_ledgers_that_do_not_hold(
    desk: Desk, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {f"site-0{at}": {"at": clock.now - (60 if at != 3 else 2 * DAY)} for at in (1, 2, 3, 4)}
    (desk.consortium.root / "seen.json").write_text(json.dumps(seen))
    found = items(desk)["1 site was not heard of for a day"]
    assert found.about == "site-03" and "site-01" not in found.text
    monkeypatch.setattr(desk, "books", FakeBooks(site_02="MIRROR-SIGNATURE"))
    first = today(desk, account(desk)).needs[0]
    assert (first.level, first.code, first.about) in ((BAD, "SERVE-DOWN", ""), (BAD, "MIRROR-SIGNATURE", "site-02"))
    assert items(desk)["MIRROR-SIGNATURE"].about == "site-02"
    assert "MIRROR-SIGNATURE" not in items(desk, "site", "site-01"), "of another hospital"


def test_a_release_waits_until_enough_sites_signed_it(desk: Desk) -> None:
    run = of_state(desk.consortium, "finished").run
    folder = desk.consortium.folder(run).root / "release"
    (folder / "signatures").mkdir(parents=True)
    manifest = Manifest.of({"README.md": "0" * 64}, {"sites_needed": 2})
    (folder / "release.json").write_bytes(sign_release(manifest, desk.consortium.key()).to_bytes())
    title = f"The release of {run} waits for signatures"
    assert items(desk)[title].text == "0 of 2 sites have signed it."
    (folder / "signatures" / "site-01.json").write_text("{}")
    (folder / "signatures" / "stranger.json").write_text("{}")
    assert items(desk)[title].text == "1 of 2 sites have signed it."
    assert title not in items(desk, "site", "site-01"), "it has signed"
    assert title in items(desk, "site", "site-02")
    (folder / "signatures" / "site-02.json").write_text("{}")
    assert title not in items(desk)
    (folder / "release.json").write_text("{broken")
    assert title not in items(desk)


def test_many_of_a_kind_are_one_line(desk: Desk) -> None:
    every = [Item(level="care", code="", title=str(at), text="") for at in range(40)]
    some = today_needs.few(every, "more of them", "/runs")
    assert len(some) == today_needs.MOST_OF_A_KIND + 1 and some[-1].title == "36 more of them"


# ---- the page ------------------------------------------------------------------------------------------------


def test_a_run_under_way_is_live_on_the_page(desk: Desk) -> None:
    run = of_state(desk.consortium, "running").run
    answered(desk.consortium, run, range(3))
    page = signed_in(desk).get("/").text
    assert f'data-live="/runs/{run}/events?only=progress"' in page and f'id="run-progress-{run}"' in page
    assert "3 of 21 answered" in page and "Published lately" in page and "First steps" not in page


def test_a_hospital_sees_its_own_day(desk: Desk) -> None:
    member, stranger = signed_in(desk, "site", site="site-01"), signed_in(desk, "site", site="elsewhere")
    facts = member.get("/api/today").json()
    assert facts["sites"] == 1 and "SERVE-DOWN" not in str(facts) and facts["steps"] == []
    assert str(desk.consortium.root) not in member.get("/").text
    nothing = stranger.get("/api/today").json()
    assert (nothing["needs"], nothing["live"], nothing["lately"], nothing["sites"]) == ([], [], [], 0)
    assert visitor(desk).get("/api/today", headers={"accept": "application/json"}).status_code == 401


# ---- the first steps -----------------------------------------------------------------------------------------


def ticks(desk: Desk) -> list[bool]:
    return [step.done for step in today(desk, account(desk)).steps]


def test_an_empty_installation_shows_the_way_and_the_steps_tick_themselves(tmp_path: Path) -> None:
    ports = {"service_port": 7441, "enrol_port": 7442, "fleet_port": 7443}
    addresses = Addresses(host="127.0.0.1", listen="127.0.0.1", **ports)
    made = Consortium.create(tmp_path / "c", name="empty", addresses=addresses, passphrase=PASSPHRASE)
    with desk_over(made) as desk:
        assert ticks(desk) == [False] * 4 and today(desk, account(desk)).needs == ()
        page = signed_in(desk).get("/").text
        assert "First steps" in page and 'href="/sites"' in page and "Needs somebody" not in page
        assert "Invite a site" not in signed_in(desk, "auditor").get("/").text
    with desk_over(bare(tmp_path)) as desk:
        assert ticks(desk) == [True, False, False, False]
        (desk.folder / "studies" / "draft").mkdir(parents=True)
        assert ticks(desk) == [True, True, False, False]
        desk.register.propose("a-00000000", folder="runs/a-00000000", envelope=b"?", sites=["site-1"])
        assert ticks(desk) == [True, True, False, False]
        desk.register.set_run("a-00000000", state="approved")
        assert ticks(desk) == [True, True, True, False]
        desk.register.set_run("a-00000000", state="finished")
        assert ticks(desk) == [] and signed_in(desk).get("/").status_code == 200

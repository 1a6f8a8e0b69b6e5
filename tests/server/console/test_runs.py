"""Runs: their events as they grow, the two pictures, the list, one run's page, stop and resume."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_worlds import act, desk_over, signed_in, visitor
from run_worlds import ROUNDS, answered, of_state, world

from cohortium.common.privacy.plan import Plan
from cohortium.server.console import prices as prices_module
from cohortium.server.console import run_list, run_store, run_view
from cohortium.server.console.desk import Desk
from cohortium.server.console.prices import Prices, curves
from cohortium.server.console.run_log import RunLog
from cohortium.server.console.run_picture import DONE, NEXT, NOW, VOID, burn, rows, timeline
from cohortium.server.consortium import Consortium


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return world(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def desk(made: Consortium) -> Iterator[Desk]:
    with desk_over(made) as found:
        yield found


@pytest.fixture(autouse=True)
def no_pricing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pricing takes seconds; the tests that want it call `curves` themselves."""
    monkeypatch.setattr(Prices, "of", lambda self, plan: None)
    monkeypatch.setattr(Prices, "charged", lambda self, folder, mirror, done: 0.25)


def plan_of(made: Consortium) -> Plan:
    return made.folder(of_state(made, "finished").run).plan()


# ---- events --------------------------------------------------------------------------------------------------


def line(index: int, at: float = 10.0, **changes: Any) -> str:
    facts = {"at": at, "event": "release", "index": index, "sites": ["a", "b"], "dropped": [], "void": "", "seconds": 1}
    return json.dumps({**facts, **changes}) + "\n"


def test_only_what_was_appended_is_read_and_a_line_being_written_waits(tmp_path: Path) -> None:
    log = RunLog(path=tmp_path / "events.jsonl")
    assert not log.refresh()
    whole, torn = line(0) + line(1, dropped=["b"]), line(2)
    log.path.write_text(whole + torn[:20])
    assert log.refresh() and sorted(log.releases) == [0, 1]
    assert not log.refresh(), "nothing is new"
    log.path.write_text("x" * len(whole) + torn)  # what was read is not looked at again
    assert log.refresh() and sorted(log.releases) == [0, 1, 2]
    assert log.dropped() == {"b": 1}


def test_another_or_a_shorter_file_is_read_anew(tmp_path: Path) -> None:
    log = RunLog(path=tmp_path / "events.jsonl")
    log.path.write_text(line(0) + line(1))
    log.refresh()
    log.path.write_text(line(5))
    assert log.refresh() and sorted(log.releases) == [5]


def test_a_resumed_run_tells_kept_releases_again_and_they_say_nothing_about_pace(tmp_path: Path) -> None:
    log = RunLog(path=tmp_path / "events.jsonl")
    begin = json.dumps({"at": 1, "event": "start"}) + "\n"
    again = json.dumps({"at": 1000, "event": "start"}) + "\n"
    log.path.write_text(begin + line(0, 10) + line(1, 20) + again + line(0, 1001) + line(1, 1001.0))
    log.refresh()
    assert log.releases[0].at == 10 and log.releases[1].at == 20
    assert log.seconds_left(3) is None and log.seconds_left(0) == 0.0
    with log.path.open("a") as file:
        file.write(line(2, 1005))
    log.refresh()
    assert log.seconds_left(3) == pytest.approx(6.0)


@pytest.mark.parametrize(
    "bad",
    [
        "null",
        "[]",
        "{}",
        "{" * 5000,
        '{"at": NaN, "event": "release"}',
        line(1, float("inf")).strip(),
        line(1, seconds="x").strip(),
        line(1, sites=3).strip(),
        line(1, dropped=None).strip(),
        json.dumps({"at": -1, "event": "start"}),
        json.dumps({"at": 1e300, "event": "start"}),
        json.dumps({"at": 1, "event": "hello", "refused": ["a"]}),
    ],
)
def test_a_line_of_another_form_is_left_out(tmp_path: Path, bad: str) -> None:
    log = RunLog(path=tmp_path / "events.jsonl")
    log.path.write_text(line(0) + bad + "\n" + line(2))
    log.refresh()
    assert sorted(log.releases) == [0, 2] and log.marks == []


# ---- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 2, 7, 36, 400, 5000])
def test_every_release_is_in_exactly_one_row_and_the_rows_are_few(made: Consortium, repeats: int) -> None:
    plan = plan_of(made)
    first, stages = 0, []
    for stage in plan.stages:
        many = repeats if stage.kind == "gradient" else stage.repeats
        stages.append(dataclasses.replace(stage, first=first, repeats=many))
        first += many
    plan = dataclasses.replace(plan, stages=tuple(stages))
    found = rows(plan, {}, running=True)
    assert [i for row in found for i in range(row.first, row.last + 1)] == list(range(plan.releases))
    assert len(found) <= 40 and [row.state for row in found] == [NOW] + [NEXT] * (len(found) - 1)


def test_a_site_that_dropped_is_never_drawn_as_one_that_answered(made: Consortium, desk: Desk) -> None:
    row = of_state(made, "running")
    answered(made, row.run, range(6), dropped={1: ["site-02"], 4: ["site-02", "site-04"]}, void={5: "SUM-TOO-FEW"})
    shown = run_view.view(desk, row)
    assert shown.timeline is not None and shown.done == 6 and shown.void == 1
    columns = {name: x for x, _, name in shown.timeline.columns}
    bands = shown.timeline.bands
    assert [drop.site for drop in bands[1].drops] == ["site-02"] and bands[5].row.state == VOID
    assert bands[1].cells.count("M") == 3 and f"M{columns['site-02'] - 6:g} " not in bands[1].cells
    assert bands[6].row.state == NOW and bands[0].row.state == DONE and not bands[6].cells and bands[6].dots
    assert "site-02 in 2, site-04 in 1. Void: 1." in shown.timeline.told


def test_the_curves_end_where_the_plan_says_and_never_rise_in_what_is_left(made: Consortium) -> None:
    plan = plan_of(made)
    plan = dataclasses.replace(plan, stages=plan.stages[:2])
    (curve,) = curves(plan)
    stages = [value for _, value in plan.cumulated()]
    assert [value for _, value in curve.points] == [0.0, *stages] and curve.at(1) == stages[0]
    assert curve.at(0) == 0.0 and curve.at(99) == curve.total
    shown = burn((curve,), done=1, planned=2).lines[0]
    assert shown.left == pytest.approx(stages[1] - stages[0]) and shown.solid.split()[-1] == shown.dashed.split()[0]


def test_a_timeline_of_a_hundred_sites_has_a_column_for_each(made: Consortium) -> None:
    names = [f"hospital-with-a-long-name-{at}" for at in range(100)]
    drawn = timeline(names, rows(plan_of(made), {}, running=False))
    assert len({x for x, _, _ in drawn.columns}) == 100 and drawn.columns[-1][0] < drawn.width - 100
    assert all(len(shown) <= 14 for _, shown, _ in drawn.columns)


# ---- the list ------------------------------------------------------------------------------------------------


def test_runs_are_found_by_state_study_and_text(desk: Desk) -> None:
    account = desk.accounts.account("ann") or desk.accounts.add("ann", role="coordinator", password=None)
    every = run_list.listed(desk, account)
    assert every.total == 12 and every.states["finished"] == 8 and every.lines[0].state == "proposed"
    assert {each.state for each in run_list.listed(desk, account, state="failed").lines} == {"failed"}
    assert run_list.listed(desk, account, study="stroke").total == 2
    assert run_list.listed(desk, account, text="RUN-TOO").lines[0].code == "RUN-TOO-FEW"
    assert run_list.listed(desk, account, text="nowhere").lines == ()
    pages = [run_list.listed(desk, account, page=page, size=5) for page in (1, 2, 3, 99)]
    assert [len(page.lines) for page in pages] == [5, 5, 2, 2] and pages[3].page == 3
    assert len({each.run for page in pages[:3] for each in page.lines}) == 12


def test_a_site_sees_the_runs_that_name_it_and_no_other(made: Consortium, desk: Desk) -> None:
    member, stranger = signed_in(desk, "site", site="site-01"), signed_in(desk, "site", site="elsewhere")
    run = of_state(made, "running").run
    assert member.get("/api/runs").json()["total"] == 12 and member.get(f"/runs/{run}").status_code == 200
    assert stranger.get("/api/runs").json()["total"] == 0
    unknown = stranger.get("/runs/no-such-run")
    for path in (f"/runs/{run}", f"/api/runs/{run}", f"/runs/{run}/events"):
        answer = stranger.get(path)
        assert answer.status_code == 404
    assert stranger.get(f"/runs/{run}").text.replace(run, "") == unknown.text.replace("no-such-run", "")
    assert str(made.root) not in member.get(f"/runs/{run}").text, "a hospital needs no path of this machine"


def test_nothing_of_a_page_is_for_those_who_did_not_sign_in(made: Consortium, desk: Desk) -> None:
    run = of_state(made, "running").run
    for path in ("/runs", "/api/runs", f"/runs/{run}", f"/api/runs/{run}", f"/runs/{run}/events"):
        assert visitor(desk).get(path, headers={"accept": "application/json"}).status_code == 401


# ---- one run -------------------------------------------------------------------------------------------------


def test_the_page_tells_state_progress_approvals_and_the_plan(made: Consortium, desk: Desk) -> None:
    row = of_state(made, "proposed")
    page = signed_in(desk).get(f"/runs/{row.run}").text
    assert "Waiting for the officers of site-01, site-02, site-03, site-04." in page
    assert f"0 of {ROUNDS + 9} answered" in page and "What leaves each hospital" in page
    assert f"cohortium stop {made.root} {row.run}" in page and "NOT private" not in page
    facts = signed_in(desk).get(f"/api/runs/{row.run}").json()
    assert facts["approvals"]["site-01"]["state"] == "open" and facts["releases"]["done"] == 0


def test_a_rehearsal_is_loud_wherever_it_stands(made: Consortium, desk: Desk) -> None:
    row = of_state(made, "finished")
    path = made.root / row.folder / "run.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "rehearsal": True}))
    run_store.runs_of(desk)._briefs.clear()
    try:
        client = signed_in(desk)
        for page in ("/runs?text=" + row.run, f"/runs/{row.run}", "/sites/site-01", "/"):
            assert "NOT private" in client.get(page).text, page
    finally:
        path.write_text(before)
        run_store.runs_of(desk)._briefs.clear()


def test_what_sites_and_people_typed_is_text_and_never_markup(made: Consortium, desk: Desk) -> None:
    row, evil = of_state(made, "void"), "<script>alert(1)</script>"
    made.folder(row.run).note("failed", code=evil, sentence=evil, fix=evil, where=["/secret/place"])
    made.folder(row.run).note("hello", sites=[evil], refused={evil: evil})
    client = signed_in(desk)
    for message in (evil, f"RUN-X: {evil}"):
        desk.register.set_run(row.run, message=message)
        for page in (f"/runs/{row.run}", "/runs", "/"):
            text = client.get(page).text
            assert evil not in text and "/secret/place" not in text
        assert "&lt;script&gt;" in client.get(f"/runs/{row.run}").text


def test_a_proposal_that_is_not_of_the_plan_is_told(made: Consortium, desk: Desk) -> None:
    row = of_state(made, "failed")
    path = made.root / row.folder / "plan.json"
    before = path.read_text()
    path.write_text(before.replace('"unit":"id"', '"unit":"patient"'))
    run_store.runs_of(desk)._plans.clear()
    try:
        assert "PROPOSAL-OTHER" in signed_in(desk).get(f"/runs/{row.run}").text
    finally:
        path.write_text(before)
        run_store.runs_of(desk)._plans.clear()
    assert "PROPOSAL-OTHER" not in signed_in(desk).get(f"/runs/{row.run}").text


def test_a_run_whose_folder_is_gone_is_still_told_of(made: Consortium, desk: Desk) -> None:
    desk.register.propose("lost-00000000", folder="runs/lost-00000000", envelope=b"?", sites=["site-01"])
    client = signed_in(desk)
    assert "folder cannot be read" in client.get("/runs/lost-00000000").text
    assert client.get("/api/runs/lost-00000000").status_code == 200 and client.get("/runs").status_code == 200
    desk.register.set_run("lost-00000000", state="void")


# ---- actions -------------------------------------------------------------------------------------------------


def test_stop_and_resume_are_done_recorded_and_shown(made: Consortium, desk: Desk) -> None:
    client, run = signed_in(desk), of_state(made, "running").run
    answer = act(client, f"/runs/{run}/stop", reason="site-02 asked for it")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{run}?did=stopped")
    assert desk.register.run_row(run).state == "stopping"
    assert act(client, f"/runs/{run}/resume").status_code == 409, "it has not stopped yet"
    desk.register.set_run(run, flower_id="", message="RUN-TOO-FEW: 1 of 4 sites. Gave up.")
    page = client.get(f"/runs/{run}").text
    assert "Resume this run" in page and "Stop this run" not in page
    assert act(client, f"/runs/{run}/resume").status_code == 303 and desk.register.run_row(run).state == "approved"
    noted = [entry.body["fields"] for entry in desk.journal.lines() if entry.body.get("about") in ("asked", "refused")]
    assert [(n["action"], n["on"]) for n in noted[-4:]] == [("stop", run), *[("resume", run)] * 3]
    assert noted[-4]["reason"] == "site-02 asked for it" and noted[-2]["code"] == "RUN-NOT-STOPPED"
    desk.register.set_run(run, state="running", flower_id="1", message="")


@pytest.mark.parametrize("verb", ["stop", "resume"])
def test_an_action_wants_role_token_confirmation_and_reason(made: Consortium, desk: Desk, verb: str) -> None:
    run, client = of_state(made, "running").run, signed_in(desk)
    path = f"/runs/{run}/{verb}"
    for role, site in (("auditor", ""), ("site", "site-01")):
        assert act(signed_in(desk, role, site=site), path).status_code == 403
    assert client.post(path, data={"confirm": "yes", "reason": "because"}).status_code == 403
    assert act(client, path, confirm="no").status_code == 409
    assert act(client, path, reason="  ").status_code == 422
    assert act(client, f"/runs/no-such-run/{verb}").status_code == 404
    assert desk.register.run_row(run).state == "running"


def test_an_ended_run_offers_no_action(made: Consortium, desk: Desk) -> None:
    client, run = signed_in(desk), of_state(made, "finished").run
    page = client.get(f"/runs/{run}").text
    assert "Stop this run" not in page and "Resume this run" not in page
    assert act(client, f"/runs/{run}/stop").status_code == 409
    assert "Stop this run" not in signed_in(desk, "auditor").get(f"/runs/{of_state(made, 'running').run}").text


# ---- prices --------------------------------------------------------------------------------------------------


def test_no_request_waits_for_a_price_and_a_price_is_worked_out_once(
    made: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real ones
    asked: list[str] = []

    def slow(plan: Plan) -> tuple[prices_module.Curve, ...]:
        asked.append(threading.current_thread().name)
        return (prices_module.Curve(part="train", points=((0, 0.0), (plan.releases, float("inf")))),)

    monkeypatch.setattr(prices_module, "curves", slow)
    monkeypatch.setattr("cohortium.server.cli.plan_facts", lambda plan: {"epsilon": float("inf"), "stages": []})
    plan = plan_of(made)
    found = Prices(tmp_path / "prices")
    assert found.of(plan) is None
    found.wait()
    price = found.of(plan)
    assert price is not None and price.facts["epsilon"] == "inf" and price.curves[0].total == float("inf")
    assert len(asked) == 1 and asked[0].startswith("prices")
    found.close()
    again = Prices(tmp_path / "prices")
    assert again.of(plan) == price and len(asked) == 1, "kept on disk"
    (tmp_path / "prices" / f"{plan.digest}.json").write_text("{broken")
    broken = Prices(tmp_path / "prices")
    assert broken.of(plan) is None
    broken.wait()
    assert broken.of(plan) == price
    again.close()
    broken.close()

"""The what-if page: only stand-ins that somebody answers for, progress and curve, and ε taken back to the form."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_worlds import bare, desk_over, signed_in, visitor
from small import DICTIONARY
from starlette.testclient import TestClient

from cohortium.common.errors import UsageError
from cohortium.server.console import jobs as job_files
from cohortium.server.console.accounts import AUDITOR, SITE
from cohortium.server.console.app import LARGER
from cohortium.server.console.desk import Desk
from cohortium.server.console.jobs import MOST_TABLE, Jobs, jobs_of
from cohortium.server.console.pages.studies import drafts_of
from cohortium.server.console.pages.whatif import _plain, split_of
from cohortium.server.console.study_form import EMPTY, toml_of

HOSTILE = "<script>alert('x')</script>"
STUDY = toml_of({**EMPTY, "id": "small", "title": "t", "epsilon": "3", "sites": ""})
TABLE = b"id,age\n1,50\n"


def score(mean: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high}


RESULT = {
    "format": 1,
    "finished": True,
    "study": HOSTILE,
    "study_digest": "",
    "stand_in": {"file": HOSTILE, "sha256": "sha256:00", "rows": 1234},
    "columns": 6,
    "patients": 100,
    "sites": 3,
    "mode": "secure-sum",
    "seeds": 2,
    "points": [
        {
            "epsilon": 1,
            "generator": HOSTILE,
            "fits": 2,
            "scores": {"tvd2": score(0.31, 0.28, 0.34), "auc": score(0.61)},
        },
        {"epsilon": 3, "generator": "mixture", "fits": 2, "scores": {"tvd2": score(0.2, 0.1, 0.3), "auc": None}},
    ],
    "references": {
        "tvd2": {"real": score(0.05), "shuffled": score(0.4)},
        "auc": {"real": score(0.9), "shuffled": score(0.5)},
    },
    "refused": [{"epsilon": 0.1, "error": "PLAN-EPSILON", "sentence": HOSTILE}],
    "no_auc": "",
    "says": "Learned from a stand-in table.",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with desk_over(bare(tmp_path_factory.mktemp("whatif"))) as desk:
        yield desk


@pytest.fixture
def ada(world: Desk) -> Iterator[TestClient]:
    """With one draft, and a child that sleeps."""
    drafts_of(world).save(STUDY, json.dumps(DICTIONARY), by="ada")
    jobs = Jobs(
        world.folder / "what-if", clock=world.clock, command=[sys.executable, "-c", "import time; time.sleep(60)"]
    )
    job_files._OF[world] = jobs
    yield signed_in(world)
    jobs.close()
    for job in jobs.all():
        jobs.remove(job.id)
    for draft in drafts_of(world).all():
        drafts_of(world).remove(draft.name)


def begin(client: TestClient, *, table: bytes = TABLE, file: str = "public.csv", **changes: str) -> Any:
    form = {"csrf": client.csrf, "draft": "small", "epsilons": "0.5, 3", "seeds": "2", "hospitals": ""}  # type: ignore[attr-defined]
    form |= {"declared": "yes", "confirm": "yes", "reason": "to choose ε", **changes}
    return client.post("/whatif", data=form, files={"table": (file, table)})


def made(client: TestClient, desk: Desk, result: dict[str, Any] | None = None) -> str:
    """A job that is over; result: what its child found."""
    name = str(begin(client).headers["location"]).split("/")[-1].partition("?")[0]
    jobs_of(desk).close()
    out = jobs_of(desk).root / name / "out"
    out.mkdir(exist_ok=True)
    if result is not None:
        (out / "what-if.json").write_text(json.dumps(result))
        (out / "what-if.html").touch()
    return name


# ---- begin --------------------------------------------------------------------------------------------------


def test_nothing_starts_without_the_declaration(world: Desk, ada: TestClient) -> None:
    page = ada.get("/whatif").text
    assert "Never private data" in page and "no private record" in page and 'name="declared"' in page
    before = len(world.journal.lines())
    for changes in ({"declared": ""}, {"confirm": ""}):
        answer = begin(ada, **changes)
        assert answer.status_code == 409
    assert begin(ada, reason="").status_code == 422
    assert jobs_of(world).all() == [] and len(world.journal.lines()) == before


def test_who_answers_for_the_table_is_in_the_journal(world: Desk, ada: TestClient) -> None:
    answer = begin(ada, file="../../etc/" + HOSTILE)
    assert answer.status_code == 303
    job = jobs_of(world).all()[0]
    assert answer.headers["location"] == f"/whatif/{job.id}?did=started"
    asked = world.journal.lines()[-2].body["fields"]
    assert asked["action"] == "what-if" and "no private record" in asked["declared"] and asked["by"] == "coordinator"
    assert asked["stand_in"] == "sha256:" + hashlib.sha256(TABLE).hexdigest()
    assert (job.epsilon, job.epsilons, job.seeds, job.split, job.active) == (3.0, (0.5, 3.0), 2, "iid:3", True)
    assert (jobs_of(world).root / job.id / "table.csv").read_bytes() == TABLE
    assert begin(ada).status_code == 409, "one at a time"
    assert len(jobs_of(world).all()) == 1


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"epsilons": "a"}, 422),
        ({"epsilons": ""}, 422),
        ({"epsilons": "nan"}, 422),
        ({"epsilons": "1e999"}, 422),
        ({"epsilons": " ".join(["1"] * 20)}, 422),
        ({"seeds": "0"}, 422),
        ({"seeds": "٣"}, 422),
        ({"seeds": "9" * 50}, 422),
        ({"hospitals": "x"}, 422),
        ({"hospitals": "100000"}, 422),
        ({"draft": "../small"}, 404),
        ({"draft": "none"}, 404),
    ],
)
def test_values_that_cannot_be_used(world: Desk, ada: TestClient, changes: dict[str, str], status: int) -> None:
    assert begin(ada, **changes).status_code == status and jobs_of(world).all() == []


def test_tables_that_cannot_be_used(world: Desk, ada: TestClient) -> None:
    assert begin(ada, table=b"").status_code == 422
    assert begin(ada, table=b"x" * (MOST_TABLE + 1)).status_code == 422
    assert begin(ada, table=b"x" * (LARGER["/whatif"] + 1)).status_code == 413
    assert jobs_of(world).all() == []


def test_no_file_of_this_machine_is_the_dictionary(world: Desk, ada: TestClient) -> None:
    text = STUDY.replace('"dictionary.json"', '"../../coordinator.key"').replace('"small"', '"other"')
    drafts_of(world).save(text, "{}", by="ada")
    assert begin(ada, draft="other").status_code == 422 and jobs_of(world).all() == []


def test_how_many_hospitals() -> None:
    named = STUDY + '[sites]\nnames = ["a", "b", "c"]\n'
    assert split_of(STUDY, "", 4) == "iid:4" and split_of(named, "", 4) is None and split_of(named, "7", 4) == "iid:7"
    with pytest.raises(UsageError):
        split_of(STUDY, "", 0)
    assert _plain("C:\\secret\\a.csv") == "a.csv" and _plain("a\x00\nb") == "a\ufffd\ufffdb" and _plain("/") == "table"


# ---- a job --------------------------------------------------------------------------------------------------


def test_a_running_job_is_asked_for_every_two_seconds(world: Desk, ada: TestClient) -> None:
    begin(ada)
    job = jobs_of(world).all()[0].id
    (jobs_of(world).root / job / "progress.json").write_text(json.dumps({"what": HOSTILE, "done": 2, "of": 6}))
    part = ada.get(f"/whatif/{job}/part").text
    assert 'hx-trigger="every 2s"' in part and "2 of 6" in part and 'value="2"' in part and HOSTILE not in part
    assert "Cancel" in part and "Stand-in data" in ada.get(f"/whatif/{job}").text
    form = {"csrf": ada.csrf, "confirm": "yes", "reason": "enough"}  # type: ignore[attr-defined]
    assert ada.post(f"/whatif/{job}/cancel", data=form).status_code == 303
    part = ada.get(f"/whatif/{job}/part").text
    assert "cancelled" in part and "every 2s" not in part and "Go on" in part
    assert ada.post(f"/whatif/{job}/resume", data=form).status_code == 303 and jobs_of(world).job(job).active
    assert ada.post(f"/whatif/{job}/remove", data=form).status_code == 409
    jobs_of(world).close()
    assert "interrupted" in ada.get(f"/whatif/{job}/part").text
    assert ada.post(f"/whatif/{job}/remove", data=form).status_code == 303
    assert ada.get(f"/whatif/{job}").status_code == 404


def test_the_curve_is_drawn_and_an_epsilon_leads_to_the_form(world: Desk, ada: TestClient) -> None:
    job = made(ada, world, RESULT)
    page = ada.get(f"/whatif/{job}").text
    assert page.count('role="img"') == 2 and "this study: 3" in page and "0.310 (0.280–0.340)" in page
    assert "shuffled rows 0.400" in page and "PLAN-EPSILON" in page
    assert HOSTILE not in page and "style=" not in page.replace("stylesheet", "")
    assert 'href="/studies/new?draft=small&amp;epsilon=1"' in page
    assert 'name="epsilon" value="1"' in ada.get("/studies/new?draft=small&epsilon=1").text
    drafts_of(world).remove("small")
    assert "take ε" not in ada.get(f"/whatif/{job}").text
    told = ada.get(f"/api/whatif/{job}").json()
    assert told["state"] == "done" and told["result"]["points"][0]["epsilon"] == 1
    assert [entry["id"] for entry in ada.get("/api/whatif").json()] == [job]


def test_a_finished_curve_is_what_the_form_expects_of_quality(world: Desk, ada: TestClient) -> None:
    from cohortium.server.console import previews
    from cohortium.server.console.pages.studies import told

    made(ada, world, RESULT)
    facts: previews.Facts = {"study": {"columns": 6, "patients": 100, "epsilon": 3.0}, "plan": {"mode": "secure-sum"}}
    known = told(world, facts)["known"]
    assert known is not None and known.point["scores"]["tvd2"]["mean"] == 0.2
    facts["study"]["epsilon"] = 30.0
    assert told(world, facts)["known"] is None


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {**RESULT, "points": []},
        {**RESULT, "points": [{}]},
        {**RESULT, "references": {}},
        {**RESULT, "references": {"tvd2": None}},
        {**RESULT, "points": "x"},
    ],
)
def test_a_result_that_is_not_ours_breaks_no_page(world: Desk, ada: TestClient, broken: dict[str, Any]) -> None:
    job = made(ada, world, broken)
    for path in (f"/whatif/{job}", f"/whatif/{job}/part", "/whatif", "/api/whatif"):
        assert ada.get(path).status_code == 200


def test_an_error_is_told_as_in_the_terminal(world: Desk, ada: TestClient) -> None:
    job = made(ada, world)
    facts = {"error": "TABLE-HEADER", "sentence": HOSTILE, "where": ["table:x"], "left": "", "fix": "rename one"}
    (jobs_of(world).root / job / "error.json").write_text(json.dumps(facts))
    page = ada.get(f"/whatif/{job}").text
    assert "TABLE-HEADER" in page and "rename one" in page and HOSTILE not in page and "failed" in page


# ---- who may ------------------------------------------------------------------------------------------------


def test_roles(world: Desk, ada: TestClient) -> None:
    job = made(ada, world, RESULT)
    kim, member = signed_in(world, AUDITOR), signed_in(world, SITE, site="site-1")
    for path in ("/whatif", "/api/whatif", f"/whatif/{job}", f"/whatif/{job}/part", f"/api/whatif/{job}"):
        assert kim.get(path).status_code == 200 and member.get(path).status_code == 403
        assert visitor(world).get(path).status_code == 303
    assert "take ε" not in kim.get(f"/whatif/{job}").text and "Draw the curve" not in kim.get("/whatif").text
    for client in (kim, member):
        form = {"csrf": client.csrf, "confirm": "yes", "reason": "mine"}  # type: ignore[attr-defined]
        assert begin(client).status_code == 403
        for verb in ("cancel", "resume", "remove"):
            assert client.post(f"/whatif/{job}/{verb}", data=form).status_code == 403
    assert ada.post(f"/whatif/{job}/remove", data={"confirm": "yes", "reason": "x y z"}).status_code == 403
    assert jobs_of(world).job(job).state == "done"
    assert ada.get("/whatif/w00000000000g").status_code == 422 and ada.get("/whatif/w" + "0" * 12).status_code == 404


def test_the_child_ends_with_the_application(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        drafts_of(desk).save(STUDY, json.dumps(DICTIONARY), by="ada")
        jobs = Jobs(desk.folder / "what-if", command=[sys.executable, "-c", "import time; time.sleep(60)"])
        job_files._OF[desk] = jobs
        client = signed_in(desk)
        with client:
            assert begin(client).status_code == 303
            child = jobs._child
            assert child is not None and child.poll() is None
        until = time.monotonic() + 5
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert child.poll() is not None

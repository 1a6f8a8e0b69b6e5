"""Pages of studies: versions and what changed, the preview, drafts, and a proposal that is exactly what was shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_worlds import act, bare, desk_over, signed_in, visitor
from small import DICTIONARY, small_study
from starlette.testclient import TestClient

from cohortium.server.console import previews
from cohortium.server.console.accounts import AUDITOR, SITE
from cohortium.server.console.desk import Desk
from cohortium.server.console.pages import studies as pages
from cohortium.server.console.previews import Previews
from cohortium.server.console.study_form import toml_of
from cohortium.server.console.study_view import changes, studies
from cohortium.server.consortium import Consortium

HOSTILE = "<script>alert('x')</script>"
TYPED = {
    "id": "second",
    "title": HOSTILE,
    "target": "smoker",
    "patients": "100",
    "epsilon": "3",
    "delta": "1e-6",
    "unit": "id",
    "adjacency": "add-remove",
    "hospitals_per_patient": "1",
    "generator": "mixture",
    "strategy": "secure-sum",
    "survivors": "2",
    "colluders": "0",
    "rows": "50",
    "how": "form",
}


class Inside(Previews):
    """Compiles in this process: what a child adds has its own tests."""

    def _ask(self, line: bytes) -> Any:
        return previews._answer(line)

    def warm(self) -> None:
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    home = tmp_path_factory.mktemp("studies")
    made: Consortium = bare(home)
    first, _ = small_study(home / "a", epsilon=20.0)
    made.propose(first, seed=3)
    second, _ = small_study(home / "b", epsilon=3.0, rows=500)
    text = second.read_text().replace('title = "A small study"', f'title = "{HOSTILE}"')
    second.write_text(text.replace("survivors = 2", "survivors = 3"))
    changed = json.loads(json.dumps(DICTIONARY))
    changed["fields"][2]["constraints"]["maximum"] = 110
    changed["fields"][1]["role"] = "quasi-identifier"
    (home / "b" / "dictionary.json").write_text(json.dumps(changed))
    made.propose(second)
    with desk_over(made) as desk:
        previews._OF[desk] = Inside()
        yield desk


@pytest.fixture
def ada(world: Desk) -> Iterator[TestClient]:
    yield signed_in(world)
    for draft in pages.drafts_of(world).all():
        pages.drafts_of(world).remove(draft.name)


def dictionary() -> str:
    return json.dumps(DICTIONARY)


def save(client: TestClient, **changes: str) -> Any:
    form = {"csrf": client.csrf, "dictionary": dictionary(), **TYPED, **changes}  # type: ignore[attr-defined]
    return client.post("/studies/new", data=form)


# ---- what was proposed --------------------------------------------------------------------------------------


def test_versions_of_a_study(world: Desk, ada: TestClient) -> None:
    found = studies(world)["small"]
    assert [(v.epsilon, v.warning) for v in found] == [(3.0, ""), (20.0, "rehearsal, NOT private")]
    page = ada.get("/studies").text
    assert "rehearsal, NOT private" in page and HOSTILE not in page and "&lt;script&gt;" in page
    told = ada.get("/api/studies").json()
    assert [v["run"] for v in told["studies"]["small"]] == [v.run for v in found]
    new = ada.get("/studies/small").text
    assert "version 2 of 2" in new and found[0].proposal in new and "holds" in new
    old = ada.get(f"/studies/small/{found[1].run}").text
    assert "version 1 of 2" in old and "This is the first version" in old and "rehearsal, NOT private" in old


def test_what_changed_privacy_first(world: Desk, ada: TestClient) -> None:
    told = ada.get("/api/studies/small").json()["changes"]
    privacy = [change["place"] for change in told if change["privacy"]]
    assert {"[privacy] epsilon", "[strategy] survivors", "dictionary: sex, role"} == set(privacy)
    assert [change["privacy"] for change in told] == sorted((c["privacy"] for c in told), reverse=True)
    said = {change["place"]: (change["old"], change["new"]) for change in told}
    assert said["[privacy] epsilon"] == ("20.0", "3.0") and said["[release] rows"] == ("60", "500")
    assert said["dictionary: age, maximum"] == ("99", "110") and said["dictionary: sex, role"] == (
        "",
        "quasi-identifier",
    )
    assert set(said) - set(privacy) == {"[study] title", "[release] rows", "dictionary: age, maximum"}


def test_columns_that_came_and_went_and_long_lists() -> None:
    levels = [f"l{i}" for i in range(40)]
    old = {"name": "d", "fields": [{"name": "a", "type": "string", "constraints": {"enum": levels}}]}
    new = {"name": "d", "fields": [{"name": "a", "type": "string", "constraints": {"enum": [*levels[1:], "x"]}}]}
    new["fields"].append({"name": "b", "type": "date"})  # type: ignore[attr-defined]
    text = "[sites]\nnames = ['a']\n"
    found = changes((text, json.dumps(old)), (text.replace("'a'", "'a', 'b'"), json.dumps(new)))
    assert [(c.place, c.privacy) for c in found] == [
        ("[sites] names", True),
        ("dictionary: b", True),
        ("dictionary: a, enum", False),
    ]
    assert found[2].old == "40 levels; gone: l0" and found[2].new == "40 levels; new: x"
    assert changes((text, json.dumps(old)), (text, json.dumps(old))) == []


def test_the_price_is_that_of_the_signed_plan(world: Desk, ada: TestClient) -> None:
    run = studies(world)["small"][0].run
    part = ada.get(f"/studies/small/{run}/plan").text
    assert "(3.000, 1e-06)-differential privacy" in part and "What it takes" in part and "None is known" in part


def test_files_to_take_away(world: Desk, ada: TestClient) -> None:
    version = studies(world)["small"][0]
    for name in ("study.toml", "dictionary.json"):
        answer = ada.get(f"/studies/small/{version.run}/{name}")
        stored = world.consortium.root / "runs" / version.run / name
        assert answer.content == stored.read_bytes()
        assert answer.headers["content-disposition"] == f'attachment; filename="{version.run}.{name}"'
        assert "html" not in answer.headers["content-type"]


def test_a_file_that_was_changed_afterwards_is_found(world: Desk, ada: TestClient) -> None:
    run = studies(world)["small"][0].run
    for name, was, now in (("study.toml", "rows = 500", "rows = 501"), ("plan.json", '"rows":500', '"rows":501')):
        path = world.consortium.root / "runs" / run / name
        text = path.read_text()
        assert was in text
        try:
            path.write_text(text.replace(was, now))
            assert "The signature does not hold" in ada.get("/studies/small").text
        finally:
            path.write_text(text)
    assert "The signature does not hold" not in ada.get("/studies/small").text


@pytest.mark.parametrize(
    "path",
    [
        "/studies/other",
        "/studies/small/no-such",
        "/studies/other/x/plan",
        "/studies/small/x/study.toml",
        "/drafts/none",
        "/drafts/none/plan",
        "/studies/new?draft=none",
        "/studies/new?run=none",
    ],
)
def test_what_is_not_there(ada: TestClient, path: str) -> None:
    assert ada.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/studies/A", "/drafts/..%2Fx", "/studies/new?epsilon=nan", "/studies/new?how=x"])
def test_names_and_numbers_are_checked(ada: TestClient, path: str) -> None:
    assert ada.get(path).status_code in (404, 422)


# ---- who may ------------------------------------------------------------------------------------------------


def test_roles(world: Desk, ada: TestClient) -> None:
    assert save(ada).status_code == 303
    kim, member = signed_in(world, AUDITOR), signed_in(world, SITE, site="site-1")
    for path in ("/studies", "/api/studies", "/studies/small", "/drafts/second", "/drafts/second/plan"):
        assert kim.get(path).status_code == 200 and member.get(path).status_code == 403
        assert visitor(world).get(path).status_code == 303
    assert kim.get("/studies/new").status_code == 403 and "Propose" not in kim.get("/drafts/second/plan").text
    before = [draft.digest for draft in pages.drafts_of(world).all()]
    for client in (kim, member):
        assert save(client, title="mine").status_code == 403
        assert act(client, "/drafts/second/remove").status_code == 403
        assert act(client, "/drafts/second/propose", digest=before[0]).status_code == 403
        assert client.post("/studies/preview", data={"csrf": client.csrf}).status_code == 403  # type: ignore[attr-defined]
    assert ada.post("/studies/new", data=TYPED).status_code == 403, "without the token of the form"
    assert [draft.digest for draft in pages.drafts_of(world).all()] == before and len(studies(world)["small"]) == 2


# ---- the form -----------------------------------------------------------------------------------------------


def preview(client: TestClient, **changes: str) -> str:
    form = {"csrf": client.csrf, "dictionary": dictionary(), **TYPED, **changes}  # type: ignore[attr-defined]
    answer = client.post("/studies/preview", data=form)
    assert answer.status_code == 200
    return str(answer.text)


def test_the_preview_is_plan_and_price_or_the_error(ada: TestClient) -> None:
    page = preview(ada)
    assert "ε = 3.000" in page and "4 releases" in page and "GB" in page and "None is known" in page
    assert HOSTILE not in page
    page = preview(ada, epsilon="three")
    assert "STUDY-TYPE" in page and "study.toml:" in page and "epsilon = 3.0" in page
    assert "STUDY-MISSING" in preview(ada, epsilon="") and "DICT-JSON" in preview(ada, dictionary="{")
    page = preview(ada, unit=HOSTILE)
    assert "STUDY-VALUE" in page and HOSTILE not in page
    assert "10 hospitals" in preview(ada, hospitals="10", survivors="6")
    assert "CONSORTIUM-SITES" in preview(ada, sites="nobody, site-1, site-2")


def test_the_form_starts_empty_where_privacy_is_decided(ada: TestClient) -> None:
    import re

    page = ada.get("/studies/new").text
    for name in ("epsilon", "delta", "unit", "hospitals_per_patient", "survivors", "colluders", "holdout"):
        assert re.search(rf'name="{name}" value=""', page), name
    assert '<option value="" selected>choose</option>' in page and 'value="add-remove" selected' not in page


def test_a_proposal_and_a_curve_fill_the_form(world: Desk, ada: TestClient) -> None:
    run = studies(world)["small"][0].run
    page = ada.get(f"/studies/new?run={run}&epsilon=0.5").text
    assert 'name="epsilon" value="0.5"' in page and 'name="survivors" value="3"' in page and "quasi-identifier" in page
    text = toml_of(TYPED) + "[evaluation.thresholds]\ncolumns = [0.1, 0.2]\n"
    text = text.replace("[evaluation.thresholds]", "[evaluation]\nepsilon = 1\nholdout = 0.2\n[evaluation.thresholds]")
    assert save(ada, how="file", study=text).status_code == 303
    page = ada.get("/studies/new?draft=second&epsilon=7").text
    assert "more than the form can" in page and "epsilon = 7" in page and "evaluation.thresholds" in page


def test_a_dictionary_from_a_file(ada: TestClient) -> None:
    for content, said in (
        (b'{"a": "</textarea><script>"}', "&lt;/textarea&gt;"),
        (b"\xff\xfe", "not a text"),
        (b"x" * 900_001, "too long"),
    ):
        files = {"dictionary_file": ("../../d.json", content)}
        answer = ada.post("/studies/new/dictionary", data={"csrf": ada.csrf}, files=files)  # type: ignore[attr-defined]
        assert answer.status_code == 200 and said in answer.text and "<script>" not in answer.text


# ---- drafts and proposals -----------------------------------------------------------------------------------


def test_a_draft_is_saved_and_removed(world: Desk, ada: TestClient) -> None:
    assert save(ada).headers["location"] == "/drafts/second?did=saved"
    page = ada.get("/drafts/second").text
    assert HOSTILE not in page and "Nothing was proposed" in page
    assert save(ada, title="another").status_code == 409, "an open page is not written over"
    base = pages.drafts_of(world).draft("second").digest
    assert save(ada, title="another", base=base).status_code == 303
    assert save(ada, id="../x").status_code == 422
    assert act(ada, "/drafts/second/remove", reason="").status_code == 422
    assert act(ada, "/drafts/second/remove").status_code == 303 and ada.get("/drafts/second").status_code == 404


def test_what_was_shown_is_proposed_and_nothing_else(world: Desk, ada: TestClient) -> None:
    save(ada, id="third", title="First thought")
    shown = pages.drafts_of(world).draft("third")
    assert shown.digest in ada.get("/drafts/third/plan").text
    save(ada, id="third", title="Second thought", base=shown.digest)
    assert act(ada, "/drafts/third/propose", digest=shown.digest).status_code == 409
    digest = pages.drafts_of(world).draft("third").digest
    form = {"csrf": ada.csrf, "digest": digest, "reason": "agreed"}  # type: ignore[attr-defined]
    assert ada.post("/drafts/third/propose", data=form).status_code == 409, "not confirmed"
    assert act(ada, "/drafts/third/propose", digest=digest, reason=" ").status_code == 422
    assert "third" not in studies(world)
    answer = act(ada, "/drafts/third/propose", digest=digest, reason="agreed on 1 May")
    assert answer.status_code == 303
    version = studies(world)["third"][0]
    assert answer.headers["location"] == f"/runs/{version.run}?did=proposed"
    assert (version.title, version.epsilon, version.warning) == ("Second thought", 3.0, "")
    assert [line.body["fields"]["action"] for line in world.journal.lines()[-2:]] == ["propose", "propose"]
    asked = world.journal.lines()[-2].body["fields"]
    assert (asked["reason"], asked["digest"], asked["guessed"]) == ("agreed on 1 May", digest, "refused")
    assert ada.get("/drafts/third").status_code == 404


def test_a_rehearsal_needs_the_loud_word(world: Desk, ada: TestClient) -> None:
    save(ada, id="fourth")
    digest = pages.drafts_of(world).draft("fourth").digest
    for loud in ("", "not private", "NOT", "yes"):
        answer = act(ada, "/drafts/fourth/propose", digest=digest, seed="7", loud=loud)
        assert answer.status_code == 409 and "REHEARSAL-WORD" in answer.text
    assert act(ada, "/drafts/fourth/propose", digest=digest, seed="-1", loud="NOT private").status_code == 422
    assert "fourth" not in studies(world)
    assert act(ada, "/drafts/fourth/propose", digest=digest, seed="7", loud="NOT private").status_code == 303
    version = studies(world)["fourth"][0]
    assert version.rehearsal and version.warning == "rehearsal, NOT private"
    assert world.journal.lines()[-2].body["fields"]["rehearsal_seed"] == 7


def test_guessed_ranges_are_accepted_explicitly_or_not_at_all(world: Desk, ada: TestClient) -> None:
    guessed = json.loads(dictionary())
    guessed["fields"][2]["x-guessed"] = True
    save(ada, id="fifth", dictionary=json.dumps(guessed))
    part = ada.get("/drafts/fifth/plan").text
    assert "STUDY-GUESSED" in part and 'name="accept_guessed"' in part
    digest = pages.drafts_of(world).draft("fifth").digest
    answer = act(ada, "/drafts/fifth/propose", digest=digest)
    assert answer.status_code == 422 and "STUDY-GUESSED" in answer.text and "fifth" not in studies(world)
    assert act(ada, "/drafts/fifth/propose", digest=digest, accept_guessed="yes").status_code == 303
    assert studies(world)["fifth"][0].guessed
    assert "Guessed ranges were accepted" in ada.get("/studies/fifth").text


def test_a_draft_that_does_not_compile_is_not_proposed(world: Desk, ada: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "dictionary.json"
    secret.write_text(dictionary())
    text = toml_of({**TYPED, "id": "sixth"}).replace('"dictionary.json"', json.dumps(str(secret)))
    save(ada, how="file", study=text)
    digest = pages.drafts_of(world).draft("sixth").digest
    answer = act(ada, "/drafts/sixth/propose", digest=digest)
    assert answer.status_code == 422 and "sixth" not in studies(world), "no file but its own dictionary is read"
    assert "cannot be proposed" in ada.get("/drafts/sixth/plan").text
    assert pages.drafts_of(world).draft("sixth").digest == digest, "the draft stays"

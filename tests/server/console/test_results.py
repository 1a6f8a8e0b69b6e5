"""Results in the console: what is shown, to whom, what may be taken; nothing unreadable passes for a result."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from console_worlds import HOLDOUT, bare, desk_over, with_runs
from releasable import (
    HOSTILE,
    another,
    as_rehearsal,
    evaluated,
    hostile,
    journal_of,
    made_findings,
    signed_in,
    visitor,
    world,
)
from releasing import RUN, edit_json

from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.report_text import epsilon
from cohortium.common.web.guarding import POLICY, REPORT_POLICY
from cohortium.server.console import compare_view, result_view
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.compare_view import chosen, differ
from cohortium.server.console.desk import Desk
from cohortium.server.console.result_file import NO_NOISE, REHEARSAL, card_of, read_result
from cohortium.server.console.result_view import gallery, results_of
from cohortium.server.consortium import Consortium

GOOD, BETTER, LOUD, EVIL, EAST = "small-1", "small-2", "loud-1", "evil-1", "east-only-1"
PAGES = ("/results/{}", "/results/{}/report", "/results/{}/summary.pdf", "/api/results/{}")
ROWS = ("/results/{}/synthetic.csv", "/results/{}/synthetic.parquet")


def unmeasured(result: dict[str, Any]) -> None:
    as_rehearsal(result)
    result["evaluation"], result["verdicts"] = None, []


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Five finished runs: two to compare, a rehearsal, one full of hostile words, one of two sites only."""
    made, run = world(tmp_path_factory.mktemp("results") / "consortium")
    edit_json(run.root / "result.json", evaluated)
    another(made, BETTER, lambda r: evaluated(r, shift=0.2))
    another(made, LOUD, unmeasured)
    folder = another(made, EVIL, hostile)
    text = (folder / "study.toml").read_text().replace("A small study", HOSTILE.replace('"', "'").replace("\0", ""))
    (folder / "study.toml").write_text(text.replace("\u202e", ""))
    another(made, EAST, sites=("east", "north"))
    another(made, "going-1", ended=False)
    with desk_over(made) as desk:
        yield desk


@pytest.fixture(scope="module")
def finished_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, run = world(tmp_path_factory.mktemp("template") / "consortium")
    edit_json(run.root / "result.json", evaluated)
    return made.root


@pytest.fixture
def own(finished_world: Path, tmp_path: Path) -> Iterator[tuple[Desk, Path]]:
    """(desk, run's folder), a copy to be spoiled."""
    made = Consortium(Path(shutil.copytree(finished_world, tmp_path / "consortium")))
    with desk_over(made) as desk:
        yield desk, made.runs / RUN


# ---- what is shown ------------------------------------------------------------------------------------------


def test_a_result_is_shown_whole(desk: Desk) -> None:
    page = signed_in(desk).get(f"/results/{GOOD}").text
    result = json.loads((desk.consortium.root / "runs" / GOOD / "result.json").read_text())
    assert result["privacy"]["sentence"] in page and "Usable with care." in page
    for price in result["privacy"]["prices"]:
        assert epsilon(price["epsilon"])[:4] in page, price
    for words in (
        "1 hospital ",
        "2 hospitals",
        "3 hospitals",
        "0.600 (0.580 to 0.620)",
        "0.950",
        "Mean column agreement",
    ):
        assert words in page, words
    assert "The noise is larger than the figure." in page  # what cannot be assessed says why
    for value in (
        *result["files"].values(),
        result["plan"]["digest"],
        *(h["hash"] for h in result["ledgers"].values()),
    ):
        assert value in page, "provenance"
    assert page.count("<svg") > 6 and "Correlations" in page and "ROC of age" in page
    assert REHEARSAL not in page and "It describes age with care." in page


def test_the_gallery_shows_each_run_with_verdict_epsilon_and_picture(desk: Desk) -> None:
    page = signed_in(desk).get("/results").text
    assert page.count('class="card"') == 5 and "going-1" not in page
    card = page.split(f'id="run-{BETTER}"')[1].split("</article>")[0]
    assert "ε = 3.000" in card and "usable with care" in card and "<svg" in card and "0.800 (0.780 to 0.820)" in card
    first, second = (page.index(f'id="run-{run}"') for run in (EAST, GOOD))
    assert first < second  # newest first


def test_it_is_filtered_by_study_and_paged(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    client = signed_in(desk)
    assert client.get("/results?study=small").text.count('class="card"') == 2
    assert "No run of this study has finished." in client.get("/results?study=nobody").text
    monkeypatch.setattr(result_view, "PAGE", 2)
    told = client.get("/api/results?page=3").json()
    assert (told["page"], told["pages"], told["total"], [r["run"] for r in told["results"]]) == (3, 3, 5, [GOOD])
    assert client.get("/api/results?page=9").json()["page"] == 3
    assert "page=2" in client.get("/results?page=1").text and client.get("/results?page=0").status_code == 422


def test_no_more_than_a_page_is_read_and_nothing_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> Any:
        read.append(path)
        return read_result(path)

    monkeypatch.setattr(result_view, "read_result", counted)
    monkeypatch.setattr(result_view, "PAGE", 3)
    results = result_view.Results(desk)
    rows = list(reversed(desk.register.runs()))
    gallery(results, rows)
    assert len(read) == 3
    gallery(results, rows)
    assert len(read) == 3


def test_a_changed_result_is_read_again(own: tuple[Desk, Path]) -> None:
    desk, folder = own
    client = signed_in(desk)
    assert REHEARSAL not in client.get(f"/results/{RUN}").text
    edit_json(folder / "result.json", as_rehearsal)
    assert REHEARSAL in client.get(f"/results/{RUN}").text and REHEARSAL in client.get("/results").text


def test_the_console_without_runs_tells_the_next_step(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        client = signed_in(desk)
        assert "No run has finished yet." in client.get("/results").text
        assert "Tick two to four runs" in client.get("/results/compare").text


# ---- a rehearsal --------------------------------------------------------------------------------------------


def test_a_rehearsal_is_called_one_everywhere(desk: Desk) -> None:
    client = signed_in(desk)
    assert client.get(f"/results/{LOUD}").text.count(REHEARSAL) >= 2
    assert REHEARSAL in client.get("/results").text.split(f'id="run-{LOUD}"')[1].split("</article>")[0]
    assert client.get(f"/results/compare?run={LOUD}&run={GOOD}").text.count(REHEARSAL) >= 2
    assert client.get(f"/api/results/{LOUD}").json()["not_private"] == REHEARSAL
    told = client.get(f"/api/compare?run={LOUD}&run={GOOD}").json()["runs"]
    assert [run["not_private"] for run in told] == [REHEARSAL, ""]
    for path in (*ROWS, "/results/{}/summary.pdf"):
        assert "NOT-PRIVATE-loud-1" in client.get(path.format(LOUD)).headers["content-disposition"], path
        assert "NOT-PRIVATE" not in client.get(path.format(GOOD)).headers["content-disposition"], path


@pytest.mark.parametrize("value", [True, 1, "", "no", None, 0])
def test_whatever_is_not_plainly_private_is_loud(desk: Desk, value: Any) -> None:
    result = read_result(desk.consortium.root / "runs" / GOOD / "result.json")
    result["privacy"]["rehearsal"] = value
    assert card_of(GOOD, result).loud == REHEARSAL


def test_a_run_without_noise_is_loud(desk: Desk) -> None:
    result = read_result(desk.consortium.root / "runs" / GOOD / "result.json")
    for price in result["privacy"]["prices"]:
        price["epsilon"] = "inf"
    card = card_of(GOOD, result)
    assert card.loud == NO_NOISE and card.to_json()["epsilon"] == "inf"
    json.dumps(card.to_json(), allow_nan=False)


# ---- who sees what ------------------------------------------------------------------------------------------


def test_a_site_sees_its_own_runs_only(desk: Desk) -> None:
    """What it does not see looks like what does not exist."""
    west, east = signed_in(desk, SITE, site="west"), signed_in(desk, SITE, site="east")
    assert EAST not in west.get("/results").text and EAST in east.get("/results").text
    assert EAST not in json.dumps(west.get("/api/results").json())
    paths = (*PAGES, *ROWS, "/results/compare?run=small-1&run={}", "/api/compare?run={}&run=small-1")
    for path in paths:
        hidden, none = west.get(path.format(EAST)), west.get(path.format("nobody-1"))
        assert (hidden.status_code, none.status_code) == (404, 404), path
        assert hidden.text.replace(EAST, "nobody-1") == none.text, path
        assert east.get(path.format(EAST)).status_code == 200, path


@pytest.mark.parametrize("path", ["/results", "/results/compare", "/api/results", *(p.format(GOOD) for p in PAGES)])
def test_every_role_reads_and_nobody_else(desk: Desk, path: str) -> None:
    for role, site in ((COORDINATOR, ""), (AUDITOR, ""), (SITE, "east")):
        assert signed_in(desk, role, site=site).get(path).status_code == 200, role
    assert visitor(desk).get(path).status_code in (303, 401)


def test_rows_go_to_coordinator_and_sites_and_no_auditor(own: tuple[Desk, Path]) -> None:
    desk, folder = own
    for path, name in zip(ROWS, ("synthetic.csv", "synthetic.parquet")):
        for client in (signed_in(desk), signed_in(desk, SITE, site="east")):
            answer = client.get(path.format(RUN))
            assert answer.status_code == 200 and answer.content == (folder / name).read_bytes()
            assert answer.headers["content-disposition"] == f'attachment; filename="{RUN}-{name}"'
            assert answer.headers["cache-control"] == "no-store"
        assert signed_in(desk, AUDITOR).get(path.format(RUN)).status_code == 403
    taken = [fields for about, fields in journal_of(desk) if about == "download"]
    assert [(t["by"], t["file"]) for t in taken[:2]] == [
        ("coordinator", "synthetic.csv"),
        ("site-east", "synthetic.csv"),
    ]
    assert len(taken) == 4 and all(t["on"] == RUN for t in taken)  # what was refused is no download
    page = signed_in(desk, AUDITOR).get(f"/results/{RUN}").text
    assert 'synthetic.csv"' not in page and "Rows come to it with a" in page


def test_a_revoked_site_takes_no_rows(own: tuple[Desk, Path]) -> None:
    desk, _ = own
    client = signed_in(desk, SITE, site="east")
    assert client.get(ROWS[0].format(RUN)).status_code == 200
    desk.register.revoke("east")
    assert client.get(ROWS[0].format(RUN)).status_code == 403
    assert (
        client.get(f"/results/{RUN}").status_code == 200 and "/synthetic.csv" not in client.get(f"/results/{RUN}").text
    )


def test_other_numbers_of_rows_need_the_forms_token_and_a_right(desk: Desk) -> None:
    auditor, coordinator = signed_in(desk, AUDITOR), signed_in(desk)
    wanted = {"rows": "50", "kind": "csv"}
    assert coordinator.post(f"/results/{GOOD}/rows", data=wanted).status_code == 403
    given = {**wanted, "csrf": auditor.csrf}  # type: ignore[attr-defined]
    assert auditor.post(f"/results/{GOOD}/rows", data=given).status_code == 403
    token = coordinator.csrf  # type: ignore[attr-defined]
    for bad in ({"rows": "0"}, {"rows": "1000001"}, {"rows": "x"}, {"kind": "xlsx"}):
        assert coordinator.post(f"/results/{GOOD}/rows", data={**wanted, "csrf": token, **bad}).status_code == 422
    # As many as were published are the published ones.
    answer = coordinator.post(f"/results/{GOOD}/rows", data={"rows": "60", "kind": "csv", "csrf": token})
    assert answer.content == (desk.consortium.root / "runs" / GOOD / "synthetic.csv").read_bytes()


def test_rows_that_were_changed_are_not_handed_out(own: tuple[Desk, Path]) -> None:
    desk, folder = own
    (folder / "synthetic.csv").write_text("id\n1\n")
    answer = signed_in(desk).get(ROWS[0].format(RUN))
    assert answer.status_code == 409 and "RESULT-FILE" in answer.text
    (folder / "synthetic.csv").unlink()
    assert signed_in(desk).get(ROWS[0].format(RUN)).status_code == 404
    (folder / "synthetic.csv").symlink_to(folder / "coordinator.key")
    assert signed_in(desk).get(ROWS[0].format(RUN)).status_code == 404
    assert not [about for about, _ in journal_of(desk) if about == "download"]


# ---- files that are no result -------------------------------------------------------------------------------

SPOILED: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nothing in it": lambda path: path.write_text("{}"),
    "nested too deep": lambda path: path.write_text("[" * 200_000),
    "not a number": lambda path: path.write_text(path.read_text().replace('"delta": 1e-06', '"delta": NaN', 1)),
    "infinite": lambda path: path.write_text(path.read_text().replace('"delta": 1e-06', '"delta": 1e999', 1)),
    "odd privacy": lambda path: edit_json(path, lambda r: r.update(privacy=[])),
    "odd prices": lambda path: edit_json(path, lambda r: r["privacy"].update(prices=[{"relation": "add-remove"}])),
    "odd epsilon": lambda path: edit_json(path, lambda r: r["privacy"]["prices"][0].update(epsilon="much")),
    "odd title": lambda path: edit_json(path, lambda r: r["study"].update(title={"a": 1})),
    "odd verdicts": lambda path: edit_json(path, lambda r: r.update(verdicts=[7])),
    "odd findings": lambda path: edit_json(path, lambda r: r["evaluation"].update(sections=[{"key": 1}])),
    "odd figure": lambda path: edit_json(
        path, lambda r: r["evaluation"]["sections"][0]["findings"][0]["named"].update(figure={"value": "x"})
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.with_name("r")), path.symlink_to(path.with_name("r"))),
}


@pytest.fixture(scope="module")
def spoiling(finished_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Desk, Path, bytes]]:
    root = tmp_path_factory.mktemp("spoiling") / "consortium"
    made = Consortium(Path(shutil.copytree(finished_world, root)))
    path = made.runs / RUN / "result.json"
    with desk_over(made) as desk:
        yield desk, path, path.read_bytes()


@pytest.mark.parametrize("how", SPOILED)
def test_what_cannot_be_read_says_so_and_is_no_result(spoiling: tuple[Desk, Path, bytes], how: str) -> None:
    desk, path, whole = spoiling
    try:
        SPOILED[how](path)
        client = signed_in(desk)
        for place in (*PAGES, *ROWS):
            answer = client.get(place.format(RUN))
            assert answer.status_code == (404 if how == "missing" else 409), (place, answer.text)
            assert ("RESULT-MISSING" if how == "missing" else "RESULT-FORM") in answer.text, place
        gallery_page = client.get("/results")
        # The gallery looks at less than the page does, and is never broken by one run.
        assert gallery_page.status_code == 200 and RUN in gallery_page.text
        assert client.get("/api/results").status_code == 200
        assert client.get(f"/release/{RUN}").status_code == 200
        assert "It may be handed out" not in client.get(f"/release/{RUN}").text
    finally:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.with_name("r").unlink(missing_ok=True)
        path.write_bytes(whole)


@pytest.mark.parametrize("what", ["scores", "exact_evaluation", "mode"])
def test_exact_scores_are_never_shown(spoiling: tuple[Desk, Path, bytes], what: str) -> None:
    """They passed no gate: neither page, report nor rows of such a run are handed out."""
    desk, path, whole = spoiling
    try:
        if what == "mode":
            edit_json(path, lambda r: r["facts"].update(mode="simulation"))
        else:
            edit_json(path, lambda r: r.update({what: {"column_agreement": 0.123457}}))
        client = signed_in(desk)
        for place in (*PAGES, *ROWS):
            answer = client.get(place.format(RUN))
            assert answer.status_code == 409 and "RESULT-EXACT" in answer.text and "0.123" not in answer.text, place
        assert "RESULT-EXACT" in client.get("/results").text
    finally:
        path.write_bytes(whole)


def test_a_run_that_has_not_ended_has_no_results(desk: Desk) -> None:
    client = signed_in(desk)
    for place in (*PAGES, *ROWS):
        answer = client.get(place.format("going-1"))
        assert answer.status_code == 409 and "RUN-UNFINISHED" in answer.text, place


@pytest.mark.parametrize("run", ["%2e%2e", "A", "x" * 64, "a%2F..%2Fb", "-x", "é", "a%00", "a%0Ab"])
def test_no_name_leads_out_of_the_runs(desk: Desk, run: str) -> None:
    for place in PAGES:
        assert signed_in(desk).get(place.format(run)).status_code in (404, 422)


# ---- other people's words -----------------------------------------------------------------------------------


def test_other_peoples_words_are_text(desk: Desk) -> None:
    client = signed_in(desk)
    pages = ["/results", f"/results/{EVIL}", f"/results/compare?run={EVIL}&run={GOOD}", f"/release/{EVIL}"]
    for path in pages:
        text = client.get(path).text
        assert (
            "<img" not in text and "<script>" not in text and text.count("</script>") == text.count("<script src=")
        ), path
    told = client.get(f"/api/results/{EVIL}")
    assert told.headers["content-type"] == "application/json" and told.json()["title"] == HOSTILE


def test_pages_keep_the_policy(desk: Desk) -> None:
    """No inline style, script or handler: the browser would refuse them."""
    client = signed_in(desk)
    for path in (
        "/results",
        f"/results/{GOOD}",
        f"/results/compare?run={GOOD}&run={BETTER}",
        f"/release/{GOOD}",
        "/release",
    ):
        answer = client.get(path)
        assert answer.headers["content-security-policy"] == POLICY
        tags = re.findall(r"<[a-z][^>]*>", answer.text)
        assert not [tag for tag in tags if re.search(r"\s(style|on[a-z]+)=", tag)], path
        assert answer.text.count("<h1") == 1 and not re.search(r'(src|href)="(https?:)?//', answer.text), path
        ids = re.findall(r'\bid="([^"]+)"', answer.text)
        assert len(ids) == len(set(ids)), path


def test_the_report_is_a_page_of_its_own(desk: Desk) -> None:
    answer = signed_in(desk, AUDITOR).get(f"/results/{GOOD}/report")
    assert answer.headers["content-security-policy"] == REPORT_POLICY and "sandbox" in REPORT_POLICY
    assert answer.content == (desk.consortium.root / "runs" / GOOD / "report.html").read_bytes()
    assert 'target="_blank" rel="noopener"' in signed_in(desk).get(f"/results/{GOOD}").text


# ---- compare ------------------------------------------------------------------------------------------------


def interval(low: float | None, high: float | None) -> Figure:
    return Figure(value=0.5, low=low, high=high)


@pytest.mark.parametrize(
    ("first", "second", "side"),
    [
        ((0.6, 0.7), (0.4, 0.5), 1),
        ((0.1, 0.2), (0.4, 0.5), -1),
        ((0.4, 0.6), (0.5, 0.7), 0),
        ((0.4, 0.5), (0.5, 0.7), 0),  # they touch
        ((0.2, 0.9), (0.4, 0.5), 0),  # one inside the other
        ((0.9, 0.9), (0.4, 0.5), 1),
    ],
)
def test_runs_differ_only_where_intervals_part(first: Any, second: Any, side: int) -> None:
    assert differ(interval(*first), interval(*second)) == side
    assert differ(interval(*second), interval(*first)) == -side


def test_without_two_intervals_nothing_is_said() -> None:
    assert differ(interval(None, None), interval(0.1, 0.2)) == 0
    assert differ(None, interval(0.1, 0.2)) == 0 and differ(Figure.unknown("noise"), interval(0.1, 0.2)) == 0


def test_two_runs_side_by_side(desk: Desk) -> None:
    answer = signed_in(desk).get(f"/api/compare?run={GOOD}&run={BETTER}").json()
    by_key = {figure["key"]: figure for figure in answer["figures"]}
    assert by_key["column_agreement"]["differs"] == [{"higher": BETTER, "lower": GOOD}]
    assert by_key["column_agreement"]["words"] == "differs: B above A, B better"
    assert by_key["tstr_auc"]["differs"] == [] and "overlap" in by_key["tstr_auc"]["words"]
    assert "cannot be told" in by_key["mean_smd"]["words"]
    assert by_key["column_agreement"]["runs"][BETTER]["value"] == 0.8
    page = signed_in(desk).get(f"/results/compare?run={GOOD}&run={BETTER}").text
    assert "the studies are the same word for word" in page and "do not overlap" in page and "by chance" in page
    assert "differs: B above A, B better" in page or "Differs: B above A, B better" in page


def test_a_run_has_a_letter_a_shape_and_a_colour(desk: Desk) -> None:
    wholes = [results_of(desk).whole(desk.register.run_row(run)) for run in (GOOD, BETTER, LOUD, EVIL)]
    compared = compare_view.compare(wholes)
    picture = compare_view.figure_picture(compare_view.Identifiers(), compared[0], [GOOD, BETTER, LOUD, EVIL])
    assert all(f"{letter} · " in picture for letter in "ABCD")
    # LOUD has no evaluation: it is named, without a mark.
    assert [f'class="hue-{n}"' in picture for n in range(4)] == [True, True, False, True] and "not measured" in picture
    assert len({compare_view.SHAPES[n](10, 10) for n in range(4)}) == 4 and "\0" not in picture


def test_the_worse_one_is_not_called_better() -> None:
    """Where lower is better, the lower run is."""
    made = made_findings(0.0, "age").sections[0].findings[0]
    figures = tuple(Figure(value=v, low=v - 0.01, high=v + 0.01, direction="lower") for v in (0.9, 0.1))
    one = compare_view.Compared(
        key=made.key, label="gap", unit="", direction="lower", figures=figures, differs=((0, 1),)
    )
    assert one.words == "differs: A above B, B better"


def test_what_the_studies_did_differently(desk: Desk) -> None:
    folders = [desk.consortium.root / "runs" / run for run in (GOOD, EVIL)]
    assert [setting.name for setting in compare_view.settings(folders)] == ["study.title"]
    assert compare_view.settings([folders[0], folders[0]]) == []


@pytest.mark.parametrize("runs", [[], ["a"], ["a", "a"], ["a", "b", "c", "d", "e"]])
def test_two_to_four_runs_are_compared(desk: Desk, runs: list[str]) -> None:
    with pytest.raises(UsageError, match="COMPARE-NUMBER"):
        chosen(runs)
    query = "&".join(f"run={run}" for run in runs)
    assert signed_in(desk).get(f"/api/compare?{query}").status_code == 422


# ---- a run that hospitals answered --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_hospitals_answered(tmp_path: Path) -> None:
    """The format that a run really leaves, and rows of another size from its model."""
    field, run, proposed = with_runs(tmp_path, evaluation=HOLDOUT)
    with desk_over(field.made) as desk:
        client = signed_in(desk)
        assert REHEARSAL in client.get("/results").text and proposed not in client.get("/results").text
        page = client.get(f"/results/{run}")
        assert page.status_code == 200 and "NOT PRIVATE" in page.text and "cannot be assessed" in page.text
        assert client.get(f"/results/{proposed}").status_code == 409
        form = {"rows": "37", "kind": "parquet", "csrf": client.csrf}  # type: ignore[attr-defined]
        answer = client.post(f"/results/{run}/rows", data=form)
        assert answer.status_code == 200 and len(pd.read_parquet(io.BytesIO(answer.content))) == 37
        assert f'filename="NOT-PRIVATE-{run}-synthetic-37.parquet"' in answer.headers["content-disposition"]
        assert not list(field.made.runs.glob("rows-*"))  # nothing stays on disk
        assert journal_of(desk)[-1][1]["rows"] == 37


def test_errors_that_are_kept_are_raised_again(own: tuple[Desk, Path]) -> None:
    desk, folder = own
    results = results_of(desk)
    (folder / "result.json").write_text("{}")
    row = desk.register.run_row(RUN)
    for _ in range(3):
        with pytest.raises(CohortiumError, match="RESULT-FORM"):
            results.whole(row)

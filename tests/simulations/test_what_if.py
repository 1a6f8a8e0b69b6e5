"""The curve of quality against ε: what it is made of, that it goes on where it was cut, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from small import small_study, small_table
from typer.testing import CliRunner, Result

from cohortium.common.errors import Refused, StudyError, UsageError
from cohortium.common.study import Study
from cohortium.server.console import curve
from cohortium.simulations import what_if as work
from cohortium.simulations import what_if_cli
from cohortium.simulations.tune import Interrupted
from cohortium.simulations.what_if import Request, at_epsilon, shuffled, what_if

EVALUATED = "[evaluation]\nepsilon = 1.0\nholdout = 0.2\n"


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Path]:
    return small_study(tmp_path / "study", table=small_table(150), survivors=3, colluders=1, epsilon=3.0)


@pytest.fixture
def asked(tmp_path: Path, study: tuple[Path, Path]) -> Callable[..., Request]:
    def make(**changes: Any) -> Request:
        plain = {"study": study[0], "table": study[1], "out": tmp_path / "out", "split": "iid:4"}
        return Request(**{**plain, "epsilons": (1.0, 10.0), "seeds": 2, **changes})

    return make


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Every fit as (ε, seed), instead of being made: its scores are known."""
    made: list[tuple[float, int]] = []

    def known(study: Study, sites: Any, cut: Any, *, auc: bool, seed: int) -> dict[str, float]:
        epsilon = study.privacy.epsilon
        made.append((epsilon, seed))
        shift = 0.01 * (len([e for e, _ in made if e == epsilon]) - 1)
        out = {"tvd2": 0.5 / epsilon + shift, "real_tvd2": 0.05, "cpu": 0.0, "exchanges": 3.0}
        return {**out, "auc": 0.7, "real_auc": 0.9} if auc else out

    def scored(cut: Any, study: Study, synthetic: Any, *, auc: bool, seed: int) -> dict[str, float]:
        out = {"tvd2": 0.6, "real_tvd2": 0.05}
        return {**out, "auc": 0.5, "real_auc": 0.9} if auc else out

    monkeypatch.setattr(work, "evaluate", known)
    monkeypatch.setattr(work.Cut, "score", scored)
    return made


# ---- the study at another ε ---------------------------------------------------------------------------------


def test_only_the_budget_changes(tmp_path: Path) -> None:
    path, _ = small_study(tmp_path, epsilon=3.0, evaluation=EVALUATED)
    was = Study.load(path)
    more, less = at_epsilon(was, 10.0), at_epsilon(was, 0.5)
    assert (more.privacy.epsilon, less.privacy.epsilon) == (10.0, 0.5)
    assert more.evaluation == was.evaluation
    assert less.evaluation is not None and less.evaluation.epsilon == 0.5, "an evaluation costs no more than its study"
    assert replace(more, privacy=was.privacy) == was


def test_shuffled_rows_keep_shares_and_lose_relations() -> None:
    table = small_table(600)
    mixed = shuffled(table, unit="id", seed=3)
    assert list(mixed["id"]) == list(table["id"]), "whose rows they are stays"
    for name in table:
        assert sorted(map(str, mixed[name])) == sorted(map(str, table[name]))
    was = np.corrcoef(table["age"], table["smoker"].astype(float))[0, 1]
    now = np.corrcoef(mixed["age"], mixed["smoker"].astype(float))[0, 1]
    assert was > 0.5 and abs(now) < 0.15


# ---- the curve ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_curve(asked: Callable[..., Request], quick: None) -> None:
    told: list[tuple[int, int]] = []
    result = what_if(asked(epsilons=(0.3, 30.0)), progress=lambda what, done, of: told.append((done, of)))
    low, high = result["points"]
    assert (low["epsilon"], high["epsilon"]) == (0.3, 30.0) and low["fits"] == high["fits"] == 2
    assert low["scores"]["tvd2"]["mean"] > high["scores"]["tvd2"]["mean"], "a hundred times the budget is seen"
    real, mixed = (result["references"]["tvd2"][name]["mean"] for name in ("real", "shuffled"))
    assert real < mixed and real < high["scores"]["tvd2"]["mean"]
    assert result["references"]["auc"]["real"]["mean"] > 0.75
    assert 0.3 < result["references"]["auc"]["shuffled"]["mean"] < 0.7
    assert result["finished"] and result["patients"] == 100 and result["columns"] == 6 and result["sites"] == 4
    assert told[0] == (0, 6) and told[-1] == (6, 6) and told == sorted(told)
    assert "STAND-IN" in result["says"].upper()


def test_means_and_intervals_are_those_of_the_fits(asked: Callable[..., Request], fits: list[Any]) -> None:
    result = what_if(asked(seeds=3))
    score = result["points"][0]["scores"]["tvd2"]
    # 0.5, 0.51, 0.52: mean 0.51, sd 0.01, t(2) = 4.3027
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert score["mean"] == 0.51
    assert score["low"] == pytest.approx(0.51 - half, abs=2e-5) and score["high"] == pytest.approx(
        0.51 + half, abs=2e-5
    )
    assert [e for e, _ in fits] == [1.0, 10.0] * 3, "repetition after repetition"
    assert len({seed for _, seed in fits}) == 6, "each fit has noise of its own"
    one = what_if(asked(seeds=1, out=asked().out.parent / "one"))
    assert one["points"][0]["scores"]["tvd2"] == {"mean": 0.5 + 0.03, "low": None, "high": None}


def test_a_study_without_target_has_no_auc(tmp_path: Path, fits: list[Any]) -> None:
    path, table = small_study(tmp_path / "s", table=small_table(150), target="", survivors=3, colluders=1)
    result = what_if(Request(study=path, table=table, out=tmp_path / "o", split="iid:4", epsilons=(1.0,), seeds=1))
    assert list(result["references"]) == ["tvd2"] and "target" in result["no_auc"]


def test_an_epsilon_without_plan_is_named_and_the_others_stay(
    asked: Callable[..., Request], fits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.plan_for

    def plan(study: Study, sites: Any) -> Any:
        if study.privacy.epsilon < 2.0:
            raise Refused("PLAN-EPSILON", "too small", hint="raise it")
        return real(study, sites)

    monkeypatch.setattr(work, "plan_for", plan)
    result = what_if(asked())
    assert [p["epsilon"] for p in result["points"]] == [10.0] and result["finished"]
    assert [(r["epsilon"], r["error"]) for r in result["refused"]] == [(1.0, "PLAN-EPSILON")]
    with pytest.raises(Refused) as error:
        what_if(asked(epsilons=(1.0,), out=asked().out.parent / "none"))
    assert error.value.code == "PLAN-EPSILON"


@pytest.mark.parametrize("split, sites", [("iid:7", 7), ("by:grade", 3), (None, 3)])
def test_the_split_says_how_many_hospitals_share_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str | None, sites: int
) -> None:
    more = "" if split else '[sites]\nnames = ["a", "b", "c"]\n'
    path, table = small_study(tmp_path / "s", table=small_table(150), survivors=3 if sites == 3 else 5, evaluation=more)
    seen: list[int] = []

    def known(study: Study, names: Any, cut: Any, *, auc: bool, seed: int) -> dict[str, float]:
        seen.append(len(names))
        return {"tvd2": 0.2, "real_tvd2": 0.1, "auc": 0.7, "real_auc": 0.9}

    monkeypatch.setattr(work, "evaluate", known)
    what_if(Request(study=path, table=table, out=tmp_path / "o", split=split, epsilons=(3.0,), seeds=1))
    assert seen == [sites]


# ---- interrupted --------------------------------------------------------------------------------------------


def test_what_was_made_is_not_made_again(asked: Callable[..., Request], fits: list[Any]) -> None:
    whole = what_if(asked(out=asked().out.parent / "whole"))
    alone = list(fits)
    fits.clear()
    request, polls = asked(), iter([False] * 3 + [True])
    with pytest.raises(Interrupted) as halt:
        what_if(request, stop=lambda: next(polls))
    assert halt.value.done == 3
    # A crash in the middle of a line: that fit is made again, and no other.
    place = request.out / "fits.jsonl"
    place.write_bytes(place.read_bytes()[:-7])
    before = len(fits)
    result = what_if(request)
    assert before == 2 and len(fits) == 2 + 3, "the torn one and the two of the other repetition"
    assert sorted(set(fits)) == sorted(set(alone)), "with the noise that they would have had"
    assert [p["fits"] for p in result["points"]] == [p["fits"] for p in whole["points"]] == [2, 2]
    assert all(json.loads(line) for line in place.read_text().splitlines())
    count = len(fits)
    assert what_if(request)["points"] == result["points"] and len(fits) == count


def test_half_a_curve_says_so(asked: Callable[..., Request], fits: list[Any]) -> None:
    polls = iter([False] * 2 + [True])
    with pytest.raises(Interrupted):
        what_if(asked(), stop=lambda: next(polls))
    told = json.loads((asked().out / "what-if.json").read_text())
    assert not told["finished"] and [p["epsilon"] for p in told["points"]] == [1.0]
    assert not (asked().out / "what-if.html").exists()


@pytest.mark.parametrize("change", [{"seeds": 3}, {"epsilons": (1.0, 5.0)}, {"split": "iid:5"}, {"seed": 4}])
def test_another_request_does_not_go_on_with_it(
    asked: Callable[..., Request], fits: list[Any], change: dict[str, Any]
) -> None:
    what_if(asked())
    with pytest.raises(UsageError) as error:
        what_if(asked(**change))
    assert error.value.code == "WHAT-IF-OUT"


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilons", [(), (0.0,), (-1.0,), (101.0,), (math.nan,), (1.0, 1.0), tuple(range(1, 14))])
def test_epsilons_that_are_none(asked: Callable[..., Request], epsilons: tuple[float, ...]) -> None:
    with pytest.raises(UsageError) as error:
        asked(epsilons=epsilons)
    assert error.value.code == "WHAT-IF-EPSILONS"


def test_a_hospitals_table_is_refused_unopened(
    asked: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "run" / "sites" / "north"
    site.mkdir(parents=True)
    (site / "site.key").touch()
    table = site / "data.parquet"
    table.write_bytes(b"not even a table")
    with pytest.raises(Refused) as error:
        what_if(asked(table=table))
    assert error.value.code == "WHAT-IF-PRIVATE"


def test_several_local_steps_are_refused(tmp_path: Path) -> None:
    path, table = small_study(
        tmp_path / "s", strategy="local", generator="autoregressive", more="local_steps = 3", table=small_table(150)
    )
    with pytest.raises(StudyError) as error:
        what_if(Request(study=path, table=table, out=tmp_path / "o", split="iid:3"))
    assert error.value.code == "WHAT-IF-LOCAL"


# ---- the command --------------------------------------------------------------------------------------------

app = typer.Typer()
app.command("what-if")(what_if_cli.what_if)
app.command("other")(lambda: None)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["what-if", *(str(argument) for argument in arguments)])


def test_the_command(study: tuple[Path, Path], tmp_path: Path, fits: list[Any]) -> None:
    common = (study[0], "--table", study[1], "--split", "iid:4", "--epsilons", "1 10", "--seeds", "2")
    out = ("--out", tmp_path / "out")
    refused = call(*common, *out, "--json")
    assert refused.exit_code == 2 and "WHAT-IF-DECLARE" in refused.output and not (tmp_path / "out").exists()
    done = call(*common, *out, "--not-private", "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert [p["epsilon"] for p in result["points"]] == [1.0, 10.0]
    shown = call(*common, *out, "--not-private")
    assert "STAND-IN" in shown.output and "what-if.html" in shown.output.replace("\n", "")
    wrong = call(study[0], "--table", study[1], "--epsilons", "1;3", "--not-private")
    assert wrong.exit_code == 2 and "WHAT-IF-EPSILONS" in wrong.output


def test_ctrl_c_says_how_to_go_on(
    study: tuple[Path, Path], tmp_path: Path, fits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.what_if
    monkeypatch.setattr(work, "what_if", lambda request, **options: real(request, **{**options, "stop": lambda: True}))
    found = call(study[0], "--table", study[1], "--split", "iid:4", "--not-private", "--json", "--out", tmp_path / "o")
    assert found.exit_code == 130 and json.loads(found.stdout)["stopped"]


# ---- the picture --------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("style", "src", "href")]


def test_the_page_loads_nothing_and_escapes_names(asked: Callable[..., Request], fits: list[Any]) -> None:
    result = what_if(asked())
    result = {**result, "study": "<script>alert(1)</script>", "no_auc": "<b>x", "mode": "<i>"}
    result["stand_in"] = {**result["stand_in"], "file": "<img src=x onerror=alert(1)>.csv"}
    page = curve.page(result, marked=3.0)
    tags = Tags()
    tags.feed(page)
    assert not tags.seen & {"script", "img", "b", "i", "link"} and {"svg", "table", "title"} <= tags.seen
    assert "this study: 3" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_curve_of_one_point_or_none_is_drawn(asked: Callable[..., Request], fits: list[Any]) -> None:
    result = what_if(asked(epsilons=(3.0,), seeds=1))
    assert len(curve.pictures(result, marked=None)) == 2
    assert curve.pictures({**result, "points": []}) == []

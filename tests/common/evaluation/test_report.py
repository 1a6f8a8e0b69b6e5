"""The report: complete, hostile-input safe, offline, and the same from result.json."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reporting import Reader

from cohortium.common.evaluation.base import (
    BudgetFacts,
    Figure,
    NamedFigure,
    PlanRow,
    ReportFacts,
    RoundRow,
    Scores,
    to_json,
)
from cohortium.common.evaluation.exact import exact_scores
from cohortium.common.evaluation.report import epsilon, page, render
from cohortium.common.schema import Schema

HOSTILE = '</title></svg><script>alert(1)</script><img src=x onerror="alert(2)">&\u202e\x00{{ 7*7 }}'
LEVEL = HOSTILE.replace("\x00", "").replace("\u202e", "")


def facts(**more: object) -> ReportFacts:
    rounds = tuple(
        RoundRow(
            round=r,
            purpose="steps",
            answered=("north", "south"),
            dropped=("east",) if r == 2 else (),
            seconds=0.1,
        )
        for r in range(1, 6)
    )
    given = {
        "study_id": "toy",
        "title": "A toy study",
        "statement": "ε = 3 at δ = 1e-05, patient, add-or-remove, secure-sum.",
        "mode": "simulation",
        "plan": (
            PlanRow(
                id="bins",
                purpose="histograms",
                kind="counts",
                repeats=1,
                sampling_rate=1.0,
                noise_multiplier=4.0,
                epsilon_cumulated=1.23449,
            ),
        ),
        "budget": BudgetFacts(epsilon_total=3.0, epsilon_spent=1.23449, delta=1e-5, hospitals3=float("inf")),
        "rounds": rounds,
        "provenance": {"plan digest": "ab" * 32},
        "private_scores": (
            NamedFigure(label="age", figure=Figure(value=0.1, low=0.05, high=0.2, direction="lower")),
            NamedFigure(label="bmi", figure=Figure.unknown("the noise is too large")),
        ),
    }
    return ReportFacts(**(given | more))  # type: ignore[arg-type]


def scores(names: list[str], *, rows: int = 60, target: str | None = None, missing: bool = False) -> Scores:
    fields = [{"name": n, "type": "number", "constraints": {"minimum": 0, "maximum": 9}} for n in names[:-1]]
    fields.append({"name": names[-1], "type": "string", "constraints": {"enum": ["a", LEVEL]}})
    schema = Schema.from_dict({"name": "t", "fields": fields})

    def table(seed: int) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        data: dict[str, object] = {n: rng.random(rows) * 9 for n in names[:-1]}
        data[names[-1]] = rng.choice(["a", LEVEL], rows)
        out = pd.DataFrame(data)
        return out.astype(object).mask(out.notna()) if missing else out

    return exact_scores(schema=schema, train=table(1), test=table(2), synthetic=table(3), target=target)


@pytest.fixture(scope="module")
def small() -> Scores:
    return scores(["age", "bmi", "sex"], target="sex")


def test_all_sections_and_the_statement_are_there(small: Scores, tmp_path: Path) -> None:
    out = render(facts(), small, tmp_path / "report.html")
    text = out.read_text(encoding="utf-8")
    read = Reader(text)
    assert not read.open
    ids = {a["id"] for _, a in read.tags if a.get("id")}
    assert {
        "verdict",
        "source",
        "private",
        "fidelity",
        "associations",
        "prediction",
        "privacy",
        "budget",
        "rounds",
        "limits",
        "provenance",
    } <= ids
    assert "ε = 3 at δ = 1e-05, patient, add-or-remove, secure-sum." in text
    assert "This is a simulation: the real table is on this machine" in re.sub("<[^>]*>", "", text)
    assert list(tmp_path.iterdir()) == [out]


def test_the_page_needs_no_network_and_no_script(small: Scores) -> None:
    text = page(facts(), small)
    read = Reader(text)
    assert not {t for t, _ in read.tags} & {"script", "iframe", "object", "embed", "form", "img", "base"}
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith(("data:", "#")), (tag, name, value)
    assert "default-src 'none'" in text
    outside = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import", outside)


def test_every_picture_has_a_title_a_description_and_a_table(small: Scores) -> None:
    read = Reader(page(facts(), small))
    pictures = [a for t, a in read.tags if t == "svg" and a.get("role") == "img"]
    assert len(pictures) == 3 + 3 + 1 + 1 + 1 + 1  # columns, maps, AUC, private, budget, rounds
    ids = [a["id"] for _, a in read.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert all(i in ids for i in (picture["aria-labelledby"] or "").split())
    assert sum(t == "table" for t, _ in read.tags) >= 8


def test_hostile_names_stay_text() -> None:
    hostile = facts(
        study_id=HOSTILE,
        title=HOSTILE,
        statement=HOSTILE,
        rounds=(RoundRow(round=1, purpose=HOSTILE, answered=(HOSTILE,), dropped=("b" + HOSTILE,), seconds=1.0),),
        provenance={HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
        not_protected=(HOSTILE,),
        private_scores=(NamedFigure(label=HOSTILE, figure=Figure(value=0.5, how=HOSTILE)),),
        plan=tuple(replace(r, id=HOSTILE, purpose=HOSTILE, kind=HOSTILE) for r in facts().plan),
    )
    for target in (None, "z" + HOSTILE.replace("\x00", "")):
        names = ["a" + HOSTILE.replace("\x00", ""), "z" + HOSTILE.replace("\x00", "")]
        table = scores(["a", "z"], target=None if target is None else "z")
        columns = tuple(replace(c, name=n, unit=HOSTILE) for c, n in zip(table.columns, names))
        assert table.associations is not None
        maps = replace(
            table.associations,
            names=tuple(names),
            worst=tuple(replace(p, first=names[0], second=names[1]) for p in table.associations.worst),
        )
        text = page(hostile, replace(table, columns=columns, associations=maps, target=target))
        read = Reader(text)
        assert not read.open
        assert not {t for t, _ in read.tags} & {"script", "img"}
        assert not any(n.startswith("on") for _, a in read.tags for n in a)
        assert "\u202e" not in text and "\x00" not in text
        assert "49" not in "".join(read.text).split("{{ 7*7 }}")[0][-5:]
        assert text.count("{{ 7*7 }}") > 20


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path: Path) -> None:
    render(facts(title="a\ud800b"), None, tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "missing"), [(["only"], False), (["a", "b", "c"], True), ([f"c{i}" for i in range(30)], False)]
)
def test_odd_tables_make_a_page(names: list[str], missing: bool) -> None:
    read = Reader(page(facts(), scores(names, missing=missing)))
    assert not read.open
    assert "nan" not in " ".join(read.text).lower().split()


def test_500_columns_draw_24_and_list_all(small: Scores) -> None:
    columns = tuple(replace(small.columns[i % 3], name=f"c{i}") for i in range(500))
    text = page(facts(), replace(small, columns=columns))
    assert text.count(", real and synthetic</title>") == 24
    assert "Table: all 500 columns" in text and ">c499<" in text
    assert len(text) < 3_000_000


def test_without_scores_only_facts_are_shown() -> None:
    text = page(facts(mode="deployment", rounds=(), plan=(), private_scores=()), None)
    assert "This is a simulation" not in text and "No comparison with real rows was made" in text


def test_the_page_from_result_json_is_the_same(small: Scores) -> None:
    stored = json.loads(json.dumps({"facts": facts().to_json(), "scores": small.to_json()}, allow_nan=False))
    again = page(ReportFacts.from_json(stored["facts"]), Scores.from_json(stored["scores"]))
    first = page(facts(), Scores.from_json(small.to_json()))
    assert again == first


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0001, "2.001"), (3.0, "3"), (0.8123, "0.813"), (float("inf"), "∞"), (None, "–"), (0.1 + 0.2, "0.3")],
)
def test_epsilon_is_rounded_up(value: float | None, text: str) -> None:
    assert epsilon(value) == text


@pytest.mark.parametrize(
    "bad",
    [
        {"value": float("nan")},
        {"value": 1.0, "low": 0.5},
        {"value": 1.0, "low": 2.0, "high": 1.0},
        {"value": None},
        {"value": 1.0, "direction": "up"},
        {"value": 1.0, "reference": float("inf")},
    ],
)
def test_a_figure_is_validated_at_birth(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Figure(**bad)  # type: ignore[arg-type]


def test_json_refuses_nan_and_unknown_fields() -> None:
    with pytest.raises(ValueError):
        to_json({"x": float("nan")})
    with pytest.raises(ValueError):
        ReportFacts.from_json({**facts().to_json(), "surprise": 1})
    with pytest.raises(ValueError):
        facts(statement="")

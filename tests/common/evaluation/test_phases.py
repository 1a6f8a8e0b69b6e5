"""What held-out patients are asked follows from the study alone; shares sum to one, sizes bound what is sent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cohortium.common.evaluation.phases import SHARES, analyses_of, evaluation_phases, training_phases
from cohortium.common.generators.base import Phase
from cohortium.common.study import Study
from cohortium.server.planning import plan_for

PHASE_B = Phase(name="b", purpose="b", kind="moments", share=0.6, max_dim=1)
FIELDS: list[dict[str, Any]] = [
    {"name": "pid", "type": "string", "role": "identifier"},
    {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"]}, "role": "quasi-identifier"},
    {"name": "age", "type": "integer", "constraints": {"minimum": 18, "maximum": 100}},
    {"name": "admitted", "type": "date", "constraints": {"minimum": "2000-01-01", "maximum": "2010-01-01"}},
    {"name": "ward", "type": "string", "constraints": {"enum": ["a", "b", "c"]}},
    {"name": "days", "type": "integer", "constraints": {"minimum": 0, "maximum": 900}, "role": "time"},
    {"name": "death", "type": "integer", "constraints": {"minimum": 0, "maximum": 1}, "role": "event"},
]


def study(tmp_path: Path, *, target: str | None = "death", without: tuple[str, ...] = (), more: str = "") -> Study:
    import json

    fields = [f for f in FIELDS if f["name"] not in without]
    (tmp_path / "dictionary.json").write_text(json.dumps({"fields": fields}))
    aim = f'target = "{target}"' if target else ""
    text = f"""
[study]
id = "ward"
title = "Ward"
dictionary = "dictionary.json"
{aim}
[privacy]
epsilon = 2.0
delta = 1e-6
unit = "pid"
adjacency = "add-remove"
hospitals_per_patient = 1
[generator]
name = "mixture"
[strategy]
name = "secure-sum"
survivors = 4
colluders = 1
[evaluation]
epsilon = 0.5
holdout = 0.2
{more}
[release]
rows = 10
"""
    return Study.parse(text, folder=tmp_path)


def names(agreed: Study) -> list[str]:
    return [phase.name.removeprefix("evaluation-") for phase in evaluation_phases(agreed)]


def test_everything_is_asked_that_the_dictionary_allows(tmp_path: Path) -> None:
    agreed = study(tmp_path)
    wanted = ["columns", "means", "correlations", "scores", "survival", "analysis-1", "groups", "nearest"]
    assert names(agreed) == wanted
    phases = {p.name.removeprefix("evaluation-"): p for p in evaluation_phases(agreed)}
    total = sum(SHARES.values())
    assert math.isclose(sum(p.share for p in phases.values()), 1.0)
    assert math.isclose(phases["scores"].share, SHARES["scores"] / total)
    assert phases["scores"].max_dim == 1 * 3 * 101
    assert phases["correlations"].max_dim == 6 * 5 // 2
    assert phases["survival"].max_dim == 22
    assert phases["groups"].max_dim == (2 + 1) * 6


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"target": None}, {"scores", "analysis-1"}),
        ({"without": ("days",)}, {"survival"}),
        ({"without": ("sex",)}, {"groups"}),
        ({"more": "groups = []"}, {"groups"}),
    ],
)
def test_what_cannot_be_asked_leaves_its_share_to_the_rest(
    change: dict[str, Any], missing: set[str], tmp_path: Path
) -> None:
    agreed = study(tmp_path, **change)
    assert missing == set(names(study(tmp_path))) - set(names(agreed))
    assert math.isclose(sum(p.share for p in evaluation_phases(study(tmp_path, **change))), 1.0)


def test_the_default_analysis_looks_neither_at_dates_nor_at_what_follows_the_outcome(tmp_path: Path) -> None:
    (analysis,) = analyses_of(study(tmp_path))
    assert (analysis.model, analysis.outcome, analysis.level) == ("logistic", "death", "1")
    assert analysis.terms == ("sex", "age", "ward")


def test_declared_analyses_share_what_analyses_get(tmp_path: Path) -> None:
    more = """
[[evaluation.analyses]]
name = "one"
model = "logistic"
outcome = "death"
level = "1"
terms = ["age", "ward"]
[[evaluation.analyses]]
name = "two"
model = "cox"
terms = ["age"]
[evaluation.survival]
time = "days"
event = "death"
level = "1"
arm = "sex"
"""
    phases = {p.name: p for p in evaluation_phases(study(tmp_path, more=more))}
    assert phases["evaluation-analysis-1"].share == phases["evaluation-analysis-2"].share
    assert phases["evaluation-analysis-1"].max_dim == 1 + 2 + 4  # intercept, age (and missing), ward
    assert phases["evaluation-survival"].max_dim == 3 * 22  # two arms, and rows of no arm


def test_an_attack_is_charged_to_training_patients_and_makes_room_for_itself(tmp_path: Path) -> None:
    generator = (Phase(name="a", purpose="a", kind="counts", share=0.4, max_dim=1), PHASE_B)
    assert training_phases(study(tmp_path), generator) == generator
    with_attack = training_phases(study(tmp_path, more="attack = true"), generator)
    assert [p.name for p in with_attack] == ["a", "b", "evaluation-attack"]
    assert math.isclose(sum(p.share for p in with_attack), 1.0)
    plan, _, _ = plan_for(study(tmp_path, more="attack = true"), ["s0", "s1", "s2", "s3", "s4"])
    (asked,) = [s for s in plan.stages if s.name == "evaluation-attack"]
    assert plan.stages[-1] == asked, "a site forgets the run's keys after the plan's last release"
    assert asked.part == "train" and asked.kind == "tallies" and plan.price() <= 2.0


def test_no_evaluation_no_question(tmp_path: Path) -> None:
    text = (
        study(tmp_path)
        .to_toml(dictionary="dictionary.json")
        .replace("[evaluation]\nepsilon = 0.5\nholdout = 0.2\n", "")
    )
    assert evaluation_phases(Study.parse(text, folder=tmp_path)) == ()

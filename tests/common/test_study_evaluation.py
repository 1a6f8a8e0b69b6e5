"""[evaluation] of a study: read strictly, written back equal, and old studies keep their digest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cohortium.common.errors import StudyError
from cohortium.common.study import Evaluation, Study
from cohortium.common.study_evaluation import THRESHOLDS, AnalysisSpec, SurvivalSpec, few_values, groups_of, survival_of

HEAD = """
[study]
id = "ward"
title = "Ward"
dictionary = "dictionary.json"
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
[release]
rows = 10
[evaluation]
epsilon = 0.5
holdout = 0.2
"""
FIELDS = [
    {"name": "pid", "type": "string", "role": "identifier"},
    {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"]}, "role": "quasi-identifier"},
    {"name": "age", "type": "integer", "constraints": {"minimum": 18, "maximum": 100}},
    {"name": "ward", "type": "string", "constraints": {"enum": [f"w{i}" for i in range(70)]}},
    {"name": "days", "type": "integer", "constraints": {"minimum": 0, "maximum": 900}, "role": "time"},
    {"name": "shift", "type": "integer", "constraints": {"minimum": -5, "maximum": 5}},
    {"name": "death", "type": "integer", "constraints": {"minimum": 0, "maximum": 1}, "role": "event"},
    {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III"]}},
]
FULL = """
groups = ["sex", "stage"]
[evaluation.survival]
time = "days"
event = "death"
arm = "sex"
[[evaluation.analyses]]
name = "odds"
model = "logistic"
outcome = "stage"
level = "III"
terms = ["age", "sex"]
[[evaluation.analyses]]
name = "hazard"
model = "cox"
terms = ["age"]
[evaluation.thresholds]
columns = [0.01, 0.03]
"""


def read(more: str, folder: Path) -> Study:
    (folder / "dictionary.json").write_text(json.dumps({"fields": FIELDS}))
    return Study.parse(HEAD + more, folder=folder)


def test_everything_is_read_and_written_back_equal(tmp_path: Path) -> None:
    study = read(FULL, tmp_path)
    found = study.evaluation
    assert found is not None
    assert found.groups == ("sex", "stage")
    assert found.survival == SurvivalSpec(time="days", event="death", level="1", arm="sex")
    assert found.analyses == (
        AnalysisSpec(name="odds", model="logistic", terms=("age", "sex"), outcome="stage", level="III"),
        AnalysisSpec(name="hazard", model="cox", terms=("age",)),
    )
    assert found.threshold("columns") == (0.01, 0.03)
    assert found.threshold("survival") == THRESHOLDS["survival"]
    again = Study.parse(study.to_toml(dictionary="dictionary.json"), folder=tmp_path)
    assert dataclasses.replace(again, dictionary=study.dictionary) == study and again.digest() == study.digest()


def test_every_setting_is_part_of_what_is_agreed(tmp_path: Path) -> None:
    curve = '[evaluation.survival]\ntime = "days"\nevent = "death"'
    texts = [
        "",
        'groups = ["sex"]',
        "groups = []",
        curve,
        curve + '\narm = "sex"',
        curve + '\nlevel = "0"',
        '[[evaluation.analyses]]\nname = "a"\nmodel = "logistic"\noutcome = "death"\nterms = ["age"]',
        '[[evaluation.analyses]]\nname = "a"\nmodel = "logistic"\noutcome = "death"\nterms = ["sex"]',
        "[evaluation.thresholds]\ncolumns = [0.01, 0.03]",
        "[evaluation.thresholds]\nsurvival = [0.01, 0.03]",
    ]
    digests = {read(text, tmp_path).digest() for text in texts}
    assert len(digests) == len(texts)


def test_a_study_without_the_new_settings_keeps_its_facts() -> None:
    assert Evaluation(epsilon=0.5, holdout=0.2).facts() == {"epsilon": 0.5, "holdout": 0.2}


def test_without_a_word_the_dictionary_s_roles_decide(tmp_path: Path) -> None:
    study = read("", tmp_path)
    assert study.evaluation is not None
    assert [c.name for c in groups_of(study.evaluation, study.schema)] == ["sex"]
    assert survival_of(study.evaluation, study.schema) == SurvivalSpec(time="days", event="death", level="1")
    assert few_values(study.schema.column("death")) == ("0", "1")
    assert few_values(study.schema.column("age")) is None


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ('groups = ["nobody"]', "models no column"),
        ('groups = ["ward"]', "at most 60 levels"),
        ('groups = ["age"]', "at most 60 levels"),
        ('groups = ["sex", "sex"]', "different columns"),
        ('groups = ["pid"]', "models no column"),
        ('[evaluation.survival]\ntime = "shift"\nevent = "death"', "from 0 upwards"),
        ('[evaluation.survival]\ntime = "days"\nevent = "stage"', "level"),
        ('[evaluation.survival]\ntime = "days"\nevent = "death"\nlevel = "2"', "no level"),
        ('[evaluation.survival]\ntime = "days"\nevent = "death"\narm = "age"', "2 to 6 levels"),
        ('[evaluation.survival]\ntime = "days"\nevent = "death"\nwhere = 3', "no setting"),
        ('[[evaluation.analyses]]\nname = "a"\nmodel = "probit"\nterms = ["age"]', "not known"),
        ('[[evaluation.analyses]]\nname = "a"\nmodel = "cox"\nterms = ["age"]', "needs a survival outcome"),
        ('[[evaluation.analyses]]\nname = "a"\nmodel = "logistic"\noutcome = "death"\nterms = []', "1 to 12"),
        ('[[evaluation.analyses]]\nname = "a"\nmodel = "logistic"\noutcome = "death"\nterms = ["death"]', "own terms"),
        ('[[evaluation.analyses]]\nname = "a"\nmodel = "logistic"\noutcome = "age"\nterms = ["sex"]', "list of values"),
        ('[evaluation.survival]\ntime = "days"\nevent = "death"\narm = "death"', "different columns"),
        ("expected_auc = 0.4", "at least 0.5"),
        ('attack = "no"', "true or false"),
        ("[evaluation.thresholds]\ncolumns = [0.3, 0.1]", "smaller first"),
        ("[evaluation.thresholds]\ncolumns = 0.3", "two numbers"),
        ("[evaluation.thresholds]\ntables = [0.1, 0.3]", "no setting"),
        ('survival = "days"', "not a section"),
        ('analyses = "odds"', "not a list of sections"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_a_fix(more: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        read(more, tmp_path)
    assert what in str(caught.value)
    assert caught.value.hint and caught.value.where and ":" in caught.value.where[0]

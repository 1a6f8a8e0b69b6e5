"""The sections on representation and on clinical rules: counts that a reader can repeat with pandas."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from cohortium.common.errors import DictionaryError
from cohortium.common.evaluation import verdict, verdict_private
from cohortium.common.evaluation.balance import balance_of, balance_section, group_columns
from cohortium.common.evaluation.findings import Findings, Section
from cohortium.common.evaluation.rules import percent, rules_section
from cohortium.common.schema import Schema
from cohortium.common.study_evaluation import THRESHOLDS
from cohortium.common.study_release import USES

FIELDS: list[dict[str, Any]] = [
    {
        "name": "sex",
        "type": "string",
        "role": "quasi-identifier",
        "constraints": {"enum": ["female", "male", "other"]},
        "x-reference-shares": {"female": 0.51, "male": 0.48},
    },
    {"name": "died", "type": "boolean", "role": "target"},
    {"name": "ward", "type": "integer", "role": "site", "constraints": {"enum": list(range(13))}},
    {"name": "grade", "type": "integer", "constraints": {"enum": [1, 2]}},
    {"name": "age", "type": "integer", "role": "quasi-identifier", "constraints": {"minimum": 0, "maximum": 99}},
]
RULES = [
    {"name": "men", "if": {"sex": "male"}, "then": {"grade": 1}},
    {"name": "others", "if": {"sex": "other"}, "then": {"grade": 2}},
]


def dictionary(**changes: Any) -> dict[str, Any]:
    return {"name": "ward", "fields": [{**FIELDS[0], **changes}, *FIELDS[1:]], "rules": RULES}


SCHEMA = Schema.from_dict(dictionary())
ROWS = pd.DataFrame(
    {
        "sex": ["female"] * 60 + ["male"] * 20 + [None] * 20,
        "died": [True] * 4 + [False] * 96,
        "ward": [0] * 100,
        "grade": [1] * 70 + [2] * 30,
        "age": [50] * 100,
    }
)


def only(section: Section | None) -> Section:
    assert section is not None
    findings = Findings(sections=(section,), verdicts=(), headline="", patients=None, epsilon=None)
    assert Findings.from_json(json.loads(json.dumps(findings.to_json()))) == findings
    return section


def test_groups_are_counted_and_held_against_public_shares() -> None:
    section = only(balance_section(SCHEMA, ROWS))
    groups, imbalance = section.tables
    assert [row.cells for row in groups.rows] == [
        ("sex", "female", "60", "75.0 %", "51.0 %", "+24.0 points", ""),
        ("sex", "male", "20", "25.0 %", "48.0 %", "-23.0 points", ""),
        ("sex", "other", "0", "0.0 %", "–", "–", "no row"),
        ("died", "false", "96", "96.0 %", "–", "–", ""),
        ("died", "true", "4", "4.0 %", "–", "–", "small"),
    ]
    assert [row.cells for row in imbalance.rows] == [("sex", "–", "other", "20"), ("died", "24.0", "true", "0")]
    assert all(len(row.cells) == len(part.head) for part in section.tables for row in part.rows)
    (finding,) = section.findings
    assert finding.key == "largest_gap_to_public" and finding.named.figure.value == pytest.approx(0.24)
    assert "female (sex)" in finding.named.figure.how
    assert len(section.notes) == 1 and "other" in section.notes[0]


def test_shares_given_by_the_caller_go_first_and_none_need_be_there() -> None:
    found = balance_of(SCHEMA, ROWS, SCHEMA.column("sex"), reference={"female": 0.75})
    assert found.groups[0].difference == 0 and found.groups[1].difference is None
    assert found.ratio is None and found.below(0.3) == ("male", "other") and found.missing == 20
    bare = Schema.from_dict({"name": "w", "fields": [FIELDS[1]]})
    section = only(balance_section(bare, ROWS, sampled="Rows were balanced over died."))
    assert section.findings == () and "public" not in " ".join(section.tables[0].head)
    assert section.intro.endswith("balanced over died.")


def test_which_columns_are_groups() -> None:
    assert [column.name for column in group_columns(SCHEMA)] == ["sex", "died"]
    assert [column.name for column in group_columns(SCHEMA, "grade")] == ["sex", "died", "grade"]
    assert balance_section(Schema.from_dict({"name": "w", "fields": [FIELDS[3]]}), ROWS) is None


def test_public_shares_belong_to_the_dictionary() -> None:
    assert Schema.from_dict(SCHEMA.to_dict()) == SCHEMA
    assert SCHEMA.column("sex").reference_shares == (("female", 0.51), ("male", 0.48))
    without = dictionary()
    del without["fields"][0]["x-reference-shares"]
    assert Schema.from_dict(without).digest() != SCHEMA.digest()


@pytest.mark.parametrize(
    "shares",
    [
        {"femal": 0.5},
        {"female": 1.5},
        {"female": -0.1},
        {"female": "0.5"},
        {"female": True},
        {"female": 0.6, "male": 0.5},
        {"female": 0.2, "male": 0.2, "other": 0.2},
        ["female"],
        {"female": float("nan")},
    ],
)
def test_public_shares_that_cannot_be(shares: Any) -> None:
    with pytest.raises(DictionaryError) as caught:
        Schema.from_dict(dictionary(**{"x-reference-shares": shares}))
    assert caught.value.code == "DICT-SHARES" and "sex" in caught.value.sentence and caught.value.hint


def test_shares_belong_to_levels_and_a_mistyped_property_is_found() -> None:
    for name, properties in (("age", {"x-reference-shares": {"50": 0.1}}), ("age", {"x-reference-share": {}})):
        fields = [{**field, **properties} if field["name"] == name else field for field in FIELDS]
        with pytest.raises(DictionaryError):
            Schema.from_dict({"name": "w", "fields": fields})


def test_rules_are_counted_row_by_row() -> None:
    section = only(rules_section(SCHEMA, ROWS))
    (rules,) = section.tables
    assert [row.cells for row in rules.rows] == [
        ("men", "if sex is male, then grade is 1", "20", "10", "50.0 %"),
        ("others", "if sex is other, then grade is 2", "0", "0", "–"),
    ]
    (finding,) = section.findings
    assert finding.named.figure.value == 0.1 and "10 of 100" in finding.named.figure.how
    assert len(section.notes) == 1 and section.notes[0].startswith("others")
    assert "drawn again" in only(rules_section(SCHEMA, ROWS, enforced=True)).notes[-1]


def test_no_rules_no_section_and_no_rows_no_figure() -> None:
    assert rules_section(Schema.from_dict({"name": "w", "fields": FIELDS}), ROWS) is None
    assert only(rules_section(SCHEMA, ROWS.iloc[:0])).findings[0].named.figure.value is None


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0 %"), (0.0001, "< 0.1 %"), (0.0126, "1.3 %"), (0.9999, "> 99.9 %"), (1.0, "100.0 %")],
)
def test_a_share_is_never_rounded_to_none_or_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_uses_of_a_study_are_those_that_get_a_verdict() -> None:
    """A use that no verdict has would stop every release."""
    given = {verdict.COLUMNS, verdict.RELATIONS, verdict.MODELS}
    given |= {verdict_private.SURVIVAL, verdict_private.ANALYSES, verdict_private.GROUPS}
    assert set(USES.values()) == given and set(USES) == set(THRESHOLDS)

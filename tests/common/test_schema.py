"""The dictionary: every file we have loads, every mistake gets a code, a place and a fix."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cohortium.common.errors import CohortiumError, DictionaryError
from cohortium.common.schema import Column, Schema, level_text

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("COHORTIUM_DATA", ROOT.parent / "shared" / "data"))
GOOD: dict[str, Any] = {
    "name": "clinic",
    "title": "A clinic",
    "missingValues": ["", "NA"],
    "fields": [
        {"name": "pid", "type": "string", "role": "identifier"},
        {"name": "age", "type": "integer", "unit": "years", "constraints": {"minimum": 0, "maximum": 110}},
        {"name": "crea", "type": "number", "resolution": 0.1, "constraints": {"minimum": 0, "maximum": 30.5}},
        {"name": "sex", "type": "string", "constraints": {"required": True, "enum": ["F", "M"]}},
        {
            "name": "stage",
            "type": "integer",
            "categories": [{"value": 1, "label": "one"}, {"value": 2, "label": "two"}],
        },
        {"name": "dead", "type": "boolean", "role": "target", "trueValues": ["j"], "falseValues": ["n"]},
        {"name": "day", "type": "date", "constraints": {"minimum": "1999-12-31", "maximum": "2020-01-01"}},
        {
            "name": "seen",
            "type": "datetime",
            "constraints": {"minimum": "2000-01-01T00:00:00Z", "maximum": "2001-01-01T12:00:00+02:00"},
        },
        {"name": "born", "type": "year", "constraints": {"minimum": 1900, "maximum": 2020}},
    ],
}


def changed(field: str, **properties: Any) -> dict[str, Any]:
    """GOOD with one field changed; None removes a property; a `constraints` is merged."""
    document = copy.deepcopy(GOOD)
    target = next(f for f in document["fields"] if f["name"] == field)
    for key, value in properties.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    return document


@pytest.mark.parametrize("path", sorted(DATA.glob("*.schema.json")), ids=lambda p: p.name.split(".")[0])
def test_real_dictionaries_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    schema = Schema.load(path)
    schema.save(tmp_path / "again.json")
    assert Schema.load(tmp_path / "again.json") == schema
    assert Schema.load(tmp_path / "again.json").digest() == schema.digest()
    assert schema.modelled and not schema.guessed


def test_a_good_dictionary_is_read_as_written() -> None:
    schema = Schema.from_dict(GOOD)
    assert schema.names[0] == "pid" and [c.name for c in schema.modelled] == list(schema.names[1:])
    assert schema.column("stage").levels == ("1", "2") and schema.column("stage").categorical
    assert schema.column("dead").levels == ("false", "true") and schema.column("dead").true_values == ("j",)
    assert not schema.column("age").categorical and schema.column("age").maximum == 110
    assert schema.column("day").minimum == 10956  # days from 1970-01-01 to 1999-12-31
    assert schema.column("seen").maximum == 978343200  # 2001-01-01T10:00Z
    assert schema.missing_values == ("", "NA") and dict(schema.about) == {"title": "A clinic"}
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert schema.without(["age"]).names == tuple(n for n in schema.names if n != "age")


def test_the_digest_sees_everything_that_matters_and_not_the_order_of_keys() -> None:
    base = Schema.from_dict(GOOD).digest()
    shuffled = dict(reversed(list(GOOD.items())))
    assert Schema.from_dict(shuffled).digest() == base
    for document in (
        changed("age", constraints={"minimum": 0, "maximum": 111}),
        changed("sex", constraints={"required": True, "enum": ["M", "F"]}),
        changed("sex", role="quasi-identifier"),
        changed("crea", resolution=0.2),
        changed("dead", trueValues=["J"]),
        {**GOOD, "missingValues": [""]},
    ):
        assert Schema.from_dict(document).digest() != base


MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("DICT-TYPE", "age", {"type": "integr"}),
    ("DICT-TYPE", "age", {"type": "geopoint"}),
    ("DICT-TYPE", "age", {"type": None}),
    ("DICT-RANGE", "age", {"constraints": {"minimum": 0}}),
    ("DICT-RANGE", "age", {"constraints": None}),
    ("DICT-RANGE", "age", {"constraints": {"minimum": 9, "maximum": 3}}),
    ("DICT-RANGE", "age", {"constraints": {"minimum": 0.5, "maximum": 3}}),
    ("DICT-RANGE", "age", {"constraints": {"minimum": "0", "maximum": 3}}),
    ("DICT-RANGE", "age", {"constraints": {"minimum": True, "maximum": 3}}),
    ("DICT-RANGE", "age", {"constraints": {"minimum": 0, "maximum": 10**400}}),
    ("DICT-RANGE", "crea", {"constraints": {"minimum": 0, "maximum": 1e300}}),
    ("DICT-RANGE", "crea", {"constraints": {"minimum": 0, "maximum": math.inf}}),
    ("DICT-RANGE", "day", {"constraints": {"minimum": 3, "maximum": "2020-01-01"}}),
    ("DICT-RANGE", "day", {"constraints": {"minimum": "31.12.1999", "maximum": "2020-01-01"}}),
    ("DICT-RANGE", "born", {"constraints": {"minimum": 1900, "maximum": 20200}}),
    ("DICT-RANGE", "stage", {"constraints": {"minimum": 0, "maximum": 5}}),
    ("DICT-LEVELS", "sex", {"constraints": {"required": True}}),
    ("DICT-LEVELS", "sex", {"constraints": {"enum": []}}),
    ("DICT-LEVELS", "sex", {"constraints": {"enum": "FM"}}),
    ("DICT-LEVELS", "sex", {"constraints": {"enum": ["F", 1]}}),
    ("DICT-LEVELS", "sex", {"constraints": {"enum": ["F", "F"]}}),
    ("DICT-LEVELS", "sex", {"constraints": {"enum": ["F", "NA"]}}),
    ("DICT-LEVELS", "sex", {"categories": ["F", "X"]}),
    ("DICT-LEVELS", "stage", {"categories": [1, True]}),
    ("DICT-LEVELS", "stage", {"categories": [1, "2"]}),
    ("DICT-LEVELS", "day", {"constraints": {"enum": ["2000-01-01"]}}),
    ("DICT-LEVELS", "dead", {"constraints": {"enum": [True]}}),
    ("DICT-LEVELS", "dead", {"falseValues": ["j"]}),
    ("DICT-ROLE", "sex", {"role": "quasi"}),
    ("DICT-RESOLUTION", "crea", {"resolution": 0}),
    ("DICT-RESOLUTION", "crea", {"resolution": "0.1"}),
    ("DICT-RESOLUTION", "age", {"resolution": 0.5}),
    ("DICT-RESOLUTION", "sex", {"resolution": 1}),
    ("DICT-CONSTRAINT", "age", {"constraints": {"minmum": 0, "maximum": 3}}),
    ("DICT-CONSTRAINT", "age", {"constraints": {"exclusiveMinimum": 0, "maximum": 3}}),
    ("DICT-CONSTRAINT", "age", {"constraints": {"minimum": 0, "maximum": 3, "required": "yes"}}),
    ("DICT-CONSTRAINT", "age", {"constraints": [0, 3]}),
    ("DICT-PROPERTY", "crea", {"decimalChar": ","}),
    ("DICT-PROPERTY", "crea", {"missingValues": ["-9"]}),
    ("DICT-PROPERTY", "crea", {"contraints": {}}),
    ("DICT-PROPERTY", "crea", {"unit": 3}),
    ("DICT-NAME", "sex", {"name": "age"}),
    ("DICT-NAME", "sex", {"name": ""}),
    ("DICT-NAME", "sex", {"name": "\ud800"}),
]


@pytest.mark.parametrize(("code", "field", "properties"), MISTAKES)
def test_a_mistake_is_refused_with_its_place_and_a_fix(code: str, field: str, properties: dict[str, Any]) -> None:
    with pytest.raises(DictionaryError) as caught:
        Schema.from_dict(changed(field, **properties), where="clinic.json")
    assert caught.value.code == code
    assert caught.value.where[0].startswith("clinic.json")
    assert caught.value.hint
    if "name" not in properties:
        assert caught.value.where == (f"clinic.json:{field}",)


def test_the_fix_for_a_missing_bound_is_the_line_to_add() -> None:
    with pytest.raises(DictionaryError) as caught:
        Schema.from_dict(changed("age", constraints={"minimum": 0}))
    assert '"constraints": {"maximum": 0}' in caught.value.hint
    with pytest.raises(DictionaryError) as caught:
        Schema.from_dict(changed("age", type="integr"))
    assert "did you mean 'integer'?" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"fields": [\n{"name" "x"}]}', ":2"),
        ('{"fields": [], "fields": []}', ""),
        ('{"fields": [{"name": "x", "type": "number", "constraints": {"minimum": NaN}}]}', ""),
        ("[]", ""),
        ("", ":1"),
        ('{"fields": []}', ""),
        ('{"fields": [3]}', ":field 1"),
        ("[" * 100_000, ""),
        ("9" * 5000, ""),
    ],
)
def test_a_file_that_is_no_dictionary(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DictionaryError) as caught:
        Schema.load(path)
    assert caught.value.where == (f"{path}{place}",)


def test_missing_binary_and_folder_files(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.json", "b.json", ""):
        with pytest.raises(DictionaryError):
            Schema.load(tmp_path / name)


def test_an_identifier_needs_neither_levels_nor_range_and_a_guess_is_listed() -> None:
    schema = Schema.from_dict(changed("age", **{"x-guessed": True}))
    assert schema.guessed == ("age",)
    assert Column(name="x", kind="string", role="identifier").levels is None


@pytest.mark.parametrize(("kind", "value", "text"), [("integer", 1, "1"), ("number", 1.0, "1"), ("number", 0.5, "0.5")])
def test_one_value_has_one_text(kind: str, value: float, text: str) -> None:
    assert level_text(kind, value) == text


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    "name",
    "type",
    "constraints",
    "categories",
    "role",
    "unit",
    "resolution",
    "description",
    "format",
    "x-guessed",
    "x-reference-shares",
]
CONSTRAINTS = ["required", "enum", "minimum", "maximum", "unique", "pattern"]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_document_ends_in_a_traceback(data: st.DataObject) -> None:
    """A mutilated dictionary is a clear error or a dictionary that survives a round trip."""
    document = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from(document["fields"]))
        if not isinstance(field, dict):
            continue
        key = data.draw(st.sampled_from(KEYS))
        value = data.draw(JUNK)
        if key == "constraints" and data.draw(st.booleans()) and isinstance(field.get(key, {}), dict):
            field.setdefault(key, {})[data.draw(st.sampled_from(CONSTRAINTS))] = value
        else:
            field[key] = value
    if data.draw(st.integers(0, 9)) == 0:
        document[data.draw(st.sampled_from(["name", "fields", "missingValues", "title", "rules"]))] = data.draw(JUNK)
    try:
        schema = Schema.from_dict(document)
    except CohortiumError as error:
        assert error.lines()
        return
    assert Schema.from_dict(schema.to_dict()) == schema
    assert len(schema.digest()) == 64


def test_a_dictionary_without_rules_keeps_the_digest_it_had_before_there_were_any() -> None:
    """Plans and approvals name it: pinned as version 0.1.0 computed it."""
    assert Schema.from_dict(GOOD).digest() == "bed225ff0d507aa4fbfba495bcb81de755432a4436a2d53a1d3199a02a1e5897"
    assert "rules" not in Schema.from_dict({**GOOD, "rules": []}).to_dict()

"""The dictionary's file format: Frictionless Table Schema JSON in, a checked `Schema` out.

Properties that would change how a cell is read and that we do not support are refused, never ignored; a
property of one's own is welcome unless it looks like a mistyped one of ours.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cohortium.common.errors import DictionaryError
from cohortium.common.rules import read_rules
from cohortium.common.schema import (
    FALSE_VALUES,
    KINDS,
    LARGEST,
    ROLE_ALIASES,
    TRUE_VALUES,
    Column,
    Kind,
    Schema,
    check_text,
    error,
    level_text,
    nearest,
    read_bound,
    unknown_type,
)

_FIELD_KEYS = (
    "name",
    "type",
    "format",
    "constraints",
    "categories",
    "role",
    "unit",
    "resolution",
    "description",
    "x-reference-shares",
)
_USED = ("required", "enum", "minimum", "maximum")
_HARMLESS = ("unique", "minLength", "maxLength", "pattern", "jsonSchema")  # levels say more than these
_ABOUT = ("title", "description", "source", "licence", "license", "homepage", "citation")
_LEVEL_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "year": (int,),
    "number": (int, float),
}


def load(path: Path) -> Schema:
    """Read and check a dictionary file."""
    try:
        raw = path.read_bytes()
    except OSError as reason:
        raise DictionaryError(
            "DICT-FILE",
            f"the dictionary cannot be read: {reason.strerror or 'not a file'}",
            where=(str(path),),
            hint="check `dictionary` in study.toml; `cohortium study new --table FILE` drafts one",
        ) from None
    return parse(_parse_json(raw, str(path)), str(path))


def parse(document: Any, where: str) -> Schema:
    """Check a Table Schema given as parsed JSON; errors name `where` and the field."""
    if not isinstance(document, Mapping) or not isinstance(document.get("fields"), list):
        raise DictionaryError(
            "DICT-FIELDS",
            "a dictionary is a JSON object with a list called fields (Frictionless Table Schema)",
            where=(where,),
            hint='{"name": "...", "missingValues": [""], "fields": [{"name": "age", "type": ...}]}',
        )
    place = where
    try:
        columns = []
        for number, field in enumerate(document["fields"], start=1):
            name = field.get("name") if isinstance(field, Mapping) else None
            place = f"{where}:{name if isinstance(name, str) and name else f'field {number}'}"
            columns.append(_column(field))
        place = where
        for key in document:
            if isinstance(key, str) and key != "rules" and difflib.get_close_matches(key, ["rules"], n=1, cutoff=0.85):
                raise error("DICT-PROPERTY", f"the dictionary has the property {key!r}", "write 'rules'")
        return Schema(
            name=_text(document, "name") or Path(where).name.split(".")[0] or "dictionary",
            columns=tuple(columns),
            missing_values=_missing_values(document.get("missingValues", [""])),
            about=tuple((k, document[k]) for k in _ABOUT if isinstance(document.get(k), str)),
            rules=read_rules(document.get("rules"), columns),
        )
    except DictionaryError as reason:
        place = f"{where}:{reason.where[0]}" if reason.where else place
        raise DictionaryError(reason.code, reason.sentence, where=(place,), hint=reason.hint) from None


def _column(field: Any) -> Column:
    if not isinstance(field, Mapping):
        raise error("DICT-FIELDS", "a field is not a JSON object", '{"name": "age", "type": "integer", ...}')
    name = field.get("name")
    if not isinstance(name, str) or not name:
        raise error("DICT-NAME", "a field has no name", '"name": "..." as in the table\'s header')
    for key in field:
        close = difflib.get_close_matches(key, _FIELD_KEYS, n=1, cutoff=0.85)
        if key not in _FIELD_KEYS and close:
            raise error("DICT-PROPERTY", f"column {name!r} has the property {key!r}", f"write {close[0]!r}")
    kind = field.get("type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown_type(name, kind)
    constraints = field.get("constraints", {})
    if not isinstance(constraints, Mapping):
        raise error(
            "DICT-CONSTRAINT",
            f"column {name!r}: constraints is not a JSON object",
            '"constraints": {"required": true}',
        )
    role = _text(field, "role")
    _check_constraints(name, constraints, identifier=role == "identifier")
    for key, plain in (("decimalChar", "."), ("groupChar", ""), ("bareNumber", True)):
        if field.get(key, plain) != plain:
            raise error(
                "DICT-PROPERTY",
                f"column {name!r}: {key} is not supported",
                "write plain numbers such as 1234.5",
            )
    if "missingValues" in field:
        raise error("DICT-PROPERTY", f"column {name!r} has missingValues of its own", "list them once, beside fields")
    required = constraints.get("required", False)
    guessed = field.get("x-guessed", False)
    if not isinstance(required, bool) or not isinstance(guessed, bool):
        raise error(
            "DICT-CONSTRAINT",
            f"column {name!r}: required and x-guessed are true or false",
            "leave the quotes out",
        )
    bounds: dict[str, float | None] = {}
    for key in ("minimum", "maximum"):
        try:
            bounds[key] = read_bound(kind, constraints[key]) if key in constraints and kind != "string" else None
        except (ValueError, OverflowError) as reason:
            raise error("DICT-RANGE", f"column {name!r}: {key} is not a {kind}", str(reason)) from None
    resolution = field.get("resolution")
    if resolution is not None and (isinstance(resolution, bool) or not isinstance(resolution, int | float)):
        raise error("DICT-RESOLUTION", f"column {name!r}: resolution is not a number", 'e.g. "resolution": 0.1')
    if resolution is not None and abs(resolution) > LARGEST:
        raise error("DICT-RESOLUTION", f"column {name!r}: resolution is beyond 2^53", "use a larger unit")
    return Column(
        name=name,
        kind=cast(Kind, kind),
        levels=_levels(name, kind, field, constraints),
        minimum=bounds["minimum"],
        maximum=bounds["maximum"],
        required=required,
        role=ROLE_ALIASES.get(role, role),
        unit=_text(field, "unit"),
        resolution=None if resolution is None else float(resolution),
        description=_text(field, "description"),
        format=_text(field, "format") or "default",
        true_values=_texts(field.get("trueValues", list(TRUE_VALUES)), f"trueValues of {name!r}"),
        false_values=_texts(field.get("falseValues", list(FALSE_VALUES)), f"falseValues of {name!r}"),
        guessed=guessed,
        reference_shares=_shares(name, field.get("x-reference-shares", {})),
    )


def _check_constraints(name: str, constraints: Mapping[str, Any], *, identifier: bool) -> None:
    for key in constraints:
        if key in _USED or key in _HARMLESS or identifier:
            continue
        if key in ("exclusiveMinimum", "exclusiveMaximum"):
            fix = 'use "minimum" and "maximum", which include the bound'
        else:
            fix = f"known constraints: {', '.join(_USED)}{nearest(key, _USED)}"
        raise error("DICT-CONSTRAINT", f"column {name!r} has the constraint {key!r}, which is not supported", fix)


def _levels(name: str, kind: str, field: Mapping[str, Any], constraints: Mapping[str, Any]) -> tuple[str, ...] | None:
    lists = []
    for key, given in (("categories", field.get("categories")), ("enum", constraints.get("enum"))):
        if given is None:
            continue
        if not isinstance(given, list):
            raise error("DICT-LEVELS", f"column {name!r}: {key} is not a list", f'"{key}": ["A", "B"]')
        values: list[Any] = [
            item.get("value") if isinstance(item, Mapping) and key == "categories" else item for item in given
        ]
        right = _LEVEL_TYPES.get(kind, (str,))
        for value in values:
            if not isinstance(value, right) or (isinstance(value, bool) and kind != "boolean"):
                raise error(
                    "DICT-LEVELS",
                    f"column {name!r} is a {kind} but {key} holds a value of another type",
                    "write levels of a string column in quotes, those of a numeric column without",
                )
            if kind in ("integer", "number", "year") and not abs(cast(float, value)) <= LARGEST:
                raise error("DICT-LEVELS", f"column {name!r}: {key} holds a number beyond 2^53", "correct it")
        lists.append(tuple(level_text(kind, value) for value in values))
    if len(lists) == 2 and set(lists[0]) != set(lists[1]):
        raise error("DICT-LEVELS", f"column {name!r}: categories and enum list different levels", "keep one of them")
    if kind == "boolean":
        if lists and set(lists[0]) != {"false", "true"}:
            raise error("DICT-LEVELS", f"column {name!r}: a boolean has the levels false, true", "leave enum out")
        return None
    return lists[0] if lists else None


def _shares(name: str, given: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(given, Mapping) or not all(
        isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1 for share in given.values()
    ):
        raise error(
            "DICT-SHARES",
            f"column {name!r}: x-reference-shares is not an object of levels with shares from 0 to 1",
            'e.g. "x-reference-shares": {"female": 0.51, "male": 0.49}',
        )
    return tuple((str(level), float(share)) for level, share in given.items())


def _missing_values(given: Any) -> tuple[str, ...]:
    if isinstance(given, list):  # version 2 also allows {"value", "label"}
        given = [item.get("value") if isinstance(item, Mapping) else item for item in given]
    return _texts(given, "missingValues")


def _texts(given: Any, what: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise error("DICT-MISSING", f"{what} is not a list of texts", 'e.g. "missingValues": ["", "NA"]')
    for item in given:
        check_text(item, what)
    return tuple(given)


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise error("DICT-PROPERTY", f"{key} is not a text", f'"{key}": "..."')
    return value


def _parse_json(raw: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise error("DICT-JSON", f"the property {twice!r} appears twice in one object", "remove one")
        return out

    def constant(text: str) -> float:
        raise error("DICT-JSON", f"{text} is not a number in JSON", "write a finite number")

    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant)
    except DictionaryError as reason:
        raise DictionaryError(reason.code, reason.sentence, where=(where,), hint=reason.hint) from None
    except json.JSONDecodeError as reason:
        place = f"{where}:{reason.lineno}"
        raise DictionaryError(
            "DICT-JSON", f"not JSON: {reason.msg}", where=(place,), hint="correct this line"
        ) from None
    except (ValueError, RecursionError):
        raise DictionaryError(
            "DICT-JSON", "not a JSON text in UTF-8", where=(where,), hint="save the dictionary as UTF-8 JSON"
        ) from None

"""Clinical rules: what has to hold inside one row, as the dictionary states it. The language; rule_checks applies it.

    {"name": "discharged after admission", "order": ["admitted", "discharged"]}
    {"name": "at most a year in hospital", "difference": ["discharged", "admitted"], "minimum": 0, "maximum": 365}
    {"name": "men are not pregnant", "if": {"sex": "male"}, "then": {"pregnant": "no"}}
A condition is a level, a list of levels, {"minimum": …, "maximum": …}, or null and {"missing": true} for an empty cell,
{"missing": false} for a filled one. Rules come from medicine and from how a form is filled in, never from the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cohortium.common.errors import DictionaryError
from cohortium.common.schema import LARGEST, Column, error, level_text, nearest, read_bound, write_bound

RULE_KEYS = ("name", "order", "strict", "difference", "minimum", "maximum", "if", "then")
_ALIASES = {"min": "minimum", "max": "maximum"}
_NUMBERS, _DATES = ("integer", "number", "year"), ("date", "datetime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a cell has to be: one of `levels`; or minimum ≤ value ≤ maximum; or `missing`, or not."""

    column: str
    levels: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    missing: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The values of `columns` never fall from one to the next; strict: they rise."""

    name: str
    columns: tuple[str, ...]
    strict: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """minimum ≤ first − second ≤ maximum: days for dates, seconds for two datetimes, else the columns' unit."""

    name: str
    columns: tuple[str, ...]
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class IfThen:
    """Where every condition of `given` holds, every condition of `then` holds."""

    name: str
    given: tuple[Condition, ...]
    then: tuple[Condition, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(condition.column for condition in (*self.given, *self.then)))


Rule = Order | Difference | IfThen


def read_rules(document: Any, columns: Sequence[Column]) -> tuple[Rule, ...]:
    """The dictionary's `rules`, parsed JSON; the schema checks them at birth (`refuse_misfits`).

    Raises DictionaryError DICT-RULE that names the rule.
    """
    if document is None:
        return ()
    if not isinstance(document, list):
        raise error("DICT-RULE", "rules is not a list", '"rules": [{"name": "...", "order": ["first", "second"]}]')
    known = {column.name: column for column in columns}
    return tuple(_rule(entry, number, known) for number, entry in enumerate(document, start=1))


def rules_to_json(rules: Iterable[Rule], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The inverse of `read_rules`."""
    known = {column.name: column for column in columns}
    return [_to_json(rule, known) for rule in rules]


def sentence(rule: Rule, columns: Sequence[Column]) -> str:
    """A rule in words, for people."""
    known = {column.name: column for column in columns}
    if isinstance(rule, Order):
        return (" < " if rule.strict else " ≤ ").join(rule.columns)
    if isinstance(rule, Difference):
        first, second = rule.columns
        unit = _unit(known[first], known[second])
        return _range(f"{first} − {second}", rule.minimum, rule.maximum, str_of=lambda x: f"{x:g}{unit}")
    given, then = (
        " and ".join(_condition_text(condition, known[condition.column]) for condition in part)
        for part in (rule.given, rule.then)
    )
    return f"if {given}, then {then}"


def refuse_misfits(rules: Sequence[Rule], columns: Sequence[Column]) -> None:
    """Raise DictionaryError for a rule that the columns cannot carry: unknown column or level, nothing to compare."""
    known = {column.name: column for column in columns}
    seen: set[str] = set()
    for rule in rules:
        if not isinstance(rule.name, str) or not rule.name.strip():
            raise error("DICT-RULE", "a rule has no name", '"name": "what the rule says"')
        if rule.name in seen:
            raise wrong(rule.name, "two rules have this name", "rename one")
        seen.add(rule.name)
        for name in rule.columns:
            _column(rule.name, name, known)
        if isinstance(rule, IfThen):
            if not rule.given or not rule.then:
                raise wrong(rule.name, "if and then both need a condition", '"if": {"sex": "male"}')
            for condition in (*rule.given, *rule.then):
                _fits(rule.name, condition, known[condition.column])
        else:
            _comparable(rule, known)


def wrong(rule: str, what: str, fix: str) -> DictionaryError:
    return error("DICT-RULE", f"rule {rule!r}: {what}", fix, f"rule {rule}")


def _rule(entry: Any, number: int, known: Mapping[str, Column]) -> Rule:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
        raise error("DICT-RULE", f"rule {number} has no name", '{"name": "what the rule says", "order": [...]}')
    name = entry["name"]
    for key in entry:
        if key not in RULE_KEYS:
            raise wrong(name, f"it has the property {key!r}", f"known: {', '.join(RULE_KEYS)}{nearest(key, RULE_KEYS)}")
    kinds = [key for key in ("order", "difference", "if") if key in entry]
    if len(kinds) != 1:
        raise wrong(name, "it is not one kind of rule", 'give "order", or "difference", or "if" with "then"')
    extra = {"order": ("strict",), "difference": ("minimum", "maximum"), "if": ("then",)}[kinds[0]]
    for key in entry:
        if key not in ("name", kinds[0], *extra):
            raise wrong(name, f"{key} does not go with {kinds[0]}", f"remove {key}")
    if kinds[0] == "order":
        strict = entry.get("strict", False)
        if not isinstance(strict, bool):
            raise wrong(name, "strict is true or false", "leave the quotes out")
        return Order(name=name, columns=_names(name, entry["order"], "order"), strict=strict)
    if kinds[0] == "difference":
        low, high = (_number(name, entry.get(key)) for key in ("minimum", "maximum"))
        return Difference(name=name, columns=_names(name, entry["difference"], "difference"), minimum=low, maximum=high)
    return IfThen(
        name=name, given=_conditions(name, entry["if"], known), then=_conditions(name, entry.get("then"), known)
    )


def _names(rule: str, given: Any, key: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise wrong(rule, f"{key} is not a list of columns", f'"{key}": ["first", "second"]')
    return tuple(given)


def _number(rule: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise wrong(rule, "minimum and maximum are numbers", '"minimum": 0')
    return float(value)


def _conditions(rule: str, given: Any, known: Mapping[str, Column]) -> tuple[Condition, ...]:
    if not isinstance(given, Mapping) or not given:
        raise wrong(rule, "if and then are JSON objects with a condition for each column", '"then": {"pregnant": "no"}')
    return tuple(_condition(rule, _column(rule, name, known), value) for name, value in given.items())


def _condition(rule: str, column: Column, value: Any) -> Condition:
    name = column.name
    if value is None:
        return Condition(column=name, missing=True)
    if isinstance(value, Mapping):
        given = {_ALIASES.get(key, key): item for key, item in value.items()}
        unknown = [key for key in given if key not in ("minimum", "maximum", "missing")]
        if unknown or len(given) != len(value) or not given:
            fix = '{"minimum": 0, "maximum": 12} or {"missing": true}'
            raise wrong(rule, f"the condition on {name!r} is not understood", fix)
        if "missing" in given:
            if len(given) > 1 or not isinstance(given["missing"], bool):
                raise wrong(rule, f"the condition on {name!r}: missing is true or false and stands alone", "split it")
            return Condition(column=name, missing=given["missing"])
        low, high = (_bound(rule, column, given[key]) if key in given else None for key in ("minimum", "maximum"))
        return Condition(column=name, minimum=low, maximum=high)
    values = value if isinstance(value, list) else [value]
    if column.levels is None and not isinstance(value, list):
        point = _bound(rule, column, value)
        return Condition(column=name, minimum=point, maximum=point)
    for item in values:
        plain = isinstance(item, str) or (isinstance(item, int | float) and abs(item) <= LARGEST)
        if not plain or (isinstance(item, bool) and column.kind != "boolean"):
            raise wrong(rule, f"the condition on {name!r} holds something that is no level", _levels_hint(column))
    texts = tuple(dict.fromkeys(level_text(column.kind, item) for item in values))
    if not texts:
        raise wrong(rule, f"the condition on {name!r} is an empty list", _levels_hint(column))
    return Condition(column=name, levels=texts)


def _bound(rule: str, column: Column, value: Any) -> float:
    try:
        bound = read_bound(column.kind, value)
    except (ValueError, OverflowError) as reason:
        raise wrong(rule, f"{value!r} is not a {column.kind} of {column.name!r}", str(reason)) from None
    if not math.isfinite(bound):
        raise wrong(rule, f"the bound of {column.name!r} is not a finite number", "correct it")
    return bound


def _column(rule: str, name: str, known: Mapping[str, Column]) -> Column:
    column = known.get(name)
    if column is None:
        some = ", ".join(list(known)[:12]) + (" ..." if len(known) > 12 else "")
        raise wrong(rule, f"the dictionary has no column {name!r}", f"columns: {some}{nearest(name, known)}")
    if column.identifier:
        raise wrong(rule, f"column {name!r} is an identifier and in no synthetic row", "name another column")
    return column


def _fits(rule: str, condition: Condition, column: Column) -> None:
    name, levels = column.name, column.levels
    ranged = condition.minimum is not None or condition.maximum is not None
    if (bool(condition.levels), ranged, condition.missing is not None).count(True) != 1:
        raise wrong(rule, f"the condition on {name!r} says nothing, or two things", "give levels, a range or missing")
    if condition.missing and column.required:
        raise wrong(rule, f"column {name!r} is required and never missing", "remove the condition")
    if condition.levels:
        unknown = [level for level in condition.levels if levels is None or level not in levels]
        if unknown:
            raise wrong(rule, f"column {name!r} has no level {unknown[0]!r}", _levels_hint(column, unknown[0]))
    if ranged:
        if levels is not None and column.kind not in _NUMBERS:
            raise wrong(rule, f"column {name!r} has levels and no range", _levels_hint(column))
        low, high = (math.nan, math.nan) if levels is not None else (column.minimum, column.maximum)
        least, most = condition.minimum, condition.maximum
        if least is not None and most is not None and least > most:
            raise wrong(rule, f"the condition on {name!r} has a minimum above its maximum", "swap or correct them")
        if (least is not None and high is not None and least > high) or (
            most is not None and low is not None and most < low
        ):
            raise wrong(rule, f"no value of {name!r} can meet the condition", "compare it with the column's range")


def _comparable(rule: Order | Difference, known: Mapping[str, Column]) -> None:
    if len(rule.columns) < 2 or len(set(rule.columns)) != len(rule.columns):
        raise wrong(rule.name, "it needs two columns or more, each once", '"order": ["admitted", "discharged"]')
    for name in rule.columns:
        if known[name].kind not in (*_NUMBERS, *_DATES):
            raise wrong(rule.name, f"column {name!r} is a {known[name].kind} and has no order", 'use "if" and "then"')
    if len({known[name].kind in _DATES for name in rule.columns}) > 1:
        raise wrong(rule.name, "a date cannot be compared with a number", "name columns of one sort")
    if isinstance(rule, Difference):
        if len(rule.columns) != 2 or (rule.minimum is None and rule.maximum is None):
            raise wrong(rule.name, "a difference is of two columns, with a minimum or a maximum", '"minimum": 0')
        if rule.minimum is not None and rule.maximum is not None and rule.minimum > rule.maximum:
            raise wrong(rule.name, "the minimum is above the maximum", "swap or correct them")


def _unit(first: Column, second: Column) -> str:
    """Of a difference, in words."""
    kinds = {first.kind, second.kind}
    if kinds & set(_DATES):
        return " s" if kinds == {"datetime"} else " days"
    return f" {first.unit}" if first.unit and first.unit == second.unit else ""


def _levels_hint(column: Column, word: str = "") -> str:
    if column.levels is None:
        return '{"minimum": ..., "maximum": ...} for a column without levels'
    some = ", ".join(column.levels[:12]) + (" ..." if len(column.levels) > 12 else "")
    return f"levels: {some}{nearest(word, column.levels) if word else ''}"


def _to_json(rule: Rule, known: Mapping[str, Column]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": rule.name}
    if isinstance(rule, Order):
        out["order"] = list(rule.columns)
        return out | ({"strict": True} if rule.strict else {})
    if isinstance(rule, Difference):
        out["difference"] = list(rule.columns)
        bounds = {"minimum": rule.minimum, "maximum": rule.maximum}
        return out | {key: value for key, value in bounds.items() if value is not None}
    for key, part in (("if", rule.given), ("then", rule.then)):
        out[key] = {condition.column: _condition_json(condition, known[condition.column]) for condition in part}
    return out


def _condition_json(condition: Condition, column: Column) -> Any:
    if condition.levels:
        return list(condition.levels)
    if condition.missing is not None:
        return {"missing": condition.missing}
    bounds = {"minimum": condition.minimum, "maximum": condition.maximum}
    return {key: write_bound(column.kind, bound) for key, bound in bounds.items() if bound is not None}


def _condition_text(condition: Condition, column: Column) -> str:
    if condition.missing is not None:
        return f"{column.name} is {'missing' if condition.missing else 'there'}"
    if condition.levels:
        return f"{column.name} is {' or '.join(condition.levels)}"

    def text(bound: float) -> str:
        value = write_bound(column.kind, bound)
        return f"{value:g}" if isinstance(value, float) else str(value)

    if condition.minimum == condition.maximum and condition.minimum is not None:
        return f"{column.name} = {text(condition.minimum)}"
    return _range(column.name, condition.minimum, condition.maximum, str_of=text)


def _range(what: str, low: float | None, high: float | None, *, str_of: Any) -> str:
    left = "" if low is None else f"{str_of(low)} ≤ "
    right = "" if high is None else f" ≤ {str_of(high)}"
    return f"{left}{what}{right}"

"""The data dictionary: what is publicly known about a table before anyone looks at it.

A Frictionless Table Schema (JSON) with three more properties per field, `role`, `unit`, `resolution`, and one for the
table: `rules` (rules.py). Nothing in it is learned from data: levels and ranges come from documentation or from people.
A field with `x-guessed: true` has levels or a range read off a table: such a dictionary is for completion, not for use.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from cohortium.common.errors import DictionaryError

if TYPE_CHECKING:
    from cohortium.common.rules import Rule

Kind = Literal["boolean", "integer", "number", "string", "date", "datetime", "year"]
KINDS: tuple[str, ...] = get_args(Kind)
ROLES = ("", "identifier", "quasi-identifier", "sensitive", "target", "time", "event", "site")
ROLE_ALIASES = {"target-rare": "target"}
TRUE_VALUES = ("true", "True", "TRUE", "1")
FALSE_VALUES = ("false", "False", "FALSE", "0")
LARGEST = 2.0**53  # beyond it float64 skips integers, so an "integer" range would lie
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ROUNDING = 0.02  # public shares are printed in whole per cent: that far their sum may lie off 1

_NUMERIC = ("integer", "number", "year")
_DATES = ("date", "datetime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column as everyone may know it.

    levels: the allowed values as text, in the dictionary's order; ("false", "true") for a boolean; None for
    numbers without a list and for dates. minimum, maximum: both set exactly when levels is None, except for
    identifiers, which need neither; a date counts in days and a datetime in seconds since 1970-01-01 UTC.
    resolution: the step in which the value is recorded, in the unit of minimum. reference_shares: (level, its share of
    the people whom the study is about), public figures for levels, all or some. Raises DictionaryError.
    """

    name: str
    kind: Kind
    levels: tuple[str, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False
    role: str = ""
    unit: str = ""
    resolution: float | None = None
    description: str = ""
    format: str = "default"
    true_values: tuple[str, ...] = TRUE_VALUES
    false_values: tuple[str, ...] = FALSE_VALUES
    guessed: bool = False
    reference_shares: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_text(self.name, "a column's name", empty=False)
        for text in (self.unit, self.description, self.format, self.role):
            check_text(text, f"the text of column {self.name!r}")
        if self.kind not in KINDS:
            raise unknown_type(self.name, self.kind)
        if self.role not in ROLES:
            raise error(
                "DICT-ROLE",
                f"column {self.name!r} has the role {self.role!r}, which does not exist",
                f"use one of {', '.join(ROLES[1:])} or leave role out{nearest(self.role, ROLES[1:])}",
            )
        if self.kind == "boolean" and self.levels is None:
            object.__setattr__(self, "levels", ("false", "true"))
        if self.identifier:
            return
        if self.levels is not None:
            self._check_levels(self.levels)
        elif self.kind == "string":
            raise error(
                "DICT-LEVELS",
                f"column {self.name!r} is a string without levels",
                'add "constraints": {"enum": ["A", "B", ...]} with every level that is publicly known, '
                'or "role": "identifier" to drop the column at the site',
            )
        else:
            self._check_range()
        self._check_resolution()
        self._check_shares()
        if set(self.true_values) & set(self.false_values):
            raise error(
                "DICT-LEVELS",
                f"column {self.name!r}: a value is in trueValues and in falseValues",
                "remove one",
            )

    @property
    def identifier(self) -> bool:
        return self.role == "identifier"

    @property
    def categorical(self) -> bool:
        """True where values are levels and not points on a line."""
        return self.levels is not None or self.kind in ("string", "boolean")

    def _check_levels(self, levels: tuple[str, ...]) -> None:
        if self.kind in _DATES:
            raise error(
                "DICT-LEVELS",
                f"column {self.name!r} is a {self.kind} with a list of levels",
                'give "minimum" and "maximum" instead of "enum"',
            )
        if not levels:
            raise error("DICT-LEVELS", f"column {self.name!r} has an empty list of levels", "name every level")
        if self.kind == "boolean" and levels != ("false", "true"):
            raise error(
                "DICT-LEVELS",
                f"column {self.name!r}: a boolean has the levels false, true",
                'leave "enum" out',
            )
        for level in levels:
            check_text(level, f"a level of column {self.name!r}", empty=False)
        if len(set(levels)) != len(levels):
            twice = next(level for i, level in enumerate(levels) if level in levels[:i])
            raise error("DICT-LEVELS", f"column {self.name!r} lists the level {twice!r} twice", "remove one of them")
        if self.minimum is not None or self.maximum is not None:
            raise error(
                "DICT-RANGE",
                f"column {self.name!r} has a list of levels and a range",
                'keep "enum" for levels or "minimum" and "maximum" for a measured value, not both',
            )

    def _check_range(self) -> None:
        example = {"date": '"2000-01-01"', "datetime": '"2000-01-01T00:00:00Z"', "year": "1950"}.get(self.kind, "0")
        for key, bound in (("minimum", self.minimum), ("maximum", self.maximum)):
            if bound is None:
                raise error(
                    "DICT-RANGE",
                    f"column {self.name!r} is a {self.kind} without a {key}",
                    f'add "constraints": {{"{key}": {example}}} with a publicly known bound; '
                    "a bound read off the data would be a leak",
                )
            if isinstance(bound, bool) or not math.isfinite(bound):
                raise error(
                    "DICT-RANGE",
                    f"column {self.name!r}: {key} is not a finite number",
                    f"write a number for {key}",
                )
            if abs(bound) > LARGEST:
                raise error("DICT-RANGE", f"column {self.name!r}: {key} is beyond 2^53", "use a larger unit")
            if self.kind in ("integer", "year", "date") and bound != math.floor(bound):
                raise error(
                    "DICT-RANGE",
                    f"column {self.name!r} is a {self.kind} but {key} is not whole",
                    f"round {key}",
                )
            if self.kind == "year" and not 1 <= bound <= 9999:
                raise error(
                    "DICT-RANGE",
                    f"column {self.name!r}: {key} is not a year from 1 to 9999",
                    f"correct {key}",
                )
        low, high = cast(float, self.minimum), cast(float, self.maximum)
        if low > high:
            raise error("DICT-RANGE", f"column {self.name!r} has a minimum above its maximum", "swap or correct them")

    def _check_resolution(self) -> None:
        step = self.resolution
        if step is None:
            return
        if isinstance(step, bool) or not math.isfinite(step) or step <= 0:
            raise error(
                "DICT-RESOLUTION",
                f"column {self.name!r}: resolution is not a positive number",
                'e.g. "resolution": 0.1',
            )
        if self.levels is not None:
            raise error("DICT-RESOLUTION", f"column {self.name!r} has levels and a resolution", "leave resolution out")
        if self.kind in ("integer", "year", "date") and step != math.floor(step):
            raise error(
                "DICT-RESOLUTION",
                f"column {self.name!r} is a {self.kind}: resolution must be whole",
                "round it",
            )

    def _check_shares(self) -> None:
        if not self.reference_shares:
            return
        example = 'e.g. "x-reference-shares": {"female": 0.51, "male": 0.49}'
        levels, named = self.levels or (), [level for level, _ in self.reference_shares]
        unknown = [level for level in named if level not in levels]
        if unknown or len(set(named)) != len(named):
            what = f"has no level {unknown[0]!r}" if unknown else "names a level twice"
            raise error("DICT-SHARES", f"column {self.name!r} {what} to give a reference share", example)
        total = sum(share for _, share in self.reference_shares)
        if not all(0 <= share <= 1 for _, share in self.reference_shares) or total > 1 + ROUNDING:
            raise error(
                "DICT-SHARES", f"column {self.name!r}: reference shares lie from 0 to 1 and sum to 1 at most", example
            )
        if len(named) == len(levels) and total < 1 - ROUNDING:
            raise error(
                "DICT-SHARES",
                f"column {self.name!r}: the reference shares of all levels sum to {total:g}",
                "correct them, or leave out a level whose share is not known",
            )

    def to_dict(self) -> dict[str, Any]:
        """The field as Table Schema JSON; `Schema.from_dict` gives the same column back."""
        constraints: dict[str, Any] = {"required": self.required}
        out: dict[str, Any] = {"name": self.name, "type": self.kind, "constraints": constraints}
        if self.levels is not None and self.kind != "boolean":
            constraints["enum"] = [_level_value(self.kind, level) for level in self.levels]
        for key, bound in (("minimum", self.minimum), ("maximum", self.maximum)):
            if bound is not None:
                constraints[key] = write_bound(self.kind, bound)
        if self.resolution is not None:
            out["resolution"] = self.resolution
        for key in ("role", "unit", "description"):
            if getattr(self, key):
                out[key] = getattr(self, key)
        if self.format != "default":
            out["format"] = self.format
        if self.kind == "boolean" and (self.true_values, self.false_values) != (TRUE_VALUES, FALSE_VALUES):
            out["trueValues"], out["falseValues"] = list(self.true_values), list(self.false_values)
        if self.guessed:
            out["x-guessed"] = True
        if self.reference_shares:
            out["x-reference-shares"] = dict(self.reference_shares)
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """A named list of columns in file order, and the texts that mean "missing".

    about: title, source, licence and the like, kept so that attribution travels with every copy. rules: what has to
    hold inside a row. Raises DictionaryError: no column, two columns of one name, a level that is also a missing value,
    a rule that the columns cannot carry.
    """

    name: str
    columns: tuple[Column, ...]
    missing_values: tuple[str, ...] = ("",)
    about: tuple[tuple[str, str], ...] = ()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            raise error("DICT-FIELDS", "the dictionary has no columns", 'list them under "fields"')
        seen: set[str] = set()
        for column in self.columns:
            if column.name in seen:
                raise error(
                    "DICT-NAME",
                    f"two columns are called {column.name!r}",
                    "rename or remove one",
                    column.name,
                )
            seen.add(column.name)
            if column.kind == "string" and not column.identifier:
                both = set(column.levels or ()) & set(self.missing_values)
                if both:
                    raise error(
                        "DICT-LEVELS",
                        f"column {column.name!r}: {sorted(both)[0]!r} is a level and a missing value",
                        "remove it from one of the two lists",
                        column.name,
                    )
        if self.rules:
            from cohortium.common.rules import refuse_misfits

            refuse_misfits(self.rules, self.columns)

    @property
    def modelled(self) -> tuple[Column, ...]:
        """The columns that are ever counted: all but the identifiers."""
        return tuple(c for c in self.columns if not c.identifier)

    @property
    def guessed(self) -> tuple[str, ...]:
        """Columns whose levels or range were read off a table and that no person has confirmed."""
        return tuple(c.name for c in self.modelled if c.guessed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.columns)

    def with_role(self, role: str) -> tuple[Column, ...]:
        return tuple(c for c in self.columns if c.role == role)

    def column(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        some = ", ".join(self.names[:12]) + (" ..." if len(self.names) > 12 else "")
        raise DictionaryError(
            "DICT-COLUMN",
            f"the dictionary {self.name!r} has no column {name!r}",
            where=(self.name,),
            hint=f"columns: {some}{nearest(name, self.names)}",
        )

    def without(self, names: Iterable[str]) -> Schema:
        """The same dictionary without some columns, each must exist, and without the rules that name one of them."""
        drop = {self.column(name).name for name in names}
        return replace(
            self,
            columns=tuple(c for c in self.columns if c.name not in drop),
            rules=tuple(rule for rule in self.rules if not drop & set(rule.columns)),
        )

    def digest(self) -> str:
        """SHA-256 (hex) of the dictionary's canonical JSON; equal dictionaries have equal digests."""
        text = json.dumps(_hex_floats(self.to_dict()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        head: dict[str, Any] = {"name": self.name, **dict(self.about)}
        out = {
            **head,
            "missingValues": list(self.missing_values),
            "fields": [c.to_dict() for c in self.columns],
        }
        if self.rules:  # a dictionary without rules keeps the digest that it had before there were any
            from cohortium.common.rules import rules_to_json

            out["rules"] = rules_to_json(self.rules, self.columns)
        return out

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read and check a dictionary file. Raises DictionaryError with the file, the field and the fix."""
        from cohortium.common.table_schema import load

        return load(Path(path))

    @classmethod
    def from_dict(cls, document: Any, *, where: str = "dictionary") -> Schema:
        """Check a Table Schema given as parsed JSON. `where` is the file named in errors."""
        from cohortium.common.table_schema import parse

        return parse(document, where)


def level_text(kind: str, value: Any) -> str:
    """A level as text: 1 → "1", 1.0 → "1", 0.5 → "0.5", True → "true". One value has one text."""
    if isinstance(value, str):
        return value
    if kind == "boolean":
        return "true" if value else "false"
    number = float(value)
    return str(int(value)) if number == math.floor(number) else repr(number)


def read_bound(kind: str, value: Any) -> float:
    """A bound from JSON as a number: dates in days, datetimes in seconds since 1970-01-01 UTC.

    Raises ValueError for a value of the wrong type.
    """
    if kind in _DATES:
        if not isinstance(value, str):
            raise ValueError("write it as ISO text in quotes")
        moment = datetime.fromisoformat(value)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        seconds = (moment - EPOCH) / timedelta(seconds=1)
        return seconds / 86400 if kind == "date" else seconds
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("write it as a number without quotes")
    if abs(value) > LARGEST:
        raise ValueError("it is beyond 2^53: use a larger unit")
    return float(value)


def write_bound(kind: str, bound: float) -> Any:
    """The inverse of `read_bound`."""
    if kind == "date":
        return (date(1970, 1, 1) + timedelta(days=int(bound))).isoformat()
    if kind == "datetime":
        return (EPOCH + timedelta(seconds=bound)).isoformat().replace("+00:00", "Z")
    return bound if kind == "number" else int(bound)


def _level_value(kind: str, level: str) -> Any:
    if kind == "string":
        return level
    return float(level) if kind == "number" and not level.lstrip("-").isdigit() else int(level)


def check_text(text: str, what: str, *, empty: bool = True) -> None:
    if not isinstance(text, str) or (not text and not empty):
        raise error("DICT-NAME", f"{what} is empty", "write a text")
    if any(0xD800 <= ord(ch) <= 0xDFFF or ch == "\0" for ch in text):
        raise error("DICT-NAME", f"{what} holds characters that no file can store", "retype it")


def unknown_type(name: str, kind: Any) -> DictionaryError:
    if kind is None:
        return error("DICT-TYPE", f"column {name!r} has no type", f'add "type": one of {", ".join(KINDS)}')
    near = nearest(kind, KINDS) if isinstance(kind, str) else ""
    return error(
        "DICT-TYPE",
        f"column {name!r} has the type {kind!r}, which is not supported",
        f"use one of {', '.join(KINDS)}{near}",
    )


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def error(code: str, sentence: str, hint: str, column: str = "") -> DictionaryError:
    """A dictionary error that does not know its file yet; table_schema adds it."""
    return DictionaryError(code, sentence, where=(column,) if column else (), hint=hint)


def _hex_floats(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: _hex_floats(item) for key, item in value.items()}
    return [_hex_floats(item) for item in value] if isinstance(value, list) else value

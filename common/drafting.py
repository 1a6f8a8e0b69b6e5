"""`cohortium study new`: a first dictionary and a first study from a table, for people to complete.

Ranges and levels read off a table are not public knowledge: a maximum is one patient's value, a rare level is
one patient. So each is marked "x-guessed", and no study runs until a person has checked it and taken the mark
away.
The study itself comes without privacy settings: those are decided, not proposed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from cohortium.common.encoding import as_text
from cohortium.common.errors import TableError
from cohortium.common.schema import LARGEST, Column, Kind, Schema, read_bound

WARNING = (
    "Ranges and levels in this dictionary were read off the table. They are NOT public knowledge: a maximum "
    "is one patient's value. Replace each by what is publicly known, then delete its x-guessed."
)
_MISSING_WORDS = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None", ".", "?")
_MOST_LEVELS = 50  # a text column with more values looks like a name or a note
_MOST_NUMBER_LEVELS = 6
_PATIENT_NAMES = ("patient_id", "patient", "patientid", "pid", "subject", "subject_id", "person_id", "id")
_CHECK = "CHECK: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A dictionary with guesses, the text of a study.toml, and the warning to print."""

    schema: Schema
    study: str
    warning: str = WARNING


def draft(table: pd.DataFrame, *, name: str, dictionary: str = "dictionary.json") -> Draft:
    """Propose a dictionary for `table` and a study that names it as `dictionary`. Raises TableError."""
    names = list(table.columns)
    if not names or not len(table):
        raise TableError("TABLE-EMPTY", "the table has no rows or no columns", hint="draft from a table with rows")
    if not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise TableError("TABLE-HEADER", "column names are not different texts", hint="give every column its name")
    values = {n: _plain(table[n]) for n in names}
    texts = {v for column in values.values() for v in set(column) if isinstance(v, str)}
    missing = ("", *(word for word in _MISSING_WORDS if word in texts))
    columns = tuple(_column(n, [v for v in values[n] if v is not None and v not in missing], len(table)) for n in names)
    schema = Schema(name=name, columns=columns, missing_values=missing)
    return Draft(schema=schema, study=_study_text(schema, dictionary))


def _plain(values: pd.Series) -> list[Hashable]:
    """Cells as bool, float, str (stripped), datetime, or None; nested values as the text of their type."""
    out: list[Hashable] = []
    for value in values.astype(object):
        if value is None or value is pd.NA or value is pd.NaT:
            out.append(None)
        elif isinstance(value, str):
            out.append(value.strip().replace("\0", ""))
        elif isinstance(value, float):
            out.append(float(value) if math.isfinite(value) else None)
        elif isinstance(value, bool | int) or hasattr(value, "isoformat"):
            out.append(value)
        else:
            out.append(_number_or_type(value))
    return out


def _number_or_type(value: Any) -> str | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return f"({type(value).__name__})"
    return as_text(number) if math.isfinite(number) else None


def _column(name: str, cells: list[Hashable], rows: int) -> Column:
    distinct = set(cells)
    numbers = _numbers(distinct)
    moments = None if numbers is not None else _moments(distinct)
    whole = numbers is not None and all(x == math.floor(x) for x in numbers)
    unique = len(cells) == rows > 20 and len(distinct) == rows
    if not cells:
        return Column(
            name=name,
            kind="number",
            minimum=0.0,
            maximum=1.0,
            guessed=True,
            description=_CHECK + "no value was seen",
        )
    if name.lower() in _PATIENT_NAMES or (unique and moments is None and (numbers is None or whole)):
        note = _CHECK + "taken for an identifier, dropped at the site; if not, give it a range or levels"
        return Column(name=name, kind="integer" if whole else "string", role="identifier", description=note)
    if all(isinstance(v, bool) for v in distinct) or {str(v).lower() for v in distinct} in (
        {"true", "false"},
        {"true"},
        {"false"},
    ):
        return Column(name=name, kind="boolean")
    required = len(cells) == rows
    if numbers is not None:
        if max(abs(x) for x in numbers) > LARGEST:
            return Column(name=name, kind="string", role="identifier", description=_CHECK + "numbers beyond 2^53")
        if whole and len(numbers) <= _MOST_NUMBER_LEVELS:
            levels = tuple(str(int(x)) for x in sorted(numbers))
            return Column(name=name, kind="integer", levels=levels, required=required, guessed=True)
        low, high = _widen(min(numbers), max(numbers))
        return Column(
            name=name,
            kind="integer" if whole else "number",
            minimum=low,
            maximum=high,
            required=required,
            guessed=True,
        )
    if moments is not None:
        midnight = all((m.hour, m.minute, m.second, m.microsecond) == (0, 0, 0, 0) for m in moments)
        kind: Kind = "date" if midnight else "datetime"
        low = read_bound(kind, f"{min(moments).year:04d}-01-01")
        high = read_bound(kind, f"{max(moments).year:04d}-12-31")
        return Column(name=name, kind=kind, minimum=low, maximum=high, required=required, guessed=True)
    texts = sorted({as_text(v) for v in distinct})
    if len(texts) > _MOST_LEVELS:
        note = _CHECK + f"text with {len(texts)} values, dropped at the site; list its levels to keep it"
        return Column(name=name, kind="string", role="identifier", description=note)
    return Column(name=name, kind="string", levels=tuple(texts), required=required, guessed=True)


def _numbers(distinct: set[Hashable]) -> set[float] | None:
    out: set[float] = set()
    for value in distinct:
        if isinstance(value, bool) or hasattr(value, "isoformat"):
            return None
        if isinstance(value, str) and not value.isascii():
            return None
        try:
            number = float(value)  # type: ignore[arg-type]
        except (ValueError, TypeError, OverflowError):
            return None
        if not math.isfinite(number) or (isinstance(value, str) and ("_" in value or _coded(value))):
            return None
        out.add(number)
    return out


def _coded(text: str) -> bool:
    """A number with a leading zero is a code: 010 is not 10."""
    return len(text) > 1 and text[0] == "0" and text[1].isdigit()


def _moments(distinct: set[Hashable]) -> set[datetime] | None:
    out: set[datetime] = set()
    for value in distinct:
        try:
            if isinstance(value, str):
                if len(value) < 10:
                    return None
                moment = datetime.fromisoformat(value)
            elif hasattr(value, "isoformat"):
                moment = datetime.fromisoformat(value.isoformat())
            else:
                return None
        except (ValueError, TypeError):
            return None
        out.add(moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment)
    return out


def _widen(low: float, high: float) -> tuple[float, float]:
    """The next round numbers outside low and high, so that a draft does not show the extremes themselves."""
    span = max(high - low, abs(high), 1e-9)
    step = 10.0 ** math.floor(math.log10(span))
    a, b = math.floor(low / step) * step, math.ceil(high / step) * step
    digits = max(0, 2 - math.floor(math.log10(step)))
    a, b = round(a, digits), round(b, digits)
    return max(min(a, low), -LARGEST), min(max(b, high), LARGEST)


def _study_text(schema: Schema, dictionary: str) -> str:
    def quoted(text: Any) -> str:
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

    ids = [column.name for column in schema.with_role("identifier")]
    unit = next((n for n in ids if n.lower() in _PATIENT_NAMES), ids[0] if ids else "row")
    slug = "".join(ch if ch.isascii() and ch.isalnum() else "-" for ch in schema.name.lower()).strip("-")[:60]
    return f"""# A study, to be completed by people. `cohortium study check` says what is missing.
# First complete {dictionary}: its ranges and levels were read off a table and are not public knowledge.

[study]
id = {quoted(slug or "study")}
title = "..."
dictionary = {quoted(dictionary)}
# target = "..."               # the column a prediction is about, if there is one
# patients = 10000             # a rough number that anyone may know; never the exact one
# exclude = ["..."]            # columns that stay out

# These are promises to patients and have no defaults. Decide them together, then remove the "#".
[privacy]
# epsilon = 3.0                # of everything together; smaller protects more
# delta = 1e-6
# unit = {quoted(unit)}
#                              # the column that names the patient, or "row" where each row is a patient
# adjacency = "add-remove"
# hospitals_per_patient = 1    # in how many hospitals' tables one patient may be

[generator]
name = "auto"                  # "mixture", "autoregressive", "joined", or chosen by a public rule

# secure-sum: nobody trusts the coordinator; `survivors` sites must answer, `colluders` of them may cheat.
# local: every site adds all of the noise itself and trusts nobody; more noise in the result.
[strategy]
name = "secure-sum"
# survivors = 3                # more than (sites + colluders) / 2
# colluders = 1

# [evaluation]                 # keeps patients out of training to score the result; leave out to train on all
# epsilon = 0.5
# holdout = 0.2

[release]
rows = 10000
"""

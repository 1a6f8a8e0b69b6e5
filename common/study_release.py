"""What a study says about its published table: how many rows, how they are sampled, and what the gate wants of them.

Everything here is fixed before anything is asked, and none of it reads a record: rows are sampled from the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cohortium.common.errors import StudyError
from cohortium.common.rules import IfThen
from cohortium.common.schema import Schema, nearest
from cohortium.common.toml_reader import Table

WORDS = ("not fit", "usable with care", "good")
"""Of a verdict, from worst to best. "cannot be assessed" reaches none of them."""
USES = {
    "columns": "Describing one column at a time",
    "correlations": "Strength of relations",
    "prediction": "Training a prediction model",
    "survival": "Survival curves",
    "replication": "Repeating analyses",
    "groups": "Use across groups",
}
"""The uses that the private evaluation gives a verdict for, by their short names: those of [evaluation.thresholds]."""
MOST_ROWS = 10**10
MOST_CELLS = 256
"""Combinations of levels that a table may be balanced over: each is sampled by itself."""
LARGEST_K = 1000
ANONYMOUS_ROWS = 10**7
"""A table with k or l is held in memory, column by column of its quasi-identifiers: 80 MB each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """rows: of the published table. minimum: (use, word), the least verdict that lets it go.

    balance: columns whose combinations of levels occur equally often. minimum_share: (column, share of all rows that
    each of its levels has at least). enforce_rules: rows that break a rule of the dictionary are drawn again.
    k_anonymity: least number of rows with the same quasi-identifiers; l_diversity: least number of values of each
    sensitive column among them.
    """

    rows: int
    minimum: tuple[tuple[str, str], ...] = ()
    balance: tuple[str, ...] = ()
    minimum_share: tuple[tuple[str, float], ...] = ()
    enforce_rules: bool = False
    k_anonymity: int | None = None
    l_diversity: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MOST_ROWS:
            raise StudyError("STUDY-VALUE", "release: rows is not usable")
        if any(word not in WORDS for _, word in self.minimum):
            raise StudyError("STUDY-VALUE", f"release: a verdict's word is one of {', '.join(WORDS)}")
        if not all(0 < share <= 1 for _, share in self.minimum_share):
            raise StudyError("STUDY-VALUE", "release: a minimum share lies above 0 and at most at 1")
        for bound in (self.k_anonymity, self.l_diversity):
            if bound is not None and not 2 <= bound <= LARGEST_K:
                raise StudyError("STUDY-VALUE", f"release: k_anonymity and l_diversity lie from 2 to {LARGEST_K}")

    def facts(self) -> dict[str, Any]:
        """For digest and file: settings that are not used are left out, so that older studies keep their digest."""
        out: dict[str, Any] = {"rows": self.rows}
        if self.minimum:
            out["minimum"] = dict(self.minimum)
        if self.balance:
            out["balance"] = list(self.balance)
        if self.minimum_share:
            out["minimum_share"] = dict(self.minimum_share)
        if self.enforce_rules:
            out["enforce_rules"] = True
        for key in ("k_anonymity", "l_diversity"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        return out


def how_sampled(release: Release, schema: Schema) -> tuple[str, ...]:
    """What a reader has to know about the rows, one sentence each; none for rows as the model gives them."""
    out = []
    if release.balance:
        which = "all combinations of" if len(release.balance) > 1 else "the levels of"
        out.append(
            f"Rows were balanced: {which} {' and '.join(release.balance)} occur equally often, and rows without a "
            "value there do not occur. Their shares say nothing about patients."
        )
    for name, share in release.minimum_share:
        out.append(
            f"Each level of {name} was given at least {100 * share:g} % of the rows. The shares of {name}, and of "
            "whatever goes with it, are not those of patients."
        )
    if release.enforce_rules:
        out.append(f"Rows that broke one of the dictionary's {len(schema.rules)} clinical rules were drawn again.")
    if release.k_anonymity is not None or release.l_diversity is not None:
        quasi = ", ".join(column.name for column in schema.modelled if column.role == "quasi-identifier")
        aims = []
        if release.k_anonymity is not None:
            aims.append(f"occurs in at least {release.k_anonymity} rows")
        if release.l_diversity is not None:
            sensitive = ", ".join(column.name for column in schema.modelled if column.role == "sensitive")
            aims.append(f"goes with at least {release.l_diversity} different values of each of {sensitive}")
        out.append(
            f"Each combination of {quasi} {' and '.join(aims)}. Where a combination was rarer in the synthetic table, "
            "numbers and dates stand for a wider range, by its middle, and levels were left empty. No real row was "
            "looked at for it. The ε is the privacy guarantee; this adds nothing to it."
        )
    return tuple(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """Why a table cannot be sampled so. key: the setting. code: of the error outside of a study."""

    key: str
    sentence: str
    fix: str
    code: str = "BALANCE-COLUMN"


def read(part: Table, schema: Schema) -> Release:
    """The section [release]. Raises StudyError with the line and a fix."""
    part.only("rows", "minimum", "balance", "minimum_share", "enforce_rules", "k_anonymity", "l_diversity")
    rows = part.whole("rows", least=1, most=MOST_ROWS, example="rows = 10000")
    found = Release(
        rows=rows,
        minimum=_minimum(part),
        balance=_columns(part),
        minimum_share=_shares(part),
        enforce_rules=_flag(part, "enforce_rules"),
        k_anonymity=part.whole_or_none("k_anonymity", least=2, most=LARGEST_K),
        l_diversity=part.whole_or_none("l_diversity", least=2, most=LARGEST_K),
    )
    misfit = (
        sampling_misfit(schema, rows, balance=found.balance, minimum_share=dict(found.minimum_share))
        or _rules_misfit(schema, found)
        or anonymity_misfit(schema, found)
    )
    if misfit is not None:
        raise part.error(misfit.key, misfit.sentence, misfit.fix)
    return found


def sampling_misfit(
    schema: Schema, rows: int, *, balance: Sequence[str] = (), minimum_share: Mapping[str, float] | None = None
) -> Misfit | None:
    """Why so many rows cannot be balanced so, or None. By the dictionary alone."""
    shares = dict(minimum_share or {})
    levels = {c.name: len(c.levels) for c in schema.modelled if c.levels is not None}
    for key, names in (("balance", list(balance)), ("minimum_share", list(shares))):
        for name in names:
            if name not in levels:
                there = name in [c.name for c in schema.modelled]
                why = f"{name!r} has no levels" if there else f"the table has no column {name!r}"
                return Misfit(key=key, sentence=why, fix=f"columns: {', '.join(levels)}{nearest(name, levels)}")
    if len(set(balance)) != len(balance):
        return Misfit(key="balance", sentence="a column is named twice", fix="remove one")
    both = [name for name in balance if name in shares]
    if both:
        sentence = f"{both[0]!r} is balanced and has a minimum share"
        return Misfit(key="minimum_share", sentence=sentence, fix="a balanced column needs no minimum share")
    for name, share in shares.items():
        if not 0 < share <= 1 or share * levels[name] > 1 + 1e-12:
            sentence = f"{levels[name]} levels of {name!r} cannot have a share of {share:g} each"
            most = math.floor(1000 / levels[name]) / 1000
            return Misfit(
                key="minimum_share", sentence=sentence, fix=f"{name} = {most:g} or less", code="BALANCE-SHARE"
            )
    cells = math.prod(levels[name] for name in (*balance, *shares))
    if cells > MOST_CELLS:
        fix = "name fewer columns, or columns with fewer levels"
        key = "balance" if balance else "minimum_share"
        sentence = f"{cells} combinations of levels, {MOST_CELLS} at most"
        return Misfit(key=key, sentence=sentence, fix=fix, code="BALANCE-CELLS")
    if (balance or shares) and cells > rows:
        key = "balance" if balance else "minimum_share"
        sentence = f"{cells} combinations of levels in {rows} rows"
        return Misfit(key=key, sentence=sentence, fix=f"rows = {cells} or more", code="BALANCE-ROWS")
    return None


def anonymity_misfit(schema: Schema, found: Release) -> Misfit | None:
    """Why the quasi-identifiers cannot be coarsened to k and l, or None. By the dictionary alone."""
    k, diverse = found.k_anonymity, found.l_diversity
    if k is None and diverse is None:
        return None
    key = "k_anonymity" if k is not None else "l_diversity"
    quasi = [column for column in schema.modelled if column.role == "quasi-identifier"]
    if not quasi:
        fix = 'give "role": "quasi-identifier" to the columns that a stranger may know'
        return Misfit(key=key, sentence="the dictionary names no quasi-identifier", fix=fix)
    stuck = [column.name for column in quasi if column.required and column.levels is not None]
    if stuck:
        sentence = f"{stuck[0]!r} is required, so that a rare level cannot be left empty"
        return Misfit(key=key, sentence=sentence, fix=f'"required": false for {stuck[0]!r} in the dictionary')
    if found.rows > ANONYMOUS_ROWS:
        sentence = f"{found.rows:,} rows are too many to be compared with one another"
        return Misfit(key=key, sentence=sentence, fix=f"rows = {ANONYMOUS_ROWS} or less, or leave {key} out")
    touched = [column.name for column in quasi if column.name in (*found.balance, *dict(found.minimum_share))]
    if touched:
        sentence = f"{touched[0]!r} is a quasi-identifier, and leaving rare ones empty would undo its balance"
        return Misfit(key=key, sentence=sentence, fix=f"leave {key} or the balance of {touched[0]!r} out")
    if k is not None and found.rows < k:
        sentence = f"{found.rows} rows cannot be alike in groups of {k}"
        return Misfit(key=key, sentence=sentence, fix=f"k_anonymity = {found.rows} or less")
    if diverse is not None:
        sensitive = [column for column in schema.modelled if column.role == "sensitive"]
        if not sensitive:
            fix = 'give "role": "sensitive" to the columns that shall differ among such rows'
            return Misfit(key="l_diversity", sentence="the dictionary names no sensitive column", fix=fix)
        few = [column for column in sensitive if column.levels is not None and len(column.levels) < diverse]
        if few:
            sentence = f"{few[0].name!r} has {len(few[0].levels or ())} levels"
            return Misfit(key="l_diversity", sentence=sentence, fix="a smaller l_diversity, or leave it out")
    return None


def _rules_misfit(schema: Schema, found: Release) -> Misfit | None:
    """A rule that forbids a combination which shall be balanced: better found now than when all rows are due."""
    if not found.enforce_rules:
        return None
    if not schema.rules:
        return Misfit(
            key="enforce_rules", sentence="the dictionary states no rules", fix='add "rules" to it, or remove the line'
        )
    for rule in schema.rules:
        if not isinstance(rule, IfThen) or not set(rule.columns) <= set(found.balance):
            continue
        if not all(condition.levels for condition in (*rule.given, *rule.then)):
            continue
        for levels in itertools.product(*(schema.column(name).levels or () for name in rule.columns)):
            row = dict(zip(rule.columns, levels, strict=True))
            given, then = (all(row[c.column] in c.levels for c in part) for part in (rule.given, rule.then))
            if given and not then:
                words = ", ".join(f"{name} = {level}" for name, level in row.items())
                sentence = f"rows with {words} shall be as many as others, and the rule {rule.name!r} forbids them"
                return Misfit(key="balance", sentence=sentence, fix="balance one of these columns only")
    return None


def _minimum(part: Table) -> tuple[tuple[str, str], ...]:
    given = _mapping(part, "minimum", 'minimum = {prediction = "usable with care"}')
    names = {name.lower(): name for name in USES.values()} | USES
    out: dict[str, str] = {}
    for use, word in given.items():
        name = names.get(use, names.get(use.strip().lower(), ""))
        if not name or name in out:
            # A use without a verdict would stop the release, after everybody has answered: better said now.
            why = f"the use {use!r} is named twice" if name else f"there is no verdict for the use {use!r}"
            raise part.error("minimum", why, f"uses: {', '.join(USES)}{nearest(use, names)}")
        if word not in WORDS or not isinstance(word, str):
            fix = nearest(str(word), WORDS)
            known = ", ".join(f'"{known}"' for known in WORDS)
            raise part.error("minimum", f"{word!r} for {use!r} is not a verdict's word", f"{known}{fix}")
        out[name] = word
    return tuple(sorted(out.items()))


def _columns(part: Table) -> tuple[str, ...]:
    if isinstance(part.data.get("balance"), str):
        return (part.text("balance", example='balance = "died"'),)
    return part.texts("balance")


def _shares(part: Table) -> tuple[tuple[str, float], ...]:
    example = "minimum_share = {grade = 0.05}"
    given = _mapping(part, "minimum_share", example)
    for name, share in given.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise part.error("minimum_share", f"the share of {name!r} does not lie above 0 and at most at 1", example)
    return tuple(sorted((str(name), float(share)) for name, share in given.items()))


def _mapping(part: Table, key: str, example: str) -> dict[str, Any]:
    value = part.data.get(key, {})
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise part.error(key, f"{key} is not a table of names with values", example, code="STUDY-TYPE")
    return dict(value)


def _flag(part: Table, key: str) -> bool:
    value = part.data.get(key, False)
    if not isinstance(value, bool):
        raise part.error(key, f"{key} is true or false", f"{key} = true", code="STUDY-TYPE")
    return value

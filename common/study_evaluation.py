"""What a study asks of its held-out patients: `[evaluation]` of study.toml, checked against the dictionary.

Which groups, survival curve and analyses are judged is agreed before anything is run, as are the thresholds of the
verdicts: nobody chooses them by looking at the result. Without a setting, a public rule on the dictionary's roles
decides (`groups_of`, `survival_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from cohortium.common.errors import StudyError
from cohortium.common.schema import Column, Schema
from cohortium.common.toml_reader import Table

LARGEST_EPSILON = 100.0
GROUPS_AT_MOST = 6
GROUP_LEVELS_AT_MOST = 60
RULE_LEVELS_AT_MOST = 12
"""Levels of a column that the public rule takes as groups without being told."""
VALUES_AT_MOST = 20
"""Whole numbers in a range that counts as a list of values."""
ARMS_AT_MOST = 6
ANALYSES_AT_MOST = 6
TERMS_AT_MOST = 12
THRESHOLDS: dict[str, tuple[float, float]] = {
    "columns": (0.02, 0.06),
    "correlations": (0.02, 0.05),
    "prediction": (0.03, 0.08),
    "survival": (0.03, 0.08),
    "replication": (0.1, 0.3),
    "groups": (0.05, 0.1),
}
"""Use -> (good, with care): how far the figure may be from its reference, in the figure's own unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivalSpec:
    """A curve: time (a number), event (a column with levels) and the level that means it happened; arm or None."""

    time: str
    event: str
    level: str
    arm: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisSpec:
    """A regression whose conclusions are compared. outcome and level: of a logistic one; of a Cox regression the
    survival section gives time and event. terms: column names."""

    name: str
    model: Literal["logistic", "cox"]
    terms: tuple[str, ...]
    outcome: str | None = None
    level: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """epsilon: budget of the held-out patients' answers. holdout: their share of all patients.

    expected_auc: what a model of the target should reach, by the literature; without it no table is "good" to train on.
    attack: training patients are asked how near they lie to the table, against held-out ones; charged to training.
    groups: columns whose levels are compared; None: by the public rule. survival, analyses: what the study declares.
    thresholds: (good, with care) by use, where they differ from THRESHOLDS.
    """

    epsilon: float
    holdout: float
    groups: tuple[str, ...] | None = None
    survival: SurvivalSpec | None = None
    analyses: tuple[AnalysisSpec, ...] = ()
    thresholds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    attack: bool = False
    expected_auc: float | None = None

    def __post_init__(self) -> None:
        for what, value, most in (
            ("evaluation epsilon", self.epsilon, LARGEST_EPSILON),
            ("holdout", self.holdout, 0.5),
        ):
            if not 0.0 < value <= most:  # NaN fails too
                raise StudyError("STUDY-VALUE", f"{what} = {value} must be above 0 and at most {most:g}")

    def threshold(self, use: str) -> tuple[float, float]:
        return self.thresholds.get(use, THRESHOLDS[use])

    def facts(self) -> dict[str, Any]:
        """For digest and file: only what is set, so that a study without these settings keeps its digest."""
        out: dict[str, Any] = {"epsilon": self.epsilon, "holdout": self.holdout}
        if self.groups is not None:
            out["groups"] = list(self.groups)
        if self.survival is not None:
            out["survival"] = {k: v for k, v in asdict(self.survival).items() if v is not None}
        if self.analyses:
            out["analyses"] = [
                {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(a).items() if v is not None}
                for a in self.analyses
            ]
        if self.thresholds:
            out["thresholds"] = {use: list(pair) for use, pair in sorted(self.thresholds.items())}
        if self.attack:
            out["attack"] = True
        if self.expected_auc is not None:
            out["expected_auc"] = self.expected_auc
        return out


def few_values(column: Column) -> tuple[str, ...] | None:
    """The values that a column can take, as texts: its levels, or the whole numbers of a short range; else None."""
    if column.levels is not None:
        return column.levels
    if column.kind != "integer" or column.minimum is None or column.maximum is None:
        return None
    low, high = int(column.minimum), int(column.maximum)
    whole = (column.resolution or 1.0) == 1.0 and high - low < VALUES_AT_MOST
    return tuple(str(v) for v in range(low, high + 1)) if whole else None


def groups_of(evaluation: Evaluation, schema: Schema) -> tuple[Column, ...]:
    """Columns whose groups are compared: those the study names, else sites and quasi-identifiers with few levels."""
    columns = {column.name: column for column in schema.modelled}
    if evaluation.groups is not None:
        return tuple(columns[name] for name in evaluation.groups)
    by_rule = (
        c
        for c in columns.values()
        if c.role in ("site", "quasi-identifier") and c.levels is not None and 2 <= len(c.levels) <= RULE_LEVELS_AT_MOST
    )
    return tuple(by_rule)[:GROUPS_AT_MOST]


def survival_of(evaluation: Evaluation, schema: Schema) -> SurvivalSpec | None:
    """The curve: what the study names, else the dictionary's only time and only event, an event of two values."""
    if evaluation.survival is not None:
        return evaluation.survival
    times = [c for c in schema.modelled if c.role == "time" and c.kind in ("integer", "number") and c.levels is None]
    events = [c for c in schema.modelled if c.role == "event" and len(few_values(c) or ()) == 2]
    if len(times) != 1 or len(events) != 1 or (times[0].minimum or 0.0) < 0:
        return None
    values = few_values(events[0]) or ()
    return SurvivalSpec(time=times[0].name, event=events[0].name, level=values[-1])


def read(part: Table, schema: Schema) -> dict[str, Any]:
    """The optional settings of `[evaluation]`, each checked against the dictionary. Raises StudyError."""
    columns = {column.name: column for column in schema.modelled}
    out: dict[str, Any] = {}
    if part.has("groups"):
        out["groups"] = _groups(part, columns)
    if part.has("attack"):
        out["attack"] = part.data["attack"]
        if type(out["attack"]) is not bool:
            raise part.error("attack", "attack is true or false", "attack = false", code="STUDY-TYPE")
    if part.has("expected_auc"):
        out["expected_auc"] = part.number("expected_auc", least=0.5, most=1.0, example="expected_auc = 0.8")
    survival = part.inner("survival")
    if survival is not None:
        out["survival"] = _survival(survival, columns)
    analyses = part.inners("analyses")
    if len(analyses) > ANALYSES_AT_MOST:
        raise part.error("analyses", f"at most {ANALYSES_AT_MOST} analyses", "remove some: each takes budget")
    out["analyses"] = tuple(_analysis(a, columns, out.get("survival")) for a in analyses)
    names = [a.name for a in out["analyses"]]
    if len(set(names)) < len(names):
        raise part.error("analyses", "two analyses have the same name", "give each a name of its own")
    thresholds = part.inner("thresholds")
    if thresholds is not None:
        thresholds.only(*THRESHOLDS)
        out["thresholds"] = {use: _pair(thresholds, use) for use in THRESHOLDS if thresholds.has(use)}
    return out


def _groups(part: Table, columns: Mapping[str, Column]) -> tuple[str, ...]:
    names = part.texts("groups")
    if len(names) > GROUPS_AT_MOST or len(set(names)) < len(names):
        raise part.error("groups", f"at most {GROUPS_AT_MOST} different columns", 'groups = ["sex"]')
    for name in names:
        column = _column(part, "groups", name, columns)
        if column.levels is None or len(column.levels) > GROUP_LEVELS_AT_MOST:
            raise part.error(
                "groups", f"{name!r} has no list of at most {GROUP_LEVELS_AT_MOST} levels", "name columns with levels"
            )
    return names


def _survival(part: Table, columns: Mapping[str, Column]) -> SurvivalSpec:
    part.only("time", "event", "level", "arm")
    time = _column(part, "time", part.text("time", example='time = "days"'), columns)
    if time.levels is not None or time.kind not in ("integer", "number") or (time.minimum or 0.0) < 0:
        raise part.error("time", f"{time.name!r} is not a number from 0 upwards", "name the column of the times")
    event = _column(part, "event", part.text("event", example='event = "death"'), columns)
    level = _level(part, event)
    arm = part.text_or_none("arm")
    if time.name == event.name or arm in (time.name, event.name):
        raise part.error("event", "time, event and arm are different columns", 'event = "death"')
    if arm is not None:
        levels = _column(part, "arm", arm, columns).levels
        if levels is None or not 2 <= len(levels) <= ARMS_AT_MOST:
            raise part.error("arm", f"{arm!r} has not 2 to {ARMS_AT_MOST} levels", "name a column of groups, or none")
    return SurvivalSpec(time=time.name, event=event.name, level=level, arm=arm)


def _analysis(part: Table, columns: Mapping[str, Column], survival: SurvivalSpec | None) -> AnalysisSpec:
    part.only("name", "model", "terms", "outcome", "level")
    name = part.text("name", example='name = "age and death"')
    model = cast(Literal["logistic", "cox"], part.choice("model", ("logistic", "cox")))
    terms = part.texts("terms")
    if not 1 <= len(terms) <= TERMS_AT_MOST or len(set(terms)) < len(terms):
        raise part.error("terms", f"1 to {TERMS_AT_MOST} different columns", 'terms = ["age", "sex"]')
    for term in terms:
        _column(part, "terms", term, columns)
    if model == "cox":
        if survival is None:
            raise part.error("model", "a Cox regression needs a survival outcome", "add [evaluation.survival]")
        if part.has("outcome") or part.has("level"):
            raise part.error("outcome", "a Cox regression takes [evaluation.survival]", "remove outcome and level")
        own = (survival.time, survival.event)
        outcome, level = None, None
    else:
        column = _column(part, "outcome", part.text("outcome", example='outcome = "death"'), columns)
        level, outcome = _level(part, column), column.name
        own = (outcome, outcome)
    if set(own) & set(terms):
        raise part.error("terms", "the outcome is among its own terms", "remove it from terms")
    return AnalysisSpec(name=name, model=model, terms=terms, outcome=outcome, level=level)


def _level(part: Table, column: Column) -> str:
    """The level that counts as "yes": named, or the last of two."""
    levels = few_values(column)
    if levels is None:
        raise part.error("level", f"{column.name!r} has no list of values", "name a column with levels")
    if not part.has("level") and len(levels) == 2:
        return levels[-1]
    level = part.text("level", example=f'level = "{levels[-1]}"')
    if level not in levels:
        raise part.error("level", f"{column.name!r} has no level {level!r}", f"one of {', '.join(levels[:12])}")
    return level


def _column(part: Table, key: str, name: str, columns: Mapping[str, Column]) -> Column:
    if name not in columns:
        raise part.error(key, f"the study models no column {name!r}", f"one of {', '.join(list(columns)[:12])}")
    return columns[name]


def _pair(part: Table, use: str) -> tuple[float, float]:
    value = part.data[use]
    fine = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if not fine or not 0 <= value[0] <= value[1] <= 1:
        good, care = THRESHOLDS[use]
        raise part.error(use, "two numbers from 0 to 1, the smaller first", f"{use} = [{good}, {care}]")
    return float(value[0]), float(value[1])

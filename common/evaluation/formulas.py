"""What an analyst types, as estimands: "age", "death ~ age + sex", "time, event ~ age + arm".

age                    the mean of a number, or the share of the last level of a column with two
stage=III              the share of one level; as an outcome, that level against all others
arm[control]           a covariate with the level that the others are held against (else the dictionary's first)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cohortium.common.encoding import Grid, LevelGrid
from cohortium.common.errors import UsageError
from cohortium.common.evaluation.coded import TimeToEvent, label_of_code, number_of_code
from cohortium.common.evaluation.estimands import Covariate, Mean, Regression
from cohortium.common.schema import Column

_COVARIATE = re.compile(r"(?P<name>[^\[\]]+?)\s*(?:\[(?P<reference>[^\[\]]+)\])?")
_OUTCOME = re.compile(r"(?P<name>[^=]+?)\s*(?:=\s*(?P<level>.+))?")


class Formulas:
    """columns: the modelled columns of the dictionary; grids: theirs."""

    def __init__(self, columns: Sequence[Column], grids: Sequence[Grid]) -> None:
        self._columns, self._grids = tuple(columns), tuple(grids)
        self._index = {column.name: i for i, column in enumerate(columns)}

    def mean(self, text: str) -> Mean:
        """Raises UsageError with the fix, as all of these."""
        name, level = self._parts(_OUTCOME, text, "--mean age, or --mean stage=III")
        at = self._find(name)
        grid = self._grids[at]
        if isinstance(grid, LevelGrid):
            label, level = self._label(at, level)
            numbers = np.where(label < 0, np.nan, label.astype(float))
            return Mean(text=f"{name}={level}", column=at, numbers=numbers, name=f"share of {name}: {level}")
        if level is not None:
            raise _wrong(f"{name!r} is a number: a mean needs no level", f"--mean {name}")
        self._not_a_date(at)
        unit = self._columns[at].unit
        return Mean(text=name, column=at, numbers=number_of_code(grid), name=f"mean {name}", unit=unit)

    def logistic(self, text: str) -> Regression:
        left, covariates = self._sides(text, "--logistic 'death ~ age + sex'")
        if "," in left:
            raise _wrong("a logistic regression has one outcome", "a time and an event belong to --cox")
        name, level = self._parts(_OUTCOME, left, "--logistic 'death ~ age + sex', or 'stage=III ~ age'")
        at = self._find(name)
        label, level = self._label(at, level)
        made = self._covariates(covariates, {at})
        return Regression(text=f"{name}={level} ~ {_shown(made)}", outcome=(at, label), covariates=made)

    def cox(self, text: str) -> Regression:
        left, covariates = self._sides(text, "--cox 'time, event ~ age + arm'")
        sides = [side.strip() for side in left.split(",")]
        if len(sides) != 2 or not all(sides):
            raise _wrong("a Cox regression needs a time and an event", "--cox 'time, event ~ age + arm'")
        at = self._find(sides[0])
        if isinstance(self._grids[at], LevelGrid) or self._columns[at].kind not in ("integer", "number"):
            numbers = [c.name for c in self._columns if not c.categorical and c.kind in ("integer", "number")]
            raise _wrong(f"the time {sides[0]!r} is not a number", "numbers: " + ", ".join(numbers))
        time = number_of_code(self._grids[at])
        if np.nanmin(time) < 0:
            raise _wrong(f"the time {sides[0]!r} may be below 0", "give its minimum as 0 in the dictionary")
        name, level = self._parts(_OUTCOME, sides[1], "--cox 'time, event ~ age', or 'time, status=dead ~ age'")
        event = self._find(name)
        if event == at:
            raise _wrong("time and event are the same column", "--cox 'time, event ~ age + arm'")
        label, level = self._label(event, level)
        made = self._covariates(covariates, {at, event})
        return Regression(
            text=f"{sides[0]}, {name}={level} ~ {_shown(made)}",
            outcome=TimeToEvent(time=(at, time), event=(event, label), unit=self._columns[at].unit),
            covariates=made,
        )

    def _find(self, name: str) -> int:
        if name not in self._index:
            raise UsageError(
                "ANALYZE-COLUMN", f"the model has no column {name!r}", hint="columns: " + ", ".join(self._index)
            )
        return self._index[name]

    def _sides(self, text: str, example: str) -> tuple[str, list[str]]:
        left, tilde, right = text.partition("~")
        terms = [term.strip() for term in right.split("+")]
        if not tilde or not left.strip() or not all(terms):
            raise _wrong(f"{text!r} is not a formula", example)
        for term in terms:
            # A column may have such a name.
            if term not in self._index and re.search(r"[*:^()|]", term):
                raise _wrong(f"{term!r}: only sums of columns are understood, no products or functions", example)
        return left.strip(), terms

    def _parts(self, form: re.Pattern[str], text: str, example: str) -> tuple[str, str | None]:
        if text.strip() in self._index:
            return text.strip(), None
        match = form.fullmatch(text.strip())
        if match is None:
            raise _wrong(f"{text!r} is not understood", example)
        first, second = match.groups()
        return first, None if second is None else second.strip().strip("'\"")

    def _label(self, at: int, level: str | None) -> tuple[np.ndarray, str]:
        """(1, 0 or −1 of each code, the level that counts as 1)."""
        column, grid = self._columns[at], self._grids[at]
        if not isinstance(grid, LevelGrid):
            values = number_of_code(grid)
            present = values[~np.isnan(values)]
            if level is None and set(present) == {0.0, 1.0}:
                return np.where(np.isnan(values), -1, values == 1).astype(np.int32), "1"
            raise _wrong(f"the outcome {column.name!r} is a number, not yes or no", "choose a column of two levels")
        if level is None:
            if len(grid.levels) != 2:
                raise _wrong(
                    f"the outcome {column.name!r} has {len(grid.levels)} levels, not two",
                    f"name the one that counts: {column.name}={grid.levels[-1]}",
                )
            level = grid.levels[1]
        return label_of_code(grid, self._level(at, level)), level

    def _level(self, at: int, level: str) -> str:
        grid = self._grids[at]
        assert isinstance(grid, LevelGrid)
        if level not in grid.levels:
            raise UsageError(
                "ANALYZE-LEVEL",
                f"{self._columns[at].name!r} has no level {level!r}",
                hint="levels: " + ", ".join(grid.levels),
            )
        return level

    def _covariates(self, terms: Sequence[str], taken: set[int]) -> tuple[Covariate, ...]:
        out, seen = [], set(taken)
        for term in terms:
            name, reference = self._parts(_COVARIATE, term, "--logistic 'death ~ age + arm[control]'")
            at = self._find(name)
            if at in seen:
                raise _wrong(f"{name!r} occurs twice in one formula", "name each column once")
            seen.add(at)
            out.append(self._covariate(at, reference))
        return tuple(out)

    def _covariate(self, at: int, reference: str | None) -> Covariate:
        column, grid = self._columns[at], self._grids[at]
        if isinstance(grid, LevelGrid):
            base = self._level(at, reference) if reference is not None else grid.levels[0]
            others = [level for level in grid.levels if level != base]
            if not others:
                raise _wrong(f"{column.name!r} has one level only", "leave it out")
            table = np.zeros((grid.size, len(others)))
            table[[grid.levels.index(level) for level in others], range(len(others))] = 1.0
            table[grid.missing] = np.nan
            return Covariate(
                column=at, table=table, names=tuple(f"{column.name}: {level} (against {base})" for level in others)
            )
        if reference is not None:
            raise _wrong(f"{column.name!r} is a number and has no reference level", column.name)
        self._not_a_date(at)
        per = f"per 1 {column.unit}".strip()
        return Covariate(column=at, table=number_of_code(grid)[:, None], names=(f"{column.name} ({per})",))

    def _not_a_date(self, at: int) -> None:
        column = self._columns[at]
        if column.kind in ("date", "datetime"):
            raise _wrong(f"{column.name!r} is a date", "use a number, such as days since a start")


def _shown(covariates: Sequence[Covariate]) -> str:
    """The formula's right side with every reference named, so that the same analysis has one text."""
    parts = []
    for covariate in covariates:
        name, _, rest = covariate.names[0].rpartition(" (against ")
        if name:
            parts.append(f"{name.rpartition(': ')[0]}[{rest[:-1]}]")
        else:
            parts.append(covariate.names[0].rpartition(" (per ")[0])
    return " + ".join(parts)


def _wrong(sentence: str, hint: str) -> UsageError:
    return UsageError("ANALYZE-FORMULA", sentence, hint=hint)

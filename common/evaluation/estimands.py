"""What an analyst asks of a table: a mean, a logistic or a Cox regression, in natural units, on fine codes.

Numbers are per unit, levels against a named reference, rows with a missing value in any column of the analysis are
left out, as statistical packages do. All is computed on synthetic rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.evaluation.coded import TimeToEvent
from cohortium.common.evaluation.regression import CannotFit, fit_cox, fit_logistic


@dataclass(frozen=True, kw_only=True, slots=True)
class Covariate:
    """One column of a regression. table: float64 [fine codes, k], NaN rows where the code is missing; names [k]."""

    column: int
    table: np.ndarray = field(repr=False)
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """values, errors: float64 [k], in the order of the estimand's names, with the errors that hold for as many
    patients as rows; intercept: of a logistic regression; rows: used."""

    values: np.ndarray
    errors: np.ndarray
    intercept: float
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean of a number, or the share of a level. numbers: float64 [fine codes], NaN where missing."""

    text: str
    column: int
    numbers: np.ndarray = field(repr=False)
    name: str
    unit: str = ""

    @property
    def kind(self) -> str:
        return "mean"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def columns(self) -> frozenset[int]:
        return frozenset({self.column})

    @property
    def outcomes(self) -> frozenset[int]:
        return frozenset()

    def used(self, codes: np.ndarray) -> np.ndarray:
        return np.asarray(~np.isnan(self.numbers[codes[:, self.column]]))

    def fit(self, codes: np.ndarray) -> Fitted:
        """Raises CannotFit where every row is missing."""
        values = self.numbers[codes[self.used(codes), self.column]]
        if len(values) < 2:
            raise CannotFit("no row has a value")
        error = float(values.std(ddof=1)) / len(values) ** 0.5
        return Fitted(
            values=np.array([values.mean()]), errors=np.array([error]), intercept=float("nan"), rows=len(values)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Regression:
    """outcome: (column, int32 [fine codes] -> 1, 0, −1 missing) for a logistic regression, or a time to an event."""

    text: str
    outcome: tuple[int, np.ndarray] | TimeToEvent = field(repr=False)
    covariates: tuple[Covariate, ...]

    @property
    def kind(self) -> str:
        return "cox" if isinstance(self.outcome, TimeToEvent) else "logistic"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for covariate in self.covariates for name in covariate.names)

    @property
    def outcomes(self) -> frozenset[int]:
        if isinstance(self.outcome, TimeToEvent):
            return frozenset({self.outcome.time[0], self.outcome.event[0]})
        return frozenset({self.outcome[0]})

    @property
    def columns(self) -> frozenset[int]:
        return self.outcomes | {covariate.column for covariate in self.covariates}

    def design(self, codes: np.ndarray) -> np.ndarray:
        """float64 [rows, k], NaN where a value is missing."""
        return np.column_stack([c.table[codes[:, c.column]] for c in self.covariates])

    def used(self, codes: np.ndarray) -> np.ndarray:
        """Rows that are complete, bool [rows]."""
        known = ~np.isnan(self.design(codes)).any(axis=1)
        if isinstance(self.outcome, TimeToEvent):
            time, event = self.outcome.time, self.outcome.event
            known &= ~np.isnan(time[1][codes[:, time[0]]]) & (event[1][codes[:, event[0]]] >= 0)
        else:
            known &= self.outcome[1][codes[:, self.outcome[0]]] >= 0
        return np.asarray(known)

    def fit(self, codes: np.ndarray) -> Fitted:
        """Maximum likelihood. Raises CannotFit, and says which term does not vary."""
        rows = codes[self.used(codes)]
        if not len(rows):
            raise CannotFit("no row is complete")
        x = self.design(rows)
        # Standardised inside, so that the solver's limits do not depend on the units.
        centre, scale = x.mean(axis=0), x.std(axis=0)
        for name, sd in zip(self.names, scale, strict=True):
            if not sd > 0:
                raise CannotFit(f"{name} is the same in every row")
        z = (x - centre) / scale
        if isinstance(self.outcome, TimeToEvent):
            time, event = self.outcome.time, self.outcome.event
            fit, _ = fit_cox(z, time[1][rows[:, time[0]]], (event[1][rows[:, event[0]]] == 1).astype(float))
            beta, errors, intercept = fit.beta, fit.standard_errors, float("nan")
        else:
            y = (self.outcome[1][rows[:, self.outcome[0]]] == 1).astype(float)
            fit = fit_logistic(np.column_stack([np.ones(len(z)), z]), y)
            beta, errors = fit.beta[1:], fit.standard_errors[1:]
            intercept = float(fit.beta[0] - (centre / scale) @ beta)
        return Fitted(values=beta / scale, errors=errors / scale, intercept=intercept, rows=len(rows))


Estimand = Mean | Regression


def packs(estimands: Sequence[Estimand]) -> list[tuple[Estimand, ...]]:
    """Estimands that one replayed world can serve: no regression's outcome, drawn anew there, is a column of another's.

    Their order is kept; the first pack that has room takes an estimand.
    """
    out: list[list[Estimand]] = []
    for one in estimands:
        for pack in out:
            if all(not (one.outcomes & other.columns or other.outcomes & one.columns) for other in pack):
                pack.append(one)
                break
        else:
            out.append([one])
    return [tuple(pack) for pack in out]

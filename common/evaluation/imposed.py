"""A world whose truth is known: a population of synthetic rows on which the analyst's own model holds exactly.

Covariates, and every column that no regression explains, are the population's rows as they are. A regression's outcome
is drawn anew from its model at chosen coefficients, given the row's covariates: Bernoulli for a logistic regression;
for a Cox regression an event time from the population's baseline hazard and a censoring time from its censoring, the
earlier one seen. What a generator loses of such an outcome is then visible, because the coefficients are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from cohortium.common.evaluation.coded import TimeToEvent
from cohortium.common.evaluation.estimands import Estimand, Regression


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """codes: the population, int32 [rows, columns]; estimands: a pack of them.

    A draw imposes the outcomes of the pack's regressions; means are the population's own.
    """

    codes: np.ndarray = field(repr=False)
    estimands: tuple[Estimand, ...]
    _laws: tuple[_Binary | _Survival | None, ...] = field(repr=False)

    @classmethod
    def of(cls, codes: np.ndarray, estimands: Sequence[Estimand]) -> World:
        """Raises CannotFit where a regression has no fit on the population (its baseline comes from there)."""
        laws: list[_Binary | _Survival | None] = []
        for one in estimands:
            if not isinstance(one, Regression):
                laws.append(None)
            elif isinstance(one.outcome, TimeToEvent):
                laws.append(_Survival.of(one, one.outcome, codes))
            else:
                laws.append(_Binary.of(one, one.outcome, codes))
        return cls(codes=codes, estimands=tuple(estimands), _laws=tuple(laws))

    def draw(self, patients: int, truths: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Codes of so many people, int32 [patients, columns]; truths: of each estimand, coefficients float64 [k]
        (not looked at for a mean)."""
        out = self.codes[rng.integers(len(self.codes), size=patients)].copy()
        for law, truth in zip(self._laws, truths, strict=True):
            if law is not None:
                law.impose(out, truth, rng)
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class _Binary:
    """yes, no: codes of the outcome and their probabilities, as they occur in the population."""

    regression: Regression
    column: int
    centre: np.ndarray
    share: float
    yes: tuple[np.ndarray, np.ndarray]
    no: tuple[np.ndarray, np.ndarray]
    predictor: np.ndarray  # centred design of the population's complete rows, to hold the share of events

    @classmethod
    def of(cls, regression: Regression, outcome: tuple[int, np.ndarray], codes: np.ndarray) -> _Binary:
        regression.fit(codes)
        rows = codes[regression.used(codes)]
        column, label = outcome
        x = regression.design(rows)
        return cls(
            regression=regression,
            column=column,
            centre=x.mean(axis=0),
            share=float((label[rows[:, column]] == 1).mean()),
            yes=_occurring(rows[:, column], label == 1),
            no=_occurring(rows[:, column], label == 0),
            predictor=x - x.mean(axis=0),
        )

    def impose(self, codes: np.ndarray, beta: np.ndarray, rng: np.random.Generator) -> None:
        used = self.regression.used(codes)
        level = _intercept(self.predictor @ beta, self.share)
        risk = special.expit(level + (self.regression.design(codes[used]) - self.centre) @ beta)
        happened = rng.random(len(risk)) < risk
        drawn = np.where(happened, _choose(self.yes, len(risk), rng), _choose(self.no, len(risk), rng))
        codes[used, self.column] = drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class _Survival:
    """codes: of the population's distinct times, ascending [K]; hazard: cumulated baseline at the covariates' centre
    [K]; kept: share not censored after each time [K]; yes, no: codes of the event and their probabilities."""

    regression: Regression
    columns: tuple[int, int]
    centre: np.ndarray
    codes: np.ndarray
    hazard: np.ndarray
    kept: np.ndarray
    yes: tuple[np.ndarray, np.ndarray]
    no: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, regression: Regression, outcome: TimeToEvent, codes: np.ndarray) -> _Survival:
        beta = regression.fit(codes).values
        rows = codes[regression.used(codes)]
        (time_column, number), (event_column, label) = outcome.time, outcome.event
        time, event = number[rows[:, time_column]], label[rows[:, event_column]] == 1
        x = regression.design(rows)
        centre = x.mean(axis=0)
        times, first = np.unique(time, return_index=True)
        at = np.searchsorted(times, time)
        # Breslow's increments at the centre, and Kaplan–Meier's censoring: who has an event at a time is gone before.
        risk = np.exp(np.clip((x - centre) @ beta, -50.0, 50.0))
        alive = np.cumsum(np.bincount(at, weights=risk, minlength=len(times))[::-1])[::-1]
        events = np.bincount(at, weights=event, minlength=len(times))
        leaving = np.bincount(at, minlength=len(times))
        present = np.cumsum(leaving[::-1])[::-1] - events
        lost = leaving - events
        kept = np.cumprod(1.0 - np.divide(lost, present, out=np.zeros(len(times)), where=present > 0))
        kept[-1] = 0.0
        return cls(
            regression=regression,
            columns=(time_column, event_column),
            centre=centre,
            codes=rows[first, time_column],
            hazard=np.cumsum(events / alive),
            kept=kept,
            yes=_occurring(rows[:, event_column], label == 1),
            no=_occurring(rows[:, event_column], label == 0),
        )

    def impose(self, codes: np.ndarray, beta: np.ndarray, rng: np.random.Generator) -> None:
        used = self.regression.used(codes)
        risk = np.exp(np.clip((self.regression.design(codes[used]) - self.centre) @ beta, -50.0, 50.0))
        count = len(risk)
        # Positions among the times; the end of the list: no event while anybody was watched.
        event = np.searchsorted(self.hazard, rng.exponential(size=count) / risk)
        censored = np.searchsorted(-self.kept, -rng.random(count), side="left").clip(0, len(self.codes) - 1)
        happened = event <= censored
        codes[used, self.columns[0]] = self.codes[np.where(happened, event, censored).clip(0, len(self.codes) - 1)]
        codes[used, self.columns[1]] = np.where(happened, _choose(self.yes, count, rng), _choose(self.no, count, rng))


def _occurring(codes: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes among `wanted`, their probabilities) as they occur; the first wanted one where none occurs."""
    counts = np.bincount(codes, minlength=len(wanted)) * wanted
    if not counts.sum():
        counts = (np.arange(len(wanted)) == int(np.argmax(wanted))).astype(float)
    found = np.flatnonzero(counts)
    return found.astype(np.int32), counts[found] / counts.sum()


def _choose(law: tuple[np.ndarray, np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    codes, probability = law
    if len(codes) == 1:
        return np.full(count, codes[0])
    return codes[np.searchsorted(np.cumsum(probability), rng.random(count)).clip(0, len(codes) - 1)]


def _intercept(predictor: np.ndarray, share: float) -> float:
    """The level at which the mean risk is `share`, by bisection."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if special.expit(middle + predictor).mean() < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2

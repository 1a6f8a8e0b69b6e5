"""Imposed outcomes follow the analyst's model at the chosen truth, and nothing else of the population moves."""

from __future__ import annotations

import numpy as np
import pytest
from known_effects import AGE, ARM, DEAD, EVENT, SEEN, STAGE, TIME, coded, formulas

from cohortium.common.evaluation.coded import number_of_code
from cohortium.common.evaluation.imposed import World

READ, GRIDS, _ = formulas()
POPULATION = coded(20_000, seed=5, missing=0.05)
DEATH, SURVIVAL = READ.logistic("dead ~ age + arm"), READ.cox("time, event ~ age + stage")
TRUTHS = (np.array([0.02, 0.8]), np.array([-0.01, 0.3, -0.6]))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    world = World.of(POPULATION, (DEATH, SURVIVAL, READ.mean("age")))
    return world.draw(60_000, (*TRUTHS, np.zeros(1)), np.random.default_rng(6))


@pytest.mark.parametrize("position", [0, 1])
def test_an_imposed_outcome_has_the_chosen_coefficients(drawn: np.ndarray, position: int) -> None:
    """Within 4 standard errors; the population's own coefficients are more than 10 away."""
    one, truth = (DEATH, SURVIVAL)[position], TRUTHS[position]
    fit, before = one.fit(drawn), one.fit(POPULATION)
    assert (np.abs(fit.values - truth) < 4 * fit.errors).all()
    assert np.abs((before.values - truth) / fit.errors).max() > 10


def test_the_share_of_outcomes_and_the_censoring_stay(drawn: np.ndarray) -> None:
    def share(codes: np.ndarray) -> float:
        rows = codes[DEATH.used(codes)]
        return float((rows[:, DEAD] == 1).mean())

    assert share(drawn) == pytest.approx(share(POPULATION), abs=0.012)

    for month in (10.0, 20.0, 35.0):
        assert watched(drawn, month) == pytest.approx(watched(POPULATION, month), abs=0.02)


def watched(codes: np.ndarray, month: float) -> float:
    """Kaplan–Meier of the censoring at a month: who has an event in it is gone before."""
    time, event = number_of_code(GRIDS[TIME])[codes[:, TIME]], codes[:, EVENT] == 1
    times, at = np.unique(time, return_inverse=True)
    leaving, events = np.bincount(at), np.bincount(at, weights=event)
    present = np.cumsum(leaving[::-1])[::-1] - events
    kept = np.cumprod(1 - (leaving - events) / np.maximum(present, 1))
    return float(kept[np.searchsorted(times, month, side="right") - 1])


def test_times_that_many_share_stay_as_they_were() -> None:
    """At the population's own coefficients a tied population comes back: shares of events, and who was watched."""
    tied = POPULATION.copy()
    number = number_of_code(GRIDS[TIME])
    decade = np.minimum(np.floor(number[tied[:, TIME]] / 10) * 10 + 5, 35)
    tied[:, TIME] = np.searchsorted(number[:-1], decade - 1e-6)
    codes = World.of(tied, (SURVIVAL,)).draw(60_000, (SURVIVAL.fit(tied).values,), np.random.default_rng(2))
    for month in (5.0, 15.0, 25.0):
        assert watched(codes, month) == pytest.approx(watched(tied, month), abs=0.015)
        at = [rows[np.isclose(number[rows[:, TIME]], month, atol=0.11)] for rows in (codes, tied)]
        happened = [float((rows[:, EVENT] == 1).mean()) for rows in at]
        # Breslow's hazard h is spent continuously: 1 − exp(−h) of those at risk, a little less than h at large steps.
        assert happened[0] == pytest.approx(happened[1], abs=0.08)


def test_all_but_the_outcomes_is_the_population_as_it_is(drawn: np.ndarray) -> None:
    rows = {tuple(row) for row in POPULATION[:, [AGE, STAGE, ARM, SEEN]].tolist()}
    assert {tuple(row) for row in drawn[:, [AGE, STAGE, ARM, SEEN]].tolist()} <= rows
    gone = drawn[:, AGE] == GRIDS[AGE].missing
    assert 0.03 < gone.mean() < 0.07 and (drawn[:, DEAD] == GRIDS[DEAD].missing).mean() > 0.03


def test_a_world_without_regressions_is_a_draw_of_the_population() -> None:
    world = World.of(POPULATION, ())
    codes = world.draw(500, (), np.random.default_rng(0))
    rows = {tuple(row) for row in POPULATION.tolist()}
    assert all(tuple(row) in rows for row in codes.tolist())


def test_an_outcome_of_several_levels_keeps_the_mix_of_the_others() -> None:
    third = READ.logistic("stage=III ~ age")
    codes = World.of(POPULATION, (third,)).draw(40_000, (np.array([0.05]),), np.random.default_rng(1))
    assert abs(third.fit(codes).values[0] - 0.05) < 4 * third.fit(codes).errors[0]
    stage = codes[(codes[:, STAGE] < 3) & (codes[:, AGE] != GRIDS[AGE].missing), STAGE]
    mix = POPULATION[POPULATION[:, STAGE] < 2, STAGE]
    assert (stage[stage < 2] == 0).mean() == pytest.approx((mix == 0).mean(), abs=0.015)

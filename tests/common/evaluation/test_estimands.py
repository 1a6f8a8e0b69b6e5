"""Estimands: what a formula means, that a fit is the textbook one in natural units, which analyses share a world."""

from __future__ import annotations

import numpy as np
import pytest
from known_effects import AGE, ARM, DEAD, EVENT, STAGE, TIME, coded, formulas

from cohortium.common.encoding import NumberGrid
from cohortium.common.errors import UsageError
from cohortium.common.evaluation.coded import number_of_code
from cohortium.common.evaluation.estimands import Estimand, packs
from cohortium.common.evaluation.regression import CannotFit, fit_cox, fit_logistic

READ, GRIDS, _ = formulas()
ROWS = coded(3000, seed=2, missing=0.1)


def numbers(column: int) -> np.ndarray:
    return number_of_code(GRIDS[column])[ROWS[:, column]]


def test_a_mean_is_that_of_the_rows_that_have_one() -> None:
    fit = READ.mean("age").fit(ROWS)
    age = numbers(AGE)
    known = age[~np.isnan(age)]
    assert fit.values == pytest.approx(known.mean(), abs=1e-12) and fit.rows == len(known)
    assert fit.errors == pytest.approx(known.std(ddof=1) / np.sqrt(len(known)), abs=1e-12)
    share = READ.mean("stage=II").fit(ROWS)
    stage = ROWS[:, STAGE]
    assert share.values == pytest.approx((stage == 1).sum() / (stage < 3).sum(), abs=1e-12)
    assert READ.mean("dead").text == "dead=true"


def test_a_logistic_fit_is_the_plain_one_on_complete_rows() -> None:
    one = READ.logistic("dead ~ age + stage[II]")
    age, stage, dead = numbers(AGE), ROWS[:, STAGE], ROWS[:, DEAD]
    used = ~np.isnan(age) & (stage < 3) & (dead < 2)
    x = np.column_stack([np.ones(used.sum()), age[used], stage[used] == 0, stage[used] == 2]).astype(float)
    plain = fit_logistic(x, (dead[used] == 1).astype(float))
    fit = one.fit(ROWS)
    assert one.names == ("age (per 1 year)", "stage: I (against II)", "stage: III (against II)")
    assert fit.rows == used.sum() < 2700
    assert np.append(fit.intercept, fit.values) == pytest.approx(plain.beta, abs=1e-8)
    assert fit.errors == pytest.approx(plain.standard_errors[1:], abs=1e-8)


def test_a_cox_fit_is_the_plain_one_on_complete_rows() -> None:
    one = READ.cox("time, event ~ age + arm[new]")
    used = ~np.isnan(numbers(AGE))
    x = np.column_stack([numbers(AGE)[used], ROWS[used, ARM] == 0]).astype(float)
    plain, _ = fit_cox(x, numbers(TIME)[used], (numbers(EVENT)[used] == 1).astype(float))
    fit = one.fit(ROWS)
    assert fit.values == pytest.approx(plain.beta, abs=1e-8)
    assert fit.errors == pytest.approx(plain.standard_errors, abs=1e-8)
    assert one.text == "time, event=1 ~ age + arm[new]"


def test_the_same_analysis_has_one_text() -> None:
    assert READ.logistic("dead ~ age+arm").text == READ.logistic(" dead=true  ~  age + arm[old] ").text


def test_what_cannot_be_fitted_says_which_term() -> None:
    only = ROWS[ROWS[:, STAGE] == 0]
    with pytest.raises(CannotFit, match="stage: II"):
        READ.logistic("dead ~ stage").fit(only)
    with pytest.raises(CannotFit, match="no row"):
        READ.mean("age").fit(np.where(np.arange(7) == AGE, GRIDS[AGE].missing, ROWS).astype(np.int32))


@pytest.mark.parametrize(
    ("kind", "text", "code", "fix"),
    [
        ("mean", "agee", "ANALYZE-COLUMN", "age, stage"),
        ("mean", "stage", "ANALYZE-FORMULA", "stage=III"),
        ("mean", "age=3", "ANALYZE-FORMULA", "--mean age"),
        ("mean", "seen", "ANALYZE-FORMULA", "number"),
        ("logistic", "dead", "ANALYZE-FORMULA", "death ~"),
        ("logistic", "dead ~ ", "ANALYZE-FORMULA", "death ~"),
        ("logistic", "dead ~ agee", "ANALYZE-COLUMN", "age, stage"),
        ("logistic", "age ~ arm", "ANALYZE-FORMULA", "two levels"),
        ("logistic", "stage ~ arm", "ANALYZE-FORMULA", "stage=III"),
        ("logistic", "stage=IV ~ arm", "ANALYZE-LEVEL", "I, II, III"),
        ("logistic", "dead ~ age + age", "ANALYZE-FORMULA", "once"),
        ("logistic", "dead ~ dead", "ANALYZE-FORMULA", "once"),
        ("logistic", "dead ~ age * arm", "ANALYZE-FORMULA", "death ~"),
        ("logistic", "dead ~ arm[other]", "ANALYZE-LEVEL", "old, new"),
        ("logistic", "dead ~ age[3]", "ANALYZE-FORMULA", "age"),
        ("logistic", "time, event ~ age", "ANALYZE-FORMULA", "--cox"),
        ("cox", "time ~ age", "ANALYZE-FORMULA", "time, event"),
        ("cox", "arm, event ~ age", "ANALYZE-FORMULA", "age, time"),
        ("cox", "seen, event ~ age", "ANALYZE-FORMULA", "age, time"),
        ("cox", "time, age ~ arm", "ANALYZE-FORMULA", "two levels"),
        ("cox", "time, event ~ seen", "ANALYZE-FORMULA", "days since"),
        ("cox", "time, event=2 ~ age", "ANALYZE-FORMULA", "two levels"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_fix(kind: str, text: str, code: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        getattr(READ, kind)(text)
    assert caught.value.code == code and fix in caught.value.hint


def test_only_analyses_whose_outcomes_nobody_else_looks_at_share_a_world() -> None:
    mean, death = READ.mean("age"), READ.logistic("dead ~ age + arm")
    survival, other = READ.cox("time, event ~ age + stage"), READ.cox("time, event ~ arm")
    looks, share = READ.logistic("stage=III ~ dead"), READ.mean("dead")

    def texts(*some: Estimand) -> list[list[str]]:
        return [[one.text for one in pack] for pack in packs(some)]

    assert texts(mean, death, survival) == [[mean.text, death.text, survival.text]]
    assert texts(survival, other) == [[survival.text], [other.text]]
    assert texts(death, looks) == [[death.text], [looks.text]]
    assert texts(share, death, mean) == [[share.text, mean.text], [death.text]]


def test_grids_are_as_the_tests_think() -> None:
    assert isinstance(GRIDS[TIME], NumberGrid) and GRIDS[STAGE].size == 4

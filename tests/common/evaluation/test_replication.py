"""Replication in one step: equal to statsmodels without noise, covered with it, and what two readers decide."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common import table_schema
from cohortium.common.encoding import Grid, grids
from cohortium.common.estimates import norms
from cohortium.common.evaluation.agreement import decisions_agree, interval_overlap
from cohortium.common.evaluation.analysis import Analysis, Question, ask_about, make_terms
from cohortium.common.evaluation.coded import TimeToEvent, label_of_code, number_of_code
from cohortium.common.evaluation.regression import CannotFit
from cohortium.common.evaluation.replication import one_step, replicate

FIELDS = [
    {"name": "age", "type": "integer", "constraints": {"minimum": 20, "maximum": 90, "required": True}},
    {"name": "arm", "type": "string", "constraints": {"enum": ["control", "drug", "rare"], "required": True}},
    {"name": "dead", "type": "integer", "constraints": {"minimum": 0, "maximum": 1, "required": True}},
    {"name": "days", "type": "integer", "constraints": {"minimum": 0, "maximum": 200}},
]
GRIDS: tuple[Grid, ...] = grids(table_schema.parse({"fields": FIELDS}, "made up"))


def rows(seed: int, n: int, effect: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng([seed, 11])
    age, arm = rng.integers(0, 71, n), rng.choice(3, n, p=[0.5, 0.49, 0.01])
    eta = effect * (age - 35) / 20 - 0.5 * (arm == 1)
    death, leave = rng.exponential(60 * np.exp(-eta)), rng.uniform(40, 200, n)
    dead = death < leave
    days = np.floor(np.minimum(death, leave)).astype(int)
    codes = np.column_stack([age, arm, dead, days])
    codes[rng.random(n) < 0.02, 3] = GRIDS[3].missing
    return codes.astype(np.int32)


def analysis(model: str, codes: np.ndarray) -> Analysis:
    dead = (2, label_of_code(GRIDS[2], 1))
    outcome = dead if model == "logistic" else TimeToEvent(time=(3, number_of_code(GRIDS[3])), event=dead)
    return Analysis(key=model, label=model, outcome=outcome, terms=make_terms(GRIDS, codes, (0, 1)))


def score_sum(question: Question, codes: np.ndarray) -> np.ndarray:
    v = question.query.vectors(codes)
    clip = question.query.clip_norm_l2
    return (v * np.minimum(1.0, clip / np.maximum(norms(v), 1e-300))[:, None]).sum(axis=0)


def test_terms_are_made_by_rule() -> None:
    terms = make_terms(GRIDS, rows(0, 4000), (0, 1, 3))
    # The same column may lack so few values that "missing" is rare: then it has no term.
    assert terms.names[:1] == ("age (per SD)",)
    assert sum(n.startswith("arm: ") for n in terms.names) == 1
    assert not any("rare" in n for n in terms.names)
    assert [t.shape[1] for t in terms.tables][:3] == [1, 1, 0]
    with pytest.raises(CannotFit):
        make_terms(GRIDS, np.zeros((10, 4), dtype=np.int32), (0, 1))


@pytest.mark.parametrize("model", ["logistic", "cox"])
def test_without_noise_one_step_is_newton_s_own(model: str) -> None:
    """From the held-out patients' own fit the step is zero; from the synthetic fit it is statsmodels' score times the
    synthetic covariance. Planted: D transposed is not seen here, a sign or a missing n is."""
    models = pytest.importorskip("statsmodels.api")
    made, held = rows(1, 3000), rows(2, 800)
    mine = analysis(model, held)
    own = ask_about(mine, held, noise_multiplier=0.0, patients=800)
    assert own.clip_share == 0.0
    step = one_step(question=own, values=score_sum(own, held), sigma=0.0, patients=800)
    used = mine.used(held)
    x = np.column_stack([table[held[used][:, c]] for c, table in enumerate(mine.terms.tables) if table.shape[1]])
    if model == "logistic":
        theirs = models.Logit(held[used, 2], models.add_constant(x)).fit(method="newton", tol=1e-14, disp=0)
    else:
        theirs = models.PHReg(held[used, 3], x, status=held[used, 2], ties="breslow").fit(
            method="newton", tol=1e-14, disp=0
        )
    assert step.beta == pytest.approx(theirs.params, abs=1e-9)
    assert np.sqrt(np.diag(step.sampling)) == pytest.approx(theirs.bse, abs=1e-9)
    asked = ask_about(analysis(model, made), made, noise_multiplier=0.0, patients=800)
    got = one_step(question=asked, values=score_sum(asked, held), sigma=0.0, patients=800)
    if model == "logistic":
        terms = [t[held[:, c]] for c, t in enumerate(asked.analysis.terms.tables) if t.shape[1]]
        logit = models.Logit(held[:, 2], models.add_constant(np.column_stack(terms)))
        wanted = asked.fit.beta + asked.fit.covariance * 3000 / 800 @ logit.score(asked.fit.beta)
        assert got.beta == pytest.approx(wanted, abs=1e-9)
    own_fit = analysis(model, made).fit(held)[0]
    assert np.all(np.abs(got.beta - own_fit.beta) < 0.75 * own_fit.standard_errors)


def test_cox_scores_are_statsmodels_score_residuals() -> None:
    models = pytest.importorskip("statsmodels.api")
    held = rows(3, 500)
    held = held[held[:, 3] != GRIDS[3].missing]
    asked = ask_about(analysis("cox", held), held, noise_multiplier=0.0, patients=len(held))
    x = np.column_stack([t[held[:, c]] for c, t in enumerate(asked.analysis.terms.tables) if t.shape[1]])
    theirs = models.PHReg(held[:, 3], x, status=held[:, 2], ties="breslow").fit(method="newton", tol=1e-14, disp=0)
    assert asked.query.vectors(held) == pytest.approx(theirs.score_residuals, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["logistic", "cox"])
def test_intervals_cover_with_noise_and_clipping(model: str) -> None:
    """100 runs: the exact (unclipped) estimate of these patients, and the truth of the population.

    Planted: D = I in spite of clipping, or noise of half the size: red. A right 95 % is under 88 % 1 time in 1000.
    """
    made, n = rows(1, 20_000, 0.9), 2000
    asked = ask_about(analysis(model, made), made, noise_multiplier=15.0, patients=n)
    assert asked.clip_share > 0.1
    assert norms(asked.query.vectors(made)).max() > asked.query.clip_norm_l2
    unclipped = ask_about(analysis(model, made), made, noise_multiplier=0.0, patients=n)
    rng = np.random.default_rng(4)
    sigma = 15.0 * asked.query.clip_norm_l2
    covered, agreed, wide = [], [], []
    for seed in range(100):
        held = rows(100 + seed, n)
        exact = replicate(question=unclipped, values=score_sum(unclipped, held), sigma=0.0, patients=n, draws=50)
        noised = score_sum(asked, held) + sigma * rng.standard_normal(asked.query.dim)
        got = replicate(question=asked, values=noised, sigma=sigma, patients=n, seed=seed, draws=200)
        covered += [a.exact_low <= b.estimate <= a.exact_high for a, b in zip(got.effects, exact.effects, strict=True)]
        wide += [a.high - a.low > a.exact_high - a.exact_low for a in got.effects]
        for key, named in got.figures.items():
            truth = exact.figures[key].figure.value
            assert truth is not None
            agreed.append(named.figure.low - 1e-9 <= truth <= named.figure.high + 1e-9)
    assert 0.90 < np.mean(covered) <= 0.99
    assert np.mean(agreed) > 0.90
    assert all(wide)


def test_decisions_and_overlaps() -> None:
    """Karr et al. 2006: two intervals of equal width that share half overlap by a half; apart, not at all."""
    a, b = np.array([0.0, 0.0, 0.0]), np.array([2.0, 2.0, 2.0])
    shift = np.array([0.0, 1.0, 3.0])
    assert interval_overlap(a, b, a + shift, b + shift).tolist() == [1.0, 0.5, 0.0]
    assert float(interval_overlap(a, b, a, b + 2)[0]) == 0.75
    se = np.ones(4)
    both = decisions_agree(np.array([3.0, 3.0, 3.0, 0.1]), np.array([2.5, -2.5, 1.0, -1.0]), se)
    assert both.tolist() == [True, False, False, True]


def test_noise_that_swamps_and_what_does_not_fit() -> None:
    made = rows(1, 3000)
    asked = ask_about(analysis("logistic", made), made, noise_multiplier=500.0, patients=300)
    sigma = 500.0 * asked.query.clip_norm_l2
    got = replicate(question=asked, values=np.zeros(asked.query.dim), sigma=sigma, patients=300, draws=100)
    assert all(f.figure.value is None for f in got.rows())
    assert not any(e.assessed for e in got.effects)
    for values, scale, patients in ((np.zeros(1), 1.0, 10), (np.zeros(3), np.nan, 10), (np.zeros(3), 1.0, 0)):
        with pytest.raises(ValueError):
            one_step(question=asked, values=values, sigma=scale, patients=patients)

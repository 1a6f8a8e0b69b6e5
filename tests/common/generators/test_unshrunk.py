"""The model of inference: it has the measured moments, of any columns, and does not shrink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from known_effects import AGE, ARM, DEAD, STAGE, coded, formulas

from cohortium.common.generators.base import Answer, Facts
from cohortium.common.generators.measure import Measured, measure
from cohortium.common.generators.mixture import Mixture
from cohortium.common.generators.model import moments_of
from cohortium.common.generators.unshrunk import COMPONENTS, Gap, fit_unshrunk, measure_unshrunk
from cohortium.common.queries import Moments
from cohortium.server.replicates import patients

READ, GRIDS, SCHEMA = formulas()
PEOPLE = coded(4000, seed=3)
FACTS = Facts(
    columns=tuple((c.kind, g.size, c.categorical) for c, g in zip(SCHEMA.modelled, GRIDS, strict=True)),
    epsilon=1.0,
    patients=4000,
    sites=3,
    mode="secure-sum",
    target=DEAD,
)
PHASES = Mixture().phases(FACTS)


def ask_of(codes: np.ndarray, sigma: float, rng: np.random.Generator) -> Any:
    """Sums with Gaussian noise of `sigma` times a query's sensitivity."""

    def ask(phase: str, query: Any) -> Answer:
        values = query.contribution(patients(codes)).units * query.lattice
        noise = sigma * query.sensitivity_l2
        return Answer(values=values + noise * rng.standard_normal(len(values)), sigma=noise, sites=3)

    return ask


def measured(sigma: float, seed: int = 0) -> Measured:
    ask = ask_of(PEOPLE, sigma, np.random.default_rng(seed))
    return measure_unshrunk(ask, grids=GRIDS, facts=FACTS, phases=PHASES)


def test_the_model_has_the_moments_that_were_measured() -> None:
    found = measured(0.0)
    columns = [AGE, ARM, DEAD]
    model = fit_unshrunk(found, columns, seed=1)
    ones, gram = moments_of(model.weights, model.tables, model.targets.features)
    for mine, column in zip(ones, columns, strict=True):
        assert np.abs(mine - found.one_way[column]).max() < 0.004
    wanted = model.targets.gram
    assert np.linalg.norm(gram - wanted) < 0.1 * np.linalg.norm(wanted)


def test_columns_come_in_the_order_asked() -> None:
    found = measured(0.0)
    there = fit_unshrunk(found, [DEAD, AGE], seed=1)
    assert [b.size for b in there.bins] == [found.bins[DEAD].size, found.bins[AGE].size]
    start = found.ends
    block = found.gram[start[DEAD] : start[DEAD + 1], start[AGE] : start[AGE + 1]]
    wide = found.features[DEAD].shape[1]
    assert np.array_equal(there.targets.gram[:wide, wide:], block)


def test_the_analysis_of_its_rows_is_that_of_the_people() -> None:
    """Without noise: within a fifth of the effect, the price of features of ranks (and what replays undo)."""
    one = READ.logistic("dead ~ age + arm")
    chosen = [AGE, ARM, DEAD]
    codes = np.zeros((8192, 7), dtype=np.int32)
    codes[:, chosen] = fit_unshrunk(measured(0.0), chosen, seed=1).sample(8192, seed=1)
    assert one.fit(codes).values == pytest.approx(one.fit(PEOPLE).values, rel=0.2)


@pytest.mark.parametrize("facts", [FACTS, replace(FACTS, target=ARM, epsilon=500.0)], ids=["whole", "by class"])
def test_dependence_is_the_noised_answer_as_it_came(facts: Facts) -> None:
    """And the matrix that a released model is fitted to is another one, and smaller. By class: their sum."""
    phases = Mixture().phases(facts)
    heard: list[tuple[Moments, Answer]] = []
    ask = ask_of(PEOPLE, 8.0, np.random.default_rng(5))

    def listening(phase: str, query: Any) -> Answer:
        answer = ask(phase, query)
        if isinstance(query, Moments):
            heard.append((query, answer))
        return answer

    found = measure_unshrunk(listening, grids=GRIDS, facts=facts, phases=phases)
    ((query, answer),) = heard
    assert (query.classes > 1) == (facts is not FACTS)
    np.testing.assert_allclose(found.gram, query.unpack(answer.values).sum(axis=0) / found.total, atol=1e-12)
    released = measure(ask_of(PEOPLE, 8.0, np.random.default_rng(5)), grids=GRIDS, facts=facts, phases=phases)
    assert np.linalg.norm(released.gram) < 0.9 * np.linalg.norm(found.gram)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Against central differences, at a point away from the optimum, every kind of parameter among them."""
    gap = Gap(measured(8.0))
    rng = np.random.default_rng(0)
    cells, width = len(gap.wanted), measured(8.0).gram.shape[0]
    theta = 0.3 * rng.standard_normal(cells + COMPONENTS * (width + 1))
    gradient = gap.gradient(theta)
    for at in (0, 7, cells - 1, cells, cells + 5, cells + 3 * width, len(theta) - COMPONENTS, len(theta) - 1):
        step = np.zeros_like(theta)
        step[at] = 1e-5
        slope = (gap.loss(theta + step) - gap.loss(theta - step)) / 2e-5
        assert gradient[at] == pytest.approx(slope, rel=1e-4, abs=1e-6 * np.abs(gradient).max())


def test_the_same_seed_gives_the_same_model() -> None:
    found = measured(5.0)
    one, two, other = (fit_unshrunk(found, [AGE, STAGE], seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.weights, two.weights) and not np.array_equal(one.weights, other.weights)

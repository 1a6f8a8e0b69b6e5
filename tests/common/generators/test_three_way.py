"""Moments within classes of the target: asked where public facts say so, at no more noise, and followed by its law."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cohortium.common.generators import measure as measuring
from cohortium.common.generators import three_way
from cohortium.common.generators.base import Answer, Facts
from cohortium.common.generators.bins import Bins
from cohortium.common.generators.herding import Targets
from cohortium.common.generators.model import MixtureModel, with_outcome
from cohortium.common.generators.outcome import OutcomeLaw, fit_outcome
from cohortium.common.generators.relevance import Seen
from cohortium.common.generators.three_way import PAYS, ByClass, classes, fit_products, products
from cohortium.common.queries import Moments
from cohortium.common.registry import load_model

SIZES, TARGET = (2, 3, 2), 2
TABLES = (np.array([[-0.5], [0.5]]), np.array([[-0.5, 0.2], [0.5, 0.2], [0.0, -0.4]]), np.array([[-0.5], [0.5]]))
FACTS = Facts(
    columns=(("string", 3, True), ("string", 4, True), ("integer", 60, False), ("string", 3, True)),
    epsilon=10.0,
    patients=5000,
    sites=3,
    mode="secure-sum",
    target=3,
)


def flat(bins: np.ndarray) -> np.ndarray:
    return np.zeros((len(bins), SIZES[TARGET]))


def rows(count: int, seed: int = 1) -> np.ndarray:
    """y is what the other two are together; neither alone says anything about it."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 2, count), rng.integers(0, 3, count)
    p = np.where(second == 2, 0.5, np.where(first == second, 0.9, 0.1))
    return np.stack([first, second, (rng.random(count) < p).astype(np.int64)], 1)


def phi_of(bins: np.ndarray) -> np.ndarray:
    return np.concatenate([f[bins[:, c]] for c, f in enumerate(TABLES)], 1)


def without_blocks(gram: np.ndarray) -> np.ndarray:
    for a, b in ((0, 1), (1, 3), (3, 4)):
        gram[a:b, a:b] = 0.0
    return gram


def known(bins: np.ndarray, sd: float = 0.0) -> tuple[Targets, ByClass]:
    phi = phi_of(bins)
    parts = [without_blocks((phi * (bins[:, TARGET] == y)[:, None]).T @ phi / len(phi)) for y in range(2)]
    one = tuple(np.bincount(bins[:, c], minlength=s) / len(bins) for c, s in enumerate(SIZES))
    targets = Targets(one_way=one, features=TABLES, gram=sum(parts))
    return targets, ByClass(moments=np.stack(parts), sd=sd, patients=float(len(bins)))


def released(targets: Targets) -> Seen:
    return Seen(gram=targets.gram, sd=0.0, patients=1e9)


def right(law: OutcomeLaw, bins: np.ndarray) -> float:
    """Mean probability that the law gives the truth."""
    return float(law.probabilities(bins)[np.arange(len(bins)), bins[:, TARGET]].mean())


# ---- the law ------------------------------------------------------------------------------------------------


def test_it_follows_what_no_pair_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_way, "LEAST_RIDGE", 1e-6)
    bins = rows(20_000)
    targets, by_class = known(bins)
    alone = OutcomeLaw(fit_outcome(targets, TARGET, bins, flat, released(targets)), targets, flat)
    with_products = OutcomeLaw(fit_outcome(targets, TARGET, bins, flat, released(targets), by_class), targets, flat)
    assert right(alone, rows(5000, seed=2)) < 0.52
    truth = 2 / 3 * (0.9**2 + 0.1**2) + 1 / 3 * 0.5
    assert right(with_products, rows(5000, seed=2)) == pytest.approx(truth, abs=0.02)


def test_its_rows_have_the_moments_within_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_way, "LEAST_RIDGE", 1e-6)
    wanted, bins = rows(200_000), rows(200_000, seed=2)
    targets, by_class = known(wanted)
    forgotten = bins.copy()
    forgotten[:, TARGET] = np.random.default_rng(0).permutation(bins[:, TARGET])
    law = OutcomeLaw(fit_outcome(targets, TARGET, forgotten[:20_000], flat, released(targets), by_class), targets, flat)
    drawn = law.redraw(forgotten, np.random.default_rng(1))
    before, after = known(forgotten)[1].moments, known(drawn)[1].moments
    assert np.abs(before - by_class.moments).max() > 0.03
    assert np.abs(after - by_class.moments).max() < 0.004


def test_its_gradient_is_that_of_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Central differences at a point that is none of the optimum's."""
    import scipy.optimize

    bins, seen = rows(300), {}

    def caught(gap: Any, start: np.ndarray, **_: Any) -> Any:
        seen.update(gap=gap, start=start)
        raise InterruptedError

    monkeypatch.setattr(scipy.optimize, "minimize", caught)
    targets, by_class = known(bins, sd=0.01)
    with pytest.raises(InterruptedError):
        fit_products(targets, TARGET, bins, flat(bins), np.full((1, 5), 0.1), by_class)
    at = np.random.default_rng(0).normal(0, 0.3, len(seen["start"]))
    used = seen["gap"](at)[1]
    for k in range(len(at)):
        step = np.zeros(len(at))
        step[k] = 1e-5
        slope = (seen["gap"](at + step)[0] - seen["gap"](at - step)[0]) / 2e-5
        assert slope == pytest.approx(used[k], abs=1e-6)
    assert (used != 0).sum() == 5 + 2


def test_only_products_of_different_columns_without_the_target_are_used() -> None:
    bins = rows(3000)
    targets, by_class = known(bins)
    square = fit_outcome(targets, TARGET, bins, flat, released(targets), by_class).square
    assert square is not None and square.shape == (1, 4, 4)
    used = {(int(a), int(b)) for _, a, b in np.argwhere(square != 0)}
    assert used == {(0, 1), (0, 2)}


def test_noise_holds_the_products_back() -> None:
    bins = rows(3000)
    size = []
    for sd in (0.0, 0.01, 0.1):
        targets, by_class = known(bins, sd=sd)
        size.append(float(np.abs(fit_outcome(targets, TARGET, bins, flat, released(targets), by_class).square).max()))
    assert size[0] > 2 * size[1] > 4 * size[2]


def test_products_are_worked_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bins = rows(1000)
    targets, _ = known(bins)
    square = np.random.default_rng(0).normal(size=(2, 4, 4))
    phi = phi_of(bins)
    phi[:, 3] = 0.0
    expected = np.stack([(phi @ each * phi).sum(axis=1) for each in square], axis=1)
    np.testing.assert_allclose(products(targets, TARGET, square, bins), expected)
    monkeypatch.setattr("cohortium.common.generators.three_way.ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(products(targets, TARGET, square, bins), expected)


def test_a_saved_model_keeps_its_products() -> None:
    bins = rows(4000)
    targets, by_class = known(bins)
    rng = np.random.default_rng(0)
    made = tuple(
        Bins(
            map=np.append(np.arange(size), 0).astype(np.int32),
            size=size,
            within=np.append(np.ones(size), 0.0),
            missing=-1,
            mass=np.full(size, 1 / size),
            ordered=False,
        )
        for size in SIZES
    )
    tables = tuple(rng.dirichlet(np.full(size, 20.0), 3) for size in SIZES)
    base = MixtureModel(bins=made, weights=np.full(3, 1 / 3), tables=tables, targets=targets)
    fitted = with_outcome(
        base, TARGET, seen=Seen(gram=base.targets.gram, sd=0.0, patients=4000), seed=1, by_class=by_class
    )
    arrays, header = fitted.to_arrays()
    again = load_model(arrays, json.loads(json.dumps(header)))
    drawn = fitted.sample(4000, seed=7)
    assert (again.sample(4000, seed=7) == drawn).all()
    agree = (drawn[:, 0] == drawn[:, 1]) == (drawn[:, TARGET] == 1)
    assert agree[drawn[:, 1] < 2].mean() > 0.8
    one = fitted.sample(4000, seed=7, where={TARGET: np.array([False, True, False])})
    assert (one[:, 0] == one[:, 1])[one[:, 1] < 2].mean() > 0.8


# ---- when it is asked ---------------------------------------------------------------------------------------


def test_it_is_asked_where_public_facts_say_that_it_pays() -> None:
    width = 8
    least = PAYS * width**1.5 / 5000
    assert classes(replace(FACTS, epsilon=least * 1.01), width) == 3
    assert classes(replace(FACTS, epsilon=least * 0.99), width) == 1
    assert classes(replace(FACTS, patients=None), width) == 1
    assert classes(replace(FACTS, mode="local"), width) == 1
    assert classes(replace(FACTS, target=None), width) == 1
    assert classes(replace(FACTS, target=2), width) == 1
    levels = (*FACTS.columns[:3], ("string", 40, True))
    assert classes(replace(FACTS, columns=levels), width) == 1


@pytest.mark.parametrize(("epsilon", "parts"), [(10.0, 2), (0.1, 1)])
def test_the_question_costs_no_more_noise_and_fits_its_plan(epsilon: float, parts: int) -> None:
    """The same bound on a patient, by classes or not; classes that have no bin are not asked."""
    facts = replace(FACTS, epsilon=epsilon)
    phases = measuring.measuring_phases(facts, measuring.Shares(ranges=0.2, grain=0.2, bins=0.3, pairs=0.3))
    (pairs,) = [phase for phase in phases if phase.name == "pairs"]
    plain = measuring.measuring_phases(
        replace(facts, target=None), measuring.Shares(ranges=0.2, grain=0.2, bins=0.3, pairs=0.3)
    )
    assert pairs.share == plain[-1].share
    assert ("class" in pairs.purpose) == (parts > 1)
    asked: list[Moments] = []
    answers: list[Answer] = []
    rng = np.random.default_rng(0)

    def ask(phase: str, query: Moments) -> Answer:
        asked.append(query)
        answers.append(Answer(values=rng.normal(0, 3.0, query.dim), sigma=3.0, sites=3))
        return answers[-1]

    bins = tuple(
        Bins(
            map=np.arange(size, dtype=np.int32) % (size - 1),
            size=size - 1,
            within=np.ones(size),
            missing=-1,
            mass=np.full(size - 1, 1 / (size - 1)),
            ordered=not levels,
        )
        for _, size, levels in facts.columns
    )
    one = tuple(np.full(b.size, 1 / b.size) for b in bins)
    _, gram, seen, by_class = measuring._pairs(ask, bins, one, facts, 5000.0)
    (query,) = asked
    assert query.classes == parts and query.dim <= pairs.max_dim
    assert query.sensitivity_l2 == replace(query, by=None).sensitivity_l2
    assert seen.sd == pytest.approx(3.0 / 5000 * np.sqrt(parts)) and np.allclose(gram, gram.T)
    np.testing.assert_allclose(seen.gram, query.unpack(answers[0].values).sum(axis=0) / 5000, atol=1e-15)
    assert (gram**2).sum() < 0.5 * (seen.gram**2).sum(), "noise alone: what the mixture is fitted to is shrunk"
    assert (by_class is None) == (parts == 1)
    if by_class is not None:
        assert by_class.sd == pytest.approx(3.0 / 5000) and by_class.moments.shape == (parts, *gram.shape)


def test_without_them_the_law_has_slopes_alone() -> None:
    bins = rows(500)
    targets, _ = known(bins)
    assert fit_outcome(targets, TARGET, bins, flat, released(targets)).square is None

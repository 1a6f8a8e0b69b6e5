"""The target's law has the measured moments, is the logistic regression it claims to be, and keeps conditions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cohortium.common.generators import outcome as module
from cohortium.common.generators.bins import Bins
from cohortium.common.generators.herding import Targets
from cohortium.common.generators.model import MixtureModel, NadeModel, with_outcome
from cohortium.common.generators.outcome import Outcome, OutcomeLaw, applies, fit_outcome
from cohortium.common.generators.relevance import Seen
from cohortium.common.registry import load_model

SIZES = (3, 4, 2)
TARGET = 2


def flat(bins: np.ndarray) -> np.ndarray:
    """The generator's own law says nothing about the target."""
    return np.zeros((len(bins), SIZES[TARGET]))


def features() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    return (rng.standard_normal((3, 2)), rng.standard_normal((4, 2)), np.array([[-0.5], [0.5]]))


def rows(count: int, seed: int = 1) -> np.ndarray:
    """The target depends on both others, which depend on each other."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 3, count)
    second = np.where(rng.random(count) < 0.5, first, rng.integers(0, 4, count))
    p = 1 / (1 + np.exp(-(1.5 * (first == 2) - 2.0 * (second == 1) + 0.3)))
    return np.stack([first, second, (rng.random(count) < p).astype(np.int64)], 1)


def phi_of(bins: np.ndarray) -> np.ndarray:
    return np.concatenate([f[bins[:, c]] for c, f in enumerate(features())], 1)


def targets_from(bins: np.ndarray) -> Targets:
    phi = phi_of(bins)
    phi = np.concatenate([phi[:, :4], phi[:, 4:] - phi[:, 4:].mean()], 1)
    gram = phi.T @ phi / len(phi)
    for a, b in ((0, 2), (2, 4), (4, 5)):
        gram[a:b, a:b] = 0.0
    tables = (*features()[:2], features()[2] - phi_of(bins)[:, 4].mean())
    one = tuple(np.bincount(bins[:, c], minlength=s) / len(bins) for c, s in enumerate(SIZES))
    return Targets(one_way=one, features=tables, gram=gram)


def released(targets: Targets | None = None, patients: float = 1e9) -> Seen:
    """The moments as they are, without noise, of so many patients that sampling has none either."""
    return Seen(gram=(targets or model().targets).gram, sd=0.0, patients=patients)


def test_it_is_the_penalised_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the moments are those of the rows themselves, without noise, maximum entropy is maximum likelihood."""
    monkeypatch.setattr(module, "RIDGE", 1e-2)
    bins = rows(4000)
    found = fit_outcome(targets_from(bins), TARGET, bins, flat, released(targets_from(bins)))
    x, y = phi_of(bins)[:, :4], bins[:, TARGET]
    oracle = LogisticRegression(C=1 / (1e-2 * len(bins)), tol=1e-12, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(found.slope[0, 1:5], oracle.coef_[0], atol=1e-3)
    assert (found.slope[:, 5:] == 0).all()
    law = OutcomeLaw(found, targets_from(bins), flat)
    np.testing.assert_allclose(law.probabilities(bins)[:, 1], oracle.predict_proba(x)[:, 1], atol=1e-3)


def test_redrawn_rows_have_the_measured_moments() -> None:
    """Moments of a law that the rows themselves do not follow: their targets are forgotten and drawn anew."""
    wanted, bins = targets_from(rows(200_000)), rows(200_000, seed=2)
    shuffled = bins.copy()
    shuffled[:, TARGET] = np.random.default_rng(0).permutation(bins[:, TARGET])
    law = OutcomeLaw(fit_outcome(wanted, TARGET, shuffled[:20_000], flat, released(wanted)), wanted, flat)
    drawn = law.redraw(shuffled, np.random.default_rng(1))
    got, before = targets_from(drawn).gram[4, :4], targets_from(shuffled).gram[4, :4]
    assert np.abs(before - wanted.gram[4, :4]).max() > 0.05
    assert np.abs(got - wanted.gram[4, :4]).max() < 0.006
    assert (drawn[:, :TARGET] == bins[:, :TARGET]).all()
    assert drawn[:, TARGET].mean() == pytest.approx(wanted.one_way[TARGET][1], abs=0.01)


def test_what_the_generator_knows_itself_stays() -> None:
    """An interaction that no measured moment sees, in the generator's own law, is still there."""
    bins = rows(50_000)

    def own(some: np.ndarray) -> np.ndarray:
        odd = (some[:, 0] + some[:, 1]) % 2
        return np.stack([np.zeros(len(some)), np.where(odd == 1, 1.0, -1.0)], 1)

    targets = targets_from(bins)
    p = OutcomeLaw(fit_outcome(targets, TARGET, bins, own, released(targets)), targets, own).probabilities(bins)
    plain = OutcomeLaw(fit_outcome(targets, TARGET, bins, flat, released(targets)), targets, flat).probabilities(bins)
    odd = (bins[:, 0] + bins[:, 1]) % 2 == 1
    kept = np.log(p[:, 1] / p[:, 0]) - np.log(plain[:, 1] / plain[:, 0])
    assert kept[odd].mean() - kept[~odd].mean() > 0.5


@pytest.mark.parametrize(("by", "at_most"), [("belief", 0.05), ("ridge", 0.95)])
def test_noise_that_is_known_makes_no_slopes(monkeypatch: pytest.MonkeyPatch, by: str, at_most: float) -> None:
    """The same noised moments with and without word of their noise; the target depends on nothing."""
    if by == "belief":
        monkeypatch.setattr(module, "HELD", 0.0)
    else:
        monkeypatch.setattr(module, "believed", lambda log_q, mine, phi, groups, wanted, sd, patients: wanted)
    bins = rows(4000)
    bins[:, TARGET] = np.random.default_rng(2).permutation(bins[:, TARGET])
    targets = targets_from(bins)
    noise = np.random.default_rng(6).normal(0, 0.05, targets.gram.shape)
    seen = replace(released(targets), gram=targets.gram + noise + noise.T)
    blind = fit_outcome(targets, TARGET, bins, flat, seen).slope[:, 1:]
    knowing = fit_outcome(targets, TARGET, bins, flat, replace(seen, sd=0.05 * np.sqrt(2))).slope[:, 1:]
    assert (knowing**2).sum() < at_most * (blind**2).sum()


def test_a_level_that_a_condition_forbids_is_never_drawn() -> None:
    bins = rows(2000)
    targets = targets_from(bins)
    law = OutcomeLaw(fit_outcome(targets, TARGET, bins, flat, released(targets)), targets, flat)
    for share in (np.array([1.0, 0.0]), np.array([0.0, 1.0])):
        assert (law.redraw_among(bins, np.random.default_rng(0), share)[:, TARGET] == share.argmax()).all()


def model() -> MixtureModel:
    rng = np.random.default_rng(4)
    weights, tables = np.array([0.6, 0.4]), tuple(rng.dirichlet(np.full(size, 3.0), 2) for size in SIZES)
    bins = tuple(
        Bins(
            map=np.arange(size, dtype=np.int32),
            size=size,
            within=np.ones(size),
            missing=-1,
            mass=np.ones(size),
            ordered=False,
        )
        for size in SIZES
    )
    return MixtureModel(bins=bins, weights=weights, tables=tables, targets=targets_from(rows(20_000)))


def network() -> NadeModel:
    base = model()
    bare = NadeModel(bins=base.bins, parameters=np.zeros(1, dtype=np.float32), hidden=4, targets=base.targets)
    return replace(bare, parameters=bare.network().start(base.targets.one_way, seed=1, scale=1.0))


@pytest.mark.parametrize("column", range(3))
def test_a_networks_law_of_one_column_given_all_others(column: int) -> None:
    """Against the likelihood of whole rows, one bin after the other."""
    found, bins = network(), rows(50)
    net = found.network()
    whole = []
    for level in range(SIZES[column]):
        there = bins.copy()
        there[:, column] = level
        whole.append(-net.losses(found.parameters, there))
    expected = np.stack(whole, 1)
    got = net.log_given_others(found.parameters, bins, column)
    np.testing.assert_allclose(
        got - got.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=1e-4
    )


@pytest.mark.parametrize("base", [model(), network()], ids=["mixture", "nade"])
def test_a_condition_on_the_target_chooses_the_other_columns(base: MixtureModel | NadeModel) -> None:
    """Bayes: rows drawn under y = 1 are those of all rows where y = 1; χ² over 12 cells, 31.3 at 1e-3."""
    fitted = with_outcome(base, TARGET, seen=released(patients=8000), seed=1)
    assert fitted.outcome is not None
    everyone = fitted.drawer({})(400_000, np.random.default_rng(5))
    law = OutcomeLaw(fitted.outcome, fitted.targets, lambda b: fitted.own_law(b, TARGET))
    weight = law.probabilities(everyone)[:, 1]
    expected = np.bincount(everyone[:, 0] * 4 + everyone[:, 1], weights=weight, minlength=12)
    found = fitted.sample(8000, seed=3, where={TARGET: np.array([False, True])})
    assert (found[:, TARGET] == 1).all()
    counts = np.bincount(found[:, 0] * 4 + found[:, 1], minlength=12)
    expected *= counts.sum() / expected.sum()
    # Resampling repeats a few rows, so counts vary by a little more than independent draws.
    assert ((counts - expected) ** 2 / expected).sum() < 1.5 * 31.3


def test_a_condition_elsewhere_leaves_the_target_its_law() -> None:
    fitted = with_outcome(model(), TARGET, seen=released(patients=8000), seed=1)
    assert fitted.outcome is not None
    law = OutcomeLaw(fitted.outcome, fitted.targets, lambda b: fitted.own_law(b, TARGET))
    found = fitted.sample(20_000, seed=3, where={0: np.array([False, False, True])})
    assert (found[:, 0] == 2).all()
    assert found[:, TARGET].mean() == pytest.approx(law.probabilities(found.astype(np.int64))[:, 1].mean(), abs=0.012)


@pytest.mark.parametrize("base", [model(), network()], ids=["mixture", "nade"])
def test_a_saved_model_draws_the_same_rows(base: MixtureModel | NadeModel) -> None:
    fitted = with_outcome(base, TARGET, seen=released(patients=3000), seed=1)
    arrays, header = fitted.to_arrays()
    again = load_model(arrays, json.loads(json.dumps(header)))
    assert (again.sample(500, seed=7) == fitted.sample(500, seed=7)).all()
    assert not (base.sample(500, seed=7) == fitted.sample(500, seed=7)).all()


def test_only_a_target_of_few_levels_with_measured_moments_has_such_a_law() -> None:
    base = model()
    assert applies(base.targets, TARGET, ordered=False)
    assert not applies(base.targets, None, ordered=False)
    assert not applies(base.targets, TARGET, ordered=True)
    assert not applies(replace(base.targets, gram=np.zeros((5, 5))), TARGET, ordered=False)
    wide = replace(base.targets, features=(*base.targets.features[:2], np.ones((20, 1))))
    assert not applies(wide, TARGET, ordered=False)
    assert with_outcome(base, None, seen=released(patients=1000), seed=1) is base


def test_moments_that_no_law_has_end_in_finite_slopes() -> None:
    """Noise may ask for more than any law can give."""
    targets = targets_from(rows(3000))
    beyond = replace(targets, gram=40 * targets.gram)
    found = fit_outcome(beyond, TARGET, rows(3000), flat, released(beyond, 3000))
    assert np.isfinite(found.slope).all()
    p = OutcomeLaw(found, beyond, flat).probabilities(rows(100))
    assert np.isfinite(p).all() and np.allclose(p.sum(axis=1), 1.0)


def test_slopes_of_several_levels_match_all_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels, two features of the target; as many features as cells, so that every cell is matched."""
    monkeypatch.setattr(module, "RIDGE", 1e-6)
    rng = np.random.default_rng(8)
    x, y = rng.integers(0, 4, 30_000), np.zeros(30_000, dtype=np.int64)
    y = (rng.random(30_000)[:, None] > np.array([[0.2, 0.5], [0.5, 0.6], [0.7, 0.9], [0.3, 0.4]])[x]).sum(1)
    one = (np.bincount(x) / len(x), np.bincount(y) / len(y))
    tables = tuple(np.eye(len(p))[:, :-1] - p[:-1] for p in one)
    phi, t = tables[0][x], tables[1][y]
    gram = np.zeros((5, 5))
    gram[3:, :3], gram[:3, 3:] = t.T @ phi / len(x), phi.T @ t / len(x)
    targets, bins = Targets(one_way=one, features=tables, gram=gram), np.stack([x, y], 1)

    def own(some: np.ndarray) -> np.ndarray:
        return np.tile(np.log(one[1]), (len(some), 1))

    found = fit_outcome(targets, 1, bins, own, released(targets))
    assert isinstance(found, Outcome)
    p = OutcomeLaw(found, targets, own).probabilities(bins)
    for level in range(4):
        np.testing.assert_allclose(
            p[x == level][0], np.bincount(y[x == level], minlength=3) / (x == level).sum(), atol=1e-3
        )


def test_zero_and_one_written_as_numbers_are_two_levels() -> None:
    """Numbers of many values are none."""
    mixed, net = model(), network()

    def on_a_line(base: MixtureModel | NadeModel, codes: int) -> MixtureModel | NadeModel:
        size = SIZES[TARGET]
        grid = (np.arange(codes) * size // codes).astype(np.int32)
        line = replace(base.bins[TARGET], ordered=True, map=grid, within=np.full(codes, size / codes))
        return replace(base, bins=(*base.bins[:TARGET], line))

    assert with_outcome(on_a_line(mixed, 3), TARGET, seen=released(patients=3000), seed=1).outcome is not None
    assert with_outcome(on_a_line(mixed, 60), TARGET, seen=released(patients=3000), seed=1).outcome is None
    assert with_outcome(on_a_line(net, 3), TARGET, seen=released(patients=3000), seed=1).outcome is not None
    assert with_outcome(on_a_line(net, 60), TARGET, seen=released(patients=3000), seed=1).outcome is None

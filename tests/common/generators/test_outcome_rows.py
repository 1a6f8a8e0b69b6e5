"""Levels drawn together have the law's moments far more nearly than luck brings them, and still are the law's."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.generators import outcome_rows as module
from cohortium.common.generators.herding import Targets
from cohortium.common.generators.outcome_rows import drawn, drawn_together

SIZES, COLUMN = (6, 5, 3, 4), 2


def rows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    common = rng.random(count)
    mixed = [np.where(rng.random(count) < 0.5, common, rng.random(count)) * size for size in SIZES]
    return np.stack(mixed, axis=1).astype(np.int64)


def targets() -> Targets:
    rng = np.random.default_rng(1)
    features = tuple(rng.standard_normal((size, 2)) for size in SIZES)
    return Targets(one_way=tuple(np.full(s, 1 / s) for s in SIZES), features=features, gram=np.zeros((8, 8)))


def law(bins: np.ndarray) -> np.ndarray:
    """Three levels: 0 is the commonest, 2 the rarest."""
    logits = np.stack([np.zeros(len(bins)), 0.5 * bins[:, 0] - 1.8, 0.6 * bins[:, 3] - 0.4 * bins[:, 1] - 1.5], axis=1)
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True)


def moments(bins: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sums over the rows of one-hot bins and of products of features of different columns, the target's apart."""
    others = [c for c in range(len(SIZES)) if c != COLUMN]
    ones = [np.bincount(bins[:, c], weight, minlength=SIZES[c]) for c in others]
    phi = [targets().features[c][bins[:, c]] for c in others]
    pairs = [((a * weight[:, None]).T @ b).ravel() for i, a in enumerate(phi) for b in phi[:i]]
    return np.concatenate(ones + pairs) / len(bins)


def away(levels: np.ndarray, bins: np.ndarray, level: int) -> float:
    gap = moments(bins, (levels == level).astype(float)) - moments(bins, law(bins)[:, level])
    return float((gap**2).sum())


def together(bins: np.ndarray, seed: int, among: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return drawn_together(law(bins), targets(), COLUMN, bins, rng, among=among or len(bins))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_moments_of_each_level_lie_nearer_to_the_laws_than_luck_brings_them(level: int) -> None:
    """Mean of eight draws. How many rows a level gets is left to luck, and is some of what is left."""
    bins, alone, joint = rows(2000), [], []
    for seed in range(8):
        alone.append(away(drawn(law(bins), np.random.default_rng(seed)), bins, level))
        joint.append(away(together(bins, seed), bins, level))
    assert np.mean(joint) < 0.6 * np.mean(alone)


def test_each_row_has_its_own_law_still() -> None:
    """Mean over many draws of the share of a level in each tenth of the rows, those least likely to have it first."""
    bins = rows(1000)
    p = law(bins)
    share = np.mean([[together(bins, seed) == k for k in range(3)] for seed in range(50)], axis=0)
    for k in range(3):
        assert share[k].mean() == pytest.approx(p[:, k].mean(), rel=0.02)
        tenths = np.array_split(np.argsort(p[:, k]), 10)
        for some in tenths:
            sd = np.sqrt((p[some, k] * (1 - p[some, k])).sum() / 50) / len(some)
            assert share[k, some].mean() == pytest.approx(p[some, k].mean(), rel=0.06, abs=4 * sd)


def test_a_level_without_weight_is_never_drawn() -> None:
    bins = rows(1200)
    p = law(bins)
    odd = (bins[:, 0] + bins[:, 1]) % 2 == 1  # which no moment sees
    p[odd, 2] = 0.0
    p /= p.sum(axis=1, keepdims=True)
    sure = {level: (bins[:, 1] == level) & (bins[:, 3] == 2) for level in range(3)}
    for level, some in sure.items():
        p[some] = np.eye(3)[level]
    for seed in range(5):
        levels = drawn_together(p, targets(), COLUMN, bins, np.random.default_rng(seed), among=len(bins))
        assert (p[np.arange(len(p)), levels] > 0).all()
        alone = drawn(p, np.random.default_rng(seed))
        assert (p[np.arange(len(p)), alone] > 0).all()


def test_what_no_moment_sees_keeps_its_probability() -> None:
    """The parity of three columns, and rows that are almost sure: mean over many draws by distinct probability."""
    bins = rows(2000, seed=4)
    odd = bins[:, [0, 1, 3]].sum(axis=1) % 2
    logit = 3.0 * odd - 2.5 + 1.2 * (bins[:, 0] >= 3) + 4.0 * (bins[:, 1] == 4)
    p = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], axis=1)
    found = np.zeros(len(bins))
    for seed in range(60):
        found += drawn_together(p, targets(), COLUMN, bins, np.random.default_rng(100 + seed), among=len(bins)) / 60
    for value in np.unique(p[:, 1]):
        some = p[:, 1] == value
        sd = np.sqrt(value * (1 - value) / (60 * some.sum()))
        assert found[some].mean() == pytest.approx(value, abs=5 * sd), value


def test_levels_with_many_rows_in_all_stay_as_they_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Herding costs time, and luck is small there."""
    bins, asked = rows(2000), []
    real = module.Herder.select
    monkeypatch.setattr(module.Herder, "select", lambda self, b, r, **k: asked.append(r) or real(self, b, r, **k))
    together(bins, 1)
    assert len(asked) == 2
    rare, rarer = np.sort(law(bins).mean(axis=0))[:2][::-1]
    together(bins, 1, among=int(1.01 * module.FEW / rare))
    assert len(asked) == 3, "the rarer level alone"
    together(bins, 1, among=int(1.01 * module.FEW / rarer))
    assert len(asked) == 3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_and_a_target_alone(count: int) -> None:
    bins = rows(count)
    assert together(bins, 1).shape == (count,)
    p, lonely = np.full((count, 3), 1 / 3), Targets(one_way=(np.ones(3) / 3,), features=(np.eye(3),), gram=np.eye(3))
    levels = drawn_together(p, lonely, 0, np.zeros((count, 1), np.int64), np.random.default_rng(0), among=count)
    assert levels.shape == (count,) and (levels >= 0).all() and (levels < 3).all()

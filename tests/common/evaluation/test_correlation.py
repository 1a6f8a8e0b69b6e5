"""Correlations from one noised Gram matrix: exact without noise, covered with it; axes; bins and scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cohortium.common.encoding import Grid
from cohortium.common.evaluation.axes import axes
from cohortium.common.evaluation.bins import BINS_AT_LEAST, BINS_AT_MOST, Bins, coarse, most_bins
from cohortium.common.evaluation.correlation import Correlations, correlations
from cohortium.common.evaluation.private import patient_number
from cohortium.common.evaluation.ranks import RankScores, rank_scores
from cohortium.common.queries import Moments

CODES = 41


def grid(size: int, *, categorical: bool) -> Grid:
    made = Grid()
    made.size, made.categorical, made.name, made.required = size, categorical, "x", False
    return made


@dataclass(frozen=True)
class World:
    """5 numbers and a category of two levels, with missing values; held-out rows and synthetic ones in codes."""

    held: np.ndarray
    made: np.ndarray
    bins: list[Bins]
    asked: RankScores

    def answer(self, *, sigma: float, counts_sigma: float, rng: np.random.Generator, seed: int = 0) -> Correlations:
        columns = list(self.asked.columns)
        h, m = coarse(self.held, self.bins)[:, columns], coarse(self.made, self.bins)[:, columns]
        counts = [np.bincount(h[:, j], minlength=self.bins[c].size).astype(float) for j, c in enumerate(columns)]
        counts = [c + counts_sigma * rng.standard_normal(len(c)) for c in counts]
        scored = np.stack([s[h[:, j]] for j, s in enumerate(self.asked.scores)], axis=1)
        gram = (scored.T @ scored)[np.triu_indices(len(columns), 1)]
        return correlations(
            names=[f"c{c}" for c in columns],
            scores=self.asked.scores,
            comoments=gram + sigma * rng.standard_normal(len(gram)),
            sigma=sigma,
            counts=counts,
            counts_sigma=counts_sigma,
            synthetic_counts=[self.bins[c].counts for c in columns],
            synthetic_bins=m,
            patients=patient_number(counts, counts_sigma)[0],
            seed=seed,
            draws=800,
        )


def rows(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    common = rng.standard_normal((n, 1))
    x = np.sqrt(rho) * common + np.sqrt(1 - rho) * rng.standard_normal((n, 6))
    codes = np.clip(np.rint(20 + 7 * x), 0, CODES - 2).astype(np.int32)
    codes[:, 5] = x[:, 5] > 0.8
    codes[rng.random((n, 6)) < 0.1] = CODES - 1
    codes[:, 5] = np.where(codes[:, 5] == CODES - 1, 3, codes[:, 5])  # levels 0, 1, 2 (never), missing
    return codes


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(0)
    held, made = rows(rng, 1500, 0.5), rows(rng, 6000, 0.4)
    grids = [grid(CODES, categorical=False) for _ in range(5)] + [grid(4, categorical=True)]
    bins = [Bins.of(made[:, c], g, 10) for c, g in enumerate(grids)]
    return World(held=held, made=made, bins=bins, asked=rank_scores(bins, made, clip_quantile=1.0))


def test_without_noise_it_is_pearsons_of_the_scores(world: World) -> None:
    """Planted: means and variances of the scores left out: red."""
    got = world.answer(sigma=0.0, counts_sigma=0.0, rng=np.random.default_rng(0))
    tables = [
        pd.DataFrame({f"c{c}": world.asked.features[c][codes[:, c], 0] for c in range(6)})
        for codes in (world.held, world.made)
    ]
    real, made = (t.corr() for t in tables)
    for pair in got.pairs:
        assert pair.real.value == pytest.approx(real.loc[pair.first, pair.second], abs=1e-9)
        assert pair.synthetic == pytest.approx(made.loc[pair.first, pair.second], abs=1e-9)
    wanted = np.mean([1 - abs(real.iloc[i, j] - made.iloc[i, j]) / 2 for i in range(6) for j in range(i)])
    assert got.similarity.figure.value == pytest.approx(wanted, abs=1e-9)
    assert got.similarity.figure.low == got.similarity.figure.high == got.similarity.figure.value


def test_without_noise_a_pair_is_what_sdmetrics_gives(world: World) -> None:
    """CorrelationSimilarity of sdmetrics 0.25 by its formula, 1 − |ρ_real − ρ_synthetic| / 2, with scipy's pearsonr as
    it uses it: the package itself needs copulas, whose licence rules it out here."""
    got = world.answer(sigma=0.0, counts_sigma=0.0, rng=np.random.default_rng(0))
    for pair in got.pairs:
        columns = [int(name[1:]) for name in (pair.first, pair.second)]
        rho = [
            stats.pearsonr(*(world.asked.features[c][codes[:, c], 0] for c in columns)).statistic
            for codes in (world.held, world.made)
        ]
        assert pair.similarity.value == pytest.approx(1 - abs(rho[0] - rho[1]) / 2, abs=1e-9)


def test_the_order_of_pairs_is_that_of_the_query(world: World) -> None:
    """Moments answers with blocks j < k by rows; a column without a score (width 0) leaves no gap."""
    features = (world.asked.features[0], np.zeros((CODES, 0)), *world.asked.features[2:])
    query = Moments(features=features, bound_sq=world.asked.bound_sq, part="holdout")
    gram = query.unpack(np.arange(1.0, query.dim + 1))[0]
    assert gram[np.triu_indices(5, 1)] == pytest.approx(np.arange(1.0, query.dim + 1))


def test_with_noise_figures_are_covered(world: World) -> None:
    """40 runs of the mechanism on the same patients: 600 pairs at 95 %, the mean, six axes and the overlap.

    Planted: noise told as half of what it is: red.
    """
    rng = np.random.default_rng(1)
    exact = world.answer(sigma=0.0, counts_sigma=0.0, rng=rng)
    right = axes(exact)
    pairs, similar, mean, along, errors = [], [], [], [], []
    for seed in range(40):
        got = world.answer(sigma=75.0, counts_sigma=10.0, rng=rng, seed=seed)
        for a, b in zip(got.pairs, exact.pairs, strict=True):
            pairs.append(a.real.low <= b.real.value <= a.real.high)
            similar.append(a.similarity.low - 1e-9 <= b.similarity.value <= a.similarity.high + 1e-9)
        figure = got.similarity.figure
        mean.append(figure.low <= exact.similarity.figure.value <= figure.high)
        errors.append(figure.value - exact.similarity.figure.value)
        found = axes(got)
        for a, b in zip((*found.real, found.together), (*right.real, right.together), strict=True):
            along.append(a.low <= b.value <= a.high)
    assert 0.92 < np.mean(pairs) < 0.98 and 0.92 < np.mean(similar) < 0.985
    assert sum(mean) >= 34
    assert np.mean(along) > 0.88
    assert np.mean(np.abs(errors)) < 0.015


def test_the_overlap_of_axes_is_exact_without_noise_and_at_most_one(world: World) -> None:
    exact = world.answer(sigma=0.0, counts_sigma=0.0, rng=np.random.default_rng(0))
    got = axes(exact)
    values, vectors = np.linalg.eigh(exact.synthetic)
    k = len(got.real)
    top = vectors[:, ::-1][:, :k]
    held = np.trace(top.T @ exact.real @ top)
    assert got.overlap.figure.value == pytest.approx(held / np.linalg.eigvalsh(exact.real)[-k:].sum(), abs=1e-9)
    assert got.together.value == pytest.approx(held / 6, abs=1e-9)
    assert sum(f.value or 0.0 for f in got.real) == pytest.approx(held / 6, abs=1e-9)
    assert got.synthetic == pytest.approx(tuple(values[::-1][:k] / 6), abs=1e-12)


def test_noise_that_swamps_is_said(world: World) -> None:
    got = world.answer(sigma=5000.0, counts_sigma=10.0, rng=np.random.default_rng(2))
    assert all(p.real.value is None for p in got.pairs)
    assert not any(p.equivalence.equivalent for p in got.pairs)


def test_scores_are_centred_bounded_and_skip_what_has_no_order(world: World) -> None:
    for c, score in zip(world.asked.columns, world.asked.scores, strict=True):
        counts = world.bins[c].counts
        assert abs((counts * score).sum()) < 1e-6 * counts.sum() and score[-1] == 0.0
        assert np.abs(score).max() <= 3.0
    three = Bins.of(np.array([0, 1, 2, 0, 1]), grid(4, categorical=True), 10)
    still = Bins.of(np.zeros(5, dtype=int), grid(CODES, categorical=False), 10)
    with pytest.raises(ValueError):
        rank_scores([three, still, world.bins[0]], np.zeros((5, 3), dtype=int))
    assert rank_scores(world.bins, world.made).clip_share <= 0.011


def test_fewer_bins_where_the_noise_is_larger() -> None:
    number = [most_bins(columns=30, sigma=s, patients=3000) for s in (0.0, 5.0, 20.0, 60.0, 500.0)]
    assert number == sorted(number, reverse=True)
    assert number[0] == BINS_AT_MOST and number[-1] == BINS_AT_LEAST


def test_what_does_not_fit_is_refused(world: World) -> None:
    good = {
        "names": ["a", "b"],
        "scores": [np.zeros(3)] * 2,
        "comoments": np.zeros(1),
        "sigma": 1.0,
        "counts": [np.ones(3)] * 2,
        "counts_sigma": 0.0,
        "synthetic_counts": [np.ones(3)] * 2,
        "synthetic_bins": np.zeros((4, 2), dtype=int),
        "patients": 3.0,
    }
    bad_ones: list[dict[str, object]] = [
        {"comoments": np.zeros(2)},
        {"comoments": np.array([np.nan])},
        {"sigma": -1.0},
        {"patients": 0.0},
        {"scores": [np.zeros(2)] * 2},
        {"names": ["a"]},
    ]
    for bad in bad_ones:
        with pytest.raises(ValueError):
            correlations(**{**good, **bad})

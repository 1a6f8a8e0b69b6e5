"""The questions that every generator here begins with, and what they say: `Measured`.

    "ranges"   Counts   coarse histograms on public groups  -> the shape of each distribution
    "grain"    Counts   fine histograms on the public grid  -> round numbers, single values that stand out
    "bins"     Counts   in adaptive bins chosen from both   -> one-way distributions
    "pairs"    Moments  the Gram matrix of the features     -> dependence of all pairs of columns
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.common.encoding import Grid, NumberGrid
from cohortium.common.generators.base import Ask, Facts, Floats, Phase, max_fine_dim
from cohortium.common.generators.bins import (
    MOST_LEVEL_BINS,
    MOST_NUMBER_BINS,
    Bins,
    adaptive_bins,
    combine,
    groups,
    merge_scales,
    total_mass,
)
from cohortium.common.generators.features import Recipe, column_features, norm_bound_sq
from cohortium.common.queries import Counts, Moments

MOST_FEATURES = 1200  # of all columns together: the Gram matrix stays below a million numbers
BIN_NOISE = 3.0  # a bin's mass is at least this many standard deviations of the second count


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All that is known of the records, noised.

    bins: per column; one_way: per column, probabilities of its bins; one_way_sigma: their noise;
    features: per column [bins, k]; gram: [Σk, Σk] mean of φφᵀ with zero diagonal blocks, shrunk for its
    noise; gram_sigma: noise of one entry before shrinking; total: noised number of patients.
    """

    bins: tuple[Bins, ...]
    one_way: tuple[Floats, ...]
    one_way_sigma: float
    features: tuple[Floats, ...]
    gram: Floats
    gram_sigma: float
    total: float

    @property
    def ends(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([f.shape[1] for f in self.features])])


def recipe_for(facts: Facts) -> Recipe:
    """Features by public rule: fewer for many columns."""
    room = max(1, MOST_FEATURES // len(facts.columns))
    degree = 2 if room >= 3 else 1
    return Recipe(degree=degree, most=max(1, min(16, room)))


def bins_per_column(facts: Facts) -> tuple[int, int]:
    """(numbers, levels): most bins of a column, fewer for many columns."""
    columns = len(facts.columns)
    scale = min(1.0, 100 / columns)
    return max(6, int(MOST_NUMBER_BINS * scale)), max(8, int(MOST_LEVEL_BINS * scale))


def measuring_phases(facts: Facts, *, ranges: float, grain: float, bins: float, pairs: float | None) -> tuple[Phase, ...]:
    """The phases with these shares, "pairs" only where wanted; one column has no pairs: the bins get its share."""
    numbers, levels = bins_per_column(facts)
    most = sum(min(size, (levels if categorical else numbers) + 1) for _, size, categorical in facts.columns)
    single = len(facts.columns) < 2
    out = [
        Phase(
            name="ranges",
            purpose="where values lie: coarse histograms on the dictionary's own grid",
            kind="counts",
            share=ranges,
            max_dim=max_fine_dim(facts),
        ),
        Phase(
            name="grain",
            purpose="which single values are common (round numbers): fine histograms on the same grid",
            kind="counts",
            share=grain,
            max_dim=max_fine_dim(facts),
        ),
        Phase(
            name="bins",
            purpose="how often each bin occurs, in bins that hold enough patients",
            kind="counts",
            share=bins + (pairs or 0.0) if single else bins,
            max_dim=most,
        ),
    ]
    if not single and pairs is not None:
        recipe = recipe_for(facts)
        widths = [min(size, recipe.most if c else recipe.degree + 1) for _, size, c in facts.columns]
        out.append(
            Phase(
                name="pairs",
                purpose="how columns move together: one matrix of bounded features for all pairs",
                kind="moments",
                share=pairs,
                max_dim=max(1, (sum(widths) ** 2 - sum(w * w for w in widths)) // 2),
            )
        )
    return tuple(out)


def measure(ask: Ask, *, grids: tuple[Grid, ...], facts: Facts, sigma_ratio: float, pairs: bool = True) -> Measured:
    """Ask the four questions. sigma_ratio: noise of "bins" over noise of "grain", from the phases' shares."""
    columns = tuple(range(len(grids)))
    coarse_maps = tuple(coarse_map(g) for g in grids)
    coarse = _split_counts(ask, "ranges", columns, coarse_maps)
    fine = _split_counts(ask, "grain", columns, tuple(np.arange(g.size, dtype=np.int32) for g in grids))
    rough = total_mass(
        np.array([h.sum() for h in coarse.parts]), np.array([len(h) for h in coarse.parts], dtype=np.int64)
    )
    numbers, levels = bins_per_column(facts)
    bins, first, first_sigma = [], [], []
    for g, f, c in zip(grids, fine.parts, coarse.parts):
        cells, cell_sigma, group_sigma = _merge(g, f, fine.sigma, c, coarse.sigma)
        b = adaptive_bins(
            g,
            cells,
            sigma=cell_sigma,
            group_sigma=group_sigma,
            total=rough,
            least=BIN_NOISE * fine.sigma * sigma_ratio,
            most=levels if g.categorical else numbers,
        )
        bins.append(b)
        first.append(np.bincount(b.map, weights=cells, minlength=b.size))
        first_sigma.append(_bin_sigma(b, cell_sigma, group_sigma))
    counted = _split_counts(ask, "bins", columns, tuple(b.map for b in bins))
    total = total_mass(
        np.array([h.sum() for h in counted.parts]), np.array([b.size for b in bins], dtype=np.int64)
    )
    one_way = tuple(
        combine(a, sd, h, counted.sigma, total) for a, sd, h in zip(first, first_sigma, counted.parts)
    )
    features, gram, gram_sigma = _pairs(ask if pairs else None, tuple(bins), one_way, facts, total)
    return Measured(
        bins=tuple(bins),
        one_way=one_way,
        one_way_sigma=counted.sigma / total,
        features=features,
        gram=gram,
        gram_sigma=gram_sigma,
        total=total,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    parts: list[Floats]
    sigma: float


def _split_counts(ask: Ask, phase: str, columns: tuple[int, ...], maps: tuple[NDArray[np.int32], ...]) -> _Parts:
    bins = tuple(int(m.max()) + 1 for m in maps)
    answer = ask(phase, Counts(columns=columns, maps=maps, bins=bins))
    return _Parts(parts=np.split(answer.values, np.cumsum(bins)[:-1]), sigma=answer.sigma)


def coarse_map(grid: Grid) -> NDArray[np.int32]:
    """Public groups of cells; levels are their own groups, missing is one."""
    if not isinstance(grid, NumberGrid):
        return np.arange(grid.size, dtype=np.int32)
    label = groups(grid.size - 1)
    return np.append(label, label[-1] + 1).astype(np.int32)


def _merge(
    grid: Grid, fine: Floats, fine_sigma: float, coarse: Floats, coarse_sigma: float
) -> tuple[Floats, float, Floats]:
    """Fine cells (missing last) from both counts; noise of a cell; noise of its group's sum."""
    if isinstance(grid, NumberGrid):
        cells, group_sigma = merge_scales(fine[:-1], fine_sigma, coarse[:-1], coarse_sigma)
        gone, _ = _both(fine[-1:], fine_sigma, coarse[-1:], coarse_sigma)
        return np.concatenate([cells, gone]), fine_sigma, group_sigma
    both, sigma = _both(fine, fine_sigma, coarse, coarse_sigma)
    return both, sigma, np.full(len(fine) - 1, sigma)


def _both(fine: Floats, fine_sigma: float, coarse: Floats, coarse_sigma: float) -> tuple[Floats, float]:
    if fine_sigma <= 0 or coarse_sigma <= 0:
        return fine, 0.0
    a, b = fine_sigma**-2, coarse_sigma**-2
    return (a * fine + b * coarse) / (a + b), 1.0 / math.sqrt(a + b)


def _bin_sigma(bins: Bins, cell_sigma: float, group_sigma: Floats) -> Floats:
    """Noise of each bin's first count: whole groups carry the group's noise, parts of one that of cells."""
    if not bins.ordered:
        return cell_sigma * np.sqrt(np.bincount(bins.map, minlength=bins.size))
    group = groups(len(bins.map) - 1)
    size = np.bincount(group)
    variance = np.zeros(bins.size)
    pair, count = np.unique(np.stack([bins.map[:-1], group]), axis=1, return_counts=True)
    spread = group_sigma[np.searchsorted(group, pair[1])]
    part = count / size[pair[1]]
    np.add.at(variance, pair[0], count * (1 - part) * cell_sigma**2 + part**2 * spread**2)
    if bins.missing >= 0:
        variance[bins.missing] = cell_sigma**2
    return np.sqrt(variance)


def _pairs(
    ask: Ask | None, bins: tuple[Bins, ...], one_way: tuple[Floats, ...], facts: Facts, total: float
) -> tuple[tuple[Floats, ...], Floats, float]:
    recipe = recipe_for(facts)
    features = tuple(
        column_features(
            p,
            ordered=b.ordered,
            missing=b.missing,
            recipe=recipe,
            scale=recipe.target_scale if c == facts.target else 1.0,
        )
        for c, (b, p) in enumerate(zip(bins, one_way))
    )
    width = sum(f.shape[1] for f in features)
    if len(bins) < 2 or ask is None:
        return features, np.zeros((width, width)), 0.0
    query = Moments(
        features=tuple(f[b.map] for f, b in zip(features, bins)),
        bound_sq=norm_bound_sq(list(one_way), list(features), recipe.spread),
    )
    answer = ask("pairs", query)
    gram = query.unpack(answer.values)[0] / total
    sigma = answer.sigma / total
    return features, shrink(gram, [f.shape[1] for f in features], sigma), sigma


def shrink(gram: Floats, widths: list[int], sigma: float) -> Floats:
    """Each block (c, c') towards 0 by its known noise: positive-part James-Stein, 1 − kσ²/‖block‖²."""
    if sigma <= 0:
        return gram
    ends = np.concatenate([[0], np.cumsum(widths)])
    starts = ends[:-1]
    energy = np.add.reduceat(np.add.reduceat(gram**2, starts, axis=0), starts, axis=1)
    count = np.outer(widths, widths)
    noise = np.maximum(count - 2, 1) * sigma**2
    keep = np.maximum(1.0 - noise / np.maximum(energy, 1e-300), 0.0)
    return gram * np.repeat(np.repeat(keep, widths, axis=0), widths, axis=1)


def sigma_ratio(phases: tuple[Phase, ...]) -> float:
    """Noise of the "bins" answer over that of "grain": both count the same columns once."""
    share = {p.name: p.share for p in phases}
    return math.sqrt(share["grain"] / share["bins"])


def as_json(value: Any) -> Any:
    """Numbers for a JSON header: NumPy scalars become Python's."""
    return value.item() if isinstance(value, np.generic) else value

"""The questions that every generator here begins with, and what they say: `Measured`.

"ranges"   Counts   coarse histograms on public groups  -> the shape of each distribution
"grain"    Counts   fine histograms on the public grid  -> round numbers, single values that stand out
"bins"     Counts   in adaptive bins chosen from both   -> one-way distributions
"pairs"    Moments  the Gram matrix of the features     -> dependence of all pairs of columns
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cohortium.common.encoding import Grid
from cohortium.common.generators.base import Ask, Facts, Floats, Phase
from cohortium.common.generators.bins import (
    GROUP,
    MOST_LEVEL_BINS,
    MOST_NUMBER_BINS,
    Bins,
    adaptive_bins,
    groups,
    inside,
    merge_scales,
    to_simplex,
    total_mass,
)
from cohortium.common.generators.features import Recipe, clear_own, column_features, norm_bound_sq
from cohortium.common.generators.relevance import Seen
from cohortium.common.generators.three_way import ByClass, classes
from cohortium.common.queries import Counts, Moments

MOST_FEATURES = 1200  # of all columns together: the Gram matrix stays below a million numbers
FINE_EPSILON, FINE_COLUMNS = 2.0, 100
"""From this ε on, and up to so many columns, dependence is known well enough for finer features and a longer fit."""
FEW_CODES = 9  # a column with at most so many codes is counted once
SHRINK = 1.0  # of James-Stein
BIN_NOISE = 3.0  # a bin's mass is at least this many standard deviations of the second count


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All that is known of the records, noised.

    bins: per column; one_way: per column, probabilities of its bins; one_way_sd: their noise; features: per
    column [bins, k]; gram: [Σk, Σk] mean of φφᵀ with zero diagonal blocks, shrunk for its noise; seen: the same
    before shrinking, with its noise and the noised number of patients; by_class: the same moments within each class of
    the target, where they were asked.
    """

    bins: tuple[Bins, ...]
    one_way: tuple[Floats, ...]
    one_way_sd: tuple[Floats, ...]
    features: tuple[Floats, ...]
    gram: Floats
    seen: Seen
    by_class: ByClass | None = None

    @property
    def gram_sd(self) -> float:
        """Noise of an entry of the matrix as released."""
        return self.seen.sd

    @property
    def total(self) -> float:
        """Noised number of patients."""
        return self.seen.patients

    @property
    def ends(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([f.shape[1] for f in self.features])])


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Parts of the budget for each question; they and the rest of a generator's phases sum to 1."""

    ranges: float
    grain: float
    bins: float
    pairs: float


def is_fine(facts: Facts) -> bool:
    """Whether finer features and a longer fit pay."""
    return facts.epsilon >= FINE_EPSILON and len(facts.columns) <= FINE_COLUMNS


def recipe_for(facts: Facts) -> Recipe:
    """Features by public rule: fewer for many columns."""
    room = max(1, MOST_FEATURES // len(facts.columns))
    degree = 3 if is_fine(facts) else 2 if room >= 3 else 1
    # The target's pairs matter most and cost little: its features are one column's share of the norm.
    scale = 3.0 if facts.epsilon < 2 else 2.0
    scales = (0.7, 0.5, 0.35) if degree == 3 else (0.7, 0.35)
    return Recipe(degree=degree, rank_scale=scales, most=max(1, min(16, room)), target_scale=scale)


def bins_per_column(facts: Facts) -> tuple[int, int]:
    """(numbers, levels): most bins of a column, fewer for many columns."""
    columns = len(facts.columns)
    scale = min(1.0, 100 / columns)
    return max(6, int(MOST_NUMBER_BINS * scale)), max(8, int(MOST_LEVEL_BINS * scale))


def grained(facts: Facts) -> tuple[int, ...]:
    """Columns whose grid is finer than the coarse groups."""
    return tuple(c for c, (_, size, levels) in enumerate(facts.columns) if not levels and size > 2 * GROUP)


def rebinned(facts: Facts) -> tuple[int, ...]:
    """Columns counted again: those with few codes are known well enough from the first count."""
    return tuple(c for c, (_, size, _) in enumerate(facts.columns) if size > FEW_CODES)


def target_classes(facts: Facts) -> int:
    """Classes of the target that "pairs" is asked by: see three_way.py. A column of levels has one feature less."""
    recipe = recipe_for(facts)
    most = [max(1, min(size - 1, recipe.most if c else recipe.degree + 1)) for _, size, c in facts.columns]
    return classes(facts, sum(most))


def measuring_phases(facts: Facts, shares: Shares) -> tuple[Phase, ...]:
    """The phases. The share of a question that has nothing to ask goes to "ranges"."""
    grain, bins, pairs = grained(facts), rebinned(facts), len(facts.columns) > 1 and shares.pairs > 0
    spare = (0.0 if grain else shares.grain) + (0.0 if bins else shares.bins) + (0.0 if pairs else shares.pairs)
    out = [
        Phase(
            name="ranges",
            purpose="where values lie: coarse histograms on the dictionary's own grid",
            kind="counts",
            share=shares.ranges + spare,
            max_dim=sum(s if c not in grain else -(-(s - 1) // GROUP) + 1 for c, (_, s, _) in enumerate(facts.columns)),
        )
    ]
    if grain:
        out.append(
            Phase(
                name="grain",
                purpose="which single values are common (round numbers): fine histograms of numbers",
                kind="counts",
                share=shares.grain,
                max_dim=sum(facts.columns[c][1] for c in grain),
            )
        )
    if bins:
        out.append(
            Phase(
                name="bins",
                purpose="how often each bin occurs, in bins that hold enough patients",
                kind="counts",
                share=shares.bins,
                max_dim=sum(facts.columns[c][1] if facts.columns[c][2] else most_bins(facts, c) for c in bins),
            )
        )
    if pairs:
        recipe = recipe_for(facts)
        widths = [min(size, recipe.most if c else recipe.degree + 1) for _, size, c in facts.columns]
        parts = target_classes(facts)
        within = "" if parts == 1 else ", within each class of the target"
        out.append(
            Phase(
                name="pairs",
                purpose=f"how columns move together: one matrix of bounded features for all pairs{within}",
                kind="moments",
                share=shares.pairs,
                max_dim=max(1, (sum(widths) ** 2 - sum(w * w for w in widths)) // 2) * parts,
            )
        )
    return tuple(out)


def most_bins(facts: Facts, column: int) -> int:
    """Most bins that a column may get, its missing bin included."""
    numbers, levels = bins_per_column(facts)
    _, size, categorical = facts.columns[column]
    return min(size, (levels if categorical else numbers) + 1)


def measure(ask: Ask, *, grids: tuple[Grid, ...], facts: Facts, phases: tuple[Phase, ...]) -> Measured:
    """Ask the measuring questions among `phases`, in their order."""
    share = {p.name: p.share for p in phases}
    numbers, levels = bins_per_column(facts)
    grain, again = grained(facts), rebinned(facts)
    everyone = tuple(range(len(grids)))
    maps = tuple(coarse_map(g) if c in grain else np.arange(g.size, dtype=np.int32) for c, g in enumerate(grids))
    coarse = _counts(ask, "ranges", everyone, maps)
    fine = _counts(ask, "grain", grain, tuple(np.arange(grids[c].size, dtype=np.int32) for c in grain))
    rough = total_mass(coarse.totals())
    # The noise that "bins" will have, to choose bins that stand out of it.
    ahead = math.sqrt(share["ranges"] / share.get("bins", 1.0) * len(again) / len(grids))
    bins, first, first_sd = [], [], []
    for c, g in enumerate(grids):
        cells, cell_sd, group_sd = _merged(c, coarse, fine)
        b = adaptive_bins(
            g,
            cells,
            sigma=cell_sd,
            group_sigma=group_sd,
            total=rough,
            least=BIN_NOISE * coarse.sigma * ahead,
            most=levels if g.categorical else numbers,
        )
        bins.append(b)
        first.append(np.bincount(b.map, weights=cells, minlength=b.size).astype(np.float64))
        first_sd.append(_bin_sd(b, cell_sd, group_sd))
    # A cell more costs nothing: levels that share a bin are counted one by one, so that it is known what it holds.
    spread = {c for c in again if grids[c].categorical and bins[c].size < grids[c].size}
    counted = _counts(
        ask,
        "bins",
        again,
        tuple(np.arange(grids[c].size, dtype=np.int32) if c in spread else bins[c].map for c in again),
    )
    total = total_mass(coarse.totals() + counted.totals())
    one_way, one_way_sd = [], []
    for c in everyone:
        if c in spread:
            bins[c], best, sd = _levels_again(bins[c], coarse, counted, c, total)
            one_way.append(best / total)
            one_way_sd.append(sd / total)
            continue
        best, sd = _both(first[c], first_sd[c], *counted.of(c, first[c], first_sd[c]))
        one_way.append(to_simplex(best, total) / total)
        one_way_sd.append(sd / total)
    features, gram, seen, by_class = _pairs(
        ask if "pairs" in share else None, tuple(bins), tuple(one_way), facts, total
    )
    return Measured(
        bins=tuple(bins),
        one_way=tuple(one_way),
        one_way_sd=tuple(one_way_sd),
        features=features,
        gram=gram,
        seen=seen,
        by_class=by_class,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """Histograms of some columns with one noise."""

    parts: dict[int, Floats]
    sigma: float

    def totals(self) -> list[tuple[float, float]]:
        """(sum, variance) of each histogram: all estimate the number of patients."""
        return [(float(p.sum()), self.sigma**2 * len(p)) for p in self.parts.values()]

    def of(self, column: int, values: Floats, sd: Floats) -> tuple[Floats, Floats]:
        """The column's histogram and its noise; the given ones where it was not counted."""
        if column not in self.parts:
            return values, sd
        return self.parts[column], np.full(len(values), self.sigma)


def _counts(ask: Ask, phase: str, columns: tuple[int, ...], maps: tuple[NDArray[np.int32], ...]) -> _Counted:
    if not columns:
        return _Counted(parts={}, sigma=0.0)
    bins = tuple(int(m.max()) + 1 for m in maps)
    answer = ask(phase, Counts(columns=columns, maps=maps, bins=bins))
    return _Counted(parts=dict(zip(columns, np.split(answer.values, np.cumsum(bins)[:-1]))), sigma=answer.sigma)


def _levels_again(
    b: Bins, coarse: _Counted, counted: _Counted, column: int, total: float
) -> tuple[Bins, Floats, Floats]:
    """(bins that know what is inside them, counts of the bins, their noise) of levels that were counted twice."""
    first, second = coarse.parts[column], counted.parts[column]
    both, sd = _both(first, np.full(len(first), coarse.sigma), second, np.full(len(second), counted.sigma))
    required = b.missing < 0
    if required:  # nobody is missing: what was counted there is noise
        both = both[:-1]
    mass = to_simplex(both, total)
    held, within = inside(b.map, np.append(mass, 0.0) if required else mass, b.size, required=required)
    variance = np.bincount(b.map, weights=sd**2, minlength=b.size)
    return replace(b, within=within), held, np.sqrt(variance)


def coarse_map(grid: Grid) -> NDArray[np.int32]:
    """Public groups of a number's cells; missing is a group of its own."""
    label = groups(grid.size - 1)
    return np.append(label, label[-1] + 1).astype(np.int32)


def _merged(column: int, coarse: _Counted, fine: _Counted) -> tuple[Floats, float, Floats]:
    """Fine cells (missing last) from both counts; noise of a cell; noise of its group's sum, per cell."""
    rough = coarse.parts[column]
    if column not in fine.parts:
        return rough, coarse.sigma, np.full(len(rough) - 1, coarse.sigma)
    cells, group_sd = merge_scales(fine.parts[column][:-1], fine.sigma, rough[:-1], coarse.sigma)
    gone, _ = _both(fine.parts[column][-1:], np.array([fine.sigma]), rough[-1:], np.array([coarse.sigma]))
    return np.concatenate([cells, gone]), fine.sigma, group_sd


def _both(first: Floats, first_sd: Floats, second: Floats, second_sd: Floats) -> tuple[Floats, Floats]:
    """Two noised measures weighted by 1/variance, and their noise. The same measure twice is itself."""
    if second is first:
        return first, first_sd
    if not ((first_sd > 0).all() and (second_sd > 0).all()):
        return second, np.zeros(len(second))
    a, b = first_sd**-2.0, second_sd**-2.0
    return (a * first + b * second) / (a + b), 1.0 / np.sqrt(a + b)


def _bin_sd(bins: Bins, cell_sd: float, group_sd: Floats) -> Floats:
    """Noise of each bin's first count: whole groups carry the group's noise, parts of one that of cells."""
    if not bins.ordered:
        return cell_sd * np.sqrt(np.bincount(bins.map, minlength=bins.size))
    group = groups(len(bins.map) - 1)
    size = np.bincount(group)
    variance = np.zeros(bins.size)
    pair, count = np.unique(np.stack([bins.map[:-1], group]), axis=1, return_counts=True)
    spread = group_sd[np.searchsorted(group, pair[1])]
    part = count / size[pair[1]]
    np.add.at(variance, pair[0], count * (1 - part) * cell_sd**2 + part**2 * spread**2)
    if bins.missing >= 0:
        variance[bins.missing] = cell_sd**2
    return np.sqrt(variance)


def _pairs(
    ask: Ask | None, bins: tuple[Bins, ...], one_way: tuple[Floats, ...], facts: Facts, total: float
) -> tuple[tuple[Floats, ...], Floats, Seen, ByClass | None]:
    """(features, the shrunk matrix, the matrix as released, its parts by class)."""
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
        nothing = np.zeros((width, width))
        return features, nothing, Seen(gram=nothing, sd=0.0, patients=total), None
    target = facts.target if target_classes(facts) > 1 else None
    query = Moments(
        features=tuple(f[b.map] for f, b in zip(features, bins)),
        bound_sq=norm_bound_sq(list(one_way), list(features), recipe.spread),
        by=None if target is None else (target, bins[target].map, bins[target].size),
    )
    answer = ask("pairs", query)
    parts = query.unpack(answer.values) / total
    sigma, by_class = answer.sigma / total, None
    if target is not None:
        by_class = ByClass(moments=parts, sd=sigma, patients=total)
        sigma *= math.sqrt(len(parts))
    seen = Seen(gram=parts.sum(axis=0), sd=sigma, patients=total)
    return features, shrink(seen.gram, [f.shape[1] for f in features], sigma), seen, by_class


def shrink(gram: Floats, widths: list[int], sigma: float) -> Floats:
    """Each block (c, c') towards 0 by its known noise: positive-part James-Stein, 1 − kσ²/‖block‖²."""
    if sigma <= 0:
        return gram
    ends = np.concatenate([[0], np.cumsum(widths)])
    starts = ends[:-1]
    energy = np.add.reduceat(np.add.reduceat(gram**2, starts, axis=0), starts, axis=1)
    count = np.outer(widths, widths)
    noise = SHRINK * np.maximum(count - 2, 1) * sigma**2
    keep = np.maximum(1.0 - noise / np.maximum(energy, 1e-300), 0.0)
    blocks = gram * np.repeat(np.repeat(keep, widths, axis=0), widths, axis=1)
    return 0.5 * (blocks + _spectral(gram, widths, sigma))


def _spectral(gram: Floats, widths: list[int], sigma: float) -> Floats:
    """Eigenvalues shrunk by what noise adds to them: λ → sign(λ)·√(λ² − 4pσ²)₊ (Gavish & Donoho 2017, eq. 7).

    Sees dependence spread over many columns that no single block shows; blocks see what a few columns share.
    Their mean beat either alone.
    """
    values, vectors = np.linalg.eigh(gram)
    kept = np.sign(values) * np.sqrt(np.maximum(values**2 - 4 * len(gram) * sigma**2, 0.0))
    return clear_own((vectors * kept) @ vectors.T, widths)

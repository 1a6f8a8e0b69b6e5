"""Choose, among rows drawn in excess, those whose one-ways and Gram matrix match given targets. Free.

Descent by swaps: with R the gap between the targets and the kept rows' moments, a row's score is ⟨R, f(x)⟩,
f the one-hot bins and the products of features. The best rows outside take the place of the worst inside, as
many as lower the squared gap most (it is quadratic in the number of swaps). Kernel herding (Welling 2009;
Chen, Welling & Smola 2010) picks one row at a time by the same score. Rows are never compared with records.

A step looks at a part of the rows only, one part after the other: the gap is new after every step, and many small steps
close it further than a few on all rows, as in stochastic descent. A part's arrays fit in the processor's cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats

EXCESS = 4
STEPS = 96
PART = 64  # rows kept in a part, at least
MOST_PARTS = 32
FIRST_SWAP = 0.3  # of the rows kept in a part, in the first step
MOST_SWAP = 0.5
GROWTH = 1.1  # of the share that is swapped, where the best step was longer than the one taken
ONE_WAY_WEIGHT = 4.0
GROUP_CELLS = 1024  # combinations of bins of neighbouring columns that are looked up together

Single = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """one_way: per column, probabilities of bins; features: per column [bins, k]; gram: [Σk, Σk], zero
    diagonal blocks, the mean of φφᵀ that kept rows shall have."""

    one_way: tuple[Floats, ...]
    features: tuple[Floats, ...]
    gram: Floats


def towards(model: Floats, measured: Floats, tolerance: float | Floats) -> Floats:
    """The model's value moved to the measured one, less `tolerance`: noise below it is not followed."""
    gap = measured - model
    return model + np.sign(gap) * np.maximum(np.abs(gap) - tolerance, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Neighbouring columns whose bins are looked up as one code. table: features of each code [codes, Σk of these]."""

    columns: range
    table: Single


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Some candidates; the first `kept` are in. rows: their indices; cells: one-hot positions [rows, columns];
    codes: per group [rows]; phi: [rows, Σk]."""

    kept: int
    rows: Ints
    cells: Ints
    codes: tuple[Ints, ...]
    phi: Single

    def swap(self, enter: NDArray[np.intp], leave: NDArray[np.intp]) -> None:
        arrays: tuple[NDArray[Any], ...] = (self.rows, self.cells, self.phi, *self.codes)
        for array in arrays:
            array[leave], array[enter] = array[enter], array[leave]


class Herder:
    """Selects rows of blocks of candidates so that each block alone has the wanted moments."""

    def __init__(self, targets: Targets) -> None:
        self._sizes = [len(p) for p in targets.one_way]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])[:-1]
        self._one = np.concatenate(targets.one_way).astype(np.float32)
        self._gram = targets.gram.astype(np.float32)
        at = np.concatenate([[0], np.cumsum([f.shape[1] for f in targets.features])])
        self._off = np.ones_like(self._gram)
        for a, b in itertools.pairwise(at):
            self._off[a:b, a:b] = 0.0
        self._gram *= self._off
        self._groups = _groups(self._sizes, targets.features)

    def select(self, bins: Ints, rows: int, *, more: int = 1) -> Ints:
        """Sorted indices of `rows` of the candidates [candidates, columns]; the first are the start.
        more: times the steps."""
        count = len(bins)
        if rows >= count:
            return np.arange(count)
        parts = self._parts(bins, rows)
        gram, ones = np.zeros_like(self._gram), np.zeros_like(self._one)
        for part in parts:
            phi = part.phi[: part.kept]
            gram += phi.T @ phi / np.float32(rows)
            ones += self._histogram(part.cells[: part.kept]) / np.float32(rows)
        gram *= self._off
        share = FIRST_SWAP
        for step in range(STEPS * more):
            part = parts[step % len(parts)]
            gap, gap_one = self._gram - gram, self._one - ones
            score = self._score(part, gap, ONE_WAY_WEIGHT * gap_one)
            enter, leave = _pairs(score, part.kept, max(1, int(share * part.kept)))
            change, change_one = self._change(part, enter, leave, rows)
            along = _dot(gap, change) + ONE_WAY_WEIGHT * _dot(gap_one, change_one)
            square = _dot(change, change) + ONE_WAY_WEIGHT * _dot(change_one, change_one)
            best = along / square if square > 0 else 0.0
            if best <= 0:
                share /= 2
                continue
            if best < 1:
                swaps = max(1, int(best * len(enter)))
                enter, leave = enter[:swaps], leave[:swaps]
                change, change_one = self._change(part, enter, leave, rows)
            gram, ones = gram + change, ones + change_one
            part.swap(enter, leave)
            share = min(share * GROWTH, MOST_SWAP) if best >= 1 else share * max(best, 0.5)
        return np.sort(np.concatenate([part.rows[: part.kept] for part in parts]))

    def _parts(self, bins: Ints, rows: int) -> list[_Part]:
        """The candidates in parts of like size, each with its share of the rows that are in at the start."""
        many = min(max(rows // PART, 1), MOST_PARTS, len(bins) - rows)
        inside = np.linspace(0, rows, many + 1).astype(np.int64)
        outside = np.linspace(rows, len(bins), many + 1).astype(np.int64)
        parts = []
        for (a, b), (c, d) in zip(itertools.pairwise(inside), itertools.pairwise(outside), strict=True):
            here = np.concatenate([bins[a:b], bins[c:d]])
            codes = tuple(self._codes(here, group) for group in self._groups)
            phi = np.concatenate([group.table.take(code, axis=0) for group, code in zip(self._groups, codes)], axis=1)
            index = np.concatenate([np.arange(a, b), np.arange(c, d)])
            parts.append(_Part(kept=int(b - a), rows=index, cells=here + self._starts, codes=codes, phi=phi))
        return parts

    def _codes(self, bins: Ints, group: _Group) -> Ints:
        code = bins[:, group.columns[0]].astype(np.int64)
        for column in group.columns[1:]:
            code *= self._sizes[column]
            code += bins[:, column]
        return code

    def _score(self, part: _Part, gap: Single, gap_one: Single) -> Single:
        """⟨R, f(x)⟩ of each row of the part."""
        score: Single = np.einsum("ij,ij->i", part.phi @ gap, part.phi)
        for group, code in zip(self._groups, part.codes):
            table = np.zeros(1, dtype=np.float32)
            for column in group.columns:
                start = self._starts[column]
                table = np.add.outer(table, gap_one[start : start + self._sizes[column]]).ravel()
            score += table.take(code)
        return score

    def _histogram(self, cells: Ints) -> Single:
        return np.bincount(cells.ravel(), minlength=len(self._one)).astype(np.float32)

    def _change(
        self, part: _Part, enter: NDArray[np.intp], leave: NDArray[np.intp], rows: int
    ) -> tuple[Single, Single]:
        """What the swap adds to the kept rows' moments."""
        a, b = part.phi[enter], part.phi[leave]
        ones = self._histogram(part.cells[enter]) - self._histogram(part.cells[leave])
        return (a.T @ a - b.T @ b) * self._off / np.float32(rows), ones / np.float32(rows)


def _groups(sizes: list[int], features: tuple[Floats, ...]) -> tuple[_Group, ...]:
    """Columns in groups of at most GROUP_CELLS combinations of bins (a column that has more is alone)."""
    groups, first = [], 0
    while first < len(sizes):
        last, cells = first + 1, sizes[first]
        while last < len(sizes) and cells * sizes[last] <= GROUP_CELLS:
            cells, last = cells * sizes[last], last + 1
        places = np.unravel_index(np.arange(cells), sizes[first:last])
        tables = [features[first + i][place] for i, place in enumerate(places)]
        groups.append(_Group(columns=range(first, last), table=np.concatenate(tables, axis=1).astype(np.float32)))
        first = last
    return tuple(groups)


def _pairs(score: Single, kept: int, most: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """At most `most` rows to enter, best first, and as many to leave, worst first."""
    inside, outside = score[:kept], score[kept:]
    swaps = min(most, len(inside), len(outside))
    enter = np.argpartition(outside, len(outside) - swaps)[len(outside) - swaps :]
    leave = np.argpartition(inside, swaps - 1)[:swaps]
    return enter[np.argsort(-outside[enter])] + kept, leave[np.argsort(inside[leave])]


def _dot(a: Single, b: Single) -> float:
    return float(np.vdot(a, b))

"""The bins in which held-out patients are counted: made from the synthetic table and public numbers alone.

Few bins where the noise is large: the error of a mean distance grows with bins^¾, the distance hardly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cohortium.common.encoding import Grid, NumberGrid

BINS_AT_LEAST, BINS_AT_MOST = 4, 20
ERROR_WANTED = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """One column's bins: map int32 [fine codes] -> bin; the last bin is missing.

    ordered: the bins are in the order of the values. counts: synthetic rows in each bin, float64 [size].
    """

    size: int
    ordered: bool
    map: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, codes: np.ndarray, grid: Grid, most: int) -> Bins:
        """codes: the synthetic column, [rows]; most: bins for the values present. Levels are bins of their own."""
        if grid.categorical or grid.size <= most + 1:
            table, size = np.arange(grid.size, dtype=np.int32), grid.size
        else:
            present = np.sort(codes[codes != grid.missing])
            cuts = present[np.linspace(0, len(present) - 1, most + 1).astype(int)[1:-1]] if len(present) else []
            edges = np.unique(np.asarray(cuts, dtype=np.int64))
            table = np.searchsorted(edges, np.arange(grid.size), side="left").astype(np.int32)
            size = len(edges) + 2
            table[grid.missing] = size - 1
        return cls(
            size=size,
            ordered=not grid.categorical,
            map=table,
            counts=np.bincount(table[codes], minlength=size).astype(float),
        )


def most_bins(*, columns: int, sigma: float, patients: float) -> int:
    """How many bins a number gets: so many that the mean distance's error stays near ERROR_WANTED.

    columns: counted at once; sigma: noise of a count; patients: how many are expected to answer (public). The
    noise s = σ/n of a share gives a mean distance the error 0.67 s k^¾ c^−¼ (worst case: no misfit at all).
    """
    if sigma <= 0:
        return BINS_AT_MOST
    room = ERROR_WANTED * columns**0.25 / (0.67 * sigma / max(patients, 1.0))
    return int(min(max(math.floor(room ** (4 / 3)), BINS_AT_LEAST), BINS_AT_MOST))


def values_of(grid: Grid) -> np.ndarray:
    """The number in the middle of each fine code, float64 [codes]; NaN for missing, and throughout for levels."""
    out = np.full(grid.size, np.nan)
    if isinstance(grid, NumberGrid) and grid.size > 1:
        codes = np.arange(grid.size - 1, dtype=np.int32)
        out[:-1] = grid.numbers(grid.decode(codes, np.full(len(codes), 0.5)))
    return out


def coarse(codes: np.ndarray, bins: Sequence[Bins]) -> np.ndarray:
    """Rows in bins, int64 [rows, columns], from rows in fine codes."""
    return np.stack([b.map[codes[:, c]] for c, b in enumerate(bins)], axis=1).astype(np.int64)

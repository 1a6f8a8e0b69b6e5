"""References: what real rows themselves would score, and what shuffled columns would.

A distance of 0.03 says nothing by itself: two samples of real patients are some distance apart as well. So
the patients of the training and the test table are dealt anew into two tables of the same sizes, many times
(a permutation of patients, not of rows: all rows of a patient stay together), and scored like the synthetic
rows. The shuffled table (each column permuted on its own) keeps every single column and no relation between
columns: a synthetic table that does not beat it has learned no relation.
All draws are seeded post-processing for the report; nothing here is noise of a release.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import special

from cohortium.common.evaluation import fidelity
from cohortium.common.evaluation.fidelity import Coded

GROUPS = 10


def patient_ordinals(table: pd.DataFrame, unit: str) -> np.ndarray:
    """Ordinal of each row's patient; with unit "row", or without that column, every row is its own patient.

    Rows whose identifier is missing are patients of their own.
    """
    if unit == "row" or unit not in table.columns:
        return np.arange(len(table))
    ordinal = pd.factorize(table[unit], use_na_sentinel=True)[0]
    alone = ordinal < 0
    ordinal[alone] = ordinal.max(initial=-1) + 1 + np.arange(alone.sum())
    return np.asarray(ordinal, dtype=np.int64)


def shuffled(table: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """The same table with every column permuted on its own."""
    rng = np.random.default_rng([seed, 1])
    return pd.DataFrame(
        {name: table[name].array[rng.permutation(len(table))] for name in table.columns},
        columns=table.columns,
    )


def deals(patients: np.ndarray, share: float, repeats: int, *, seed: int) -> Iterator[np.ndarray]:
    """Random parts of the patients: bool per row, true for the rows of about `share` of all patients."""
    rng = np.random.default_rng([seed, 2])
    total = int(patients.max(initial=-1)) + 1
    take = min(max(round(share * total), 1), max(total - 1, 1))
    for _ in range(repeats):
        chosen = np.zeros(total, dtype=bool)
        chosen[rng.permutation(total)[:take]] = True
        yield chosen[patients]


def column_deals(
    pooled: Coded, sizes: Sequence[int], patients: np.ndarray, share: float, repeats: int, *, seed: int
) -> list[np.ndarray]:
    """Differences of the shares of two re-dealt real tables: one float64 [repeats, cells] per column."""
    totals = [np.bincount(c, minlength=k) for c, k in zip(pooled.codes, sizes)]
    out = [np.zeros((repeats, k)) for k in sizes]
    for r, part in enumerate(deals(patients, share, repeats, seed=seed)):
        n = int(part.sum())
        rest = pooled.rows - n
        for c, k in enumerate(sizes):
            inside = np.bincount(pooled.codes[c][part], minlength=k)
            out[c][r] = inside / max(n, 1) - (totals[c] - inside) / max(rest, 1)
    return out


def pair_deals(
    pooled: Coded, sizes: Sequence[int], patients: np.ndarray, share: float, pairs: np.ndarray, *, seed: int
) -> np.ndarray:
    """Mean pair distance of two re-dealt real tables, float64 [repeats]; fewer repeats for larger tables."""
    repeats = int(np.clip(min(2e9 / max(pooled.rows * len(pairs), 1), 2e4 / max(len(pairs), 1)), 4, 20))
    out = []
    for part in deals(patients, share, repeats, seed=seed):
        first, second = pooled.take(part), pooled.take(~part)
        out.append(fidelity.pair_distances(first, second, sizes, pairs).mean() if len(pairs) else 0.0)
    return np.array(out)


def patient_groups(patients: np.ndarray, *, seed: int) -> np.ndarray:
    """Each row's jackknife group, 0..GROUPS−1 (fewer where there are fewer patients), by patient."""
    total = int(patients.max(initial=-1)) + 1
    order = np.random.default_rng([seed, 3]).permutation(total)
    return (order % max(min(GROUPS, total), 1))[patients]


def jackknife_half_width(without: np.ndarray) -> np.ndarray | None:
    """Half of the 95 % interval from the figures with one group of patients left out each, [groups, …].

    Delete-a-group jackknife with Student's t (Kott 2001, J. Official Statistics 17). None under two groups.
    The bootstrap is not used for distances: resampled rows are farther from everything, so it is biased
    upward.
    """
    groups = len(without)
    if groups < 2:
        return None
    variance = (groups - 1) / groups * ((without - without.mean(axis=0)) ** 2).sum(axis=0)
    return np.asarray(special.stdtrit(groups - 1, 0.975) * np.sqrt(variance))

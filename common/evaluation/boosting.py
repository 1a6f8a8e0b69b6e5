"""Gradient-boosted trees that learn from synthetic rows and travel to the hospitals as arrays.

The model that a private score judges ("train on synthetic, test on real") must be computed where the patients are.
So it works on the dictionary's fine codes, turned into small ordinals by public tables, and is handed on as `Trees`:
lists of nodes, no code. All of it is made from the synthetic table: it costs no budget.

Settings as in utility.py, so that both figures speak of the same kind of model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from cohortium.common.derived import Trees

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingClassifier

    from cohortium.common.encoding import Grid

ORDINALS = 250
"""Most ordinals of one column, "missing" not counted: the booster bins finer ones away."""
TREES = 150
ONE_THREAD_BELOW = 20_000  # rows
RATE = 0.06
_PRIOR_ROWS = 10.0  # a level's rate starts from the overall one, worth so many rows


def boosted_trees(
    *,
    codes: np.ndarray,
    hit: np.ndarray,
    grids: Sequence[Grid],
    features: Sequence[int],
    seed: int = 0,
    trees: int = TREES,
) -> Trees:
    """Trees whose score is the log-odds of `hit`, trained on these rows.

    codes: int32 [rows, columns], fine codes of synthetic rows; hit: bool [rows]; grids: one per column; features:
    indices of the columns that may be looked at. The score equals scikit-learn's decision_function bit for bit.
    Raises ValueError where there is no feature, or only one kind of row.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier  # takes a second: planning a study never comes here

    if not len(features):
        raise ValueError("there is no column to predict from")
    if not 0 < int(hit.sum()) < len(hit):
        raise ValueError("a model needs rows of both kinds")
    maps = tuple(ordinal_map(codes[:, c], hit, grids[c]) for c in features)
    x = np.stack([m[codes[:, c]] for c, m in zip(features, maps, strict=True)], axis=1).astype(np.float64)
    model = HistGradientBoostingClassifier(
        random_state=seed, max_iter=trees, learning_rate=RATE, early_stopping=False, l2_regularization=1.0
    )
    # On busy cores OpenMP's threads wait for each other: a small fit is far faster on one.
    with threadpool_limits(limits=1 if len(hit) < ONE_THREAD_BELOW else None, user_api="openmp"):
        model.fit(x, hit)
        made = _exported(model, features, maps)
        some = slice(0, 2000)
        # The nodes are read from private fields of scikit-learn: a version that means them otherwise is noticed here.
        if not np.array_equal(made.score(codes[some]), model.decision_function(x[some])):
            raise RuntimeError("this version of scikit-learn keeps its trees in another form")
    return made


def ordinal_map(codes: np.ndarray, hit: np.ndarray, grid: Grid) -> np.ndarray:
    """Fine code -> ordinal, int32 [grid.size]: at most ORDINALS of them and one more, the last, for "missing".

    Numbers keep their order, in quantiles of these rows where the grid is finer. Levels are put in the order of their
    rate of hits, so that one cut can part any set of them (Fisher 1958; Breiman et al. 1984, theorem 4.5).
    """
    values = grid.size - 1
    if grid.categorical:
        rows = np.bincount(codes, minlength=grid.size)[:values]
        hits = np.bincount(codes[hit], minlength=grid.size)[:values]
        rate = (hits + _PRIOR_ROWS * hit.mean()) / (rows + _PRIOR_ROWS)
        rank = np.empty(values, dtype=np.int64)
        rank[np.argsort(rate, kind="stable")] = np.arange(values)
        ordinals = rank * ORDINALS // values if values > ORDINALS else rank
    elif values <= ORDINALS:
        ordinals = np.arange(values)
    else:
        present = np.sort(codes[codes != grid.missing])
        at = np.linspace(0, max(len(present) - 1, 0), ORDINALS + 1).astype(int)[1:-1]
        edges = np.unique(present[at]) if len(present) else np.empty(0)
        ordinals = np.searchsorted(edges, np.arange(values), side="left")
    return np.append(ordinals, ordinals.max(initial=-1) + 1).astype(np.int32)


def _exported(model: HistGradientBoostingClassifier, features: Sequence[int], maps: tuple[np.ndarray, ...]) -> Trees:
    each = [step[0].nodes for step in model._predictors]
    starts = np.concatenate([[0], np.cumsum([len(nodes) for nodes in each])])
    nodes = np.concatenate(each)
    shift = np.repeat(starts[:-1], [len(n) for n in each])
    leaf = nodes["is_leaf"].astype(bool)
    if nodes["is_categorical"].any():
        raise RuntimeError("the trees were grown on ordinals: none of them is a set of categories")

    def whole(inner: np.ndarray, at_leaf: int) -> np.ndarray:
        return np.where(leaf, at_leaf, inner).astype(np.int32)

    # A threshold lies half-way between two ordinals; for whole numbers its floor cuts the same.
    cut = np.where(leaf, 0.0, nodes["num_threshold"])
    return Trees(
        columns=tuple(int(c) for c in features),
        maps=maps,
        feature=whole(nodes["feature_idx"].astype(np.int64), -1),
        threshold=whole(np.floor(cut).astype(np.int64), 0),
        left=whole(nodes["left"].astype(np.int64) + shift, 0),
        right=whole(nodes["right"].astype(np.int64) + shift, 0),
        value=np.where(leaf, nodes["value"], 0.0).astype(np.float64),
        roots=starts[:-1].astype(np.int32),
        base=float(np.asarray(model._baseline_prediction).item()),
    )


def chance(score: np.ndarray) -> np.ndarray:
    """The probability that a score of log-odds stands for."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(score, dtype=np.float64))))


def log_odds(probability: np.ndarray) -> np.ndarray:
    """The inverse of `chance`, kept finite."""
    tiny = math.ldexp(1.0, -40)
    p = np.clip(probability, tiny, 1 - tiny)
    return np.asarray(np.log(p) - np.log1p(-p))

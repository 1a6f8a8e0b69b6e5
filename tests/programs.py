"""Programs and regressions for tests of derived queries: over the four columns of `hospital.schema()`."""

from __future__ import annotations

from typing import Any

import numpy as np
from hospital import sizes as _sizes

from cohortium.common.derived import Additive, Joint, Nearest, Scored, Trees
from cohortium.common.estimates import Cox, Logistic


def sizes() -> tuple[int, ...]:
    return _sizes()


def codes(rows: int, *, seed: int = 0) -> np.ndarray:
    """Any codes at all, the missing ones included: int32 [rows, 4]."""
    rng = np.random.default_rng([seed, 9])
    return np.column_stack([rng.integers(0, size, rows) for size in sizes()]).astype(np.int32)


def decades(bins: int = 5) -> np.ndarray:
    """Age to bands of twenty years; missing with the oldest."""
    return np.minimum(np.arange(sizes()[2]) // 20, bins - 1).astype(np.int32)


def joint() -> Joint:
    """Five bands of age times four stages."""
    return Joint(columns=(2, 1), maps=(decades(), np.arange(sizes()[1], dtype=np.int32)), sizes=(5, 4))


def additive(*, seed: int = 0) -> Additive:
    rng = np.random.default_rng([seed, 10])
    chosen = (3, 0, 2)
    return Additive(columns=chosen, tables=tuple(rng.normal(0, 1, sizes()[c]) for c in chosen), intercept=0.1)


def scored(*, by: Joint | None = None) -> Scored:
    return Scored(score=additive(), edges=np.array([-1.0, -0.3, 0.2, 0.9]), by=by)


def forest(*, seed: int = 0, trees: int = 5, depth: int = 3) -> Trees:
    """Full trees with random splits; some inner nodes are leaves already."""
    rng = np.random.default_rng([seed, 11])
    columns = (2, 0, 1)
    lists: dict[str, list[Any]] = {name: [] for name in ("feature", "threshold", "left", "right", "value")}
    roots = []
    for _ in range(trees):
        base = len(lists["feature"])
        roots.append(base)
        for i in range(2 ** (depth + 1) - 1):
            leaf = i >= 2**depth - 1 or (i > 0 and rng.random() < 0.15)
            place = int(rng.integers(3))
            lists["feature"].append(-1 if leaf else place)
            lists["threshold"].append(int(rng.integers(0, sizes()[columns[place]])))
            lists["left"].append(0 if leaf else base + 2 * i + 1)
            lists["right"].append(0 if leaf else base + 2 * i + 2)
            lists["value"].append(float(rng.normal()))
    whole: dict[str, Any] = {n: np.array(v, np.int32) for n, v in lists.items() if n != "value"}
    return Trees(
        columns=columns,
        maps=tuple(np.arange(sizes()[c], dtype=np.int32) for c in columns),
        value=np.array(lists["value"]),
        roots=np.array(roots, np.int32),
        base=-0.2,
        **whole,
    )


def nearest(*, seed: int = 0, rows: int = 30, digit: int | None = None, **options: Any) -> Nearest:
    """Five bands of age and the other columns' own codes, in the dictionary's order; digit: planted in a row."""
    widths = options.pop("sizes", (3, 4, 5, 3))
    maps = tuple(
        decades(widths[2]) if c == 2 else np.minimum(np.arange(s), widths[c] - 1).astype(np.int32)
        for c, s in enumerate(sizes())
    )
    rng = np.random.default_rng([seed, 12])
    theirs = np.column_stack([rng.integers(0, w, rows) for w in widths]).astype(np.int32)
    if digit is not None:
        theirs[0, 2] = digit
    settings: dict[str, Any] = {"edges": np.array([0.01, 0.1, 0.2, 0.4])} | options
    return Nearest(
        columns=(0, 1, 2, 3), maps=maps, ordinal=(False, True, True, False), sizes=widths, rows=theirs, **settings
    )


def design(*, seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """One covariate of the sex, two of the stage, one of the age, none of the outcome."""
    rng = np.random.default_rng([seed, 13])
    tables = [rng.normal(0, scale, (size, k)) for size, k in zip(sizes(), (1, 2, 0, 0), strict=True)]
    tables[2] = ((np.arange(sizes()[2]) - 50.0) / 25.0 * scale)[:, None]
    return tuple(tables)


def logistic(*, seed: int = 0, scale: float = 1.0, beta: np.ndarray | None = None) -> Logistic:
    rng = np.random.default_rng([seed, 14])
    return Logistic(
        outcome=(3, np.array([0, 1, -1], np.int32)),
        design=design(seed=seed, scale=scale),
        beta=rng.normal(0, 0.5, 5) if beta is None else beta,
    )


def cox(*, seed: int = 0, scale: float = 1.0, steps: int = 12) -> Cox:
    """Age stands in for the time; missing ages are not used."""
    rng = np.random.default_rng([seed, 15])
    tables = list(design(seed=seed, scale=scale))
    tables[2] = np.zeros((sizes()[2], 0))
    when = np.arange(sizes()[2], dtype=np.float64)
    when[-1] = np.nan
    return Cox(
        time=(2, when),
        event=(3, np.array([0, 1, -1], np.int32)),
        design=tuple(tables),
        beta=rng.normal(0, 0.5, 3),
        times=np.sort(rng.choice(np.arange(5.0, 95.0), steps, replace=False)),
        increments=rng.gamma(2.0, 0.02, steps),
        means=rng.normal(0, 0.3, (steps, 3)),
    )

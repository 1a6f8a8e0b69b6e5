"""A made-up population for the tests of prediction: ages, a laboratory value with gaps, levels, and two targets."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cohortium.common.encoding import Grid, encode, grids
from cohortium.common.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "name": "made-up",
        "fields": [
            {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 100, "required": True}},
            {"name": "lab", "type": "number", "constraints": {"minimum": 0, "maximum": 50}},
            {"name": "stage", "type": "string", "constraints": {"enum": ["b", "d", "a", "c"], "required": True}},
            {"name": "noise", "type": "integer", "constraints": {"minimum": 0, "maximum": 9, "required": True}},
            {"name": "died", "type": "integer", "constraints": {"minimum": 0, "maximum": 1}},
            {"name": "kind", "type": "string", "constraints": {"enum": ["x", "y", "z"], "required": True}},
        ],
    },
    where="made-up",
)
GRIDS: tuple[Grid, ...] = grids(SCHEMA)
FEATURES, DIED, KIND = (0, 1, 2, 3), 4, 5


def people(n: int, *, seed: int, strength: float = 1.0) -> np.ndarray:
    """Fine codes, int32 [n, 6]. strength: how much the features tell of the outcome."""
    rng = np.random.default_rng([seed, 99])
    age = np.clip(np.rint(rng.normal(65, 12, n)), 0, 100)
    lab = np.round(np.clip(rng.gamma(4, 3, n), 0, 50), 1)
    stage = rng.choice(list("abcd"), n, p=[0.4, 0.3, 0.2, 0.1])
    risk = -1.6 + strength * (
        (age - 65) / 12 + 0.1 * (lab - 12) + pd.Series(stage).map({"a": -0.7, "b": 0, "c": 0.7, "d": 1.4}).to_numpy()
    )
    died = (rng.random(n) < 1 / (1 + np.exp(-risk))).astype(object)
    died[rng.random(n) < 0.03] = None
    kind = np.where(rng.random(n) < 0.3, "z", np.where(age + 10 * rng.standard_normal(n) > 65, "y", "x"))
    table = pd.DataFrame(
        {
            "age": age.astype(int),
            "lab": np.where(rng.random(n) < 0.2, np.nan, lab),
            "stage": stage,
            "noise": rng.integers(0, 10, n),
            "died": pd.array([None if d is None else int(d) for d in died], dtype="Int64"),
            "kind": kind,
        }
    )
    return encode(SCHEMA, table, "row").codes

"""Coded patients with known effects, for tests of estimands and imposed outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cohortium.common.encoding import Grid, grids
from cohortium.common.evaluation.formulas import Formulas
from cohortium.common.schema import Schema

FIELDS: list[dict[str, Any]] = [
    {"name": "age", "type": "integer", "unit": "year", "constraints": {"minimum": 20, "maximum": 90}},
    {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III"]}},
    {"name": "arm", "type": "string", "constraints": {"enum": ["old", "new"]}},
    {"name": "dead", "type": "boolean"},
    {"name": "time", "type": "number", "resolution": 0.1, "constraints": {"minimum": 0, "maximum": 40}},
    {"name": "event", "type": "integer", "constraints": {"minimum": 0, "maximum": 1}},
    {"name": "seen", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2020-12-31"}},
]
AGE, STAGE, ARM, DEAD, TIME, EVENT, SEEN = range(7)


def formulas() -> tuple[Formulas, tuple[Grid, ...], Schema]:
    schema = Schema.from_dict({"fields": FIELDS})
    made = grids(schema)
    return Formulas(schema.modelled, made), made, schema


def coded(rows: int, *, seed: int, missing: float = 0.0) -> np.ndarray:
    """int32 [rows, 7]: death depends on age and arm, the hazard on age and stage."""
    rng = np.random.default_rng(seed)
    age = np.clip(np.rint(rng.normal(55, 12, rows)), 20, 90)
    stage, new = rng.integers(0, 3, rows), rng.random(rows) < 0.5
    dead = rng.random(rows) < 1 / (1 + np.exp(1.0 - 0.05 * (age - 55) + 0.5 * new))
    until = rng.exponential(size=rows) / (0.05 * np.exp(0.02 * (age - 55) + 0.4 * (stage == 2)))
    watched = np.minimum(rng.uniform(5, 60, rows), 40.0)
    table = pd.DataFrame(
        {
            "age": age,
            "stage": np.array(["I", "II", "III"])[stage],
            "arm": np.where(new, "new", "old"),
            "dead": dead,
            "time": np.round(np.minimum(until, watched), 1),
            "event": (until <= watched).astype(int),
            "seen": pd.Timestamp("2020-03-01"),
        }
    ).astype({"age": object, "dead": object, "event": object, "time": object})
    for name in ("age", "stage", "dead"):
        table.loc[rng.random(rows) < missing, name] = None
    _, made, schema = formulas()
    return np.column_stack([grid.encode(table[c.name]) for c, grid in zip(schema.modelled, made, strict=True)])

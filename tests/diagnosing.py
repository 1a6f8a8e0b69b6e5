"""Made-up patients for the site's diagnostics, and synthetic rows that remember them, do not, or know nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.records import records
from cohortium.common.encoding import Codes, Records, grids
from cohortium.common.schema import Schema

DICTIONARY: dict[str, Any] = {
    "name": "clinic",
    "missingValues": ["", "NA"],
    "fields": [
        {"name": "pid", "type": "string", "role": "identifier"},
        {"name": "sex", "type": "string", "role": "quasi-identifier", "constraints": {"enum": ["F", "M"]}},
        {
            "name": "age",
            "type": "integer",
            "role": "quasi-identifier",
            "constraints": {"minimum": 0, "maximum": 99, "required": True},
        },
        {"name": "bmi", "type": "number", "resolution": 0.1, "constraints": {"minimum": 10, "maximum": 60}},
        {"name": "crp", "type": "number", "resolution": 1, "constraints": {"minimum": 0, "maximum": 400}},
        {"name": "ward", "type": "string", "constraints": {"enum": [f"w{i}" for i in range(12)]}},
        {"name": "grade", "type": "integer", "constraints": {"enum": [1, 2, 3]}},
        {"name": "hiv", "type": "string", "role": "sensitive", "constraints": {"enum": ["no", "yes"]}},
        {"name": "dead", "type": "boolean", "role": "target"},
    ],
}
COLUMNS = 8


@lru_cache
def schema() -> Schema:
    return Schema.from_dict(DICTIONARY)


def table(patients: int, *, seed: int = 0, rows_each: int = 1, prefix: str = "p") -> pd.DataFrame:
    """Patients of one population: age drives weight, inflammation and death; some cells are missing."""
    rng = np.random.default_rng([seed, 77])
    who = np.repeat(np.arange(patients), rng.integers(1, rows_each + 1, patients))
    n = len(who)
    age = np.clip(rng.normal(55, 18, n), 0, 99).round()
    out = pd.DataFrame(
        {
            "pid": [f"{prefix}{i:06d}" for i in who],
            "sex": rng.choice(["F", "M"], n),
            "age": age.astype(int),
            "bmi": np.clip(rng.normal(20 + age / 10, 4, n), 10, 60).round(1),
            "crp": np.clip(np.exp(rng.normal(age / 30, 1, n)), 0, 400).round(),
            "ward": [f"w{i}" for i in np.minimum(rng.geometric(0.3, n), 12) - 1],
            "grade": rng.integers(1, 4, n),
            "hiv": np.where(rng.random(n) < 0.1, "yes", "no"),
            "dead": rng.random(n) < 1 / (1 + np.exp(-(age - 65) / 8)),
        }
    )
    out.loc[rng.random(n) < 0.15, "crp"] = np.nan
    return out


def people(patients: int, *, seed: int = 0, rows_each: int = 1) -> Records:
    return records(schema(), table(patients, seed=seed, rows_each=rows_each), unit="pid")


def missing() -> np.ndarray:
    return np.array([grid.missing for grid in grids(schema())], dtype=np.int64)


def held(found: Records, share: float = 0.5) -> np.ndarray:
    """bool [patients]: every so many of them, in the order of their hashed names."""
    return np.arange(found.patients) % 100 < 100 * share


@lru_cache
def world() -> Codes:
    """Rows of 12,000 patients with one row each, encoded once: what many small hospitals are drawn from."""
    return people(12_000, seed=99).codes


def drawn(patients: int, rows: int, *, seed: int) -> tuple[Records, Codes]:
    """Another hospital of the same population, and `rows` of patients who are not in it."""
    rng = np.random.default_rng([seed, 79])
    chosen = rng.permutation(len(world()))[: patients + rows]
    here = Records(
        codes=np.ascontiguousarray(world()[chosen[:patients]]),
        patient=np.arange(patients, dtype=np.int64),
        identity=rng.integers(0, 256, (patients, 16)).astype(np.uint8),
        rows_per_patient=np.ones(patients, dtype=np.int64),
    )
    return here, world()[chosen[patients:]]


def synthetic(kind: str, found: Records, rows: int, *, seed: int = 0) -> Codes:
    """fresh: rows of other patients of the population. copy: rows of training patients. shuffled: columns apart."""
    if kind == "fresh":
        return drawn(1, rows, seed=seed + 1)[1]
    rng = np.random.default_rng([seed, 78])
    train = found.subset(~held(found)).codes
    chosen = train[rng.integers(0, len(train), rows)]
    if kind == "copy":
        return chosen
    return np.column_stack([rng.permutation(column) for column in chosen.T])


@lru_cache(maxsize=100)
def cohort(kind: str = "fresh", patients: int = 400, rows: int = 400, *, seed: int = 0) -> Cohort:
    found, others = drawn(patients, rows, seed=seed)
    made = others if kind == "fresh" else synthetic(kind, found, rows, seed=seed)
    return Cohort.of(tuple(schema().modelled), grids(schema()), found, held(found), made, seed=seed)

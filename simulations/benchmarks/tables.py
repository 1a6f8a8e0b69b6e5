"""A made-up clinical table of any size, its dictionary and its study: nothing to download, ten columns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

_DICTIONARY = {
    "fields": [
        {"name": "patient", "type": "integer", "role": "identifier"},
        {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"]}},
        {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 110}},
        {"name": "weight", "type": "number", "resolution": 0.1, "constraints": {"minimum": 2, "maximum": 250}},
        {"name": "pressure", "type": "integer", "constraints": {"minimum": 40, "maximum": 300}},
        {"name": "creatinine", "type": "number", "constraints": {"minimum": 0, "maximum": 20}},
        {"name": "smoker", "type": "boolean"},
        {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III", "IV"]}},
        {"name": "admitted", "type": "date", "constraints": {"minimum": "2010-01-01", "maximum": "2025-12-31"}},
        {"name": "days", "type": "integer", "constraints": {"minimum": 0, "maximum": 400}},
        {"name": "died", "type": "boolean"},
    ]
}

_STUDY = """\
[study]
id = "speed"
title = "A made-up table, for measuring speed"
dictionary = "dictionary.json"
target = "died"
patients = {rows}

[privacy]
epsilon = 3.0
delta = 1e-6
unit = "patient"
adjacency = "add-remove"
hospitals_per_patient = 1

[generator]
name = "{generator}"

[strategy]
name = "secure-sum"
survivors = {survivors}
colluders = 1

[release]
rows = {release}
"""


def made_up(rows: int, *, seed: int = 0) -> pd.DataFrame:
    """`rows` patients of one row each; columns depend on one another, and one cell in twenty is missing."""
    rng = np.random.default_rng(seed)
    frail = rng.standard_normal(rows).astype(np.float32)

    def mixed(share: float) -> np.ndarray:
        return (share * frail + np.sqrt(1 - share**2) * rng.standard_normal(rows)).astype(np.float32)

    def gone(values: pd.Series) -> pd.Series:
        return values.mask(rng.random(rows) < 0.05)

    age = np.clip(np.rint(62 + 15 * mixed(0.6)), 0, 110).astype(np.int16)
    table = {
        "patient": pd.Series(np.arange(rows)),
        "sex": pd.Series(pd.Categorical.from_codes(rng.integers(0, 2, rows), pd.Index(["F", "M"]))),
        "age": pd.Series(age),
        "weight": gone(pd.Series(np.round(np.clip(75 + 14 * mixed(-0.3), 2, 250), 1))),
        "pressure": gone(pd.Series(np.clip(np.rint(130 + 18 * mixed(0.3)), 40, 300), dtype="Int16")),
        "creatinine": gone(pd.Series(np.round(np.clip(np.exp(0.1 + 0.4 * mixed(0.5)), 0, 20), 2))),
        "smoker": pd.Series(mixed(0.2) > 0.7),
        "stage": pd.Series(
            pd.Categorical.from_codes(
                np.clip(mixed(0.7) + 1.5, 0, 3).astype(np.int8), pd.Index(["I", "II", "III", "IV"])
            )
        ),
        "admitted": pd.Series(np.datetime64("2010-01-01", "s") + rng.integers(0, 5800, rows).astype("timedelta64[D]")),
        "days": pd.Series(np.clip(np.exp(1.5 + 0.8 * mixed(0.5)), 0, 400).astype(np.int16)),
        "died": pd.Series(mixed(0.8) > 1.0),
    }
    return pd.DataFrame(table)


def write_study(folder: Path, *, rows: int, sites: int, generator: str = "mixture", release: int | None = None) -> Path:
    """study.toml and dictionary.json in `folder`; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dictionary.json").write_text(json.dumps(_DICTIONARY))
    text = _STUDY.format(rows=rows, generator=generator, survivors=sites - 1, release=release or rows)
    path = folder / "study.toml"
    path.write_text(text)
    return path

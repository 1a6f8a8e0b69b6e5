"""Small tables with known dependence, and `ask` over one pooled table with plain Gaussian noise."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from cohortium.common.encoding import Grid, Records, encode, grids
from cohortium.common.generators.base import Answer, Ask, Facts, Phase
from cohortium.common.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "name": "small",
        "fields": [
            {
                "name": "age",
                "type": "integer",
                "constraints": {"minimum": 18, "maximum": 100, "required": True},
            },
            {"name": "bp", "type": "number", "constraints": {"minimum": 50, "maximum": 250}},
            {"name": "lab", "type": "number", "constraints": {"minimum": 0, "maximum": 30}},
            {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"], "required": True}},
            {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III", "IV"]}},
            {
                "name": "seen",
                "type": "date",
                "constraints": {"minimum": "2000-01-01", "maximum": "2004-12-31"},
            },
            {"name": "dead", "type": "boolean", "role": "target", "constraints": {"required": True}},
        ],
    },
    where="small.json",
)


def small_table(rows: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=rows)
    age = np.clip(60 + 12 * z, 18, 100).round()
    bp = np.clip(120 + 15 * (0.7 * z + 0.7 * rng.normal(size=rows)), 50, 250).round()
    lab = np.clip(np.exp(0.5 * rng.normal(size=rows) + 0.4 * z), 0, 30).round(1)
    stage = np.array(["I", "II", "III", "IV"])[np.clip((z + rng.normal(size=rows) + 2).astype(int), 0, 3)]
    return pd.DataFrame(
        {
            "age": age.astype(int),
            "bp": np.where(rng.random(rows) < 0.2, np.nan, bp),
            "lab": lab,
            "sex": rng.choice(["F", "M"], rows),
            "stage": np.where(rng.random(rows) < 0.1, None, stage),
            "seen": pd.Timestamp("2000-01-01") + pd.to_timedelta(rng.integers(0, 1800, rows), unit="D"),
            "dead": rng.random(rows) < 1 / (1 + np.exp(-1.5 * z)),
        }
    )


def facts_for(schema: Schema, made: tuple[Grid, ...], *, epsilon: float = 3.0, patients: int | None = None) -> Facts:
    targets = [i for i, c in enumerate(schema.modelled) if c.role == "target"]
    return Facts(
        columns=tuple((c.kind, g.size, c.categorical) for c, g in zip(schema.modelled, made)),
        epsilon=epsilon,
        patients=patients,
        sites=5,
        mode="secure-sum",
        target=targets[0] if targets else None,
    )


def plain_ask(records: Records, phases: tuple[Phase, ...], *, mu: float | None, seed: int = 0) -> Ask:
    """mu: the whole budget as Gaussian DP, None for no noise. Fails a test that asks out of plan."""
    rng = np.random.default_rng(seed)
    left = {p.name: p.repeats for p in phases}
    order = [p.name for p in phases]
    at = 0

    def ask(name: str, query: object) -> Answer:
        nonlocal at
        phase = next(p for p in phases if p.name == name)
        assert order.index(name) >= at, "phases are asked in their order"
        at = order.index(name)
        left[name] -= 1
        assert left[name] >= 0, f"{name} asked too often"
        assert query.kind == phase.kind  # type: ignore[attr-defined]
        assert query.dim <= phase.max_dim  # type: ignore[attr-defined]
        chosen = None if phase.sampling_rate == 1 else rng.random(records.patients) < phase.sampling_rate
        exact = query.contribution(records, chosen).units * query.lattice  # type: ignore[attr-defined]
        if mu is None:
            return Answer(values=exact, sigma=0.0, sites=5)
        part = mu * math.sqrt(phase.share)
        if phase.sampling_rate == 1:
            multiplier = math.sqrt(phase.repeats) / part
        else:
            multiplier = 1 / math.sqrt(math.log1p((part / phase.sampling_rate) ** 2 / phase.repeats))
        sigma = multiplier * query.sensitivity_l2  # type: ignore[attr-defined]
        return Answer(values=exact + rng.normal(0, sigma, len(exact)), sigma=sigma, sites=5)

    return ask


def encoded(schema: Schema, table: pd.DataFrame) -> tuple[tuple[Grid, ...], Records]:
    return grids(schema), encode(schema, table, "row")

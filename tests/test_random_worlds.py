"""Random studies over random tables: each ends in an error that says what to do, or in a run whose table fits.

COHORTIUM_EXAMPLES=2000 for the long run.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import make_quick

from cohortium.common.errors import CohortiumError
from cohortium.server.audit import audit
from cohortium.server.runs import RunFolder
from cohortium.server.sampling import write_rows
from cohortium.simulations.finish import finish
from cohortium.simulations.run import Request, prepare, run

EXAMPLES = int(os.environ.get("COHORTIUM_EXAMPLES", "25"))
KINDS = ("boolean", "integer", "number", "string", "date", "datetime", "year", "coded")
ODD = ["", "NA", "??", "nan", "inf", "1e400", "-1", "3,5", " F ", "Ω\u0301", "2020-02-30"]


@st.composite
def columns(draw: st.DrawFn) -> dict[str, Any]:
    """A field of a dictionary."""
    kind = draw(st.sampled_from(KINDS))
    required = draw(st.booleans()) and draw(st.booleans())
    field: dict[str, Any] = {
        "type": "integer" if kind == "coded" else kind,
        "constraints": {"required": required},
    }
    limits = field["constraints"]
    if kind == "string":
        limits["enum"] = draw(st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=1, max_size=6, unique=True))
    elif kind == "coded":
        limits["enum"] = draw(st.lists(st.integers(-3, 9), min_size=1, max_size=5, unique=True))
    elif kind in ("integer", "number"):
        low = draw(st.integers(-1000, 1000))
        limits |= {"minimum": low, "maximum": low + draw(st.sampled_from([0, 1, 7, 100, 10**6]))}
        if kind == "number" and draw(st.booleans()):
            field["resolution"] = draw(st.sampled_from([0.01, 0.5, 1.0, 3.0]))
    elif kind == "year":
        limits |= {"minimum": 1950, "maximum": draw(st.integers(1950, 2030))}
    elif kind == "date":
        limits |= {
            "minimum": "2019-12-30",
            "maximum": draw(st.sampled_from(["2019-12-30", "2020-03-01", "2031-01-01"])),
        }
    elif kind == "datetime":
        limits |= {"minimum": "2020-01-01T00:00:00Z", "maximum": "2020-01-02T12:00:00Z"}
    return field


def cells(field: dict[str, Any], rows: int, rng: np.random.Generator, how: str) -> list[Any]:
    """Values for one column. how: "good" inside the dictionary, "wild" also far outside, "constant", "missing"."""
    if how == "missing":
        return [None] * rows
    limits, kind = field["constraints"], field["type"]
    if "enum" in limits:
        values: list[Any] = [limits["enum"][i] for i in rng.integers(0, len(limits["enum"]), rows)]
        wild: list[Any] = ["Z", 99]
    elif kind == "boolean":
        values, wild = [bool(b) for b in rng.integers(0, 2, rows)], ["maybe"]
    elif kind == "date":
        days = pd.date_range(limits["minimum"], limits["maximum"])
        values, wild = [days[i].date().isoformat() for i in rng.integers(0, len(days), rows)], ["1800-01-01"]
    elif kind == "datetime":
        hours = pd.date_range(limits["minimum"], limits["maximum"], freq="7min")
        values, wild = [hours[i].isoformat() for i in rng.integers(0, len(hours), rows)], ["1800-01-01"]
    else:
        x = limits["minimum"] + rng.random(rows) * (limits["maximum"] - limits["minimum"])
        values = [float(v) if kind == "number" else int(v) for v in x]
        wild = [10**9, -(10**9), float("nan")]
    if how == "constant":
        values = values[:1] * rows
    out: list[Any] = [None if rng.random() < 0.15 and not limits["required"] else value for value in values]
    if how == "wild" and rows:
        for at in rng.integers(0, rows, 2):
            out[at] = wild[rng.integers(len(wild))]
    if how == "odd" and rows:
        out[int(rng.integers(rows))] = ODD[rng.integers(len(ODD))]
    return out


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    fields = draw(st.lists(columns(), min_size=1, max_size=5))
    for number, field in enumerate(fields):
        field["name"] = draw(st.sampled_from(["", "x ", "größe", "a:b", "sum"])) + f"c{number}"
    usual = st.sampled_from(["good"] * 12 + ["wild", "wild", "constant", "missing", "odd"])
    sites = draw(st.sampled_from([3, 3, 4, 5, 1, 2]))
    unit = draw(st.sampled_from(["row", "patient"]))
    sure = st.sampled_from([True] * 9 + [False])  # most worlds are ones that somebody would mean
    holdouts = [0, 0.3] if unit == "patient" or not draw(sure) else [0]
    return {
        "fields": fields,
        "rows": draw(st.sampled_from([60, 20, 60, 20, 5, 2, 1, 0])),
        "hows": [draw(usual) for _ in fields],
        "numbers": draw(st.integers(0, 2**32)),
        "unit": unit,
        "generator": draw(st.sampled_from(["auto", "mixture", "mixture", "autoregressive", "joined"])),
        "mode": draw(
            st.sampled_from(["secure-sum", "secure-sum", "local"] if sites > 2 else ["local"] * 5 + ["secure-sum"])
        ),
        "sites": sites,
        "survivors": sites if draw(sure) else draw(st.integers(1, 6)),
        "colluders": draw(st.sampled_from([0, 0, 1])),
        "epsilon": draw(st.sampled_from([1e-4, 0.01, 0.5, 3.0, 20.0, 1000.0])),
        "split": draw(st.sampled_from(["iid", "iid", "dirichlet", "by"])),
        "holdout": draw(st.sampled_from(holdouts)),
        "noise": draw(st.sampled_from([True, True, True, False])),
        "target": draw(st.booleans()),
        "score": draw(st.integers(0, 3)) == 0,
    }


def write(folder: Path, world: dict[str, Any]) -> tuple[Path, Path]:
    rng, rows = np.random.default_rng(world["numbers"]), world["rows"]
    data = {f["name"]: cells(f, rows, rng, how) for f, how in zip(world["fields"], world["hows"], strict=True)}
    fields = list(world["fields"])
    if world["unit"] == "patient":
        fields.append({"name": "patient", "type": "string", "role": "identifier"})
        data["patient"] = [f"p{i}" for i in rng.integers(0, max(1, rows // 2 + 1), rows)]
    (folder / "dictionary.json").write_text(
        json.dumps({"name": "random", "missingValues": ["", "NA"], "fields": fields})
    )
    pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in data.items()}).to_csv(
        folder / "table.csv", index=False
    )
    secure = (
        f"survivors = {world['survivors']}\ncolluders = {world['colluders']}" if world["mode"] == "secure-sum" else ""
    )
    rounds = "rounds = 2" if world["generator"] in ("joined", "autoregressive") else ""
    evaluation = f"[evaluation]\nepsilon = {world['epsilon'] / 2!r}\nholdout = {world['holdout']}\n"
    (folder / "study.toml").write_text(f"""
[study]
id = "random"
title = "A random world"
dictionary = "dictionary.json"
{"target = " + json.dumps(world["fields"][0]["name"], ensure_ascii=False) if world["target"] else ""}
[privacy]
epsilon = {world["epsilon"]!r}
delta = 1e-6
unit = "{world["unit"]}"
adjacency = "add-remove"
hospitals_per_patient = 1
[generator]
name = "{world["generator"]}"
[strategy]
name = "{world["mode"]}"
{secure}
{rounds}
{evaluation if world["holdout"] else ""}
[release]
rows = 30
""")
    return folder / "study.toml", folder / "table.csv"


def fits(rows: pd.DataFrame, fields: list[dict[str, Any]]) -> None:
    """Columns, order, levels, ranges and types are the dictionary's."""
    assert list(rows.columns) == [field["name"] for field in fields]
    for field in fields:
        values, limits, kind = rows[field["name"]].dropna(), field["constraints"], field["type"]
        if limits["required"]:
            assert not rows[field["name"]].isna().any(), field
        if "enum" in limits:
            assert set(values.astype(str)) <= {str(level) for level in limits["enum"]}, field
        elif kind == "boolean":
            assert set(values.astype(bool)) <= {True, False}
        elif kind in ("date", "datetime"):
            moments = pd.to_datetime(values, utc=True)
            low, high = (pd.to_datetime(limits[end], utc=True) for end in ("minimum", "maximum"))
            assert ((moments >= low) & (moments <= high)).all(), field
        else:
            numbers = values.astype(float)
            assert ((numbers >= limits["minimum"] - 1e-9) & (numbers <= limits["maximum"] + 1e-9)).all(), field
            if kind in ("integer", "year"):
                assert (numbers == numbers.round()).all(), field


def one_world(world: dict[str, Any]) -> str:
    """ "ran", or the code of the error."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        study, table = write(folder, world)
        name = world["fields"][0]["name"]
        split = {
            "iid": f"iid:{world['sites']}",
            "by": f"by:{name}",
            "dirichlet": f"dirichlet:{name}:{world['sites']}:0.3",
        }
        out = folder / "out"
        try:
            prepare(
                Request(
                    study=study,
                    table=table,
                    split=split[world["split"]],
                    out=out,
                    seed=1,
                    noise=world["noise"],
                )
            )
            run(out)
            finish(out, score=world["score"])
        except CohortiumError as error:
            assert error.code and error.sentence and error.exit_code in (2, 3, 4), error.lines()
            return error.code
        fits(pd.read_parquet(out / "synthetic.parquet"), world["fields"])
        assert len(pd.read_csv(out / "synthetic.csv")) == 30
        write_rows(RunFolder(root=out), 7, [out / "more.csv"], seed=2)
        wrong = [c for c in audit(out).checks if not c.ok and (world["noise"] or c.name != "budget")]
        assert not wrong, wrong
        return "ran"


@pytest.mark.timeout(20_000)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 25,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(world=worlds())
def test_random_worlds(world: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        ends.append(one_world(world))


ends: list[str] = []


def test_the_worlds_were_worth_it() -> None:
    """A good part of them ran to the end, and the errors are of several kinds."""
    if len(ends) >= 20:
        assert ends.count("ran") >= len(ends) // 5, ends
        assert len(set(ends)) >= 3, ends

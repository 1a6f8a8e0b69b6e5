"""How good the synthetic table is at a given ε: whole simulations, scored by a ruler outside this package.

    python -m cohortium.simulations.benchmarks.utility --data FOLDER --ruler score.py [--tables ...] [--epsilons ...]

For each table: the ruler's own 70/30 split by patient, a study of the training patients over simulated hospitals
in trust mode secure-sum, the plan's whole budget at δ = 1e-5, and the ruler's scores against the other 30 %.
One JSON line a run; a summary at the end. --pooled asks one table in memory instead (same plan, same noise).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from cohortium.common.encoding import grids
from cohortium.common.generators.sampling import table as sample_table
from cohortium.common.study import Study
from cohortium.server.planning import plan_for
from cohortium.server.runs import RunFolder
from cohortium.simulations.pooled import fit_pooled
from cohortium.simulations.run import Request, prepare, run


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One benchmark table: target, columns left out, how rows become hospitals."""

    table: str
    target: str
    unit: str
    split: str = "iid:5"
    sites: int = 5
    skip: tuple[str, ...] = ()


WORLDS = {
    world.table: world
    for world in (
        World(table="support2", target="event", unit="patient_id"),
        World(table="rotterdam", target="death", unit="pid"),
        World(table="thyroid", target="on_thyroxine", unit="record_id"),
        World(
            table="ist_demo",
            target="DIED",
            unit="patient_id",
            split="by:COUNTRY",
            sites=8,
            skip=("hospital", "TD", "ID14", "OCCODE"),
        ),
    )
}


def study_text(
    world: World,
    *,
    dictionary: Path,
    epsilon: float,
    delta: float,
    generator: str,
    rows: int,
    survivors: int,
    colluders: int,
    patients: int,
) -> str:
    exclude = ", ".join(f'"{name}"' for name in world.skip)
    return f'''[study]
id = "bench-{world.table.replace("_", "-")}"
title = "Benchmark {world.table}"
dictionary = "{dictionary}"
target = "{world.target}"
patients = {patients}
exclude = [{exclude}]
[privacy]
epsilon = {epsilon}
delta = {delta}
delta_reason = "the benchmark's convention, to compare with published figures"
unit = "{world.unit}"
adjacency = "add-remove"
hospitals_per_patient = 1
[generator]
name = "{generator}"
[strategy]
name = "secure-sum"
survivors = {survivors}
colluders = {colluders}
[release]
rows = {rows}
'''


def one(
    world: World,
    ruler: ModuleType,
    data: Path,
    *,
    epsilon: float,
    seed: int,
    generator: str,
    delta: float,
    colluders: int,
    pooled: bool,
    folder: Path,
    rows_factor: int,
) -> dict[str, Any]:
    """Simulate once and score."""
    schema = json.loads((data / f"{world.table}.schema.json").read_text())
    whole = pd.read_parquet(data / f"{world.table}.parquet")
    train, test = ruler.split(whole, world.unit)
    folder.mkdir(parents=True)
    train.to_parquet(folder / "train.parquet", index=False)
    patients = int(round(train[world.unit].nunique(), -3)) or 1000
    text = study_text(
        world,
        dictionary=data / f"{world.table}.schema.json",
        epsilon=epsilon,
        delta=delta,
        generator=generator,
        rows=rows_factor * len(train),
        survivors=world.sites,
        colluders=colluders,
        patients=patients,
    )
    (folder / "study.toml").write_text(text)
    study = Study.load(folder / "study.toml")
    started = time.process_time()
    if pooled:
        plan, _, _ = plan_for(study, [f"s{i}" for i in range(world.sites)])
        model, _ = fit_pooled(study, plan, train.drop(columns=list(world.skip)), seed=seed)
        made = grids(study.schema)
    else:
        request = Request(
            study=folder / "study.toml",
            table=folder / "train.parquet",
            split=world.split,
            out=folder / "out",
            seed=seed,
        )
        plan = prepare(request)
        run(folder / "out")
        model, made = RunFolder(root=folder / "out").model(), RunFolder(root=folder / "out").grids()
    fitted = time.process_time() - started
    synthetic = sample_table(model, study.schema, made, rows_factor * len(train), seed=seed)
    rng = np.random.default_rng(seed)
    shuffled = train.apply(lambda column: column.to_numpy()[rng.permutation(len(train))])
    kinds = ruler.columns(schema, train, set(world.skip))
    shuffled2 = round(ruler.tvd(train, test, shuffled.astype(train.dtypes), *kinds, 2), 4)
    scores = ruler.score(schema, world.target, train, test, _plain(synthetic), world.skip)
    return {
        "table": world.table,
        "epsilon": epsilon,
        "seed": seed,
        "generator": plan.generator,
        "colluders": colluders,
        "pooled": pooled,
        "spent": round(plan.price(), 4),
        "cpu_s": round(fitted, 1),
        "shuffled2": shuffled2,
        **scores,
    }


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Nullable and categorical types as the ruler expects them."""
    out = table.copy()
    for name in out.columns:
        if isinstance(out[name].dtype, pd.CategoricalDtype) or out[name].dtype in ("string", "boolean"):
            out[name] = out[name].astype(object)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ruler", type=Path, required=True)
    parser.add_argument("--tables", nargs="*", default=list(WORLDS))
    parser.add_argument("--epsilons", nargs="*", type=float, default=[1.0, 3.0, 10.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--generator", default="auto")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--colluders", type=int, default=1)
    parser.add_argument("--rows-factor", type=int, default=1, help="synthetic rows, in numbers of training rows")
    parser.add_argument("--pooled", action="store_true")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("ruler", args.ruler)
    assert spec is not None and spec.loader is not None
    ruler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ruler)
    results = []
    for name in args.tables:
        for epsilon in args.epsilons:
            for seed in args.seeds:
                scratch = Path(tempfile.mkdtemp(prefix="cohortium-bench-"))
                try:
                    result = one(
                        WORLDS[name],
                        ruler,
                        args.data.resolve(),
                        epsilon=epsilon,
                        seed=seed,
                        generator=args.generator,
                        delta=args.delta,
                        colluders=args.colluders,
                        pooled=args.pooled,
                        folder=scratch / "run",
                        rows_factor=args.rows_factor,
                    )
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                results.append(result)
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()
    for name in args.tables:
        for epsilon in args.epsilons:
            rows = [r for r in results if r["table"] == name and r["epsilon"] == epsilon]
            line = {
                key: round(statistics.mean(r[key] for r in rows), 4) for key in ("tvd1", "tvd2", "tstr_auc", "cpu_s")
            }
            real = {key: rows[0][key] for key in ("floor1", "floor2", "shuffled2", "trtr_auc")}
            sys.stdout.write(f"{name} ε={epsilon:g} {rows[0]['generator']} {line} real {real}\n")


if __name__ == "__main__":
    main()

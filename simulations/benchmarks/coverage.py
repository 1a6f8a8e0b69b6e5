"""Do intervals from synthetic tables cover? `python -m cohortium.simulations.benchmarks.coverage --out FILE`.

A population whose truth is known by construction: death within 30 days by a logistic model of age, sex and arm; time
to an event by a proportional-hazards model of age, stage and arm, with censoring. In each replicate new patients are
drawn, five hospitals' release in secure sum is made at ε (the plan's phases, the noise of all five answering where the
plan counts on three), and the same analyses are read off it in two ways:

    combined   server/playing: the release replayed in worlds of known truth, common/evaluation/combining
    naive      the synthetic table taken for patients

Truth is the parameter of the population. Both regressions hold exactly in it, so it is also what the analysis of ever
more real patients goes to, up to the rounding of time to 0.1 months. Sites are pooled in memory: a secure sum of five
is the pooled sum (tests/simulations/test_federated_is_pooled). --as-released replays the released table as it is,
which does not show what the generator itself cannot express: what the datasets of `sample --replicates` are.

One JSON line a replicate; a file that is there already is gone on with. --summary only reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from cohortium.common.encoding import encode, grids
from cohortium.common.evaluation.combining import LEVEL, plain
from cohortium.common.evaluation.estimands import Estimand, packs
from cohortium.common.evaluation.formulas import Formulas
from cohortium.common.evaluation.regression import CannotFit
from cohortium.common.generators.base import Settings
from cohortium.common.study import Study
from cohortium.server.planning import plan_for
from cohortium.server.playing import columns_of, combined, plays, population_of
from cohortium.server.replicates import ROWS, Release, Replay

SITES, SURVIVORS, COLLUDERS = 5, 4, 1
MEAN = "age"
LOGISTIC = "death ~ age + sex[female] + arm[control]"
COX = "time, event ~ age + stage[I] + arm[control]"
AGE_MEAN, AGE_SD, AGE_RANGE = 62.0, 12.0, (18, 95)
DEATH = {"age (per 1 year)": 0.04, "sex: male (against female)": 0.4, "arm: treated (against control)": -0.6}
HAZARD = {
    "age (per 1 year)": 0.025,
    "stage: II (against I)": 0.25,
    "stage: III (against I)": 0.5,
    "arm: treated (against control)": -0.45,
}
DICTIONARY: dict[str, Any] = {
    "name": "known-population",
    "fields": [
        {"name": "patient", "type": "string", "role": "identifier"},
        {"name": "age", "type": "integer", "unit": "year", "constraints": {"minimum": 18, "maximum": 95}},
        {"name": "sex", "type": "string", "constraints": {"enum": ["female", "male"]}},
        {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III"]}},
        {
            "name": "marker",
            "type": "number",
            "unit": "µg/l",
            "resolution": 0.1,
            "constraints": {"minimum": 0, "maximum": 60},
        },
        {"name": "arm", "type": "string", "constraints": {"enum": ["control", "treated"]}},
        {"name": "death", "type": "boolean"},
        {
            "name": "time",
            "type": "number",
            "unit": "months",
            "resolution": 0.1,
            "constraints": {"minimum": 0, "maximum": 60},
        },
        {"name": "event", "type": "boolean"},
    ],
}
for _field in DICTIONARY["fields"][1:]:
    _field["constraints"] = {**_field.get("constraints", {}), "required": True}


def people(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Patients of the known population."""
    age = np.clip(np.rint(rng.normal(AGE_MEAN, AGE_SD, count)), *AGE_RANGE)
    male = rng.random(count) < 0.45
    frailty = 0.5 * (age - AGE_MEAN) / AGE_SD + np.sqrt(0.75) * rng.standard_normal(count)
    stage = np.searchsorted([0.45, 0.8], special.ndtr(frailty))
    marker = np.clip(np.round(np.exp(1.0 + 0.35 * stage + 0.5 * rng.standard_normal(count)), 1), 0.1, 60.0)
    treated = rng.random(count) < 0.5
    a, s, t = DEATH.values()
    death = rng.random(count) < special.expit(-1.1 + a * (age - AGE_MEAN) + s * male + t * treated)
    a, second, third, t = HAZARD.values()
    risk = np.exp(a * (age - AGE_MEAN) + second * (stage == 1) + third * (stage == 2) + t * treated)
    until = (rng.exponential(size=count) / (0.02 * risk)) ** (1 / 1.1)  # Weibull: hazard 0.022 · months^0.1 · risk
    watched = np.minimum(rng.uniform(12.0, 80.0, count), 60.0)
    return pd.DataFrame(
        {
            "patient": [f"p{i}" for i in range(count)],
            "age": age.astype(int),
            "sex": np.where(male, "male", "female"),
            "stage": np.array(["I", "II", "III"])[stage],
            "marker": marker,
            "arm": np.where(treated, "treated", "control"),
            "death": death,
            "time": np.maximum(np.round(np.minimum(until, watched), 1), 0.1),
            "event": until <= watched,
        }
    )


def truths() -> list[float]:
    """Of the terms in `terms`' order."""
    low, high = AGE_RANGE
    age = np.arange(low, high + 1)
    below = stats.norm.cdf((age + 0.5 - AGE_MEAN) / AGE_SD)
    below[-1] = 1.0
    mean = float(age @ np.diff(np.concatenate([[0.0], below])))
    return [mean, *DEATH.values(), *HAZARD.values()]


@lru_cache
def setting(epsilon: float, patients: int) -> tuple[Study, Release, tuple[Estimand, ...], Any]:
    """The study as its file would give it, what is public of its release, the analyses, the generator."""
    with tempfile.TemporaryDirectory(prefix="cohortium-coverage-") as name:
        folder = Path(name)
        (folder / "dictionary.json").write_text(json.dumps(DICTIONARY))
        (folder / "study.toml").write_text(f"""[study]
id = "coverage"
title = "A known population"
dictionary = "dictionary.json"
target = "death"
patients = {patients}
[privacy]
epsilon = {epsilon}
delta = 1e-6
unit = "patient"
adjacency = "add-remove"
hospitals_per_patient = 1
[generator]
name = "auto"
[strategy]
name = "secure-sum"
survivors = {SURVIVORS}
colluders = {COLLUDERS}
[release]
rows = {patients}
""")
        study = Study.load(folder / "study.toml")
    plan, generator, facts = plan_for(study, [f"site-{i}" for i in range(SITES)])
    release = Release(
        plan=plan,
        grids=grids(study.schema),
        facts=facts,
        phases=tuple(generator.phases(facts)),
        variance_factors={stage.name: SITES / plan.shares for stage in plan.stages},
    )
    read = Formulas(study.schema.modelled, release.grids)
    return study, release, (read.mean(MEAN), read.logistic(LOGISTIC), read.cox(COX)), generator


def replicate(
    number: int, *, epsilon: float, patients: int, refits: int, seed: int, imposed: bool = True
) -> dict[str, Any]:
    """Patients, release, analysis: estimates and intervals of every term."""
    started = time.process_time()
    study, release, estimands, generator = setting(epsilon, patients)
    rng = np.random.default_rng([seed, number])
    real = encode(study.schema, people(patients, rng), "patient").codes
    noise = int(rng.integers(2**62))
    released = generator.fit(
        Replay(release=release, codes=real, seed=noise),
        schema=study.schema,
        grids=release.grids,
        facts=release.facts,
        settings=Settings(seed=number),
    )
    table = np.asarray(released.sample(patients, seed=number))
    population = population_of(released, seed=number + 1)
    out: dict[str, Any] = {"replicate": number, "terms": []}
    for pack in packs(estimands):
        # The same answers again: the same seed draws the same noise.
        rows, total = release.rows(Replay(release=release, codes=real, seed=noise), columns_of(pack), seed=number)
        own = [one.fit(rows) for one in pack]
        played = list(
            plays(
                release, population, pack, own, patients=round(total), count=refits, seed=seed + number, imposed=imposed
            )
        )
        for j, one in enumerate(pack):
            exact, naive = one.fit(real), one.fit(table)
            try:
                intervals: Sequence[Any] = combined(own[j], played, j, level=LEVEL)
            except CannotFit:
                intervals = [None] * len(one.names)
            for k, name in enumerate(one.names):
                low, high = plain(float(naive.values[k]), float(naive.errors[k]))
                found = intervals[k]
                out["terms"].append(
                    {
                        "analysis": one.kind,
                        "term": name,
                        "own": float(own[j].values[k]),
                        "estimate": None if found is None else found.estimate,
                        "interval": None if found is None or not found.assessed else [found.low, found.high],
                        "slope": None if found is None else found.slope,
                        "spread": None if found is None else found.spread,
                        "naive": float(naive.values[k]),
                        "naive_interval": [low, high],
                        "real": float(exact.values[k]),
                    }
                )
    out["cpu_s"] = round(time.process_time() - started, 2)
    return out


def summary(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per term: coverage with its 95 % Clopper–Pearson interval, width, bias. No interval counts as the whole line:
    it covers, and is counted apart."""
    out = []
    for at, truth in enumerate(truths()):
        rows = [line["terms"][at] for line in lines]
        given = [row["interval"] for row in rows]
        hits = sum(g is None or g[0] <= truth <= g[1] for g in given)
        naive = sum(row["naive_interval"][0] <= truth <= row["naive_interval"][1] for row in rows)
        widths = [g[1] - g[0] for g in given if g is not None]
        estimates = [row["estimate"] for row in rows if row["interval"] is not None]
        out.append(
            {
                "analysis": rows[0]["analysis"],
                "term": rows[0]["term"],
                "truth": truth,
                "replicates": len(rows),
                "coverage": hits / len(rows),
                "coverage_interval": _binomial(hits, len(rows)),
                "without_interval": sum(g is None for g in given),
                "width": float(np.median(widths)) if widths else None,
                "estimate": float(np.median(estimates)) if estimates else None,
                "estimate_sd": float(np.std(estimates, ddof=1)) if len(estimates) > 1 else None,
                "naive_coverage": naive / len(rows),
                "naive_coverage_interval": _binomial(naive, len(rows)),
                "naive_width": float(np.median([r["naive_interval"][1] - r["naive_interval"][0] for r in rows])),
                "naive_estimate": float(np.median([r["naive"] for r in rows])),
                "real_sd": float(np.std([r["real"] for r in rows], ddof=1)) if len(rows) > 1 else None,
            }
        )
    return out


def _binomial(hits: int, of: int) -> list[float]:
    found = stats.binomtest(hits, of).proportion_ci(0.95, method="exact")
    return [float(found.low), float(found.high)]


def _read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The replicates done so far; a line cut short by a crash is left out. Refuses a file of other settings."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(dict(json.loads(text)))
        except ValueError:
            continue
    if found and found[0].get("settings") != settings:
        raise SystemExit(f"{path} holds replicates of other settings: {found[0].get('settings')}")
    return [line for line in found if "replicate" in line]


def run(path: Path, *, replicates: int, workers: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The replicates on file and those that are missing, in order of their numbers."""
    lines = _read(path, settings)
    done = {line["replicate"] for line in lines}
    wanted = [number for number in range(replicates) if number not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole lines only: what a crash cut short would spoil the next one.
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"settings": settings}, *lines]), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file, ProcessPoolExecutor(max_workers=workers) as pool:
        for future in as_completed([pool.submit(replicate, number, **settings) for number in wanted]):
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
    return sorted(lines, key=lambda line: int(line["replicate"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"), help="one JSON line a replicate")
    parser.add_argument("--replicates", type=int, default=300)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--patients", type=int, default=5000)
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--as-released", action="store_true", help="worlds of the released table as it is")
    parser.add_argument("--summary", action="store_true", help="run nothing, read the file")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    settings = {"epsilon": args.epsilon, "patients": args.patients, "refits": args.refits, "seed": args.seed}
    if args.as_released:
        settings["imposed"] = False
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.summary:
        lines = _read(args.out, settings)
    else:
        lines = run(args.out, replicates=args.replicates, workers=args.workers, settings=settings)
    rows = summary(lines)
    if args.json:
        sys.stdout.write(json.dumps({"settings": settings, "rows": ROWS, "terms": rows}, indent=1) + "\n")
        return
    for row in rows:
        low, high = row["coverage_interval"]
        sys.stdout.write(
            f"{row['analysis']:9}{row['term']:34} truth {row['truth']:8.3f}  combined {row['coverage']:6.1%} "
            f"({low:.1%} to {high:.1%}, width {row['width'] or float('nan'):.3f}, none {row['without_interval']})  "
            f"naive {row['naive_coverage']:6.1%} (width {row['naive_width']:.3f})\n"
        )


if __name__ == "__main__":
    main()

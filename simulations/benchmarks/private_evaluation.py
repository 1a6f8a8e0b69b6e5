"""How near private evaluation comes to the truth: whole simulations, each private figure beside its exact twin.

    python -m cohortium.simulations.benchmarks.private_evaluation --data FOLDER [--runs 20] [--table ist_demo] [--json]

ist_demo is split over its 8 countries, support2 over 5 hospitals at random; ε = 3 for training, 0.5 for everything
that held-out patients answer, δ = 1e-5. Every run has its own seed, hence its own held-out patients, hospitals, model,
synthetic table and noise (seeded: a rehearsal). Reported per figure: median and 95 % quantile of the error, the share
of runs within the limit, and the share of 95 % intervals that hold the exact figure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cohortium.server.evaluate import kept
from cohortium.server.runs import RunFolder
from cohortium.simulations.finish import exact_twin
from cohortium.simulations.run import Request, prepare, run

LIMITS = {
    "tstr_auc": 0.02,
    "tstr_g_mean": 0.02,
    "tstr_f1": 0.02,
    "km_gap": 0.02,
    "column_agreement": 0.02,
    "correlation_similarity": 0.03,
}
"""The errors that are promised; other figures are only reported."""
TABLES = {
    "ist_demo": {
        "split": "by:COUNTRY",
        "target": "DIED",
        "exclude": ["hospital", "ID14", "OCCODE"],
        "patients": 15_000,
        "survivors": 8,
        "more": '[evaluation.survival]\ntime = "TD"\nevent = "DIED"\n',
    },
    "support2": {
        "split": "iid:5",
        "target": "event",
        "exclude": [],
        "patients": 9_000,
        "survivors": 5,
        "more": '[evaluation.survival]\ntime = "time"\nevent = "event"\n',
    },
}


def study_text(name: str, dictionary: Path, seed: int) -> str:
    """The study of one table; ε and δ are the same for all. The study's id decides who is held out: others each run."""
    about = TABLES[name]
    return f"""
[study]
id = "bench-{name.replace("_", "-")}-{seed}"
title = "{name}"
dictionary = {json.dumps(str(dictionary))}
target = "{about["target"]}"
patients = {about["patients"]}
exclude = {json.dumps(about["exclude"])}

[privacy]
epsilon = 3.0
delta = 1e-5
delta_reason = "as the published figures"
unit = "patient_id"
adjacency = "add-remove"
hospitals_per_patient = 1

[generator]
name = "mixture"

[strategy]
name = "secure-sum"
survivors = {about["survivors"]}
colluders = 0

[evaluation]
epsilon = 0.5
holdout = 0.3
{about["more"]}
[release]
rows = 1000
"""


def one(name: str, data: Path, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """One whole simulation: figure -> private value, interval, exact value."""
    folder.mkdir()
    study = folder / "study.toml"
    study.write_text(study_text(name, (data / f"{name}.schema.json").resolve(), seed), encoding="utf-8")
    out = folder / "out"
    table = data / f"{name}.parquet"
    prepare(Request(study=study, table=table, split=str(TABLES[name]["split"]), out=out, seed=seed))
    run(out)
    findings = kept(RunFolder(root=out))
    assert findings is not None
    exact = exact_twin(out, findings)
    return {
        found.key: {
            "value": found.named.figure.value,
            "low": found.named.figure.low,
            "high": found.named.figure.high,
            "exact": exact.get(found.key),
        }
        for section in findings.sections
        for found in section.findings
    }


def summary(runs: list[dict[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Over runs, per figure; figures of single columns, groups and terms together by their kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for figures in runs:
        for key, figure in figures.items():
            if figure["exact"] is not None:
                kinds.setdefault(key if "." not in key else key.split(".")[0] + ".*", []).append(figure)
    for kind, some in kinds.items():
        known = [f for f in some if f["value"] is not None]
        errors = np.array([abs(f["value"] - f["exact"]) for f in known])
        held = [f["low"] - 1e-9 <= f["exact"] <= f["high"] + 1e-9 for f in known if f["low"] is not None]
        limit = LIMITS.get(kind)
        yield {
            "figure": kind,
            "number": len(some),
            "unassessed": len(some) - len(known),
            "median_error": float(np.median(errors)) if len(errors) else math.nan,
            "error_95": float(np.quantile(errors, 0.95)) if len(errors) else math.nan,
            "limit": limit,
            "within": float((errors <= limit).sum() / len(some)) if limit is not None else None,
            "covered": float(np.mean(held)) if held else math.nan,
        }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--table", choices=sorted(TABLES), action="append")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    report, ok = {}, True
    for name in given.table or sorted(TABLES):
        runs = []
        for number in range(given.runs):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(one(name, given.data, given.seed + number, Path(folder) / "run"))
            sys.stderr.write(f"\r{name}: {number + 1} of {given.runs} runs ")
            sys.stderr.flush()
        sys.stderr.write("\n")
        report[name] = list(summary(runs))
        ok &= all(row["within"] is None or row["within"] >= 0.95 for row in report[name])
    if given.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        for name, rows in report.items():
            sys.stdout.write(f"{name}, {given.runs} runs\n")
            sys.stdout.write(
                f"{'figure':34}{'n':>6}{'lost':>6}{'median':>9}{'95 %':>9}{'limit':>7}{'within':>8}{'held':>7}\n"
            )
            for row in rows:
                limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
                within = "" if row["within"] is None else f"{row['within']:.0%}"
                sys.stdout.write(
                    f"{row['figure']:34}{row['number']:6}{row['unassessed']:6}{row['median_error']:9.4f}"
                    f"{row['error_95']:9.4f}{limit:>7}{within:>8}{row['covered']:7.0%}\n"
                )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

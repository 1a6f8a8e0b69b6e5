"""The end of a simulation: sample, score against the real side, then publish as a consortium does (server/finish)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cohortium.common.evaluation.base import Scores
from cohortium.common.evaluation.exact import exact_scores
from cohortium.server.finish import GUESSED, GUESSED_WARNING, publish, rewrite_report, sample
from cohortium.server.runs import RunFolder
from cohortium.simulations.run import real_side, refuse_unfinished

__all__ = ["GUESSED", "GUESSED_WARNING", "SCORED_ROWS", "finish", "rewrite_report"]

SCORED_ROWS = 100_000
"""Real rows and synthetic rows that the report scores at most: a million of each would cost minutes and gigabytes."""

Progress = Callable[[str], None]


def finish(out: Path, *, progress: Progress = lambda _: None, score: bool = True) -> dict[str, Any]:
    """Write synthetic.parquet, synthetic.csv, report.html and result.json; return the result."""
    refuse_unfinished(out)
    folder = RunFolder(root=out)
    study, plan, facts = folder.study(), folder.plan(), folder.facts()
    progress("sampling the synthetic table")
    sample(folder)
    scores: Scores | None = None
    scored = "all rows"
    if score:
        progress("scoring against the simulated hospitals' real rows")
        real = real_side(out, most_rows=SCORED_ROWS)
        synthetic = _first_rows(out / "synthetic.parquet", SCORED_ROWS)
        if real.share < 1.0 or plan.rows > len(synthetic):
            scored = (
                f"{len(synthetic):,} of {plan.rows:,} synthetic rows against a random {real.share:.1%} of the patients"
            )
        scores = exact_scores(
            schema=study.schema,
            train=real.train,
            test=real.test,
            synthetic=synthetic,
            target=study.target,
            unit=plan.unit,
            seed=int(facts["seed"]),
        )
    about = {"Split of the simulation": str(facts["split"]), "Scored on": scored}
    return publish(folder, mode="simulation", about=about, scores=scores, progress=progress)


def _first_rows(path: Path, most: int) -> pd.DataFrame:
    """The first rows of a synthetic table: as good as any, since rows are drawn alike."""
    batches, have = [], 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            batches.append(batch.slice(0, most - have))
            have += len(batches[-1])
            if have >= most:
                break
    return pa.Table.from_batches(batches).to_pandas()

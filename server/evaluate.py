"""The private evaluation of a run: sample, ask the plan's questions of held-out patients, keep the findings.

    RUN/run/evaluation.json     common/evaluation/findings.Findings, from noised answers alone

Everything but the answers is made from the synthetic table, so it costs nothing; the answers are the plan's releases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.evaluation.assess import assess, expected_patients, unjudged
from cohortium.common.evaluation.balance import balance_section
from cohortium.common.evaluation.findings import Findings, Section
from cohortium.common.evaluation.rules import rules_section
from cohortium.common.evaluation.task import AnswerLike, Ask, RealRows, Task, Unanswered
from cohortium.common.study_release import how_sampled
from cohortium.server.sampling import as_judged

if TYPE_CHECKING:
    from cohortium.common.generators.base import Model
    from cohortium.common.privacy.plan import Plan
    from cohortium.common.study import Study
    from cohortium.server.runs import RunFolder

FREE_ROWS = 200_000
"""Released rows that rules and shares are counted in."""
ROWS_AT_MOST = 20_000
ROWS_AT_LEAST = 2_000
ROWS_PER_PATIENT = 6
"""Synthetic rows that models, bins and curves are made from: several for each patient expected, so that their own
chance is small beside that of the held-out patients."""
FILE = "evaluation.json"


def evaluate(
    folder: RunFolder,
    study: Study,
    plan: Plan,
    model: Model,
    ask: Ask,
    *,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Ask and tell; written to the run's folder, whole or not at all."""
    try:
        task = task_for(folder, study, plan, model, _patiently(ask), seed=seed)
    except UsageError as error:  # no table can be drawn as the study wants it: the model is paid for all the same
        findings = unjudged(study, f"{error.sentence}.")
    else:
        findings = assess(task, progress=progress)
    path = folder.inner / FILE
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(findings.to_json(), allow_nan=False), encoding="utf-8")
    os.replace(part, path)
    return findings


def _patiently(ask: Ask) -> Ask:
    """A void round costs its figures, not the model that is fitted already. Whatever else goes wrong stops the run."""

    def asked(phase: str, query: Any) -> AnswerLike:
        try:
            return ask(phase, query)
        except PeerUnreachable as error:
            if error.code != "RUN-VOID":
                raise
            raise Unanswered("too few hospitals stayed to the end of its round; what it cost stays charged.") from None

    return asked


def task_for(
    folder: RunFolder,
    study: Study,
    plan: Plan,
    model: Model,
    ask: Ask,
    *,
    seed: int,
    patients: float | None = None,
    real: RealRows | None = None,
) -> Task:
    """The evaluation's task. patients, real: of the exact twin of a simulation (simulations/finish.py)."""
    assert study.evaluation is not None
    expected = expected_patients(study.patients, study.evaluation.holdout)
    rows = int(np.clip(ROWS_PER_PATIENT * expected, ROWS_AT_LEAST, ROWS_AT_MOST))
    made = folder.grids()
    synthetic = as_judged(model, study, made, rows, seed=seed)
    names = [column.name for column in study.schema.modelled]
    codes = np.stack([grid.encode(synthetic[name]) for name, grid in zip(names, made, strict=True)], axis=1)
    return Task(
        study=study,
        grids=made,
        codes=codes.astype(np.int32),
        noise={s.name: s.noise_multiplier for s in plan.stages if s.name.startswith("evaluation-")},
        ask=ask,
        expected=expected,
        patients=expected if patients is None else patients,
        seed=seed,
        real=real,
    )


def kept(folder: RunFolder) -> Findings | None:
    """The findings of a finished run; None where nobody was held out."""
    path = folder.inner / FILE
    return Findings.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def first_rows(path: Path, most: int, *, columns: list[str] | None = None) -> pd.DataFrame:
    """The first rows of a synthetic table: as good as any, since rows are drawn alike."""
    batches, have = [], 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            batches.append(batch.slice(0, most - have))
            have += len(batches[-1])
            if have >= most:
                break
    return pa.Table.from_batches(batches).to_pandas()


def free_sections(study: Study, released: Path) -> tuple[Section, ...]:
    """What the synthetic rows show by themselves: broken rules of the dictionary, shares of groups and classes."""
    rows = first_rows(released, FREE_ROWS, columns=[column.name for column in study.schema.modelled])
    how = " ".join(how_sampled(study.release, study.schema))
    found = (
        rules_section(study.schema, rows, enforced=study.release.enforce_rules),
        balance_section(study.schema, rows, target=study.target, sampled=how),
    )
    return tuple(section for section in found if section is not None)

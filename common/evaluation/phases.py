"""What held-out patients are asked, as phases of the plan: by the study and its dictionary alone.

The budget of the evaluation is split by purpose (SHARES, in ρ of zero-concentrated privacy); what a study does not
ask leaves its share to the rest. Sizes are upper bounds: bins and cuts are chosen later, on the synthetic table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cohortium.common.evaluation.base import LEVELS_AT_MOST
from cohortium.common.evaluation.intervals import INTERVALS
from cohortium.common.evaluation.score_bins import CELLS
from cohortium.common.query_base import Kind
from cohortium.common.study_evaluation import AnalysisSpec, few_values, groups_of, survival_of

if TYPE_CHECKING:
    from cohortium.common.schema import Column
    from cohortium.common.study import Study

P = TypeVar("P", bound=Any)
"""A phase of a generator (common/generators/base.Phase)."""
SHARES = {
    "columns": 15.0,
    "scores": 38.0,
    "correlations": 12.0,
    "survival": 28.0,
    "analyses": 8.0,
    "groups": 5.0,
    "means": 4.0,
    "nearest": 3.0,
}
"""Measured on ist_demo and support2: what keeps every main figure within its limit (benchmarks/private_evaluation). The
largest gap of two curves needs most; means over all columns need least, for their noise averages out."""
COLUMN_BINS = 64
"""Most bins of one column in the evaluation's histograms; public, so that the plan can state its size."""
NEAREST_BINS = 16
ATTACK = "evaluation-attack"
ATTACK_SHARE = 0.03
"""Of the training patients' budget, where a study asks them."""
TERM_LEVELS = 8
TARGET_TERMS = 5
"""Columns in the analysis that a study gets without declaring one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPhase:
    """One release of the evaluation (the plan's PhaseLike)."""

    name: str
    purpose: str
    kind: Kind
    share: float
    max_dim: int
    repeats: int = 1
    sampling_rate: float = 1.0


def evaluation_phases(study: Study) -> tuple[EvaluationPhase, ...]:
    """The releases that held-out patients answer, in the order of `assess`; () where the study has no [evaluation]."""
    evaluation, columns = study.evaluation, study.schema.modelled
    if evaluation is None:
        return ()
    numbers = [c for c in columns if c.levels is None]
    found: list[tuple[str, str, str, Kind, float, int]] = [
        (
            "evaluation-columns",
            "score the synthetic table's columns on held-out patients: counts in its bins",
            "columns",
            "counts",
            1.0,
            sum(len(c.levels) + 1 if c.levels else COLUMN_BINS for c in columns),
        )
    ]
    if numbers:
        found.append(
            (
                "evaluation-means",
                "compare means and spreads: sums of standardised values, clipped",
                "means",
                "sums",
                1.0,
                2 * len(numbers),
            )
        )
    if len(columns) > 1:
        found.append(
            (
                "evaluation-correlations",
                "compare correlations: products of rank scores by the synthetic distribution",
                "correlations",
                "moments",
                1.0,
                len(columns) * (len(columns) - 1) // 2,
            )
        )
    if predictable(study):
        levels = len(few_values(_target(study)) or ())
        found.append(
            (
                "evaluation-scores",
                "judge a model trained on synthetic rows: counts of its scores by outcome",
                "scores",
                "tallies",
                1.0,
                (1 if levels == 2 else levels) * 3 * (CELLS + 1),
            )
        )
    curve = survival_of(evaluation, study.schema)
    if curve is not None:
        arms = 0 if curve.arm is None else len(study.schema.column(curve.arm).levels or ())
        found.append(
            (
                "evaluation-survival",
                "compare survival curves: counts of events and censorings by interval",
                "survival",
                "tallies",
                1.0,
                (arms + 1) * (2 * INTERVALS + 2),
            )
        )
    asked = analyses_of(study)
    for number, analysis in enumerate(asked, start=1):
        found.append(
            (
                f"evaluation-analysis-{number}",
                f"repeat a {analysis.model} regression: sum of clipped score vectors at the synthetic fit",
                "analyses",
                "estimates",
                1.0 / len(asked),
                1 + sum(len(c.levels) + 1 if c.levels else 2 for c in map(study.schema.column, analysis.terms)),
            )
        )
    groups = compared(study)
    if groups:
        found.append(
            (
                "evaluation-groups",
                "compare groups: counts by group, outcome and prediction",
                "groups",
                "tallies",
                1.0,
                sum((len(c.levels or ()) + 1) * 6 for c in groups),
            )
        )
    found.append(
        (
            "evaluation-nearest",
            "distances to the nearest synthetic row: their histogram",
            "nearest",
            "tallies",
            1.0,
            NEAREST_BINS,
        )
    )
    total = sum(SHARES[use] * part for _, _, use, _, part, _ in found)
    return tuple(
        EvaluationPhase(name=name, purpose=purpose, kind=kind, share=SHARES[use] * part / total, max_dim=size)
        for name, purpose, use, kind, part, size in found
    )


def training_phases(study: Study, phases: Sequence[P]) -> tuple[P | EvaluationPhase, ...]:
    """The generator's phases, and what training patients are asked beside them: then all shares make room for it."""
    if study.evaluation is None or not study.evaluation.attack:
        return tuple(phases)
    asked = EvaluationPhase(
        name=ATTACK,
        purpose="attack by distance: are training patients nearer to the table than held-out ones? Their histogram",
        kind="tallies",
        share=ATTACK_SHARE,
        max_dim=NEAREST_BINS,
    )
    smaller = [dataclasses.replace(phase, share=phase.share * (1 - ATTACK_SHARE)) for phase in phases]
    return (*smaller, asked)


def predictable(study: Study) -> bool:
    """There is a target with a list of levels that one can judge, and something to predict it from."""
    if study.target is None or len(study.schema.modelled) < 2:
        return False
    values = few_values(_target(study))
    return values is not None and 2 <= len(values) <= LEVELS_AT_MOST


def analyses_of(study: Study) -> tuple[AnalysisSpec, ...]:
    """What the study declares; else, for a target with two levels, a logistic regression on its first columns."""
    assert study.evaluation is not None
    if study.evaluation.analyses:
        return study.evaluation.analyses
    values = () if not predictable(study) else few_values(_target(study)) or ()
    if len(values) != 2:
        return ()
    # Neither dates nor long lists of levels, nor what follows the outcome.
    after = followed(study)
    terms = [
        c.name
        for c in study.schema.modelled
        if c.name != study.target
        and c.name not in after
        and c.role not in ("time", "event", "target")
        and c.kind not in ("date", "datetime")
        and (c.levels is None or len(c.levels) <= TERM_LEVELS)
    ][:TARGET_TERMS]
    if not terms:
        return ()
    name = f"{study.target} by {len(terms)} columns"
    return (AnalysisSpec(name=name, model="logistic", terms=tuple(terms), outcome=study.target, level=values[-1]),)


def compared(study: Study) -> tuple[Column, ...]:
    """The columns whose groups are compared: not the target, whose groups are the outcomes themselves."""
    assert study.evaluation is not None
    return tuple(c for c in groups_of(study.evaluation, study.schema) if c.name != study.target)


def followed(study: Study) -> frozenset[str]:
    """Columns that are known with the target and not before it: its survival time, where the target is the event."""
    assert study.evaluation is not None
    if study.target is None:
        return frozenset()
    curve = survival_of(study.evaluation, study.schema)
    named = {study.target} if curve is None else {curve.time, curve.event}
    if study.target not in named or (curve is None and _target(study).role not in ("event", "time")):
        return frozenset()
    return frozenset(named | {c.name for c in study.schema.modelled if c.role == "time"})


def _target(study: Study) -> Column:
    assert study.target is not None
    return study.schema.column(study.target)

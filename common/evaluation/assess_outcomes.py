"""Prediction, survival, analyses and groups: models made from synthetic rows, judged by noised sums of patients."""

from __future__ import annotations

import functools

import numpy as np

from cohortium.common.derived import Joint, Scored
from cohortium.common.errors import ProtocolError
from cohortium.common.evaluation import survival as curves_of
from cohortium.common.evaluation.analysis import Analysis, ask_about, make_terms, used_rows
from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.coded import Arms, TimeToEvent, label_of_code, number_of_code
from cohortium.common.evaluation.discrimination import FIGURES, Curve, discrimination
from cohortium.common.evaluation.findings import CountRow, Curves, Effect, Finding, Forest, Line, Section
from cohortium.common.evaluation.intervals import choose_intervals
from cohortium.common.evaluation.phases import analyses_of, compared, followed, predictable
from cohortium.common.evaluation.prediction import Predictor, train_predictor
from cohortium.common.evaluation.regression import CannotFit
from cohortium.common.evaluation.replication import Replication, replicate
from cohortium.common.evaluation.subgroups import RATES, Subgroups, subgroups
from cohortium.common.evaluation.task import Counted, Task, Unanswered, finding
from cohortium.common.evaluation.utility import CannotBeAssessed
from cohortium.common.queries import Tallies
from cohortium.common.study_evaluation import AnalysisSpec, SurvivalSpec, survival_of

LABELS = {
    "tstr_auc": "Area under the ROC curve",
    "tstr_pr_auc": "Area under the precision–recall curve",
    "tstr_f1": "F1",
    "tstr_g_mean": "G-mean of sensitivity and specificity",
    "tstr_balanced_accuracy": "Balanced accuracy",
    "tstr_sensitivity": "Sensitivity",
    "tstr_specificity": "Specificity",
    "tstr_precision": "Precision",
    "tstr_brier": "Brier score",
    "tstr_calibration_slope": "Calibration slope",
    "tstr_observed_expected": "Observed over expected",
}
LEVELS_DRAWN = 3
FAR = 0.7
"""Of a log ratio: e^0.7 is a factor of two. Curvature then leaves a visible part of the way undone."""
RATES_DRAWN = ("sensitivity", "specificity", "error rate")


def train(task: Task) -> Predictor | str:
    """The model that held-out patients judge; a text says why there is none."""
    study = task.study
    if study.target is None:
        return "The study names no target to predict."
    if not predictable(study):
        return f"The target {study.target} has no short list of values, or no column is left to predict it from."
    after = followed(study)  # a time to the outcome tells it
    features = [
        c
        for c, column in enumerate(task.columns)
        if column.kind not in ("date", "datetime") and column.name not in after
    ]
    try:
        return train_predictor(
            codes=task.codes,
            grids=task.grids,
            target=task.index(study.target),
            features=features,
            noise_multiplier=task.noise.get("evaluation-scores", 0.0),
            patients=task.patients,
            seed=task.seed,
        )
    except CannotBeAssessed as reason:
        return str(reason)
    except ValueError as reason:
        return f"No model could be judged: {reason}."


def prediction(task: Task, model: Predictor | str) -> Section:
    """A model trained on synthetic rows, judged on held-out patients."""
    section = functools.partial(
        Section, key="prediction", title=f"Prediction of {task.study.target}" if task.study.target else "Prediction"
    )
    if isinstance(model, str):
        return section(intro="Train on synthetic rows, test on held-out patients.", notes=(model,))
    answer = task.ask("evaluation-scores", Tallies(derived=model.derived, part="holdout"))
    found = discrimination(predictor=model, values=answer.values, sigma=answer.sigma, seed=task.seed)
    curves: list[Curves] = []
    for curve in found.curves[:LEVELS_DRAWN]:
        curves += _curves(curve, several=len(model.levels) > 1)
    return section(
        intro="A model trained on synthetic rows, judged on held-out patients by noised counts of its scores. Its "
        "threshold was fixed on synthetic rows; the reference is what it scores on fresh synthetic patients.",
        findings=tuple(finding(key, LABELS[key], found.figures[key]) for key in FIGURES),
        curves=tuple(curves),
        notes=found.notes,
    )


def _curves(found: Curve, *, several: bool) -> list[Curves]:
    which = f": {found.label}" if several else ""
    square = functools.partial(Curves, x_range=(0.0, 1.0), y_range=(0.0, 1.0))
    ends = (0.0, *found.false_positive, 1.0)
    roc = Line(
        label="held-out patients",
        x=ends,
        y=(0.0, *found.true_positive, 1.0),
        low=(0.0, *found.true_positive_low, 1.0),
        high=(0.0, *found.true_positive_high, 1.0),
    )
    out = [
        square(
            title=f"ROC curve{which}",
            x_label="false positive rate",
            y_label="sensitivity",
            lines=(roc,),
            diagonal=True,
            caption="Points are the bins' edges; the band is what the noise leaves.",
        )
    ]
    known = [(t, p) for t, p in zip(found.true_positive, found.precision, strict=True) if p is not None]
    if len(known) > 1:
        out.append(
            square(
                title=f"Precision and sensitivity{which}",
                x_label="sensitivity",
                y_label="precision",
                lines=(
                    Line(
                        label="held-out patients",
                        x=tuple(min(max(t, 0.0), 1.0) for t, _ in known),
                        y=tuple(min(max(p, 0.0), 1.0) for _, p in known),
                    ),
                ),
            )
        )
    out.append(
        square(
            title=f"Calibration{which}",
            x_label="predicted by the model",
            y_label="observed share",
            lines=(
                Line(
                    label="held-out patients",
                    x=found.predicted,
                    y=found.observed,
                    low=found.observed_low,
                    high=found.observed_high,
                    marks=True,
                ),
            ),
            diagonal=True,
            caption="One point a bin of the score; bins that the noise swamps are left out.",
        )
    )
    return out


def survival(task: Task, counted: Counted) -> Section | None:
    """Kaplan–Meier, restricted mean and log-rank; None where the plan does not ask."""
    phase = "evaluation-survival"
    assert task.study.evaluation is not None
    spec = survival_of(task.study.evaluation, task.study.schema)
    if not task.planned(phase) or spec is None:
        return None
    intro = f"Time {spec.time} to {spec.event} = {spec.level}: curves from noised counts of events and censorings."
    section = functools.partial(Section, key="survival", title="Survival", intro=intro)
    if not counted.stands_out:
        return section(notes=("Survival was not asked for: there are too few patients for the noise.",))
    outcome = _outcome(task, spec)
    notes: list[str] = []
    try:
        intervals = choose_intervals(outcome, task.codes)
    except ValueError as reason:
        if outcome.arms is None:
            return section(notes=(f"Survival cannot be assessed: {reason}.",))
        notes.append(f"Arms are not compared: {reason}.")
        outcome = TimeToEvent(time=outcome.time, event=outcome.event, unit=outcome.unit)
        try:
            intervals = choose_intervals(outcome, task.codes)
        except ValueError as second:
            return section(notes=(f"Survival cannot be assessed: {second}.",))
    answer = task.ask(phase, intervals.query)
    found = curves_of.survival(intervals=intervals, values=answer.values, sigma=answer.sigma, seed=task.seed)
    return section(
        findings=tuple(Finding(key=key, named=named) for key, named in found.figures.items()),
        curves=tuple(_kaplan_meier(c, found) for c in found.curves),
        notes=tuple(notes)
        + tuple(f"The curve of {c.arm} is swamped by the noise." for c in found.curves if not c.assessed),
    )


def _outcome(task: Task, spec: SurvivalSpec) -> TimeToEvent:
    time, event = task.index(spec.time), task.index(spec.event)
    arms = None
    if spec.arm is not None:
        arms = Arms.of_levels(task.index(spec.arm), task.grids[task.index(spec.arm)])
    return TimeToEvent(
        time=(time, number_of_code(task.grids[time])),
        event=(event, label_of_code(task.grids[event], _value(spec.level, task, event))),
        arms=arms,
        unit=task.columns[time].unit,
    )


def _value(level: str, task: Task, column: int) -> object:
    """A level as the grid takes it: a number where the column holds whole numbers."""
    return level if task.grids[column].categorical else float(level)


def _kaplan_meier(curve: curves_of.Curve, found: curves_of.Survival) -> Curves:
    times = (0.0, *curve.times)
    hidden: tuple[float | None, ...] = (1.0,) + (None,) * len(curve.times)
    lines = [Line(label="synthetic rows", x=times, y=(1.0, *curve.synthetic), style="synthetic", step=True)]
    if curve.assessed:
        lines.append(
            Line(
                label="held-out patients",
                x=times,
                y=(1.0, *curve.survival),
                low=(1.0, *curve.low),
                high=(1.0, *curve.high),
                step=True,
            )
        )
    else:
        lines.append(Line(label="held-out patients", x=times, y=hidden, step=True))
    starts = times[:-1]
    return Curves(
        title="Survival" if curve.arm == "all" else f"Survival: {curve.arm}",
        x_label=f"time ({found.unit})" if found.unit else "time",
        y_label="surviving",
        x_range=(0.0, found.horizon),
        y_range=(0.0, 1.0),
        lines=tuple(lines),
        caption="The band is what the noise leaves.",
        count_title="At risk",
        count_places=starts,
        counts=(
            CountRow(
                label="held-out patients",
                values=tuple(float(round(v)) if curve.assessed else None for v in curve.at_risk),
            ),
        ),
    )


def replication(task: Task, counted: Counted) -> Section | None:
    """Regressions on held-out patients in one step from the synthetic fit; None where there is none."""
    specs = [
        (f"evaluation-analysis-{number}", spec)
        for number, spec in enumerate(analyses_of(task.study), start=1)
        if task.planned(f"evaluation-analysis-{number}")
    ]
    if not specs:
        return None
    section = functools.partial(
        Section,
        key="replication",
        title="Replication of analyses",
        intro="Would an analyst of the synthetic table come to the same conclusions? Each regression is fitted on "
        "synthetic rows and corrected in one step by the noised score vectors of held-out patients.",
    )
    if not counted.stands_out:
        return section(notes=("Analyses were not asked for: there are too few patients for the noise.",))
    findings: list[Finding] = []
    forests: list[Forest] = []
    notes: list[str] = []
    for phase, spec in specs:
        try:
            found = _replicated(task, counted, phase, spec)
        except (CannotFit, ValueError, ProtocolError, Unanswered) as reason:
            notes.append(f"{spec.name}: cannot be assessed ({reason}).")
            continue
        for key, named in found.figures.items():
            label = f"{spec.name}: {named.label[0].lower()}{named.label[1:]}"
            findings.append(finding(f"{phase.removeprefix('evaluation-')}.{key}", label, named.figure))
        forests.append(_forest(found))
        far = [e.term for e in found.effects if e.assessed and abs(e.estimate - e.synthetic) > FAR]
        if far:
            notes.append(
                f"{spec.name}: the held-out effect of {', '.join(far[:4])} is far from the synthetic one. One step "
                "does not reach it: it is farther still."
            )
    return section(findings=tuple(findings), forests=tuple(forests), notes=tuple(notes))


def _replicated(task: Task, counted: Counted, phase: str, spec: AnalysisSpec) -> Replication:
    assert task.study.evaluation is not None
    outcome: tuple[int, np.ndarray] | TimeToEvent
    if spec.model == "cox":
        curve = survival_of(task.study.evaluation, task.study.schema)
        if curve is None:
            raise CannotFit("there is no survival outcome")
        plain = _outcome(task, curve)
        outcome = TimeToEvent(time=plain.time, event=plain.event, unit=plain.unit)
    else:
        assert spec.outcome is not None and spec.level is not None
        column = task.index(spec.outcome)
        outcome = (column, label_of_code(task.grids[column], _value(spec.level, task, column)))
    used = used_rows(outcome, task.codes)
    analysis = Analysis(
        key=phase,
        label=spec.name,
        outcome=outcome,
        terms=make_terms(task.grids, task.codes, [task.index(t) for t in spec.terms], used=used),
    )
    question = ask_about(analysis, task.codes, noise_multiplier=task.noise[phase], patients=task.patients)
    answer = task.ask(phase, question.query)
    return replicate(
        question=question, values=answer.values, sigma=answer.sigma, patients=counted.patients, seed=task.seed
    )


def _forest(found: Replication) -> Forest:
    rows = []
    for effect in found.effects:
        held = (
            Figure(value=effect.estimate, low=effect.exact_low, high=effect.exact_high)
            if effect.assessed
            else Figure.unknown(f"the noise is {effect.noise_over_sampling:.1f} times the sampling error")
        )
        made = Figure(value=effect.synthetic, low=effect.synthetic_low, high=effect.synthetic_high)
        rows.append(Effect(label=effect.term, figure=held, beside=made))
    ratio = "hazard" if found.model == "cox" else "odds"
    return Forest(
        title=f"{found.label} ({'Cox' if found.model == 'cox' else 'logistic'} regression)",
        unit=f"log {ratio} ratio",
        rows=tuple(rows),
        line=0.0,
        caption="Held-out patients: one Newton step from the synthetic fit, and what the noise leaves of it (95 %). "
        "Synthetic rows: 95 % interval of an analysis with as many patients.",
    )


def groups(task: Task, counted: Counted, model: Predictor | str) -> Section | None:
    """Shares and error rates by group. None where the study has no groups."""
    assert task.study.evaluation is not None
    phase = "evaluation-groups"
    columns = compared(task.study)
    if not columns or not task.planned(phase):
        return None
    section = functools.partial(
        Section,
        key="fairness",
        title="Groups",
        intro="Who is in the table, and for whom does a model trained on it err? By group, on held-out patients.",
    )
    if isinstance(model, str):
        return section(notes=(f"Error rates by group cannot be assessed: {model}",))
    if not counted.stands_out:
        return section(notes=("Groups were not asked for: there are too few patients for the noise.",))
    chosen = [task.index(column.name) for column in columns]
    asked = [_crossed(task, model, c) for c in chosen]
    answer = task.ask(phase, Tallies(derived=tuple(asked), part="holdout"))
    # The exact twin compares the groups that stand out of the planned noise, as the private side does.
    planned = task.noise[phase] * float(np.sqrt(len(asked)))
    findings: list[Finding] = []
    forests: list[Forest] = []
    at = 0
    for c, derived in zip(chosen, asked, strict=True):
        grid = task.grids[c]
        levels = _level_names(task, c)
        names = [*levels, "(missing)" if "missing" in levels else "missing"]
        shape = (grid.size, 3, 2)
        counts = answer.values[at : at + derived.bins].reshape(shape)
        at += derived.bins
        made = np.bincount(derived.assign(task.codes), minlength=derived.bins).astype(float).reshape(shape)
        if grid.required:
            names, counts, made = names[:-1], counts[:-1], made[:-1]
        found = subgroups(
            names=names, counts=counts, sigma=answer.sigma, synthetic=made, seed=task.seed, planned_sigma=planned
        )
        findings += _group_findings(task.names[c], found)
        forests += _group_forests(task.names[c], found)
    level = model.levels[0].label
    return section(
        findings=tuple(findings),
        forests=tuple(forests),
        notes=(f"Rates are those of the model for {model.target} {level}, at its threshold.",),
    )


def _crossed(task: Task, model: Predictor, column: int) -> Scored:
    """Group × outcome × called positive, by the first judged level's model and threshold."""
    first = model.levels[0]
    assert first.scored.by is not None
    outcome = first.scored.by
    grid = task.grids[column]
    by = Joint(
        columns=(column, *outcome.columns),
        maps=(np.arange(grid.size, dtype=np.int32), *outcome.maps),
        sizes=(grid.size, *outcome.sizes),
    )
    edge = first.cuts.edges[first.cuts.threshold - 1]
    return Scored(score=first.scored.score, edges=np.array([edge]), by=by)


def _level_names(task: Task, column: int) -> list[str]:
    grid = task.grids[column]
    codes = np.arange(grid.size - 1, dtype=np.int32)
    return [str(v) for v in grid.decode(codes, np.zeros(len(codes)))]


def _group_findings(name: str, found: Subgroups) -> list[Finding]:
    out = []
    for group in found.groups:
        out.append(finding(f"group.{name}.{group.name}.share", f"{name} = {group.name}: share", group.share))
        for rate in RATES:
            key = f"group.{name}.{group.name}.{rate.replace(' ', '_')}"
            out.append(finding(key, f"{name} = {group.name}: {rate}", group.rates[rate]))
    for rate, named in found.gaps.items():
        out.append(
            finding(f"group_gap.{name}.{rate.replace(' ', '_')}", f"{name}: {named.label.lower()}", named.figure)
        )
    return out


def _group_forests(name: str, found: Subgroups) -> list[Forest]:
    shares = Forest(
        title=f"{name}: share of patients",
        unit="share",
        rows=tuple(
            Effect(
                label=group.name,
                figure=group.share,
                beside=None if group.share.reference is None else Figure(value=group.share.reference),
            )
            for group in found.groups
        ),
    )
    rates = [
        Forest(
            title=f"{name}: {rate}",
            unit="share",
            rows=tuple(Effect(label=group.name, figure=group.rates[rate]) for group in found.groups),
            line=found.overall[rate].value,
            line_name="everybody",
        )
        for rate in RATES_DRAWN
    ]
    return [shares, *rates]

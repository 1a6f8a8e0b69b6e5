"""Utility: does a model trained on synthetic rows predict real patients as well as one trained on real rows?

Gradient boosting with the benchmark's settings, area under the ROC curve on the real test rows, mean of
one-against-the-rest where the target has more than two levels. Intervals by a bootstrap of the test patients;
both models are scored on the same resamples, so their difference has its own, tighter interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from cohortium.common.evaluation import cells, references
from cohortium.common.evaluation.base import LEVELS_AT_MOST, Figure
from cohortium.common.evaluation.boosting import ONE_THREAD_BELOW

if TYPE_CHECKING:
    import pandas as pd

    from cohortium.common.schema import Column

CASES_AT_LEAST = 5
TRAIN_ROWS_AT_MOST = 200_000
RESAMPLES = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """AUC of models trained on synthetic, real and column-shuffled rows, on the same real patients.

    difference: synthetic minus real. levels: the target's levels that were scored. notes: for the reader.
    """

    synthetic: Figure
    real: Figure
    shuffled: Figure
    difference: Figure
    levels: tuple[str, ...]
    notes: tuple[str, ...]


class CannotBeAssessed(Exception):
    """Carries the reason, as a sentence for the report; never leaves this folder."""


def prediction(
    *,
    columns: Sequence[Column],
    target: str | None,
    train: pd.DataFrame,
    test: pd.DataFrame | None,
    synthetic: pd.DataFrame,
    unit: str,
    seed: int = 0,
) -> Prediction:
    """Score all three models. Without a test table the training rows are the judge (in-sample), and the real
    model's scores come from 5-fold cross-fitting by patient, so that it never judges rows it was trained on.

    Raises CannotBeAssessed where there is no target, too few cases, or nothing to predict from.
    """
    if target is None:
        raise CannotBeAssessed("The study names no target to predict.")
    aim = next((c for c in columns if c.name == target), None)
    if aim is None:
        raise CannotBeAssessed(f"The target {target} is not among the modelled columns.")
    features = [c for c in columns if c.name != target and not cells.is_date(c)]
    if not features:
        raise CannotBeAssessed("There is no column beside the target to predict it from.")
    judge = train if test is None else test
    design = Design.of(features, train)
    fit_real, fit_synthetic, judge = (t[t[target].notna()] for t in (train, synthetic, judge))
    truth = _labels(aim, judge[target])
    known = sorted(set(_labels(aim, fit_real[target])))
    if len(known) < 2:
        raise CannotBeAssessed(f"The target {target} has fewer than two levels in the real training rows.")
    if len(known) > LEVELS_AT_MOST:
        raise CannotBeAssessed(
            f"The target {target} has {len(known)} distinct values; at most {LEVELS_AT_MOST} are possible."
        )
    seen = sorted(set(truth))
    wanted = seen[-1:] if len(seen) == 2 else seen
    patients = references.patient_ordinals(judge, unit)
    levels = [w for w in wanted if _enough(truth == w, patients)]
    if not levels:
        raise CannotBeAssessed(
            f"Fewer than {CASES_AT_LEAST} patients with, or without, each level of {target} can be judged by."
        )
    notes = []
    if len(levels) < len(wanted):
        notes.append(
            f"{len(wanted) - len(levels)} levels of {target} have fewer than {CASES_AT_LEAST} patients "
            "to judge by and are left out of the mean AUC."
        )
    x_judge = design.matrix(judge)
    fitted = _Fitted(x=x_judge, levels=levels, seed=seed)
    by_synthetic = fitted.scores(design.matrix(fit_synthetic), _labels(aim, fit_synthetic[target]))
    present = set(_labels(aim, fit_synthetic[target]))
    absent = [w for w in levels if w not in present]
    if len(present) < 2:
        notes.append(f"The synthetic rows hold fewer than two levels of {target}: no model can be trained on them.")
    elif absent:
        notes.append(f"The synthetic rows never hold {len(absent)} of the levels of {target}; these score 0.5.")
    if test is None:
        by_real = _cross_fitted(design, judge, truth, patients, levels, seed)
    else:
        by_real = fitted.scores(design.matrix(fit_real), _labels(aim, fit_real[target]))
    mixed = references.shuffled(fit_real[[target, *(c.name for c in features)]], seed=seed)
    by_shuffled = fitted.scores(design.matrix(mixed), _labels(aim, mixed[target]))
    weights = _resamples(patients, seed=seed)
    hits = np.stack([truth == w for w in levels])
    three = [auc_means(s, hits, weights) for s in (by_synthetic, by_real, by_shuffled)]
    how = (
        "Area under the ROC curve of gradient boosting, judged on "
        + ("the training patients themselves (in-sample)" if test is None else "real test patients")
        + f"; 95 % interval from {RESAMPLES} resamples of these patients."
    )
    real_value = float(three[1][0])
    reference = {
        "reference": real_value,
        "reference_text": "the same model trained on the real training rows",
        "floor": float(three[2][0]),
    }
    synthetic_figure, real_figure, shuffled_figure = (
        _figure(draws, how=how, direction="higher", **extra) for draws, extra in zip(three, (reference, {}, {}))
    )
    difference = _figure(
        three[0] - three[1],
        how="AUC trained on synthetic minus AUC trained on real rows, same resamples.",
        direction="higher",
        reference=0.0,
        reference_text="as good as real training rows",
    )
    return Prediction(
        synthetic=synthetic_figure,
        real=real_figure,
        shuffled=shuffled_figure,
        difference=difference,
        levels=tuple(levels),
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Feature columns as one float matrix: numbers as they are, levels as their rank in the training rows."""

    numeric: tuple[Column, ...]
    levels: tuple[tuple[Column, tuple[str, ...]], ...]

    @classmethod
    def of(cls, features: Sequence[Column], train: pd.DataFrame) -> Design:
        categorical = []
        for column in features:
            if column.categorical:
                values = train[column.name]
                gap = [cells.MISSING] if values.isna().any() else []
                categorical.append((column, tuple(sorted(cells.levels_of(column, values)[1] + gap))))
        return cls(numeric=tuple(c for c in features if not c.categorical), levels=tuple(categorical))

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """float64 [rows, features]; a level never seen in training is −1."""
        out = [cells.numbers(c, table[c.name]) for c in self.numeric]
        for column, levels in self.levels:
            index, texts = cells.levels_of(column, table[column.name])
            rank = {t: i for i, t in enumerate(levels)}
            lookup = np.array([*(rank.get(t, -1) for t in texts), rank.get(cells.MISSING, -1)], dtype=float)
            out.append(lookup[index])
        return np.stack(out, axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    x: np.ndarray
    levels: list[str]
    seed: int

    def scores(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Train on x, y and give every judged row a score per level, [levels, rows]; 0.5 where untrained."""
        from sklearn.ensemble import HistGradientBoostingClassifier  # takes a second

        if len(y) > TRAIN_ROWS_AT_MOST:
            keep = np.random.default_rng([self.seed, 4]).choice(len(y), size=TRAIN_ROWS_AT_MOST, replace=False)
            x, y = x[keep], y[keep]
        out = np.full((len(self.levels), len(self.x)), 0.5)
        if len(set(y)) < 2:
            return out
        empty = np.isnan(x).all(axis=0)  # the booster cannot bin a feature without a value
        x, judged = np.where(empty, 0.0, x), np.where(empty, 0.0, self.x)
        model = HistGradientBoostingClassifier(
            random_state=self.seed,
            max_iter=150,
            learning_rate=0.06,
            early_stopping=False,
            l2_regularization=1.0,
        )
        # On busy cores OpenMP's threads wait for each other: a small fit is far faster on one.
        with threadpool_limits(limits=1 if len(y) < ONE_THREAD_BELOW else None, user_api="openmp"):
            chance = model.fit(x, y).predict_proba(judged)
        known = list(model.classes_)
        for i, level in enumerate(self.levels):
            if level in known:
                out[i] = chance[:, known.index(level)]
        return out


def _cross_fitted(
    design: Design, judge: pd.DataFrame, truth: np.ndarray, patients: np.ndarray, levels: list[str], seed: int
) -> np.ndarray:
    fold = references.patient_groups(patients, seed=seed) % 5
    x = design.matrix(judge)
    out = np.full((len(levels), len(x)), 0.5)
    for f in range(5):
        inside, outside = fold == f, fold != f
        if inside.any() and outside.any():
            out[:, inside] = _Fitted(x=x[inside], levels=levels, seed=seed).scores(x[outside], truth[outside])
    return out


def _labels(column: Column, values: pd.Series[Any]) -> np.ndarray:
    index, texts = cells.levels_of(column, values)
    return np.array([*texts, cells.MISSING], dtype=object)[index]


def _enough(hit: np.ndarray, patients: np.ndarray) -> bool:
    return min(len(np.unique(patients[hit])), len(np.unique(patients[~hit]))) >= CASES_AT_LEAST


def _resamples(patients: np.ndarray, *, seed: int) -> np.ndarray:
    """How often each row counts, int [1 + resamples, rows]; row 0 counts every row once."""
    total = int(patients.max(initial=-1)) + 1
    rng = np.random.default_rng([seed, 5])
    repeats = int(np.clip(1e8 / max(len(patients), 1), 50, RESAMPLES))
    drawn = np.stack(
        [np.ones(total, dtype=np.int64)]
        + [np.bincount(rng.integers(0, total, size=total), minlength=total) for _ in range(repeats)]
    )
    return drawn[:, patients]


def auc_means(scores: np.ndarray, hits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over levels of the weighted AUC, one per row of `weights`; ties count one half.

    scores float [levels, rows], hits bool [levels, rows], weights int [draws, rows]. NaN where a resample
    holds only one side.
    """
    out = np.zeros(len(weights))
    for score, hit in zip(scores, hits):
        order = np.argsort(score, kind="stable")
        tie = np.concatenate([[0], np.cumsum(np.diff(score[order]) != 0)])
        starts = np.flatnonzero(np.concatenate([[True], np.diff(tie) != 0]))
        for start in range(0, len(weights), 64):
            w = weights[start : start + 64, order].astype(float)
            positive = np.add.reduceat(w * hit[order], starts, axis=1)
            negative = np.add.reduceat(w * ~hit[order], starts, axis=1)
            below = np.cumsum(negative, axis=1) - negative / 2
            both = positive.sum(axis=1) * negative.sum(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                out[start : start + 64] += (positive * below).sum(axis=1) / both
    return out / max(len(scores), 1)


def _figure(draws: np.ndarray, **extra: Any) -> Figure:
    value, resampled = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
    low, high = np.quantile(resampled, (0.025, 0.975)) if len(resampled) > 1 else (value, value)
    return Figure(value=value, low=min(float(low), value), high=max(float(high), value), unit="AUC", **extra)

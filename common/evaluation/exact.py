"""Exact scores: the synthetic table against real rows that are on this machine.

For simulations, where the real side is known. A deployment has no such table: there private.py takes over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cohortium.common.evaluation import cells, fidelity, references, utility, verdict
from cohortium.common.evaluation.base import Associations, ColumnScore, Figure, NamedFigure, Pair, Scores
from cohortium.common.evaluation.fidelity import Coded, Ruler

if TYPE_CHECKING:
    from cohortium.common.schema import Column, Schema

MAP_COLUMNS = 24
INTERVAL_PAIRS = 3_000
WORST_PAIRS = 60
COLUMN_DEALS = 200


def exact_scores(
    *,
    schema: Schema,
    train: pd.DataFrame,
    test: pd.DataFrame | None,
    synthetic: pd.DataFrame,
    target: str | None = None,
    unit: str = "row",
    seed: int = 0,
) -> Scores:
    """Score `synthetic` against real rows; the same seed gives the same figures.

    train: what the sites were given. test: rows of other patients, or None: then the training rows are the
    judge and every figure is labelled in-sample. unit: the column that names the patient, or "row".
    Raises TableError where a table is empty or lacks a column of the dictionary.
    """
    tables = {"training": train, "synthetic": synthetic} | ({} if test is None else {"test": test})
    columns = fidelity.scored_columns(schema, tables)
    world = _World.of(columns, train, test, synthetic, target, unit, seed)
    column_scores, tvd1 = _columns(world)
    pair_figures, association = _pairs(world)
    predicted: utility.Prediction | None = None
    unassessed = []
    try:
        predicted = utility.prediction(
            columns=columns, target=target, train=train, test=test, synthetic=synthetic, unit=unit, seed=seed
        )
        reason = ""
        unassessed += list(predicted.notes)
    except utility.CannotBeAssessed as why:
        reason = str(why)
        unassessed.append(f"Prediction: {reason}")
    figures = {"tvd1": tvd1, **pair_figures}
    auc: tuple[NamedFigure, ...] = ()
    if predicted is None:
        figures["tstr_auc"] = Figure.unknown(reason, unit="AUC", direction="higher")
    else:
        figures |= {"tstr_auc": predicted.synthetic, "trtr_auc": predicted.real}
        figures |= {"shuffled_auc": predicted.shuffled, "auc_difference": predicted.difference}
        auc = (
            NamedFigure(label="trained on real rows", figure=predicted.real),
            NamedFigure(label="trained on synthetic rows", figure=predicted.synthetic),
            NamedFigure(label="trained on shuffled columns", figure=predicted.shuffled),
        )
    tiles = (
        verdict.columns_tile(figures["tvd1"]),
        verdict.pairs_tile(figures["tvd2"]),
        verdict.relations_tile(figures["association_gap"]),
        verdict.models_tile(predicted, reason),
    )
    unassessed += [f"{name}: {f.reason}" for name, f in pair_figures.items() if f.value is None]
    dates = [c.name for c in columns if cells.is_date(c)]
    if dates:
        unassessed.append(
            "Dates are compared one by one but left out of the mean distances and of prediction, as in the "
            f"benchmark: {', '.join(dates)}."
        )
    patients = len(np.unique(world.judge_patients))
    return Scores(
        basis="the training patients themselves (in-sample)" if test is None else "held-out real patients",
        in_sample=test is None,
        target=target,
        real_rows=len(world.judge),
        real_patients=patients,
        train_rows=len(train),
        synthetic_rows=len(synthetic),
        seed=seed,
        figures=figures,
        columns=column_scores,
        associations=association,
        auc=auc,
        verdicts=tiles,
        headline=verdict.headline(tiles, patients=patients, in_sample=test is None),
        unassessed=tuple(unassessed),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    """The real and synthetic rows of one comparison. `share` of the pooled patients are judges; `scale`
    brings a re-dealt half-against-half distance to whole-against-whole size (standard errors go with
    1/√n)."""

    columns: tuple[Column, ...]
    train: pd.DataFrame
    judge: pd.DataFrame
    synthetic: pd.DataFrame
    target: str | None
    in_sample: bool
    pooled_patients: np.ndarray
    judge_patients: np.ndarray
    share: float
    scale: float
    seed: int

    @classmethod
    def of(
        cls,
        columns: tuple[Column, ...],
        train: pd.DataFrame,
        test: pd.DataFrame | None,
        synthetic: pd.DataFrame,
        target: str | None,
        unit: str,
        seed: int,
    ) -> _World:
        if test is None:
            pooled_patients, share, scale = references.patient_ordinals(train, unit), 0.5, float(np.sqrt(0.5))
        else:
            a, b = references.patient_ordinals(train, unit), references.patient_ordinals(test, unit)
            pooled_patients = np.concatenate([a, b + int(a.max(initial=-1)) + 1])
            share, scale = (int(b.max()) + 1) / (int(pooled_patients.max()) + 1), 1.0
        judge = train if test is None else test
        return cls(
            columns=columns,
            train=train,
            judge=judge,
            synthetic=synthetic,
            target=target,
            in_sample=test is None,
            pooled_patients=pooled_patients,
            judge_patients=references.patient_ordinals(judge, unit),
            share=share,
            scale=scale,
            seed=seed,
        )

    @property
    def groups(self) -> np.ndarray:
        return references.patient_groups(self.judge_patients, seed=self.seed)

    def pooled(self, train: Coded, judge: Coded) -> Coded:
        return train if self.in_sample else Coded(codes=np.concatenate([train.codes, judge.codes], axis=1))

    @property
    def reference_text(self) -> str:
        if self.in_sample:
            return "two random halves of the real rows, brought to full size (divided by √2)"
        return "the real training rows against the same real test rows"


def _distance_figure(
    value: float,
    without: np.ndarray | None,
    reference: float,
    draws: np.ndarray,
    floor: float | None,
    world: _World,
    how: str,
) -> Figure:
    half = None if without is None else references.jackknife_half_width(without)
    return Figure(
        value=value,
        low=None if half is None else max(0.0, value - float(half)),
        high=None if half is None else min(1.0, value + float(half)),
        reference=reference,
        reference_low=float(np.quantile(draws, 0.025)) if len(draws) else None,
        reference_high=float(np.quantile(draws, 0.975)) if len(draws) else None,
        reference_text=world.reference_text,
        floor=floor,
        unit="share of rows",
        direction="lower",
        how=how,
    )


def _columns(world: _World) -> tuple[tuple[ColumnScore, ...], Figure]:
    ruler = Ruler.make(world.columns, world.train, target=world.target, coarse=False)
    train, judge, synthetic = (ruler.encode(t) for t in (world.train, world.judge, world.synthetic))
    patients = world.pooled_patients
    repeats = int(np.clip(1e9 / max(len(patients) * len(world.columns), 1), 20, COLUMN_DEALS))
    dealt = references.column_deals(
        world.pooled(train, judge), ruler.sizes, patients, world.share, repeats, seed=world.seed
    )
    draws = [world.scale * 0.5 * np.abs(d).sum(axis=1) for d in dealt]
    values = fidelity.column_distances(judge, synthetic, ruler.sizes)
    direct = fidelity.column_distances(judge, train, ruler.sizes)
    without = _without_groups(world, judge, synthetic, ruler)
    out = []
    for c, column in enumerate(world.columns):
        how = "Total variation distance over 20 quantile bins or the levels; missing is a cell of its own."
        reference = float(draws[c].mean()) if world.in_sample else float(direct[c])
        tvd = _distance_figure(float(values[c]), without[:, c], reference, draws[c], None, world, how)
        out.append(_column_score(world, column, tvd))
    kept = [c for c, column in enumerate(world.columns) if not cells.is_date(column)]
    if not kept:
        nothing = "There is no column but dates."
        return tuple(out), Figure.unknown(nothing, unit="share of rows", direction="lower")
    mean_draws = np.mean([draws[c] for c in kept], axis=0)
    tvd1 = _distance_figure(
        float(values[kept].mean()),
        without[:, kept].mean(axis=1),
        float(mean_draws.mean()) if world.in_sample else float(direct[kept].mean()),
        mean_draws,
        None,
        world,
        "Mean of the columns' total variation distances (tvd1 of the benchmark); interval by jackknife.",
    )
    return tuple(out), tvd1


def _without_groups(world: _World, judge: Coded, synthetic: Coded, ruler: Ruler) -> np.ndarray:
    """Column distances with each jackknife group of judges left out, [groups, columns]."""
    groups = world.groups
    number = int(groups.max(initial=0)) + 1
    out = np.zeros((number, len(ruler.cells)))
    for c, size in enumerate(ruler.sizes):
        inside = np.bincount(groups * size + judge.codes[c], minlength=number * size).reshape(number, size)
        left = inside.sum(axis=0) - inside
        target = fidelity.shares(synthetic.codes[c], size)
        out[:, c] = 0.5 * np.abs(left / np.maximum(left.sum(axis=1, keepdims=True), 1) - target).sum(axis=1)
    return out


def _column_score(world: _World, column: Column, tvd: Figure) -> ColumnScore:
    name = column.name
    real, synthetic = world.judge[name], world.synthetic[name]
    picture = cells.for_picture(column, world.train[name])
    codes = [picture.encode(t[name]) for t in (world.train, world.judge, world.synthetic)]
    pooled = codes[0] if world.in_sample else np.concatenate(codes[:2])
    dealt = references.column_deals(
        Coded(codes=pooled[None]), (picture.size,), world.pooled_patients, world.share, 100, seed=world.seed
    )[0]
    spread = world.scale * np.quantile(np.abs(dealt), 0.95, axis=0)
    shown, made = (fidelity.shares(k, picture.size) for k in codes[1:])
    keep = (shown > 0) | (made > 0) | (spread > 0)
    a, b = fidelity.moments(column, real), fidelity.moments(column, synthetic)
    ks = None
    if not column.categorical:
        gap = fidelity.kolmogorov_smirnov(cells.numbers(column, real), cells.numbers(column, synthetic))
        how = "Kolmogorov–Smirnov distance of the values present."
        if gap is None:
            ks = Figure.unknown("no value is present on one side", unit="share of rows", direction="lower", how=how)
        else:
            ks = Figure(value=gap, unit="share of rows", direction="lower", how=how)
    return ColumnScore(
        name=name,
        kind=column.kind,
        unit=column.unit,
        description=column.description,
        tvd=tvd,
        ks=ks,
        real_mean=a.mean,
        synthetic_mean=b.mean,
        real_sd=a.sd,
        synthetic_sd=b.sd,
        real_missing=a.missing,
        synthetic_missing=b.missing,
        labels=tuple(label for label, k in zip(picture.labels, keep) if k),
        real=_floats(shown[keep]),
        synthetic=_floats(made[keep]),
        band_low=_floats(np.maximum(shown - spread, 0)[keep]),
        band_high=_floats(np.minimum(shown + spread, 1)[keep]),
    )


def _pairs(world: _World) -> tuple[dict[str, Figure], Associations | None]:
    columns = tuple(c for c in world.columns if not cells.is_date(c))
    pairs = fidelity.pairs_of(len(columns), seed=world.seed)
    if not len(pairs):
        nothing = "Pairs need at least two columns that are not dates."
        return {
            "tvd2": Figure.unknown(nothing, unit="share of rows", direction="lower"),
            "association_gap": Figure.unknown(nothing, unit="Cramér's V", direction="lower"),
        }, None
    share = f" over {len(pairs)} pairs drawn by seed" if len(pairs) < len(columns) * (len(columns) - 1) // 2 else ""
    fine = Ruler.make(columns, world.train, target=world.target, coarse=False)
    train, judge, synthetic = (fine.encode(t) for t in (world.train, world.judge, world.synthetic))
    mixed = _shuffled(train, seed=world.seed)
    tvd, without = _pair_scan(judge, world.groups, (synthetic, train, mixed), fine.sizes, pairs)
    draws = world.scale * references.pair_deals(
        world.pooled(train, judge), fine.sizes, world.pooled_patients, world.share, pairs, seed=world.seed
    )
    means = tvd.mean(axis=1)
    tvd2 = _distance_figure(
        float(means[0]),
        without,
        float(draws.mean()) if world.in_sample else float(means[1]),
        draws,
        float(means[2]),
        world,
        f"Mean{share} of the total variation distance of all two-way tables (tvd2 of the benchmark).",
    )
    coarse = Ruler.make(columns, world.train, target=world.target, coarse=True)
    gap, association = _association(world, columns, coarse, pairs, tvd[0])
    return {"tvd2": tvd2, "association_gap": gap}, association


def _pair_scan(
    judge: Coded, groups: np.ndarray, others: tuple[Coded, ...], sizes: tuple[int, ...], pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(distance of each other table to the judge, [others, pairs]; mean distance of the first one with each
    group of judges left out, [groups])."""
    number = int(groups.max(initial=0)) + 1
    out = np.zeros((len(others), len(pairs)))
    without = np.zeros(number)
    for p, (i, j) in enumerate(pairs):
        size = sizes[i] * sizes[j]
        inside = np.bincount(
            groups * size + judge.codes[i] * sizes[j] + judge.codes[j], minlength=number * size
        ).reshape(number, size)
        total = inside.sum(axis=0)
        real = total / max(judge.rows, 1)
        for o, other in enumerate(others):
            made = np.bincount(other.codes[i] * sizes[j] + other.codes[j], minlength=size) / max(other.rows, 1)
            out[o, p] = fidelity.distance(real, made)
            if o == 0:
                left = total - inside
                rows = np.maximum(left.sum(axis=1, keepdims=True), 1)
                without += 0.5 * np.abs(left / rows - made).sum(axis=1)
    return out, without / len(pairs)


def _association(
    world: _World, columns: tuple[Column, ...], ruler: Ruler, pairs: np.ndarray, tvd: np.ndarray
) -> tuple[Figure, Associations]:
    train, judge, synthetic = (ruler.encode(t) for t in (world.train, world.judge, world.synthetic))
    mixed = _shuffled(train, seed=world.seed)
    real, made, trained, floor = (
        fidelity.associations(t, ruler.sizes, pairs) for t in (judge, synthetic, train, mixed)
    )
    half = None
    if len(pairs) <= INTERVAL_PAIRS:
        groups = world.groups
        without = [
            np.abs(fidelity.associations(judge.take(groups != g), ruler.sizes, pairs) - made).mean()
            for g in range(int(groups.max(initial=0)) + 1)
        ]
        half = references.jackknife_half_width(np.array(without))
    value = float(np.abs(made - real).mean())
    reference = float(np.abs(trained - real).mean())
    if world.in_sample:  # the training rows against themselves are no reference: deal them into halves
        part = next(references.deals(world.pooled_patients, world.share, 1, seed=world.seed))
        halves = [fidelity.associations(train.take(p), ruler.sizes, pairs) for p in (part, ~part)]
        reference = world.scale * float(np.abs(halves[0] - halves[1]).mean())
    gap = Figure(
        value=value,
        low=None if half is None else max(0.0, value - float(half)),
        high=None if half is None else value + float(half),
        reference=reference,
        reference_text=world.reference_text,
        floor=float(np.abs(floor - real).mean()),
        unit="Cramér's V",
        direction="lower",
        how="Mean over pairs of the absolute difference of bias-corrected Cramér's V on coarse cells.",
    )
    difference = np.abs(made - real)
    order = np.argsort(-difference, kind="stable")
    chosen: list[int] = []
    for p in order:
        chosen += [int(c) for c in pairs[p] if int(c) not in chosen]
        if len(chosen) >= MAP_COLUMNS:
            break
    chosen = sorted(chosen[:MAP_COLUMNS])
    drawn = np.array([(a, b) for x, a in enumerate(chosen) for b in chosen[x + 1 :]])
    matrices = [_square(fidelity.associations(t, ruler.sizes, drawn), len(chosen)) for t in (judge, synthetic)]
    worst = tuple(
        Pair(
            first=columns[pairs[p][0]].name,
            second=columns[pairs[p][1]].name,
            real=float(real[p]),
            synthetic=float(made[p]),
            tvd=float(tvd[p]),
        )
        for p in order[:WORST_PAIRS]
    )
    return gap, Associations(
        names=tuple(columns[c].name for c in chosen),
        real=matrices[0],
        synthetic=matrices[1],
        worst=worst,
        pairs=len(pairs),
        columns=len(columns),
    )


def _shuffled(table: Coded, *, seed: int) -> Coded:
    rng = np.random.default_rng([seed, 1])
    return Coded(codes=np.stack([rng.permutation(c) for c in table.codes]))


def _square(upper: np.ndarray, size: int) -> tuple[tuple[float, ...], ...]:
    out = np.eye(size)
    out[np.triu_indices(size, 1)] = upper
    out = np.triu(out) + np.triu(out, 1).T
    return tuple(_floats(row) for row in out)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)

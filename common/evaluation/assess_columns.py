"""Columns, correlations, rare levels and nearness of held-out patients against synthetic rows: ask, infer, tell."""

from __future__ import annotations

import functools
from itertools import pairwise

import numpy as np

from cohortium.common.derived import MAX_WORK, Nearest
from cohortium.common.evaluation.axes import axes
from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import TWO_SIDED
from cohortium.common.evaluation.bins import Bins, coarse, most_bins, values_of
from cohortium.common.evaluation.correlation import Correlations, correlations
from cohortium.common.evaluation.findings import (
    DifferenceMap,
    Effect,
    Finding,
    Forest,
    PairRow,
    Section,
    Shares,
    Table,
    TableRow,
)
from cohortium.common.evaluation.nearness import nearness
from cohortium.common.evaluation.phases import ATTACK, NEAREST_BINS
from cohortium.common.evaluation.private import inferred_shares, patient_number, private_columns
from cohortium.common.evaluation.profile import Profile, missing_share, profile, profile_features
from cohortium.common.evaluation.ranks import rank_scores
from cohortium.common.evaluation.rarity import rare_recall
from cohortium.common.evaluation.task import Counted, Task, Unanswered, finding, floats
from cohortium.common.queries import Counts, Moments, Sums, Tallies

CHANCE = 0.5
SHARES_DRAWN = 24
FOREST_ROWS = 30
MAP_COLUMNS = 30
PAIRS_LISTED = 12
NEAREST_ROWS = 400
NEAREST_WORK = 40_000
"""Numbers compared for one patient: rows × columns. Keeps the site's own time below a second per 10,000 patients."""


def ask_columns(task: Task) -> Counted:
    """The one-way counts: all that follows takes the number of patients from them."""
    phase = "evaluation-columns"
    sigma = task.noise[phase] * float(np.sqrt(len(task.grids)))
    most = most_bins(columns=len(task.grids), sigma=sigma, patients=task.expected)
    bins = tuple(Bins.of(task.codes[:, c], grid, most) for c, grid in enumerate(task.grids))
    answer = task.ask(
        phase,
        Counts(
            columns=tuple(range(len(bins))),
            maps=tuple(b.map for b in bins),
            bins=tuple(b.size for b in bins),
            part="holdout",
        ),
    )
    ends = np.concatenate([[0], np.cumsum([b.size for b in bins])])
    noised = tuple(answer.values[a:b] for a, b in pairwise(ends))
    patients, spread = patient_number(noised, answer.sigma)
    return Counted(bins=bins, noised=noised, sigma=answer.sigma, patients=patients, patients_sd=spread)


def fidelity(task: Task, counted: Counted) -> Section:
    """Every column's distance, its mean, spread and missing values."""
    made = [b.counts for b in counted.bins]
    found = private_columns(
        names=task.names,
        noised=counted.noised,
        sigma=counted.sigma,
        synthetic=made,
        ordered=[b.ordered for b in counted.bins],
        seed=task.seed,
    )
    findings = [Finding(key="column_agreement", named=found.mean)]
    if found.ks_mean is not None:
        findings.append(Finding(key="distribution_agreement", named=found.ks_mean))
    forests: list[Forest] = []
    tables: list[Table] = []
    notes: list[str] = []
    described = _profile(task, counted)
    if isinstance(described, Profile):
        findings.append(Finding(key="mean_smd", named=described.smd))
        forests.append(_smd_forest(described, task.drawn(FOREST_ROWS)))
        tables.append(_equivalence(described))
    elif described:
        notes.append(described)
    for c, name in enumerate(task.names):
        findings.append(finding(f"tvd.{name}", f"{name}: distance", found.columns[c].figure))
        gap = found.ks[c]
        if gap is not None:
            findings.append(finding(f"ks.{name}", f"{name}: greatest gap of the distribution functions", gap.figure))
        if not task.grids[c].required and counted.stands_out:
            share = missing_share(
                float(counted.noised[c][-1]),
                counted.sigma,
                counted.patients,
                counted.patients_sd,
                float(made[c][-1] / made[c].sum()),
            )
            findings.append(finding(f"missing.{name}", f"{name}: missing", share))
    if isinstance(described, Profile):
        for number in described.numbers:
            findings.append(finding(f"mean.{number.name}", f"{number.name}: mean (winsorised)", number.mean))
            findings.append(finding(f"sd.{number.name}", f"{number.name}: standard deviation (winsorised)", number.sd))
            findings.append(finding(f"smd.{number.name}", f"{number.name}: standardised difference", number.smd))
    return Section(
        key="fidelity",
        title="Columns",
        intro="Each column of the synthetic table against held-out patients, in bins that the synthetic table makes.",
        findings=tuple(findings),
        forests=tuple(forests),
        shares=_shares(task, counted, {n: f.figure for n, f in zip(task.names, found.columns, strict=True)}),
        tables=tuple(tables),
        notes=tuple(notes),
    )


def _profile(task: Task, counted: Counted) -> Profile | str:
    """Means and spreads; a text says why there are none, "" where no column is a number."""
    phase = "evaluation-means"
    if not task.planned(phase):
        return ""
    if not counted.stands_out:
        return "Means were not asked for: the noise is larger than the number of held-out patients."
    values = [values_of(grid) for grid in task.grids]
    try:
        asked = profile_features(values, task.codes)
    except ValueError as reason:
        return f"Means cannot be assessed: {reason}."
    try:
        answer = task.ask(phase, Sums(features=asked.features, clip_norm_l2=asked.clip_norm_l2, part="holdout"))
    except Unanswered as lost:
        return f"Means cannot be assessed: {lost}"
    missing, made = [], []
    for c, (low, high) in zip(asked.columns, asked.limits, strict=True):
        share = inferred_shares([counted.noised[c]], counted.sigma, [counted.bins[c].counts], counted.patients)[0]
        missing.append(float(share[-1]))
        x = values[c][task.codes[:, c]]
        x = np.clip(x[~np.isnan(x)], low, high)
        made.append((float(x.mean()), float(x.std(ddof=1)), len(x)))
    return profile(
        names=[task.names[c] for c in asked.columns],
        asked=asked,
        sums=answer.values,
        sigma=answer.sigma,
        missing=missing,
        patients=counted.patients,
        synthetic=made,
        seed=task.seed,
    )


def _smd_forest(found: Profile, most: int | None) -> Forest:
    farthest = sorted(found.numbers, key=lambda n: -abs(n.smd.value or 0.0))[:most]
    return Forest(
        title="Means: held-out patients minus synthetic rows",
        unit="standard deviations",
        rows=tuple(Effect(label=n.name, figure=n.smd) for n in farthest),
        line=0.0,
        caption=f"The {len(farthest)} numbers that differ most of {len(found.numbers)}."
        if len(farthest) < len(found.numbers)
        else "",
    )


def _equivalence(found: Profile) -> Table:
    return Table(
        title="Equivalence of means (two one-sided tests)",
        head=("Column", "Margin", "p", "Shown equivalent"),
        rows=tuple(
            TableRow(
                cells=(
                    n.name,
                    f"{n.equivalence.margin:.3g}",
                    f"{n.equivalence.p:.1g}" if n.equivalence.p < 0.001 else f"{n.equivalence.p:.3f}",
                    "yes" if n.equivalence.equivalent else "no",
                )
            )
            for n in found.numbers
        ),
        caption=f"{found.equivalent} of {len(found.numbers)} means are shown to differ by less than the margin "
        "(0.2 standard deviations); the noise is part of the test. Values beyond the synthetic 1 % and 99 % are held "
        "there.",
    )


def _shares(task: Task, counted: Counted, distances: dict[str, Figure]) -> tuple[Shares, ...]:
    """Small multiples, the farthest columns first where there are too many."""
    if not counted.stands_out:
        return ()
    order = sorted(range(len(task.names)), key=lambda c: -(distances[task.names[c]].value or 0.0))
    shown = sorted(order[: task.drawn(SHARES_DRAWN)])
    inferred = inferred_shares(
        [counted.noised[c] for c in shown], counted.sigma, [counted.bins[c].counts for c in shown], counted.patients
    )
    out = []
    for c, real in zip(shown, inferred, strict=True):
        bins = counted.bins[c]
        seen = counted.noised[c] / counted.patients
        half = TWO_SIDED * np.hypot(counted.sigma, seen * counted.patients_sd) / counted.patients
        low, high = np.clip(seen - half, 0.0, 1.0), np.clip(seen + half, 0.0, 1.0)
        keep = slice(None, -1) if task.grids[c].required else slice(None)
        out.append(
            Shares(
                name=task.names[c],
                unit=task.columns[c].unit,
                labels=tuple(_labels(task, c, bins)[keep]),
                synthetic=floats((bins.counts / bins.counts.sum())[keep]),
                real=floats(np.clip(real, low, np.maximum(low, high))[keep]),
                low=floats(low[keep]),
                high=floats(high[keep]),
                distance=distances[task.names[c]],
            )
        )
    return tuple(out)


def _labels(task: Task, c: int, bins: Bins) -> list[str]:
    """A name for each bin, the missing one last."""
    grid = task.grids[c]
    firsts = [int(np.flatnonzero(bins.map == b)[0]) for b in range(bins.size - 1) if np.any(bins.map == b)]
    texts = grid.decode(np.array(firsts, dtype=np.int32), np.zeros(len(firsts)))
    named = iter(str(t)[:10] if task.columns[c].kind in ("date", "datetime") else str(t) for t in texts)
    more = "" if grid.categorical or bins.size == grid.size else "from "
    return [more + next(named) if np.any(bins.map == b) else "–" for b in range(bins.size - 1)] + ["missing"]


def _attack(found: NamedFigure, rows: int) -> Forest:
    return Forest(
        title=f"Attack by distance with {rows} synthetic rows, against chance",
        unit="probability",
        rows=(Effect(label=found.label, figure=found.figure),),
        line=CHANCE,
        line_name="chance",
        name="attack",
        caption=f"Who holds {rows} rows of the model and calls the nearer of a training and a held-out patient the "
        "training one is right so often. A lower bound: with the whole table an attacker may do better. From noised "
        "histograms of both.",
    )


def associations(task: Task, counted: Counted) -> Section | None:
    """Correlations of rank scores, the worst pairs, principal axes. None where the plan does not ask."""
    phase = "evaluation-correlations"
    if not task.planned(phase):
        return None
    section = functools.partial(
        Section,
        key="associations",
        title="Associations",
        intro="Correlations of ranks (by the synthetic distribution): held-out patients against synthetic rows.",
    )
    if not counted.stands_out:
        return section(notes=("Correlations were not asked for: there are too few patients for the noise.",))
    try:
        ranks = rank_scores(counted.bins, task.codes)
    except ValueError as reason:
        return section(notes=(f"Correlations cannot be assessed: {reason}.",))
    answer = task.ask(phase, Moments(features=ranks.features, bound_sq=ranks.bound_sq, part="holdout"))
    chosen = ranks.columns
    names = [task.names[c] for c in chosen]
    binned = coarse(task.codes, counted.bins)
    try:
        found = correlations(
            names=names,
            scores=ranks.scores,
            comoments=answer.values,
            sigma=answer.sigma,
            counts=[counted.noised[c] for c in chosen],
            counts_sigma=counted.sigma,
            synthetic_counts=[counted.bins[c].counts for c in chosen],
            synthetic_bins=binned[:, chosen],
            patients=counted.patients,
            clip_share=ranks.clip_share,
            seed=task.seed,
        )
    except ValueError as reason:
        return section(notes=(f"Correlations cannot be assessed: {reason}.",))
    spread = axes(found)
    findings = [
        Finding(key="correlation_similarity", named=found.similarity),
        Finding(key="axes_overlap", named=spread.overlap),
        finding("axes_together", f"Variance on the first {len(spread.real)} synthetic axes", spread.together),
        *(finding(f"axis.{a + 1}", f"Variance on axis {a + 1}", f) for a, f in enumerate(spread.real)),
    ]
    equivalent = sum(pair.equivalence.equivalent for pair in found.pairs)
    return section(
        findings=tuple(findings),
        maps=(_map(found, task.drawn(MAP_COLUMNS)),),
        notes=(
            f"{equivalent} of {len(found.pairs)} correlations are shown to be within "
            f"{found.pairs[0].equivalence.margin:g} of the synthetic ones (two one-sided tests, noise included).",
        )
        if found.pairs
        else (),
    )


def _map(found: Correlations, most: int | None) -> DifferenceMap:
    gap = np.abs(found.real - found.synthetic)
    shown = np.sort(np.argsort(-gap.max(axis=1), kind="stable")[:most])
    names = tuple(found.names[i] for i in shown)
    worst = sorted(found.pairs, key=lambda pair: -abs(pair.shrunk - pair.synthetic))[:PAIRS_LISTED]
    square = np.ix_(shown, shown)
    return DifferenceMap(
        title="Correlation of ranks",
        names=names,
        real=tuple(floats(row) for row in found.real[square]),
        synthetic=tuple(floats(row) for row in found.synthetic[square]),
        worst=tuple(
            PairRow(
                first=pair.first,
                second=pair.second,
                real=pair.real,
                synthetic=pair.synthetic,
                difference=pair.synthetic - pair.shrunk,
            )
            for pair in worst
        ),
        caption=f"The {len(names)} of {len(found.names)} columns with the greatest differences."
        if len(names) < len(found.names)
        else "",
    )


def rare(task: Task, counted: Counted) -> Section | None:
    """Do rare levels occur in the synthetic table at all? By bands of frequency; free, from the one-way counts."""
    chosen = [c for c, grid in enumerate(task.grids) if grid.categorical]
    if not chosen or not counted.stands_out:
        return None
    bands = rare_recall(
        counts=[counted.noised[c][:-1] for c in chosen],
        sigma=counted.sigma,
        synthetic=[counted.bins[c].counts[:-1] for c in chosen],
    )
    findings = []
    for b, band in enumerate(bands):
        if band.levels:
            findings.append(finding(f"rare.share.{b}", f"Answers of levels {band.name}", band.held_out))
            findings.append(finding(f"rare.recall.{b}", f"Recall of levels {band.name}", band.recall))
    return Section(
        key="rare",
        title="Rare categories",
        intro="Levels by how often the synthetic table has them, and how many held-out patients have a level it knows.",
        findings=tuple(findings),
        tables=(
            Table(
                title="Levels by frequency",
                head=("Synthetic frequency", "Levels", "of these in the table"),
                rows=tuple(TableRow(cells=(b.name, str(b.levels), str(b.levels_present))) for b in bands if b.levels),
            ),
        ),
    )


def nearest(task: Task, counted: Counted) -> Section | None:
    """How near held-out patients are to their nearest synthetic row; None where the plan does not ask."""
    phase = "evaluation-nearest"
    if not task.planned(phase) or not counted.stands_out:
        return None
    p = len(task.grids)
    rows = max(min(NEAREST_ROWS, min(NEAREST_WORK, MAX_WORK // 2) // p, len(task.codes) // 2), 1)
    order = np.random.default_rng([task.seed, 13]).permutation(len(task.codes))
    binned = coarse(task.codes, counted.bins).astype(np.int32)
    program = functools.partial(
        Nearest,
        columns=tuple(range(p)),
        maps=tuple(b.map.astype(np.int32) for b in counted.bins),
        ordinal=tuple(b.ordered for b in counted.bins),
        sizes=tuple(b.size for b in counted.bins),
        rows=np.ascontiguousarray(binned[order[:rows]]),
    )
    others = task.codes[order[rows : rows + 4000]]
    distances = program(edges=np.array([0.5])).distance(others)
    edges = np.unique(np.quantile(distances, np.arange(1, NEAREST_BINS) / NEAREST_BINS))
    edges = edges[edges > 0]
    if len(edges) < 2:
        return None
    asked = program(edges=edges)
    answer = task.ask(phase, Tallies(derived=(asked,), part="holdout"))
    training = None
    notes: tuple[str, ...] = ()
    if task.planned(ATTACK):
        try:
            training = task.ask(ATTACK, Tallies(derived=(asked,), part="train"))
        except Unanswered as lost:
            notes = (f"The attack cannot be assessed: {lost}",)
    found = nearness(
        training=None if training is None else training.values,
        training_sigma=0.0 if training is None else training.sigma,
        counts=answer.values,
        sigma=answer.sigma,
        edges=edges,
        synthetic=np.bincount(asked.assign(others), minlength=asked.bins).astype(float),
        seed=task.seed,
    )
    return Section(
        key="nearness",
        title="Distance to the nearest synthetic row",
        intro=f"Of held-out patients to the nearest of {rows} synthetic rows, against further synthetic rows. A "
        "measure of similarity, not of privacy.",
        findings=(
            Finding(key="nearest_median", named=found.median),
            Finding(key="nearest_difference", named=found.difference),
            *([] if found.training is None else [Finding(key="attack_nearest", named=found.training)]),
        ),
        forests=() if found.training is None else (_attack(found.training, rows),),
        notes=notes,
    )

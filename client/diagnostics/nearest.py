"""How near the synthetic rows are to the training patients, with held-out patients as the control. Similarity only.

DCR (distance to the closest record), NNDR (ratio of the two nearest distances) and the Hamming distance are what
vendors print as "privacy metrics". They are not: a patient can be exposed by rows that are far away, and a copy of a
common row exposes nobody (Ganev, De Cristofaro 2023, arXiv:2312.05114). Here they say one thing: whether training
patients are nearer than patients of the same hospital whom the model never saw (Platzer, Reutterer 2021, Front. Big
Data 4, 679939).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from cohortium.client.diagnostics import intervals
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.diagnostics.facts import NO_CONTROL, Histogram, Item, Section, unknown
from cohortium.common.encoding import Codes
from cohortium.common.evaluation.base import Figure

Floats = NDArray[np.float64]
BARS = 24
WARNING = (
    "These figures measure similarity, not privacy. Near does not mean exposed and far does not mean safe: only the "
    "privacy statement above is a guarantee."
)
_ONLY = "It is a distance. It cannot show that a patient is safe, and no row may be deleted because of it."


@dataclass(frozen=True, kw_only=True, slots=True)
class Near:
    """Of each patient: mean distance over columns to the nearest synthetic row (0 to 1), its ratio to the distance of
    the second nearest, and the fewest columns in which a synthetic row lies in another cell. All [patients]."""

    closest: Floats
    ratio: Floats
    hamming: Floats

    @classmethod
    def of(cls, cohort: Cohort, codes: Codes) -> Near:
        closest, ratio = np.zeros(len(codes)), np.zeros(len(codes))
        width = len(cohort.scales)
        for part, found in cohort.distances(codes, to=cohort.synthetic):
            two = np.partition(found, 1, axis=1)[:, :2]
            closest[part] = two[:, 0] / width
            # Two rows at distance 0 are equally near.
            ratio[part] = np.where(two[:, 1] > 0, two[:, 0] / np.maximum(two[:, 1], 1e-300), 1.0)
        own, their = (cohort.cells(c).astype(np.float64) for c in (codes, cohort.synthetic))
        step = max(1, int(4e6 // len(their)))
        blocks = [cdist(own[i : i + step], their, "hamming").min(axis=1) for i in range(0, len(own), step)]
        hamming = np.rint(np.concatenate([*blocks, np.zeros(0)]) * width)
        return cls(closest=closest, ratio=ratio, hamming=hamming)


def similarity(cohort: Cohort) -> Section:
    """The section of the page; every figure beside the held-out patients' own."""
    train = Near.of(cohort, cohort.train)
    control = Near.of(cohort, cohort.control) if cohort.controlled else None
    return Section(
        key="similarity",
        title="Similarity to the records (not privacy)",
        intro=(
            "Distances between patients and synthetic rows. A number's distance is counted in places among the "
            "synthetic rows, 0 to 1; a level is the same or not; the mean is taken over the columns."
        ),
        warning=WARNING,
        items=(*copies(cohort), *_nearer(cohort, train, control), *_summaries(train, control)),
        histograms=(_histogram(train, control),),
    )


def copies(cohort: Cohort) -> tuple[Item, ...]:
    """Patients with a synthetic copy, over all rows, and what is above the held-out patients' share."""
    hits, of, control_hits, control_of = cohort.copies
    how = "A row counts as copied where some synthetic row has the same fine code in every column; all rows are sought."
    share = _share(hits, of, how=how, control=(control_hits, control_of) if cohort.controlled else None)
    return (
        Item(
            key="copies",
            label="Training patients with a synthetic copy",
            figure=share,
            means="Beside the held-out patients' share: common rows come about by themselves, in both groups alike.",
            limits=(
                "A copy alone reveals nothing: a copy of a common row exposes nobody. Deleting copies would tell who "
                "was in training."
            ),
        ),
        Item(
            key="copies_excess",
            label="Copies beyond the held-out patients' share",
            figure=excess(cohort, (hits, of), (control_hits, control_of), how="(training − control) / (1 − control)."),
            means="Above 0: training patients are copied more often than patients whom the model never saw.",
            limits=_ONLY,
        ),
    )


def _share(hits: int, of: int, *, how: str, control: tuple[int, int] | None) -> Figure:
    low, high = intervals.wilson(hits, of)
    beside = None if control is None else control[0] / control[1]
    return Figure(
        value=hits / of,
        low=low,
        high=high,
        reference=beside,
        reference_text="" if beside is None else "held-out patients",
        unit="share",
        direction="none",
        how=f"{how} {hits} of {of}; Wilson's 95 % interval.",
    )


def excess(cohort: Cohort, train: tuple[int, int], control: tuple[int, int], *, how: str) -> Figure:
    """What training patients show beyond held-out ones, as a share of what was left to show."""
    if not cohort.controlled:
        return unknown(NO_CONTROL, unit="share")
    found = intervals.residual(*train, *control)
    if found is None:
        return unknown("It succeeds on every held-out patient: nothing is left to gain.", unit="share")
    value, (low, high) = found
    return Figure(
        value=value,
        low=low,
        high=high,
        reference=0.0,
        reference_text="training patients fare like held-out ones",
        unit="share",
        direction="lower",
        how=how,
    )


def _nearer(cohort: Cohort, train: Near, control: Near | None) -> tuple[Item, ...]:
    if control is None:
        first = second = unknown(NO_CONTROL, unit="share")
    else:
        value, (low, high) = intervals.auc(-train.closest, -control.closest)
        first = Figure(
            value=value,
            low=low,
            high=high,
            reference=0.5,
            reference_text="no difference",
            unit="share",
            direction="none",
            how="Of all pairs of a training and a held-out patient; ties count half; Newcombe's interval.",
        )
        second = _rows_nearer(cohort)
    return (
        Item(
            key="patients_nearer",
            label="Training patient nearer to the synthetic rows than a held-out one",
            figure=first,
            means="0.5: training patients are no nearer than strangers. Above: the model leans towards its patients.",
            limits=_ONLY,
        ),
        Item(
            key="rows_nearer",
            label="Synthetic rows whose nearest patient was in training",
            figure=second,
            means="0.5 with as many training as held-out patients: rows are no nearer to training than to strangers.",
            limits=_ONLY,
        ),
    )


def _rows_nearer(cohort: Cohort) -> Figure:
    """Share of synthetic rows nearer to training, of two sets of patients of one size; the patients are the sample.

    One patient can be the nearest to many rows, so the interval is over patients: the linearised variance of a ratio in
    two strata of one size (Cochran 1977, Sampling Techniques, 6.11), not that of a share of independent rows.
    """
    train, control = cohort.equal_parts()
    real = np.concatenate([train, control])
    weight = np.zeros(len(real))
    for _, found in cohort.distances(cohort.synthetic, to=real):
        nearest = found == found.min(axis=1, keepdims=True)
        weight += (nearest / nearest.sum(axis=1, keepdims=True)).sum(axis=0)
    member = np.arange(len(real)) < len(train)
    share = float(weight[member].sum() / weight.sum())
    parts = (weight * (member - share))[member], (weight * (member - share))[~member]
    spread = sum(len(part) * float(part.var(ddof=1)) for part in parts)
    half = intervals.Z * float(np.sqrt(spread)) / float(weight.sum())
    return Figure(
        value=share,
        low=max(share - half, 0.0),
        high=min(share + half, 1.0),
        reference=0.5,
        reference_text="no difference",
        unit="share",
        direction="none",
        how=f"{len(train)} training and {len(control)} held-out patients; ties are shared; interval over patients.",
    )


def _summaries(train: Near, control: Near | None) -> tuple[Item, ...]:
    """Medians, each beside the held-out patients' own."""
    rows = (
        ("dcr", "closest", "Distance to the nearest synthetic row (DCR)", "mean over columns", "Mean over columns."),
        ("nndr", "ratio", "Nearest over second nearest distance (NNDR)", "ratio", "1: the two nearest are as near."),
        ("hamming", "hamming", "Columns that differ from the most similar row (Hamming)", "columns", "In cells."),
    )
    out = []
    for key, name, label, unit, how in rows:
        value, (low, high) = intervals.median(getattr(train, name))
        beside = None if control is None else intervals.median(getattr(control, name))
        figure = Figure(
            value=value,
            low=low,
            high=high,
            reference=None if beside is None else beside[0],
            reference_low=None if beside is None else beside[1][0],
            reference_high=None if beside is None else beside[1][1],
            reference_text="" if beside is None else "held-out patients",
            unit=unit,
            direction="none",
            how=f"Median over training patients, interval by order statistics. {how}",
        )
        means = "To be read beside the held-out patients' median: it depends on the number of synthetic rows too."
        out.append(Item(key=key, label=label, figure=figure, means=means, limits=_ONLY))
    return tuple(out)


def _histogram(train: Near, control: Near | None) -> Histogram:
    every = train.closest if control is None else np.concatenate([train.closest, control.closest])
    edges = np.linspace(0.0, max(float(every.max()), 1e-9), BARS + 1)

    def shares(values: Floats) -> tuple[float, ...]:
        return tuple(float(v) for v in np.histogram(values, edges)[0] / len(values))

    return Histogram(
        title="Distance of patients to the nearest synthetic row",
        axis="mean distance over columns",
        edges=tuple(float(e) for e in edges),
        train=shares(train.closest),
        control=() if control is None else shares(control.closest),
        train_patients=len(train.closest),
        control_patients=0 if control is None else len(control.closest),
    )

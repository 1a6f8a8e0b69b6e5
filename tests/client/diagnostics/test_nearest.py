"""Similarity: copies and nearness are seen, and rows of strangers are not mistaken for them."""

from __future__ import annotations

import numpy as np
import pytest
from diagnosing import cohort, held, people, schema, synthetic
from sklearn.neighbors import NearestNeighbors

from cohortium.client.diagnostics import nearest
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.diagnostics.facts import Section
from cohortium.client.diagnostics.intervals import wilson
from cohortium.client.diagnostics.nearest import Near, similarity
from cohortium.common.encoding import grids
from cohortium.common.evaluation.base import Figure


def figures(section: Section) -> dict[str, Figure]:
    return {item.key: item.figure for item in section.items}


def inside(figure: Figure, value: float) -> bool:
    assert figure.low is not None and figure.high is not None
    return figure.low <= value <= figure.high


def test_nearest_records_are_sklearns() -> None:
    found = cohort("fresh", 120, 90)
    near = Near.of(found, found.train)
    distances = np.concatenate([block for _, block in found.distances(found.train, to=found.synthetic)])
    two, _ = NearestNeighbors(n_neighbors=2, metric="precomputed").fit(np.zeros((90, 90))).kneighbors(distances)
    assert near.closest == pytest.approx(two[:, 0] / 8) and near.ratio == pytest.approx(two[:, 0] / two[:, 1])
    own, their = found.cells(found.train), found.cells(found.synthetic)
    assert near.hamming == pytest.approx((own[:, None] != their[None]).sum(axis=2).min(axis=1))


def test_rows_of_training_patients_are_found() -> None:
    """Red if training and held-out patients were exchanged, or the control were left out."""
    told = figures(similarity(cohort("copy")))
    assert told["copies"].value > 0.8 and told["copies"].reference < 0.05
    assert told["copies_excess"].low > 0.7
    assert told["patients_nearer"].low > 0.8 and told["rows_nearer"].low > 0.6
    assert told["dcr"].value == 0 < told["dcr"].reference_low
    assert told["hamming"].value == 0 and told["nndr"].reference > 0


def test_rows_of_strangers_show_no_leaning() -> None:
    told = figures(similarity(cohort("fresh")))
    assert inside(told["patients_nearer"], 0.5) and inside(told["rows_nearer"], 0.5)
    assert inside(told["copies_excess"], 0.0) and told["dcr"].reference_low <= told["dcr"].value


def test_the_interval_over_patients_covers_no_leaning() -> None:
    """40 made-up hospitals. Power: a binomial interval over the 1000 synthetic rows covers 0.65 of the time."""
    covered, naive = [], []
    for seed in range(40):
        figure = nearest._rows_nearer(cohort("fresh", 160, 1000, seed=seed))
        covered.append(inside(figure, 0.5))
        low, high = wilson(round(1000 * (figure.value or 0)), 1000)
        naive.append(low <= 0.5 <= high)
    assert np.mean(covered) >= 0.85 > 0.8 > np.mean(naive)


def test_without_held_out_patients_nothing_is_claimed() -> None:
    records = people(200)
    nobody = np.zeros(records.patients, dtype=bool)
    rows = synthetic("copy", records, 200)
    found = Cohort.of(tuple(schema().modelled), grids(schema()), records, nobody, rows, seed=0)
    section = similarity(found)
    told = figures(section)
    for key in ("copies_excess", "patients_nearer", "rows_nearer"):
        assert told[key].value is None and "control" in told[key].reason, key
    assert told["copies"].reference is None and not section.histograms[0].control
    assert held(records).any()  # the helper would have held some out


def test_every_figure_says_what_it_does_not_mean() -> None:
    section = similarity(cohort("fresh", 100, 100))
    assert "not privacy" in section.warning and "not privacy" in section.title
    assert all(item.means and item.limits for item in section.items)
    (drawn,) = section.histograms
    assert sum(drawn.train) == pytest.approx(1) == sum(drawn.control) and len(drawn.edges) == len(drawn.train) + 1

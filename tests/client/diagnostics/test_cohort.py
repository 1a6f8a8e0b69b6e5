"""What is compared: one row of a patient, distances on the synthetic scale, copies in all rows."""

from __future__ import annotations

import numpy as np
import pytest
from diagnosing import COLUMNS, cohort, held, missing, people, schema, synthetic

from cohortium.client.diagnostics import cohort as cohorts
from cohortium.client.diagnostics.cohort import Cohort, row_keys
from cohortium.common.encoding import Codes, grids
from cohortium.common.errors import TableError


def by_hand(found: Cohort, a: Codes, b: Codes) -> float:
    """The distance of two rows, as the docstring says it."""
    total = 0.0
    for column, scale in enumerate(found.scales):
        if scale.levels:
            total += a[column] != b[column]
            continue
        x, y = scale.place[a[column]], scale.place[b[column]]
        if np.isnan(x) and np.isnan(y):
            continue
        if np.isnan(x) or np.isnan(y):
            total += 0.5 + abs((y if np.isnan(x) else x) - 0.5)
        else:
            total += abs(x - y)
    return total


def test_distances_are_those_of_the_docstring() -> None:
    """Red if missing numbers counted as places, or levels by their order."""
    found = cohort("fresh", 80, 60)
    got = np.zeros((len(found.train), 60))
    for part, block in found.distances(found.train, to=found.synthetic):
        got[part] = block
    wanted = [[by_hand(found, a, b) for b in found.synthetic] for a in found.train]
    assert got == pytest.approx(np.array(wanted), abs=1e-12)
    assert (found.train[:, 3] == missing()[3]).any()  # there is a gap to be wrong about


def test_some_columns_add_up_to_all() -> None:
    found = cohort("fresh", 80, 60)
    whole = next(found.distances(found.train, to=found.synthetic))[1]
    parts = [next(found.distances(found.train, to=found.synthetic, columns=(i,)))[1] for i in range(COLUMNS)]
    assert sum(parts) == pytest.approx(whole, abs=1e-12)


def test_a_place_is_the_middle_of_its_ties_among_synthetic_rows() -> None:
    grid = grids(schema())[1]  # age, one code a year
    scale = cohorts.Scale.of(grid, np.array([30, 30, 40, 50], dtype=np.int32))
    assert scale.place[[20, 30, 35, 40, 50]] == pytest.approx([0, 0.25, 0.5, 0.625, 0.875])
    assert np.isnan(scale.place[grid.missing]) and scale.cell[grid.missing] == cohorts.CELLS


def test_a_column_without_synthetic_numbers_has_places_all_the_same() -> None:
    grid = grids(schema())[3]
    scale = cohorts.Scale.of(grid, np.full(30, grid.missing, dtype=np.int32))
    assert np.isfinite(scale.place[:-1]).all() and (np.diff(scale.place[:-1]) > 0).all()


def test_one_row_of_each_patient_and_none_of_another() -> None:
    """Red if the first row were always taken, or a row of a neighbour."""
    records = people(300, rows_each=5)
    kept = held(records)
    found = Cohort.of(
        tuple(schema().modelled), grids(schema()), records, kept, synthetic("fresh", records, 200), seed=0
    )
    assert len(found.train) == (~kept).sum() and len(found.control) == kept.sum()
    train = records.subset(~kept)
    place = []
    for patient, row in enumerate(found.train):
        own = train.codes[train.patient == patient]
        place.append(np.flatnonzero((own == row).all(axis=1))[0] / max(len(own) - 1, 1))
    assert {0.0, 1.0} <= set(place) and "One row of each patient" in found.sampled[0]


def test_large_tables_are_sampled_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "PATIENTS", 50)
    monkeypatch.setattr(cohorts, "WORK", 1.0)
    found = cohort("copy", 400, 1500)
    assert (len(found.train), len(found.control), len(found.synthetic)) == (50, 50, 1000)
    assert found.train_patients == 200 and found.synthetic_rows == 1500 and len(found.sampled) == 3
    assert found.copies[1] == 200 and found.copies[0] > 190  # sought in all rows, not in the sample


def test_a_copy_of_any_row_of_a_patient_counts_once() -> None:
    records = people(200, rows_each=4)
    kept = held(records)
    train = records.subset(~kept)
    of_three = train.codes[np.isin(train.patient, (3, 5, 8))]
    rows = np.concatenate([of_three, of_three, synthetic("shuffled", records, 100)])
    found = Cohort.of(tuple(schema().modelled), grids(schema()), records, kept, rows, seed=0)
    assert found.copies == (3, 100, 0, 100)


def test_keys_are_equal_exactly_for_equal_rows() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (500, 5)).astype(np.int32)
    same = (codes[:, None] == codes[None]).all(axis=2)
    keys = row_keys(codes)
    assert np.array_equal(same, keys[:, None] == keys[None])
    other = row_keys(codes, (0, 2))
    assert np.array_equal(
        (codes[:, None, [0, 2]] == codes[None][:, :, [0, 2]]).all(axis=2), other[:, None] == other[None]
    )


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(TableError) as told:
        cohort("fresh", 30, 400)
    assert told.value.code == "REPORT-FEW"

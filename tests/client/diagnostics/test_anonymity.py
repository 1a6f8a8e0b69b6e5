"""k, l and homogeneity against a plain group-by, and the attack that they are said to be about."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from diagnosing import COLUMNS, cohort, held, missing, people, schema, synthetic

from cohortium.client.diagnostics import anonymity, linking
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.common.encoding import grids

SECRET = 6  # hiv


def test_classes_are_those_of_a_group_by() -> None:
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 3, (400, 5)).astype(np.int32)
    table = pd.DataFrame(cells)
    for columns in ((0, 1), (0, 1, 2, 3), (4,)):
        groups = table.groupby(list(columns))
        classes = anonymity.Classes.make(cells, columns)
        sizes = groups.size()
        assert classes.k == sizes.min() and sorted(classes.sizes) == sorted(sizes)
        assert classes.share_below(5) == pytest.approx(sizes[sizes < 5].sum() / 400)
        several = [sorted(g[4].unique()).__len__() for _, g in groups]
        assert sorted(classes.diversity(cells[:, 4])) == sorted(several)
    assert anonymity.Classes.make(cells, ()).k == 400


def test_the_figures_are_of_the_synthetic_table_with_the_records_beside() -> None:
    """Red if the two were exchanged, or rows of other patients were read."""
    found = cohort("fresh", 400, 900)
    told = {item.key: item.figure for item in anonymity.anonymity(found, seed=0)}
    sides = [pd.DataFrame(found.cells(codes)) for codes in (found.all_synthetic, found.all_train.codes)]
    declared = [t.groupby([0, 1])[0].transform("size") for t in sides]
    assert told["small_declared"].value == pytest.approx((declared[0] < 5).mean())
    assert told["small_declared"].reference == pytest.approx((declared[1] < 5).mean())
    assert told["k_all"].value == 1 and told["k_declared"].reference == declared[1].min()
    others = [c for c in range(COLUMNS) if c != SECRET]
    values = [t.groupby(others)[SECRET].nunique() for t in sides]
    assert told[f"l_{SECRET}"].value == values[0].min() and told[f"l_{SECRET}"].reference == values[1].min()
    alike = sides[0].groupby(others)[SECRET].agg(["nunique", "size"])
    hit = alike[(alike["nunique"] == 1) & (alike["size"] > 1)]["size"].sum() / len(sides[0])
    assert told[f"uniform_{SECRET}"].value == pytest.approx(hit)


def test_the_homogeneity_attack_is_the_look_up_it_says() -> None:
    found = cohort("copy", 300, 500)
    attack = next(a for a in anonymity.homogeneity(found, missing=missing(), seed=0) if a.key.endswith(f"_{SECRET}"))
    others = [c for c in range(COLUMNS) if c != SECRET]
    book: dict[tuple[int, ...], set[int]] = {}
    for row in found.cells(found.all_synthetic):
        book.setdefault(tuple(row[others]), set()).add(int(row[SECRET]))
    hits = sum(book.get(tuple(row[others])) == {int(row[SECRET])} for row in found.cells(found.train))
    assert attack.train == (hits, len(found.train)) and hits > 100
    assert attack.control is not None and attack.control[0] < 20


def test_a_class_with_two_values_names_nobody() -> None:
    records = people(200)
    kept = held(records)
    rows = records.subset(~kept).codes
    other = rows.copy()
    other[:, SECRET] = 1 - other[:, SECRET]
    both = np.concatenate([rows, other])
    found = Cohort.of(tuple(schema().modelled), grids(schema()), records, kept, both, seed=0)
    attack = next(a for a in anonymity.homogeneity(found, missing=missing(), seed=0) if a.key.endswith(f"_{SECRET}"))
    assert attack.train[0] == 0 and attack.blind[0] == 0  # no bet, so none by chance either


def test_it_warns_that_rows_are_nobodys() -> None:
    found = cohort("fresh", 100, 100)
    assert "identifies no patient" in anonymity.WARNING
    assert all("They are not." in item.limits for item in anonymity.anonymity(found, seed=0))
    assert len(anonymity.homogeneity(found, missing=missing(), seed=0)) == len(linking.secrets(found.columns, seed=0))
    assert synthetic("shuffled", people(100), 30).shape == (30, COLUMNS)

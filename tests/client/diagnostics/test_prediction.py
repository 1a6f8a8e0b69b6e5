"""Real beside synthetic: both models judged on held-out patients of the hospital, or a sentence why not."""

from __future__ import annotations

import numpy as np
import pytest
from diagnosing import cohort, people, schema, synthetic, table

from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.diagnostics.prediction import _rows, prediction
from cohortium.client.records import records
from cohortium.common.encoding import grids
from cohortium.common.evaluation.base import Figure


def told(found: Cohort, target: str | None = "dead") -> dict[str, Figure]:
    return {i.key: i.figure for i in prediction(found, grids(schema()), target=target, seed=0)}


@pytest.mark.slow
def test_synthetic_rows_with_relations_predict_and_shuffled_ones_do_not() -> None:
    """Red if the synthetic model were trained on real rows, or judged on them."""
    good, poor = told(cohort("fresh", 600, 600)), told(cohort("shuffled", 600, 600))
    assert good["trtr_auc"].value > 0.7 and good["tstr_auc"].value > 0.7
    assert abs(poor["tstr_auc"].value - 0.5) < 0.12 and poor["trtr_auc"].value == good["trtr_auc"].value
    assert good["tstr_auc"].reference == good["trtr_auc"].value
    assert poor["prediction_difference"].high < 0 < good["prediction_difference"].high


def test_without_target_or_control_it_says_why() -> None:
    found = cohort("fresh", 100, 100)
    assert "target" in told(found, None)["trtr_auc"].reason
    everyone = people(100)
    nobody = np.zeros(everyone.patients, dtype=bool)
    rows = synthetic("copy", everyone, 100)
    alone = Cohort.of(tuple(schema().modelled), grids(schema()), everyone, nobody, rows, seed=0)
    assert "Nobody was held out" in told(alone)["trtr_auc"].reason


def test_decoded_rows_go_back_to_their_codes() -> None:
    """What the model sees are the records in the precision of their codes."""
    original = records(schema(), table(60), unit="pid")
    again = records(schema(), _rows(original.codes, grids(schema())), unit="row")
    assert np.array_equal(
        np.sort(again.codes.view("i4,i4,i4,i4,i4,i4,i4,i4").ravel()),
        np.sort(np.ascontiguousarray(original.codes).view("i4,i4,i4,i4,i4,i4,i4,i4").ravel()),
    )

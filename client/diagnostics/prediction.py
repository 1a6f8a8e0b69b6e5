"""Train-real-test-real beside train-synthetic-test-real: the one pair of figures that no noise makes releasable.

A model trained on records and its score belong to the records, so this comparison exists at the site only (DESIGN 10).
It is the benchmark's own (common/evaluation/utility.py), on rows decoded from their codes, so that both sides have the
same precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cohortium.client.diagnostics import draws
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.diagnostics.facts import Item, unknown
from cohortium.common.encoding import Codes, Grid, Records
from cohortium.common.evaluation import utility

if TYPE_CHECKING:
    from cohortium.common.evaluation.base import Figure

ROWS = 20_000
_LIMITS = (
    "The real rows are this hospital's alone, the synthetic rows are of all hospitals: with few patients here the "
    "synthetic ones may do better. It is one target and one kind of model."
)
_MEANS = {
    "trtr": "How well records of this hospital predict its other patients: the reference for the line below.",
    "tstr": "How well the synthetic rows predict real patients whom nobody trained on.",
    "difference": "Below 0: what a modeller loses here by training on synthetic rows instead of records.",
    "shuffled": "The floor: the same records with their columns shuffled, so with no relation to learn.",
}


def prediction(cohort: Cohort, grids: tuple[Grid, ...], *, target: str | None, seed: int) -> tuple[Item, ...]:
    """Four figures, or one that says why there is none."""
    found: dict[str, tuple[str, Figure]]
    try:
        if target is None:
            raise utility.CannotBeAssessed("The dictionary names no target to predict; name one by --target.")
        if not cohort.controlled:
            raise utility.CannotBeAssessed(
                "Nobody was held out of training, and rows that a model was made from cannot judge it."
            )
        name = "patient of " + "".join(c.name for c in cohort.columns)  # longer than any of them
        made = utility.prediction(
            columns=cohort.columns,
            target=target,
            train=_table(cohort.all_train, grids, name, seed=seed),
            test=_table(cohort.all_control, grids, name, seed=seed),
            synthetic=_rows(
                cohort.all_synthetic[draws.some(f"predict {seed}", len(cohort.all_synthetic), ROWS)], grids
            ),
            unit=name,
            seed=seed,
        )
        found = {
            "trtr": ("Trained on real rows, tested on real patients", made.real),
            "tstr": ("Trained on synthetic rows, tested on real patients", made.synthetic),
            "difference": ("Difference, synthetic minus real", made.difference),
            "shuffled": ("Trained on shuffled real rows", made.shuffled),
        }
    except utility.CannotBeAssessed as why:
        found = {"trtr": ("Prediction of a target", unknown(str(why), unit="AUC"))}
    return tuple(
        Item(
            key=f"{key}_auc" if key in ("trtr", "tstr") else f"prediction_{key}",
            label=label,
            figure=figure,
            means=_MEANS[key],
            limits=_LIMITS,
        )
        for key, (label, figure) in found.items()
    )


def _table(records: Records, grids: tuple[Grid, ...], unit: str, *, seed: int) -> pd.DataFrame:
    rows = draws.some(f"predict {seed}", records.rows, ROWS)
    return _rows(records.codes[rows], grids).assign(**{unit: records.patient[rows]})


def _rows(codes: Codes, grids: tuple[Grid, ...]) -> pd.DataFrame:
    middle = np.full(len(codes), 0.5)
    return pd.DataFrame({g.name: g.decode(codes[:, i], middle) for i, g in enumerate(grids)})

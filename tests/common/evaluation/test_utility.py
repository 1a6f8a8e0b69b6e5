"""AUC and its intervals against scikit-learn, and targets that cannot be assessed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cohortium.common.evaluation import utility
from cohortium.common.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "name": "toy",
        "fields": [
            {"name": "x", "type": "number", "constraints": {"minimum": -9, "maximum": 9}},
            {"name": "site", "type": "string", "constraints": {"enum": ["a", "b"]}},
            {"name": "y", "type": "string", "constraints": {"enum": ["no", "yes", "never", "rare"]}},
            {"name": "t", "type": "integer", "constraints": {"minimum": 0, "maximum": 5000}},
        ],
    }
)


def table(rows: int, seed: int, levels: tuple[str, ...] = ("no", "yes")) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    return pd.DataFrame(
        {
            "x": x,
            "site": rng.choice(["a", "b"], rows),
            "y": np.array(levels)[np.clip(np.digitize(x + rng.normal(0, 0.7, rows), [0, 1][: len(levels) - 1]), 0, 9)],
            "t": rng.integers(0, 5000, rows),
        }
    )


def predict(target: str | None = "y", **tables: pd.DataFrame) -> utility.Prediction:
    given = {"train": table(300, 1), "test": table(200, 2), "synthetic": table(300, 3)} | tables
    return utility.prediction(columns=SCHEMA.modelled, target=target, unit="row", **given)


def test_weighted_auc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((2, 150)).round(1)
    hits = rng.random((2, 150)) < 0.3
    weights = np.stack([np.ones(150, dtype=int), rng.integers(0, 4, 150)])
    got = utility.auc_means(scores, hits, weights)
    for row, w in zip(got, weights):
        assert row == pytest.approx(np.mean([roc_auc_score(h, s, sample_weight=w) for h, s in zip(hits, scores)]))


def test_good_synthetic_rows_predict_and_useless_ones_do_not() -> None:
    good = predict()
    assert good.synthetic.value > 0.8
    assert good.synthetic.low < good.synthetic.value < good.synthetic.high
    assert good.difference.low < good.difference.value < good.difference.high
    assert good.synthetic.reference == good.real.value
    useless = table(300, 3)
    useless["y"] = np.random.default_rng(9).permutation(useless["y"].to_numpy())
    assert abs(predict(synthetic=useless).synthetic.value - 0.5) < 0.15


def test_many_levels_are_averaged_and_a_rare_one_left_out_with_a_note() -> None:
    three = {n: table(300, i, ("no", "yes", "never")) for i, n in enumerate(("train", "test", "synthetic"))}
    assert set(predict(**three).levels) == {"no", "yes", "never"}
    three["test"].loc[:1, "y"] = "rare"
    three["train"].loc[:5, "y"] = "rare"
    scored = predict(**three)
    assert "rare" not in scored.levels and any("fewer than 5 patients" in n for n in scored.notes)


def test_synthetic_rows_of_one_level_score_a_half() -> None:
    scored = predict(synthetic=table(300, 3).assign(y="no"))
    assert scored.synthetic.value == 0.5
    assert scored.notes


def test_in_sample_scores_are_cross_fitted() -> None:
    """A model judged on its own training rows would be near 1; the cross-fitted one must not be."""
    train = table(300, 1)
    train["y"] = np.random.default_rng(4).permutation(train["y"].to_numpy())
    assert predict(train=train, test=None).real.value < 0.65  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "tables", "words"),
    [
        (None, {}, "no target"),
        ("zz", {}, "not among"),
        ("t", {}, "distinct values"),
        ("y", {"train": table(300, 1).assign(y="no")}, "fewer than two levels"),
        ("y", {"train": table(300, 1).assign(y=None)}, "fewer than two levels"),
        ("y", {"test": table(200, 2).assign(y="no")}, "Fewer than 5"),
        ("y", {"test": table(200, 2).assign(y=None)}, "Fewer than 5"),
        ("y", {"test": table(200, 2)[:4]}, "Fewer than 5"),
    ],
)
def test_what_cannot_be_assessed_says_why(target: str | None, tables: dict[str, pd.DataFrame], words: str) -> None:
    with pytest.raises(utility.CannotBeAssessed, match=words):
        predict(target, **tables)


def test_a_patient_with_many_rows_widens_the_interval() -> None:
    """Rows of one patient are copies: counting them as independent would be surer than the data allow."""
    scores, hits = np.random.default_rng(0).random((1, 50)), np.random.default_rng(1).random((1, 50)) < 0.5
    repeated = np.repeat(np.arange(50), 8)
    by_patient = utility.auc_means(scores[:, repeated], hits[:, repeated], utility._resamples(repeated, seed=0))
    by_row = utility.auc_means(scores[:, repeated], hits[:, repeated], utility._resamples(np.arange(400), seed=0))
    assert by_patient[1:].std() > 2 * by_row[1:].std()

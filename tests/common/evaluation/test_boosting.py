"""Exported trees score as scikit-learn does, on rows they have not seen; ordinals keep order and tell levels apart."""

from __future__ import annotations

import numpy as np
import pytest
from scored_world import DIED, FEATURES, GRIDS, people
from sklearn.ensemble import HistGradientBoostingClassifier

from cohortium.common.derived import Trees, derived_from_wire
from cohortium.common.evaluation.boosting import RATE, boosted_trees, chance, log_odds, ordinal_map


def train(codes: np.ndarray, *, trees: int = 12, seed: int = 0) -> Trees:
    known = codes[codes[:, DIED] < 2]
    return boosted_trees(codes=known, hit=known[:, DIED] == 1, grids=GRIDS, features=FEATURES, seed=seed, trees=trees)


def test_the_scores_are_those_of_scikit_learn_on_rows_it_has_not_seen() -> None:
    """Red with thresholds rounded up, or a child's index not moved to its tree."""
    codes, others = people(3000, seed=1), people(2000, seed=2)
    made = train(codes)
    known = codes[codes[:, DIED] < 2]

    def ordinals(rows: np.ndarray) -> np.ndarray:
        return np.stack([m[rows[:, c]] for c, m in zip(made.columns, made.maps)], axis=1).astype(float)

    oracle = HistGradientBoostingClassifier(
        random_state=0, max_iter=12, learning_rate=RATE, early_stopping=False, l2_regularization=1.0
    ).fit(ordinals(known), known[:, DIED] == 1)
    assert np.array_equal(made.score(others), oracle.decision_function(ordinals(others)))
    assert chance(made.score(others)) == pytest.approx(oracle.predict_proba(ordinals(others))[:, 1], abs=1e-12)


def test_every_code_of_the_dictionary_has_a_score() -> None:
    """Also codes that no synthetic row holds: a refusal at a hospital would tell what its records hold."""
    made = train(people(400, seed=3))
    made.check_codes([g.size for g in GRIDS])
    corner = np.array([[g.size - 1 for g in GRIDS], [0] * len(GRIDS)], dtype=np.int32)
    assert np.isfinite(made.score(corner)).all()


def test_the_same_rows_and_seed_give_the_same_trees() -> None:
    codes = people(500, seed=4)
    first, second = train(codes), train(codes)
    assert all(np.array_equal(getattr(first, n), getattr(second, n)) for n in ("feature", "threshold", "value", "left"))


def test_numbers_keep_their_order_and_missing_has_an_ordinal_of_its_own() -> None:
    codes = people(2000, seed=5)
    hit = codes[:, DIED] == 1
    for c in FEATURES:
        table = ordinal_map(codes[:, c], hit, GRIDS[c])
        assert len(table) == GRIDS[c].size and table.dtype == np.int32
        assert (table == table[GRIDS[c].missing]).sum() == 1
        assert table.max() <= 250
        if not GRIDS[c].categorical:
            assert (np.diff(table[:-1]) >= 0).all()


def test_levels_are_in_the_order_of_their_rate() -> None:
    """The dictionary lists stages b, d, a, c; their risk grows a, b, c, d. Red where the dictionary's order is kept."""
    codes = people(5000, seed=6)
    table = ordinal_map(codes[:, 2], codes[:, DIED] == 1, GRIDS[2])
    assert table[:4].tolist() == [1, 3, 0, 2]


def test_a_model_without_features_or_without_both_kinds_is_refused() -> None:
    codes = people(100, seed=7)
    with pytest.raises(ValueError, match="no column"):
        boosted_trees(codes=codes, hit=codes[:, DIED] == 1, grids=GRIDS, features=())
    with pytest.raises(ValueError, match="both kinds"):
        boosted_trees(codes=codes, hit=np.ones(100, dtype=bool), grids=GRIDS, features=FEATURES)


def test_log_odds_and_chance_are_inverse() -> None:
    x = np.linspace(-20, 20, 41)
    assert log_odds(chance(x)) == pytest.approx(x, abs=1e-6)
    assert np.isfinite(log_odds(np.array([0.0, 1.0]))).all()


def test_the_trees_travel() -> None:
    from cohortium.common.derived import Scored

    made = train(people(500, seed=8))
    fields, blobs = Scored(score=made, edges=np.array([0.0])).to_wire()
    codes = people(300, seed=9)
    back = derived_from_wire(fields, blobs)
    assert np.array_equal(back.assign(codes), (made.score(codes) >= 0).astype(np.int64))

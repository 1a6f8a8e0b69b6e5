"""Balanced rows: quotas are kept exactly, everything else as the model gives it, rows in random order, by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from cohortium.common.encoding import grids
from cohortium.common.errors import UsageError
from cohortium.common.generators import quotas as quotas_module
from cohortium.common.generators.quotas import Axis, Quotas, block_counts, lifted
from cohortium.common.generators.sampling import table, tables
from cohortium.common.rule_checks import breaking_rows
from cohortium.common.schema import Schema

FIELDS: list[dict[str, Any]] = [
    {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"], "required": True}},
    {"name": "grade", "type": "integer", "constraints": {"enum": [1, 2, 3]}},
    {"name": "died", "type": "boolean", "constraints": {"required": True}},
    {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 99, "required": True}},
    {"name": "stay", "type": "integer", "constraints": {"minimum": 0, "maximum": 99}},
]
RULES = [{"name": "stay", "order": ["stay", "age"]}, {"name": "men", "if": {"sex": "M"}, "then": {"grade": [1, 2]}}]
SCHEMA = Schema.from_dict({"name": "ward", "fields": FIELDS, "rules": RULES})
GRIDS = grids(SCHEMA)
SEX = (0.7, 0.3, 0.0)
GRADE = (0.60, 0.28, 0.02, 0.10)
DIED_IF_F, DIED_IF_M = 0.05, 0.4


@dataclass(frozen=True)
class Ward:
    """A model of known law: sex; grade apart from it; death by sex; age and stay even. Conditions by rejection."""

    kind: str = "ward"

    def sample(self, rows: int, *, seed: int, where: Mapping[int, NDArray[np.bool_]] | None = None) -> Any:
        rng = np.random.default_rng(seed)
        kept: list[NDArray[np.int32]] = []
        while sum(map(len, kept)) < rows:
            size = 4 * rows + 2000
            sex = rng.choice(3, size, p=SEX)
            grade = rng.choice(4, size, p=GRADE)
            died = rng.random(size) < np.where(sex == 0, DIED_IF_F, DIED_IF_M)
            codes = np.stack([sex, grade, died, rng.integers(0, 100, size), rng.integers(0, 101, size)], axis=1)
            allowed = np.ones(size, dtype=bool)
            for column, may in (where or {}).items():
                allowed &= may[codes[:, column]]
            kept.append(codes[allowed].astype(np.int32))
        return np.concatenate(kept)[:rows]

    def to_arrays(self) -> Any:
        raise NotImplementedError


def draw(rows: int, *, seed: int = 0, **options: Any) -> pd.DataFrame:
    return table(Ward(), SCHEMA, GRIDS, rows, seed=seed, **options)


def test_combinations_of_two_columns_balance_and_nothing_else_changes() -> None:
    rows = draw(12_002, balance=["sex", "died"])
    counts = rows.groupby(["sex", "died"], observed=False).size()
    assert counts.tolist() == [3001, 3001, 3000, 3000]
    graded = rows.grade.value_counts(normalize=True, dropna=False)
    assert abs(graded[1] - 0.6) < 0.02 and abs(rows.grade.isna().mean() - 0.1) < 0.015


def test_rare_classes_get_their_share_and_the_rest_keeps_its_proportions() -> None:
    rows = draw(20_000, minimum_share={"grade": 0.15})
    counts = rows.grade.value_counts(dropna=False)
    assert counts[3] == 3000
    # 1, 2 and missing share what is left as 0.60 : 0.28 : 0.10.
    for level, share in ((1, 0.60), (2, 0.28)):
        assert abs(counts[level] / 17_000 - share / 0.98) < 0.015
    assert abs(rows.grade.isna().sum() / 17_000 - 0.10 / 0.98) < 0.01
    assert abs((rows.sex == "F").mean() - 0.7) < 0.02


@pytest.mark.parametrize("rows", [7, 50, 101, 1000])
def test_a_share_holds_in_every_number_of_rows(rows: int) -> None:
    found = draw(rows, minimum_share={"grade": 0.2, "died": 0.3})
    assert len(found) == rows
    for name, share in (("grade", 0.2), ("died", 0.3)):
        counts = found[name].value_counts()
        levels = len(GRIDS[[c.name for c in SCHEMA.modelled].index(name)].levels)  # type: ignore[attr-defined]
        assert len(counts) == levels and counts.min() >= min(np.ceil(share * rows), rows // levels)


def test_two_shares_keep_the_relation_of_what_they_do_not_touch() -> None:
    """Deaths and grade 3 are lifted; death still depends on sex as before (odds ratio 12.7)."""
    rows = draw(30_000, minimum_share={"grade": 0.1, "died": 0.4})
    assert rows.died.mean() >= 0.4 and (rows.grade == 3).sum() >= 3000
    counts = pd.crosstab(rows.sex, rows.died).to_numpy().astype(float)
    odds = counts[1, 1] * counts[0, 0] / (counts[0, 1] * counts[1, 0])
    assert abs(np.log(odds) - np.log((0.4 / 0.6) / (0.05 / 0.95))) < 0.15


def test_balance_and_share_together() -> None:
    rows = draw(10_001, balance="sex", minimum_share={"grade": 0.05})
    assert abs(int((rows.sex == "F").sum()) - int((rows.sex == "M").sum())) == 1
    assert (rows.grade == 3).sum() >= 501


def test_rows_come_in_random_order_whatever_the_block() -> None:
    blocks = list(tables(Ward(), SCHEMA, GRIDS, 4000, seed=3, balance="died", block=500))
    assert [len(block) for block in blocks] == [500] * 8
    assert sum(int(block.died.sum()) for block in blocks) == 2000
    inside = [int(block.died.sum()) for block in blocks]
    assert max(inside) - min(inside) > 0 and min(inside) > 190  # random, not level after level
    first = blocks[0].died.to_numpy(dtype=bool)
    runs = int((first[1:] != first[:-1]).sum())
    assert 200 < runs < 300  # 250 ± 11 in random order


def test_the_seed_decides_balanced_rows() -> None:
    options: dict[str, Any] = {"balance": "died", "minimum_share": {"grade": 0.1}}
    one, two, other = draw(500, seed=1, **options), draw(500, seed=1, **options), draw(500, seed=2, **options)
    pd.testing.assert_frame_equal(one, two)
    assert not one.equals(other)


def test_a_condition_narrows_the_levels_that_balance() -> None:
    rows = draw(300, balance="grade", where={"grade": {1, 2}, "age": (50, None)})
    assert rows.grade.value_counts().to_dict() == {1: 150, 2: 150} and rows.age.min() >= 50
    # Rows of the rare level were drawn under the condition too, not moved to its edge.
    rare = draw(600, balance="died", where={"age": (50, None)})
    assert (rare.age[rare.died.astype(bool)] == 50).mean() < 0.08


@pytest.mark.parametrize(
    ("rows", "options", "code"),
    [
        (100, {"balance": "nose"}, "BALANCE-COLUMN"),
        (100, {"balance": "age"}, "BALANCE-COLUMN"),
        (100, {"balance": ["sex", "sex"]}, "BALANCE-COLUMN"),
        (100, {"minimum_share": {"age": 0.1}}, "BALANCE-COLUMN"),
        (100, {"minimum_share": {"grade": 0.4}}, "BALANCE-SHARE"),
        (100, {"minimum_share": {"grade": 0.0}}, "BALANCE-SHARE"),
        (100, {"balance": "sex", "minimum_share": {"sex": 0.1}}, "BALANCE-COLUMN"),
        (3, {"balance": ["sex", "died"]}, "BALANCE-ROWS"),
        (100, {"balance": "grade", "where": {"grade": ""}}, "BALANCE-EMPTY"),
    ],
)
def test_what_cannot_be_balanced_is_refused_with_a_fix(rows: int, options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        draw(rows, **options)
    assert caught.value.code == code and caught.value.hint


def test_too_many_combinations_are_refused() -> None:
    many = [{"name": f"c{i}", "type": "integer", "constraints": {"enum": list(range(17))}} for i in range(2)]
    schema = Schema.from_dict({"name": "wide", "fields": many})
    with pytest.raises(UsageError, match="BALANCE-CELLS"):
        table(Ward(), schema, grids(schema), 1000, seed=0, balance=["c0", "c1"])


def test_rows_that_break_a_rule_are_drawn_again() -> None:
    free, kept = draw(4000), draw(4000, enforce_rules=True)
    assert breaking_rows(SCHEMA, free).mean() > 0.3
    assert not breaking_rows(SCHEMA, kept).any() and len(kept) == 4000
    # What is left has the model's own law under the condition that the rules hold.
    expected = free[~breaking_rows(SCHEMA, free)]
    assert abs((kept.sex == "F").mean() - (expected.sex == "F").mean()) < 0.04
    assert abs(kept.age.astype(float).mean() - expected.age.astype(float).mean()) < 2.5


def test_rules_hold_inside_quotas() -> None:
    rows = draw(2000, balance=["sex", "died"], enforce_rules=True)
    assert not breaking_rows(SCHEMA, rows).any()
    assert rows.groupby(["sex", "died"], observed=False).size().tolist() == [500] * 4


def test_a_combination_that_breaks_the_rules_cannot_be_filled() -> None:
    with pytest.raises(UsageError, match="RULES-RARE") as caught:
        draw(60, balance=["sex", "grade"], enforce_rules=True)
    assert "sex = M, grade = 3" in caught.value.sentence


def test_plain_rows_are_the_models_own() -> None:
    """Nothing is thinned or moved where nothing is asked."""
    rng = np.random.default_rng([5, 0x7461])
    codes = Ward().sample(200, seed=int(rng.integers(2**62)))
    assert (draw(200, seed=5).age == codes[:, 3]).all()


def test_the_projection_is_exact_for_one_column() -> None:
    np.testing.assert_allclose(
        lifted(np.array([0.6, 0.28, 0.02, 0.1]), 3, 0.15)[:3], [0.85 / 0.98 * 0.6, 0.85 / 0.98 * 0.28, 0.15]
    )
    # Lifting one lowers the next below the bound: both are lifted.
    found = lifted(np.array([0.88, 0.11, 0.01]), 3, 0.105)
    np.testing.assert_allclose(found, [0.79, 0.105, 0.105])
    np.testing.assert_allclose(lifted(np.array([0.5, 0.3, 0.2]), 3, 1 / 3), [1 / 3] * 3)


def test_counts_sum_and_hold_their_bounds_for_random_requests() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        sizes = rng.integers(2, 5, 3)
        shares = [None if rng.random() < 0.4 else float(rng.uniform(0.01, 1) / size) for size in sizes]
        shares.sort(key=lambda share: share is not None)
        axes = tuple(
            Axis(column=i, name=str(i), codes=tuple(range(size)), levels=int(size), share=share)
            for i, (size, share) in enumerate(zip(sizes, shares, strict=True))
        )
        rows = int(rng.integers(int(np.prod(sizes)), 3000))
        quotas = Quotas(axes=axes)
        pilot = rng.multinomial(5000, rng.dirichlet(np.full(quotas.cells, 0.3)))
        counts = quotas.counts(rows, pilot).reshape(quotas.shape)
        assert counts.sum() == rows and counts.min() >= 0
        for at, axis in enumerate(axes):
            levels = counts.sum(axis=tuple(i for i in range(3) if i != at))
            if axis.share is not None:
                assert levels.min() >= min(np.ceil(axis.share * rows - 1e-9), rows // axis.levels)
        balanced = [at for at, axis in enumerate(axes) if axis.share is None]
        cells = counts.sum(axis=tuple(i for i in range(3) if i not in balanced))
        if balanced:
            assert cells.max() - cells.min() <= 1


def test_a_billion_rows_are_split_without_numpys_limit() -> None:
    left = np.array([10**9, 3 * 10**9], dtype=np.int64)
    found = block_counts(left, 65_536, np.random.default_rng(0))
    assert found.sum() == 65_536 and abs(found[1] - 3 * found[0]) <= 4
    assert quotas_module.PILOT_ROWS >= 10_000


@pytest.mark.parametrize("pilot", [(9000, 300, 100, 600), (9000, 600, 380, 20)])
def test_two_bounds_leave_the_odds_ratio_as_the_model_has_it(pilot: tuple[int, ...]) -> None:
    """Scaling rows and columns of a table does; moving rows about to meet the bounds would not."""
    axes = tuple(Axis(column=i, name=str(i), codes=(0, 1), levels=2, share=0.4) for i in range(2))
    counts = Quotas(axes=axes).counts(10**6, np.array(pilot)).reshape(2, 2).astype(float)
    assert counts.sum(axis=0).min() >= 400_000 and counts.sum(axis=1).min() >= 400_000
    odds = counts[0, 0] * counts[1, 1] / (counts[0, 1] * counts[1, 0])
    assert abs(odds / (pilot[0] * pilot[3] / (pilot[1] * pilot[2])) - 1) < 0.01
    assert counts.sum(axis=0).min() < 410_000  # lifted as far as asked and no farther

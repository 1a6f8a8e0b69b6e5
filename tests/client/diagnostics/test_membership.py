"""Membership: a model that remembers is found, one that does not is not accused, and the bound is the plan's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diagnosing import cohort, held, people, schema, synthetic

from cohortium.client.diagnostics import intervals, membership
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.common.encoding import grids
from cohortium.common.evaluation.base import Figure


def told(found: Cohort, *, epsilon: float | None = 1.0, seed: int = 0) -> dict[str, Figure]:
    return {i.key: i.figure for i in membership.membership(found, epsilon=epsilon, delta=1e-6, seed=seed)}


def test_a_model_that_remembers_is_found() -> None:
    """Red if members and others were exchanged, or if the attacker's reference were among those judged."""
    figures = told(cohort("copy", 800, 1200))
    assert figures["membership_auc"].low > 0.75 and figures["membership_found"].low > 0.15


def test_a_model_that_does_not_is_not_accused() -> None:
    """40 made-up hospitals: the interval covers guessing 95 times in 100."""
    inside = []
    for seed in range(40):
        members, others = membership.attack_scores(cohort("fresh", 160, 160, seed=seed), seed=seed)
        _, (low, high) = intervals.auc(members, others)
        inside.append(low <= 0.5 <= high)
    assert sum(inside) >= 34


def test_a_common_row_is_no_evidence() -> None:
    """The ratio, not the released density alone: who is common scores high in the density and not in the ratio."""
    found = cohort("fresh", 800, 1200)
    members, others = membership.attack_scores(found, seed=0)
    width = membership.kernel_width(found, seed=0)
    alone = membership.log_density(found, found.train, found.synthetic, width)
    both = membership.log_density(found, found.train, found.control, width)
    assert np.corrcoef(alone, both)[0, 1] > 0.6  # the density itself says who is common
    assert np.corrcoef(members, both)[0, 1] < 0 and len(others) == 200  # a strong reference takes it away


def test_the_density_is_a_density() -> None:
    """Summed over one column's values it is 1; brute force, and no underflow far from every row."""
    found = cohort("fresh", 100, 50)
    width = 0.1
    (_, distances), *_ = found.distances(found.train, to=found.synthetic)
    norm = 0.0
    for scale in found.scales:
        size = len(scale.cell)
        norm += (
            math.log(1 + (size - 1) * math.exp(-1 / width))
            if scale.levels
            else math.log(2 * width * (1 - math.exp(-1 / width)))
        )
    wanted = np.log(np.exp(-distances / width).mean(axis=1)) - norm
    assert membership.log_density(found, found.train, found.synthetic, width) == pytest.approx(wanted)
    assert np.isfinite(membership.log_density(found, found.train, found.synthetic, 1e-4)).all()


def test_the_width_is_chosen_by_synthetic_rows_alone() -> None:
    fresh, other = cohort("fresh", 100, 300), cohort("fresh", 160, 300)
    assert membership.kernel_width(fresh, seed=0) == membership.kernel_width(other, seed=0)


def test_the_false_alarms_are_as_many_as_said() -> None:
    rng = np.random.default_rng(0)
    others = rng.normal(size=500)
    figure = membership._found(rng.normal(size=4000), others)
    assert figure.value == pytest.approx(0.01, abs=0.008) and "all but 5 of 500" in figure.how
    assert membership._found(np.full(50, 9.0), others).value == 1
    assert membership._found(others, others[:99]).value is None


def test_the_bound_is_the_plans_and_a_rehearsal_has_none() -> None:
    found = cohort("fresh", 100, 100)
    assert told(found, epsilon=2.0)["membership_bound"].value == pytest.approx(intervals.auc_bound(2.0, 1e-6))
    assert told(found, epsilon=None)["membership_bound"].value is None
    assert "ε = 0.667" in told(found, epsilon=2 / 3)["membership_bound"].how  # rounded up


def test_without_enough_held_out_patients_there_is_no_attack() -> None:
    records = people(400)
    few = held(records) & (np.cumsum(held(records)) <= 39)
    found = Cohort.of(tuple(schema().modelled), grids(schema()), records, few, synthetic("copy", records, 200), seed=0)
    figures = told(found)
    assert figures["membership_auc"].value is None and figures["membership_found"].value is None

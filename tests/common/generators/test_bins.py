"""Noised histograms: what is signal stays, what is noise goes, and bins always cover the grid."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.encoding import grids
from cohortium.common.generators.bins import (
    adaptive_bins,
    groups,
    haar_denoise,
    merge_scales,
    on_lattice,
    refine,
    roundness,
    to_simplex,
    total_mass,
)
from cohortium.common.schema import Schema


def grid(kind: str = "integer", low: float = 0, high: float = 200, *, required: bool = True, **more: object):  # type: ignore[no-untyped-def]
    constraints = {"minimum": low, "maximum": high, "required": required} | more
    return grids(
        Schema.from_dict({"name": "t", "fields": [{"name": "x", "type": kind, "constraints": constraints}]}, where="t")
    )[0]


def test_haar_gives_back_a_step_and_removes_noise() -> None:
    truth = np.repeat([0.0, 400.0, 50.0, 0.0], 64)
    noised = truth + np.random.default_rng(0).normal(0, 20, 256)
    clean = haar_denoise(noised, 20, times=3.2)
    assert np.abs(clean - truth).mean() < 0.3 * np.abs(noised - truth).mean()
    assert np.allclose(haar_denoise(noised, 0.0, times=3.2), noised)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 65])
def test_haar_keeps_any_length(size: int) -> None:
    values = np.arange(size, dtype=float)
    assert np.allclose(haar_denoise(values, 0.0, times=3.0), values)


def test_simplex_is_the_nearest_point() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        values, total = rng.normal(0, 3, 6), float(rng.uniform(0.5, 9))
        best = to_simplex(values, total)
        assert best.min() >= 0
        assert best.sum() == pytest.approx(total)
        for _ in range(20):
            other = rng.dirichlet(np.ones(6)) * total
            assert ((values - best) ** 2).sum() <= ((values - other) ** 2).sum() + 1e-9


def test_simplex_of_nothing() -> None:
    assert to_simplex(np.zeros(0), 3.0).tolist() == []
    assert to_simplex(np.array([-5.0, -7.0]), 0.0).tolist() == [0.0, 0.0]


def test_two_scales_agree_on_group_sums_and_are_better_than_one() -> None:
    rng = np.random.default_rng(2)
    truth = np.full(3200, 10.0)
    group = groups(3200)
    fine, coarse = truth + rng.normal(0, 30, 3200), np.bincount(group, weights=truth) + rng.normal(0, 30, 200)
    both, sd = merge_scales(fine, 30, coarse, 30)
    error = np.bincount(group, weights=both) - 160
    assert 0.8 * sd[0] < error.std() < 1.2 * sd[0]  # SD of an SD of 200 values: 5 %
    assert error.std() < 0.4 * (np.bincount(group, weights=fine) - 160).std()
    assert sd[0] == pytest.approx(30 / np.sqrt(1 + 1 / 16))


def test_roundness_is_the_coarsest_divisor() -> None:
    assert roundness(np.array([7, 4, 15, 30, 40, 150, 1200])).tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_a_lattice_is_found_and_an_even_spread_is_not_taken_for_one() -> None:
    rng = np.random.default_rng(3)
    multiples = np.arange(1000)
    tens = np.where(multiples % 10 == 0, 60.0, 0.0) + rng.normal(0, 10, 1000)
    assert np.flatnonzero(on_lattice(tens, 10, multiples)).tolist() == list(range(0, 1000, 10))
    even = np.full(1000, 6.0) + rng.normal(0, 10, 1000)
    assert on_lattice(even, 10, multiples).all()


def test_heaped_values_are_seen_through_noise() -> None:
    rng = np.random.default_rng(4)
    multiples = np.arange(512)
    shape = np.exp(-0.5 * ((multiples - 200) / 60) ** 2)
    truth = shape * np.where(multiples % 5 == 0, 5.0, 0.2)
    truth *= 6000 / truth.sum()
    noised = truth + rng.normal(0, 20, 512)
    found = to_simplex(refine(noised, 20, np.full(512, 80.0), multiples), 6000)
    assert np.abs(found - truth).sum() < 0.55 * np.abs(to_simplex(noised, 6000) - truth).sum()


@pytest.mark.parametrize("sigma", [0.0, 5.0, 1e6])
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("total", [0.0, 1.0, 5000.0])
def test_bins_cover_every_code_whatever_the_noise(sigma: float, required: bool, total: float) -> None:
    g = grid(required=required)
    rng = np.random.default_rng(5)
    counts = np.zeros(g.size)
    counts[50:90] = total / 40
    b = adaptive_bins(
        g,
        counts + rng.normal(0, sigma, g.size),
        sigma=sigma,
        group_sigma=np.full(g.size - 1, sigma),
        total=max(total, 1.0),
        least=3 * sigma,
        most=20,
    )
    assert len(b.map) == g.size
    assert set(b.map.tolist()) == set(range(b.size))
    assert (np.diff(b.map[:-1]) >= 0).all()
    assert (b.missing == -1) == required
    assert np.bincount(b.map, weights=b.within) == pytest.approx(np.ones(b.size))
    assert b.within[-1] == (0.0 if required else 1.0)


def test_a_spike_is_its_own_bin() -> None:
    g = grid()
    counts = np.full(g.size, 10.0)
    counts[-1], counts[120] = 0.0, 2000.0
    b = adaptive_bins(g, counts, sigma=0.0, group_sigma=np.zeros(g.size - 1), total=4000.0, least=0.0, most=20)
    assert (b.map == b.map[120]).sum() == 1


def test_rare_levels_share_a_bin() -> None:
    levels = [f"L{i}" for i in range(30)]
    g = grids(
        Schema.from_dict(
            {"name": "t", "fields": [{"name": "x", "type": "string", "constraints": {"enum": levels}}]},
            where="t",
        )
    )[0]
    counts = np.append(np.arange(30, dtype=float)[::-1], 0.0)
    b = adaptive_bins(g, counts, sigma=0.0, group_sigma=np.zeros(30), total=counts.sum(), least=0.0, most=10)
    assert b.size == 11
    assert len(set(b.map[:9].tolist())) == 9
    assert len(set(b.map[9:30].tolist())) == 1


def test_total_weighs_by_noise() -> None:
    assert total_mass([(1000.0, 1.0), (0.0, 1e9)]) == pytest.approx(1000.0, rel=1e-3)
    assert total_mass([(-50.0, 4.0)]) == 1.0
    assert total_mass([(10.0, 0.0), (10.0, 0.0)]) == 10.0

"""The mixture's loss and gradient, by hand, against torch's automatic one; and that the fit needs no torch."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from cohortium.common.generators.mixture import _Goal

BINS, FEATURES, COMPONENTS = (3, 2, 5), (2, 1, 3), 7


def goal(seed: int) -> _Goal:
    rng = np.random.default_rng(seed)
    cells, ends = np.cumsum([0, *BINS]), np.cumsum([0, *FEATURES])
    gram = rng.normal(size=(sum(FEATURES), sum(FEATURES)))
    precision = np.full(gram.shape, rng.uniform(5, 50))
    for a, b in itertools.pairwise(ends):
        precision[a:b, a:b] = 0.0
    return _Goal(
        one_way=np.concatenate([rng.dirichlet(np.ones(size)) for size in BINS]),
        precision=rng.uniform(1, 100, sum(BINS)),
        gram=gram + gram.T,
        gram_precision=precision,
        features=tuple(rng.normal(size=shape) for shape in zip(BINS, FEATURES, strict=True)),
        cells=tuple(zip(cells.tolist(), cells[1:].tolist())),
        ends=tuple(zip(ends.tolist(), ends[1:].tolist())),
    )


def by_torch(goal: _Goal, at: np.ndarray) -> tuple[float, np.ndarray]:
    flat = torch.tensor(at, requires_grad=True)
    base, tilt, log_weight = torch.split(flat, [sum(BINS), COMPONENTS * sum(FEATURES), COMPONENTS])
    tilt, w = tilt.view(COMPONENTS, -1), torch.softmax(log_weight, 0)
    features = [torch.tensor(feature) for feature in goal.features]
    tables = [
        torch.softmax(base[p:q] + tilt[:, a:b] @ feature.T, 1)
        for (p, q), (a, b), feature in zip(goal.cells, goal.ends, features, strict=True)
    ]
    means = torch.cat([table @ feature for table, feature in zip(tables, features)], 1)
    gap = means.T @ (means * w[:, None]) - torch.tensor(goal.gram)
    short = torch.cat([w @ table for table in tables]) - torch.tensor(goal.one_way)
    loss = (torch.tensor(goal.precision) * short**2).sum() + 0.5 * (torch.tensor(goal.gram_precision) * gap**2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert flat.grad is not None
    return float(loss.detach()), flat.grad.numpy()


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_are_autograds(seed: int) -> None:
    made = goal(seed)
    at = np.random.default_rng([seed, 1]).normal(size=sum(BINS) + COMPONENTS * (sum(FEATURES) + 1))
    loss, gradient = made.gradient(at, COMPONENTS)
    wanted_loss, wanted = by_torch(made, at)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-9 * abs(wanted).max())


def test_weights_and_tables_are_distributions() -> None:
    at = np.random.default_rng(9).normal(scale=30.0, size=sum(BINS) + COMPONENTS * (sum(FEATURES) + 1))
    weights, tables = goal(9).mixture(at, COMPONENTS)
    assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
    for table, size in zip(tables, BINS, strict=True):
        assert table.shape == (COMPONENTS, size) and (table >= 0).all()
        np.testing.assert_allclose(table.sum(axis=1), 1.0)


def test_a_mixture_is_fitted_without_torch() -> None:
    """The coordinator of a mixture holds 200 MB less, and begins three seconds earlier."""
    script = """
import sys, numpy as np
from types import SimpleNamespace
from cohortium.common.generators.mixture import fit_mixture
one = tuple(np.array(p) for p in ([0.2, 0.8], [0.5, 0.3, 0.2]))
measured = SimpleNamespace(
    one_way=one, one_way_sd=tuple(np.full(len(p), 0.01) for p in one), gram=np.zeros((3, 3)), gram_sd=0.01,
    features=(np.array([[-2.0], [0.5]]), np.random.default_rng(0).normal(size=(3, 2))), ends=(0, 1, 3), total=1000.0)
weights, tables = fit_mixture(measured, facts=SimpleNamespace(epsilon=1.0, patients=1000, mode="secure-sum"), seed=1)
assert all(abs(weights @ t - p).max() < 0.01 for t, p in zip(tables, one))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)

"""The network's closed-form norms and gradients against autograd, its clipping, and its sampling."""

from __future__ import annotations

import math

import checks
import numpy as np
import pytest
import torch

from cohortium.common.errors import ProtocolError
from cohortium.common.generators.nade import BLOCK_ROWS, Nade
from cohortium.common.queries import MAX_PARAMETER, SUM_SLACK, Gradient

SPEC = {"kind": "nade", "bins": [3, 1, 5, 2, 4], "hidden": 6}


def some(rows: int = 40, seed: int = 0) -> tuple[Nade, np.ndarray, np.ndarray]:
    network = Nade(SPEC)
    rng = np.random.default_rng(seed)
    parameters = rng.normal(0, 0.7, network.size).astype(np.float32)
    return network, parameters, np.stack([rng.integers(0, b, rows) for b in network.bins], axis=1)


def slow_loss(network: Nade, flat: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    """The docstring's equations, written out with autograd."""
    h, at, parts = network.hidden, network.hidden, []
    for c, size in enumerate(network.bins):
        last = c == len(network.bins) - 1
        e = None if last else flat[at : at + size * h].view(size, h)
        at += 0 if last else size * h
        v, o = flat[at : at + size * h].view(h, size), flat[at + size * h : at + size * h + size]
        at += size * h + size
        parts.append((e, v, o))
    a, loss = flat[:h], torch.zeros((), dtype=torch.float64)
    for c, (e, v, o) in enumerate(parts):
        loss = loss - torch.log_softmax(torch.relu(a) @ v + o, 0)[row[c]]
        if e is not None:
            a = a + e[row[c]]
    return loss


def autograd(network: Nade, parameters: np.ndarray, row: np.ndarray) -> tuple[float, np.ndarray]:
    flat = torch.tensor(parameters, dtype=torch.float64, requires_grad=True)
    loss = slow_loss(network, flat, row)
    (gradient,) = torch.autograd.grad(loss, flat)
    return float(loss), gradient.numpy()


def test_row_gradient_is_autograds() -> None:
    network, parameters, bins = some()
    for row in bins[:10]:
        loss, gradient = autograd(network, parameters, row)
        assert network.row_gradient(parameters, row) == pytest.approx(gradient, abs=1e-10)
        assert network.losses(parameters, row[None])[0] == pytest.approx(loss)


@pytest.mark.parametrize("clip", [0.5, 1.0, 2.5, 1e9])
def test_the_fast_sum_is_the_sum_of_clipped_row_gradients(clip: float) -> None:
    network, parameters, bins = some(60)
    weight = np.random.default_rng(1).uniform(0.1, 1, len(bins))
    slow = np.zeros(network.size)
    clipped = 0
    for w, row in zip(weight, bins):
        g = autograd(network, parameters, row)[1]
        norm = np.linalg.norm(g)
        clipped += norm > clip
        slow += w * g * min(1.0, clip / norm)
    assert network.gradient_sum(parameters, bins, weight, clip) == pytest.approx(slow, abs=1e-9)
    assert clipped > 0 or clip > 2


def test_one_row_never_weighs_more_than_the_clip() -> None:
    network, parameters, bins = some()
    for scale in (1.0, 1e3, 1e18):
        for row in bins[:5]:
            g = network.gradient_sum((parameters * scale).astype(np.float32), row[None], np.ones(1), 0.3)
            assert np.isfinite(g).all()
            assert np.linalg.norm(g) <= 0.3 * (1 + 1e-9)


def test_a_row_with_an_infinite_gradient_adds_nothing_and_spoils_nobody() -> None:
    network, parameters, bins = some()
    bad = parameters.copy()
    bad[: network.hidden] = np.finfo(np.float32).max  # h overflows in the products
    g = network.gradient_sum(bad, bins, np.ones(len(bins)), 1.0)
    assert np.isfinite(g).all()
    assert np.linalg.norm(g) <= len(bins) * (1 + 1e-9)


def test_blocks_and_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    network, parameters, bins = some(250)
    whole = network.gradient_sum(parameters, bins, np.ones(len(bins)), 1.0)
    monkeypatch.setattr("cohortium.common.generators.nade.BLOCK_ROWS", 96)
    assert network.block_rows == 96
    assert network.gradient_sum(parameters, bins, np.ones(len(bins)), 1.0) == pytest.approx(whole, abs=1e-12)
    assert not network.gradient_sum(parameters, bins[:0], np.ones(0), 1.0).any()
    assert not network.gradient_sum(parameters, bins, np.zeros(len(bins)), 1.0).any()


def test_the_block_has_one_size_for_one_network() -> None:
    """Public: from the spec alone; less where a row is wide, never less than any kernel's tile."""
    assert Nade(SPEC).block_rows == BLOCK_ROWS
    for bins in ([10_000], [100_000, 3], [1_000_000], [50] * 1000):
        rows = Nade({"kind": "nade", "bins": bins, "hidden": 32}).block_rows
        assert rows % 96 == 0 and 96 <= rows <= BLOCK_ROWS


def test_a_row_adds_the_same_wherever_it_stands() -> None:
    checks.passes(checks.check_a_row_adds_the_same_wherever_it_stands)


def test_no_weight_of_a_network_is_larger_than_its_bound() -> None:
    checks.passes(checks.check_no_weight_of_a_network_is_larger_than_its_bound)


def cancelling(bins: list[int], seed: int) -> tuple[Nade, np.ndarray]:
    """Weights from 1e3 to 1e30 whose products with the hidden units cancel: rounding is all that is left."""
    network, rng = Nade({"kind": "nade", "bins": bins, "hidden": 32}), np.random.default_rng(seed)
    theta = np.zeros(network.size)
    theta[:32] = 1.0
    at = 32
    for c, size in enumerate(bins):
        at += 32 * size if c < len(bins) - 1 else 0
        heads = theta[at : at + 32 * size].reshape(32, size)
        for k in range(size):
            half = rng.normal(0, 1, 16) * 10.0 ** rng.integers(3, 30, 16)
            heads[rng.permutation(32), k] = np.concatenate([half, -half])
        at += 33 * size
    return network, theta.astype(np.float32)


@pytest.mark.parametrize("bins", [[64, 4, 4], [5, 84, 3, 5, 20, 20]], ids=str)
@pytest.mark.parametrize("bound", [MAX_PARAMETER, np.inf], ids=["bounded", "unbounded"])
def test_one_more_row_moves_the_sum_by_its_clip_whatever_the_weights(bins: list[int], bound: float) -> None:
    """With rows in matrices of whatever size is left, the unbounded case moves by ten times the clip."""
    edges = [*range(500, 506), *range(1052, 1060)]
    for seed in range(2):
        network, theta = cancelling(bins, seed)
        rows = np.tile(np.array([size // 2 for size in bins]), (edges[-1], 1))
        weights = np.clip(theta, -bound, bound)
        if math.isinf(bound):
            with pytest.raises(ProtocolError, match="QUERY-VALUE"):
                Gradient(network=network.spec, maps=(), parameters=weights, clip_norm_l2=1.0)
        sums = [network.gradient_sum(weights, rows[:n], np.ones(n), 1.0) for n in edges]
        for n, one, more in zip(edges, sums, sums[1:]):
            if n + 1 in edges:
                assert np.linalg.norm(more - one) <= 1.0 + SUM_SLACK / 100


def test_samples_follow_the_density() -> None:
    network, parameters, _ = some()
    drawn, weight = network.draw(parameters, 60_000, np.random.default_rng(0))
    assert not weight.any()
    cells = np.array(np.meshgrid(*[np.arange(b) for b in network.bins], indexing="ij")).reshape(5, -1).T
    p = np.exp(-network.losses(parameters, cells))
    assert p.sum() == pytest.approx(1.0)
    seen = np.bincount(np.ravel_multi_index(drawn.T, network.bins), minlength=len(p))
    chi_square = ((seen - 60_000 * p) ** 2 / (60_000 * p)).sum()
    assert chi_square < len(p) + 5 * np.sqrt(2 * len(p))  # false alarm below 1e-6


def test_a_condition_is_kept_and_weighted() -> None:
    network, parameters, _ = some()
    share = np.array([0.0, 0.0, 1.0, 0.0, 1.0])
    drawn, weight = network.draw(parameters, 2_000, np.random.default_rng(0), {2: share})
    assert set(drawn[:, 2].tolist()) <= {2, 4}
    assert (weight <= 1e-6).all()


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"bins": [], "hidden": 4},
        {"bins": [3, 0], "hidden": 4},
        {"bins": [3], "hidden": 0},
        {"bins": [3], "hidden": 10**6},
        {"bins": [10**9], "hidden": 4},
        {"bins": "33", "hidden": 4},
        {"bins": [3.0], "hidden": 4},
        {"bins": [3], "hidden": True},
    ],
)
def test_a_bad_spec_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        Nade(spec)

"""The network's arithmetic where there is no NumPy beside torch: the road that a CUDA device takes, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from cohortium.common.generators import nade
from cohortium.common.generators.nade import Nade

SPEC = {"kind": "nade", "bins": [3, 1, 6, 4], "hidden": 5}


@pytest.fixture
def case():
    rng = np.random.default_rng(1)
    network = Nade(SPEC)
    parameters = network.start(tuple(np.full(size, 1 / size) for size in network.bins), seed=4)
    bins = np.stack([rng.integers(0, size, 200) for size in network.bins], axis=1).astype(np.int32)
    return parameters, bins, rng.random(200)


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
def test_torch_alone_gives_the_same_sums(monkeypatch, case, clip) -> None:
    parameters, bins, weight = case
    expected = Nade(SPEC, device="cpu").gradient_sum(parameters, bins, weight, clip)
    losses = Nade(SPEC, device="cpu").losses(parameters, bins)
    row = Nade(SPEC, device="cpu").row_gradient(parameters, bins[0])
    monkeypatch.setattr(nade, "HOST", "somewhere else")  # no device is then the host
    device = Nade(SPEC, device="cpu")
    assert np.abs(device.gradient_sum(parameters, bins, weight, clip) - expected).max() < 1e-12
    assert np.abs(device.losses(parameters, bins) - losses).max() < 1e-12
    assert np.abs(device.row_gradient(parameters, bins[0]) - row).max() < 1e-12


def test_the_fast_path_sums_clipped_row_gradients(case) -> None:
    parameters, bins, weight = case
    network = Nade(SPEC)
    total = np.zeros(network.size)
    for row, share in zip(bins, weight, strict=True):
        gradient = network.row_gradient(parameters, row)
        total += share * gradient * min(1.0, 0.5 / np.linalg.norm(gradient))
    assert np.abs(network.gradient_sum(parameters, bins, weight, 0.5) - total).max() < 1e-12


def test_cuda_is_taken_where_there_is_one(monkeypatch) -> None:
    monkeypatch.setattr(nade.torch.cuda, "is_available", lambda: True)
    assert Nade(SPEC)._device.type == "cuda"
    monkeypatch.setattr(nade.torch.cuda, "is_available", lambda: False)
    assert Nade(SPEC)._device.type == "cpu"

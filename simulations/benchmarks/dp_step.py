"""A DP-SGD step of the autoregressive generator against plain training of the same network on the same batch.

Ours: per-row clipped gradients in closed form, summed in float64; lattice noise from the cipher; an Adam step.
Plain: what anybody would write in PyTorch, autograd and Adam, in float32 and float64, with one small matrix a column
or all columns padded into one product; the fastest of them is the reference. Our own closed form with the clipping,
the noise and the exact order of sums taken out is shown beside: no library has it. Opacus clips per-row gradients of
the same module, materialised or by ghost norms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cohortium.common.generators.nade import Nade
from cohortium.common.generators.steps import Adam
from cohortium.common.generators.threads import one_thread
from cohortium.common.privacy.entropy import Keystream
from cohortium.common.privacy.release import lattice_noise
from cohortium.common.queries import lattice_of
from cohortium.simulations.benchmarks.timing import Figure, interleaved

BINS = tuple(20 if column % 2 else 8 for column in range(10))
WIDE = tuple(20 if column % 2 else 16 for column in range(36))  # as a table of an intensive-care study has them
SIZES = ((1024, 16, BINS), (1024, 32, BINS), (4096, 16, BINS), (1600, 32, WIDE))
"""(rows of a batch, hidden units, bins of each column)"""
CLIP = 1.0
LIMIT = 1.6


class PerColumn(nn.Module):
    """The network with one linear head a column."""

    starts: torch.Tensor

    def __init__(self, bins: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.register_buffer("starts", torch.tensor([sum(bins[:c]) for c in range(len(bins))]))
        self.embed = nn.Embedding(sum(bins), hidden)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.heads = nn.ModuleList([nn.Linear(hidden, size) for size in bins])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """−log p of each row."""
        e = self.embed(x + self.starts)
        h = torch.relu(self.bias + torch.cumsum(e, 1) - e)
        losses = [
            functional.cross_entropy(head(h[:, c]), x[:, c], reduction="none") for c, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum(0)


class Padded(nn.Module):
    """The same with all heads in one batched product, small columns padded to the largest."""

    starts: torch.Tensor
    closed: torch.Tensor

    def __init__(self, bins: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        most = max(bins)
        self.register_buffer("starts", torch.tensor([sum(bins[:c]) for c in range(len(bins))]))
        self.register_buffer("closed", torch.zeros(len(bins), 1, most))
        for c, size in enumerate(bins):
            self.closed[c, 0, size:] = -1e9
        self.embed = nn.Embedding(sum(bins), hidden)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.v = nn.Parameter(torch.randn(len(bins), hidden, most) * 0.1)
        self.o = nn.Parameter(torch.zeros(len(bins), 1, most))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.embed(x + self.starts)
        h = torch.relu(self.bias + torch.cumsum(e, 1) - e).transpose(0, 1)
        logits = torch.baddbmm(self.o + self.closed, h, self.v)
        flat = functional.cross_entropy(logits.reshape(-1, logits.shape[2]), x.T.reshape(-1), reduction="none")
        return flat.view(x.shape[1], -1).sum(0)


class ForOpacus(nn.Module):
    """`PerColumn` in layers whose per-row gradients Opacus knows: the bias is a linear layer on a constant."""

    starts: torch.Tensor

    def __init__(self, bins: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.register_buffer("starts", torch.tensor([sum(bins[:c]) for c in range(len(bins))]))
        self.embed = nn.Embedding(sum(bins), hidden)
        self.bias = nn.Linear(1, hidden, bias=False)
        self.heads = nn.ModuleList([nn.Linear(hidden, size) for size in bins])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of all columns side by side."""
        e = self.embed(x + self.starts)
        one = self.bias(torch.ones(len(x), 1, dtype=e.dtype))[:, None]
        h = torch.relu(one + torch.cumsum(e, 1) - e)
        return torch.cat([head(h[:, c]) for c, head in enumerate(self.heads)], 1)


class RowLoss(nn.Module):
    """Sum over columns of the cross-entropy of each row; the mean over rows where asked for."""

    def __init__(self, bins: tuple[int, ...], reduction: str = "mean") -> None:
        super().__init__()
        self.bins, self.reduction = bins, reduction

    def forward(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = torch.split_with_sizes(logits, list(self.bins), 1)
        rows = torch.stack(
            [functional.cross_entropy(part, x[:, c], reduction="none") for c, part in enumerate(parts)]
        ).sum(0)
        return rows.mean() if self.reduction == "mean" else rows


def figures(*, repeats: int = 30) -> Iterator[Figure]:
    for rows, hidden, bins in SIZES:
        yield measure(rows, hidden, repeats=repeats, bins=bins)


def measure(rows: int, hidden: int, *, repeats: int, opacus: bool = True, bins: tuple[int, ...] = BINS) -> Figure:
    """CPU seconds of our step over the fastest plain one; Opacus' over ours in the details."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.integers(0, size, rows) for size in bins], axis=1).astype(np.int32)
    runs: dict[str, Callable[[], object]] = {
        "ours": _ours(x, bins, hidden),
        "ours, not private": _hand_derived(x, bins, hidden),
    }
    for name, module in (("per column", PerColumn), ("padded", Padded)):
        for kind in (torch.float32, torch.float64):
            runs[f"plain {name} {str(kind).removeprefix('torch.')}"] = _autograd(module, x, bins, hidden, kind)
    if opacus:
        runs["opacus per-row"] = _opacus(x, bins, hidden, ghost=False)
        runs["opacus ghost"] = _opacus(x, bins, hidden, ghost=True)
    with one_thread():
        seconds = interleaved(runs, repeats=repeats)
    best = min((name for name in seconds if name.startswith("plain")), key=lambda name: seconds[name])
    return Figure(
        name=f"dp-step-{rows}x{hidden}" + ("" if bins == BINS else f"-{len(bins)}-columns"),
        unit="×",
        value=seconds["ours"] / seconds[best],
        limit=LIMIT,
        what=f"DP-SGD step over the fastest plain step ({best}); {rows} rows, {len(bins)} columns, {hidden} hidden",
        details={
            **{f"{name} ms": 1e3 * s for name, s in seconds.items()},
            **{f"{name} / plain": s / seconds[best] for name, s in seconds.items() if name.startswith("opacus")},
            **{f"{name} / ours": s / seconds["ours"] for name, s in seconds.items() if name.startswith("opacus")},
            "ours / ours, not private": seconds["ours"] / seconds["ours, not private"],
        },
    )


def _start(bins: tuple[int, ...], hidden: int) -> tuple[Nade, np.ndarray]:
    network = Nade({"kind": "nade", "bins": list(bins), "hidden": hidden})
    return network, network.start(tuple(np.full(size, 1.0 / size) for size in bins), seed=1)


def _ours(x: np.ndarray, bins: tuple[int, ...], hidden: int) -> Callable[[], object]:
    network, start = _start(bins, hidden)
    adam, here, weight = Adam(size=network.size, rate=0.01), [start.astype(np.float64)], np.ones(len(x))
    lattice = lattice_of(CLIP)
    sigma = 2.0 * (CLIP + math.sqrt(network.size) * lattice) / lattice

    def step() -> None:
        total = network.gradient_sum(here[0].astype(np.float32), x, weight, CLIP)
        units = np.rint(total / lattice).astype(np.int64)
        units += lattice_noise(Keystream(bytes(32)), sigma_units=sigma, size=network.size)
        here[0] = here[0] + adam.step(units * lattice / len(x))

    return step


def _hand_derived(x: np.ndarray, bins: tuple[int, ...], hidden: int) -> Callable[[], object]:
    """Our closed form, not clipped and without noise."""
    network, start = _start(bins, hidden)
    adam, here, weight = Adam(size=network.size, rate=0.01), [start.astype(np.float64)], np.ones(len(x))

    def step() -> None:
        total = network.plain_gradient(here[0].astype(np.float32), x, weight)
        here[0] = here[0] + adam.step(total / len(x))

    return step


def _autograd(
    module: Callable[[tuple[int, ...], int], nn.Module],
    x: np.ndarray,
    bins: tuple[int, ...],
    hidden: int,
    kind: torch.dtype,
) -> Callable[[], object]:
    model = module(bins, hidden).to(kind)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = torch.as_tensor(x.astype(np.int64))

    def step() -> None:
        optimiser.zero_grad()
        model(rows).mean().backward()
        optimiser.step()

    return step


def _opacus(x: np.ndarray, bins: tuple[int, ...], hidden: int, *, ghost: bool) -> Callable[[], object]:
    """Opacus in float32, its default, with its own clipping and noise; its sampler left out."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    plain, loss = ForOpacus(bins, hidden), RowLoss(bins)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    rows = torch.as_tensor(x.astype(np.int64))
    common: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": CLIP, "expected_batch_size": len(x)}
    if ghost:
        model: Any = GradSampleModuleFastGradientClipping(plain, max_grad_norm=CLIP, use_ghost_clipping=True)
        optimiser: Any = DPOptimizerFastGradientClipping(adam, **common)
        criterion: Any = DPLossFastGradientClipping(model, optimiser, loss, loss_reduction="mean")
    else:
        model, criterion = GradSampleModule(plain), loss
        optimiser = DPOptimizer(adam, **common)

    def step() -> None:
        optimiser.zero_grad()
        criterion(model(rows), rows).backward()
        optimiser.step()

    return step

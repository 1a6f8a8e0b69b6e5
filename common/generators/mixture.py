"""A mixture of products of categoricals over adaptive bins, fitted to noised one-ways and a noised Gram matrix.

p(x) = Σ_k w_k Π_c P_c[k, x_c]. Its one-ways are Σ_k w_k P_c[k] and its Gram blocks are
Σ_k w_k (P_c Φ_c)[k]ᵀ (P_c' Φ_c')[k]: both differentiable, both compared with what was measured, each weighted
by its known noise. The fit costs no budget.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from cohortium.common.generators.base import Ask, Facts, Floats, Phase, Progress, Settings
from cohortium.common.generators.measure import Measured, Shares, measure, measuring_phases
from cohortium.common.generators.model import MixtureModel, targets_of
from cohortium.common.generators.threads import one_thread

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.schema import Schema

COMPONENTS = 400
STEPS = 300
LEARNING_RATE = 0.05


def shares_for(facts: Facts) -> Shares:
    return Shares(ranges=0.12, grain=0.13, bins=0.35, pairs=0.40)


class Mixture:
    """Two counts and one matrix, then a free fit: small budgets, small consortia, `local` mode."""

    name = "mixture"

    def phases(self, facts: Facts) -> tuple[Phase, ...]:
        return measuring_phases(facts, shares_for(facts))

    def fit(
        self,
        ask: Ask,
        *,
        schema: Schema,
        grids: tuple[Grid, ...],
        facts: Facts,
        settings: Settings,
        progress: Progress | None = None,
    ) -> MixtureModel:
        measured = measure(ask, grids=grids, facts=facts, phases=self.phases(facts))
        weights, tables = fit_mixture(measured, seed=settings.seed, progress=progress)
        return MixtureModel(
            bins=measured.bins, weights=weights, tables=tables, targets=targets_of(measured, weights, tables)
        )


def components_for(measured: Measured) -> int:
    """Fewer components for very wide tables, so that time and memory stay sane."""
    cells = sum(len(p) for p in measured.one_way)
    return max(50, min(COMPONENTS, 1_200_000 // max(cells, 1)))


def fit_mixture(
    measured: Measured, *, seed: int, progress: Progress | None = None
) -> tuple[Floats, tuple[Floats, ...]]:
    """(weights [K], tables per column [K, bins])."""
    k = components_for(measured)
    rng = np.random.default_rng([seed, 0x6D69])
    start = _start(measured, k, rng)
    sizes = [t.shape[1] for t in start]
    n = measured.total
    one_way_sd = np.sqrt(np.concatenate(measured.one_way_sd) ** 2 + 0.05 / n)
    gram_sd = math.sqrt(measured.gram_sd**2 + 0.5 / n)
    with one_thread():
        logits = torch.tensor(np.log(np.concatenate(start, axis=1)), dtype=torch.float64, requires_grad=True)
        log_weight = torch.zeros(k, dtype=torch.float64, requires_grad=True)
        target = torch.tensor(np.concatenate(measured.one_way))
        one_way_weight = torch.tensor(one_way_sd**-2.0)
        gram = torch.tensor(measured.gram)
        features = [torch.tensor(f) for f in measured.features]
        ends = measured.ends
        off = torch.ones_like(gram)
        for a, b in zip(ends[:-1], ends[1:]):
            off[a:b, a:b] = 0.0
        optimiser = torch.optim.Adam([logits, log_weight], lr=LEARNING_RATE, betas=(0.9, 0.99))
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 1e-3
            w = torch.softmax(log_weight, 0)
            tables = [torch.softmax(t, 1) for t in logits.split(sizes, 1)]
            ones = torch.cat([w @ t for t in tables])
            means = torch.cat([t @ f for t, f in zip(tables, features)], 1)
            gap = (means.T @ (means * w[:, None]) - gram) * off
            loss = (one_way_weight * (ones - target) ** 2).sum() + 0.5 * (gap**2).sum() / gram_sd**2
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if progress is not None and step % 25 == 0:
                progress("fitting the mixture", step / STEPS)
        with torch.no_grad():
            weights = torch.softmax(log_weight, 0).numpy().copy()
            final = tuple(torch.softmax(t, 1).numpy().copy() for t in logits.split(sizes, 1))
    return weights, final


def _start(measured: Measured, k: int, rng: np.random.Generator) -> list[Floats]:
    """Tables whose feature means scatter as the leading eigenvectors of the Gram matrix say."""
    values, vectors = np.linalg.eigh(measured.gram)
    lead = np.maximum(values, 0.0)
    root = vectors * np.sqrt(lead)[None, :]
    means = rng.standard_normal((k, len(values))) @ root.T
    out, at = [], 0
    for p, table in zip(measured.one_way, measured.features):
        width = table.shape[1]
        second = (table * p[:, None]).T @ table
        tilt = means[:, at : at + width] @ np.linalg.pinv(second, rcond=1e-6) @ table.T
        rough = p[None, :] * np.exp(np.clip(tilt, -3.0, 3.0)) + 1e-5
        out.append(rough / rough.sum(axis=1, keepdims=True))
        at += width
    return out

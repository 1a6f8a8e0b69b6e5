"""A mixture of products over adaptive bins, fitted to noised one-ways and a noised Gram matrix.

p(x) = Σ_k w_k Π_c P_c[k, x_c] with P_c[k] = softmax(o_c + Φ_c a_kc): a component tilts the one-ways along the
measured features and nowhere else, so that noise finds no free cells to live in. Its one-ways are
Σ_k w_k P_c[k] and its Gram blocks Σ_k w_k (P_c Φ_c)[k]ᵀ (P_c' Φ_c')[k]: both differentiable,
both compared with what was measured, each weighted by its known noise. The fit costs no budget.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cohortium.common.generators.base import Ask, Facts, Floats, Phase, Progress, Settings
from cohortium.common.generators.measure import Measured, Shares, is_fine, measure, measuring_phases
from cohortium.common.generators.model import MixtureModel, targets_of, with_outcome
from cohortium.common.generators.threads import one_thread, torch

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.schema import Schema

COMPONENTS = 400
STEPS, FINE_STEPS = 150, 400  # few where the noise is large: a fit that is stopped early does not follow it
LEARNING_RATE = 0.05


def shares_for(facts: Facts) -> Shares:
    """Small budgets go to the one-ways: pairs of badly known margins are worth little."""
    if facts.epsilon < 2:
        return Shares(ranges=0.22, grain=0.20, bins=0.36, pairs=0.22)
    return Shares(ranges=0.15, grain=0.15, bins=0.35, pairs=0.35)


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
        weights, tables = fit_mixture(measured, facts=facts, seed=settings.seed, progress=progress)
        model = MixtureModel(
            bins=measured.bins, weights=weights, tables=tables, targets=targets_of(measured, weights, tables)
        )
        return with_outcome(model, facts.target, patients=measured.total, seed=settings.seed)


def components_for(measured: Measured) -> int:
    """Fewer components for very wide tables, so that time and memory stay sane."""
    cells = sum(len(p) for p in measured.one_way)
    return max(50, min(COMPONENTS, 1_200_000 // max(cells, 1)))


def fit_mixture(
    measured: Measured, *, facts: Facts, seed: int, progress: Progress | None = None
) -> tuple[Floats, tuple[Floats, ...]]:
    """(weights [K], tables per column [K, bins])."""
    steps = FINE_STEPS if is_fine(facts) else STEPS
    k = components_for(measured)
    rng = np.random.default_rng([seed, 0x6D69])
    sizes = [len(p) for p in measured.one_way]
    n = measured.total
    one_way_sd = np.sqrt(np.concatenate(measured.one_way_sd) ** 2 + 0.05 / n)
    gram_sd = math.sqrt(measured.gram_sd**2 + 0.5 / n)
    with one_thread():
        base = torch.tensor(np.log(np.concatenate(measured.one_way) + 1e-6), requires_grad=True)
        tilt = torch.tensor(_start(measured, k, rng), requires_grad=True)
        log_weight = torch.zeros(k, dtype=torch.float64, requires_grad=True)
        target = torch.tensor(np.concatenate(measured.one_way))
        one_way_weight = torch.tensor(one_way_sd**-2.0)
        gram = torch.tensor(measured.gram)
        features = [torch.tensor(f) for f in measured.features]
        ends = measured.ends
        off = torch.ones_like(gram)
        for a, b in itertools.pairwise(ends):
            off[a:b, a:b] = 0.0
        optimiser = torch.optim.Adam([base, tilt, log_weight], lr=LEARNING_RATE, betas=(0.9, 0.99))
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3
            w = torch.softmax(log_weight, 0)
            tables = _tables(base, tilt, features, sizes, ends)
            ones = torch.cat([w @ t for t in tables])
            means = torch.cat([t @ f for t, f in zip(tables, features)], 1)
            gap = (means.T @ (means * w[:, None]) - gram) * off
            loss = (one_way_weight * (ones - target) ** 2).sum() + 0.5 * (gap**2).sum() / gram_sd**2
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if progress is not None and step % 25 == 0:
                progress("fitting the mixture", step / steps)
        with torch.no_grad():
            weights = torch.softmax(log_weight, 0).numpy().copy()
            final = tuple(t.numpy().copy() for t in _tables(base, tilt, features, sizes, ends))
    return weights, final


def _tables(
    base: torch.Tensor, tilt: torch.Tensor, features: list[torch.Tensor], sizes: list[int], ends: Any
) -> list[torch.Tensor]:
    return [
        torch.softmax(o + tilt[:, a:b] @ f.T, 1)
        for o, f, a, b in zip(base.split_with_sizes(sizes), features, ends[:-1], ends[1:])
    ]


def _start(measured: Measured, k: int, rng: np.random.Generator) -> Floats:
    """Tilts whose feature means scatter as the leading eigenvectors of the Gram matrix say: [K, Σk]."""
    values, vectors = np.linalg.eigh(measured.gram)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[None, :]
    means = rng.standard_normal((k, len(values))) @ root.T
    out = np.zeros_like(means)
    ends = measured.ends
    for p, table, a, b in zip(measured.one_way, measured.features, ends[:-1], ends[1:]):
        second = (table * p[:, None]).T @ table
        out[:, a:b] = means[:, a:b] @ np.linalg.pinv(second, rcond=1e-6)
    return np.clip(out, -4.0, 4.0)

"""A mixture of products over adaptive bins, fitted to noised one-ways and a noised Gram matrix.

p(x) = Σ_k w_k Π_c P_c[k, x_c] with P_c[k] = softmax(o_c + Φ_c a_kc): a component tilts the one-ways along the
measured features and nowhere else, so that noise finds no free cells to live in. Its one-ways are
Σ_k w_k P_c[k] and its Gram blocks Σ_k w_k (P_c Φ_c)[k]ᵀ (P_c' Φ_c')[k]: both differentiable,
both compared with what was measured, each weighted by its known noise. The fit (Adam) costs no budget.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cohortium.common.generators.base import Ask, Facts, Floats, Phase, Progress, Settings
from cohortium.common.generators.measure import Measured, Shares, is_fine, measure, measuring_phases
from cohortium.common.generators.model import MixtureModel, targets_of, with_outcome
from cohortium.common.generators.steps import Adam
from cohortium.common.generators.threads import one_thread

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.schema import Schema

COMPONENTS = 400
STEPS, FINE_STEPS = 150, 400  # few where the noise is large: a fit that is stopped early does not follow it
LEARNING_RATE = 0.05


def shares_for(facts: Facts) -> Shares:
    """Small budgets go to the one-ways: pairs of badly known margins are worth less."""
    if facts.epsilon < 2:
        return Shares(ranges=0.19, grain=0.18, bins=0.31, pairs=0.32)
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
        return with_outcome(model, facts.target, seen=measured.seen, seed=settings.seed, by_class=measured.by_class)


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
    goal = _Goal.of(measured)
    with one_thread():
        start = _start(measured, k, np.random.default_rng([seed, 0x6D69]))
        at = np.concatenate([np.log(goal.one_way + 1e-6), start.ravel(), np.zeros(k)])
        adam = Adam(size=len(at), rate=LEARNING_RATE, beta_1=0.9, beta_2=0.99)
        for step in range(steps):
            adam.rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3
            at += adam.step(goal.gradient(at, k)[1])
            if progress is not None and step % 25 == 0:
                progress("fitting the mixture", step / steps)
        weights, tables = goal.mixture(at, k)
    return weights, tuple(tables)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Goal:
    """What was measured, each with its precision, and the loss of a mixture against it.

    one_way, precision: [bins of all columns]; gram: [Σk, Σk]; gram_precision: 1 / variance of an entry, 0 inside a
    column's own block. cells, ends: where each column's bins and features begin and end. A mixture's parameters lie
    in one vector: base logits [bins], tilts [K, Σk], log weights [K].
    """

    one_way: Floats
    precision: Floats
    gram: Floats
    gram_precision: Floats
    features: tuple[Floats, ...]
    cells: tuple[tuple[int, int], ...]
    ends: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, measured: Measured) -> _Goal:
        n = measured.total
        ends = tuple(itertools.pairwise(int(end) for end in measured.ends))
        cells = tuple(itertools.pairwise(np.cumsum([0, *(len(p) for p in measured.one_way)]).tolist()))
        gram_precision = np.full(measured.gram.shape, 1.0 / (measured.gram_sd**2 + 0.5 / n))
        for a, b in ends:
            gram_precision[a:b, a:b] = 0.0
        return cls(
            one_way=np.concatenate(measured.one_way),
            precision=1.0 / (np.concatenate(measured.one_way_sd) ** 2 + 0.05 / n),
            gram=measured.gram,
            gram_precision=gram_precision,
            features=tuple(measured.features),
            cells=cells,
            ends=ends,
        )

    def mixture(self, at: Floats, k: int) -> tuple[Floats, list[Floats]]:
        """Weights [K] and a table [K, bins] for each column."""
        base, tilt, log_weight = self._split(at, k)
        tables = [
            _softmax(base[p:q] + tilt[:, a:b] @ feature.T)
            for (p, q), (a, b), feature in zip(self.cells, self.ends, self.features, strict=True)
        ]
        return _softmax(log_weight[None])[0], tables

    def gradient(self, at: Floats, k: int) -> tuple[float, Floats]:
        """The loss and its gradient. By hand: an automatic one computes the same, and takes a library to load."""
        w, tables = self.mixture(at, k)
        means = np.concatenate([t @ f for t, f in zip(tables, self.features, strict=True)], axis=1)
        gap = means.T @ (means * w[:, None]) - self.gram
        pull = gap * self.gram_precision
        short = np.concatenate([w @ t for t in tables]) - self.one_way
        loss = float((self.precision * short**2).sum() + 0.5 * (pull * gap).sum())

        out = np.empty_like(at)
        d_base, d_tilt, d_weight = self._split(out, k)
        d_one = 2.0 * self.precision * short
        mixed = means @ pull  # d loss / d means = 2 w · mixed, because `pull` is symmetric
        d_w = (mixed * means).sum(axis=1)
        for t, f, (p, q), (a, b) in zip(tables, self.features, self.cells, self.ends, strict=True):
            d_w += t @ d_one[p:q]
            d_table = d_one[p:q] + 2.0 * mixed[:, a:b] @ f.T
            d_table -= (t * d_table).sum(axis=1, keepdims=True)
            d_table *= t * w[:, None]  # through the softmax
            d_base[p:q] = d_table.sum(axis=0)
            d_tilt[:, a:b] = d_table @ f
        d_weight[:] = w * (d_w - w @ d_w)
        return loss, out

    def _split(self, at: Floats, k: int) -> tuple[Floats, Floats, Floats]:
        bins = len(self.one_way)
        return at[:bins], at[bins : len(at) - k].reshape(k, -1), at[len(at) - k :]


def _softmax(logits: Floats) -> Floats:
    """Of each row."""
    out = np.exp(logits - logits.max(axis=1, keepdims=True))
    out /= out.sum(axis=1, keepdims=True)
    return out


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

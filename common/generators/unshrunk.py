"""A mixture fitted to the measured answers as they are, to some columns: for inference, not for release.

A released table shrinks noised dependence towards none, which makes rows more truthful and effects too small, by an
amount that depends on the effect itself. An interval is found by replaying the release at known effects; without
shrinking, what comes out moves in a straight line with what went in, and the replay can undo it.

The model is mixture.py's, w_k Π_c softmax(o_c + Φ_c a_kc), on the columns of one analysis only; its gradient is written
out, because an interval takes some twenty fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cohortium.common.generators.base import Ask, Facts, Floats, Phase
from cohortium.common.generators.herding import Targets
from cohortium.common.generators.measure import Measured, measure
from cohortium.common.generators.model import MixtureModel

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid

PAIRS = "pairs"
MEASURING = ("ranges", "grain", "bins", PAIRS)
COMPONENTS = 100
STEPS = 150
LEARNING_RATE = 0.05
MOMENTUM, SCALE = 0.9, 0.99


def measure_unshrunk(ask: Ask, *, grids: tuple[Grid, ...], facts: Facts, phases: tuple[Phase, ...]) -> Measured:
    """What the measuring phases among `phases` say, the noised Gram matrix as it came."""
    measured = measure(ask, grids=grids, facts=facts, phases=tuple(p for p in phases if p.name in MEASURING))
    return replace(measured, gram=measured.seen.gram)


def fit_unshrunk(measured: Measured, columns: Sequence[int], *, seed: int) -> MixtureModel:
    """The model of the columns alone, in the order given."""
    part = _of_columns(measured, columns)
    weights, tables = _fit(part, np.random.default_rng([seed, 0x756E]))
    targets = Targets(one_way=part.one_way, features=part.features, gram=part.gram)
    return MixtureModel(bins=part.bins, weights=weights, tables=tables, targets=targets)


def _of_columns(measured: Measured, columns: Sequence[int]) -> Measured:
    ends = measured.ends
    chosen = np.concatenate([np.arange(ends[c], ends[c + 1]) for c in columns])
    return Measured(
        bins=tuple(measured.bins[c] for c in columns),
        one_way=tuple(measured.one_way[c] for c in columns),
        one_way_sd=tuple(measured.one_way_sd[c] for c in columns),
        features=tuple(measured.features[c] for c in columns),
        gram=measured.gram[np.ix_(chosen, chosen)],
        seen=replace(measured.seen, gram=measured.seen.gram[np.ix_(chosen, chosen)]),
    )


def _fit(measured: Measured, rng: np.random.Generator) -> tuple[Floats, tuple[Floats, ...]]:
    """(weights [K], tables per column [K, bins]) by Adam."""
    gap = Gap(measured)
    theta = np.concatenate([np.log(gap.wanted + 1e-6), _start(measured, rng).ravel(), np.zeros(COMPONENTS)])
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for step in range(STEPS):
        gradient = gap.gradient(theta)
        first = MOMENTUM * first + (1 - MOMENTUM) * gradient
        second = SCALE * second + (1 - SCALE) * gradient**2
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 1e-3
        debias = math.sqrt(1 - SCALE ** (step + 1)) / (1 - MOMENTUM ** (step + 1))
        theta = theta - rate * debias * first / (np.sqrt(second) + 1e-8)
    w, tables = gap.unfold(theta)
    return w, tuple(np.split(tables, gap.starts[1:], axis=1))


class Gap:
    """What a model's moments miss of the measured ones: squared gaps of one-ways and Gram matrix over their noise.

    All columns' bins lie side by side, [K, cells], their features on a block diagonal, [cells, Σk]. theta: base logits
    [cells], tilts [K, Σk], logits of the weights [K], one after the other.
    """

    def __init__(self, measured: Measured) -> None:
        sizes = [len(p) for p in measured.one_way]
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._column = np.repeat(np.arange(len(sizes)), sizes)
        ends = measured.ends
        self._features = np.zeros((len(self._column), ends[-1]))
        off = np.ones_like(measured.gram)
        for start, size, table, a, b in zip(self.starts, sizes, measured.features, ends[:-1], ends[1:], strict=True):
            self._features[start : start + size, a:b] = table
            off[a:b, a:b] = 0.0
        self.wanted = np.concatenate(measured.one_way)
        self._weight = 1.0 / (np.concatenate(measured.one_way_sd) ** 2 + 0.05 / measured.total)
        self._gram = measured.gram
        self._gram_weight = off / (measured.gram_sd**2 + 0.5 / measured.total)
        self._cut = len(self.wanted), len(self.wanted) + COMPONENTS * int(ends[-1])

    def unfold(self, theta: Floats) -> tuple[Floats, Floats]:
        """(weights [K], tables [K, cells])."""
        tilts = theta[self._cut[0] : self._cut[1]].reshape(COMPONENTS, -1)
        logits = theta[: self._cut[0]] + tilts @ self._features.T
        logits -= np.maximum.reduceat(logits, self.starts, axis=1)[:, self._column]
        tables = np.exp(logits)
        tables /= np.add.reduceat(tables, self.starts, axis=1)[:, self._column]
        mix = np.exp(theta[self._cut[1] :] - theta[self._cut[1] :].max())
        return mix / mix.sum(), tables

    def loss(self, theta: Floats) -> float:
        w, tables = self.unfold(theta)
        means = tables @ self._features
        ones, gram = w @ tables - self.wanted, means.T @ (means * w[:, None]) - self._gram
        return float((self._weight * ones**2).sum() + 0.5 * (self._gram_weight * gram**2).sum())

    def gradient(self, theta: Floats) -> Floats:
        """Of `loss`, as theta."""
        w, tables = self.unfold(theta)
        means = tables @ self._features
        ones_pull = 2.0 * self._weight * (w @ tables - self.wanted)
        gram_pull = self._gram_weight * (means.T @ (means * w[:, None]) - self._gram)
        pulled = means @ gram_pull
        to_tables = w[:, None] * (ones_pull + 2.0 * pulled @ self._features.T)
        to_logits = tables * to_tables
        to_logits -= tables * np.add.reduceat(to_logits, self.starts, axis=1)[:, self._column]
        to_weights = tables @ ones_pull + (pulled * means).sum(axis=1)
        return np.concatenate(
            [to_logits.sum(axis=0), (to_logits @ self._features).ravel(), w * (to_weights - w @ to_weights)]
        )


def _start(measured: Measured, rng: np.random.Generator) -> Floats:
    """Tilts whose feature means scatter as the Gram matrix says, as far as it is one: [K, Σk]."""
    values, vectors = np.linalg.eigh(measured.gram)
    means = rng.standard_normal((COMPONENTS, len(values))) @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
    out = np.zeros_like(means)
    ends = measured.ends
    for p, table, a, b in zip(measured.one_way, measured.features, ends[:-1], ends[1:], strict=True):
        out[:, a:b] = means[:, a:b] @ np.linalg.pinv((table * p[:, None]).T @ table, rcond=1e-6)
    return np.clip(out, -4.0, 4.0)

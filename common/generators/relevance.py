"""How much each column says about the target, judged by the evidence of noised moments. Free of budget.

The law p(y | x) ∝ q(y | x) · exp(T(y)ᵀ A φ(x)) of outcome.py has moments m(A); G is what was measured of them. Near A,

    G = m(A) + H · ΔA + noise,   noise ~ N(0, σ² I + H / n),   H = mean_x Cov_y(T | x) ⊗ φφᵀ

σ the known noise of the release, H / n what sampling n patients does. The slopes of one column are a group with
A_g ~ N(0, τ_g I), and every τ_g is set where the evidence of G, with A integrated out, is greatest (automatic relevance
determination: MacKay 1992, "Bayesian interpolation"; Tipping 2001, section 2.3). τ_g → 0 is a column that noise
explains as well: it gets no slope. Matching G as if it were exact would instead turn the noise of the directions in
which H is small into slopes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats

STEPS, SETTLED = 8, 3e-3  # linearisations; the slope that still moves after the last
LENGTHS = (1.0, 0.5, 0.25, 0.125)  # of a step that are tried: the law is straight near its start alone
TURNS, STILL = 15, 0.05  # evidence updates at each; log τ that still moves after the last
FIRST, FREE, LEAST = 0.1, 100.0, 1e-8  # τ to begin with, of group 0, at least
EXACT = 1e-4  # noise of group 0, the target's own distribution
MOST_SLOPES = 600  # judged at once, or the matrices take minutes: of the columns that stand out of the noise most
Groups = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was released of all pairs. gram [Σk, Σk]: mean of φφᵀ as noised, nothing shrunk; sd: noise of an entry;
    patients: noised number of them."""

    gram: Floats
    sd: float
    patients: float


def relevant_slopes(
    log_q: Floats, mine: Floats, phi: Floats, groups: Groups, wanted: Floats, sd: float, patients: float
) -> Floats:
    """A [width, unknowns]: where the evidence is greatest, by steps along the straight line, each checked.

    log_q [rows, levels]; mine [levels, width]: T; phi [rows, unknowns]; groups [unknowns]: 0 for the constant, whose
    slope is not held back; wanted [width, unknowns]: G; sd: noise of its entries; patients: noised number of them.
    """
    width = mine.shape[1]
    sd = max(sd, EXACT)
    chosen = _standing_out(log_q, mine, phi, groups, wanted, sd, patients)
    whole, phi, wanted = np.zeros(wanted.shape), phi[:, chosen], wanted[:, chosen]
    group = np.tile(np.unique(groups[chosen], return_inverse=True)[1], width)
    size = np.bincount(group).astype(np.float64)
    variance = np.where(group == 0, EXACT, sd) ** 2
    tau = np.full(len(size), FIRST)
    tau[0] = FREE
    slope = np.zeros(wanted.shape)
    for _ in range(STEPS):
        p = _law(log_q, mine, phi, slope)
        h, gap = _hessian(p, mine, phi), (wanted - _moments(p, mine, phi)).ravel()
        noise = h / max(patients, 1.0) + np.diag(variance)
        weighed = np.linalg.solve(noise, h)
        seen, pull = _symmetric(h @ weighed), weighed.T @ (gap + h @ slope.ravel())
        tau, best = _evidence(seen, pull, group, size, tau)
        step = (best - slope.ravel()).reshape(slope.shape)
        worth = 0.5 * gap @ np.linalg.solve(noise, gap) + 0.5 * (slope.ravel() ** 2 / tau[group]).sum()
        for length in LENGTHS:
            there = slope + length * step
            left = (wanted - _moments(_law(log_q, mine, phi, there), mine, phi)).ravel()
            if 0.5 * left @ np.linalg.solve(noise, left) + 0.5 * (there.ravel() ** 2 / tau[group]).sum() <= worth:
                slope = there
                break
        else:  # as near as this evidence brings it
            break
        if np.abs(length * step).max() < SETTLED:
            break
    whole[:, chosen] = slope
    return whole


def _standing_out(
    log_q: Floats, mine: Floats, phi: Floats, groups: Groups, wanted: Floats, sd: float, patients: float
) -> NDArray[np.intp]:
    """Which unknowns are judged: all, or the groups whose gaps at A = 0 are least likely to be noise."""
    if wanted.size <= MOST_SLOPES:
        return np.arange(len(groups))
    p = _law(log_q, mine, phi, np.zeros(wanted.shape))
    mean = p @ mine
    spread = (p @ mine**2 - mean**2).T @ phi**2 / len(phi)
    seen = (wanted - _moments(p, mine, phi)) ** 2 / (sd**2 + spread / max(patients, 1.0))
    size = np.maximum(len(mine.T) * np.bincount(groups), 1)
    excess = (np.bincount(groups, weights=seen.sum(axis=0)) - size) / np.sqrt(2.0 * size)
    excess[0] = np.inf
    order = np.argsort(-excess, kind="stable")
    kept = order[np.cumsum(size[order]) <= MOST_SLOPES]
    return np.flatnonzero(np.isin(groups, kept))


def _evidence(seen: Floats, pull: Floats, group: Groups, size: Floats, tau: Floats) -> tuple[Floats, Floats]:
    """(τ of each group, mean of the slopes). seen: H R⁻¹ H; pull: H R⁻¹ y.

    The geometric mean of MacKay's update, which is quick, and of expectation-maximisation's, which cannot overshoot:
    both stand still at the same τ.
    """
    for _ in range(TURNS):
        root = np.sqrt(tau[group])
        inverse = np.linalg.inv(np.eye(len(group)) + root[:, None] * seen * root)
        mean = root * (inverse @ (root * pull))
        energy = np.bincount(group, weights=mean**2)
        spread = np.bincount(group, weights=tau[group] * np.diag(inverse))
        quick = energy / np.maximum(size - spread / tau, 1e-9)
        new = np.maximum(np.sqrt(np.maximum(quick, LEAST) * np.maximum((energy + spread) / size, LEAST)), LEAST)
        new[0] = FREE
        moved, tau = float(np.abs(np.log(new / tau)).max()), new
        if moved < STILL:
            break
    return tau, mean


def _law(log_q: Floats, mine: Floats, phi: Floats, slope: Floats) -> Floats:
    """p(y | x) [rows, levels]."""
    logits = log_q + phi @ slope.T @ mine.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True), dtype=np.float64)


def _moments(p: Floats, mine: Floats, phi: Floats) -> Floats:
    return np.asarray((p @ mine).T @ phi / len(phi), dtype=np.float64)


def _hessian(p: Floats, mine: Floats, phi: Floats) -> Floats:
    """mean_x Cov_y(T | x) ⊗ φφᵀ: [width · unknowns, width · unknowns]."""
    mean, width, unknowns = p @ mine, mine.shape[1], phi.shape[1]
    out = np.empty((width, unknowns, width, unknowns))
    for i in range(width):
        for j in range(i + 1):
            spread = p @ (mine[:, i] * mine[:, j]) - mean[:, i] * mean[:, j]
            block = phi.T @ (phi * spread[:, None]) / len(phi)
            out[i, :, j, :] = block
            out[j, :, i, :] = block
    return out.reshape(width * unknowns, width * unknowns)


def _symmetric(matrix: Floats) -> Floats:
    return np.asarray((matrix + matrix.T) / 2, dtype=np.float64)

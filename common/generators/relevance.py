"""What to believe of noised moments of the target: how much each column says, judged by the evidence. Free of budget.

The law p(y | x) ∝ q(y | x) · exp(T(y)ᵀ A φ(x)) of outcome.py has moments m(A), and G was measured of them. Near A = 0,

    G = m(0) + H · A + noise,   noise ~ N(0, σ² I + H / n + C (1/n + 1/r)),   H = mean_x Cov_y(T | x) ⊗ φφᵀ

σ the known noise of the release, H / n what sampling the targets of n patients does, C = Cov_x(E[T | x] ⊗ φ) what
sampling their other columns does, and the r rows of the generator that m(0) is worked out from. The slopes of one
column are a group with A_g ~ N(0, τ_g I), and every τ_g is set where the evidence of G, with A integrated out, is
greatest (automatic relevance determination: MacKay 1992, "Bayesian interpolation"; Tipping 2001, section 2.3). τ_g → 0
is a column that noise explains as well. What is believed is m(0) + H · E[A | G]: G itself where it is far above the
noise, and elsewhere what the columns that matter make of it. The noise of directions in which H is small, which would
become steep slopes, is gone. The law itself is then fitted without the straight line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats

TURNS, STILL = 100, 0.05  # evidence updates; log τ that still moves after the last
FIRST, FREE, LEAST = 0.1, 100.0, 1e-8  # τ to begin with, of group 0, at least
EXACT = 1e-4  # noise of group 0, the target's own distribution
MOST_SLOPES = 600  # judged at once, or the matrices take minutes: of the columns that stand out of the noise most
Groups = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was released of all pairs. gram [Σk, Σk]: mean of φφᵀ over patients with zero diagonal blocks, as
    noised, nothing shrunk; sd: noise of an entry of it; patients: noised number of them."""

    gram: Floats
    sd: float
    patients: float


def believed(
    log_q: Floats, mine: Floats, phi: Floats, groups: Groups, wanted: Floats, sd: float, patients: float
) -> Floats:
    """Moments [width, unknowns] as the evidence has them.

    log_q [rows, levels]; mine [levels, width]: T; phi [rows, unknowns]; groups [unknowns]: 0 for the constant, which is
    not held back; wanted [width, unknowns]: G; sd: noise of its entries; patients: noised number of them.
    """
    sd, n = max(sd, EXACT), max(patients, 1.0)
    p = law(log_q, mine, phi, np.zeros(wanted.shape))
    here, h = moments(p, mine, phi), hessian(p, mine, phi)
    mean, again = p @ mine, 1 / n + 1 / len(phi)
    drawn = np.diag(h).reshape(wanted.shape) / n + again * ((mean**2).T @ phi**2 / len(phi) - here**2)
    chosen = _standing_out(wanted - here, sd**2 + drawn, groups)
    at = np.flatnonzero(np.tile(np.isin(np.arange(len(groups)), chosen), mine.shape[1]))
    group = np.unique(np.tile(groups, mine.shape[1])[at], return_inverse=True)[1]
    among = h[np.ix_(at, at)]
    said = mean[:, at // len(groups)] * phi[:, at % len(groups)] - here.ravel()[at]
    noise = among / n + again / len(phi) * (said.T @ said) + np.diag(np.where(group == 0, EXACT, sd) ** 2)
    weighed = np.linalg.solve(noise, among)
    slope = _evidence(_symmetric(among @ weighed), weighed.T @ (wanted - here).ravel()[at], group)[1]
    return here + (h[:, at] @ slope).reshape(wanted.shape)


def _standing_out(gap: Floats, noise: Floats, groups: Groups) -> NDArray[np.intp]:
    """Which unknowns are judged: all, or the groups whose gaps at A = 0 are least likely to be noise.

    gap, noise [width, unknowns]: noise is the variance.
    """
    if gap.size <= MOST_SLOPES:
        return np.arange(len(groups))
    size = np.maximum(len(gap) * np.bincount(groups), 1)
    excess = (np.bincount(groups, weights=(gap**2 / noise).sum(axis=0)) - size) / np.sqrt(2.0 * size)
    excess[0] = np.inf
    order = np.argsort(-excess, kind="stable")
    return np.flatnonzero(np.isin(groups, order[np.cumsum(size[order]) <= MOST_SLOPES]))


def _evidence(seen: Floats, pull: Floats, group: Groups) -> tuple[Floats, Floats]:
    """(τ of each group, mean of the slopes at the τ before the last update). seen: H R⁻¹ H; pull: H R⁻¹ y.

    The geometric mean of MacKay's update, which is quick, and of expectation-maximisation's, which cannot overshoot:
    both stand still at the same τ.
    """
    size = np.bincount(group).astype(np.float64)
    tau = np.full(len(size), FIRST)
    tau[0] = FREE
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


def law(log_q: Floats, mine: Floats, phi: Floats, slope: Floats) -> Floats:
    """p(y | x) [rows, levels]; slope: A [width, unknowns], the others as for `believed`."""
    logits = log_q + phi @ slope.T @ mine.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True), dtype=np.float64)


def moments(p: Floats, mine: Floats, phi: Floats) -> Floats:
    """Mean over the rows of E[T | x] φᵀ: [width, unknowns]."""
    return np.asarray((p @ mine).T @ phi / len(phi), dtype=np.float64)


def hessian(p: Floats, mine: Floats, phi: Floats) -> Floats:
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

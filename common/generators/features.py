"""Features of a column whose noised Gram matrix carries the dependence between columns.

Built from noised one-way distributions alone. Ordered columns: polynomials of the rank, orthonormal under the
noised distribution, and a contrast for missing. Levels: the centred one-hot vector, rotated onto its
principal axes, so that a level costs as much norm as it has variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """degree: of the rank polynomials; rank_scale: standard deviation of each degree's feature;
    level_scale: factor on centred one-hot vectors; target_scale: factor on the target's features;
    most: features a column may have; spread: the clip is mean + spread · SD of the squared norm."""

    degree: int = 2
    rank_scale: tuple[float, ...] = (0.7, 0.35)
    level_scale: float = 1.0
    target_scale: float = 1.0
    most: int = 16
    spread: float = 1.5


def column_features(p: Floats, *, ordered: bool, missing: int, recipe: Recipe, scale: float = 1.0) -> Floats:
    """[bins, k] feature table, centred under `p` (the bins' probabilities); k >= 1, zeros where constant."""
    bins = len(p)
    parts: list[Floats] = []
    if ordered:
        present = np.arange(bins) != missing
        weight = np.where(present, p, 0.0)
        mass = weight.sum()
        if mass > 1e-9:
            parts += _rank_polynomials(weight / mass, present, mass, recipe)
        if missing >= 0:
            parts.append(((np.arange(bins) == missing) - p[missing])[:, None] * recipe.level_scale)
    else:
        parts.append(_level_axes(p, recipe.most) * recipe.level_scale)
    table = np.concatenate(parts, axis=1) if parts else np.zeros((bins, 1))
    return np.ascontiguousarray(table * scale) if table.shape[1] else np.zeros((bins, 1))


def _rank_polynomials(weight: Floats, present: NDArray[np.bool_], mass: float, recipe: Recipe) -> list[Floats]:
    """Degree 1..d in the mid-rank, orthonormal under `weight`; 0 on the missing bin."""
    rank = np.cumsum(weight) - weight / 2
    basis = [np.ones(len(weight))]
    out = []
    for degree in range(1, recipe.degree + 1):
        x = (2 * rank - 1) ** degree
        for b in basis:
            x = x - (weight * x * b).sum() * b
        variance = float((weight * x * x).sum())
        if variance < 1e-8:  # as many distinct ranks as degrees: nothing left to add
            break
        x = x / math.sqrt(variance)
        # A bin whose noised mass is near zero must not become an outlier that eats the norm bound.
        x = np.clip(x, -4.0, 4.0)
        basis.append(x)
        out.append(np.where(present, x * recipe.rank_scale[degree - 1], 0.0)[:, None])
    return out


def _level_axes(p: Floats, most: int) -> Floats:
    """(one-hot − p) in its principal axes: [levels, min(levels − 1, most)], an isometry on what is kept."""
    centred = np.eye(len(p)) - p[None, :]
    covariance = np.diag(p) - np.outer(p, p)
    values, axes = np.linalg.eigh(covariance)
    keep = np.argsort(-values, kind="stable")[: min(len(p) - 1, most)]
    keep = keep[values[keep] > 1e-9]
    if len(keep) == 0:
        return np.zeros((len(p), 1))
    axes = axes[:, keep]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(len(keep))] < 0, -1.0, 1.0)
    return centred @ axes


def clear_own(gram: Floats, widths: Sequence[int]) -> Floats:
    """The matrix [Σk, Σk] itself, its diagonal blocks made zero: those of each column's features with themselves."""
    at = 0
    for width in widths:
        gram[at : at + width, at : at + width] = 0.0
        at += width
    return gram


def norm_bound_sq(probabilities: list[Floats], tables: list[Floats], spread: float) -> float:
    """S: mean + spread · SD of ‖φ‖² under independent columns, from the noised one-ways; above 0."""
    mean = variance = 0.0
    largest = 0.0
    for p, table in zip(probabilities, tables):
        square = (table**2).sum(axis=1)
        m = float((p * square).sum())
        mean += m
        variance += max(float((p * square**2).sum()) - m * m, 0.0)
        largest += float(square.max())
    return max(min(mean + spread * math.sqrt(variance), largest), 1e-6)

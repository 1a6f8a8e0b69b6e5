"""Choose, among rows drawn in excess, those whose one-ways and Gram matrix match given targets. Free.

Descent by swaps: with R the gap between the targets and the kept rows' moments, a row's score is ⟨R, f(x)⟩,
f the one-hot bins and the products of features. The best rows outside take the place of the worst inside, as
many as lower the squared gap most (it is quadratic in the number of swaps). Kernel herding (Welling 2009;
Chen, Welling & Smola 2010) picks one row at a time by the same score. Rows are never compared with records.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cohortium.common.generators.base import Floats

EXCESS = 4
SWEEPS = 25
FIRST_SWAP = 0.1  # of the rows, in the first sweep
COOLING = 0.9
ONE_WAY_WEIGHT = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """one_way: per column, probabilities of bins; features: per column [bins, k]; gram: [Σk, Σk], zero
    diagonal blocks, the mean of φφᵀ that kept rows shall have."""

    one_way: tuple[Floats, ...]
    features: tuple[Floats, ...]
    gram: Floats


def towards(model: Floats, measured: Floats, tolerance: float | Floats) -> Floats:
    """The model's value moved to the measured one, less `tolerance`: noise below it is not followed."""
    gap = measured - model
    return model + np.sign(gap) * np.maximum(np.abs(gap) - tolerance, 0.0)


class Herder:
    """Selects rows of blocks of candidates so that each block alone has the wanted moments."""

    def __init__(self, targets: Targets) -> None:
        sizes = [len(p) for p in targets.one_way]
        self._starts = torch.tensor(np.concatenate([[0], np.cumsum(sizes)])[:-1])
        self._one = torch.tensor(np.concatenate(targets.one_way), dtype=torch.float32)
        self._gram = torch.tensor(targets.gram, dtype=torch.float32)
        self._tables = [torch.tensor(f, dtype=torch.float32) for f in targets.features]
        at = np.concatenate([[0], np.cumsum([f.shape[1] for f in targets.features])])
        self._off = torch.ones_like(self._gram)
        for a, b in itertools.pairwise(at):
            self._off[a:b, a:b] = 0.0

    def select(self, bins: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
        """Sorted indices of `rows` of the candidates [candidates, columns]; the first are the start."""
        count = len(bins)
        if rows >= count:
            return np.arange(count)
        codes = torch.tensor(bins)
        phi = torch.cat([t[codes[:, c]] for c, t in enumerate(self._tables)], dim=1)
        cells = codes + self._starts
        inside, outside = torch.arange(rows), torch.arange(rows, count)
        gram = phi[:rows].T @ phi[:rows] / rows
        ones = self._histogram(cells[:rows]) / rows
        share = FIRST_SWAP
        for _ in range(SWEEPS):
            gap, gap_one = (self._gram - gram) * self._off, self._one - ones
            score = ((phi @ gap) * phi).sum(1) + ONE_WAY_WEIGHT * gap_one[cells].sum(1)
            swaps = min(max(1, int(share * rows)), count - rows)
            enter = torch.topk(score[outside], swaps).indices
            leave = torch.topk(-score[inside], swaps).indices
            step, step_one = self._change(phi, cells, outside[enter], inside[leave], rows)
            along = (gap * step).sum() + ONE_WAY_WEIGHT * (gap_one * step_one).sum()
            square = ((step * self._off) ** 2).sum() + ONE_WAY_WEIGHT * (step_one**2).sum()
            best = float(along / square) if float(square) > 0 else 0.0
            if best <= 0:
                share /= 2
                continue
            if best < 1:
                swaps = max(1, int(best * swaps))
                enter, leave = enter[:swaps], leave[:swaps]
                step, step_one = self._change(phi, cells, outside[enter], inside[leave], rows)
            gram, ones = gram + step, ones + step_one
            inside[leave], outside[enter] = outside[enter], inside[leave]
            share = max(share * (COOLING if best >= 1 else max(best, 0.5)), 1.5 / rows)
        return np.sort(inside.numpy())

    def _histogram(self, cells: torch.Tensor) -> torch.Tensor:
        return torch.bincount(cells.ravel(), minlength=len(self._one)).float()

    def _change(
        self, phi: torch.Tensor, cells: torch.Tensor, enter: torch.Tensor, leave: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = phi[enter], phi[leave]
        return (a.T @ a - b.T @ b) / rows, (self._histogram(cells[enter]) - self._histogram(cells[leave])) / rows

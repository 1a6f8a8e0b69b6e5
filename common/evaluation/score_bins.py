"""Where a score is cut before noised patients are counted by it: a public rule on synthetic rows and the noise.

Each bin's count carries the same noise, so a rank statistic from B bins has an error that grows like √B; but within
a bin nothing is known of the patients' order. The rule starts from the threshold and adds the cut that lowers the
expected error most, until none lowers it by 3 % (`cuts`): few bins for few patients, many for many, every distinct
cell where there is no noise.

Inside a bin the synthetic rows say how patients lie (`Cuts.spread`): each class's distribution over fine cells is the
synthetic one, brought to the bins' counts half by plain proportion (its shape within each bin) and half by a shift on
the normal-quantile scale (a class whose scores lie lower leans to the lower end of each bin as well).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cohortium.common.evaluation import score_statistics as stats
from cohortium.common.evaluation.boosting import chance
from cohortium.common.late import Late

if TYPE_CHECKING:
    from scipy import special
else:
    special = Late("scipy.special")

CELLS = 100
MOST_BINS = 20
GAIN_AT_LEAST = 0.03
MISFIT_SHARE = 0.2
MISFIT_TIES = 0.03
"""Expected error of the order within bins: this part of the AUC that it carries, and of the pairs that it orders."""
THRESHOLD_WEIGHT = 0.5
_TAIL = 2e-3
_FAR = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """Bins and fine cells of one score; a value equal to an edge lies above it.

    cells: float64 [C−1], fine edges; places: int64 [B−1], which of them are the bins' edges; threshold: which bin is
    the first that is called positive. positive, negative: float64 [C], shares of synthetic rows with and without
    the outcome; chance, log_odds: float64 [C], the model's mean prediction in a cell, and its middle score.
    prevalence: share of synthetic rows with the outcome.
    """

    cells: np.ndarray = field(repr=False)
    places: np.ndarray
    threshold: int
    positive: np.ndarray = field(repr=False)
    negative: np.ndarray = field(repr=False)
    chance: np.ndarray = field(repr=False)
    log_odds: np.ndarray = field(repr=False)
    prevalence: float

    @property
    def edges(self) -> np.ndarray:
        return np.asarray(self.cells[self.places])

    @property
    def bins(self) -> int:
        return len(self.places) + 1

    @property
    def bin_of_cell(self) -> np.ndarray:
        """int64 [C]."""
        return np.searchsorted(self.places, np.arange(len(self.cells) + 1), side="left")

    @property
    def first_cell(self) -> int:
        """The first fine cell that is called positive."""
        return int(self.places[self.threshold - 1]) + 1

    def coarse(self, counts: np.ndarray) -> np.ndarray:
        """Counts by fine cell [draws, C] as counts by bin [draws, B]."""
        return np.add.reduceat(counts, np.concatenate([[0], self.places + 1]), axis=1)

    def spread(self, counts: np.ndarray, synthetic: np.ndarray, lean: np.ndarray | float = 0.5) -> np.ndarray:
        """Counts by bin [draws, B] of one class as counts by fine cell [draws, C]; each bin's sum is kept by `lean` 0.

        synthetic: that class's shares, float64 [C]. lean: 0 plain proportion … 1 shift, one number or [draws].
        """
        bin_of = self.bin_of_cell
        inside = np.bincount(bin_of, synthetic, self.bins)
        flat = 1.0 / np.bincount(bin_of, minlength=self.bins)
        shape = np.where(inside[bin_of] > 0, synthetic / np.where(inside > 0, inside, 1.0)[bin_of], flat[bin_of])
        plain = counts[:, bin_of] * shape
        if self.bins == len(self.cells) + 1 or self.bins == 1:
            return np.asarray(plain)
        z = special.ndtri(np.clip(np.cumsum(synthetic)[:-1], _FAR, 1 - _FAR))
        total = counts.sum(axis=1, keepdims=True)
        below = np.cumsum(counts, axis=1)[:, :-1] / np.where(total > 0, total, 1.0)
        moved = special.ndtri(np.clip(below, _TAIL, 1 - _TAIL)) - z[self.places]
        shifted = special.ndtr(z + moved @ _interpolation(z, self.places))
        ends = np.zeros((len(counts), 1))
        shift = total * np.diff(np.concatenate([ends, shifted, ends + 1.0], axis=1), axis=1)
        lean = np.reshape(lean, (-1, 1))
        return np.asarray((1 - lean) * plain + lean * shift)


def cuts(*, score: np.ndarray, hit: np.ndarray, sigma: float, patients: float) -> Cuts:
    """The cuts for a score, from synthetic rows that did not train the model.

    score: float64 [rows], log-odds; hit: bool [rows]; sigma: standard deviation of the noise of each count; patients:
    roughly how many held-out patients will be counted (public). The threshold is where the G-mean of sensitivity and
    specificity is largest on these rows. Raises ValueError where one kind of row is missing, or all scores are equal.
    """
    hit = np.asarray(hit, dtype=bool)
    n1 = int(hit.sum())
    if not 0 < n1 < len(hit):
        raise ValueError("cuts need rows of both kinds")
    order = np.argsort(score, kind="stable")
    ranked, outcome = score[order], hit[order]
    weight = np.where(outcome, 0.5 / n1, 0.5 / (len(hit) - n1))
    starts = np.flatnonzero(np.diff(ranked) > 0) + 1  # places where a new distinct score begins
    if not len(starts):
        raise ValueError("cuts need at least two distinct scores")
    true = 1 - np.cumsum(outcome)[starts - 1] / n1
    false = 1 - np.cumsum(~outcome)[starts - 1] / (len(hit) - n1)
    best = ranked[starts[int(np.argmax(true * (1 - false)))]]
    # Both kinds count half, so that cells are narrow wherever either kind has many rows.
    half = np.cumsum(weight)[starts - 1]
    wanted = starts[np.clip(np.searchsorted(half, np.arange(1, CELLS) / CELLS), 0, len(starts) - 1)]
    cells = np.unique(np.append(ranked[wanted], best))
    cell = np.searchsorted(cells, score, side="right")
    size = len(cells) + 1
    rows = np.bincount(cell, minlength=size)
    positive = np.bincount(cell[hit], minlength=size) / n1
    negative = np.bincount(cell[~hit], minlength=size) / (len(hit) - n1)
    middle = np.bincount(cell, score, size) / np.maximum(rows, 1)
    mean = np.bincount(cell, chance(score), size) / np.maximum(rows, 1)
    at = int(np.searchsorted(cells, best))
    share = n1 / len(hit)
    if sigma == 0:
        places = np.arange(len(cells))
    else:
        places = _greedy(
            positive, negative, at, sigma / max(patients * share, 1.0), sigma / max(patients * (1 - share), 1.0)
        )
    return Cuts(
        cells=cells,
        places=places,
        threshold=int(np.searchsorted(places, at)) + 1,
        positive=positive,
        negative=negative,
        chance=mean,
        log_odds=middle,
        prevalence=share,
    )


def _greedy(positive: np.ndarray, negative: np.ndarray, at: int, noise1: float, noise0: float) -> np.ndarray:
    """Places of the bins' edges, int64 ascending; `at` (the threshold) is one of them. noise: SD of a share."""
    whole = float(stats.auc(positive[None], negative[None])[0])
    below1, below0 = np.cumsum(positive), np.cumsum(negative)
    chosen = [at]
    best = _expected_error(below1, below0, chosen, at, noise1, noise0, whole)
    while len(chosen) < MOST_BINS - 1:
        tried = [
            (_expected_error(below1, below0, sorted([*chosen, j]), at, noise1, noise0, whole), j)
            for j in range(len(positive) - 1)
            if j not in chosen
        ]
        if not tried or min(tried)[0] >= best * (1 - GAIN_AT_LEAST):
            break
        best, j = min(tried)
        chosen = sorted([*chosen, j])
    return np.array(chosen, dtype=np.int64)


def _expected_error(
    below1: np.ndarray, below0: np.ndarray, places: list[int], at: int, noise1: float, noise0: float, whole: float
) -> float:
    """Expected squared error of the AUC (noise and order within bins), and half that of F1 and G-mean (noise).

    First order in the noise of each bin's count, under the synthetic shares.
    """
    b1 = np.diff(below1[places], prepend=0.0, append=1.0)
    b0 = np.diff(below0[places], prepend=0.0, append=1.0)
    over0, over1 = np.cumsum(b0) - b0 / 2, 1 - np.cumsum(b1) + b1 / 2
    area = float((b1 * over0).sum())
    error = noise1**2 * ((over0 - area) ** 2).sum() + noise0**2 * ((over1 - area) ** 2).sum()
    error += (MISFIT_SHARE * (whole - area)) ** 2 + (MISFIT_TIES * (b1 * b0).sum()) ** 2
    lower = places.index(at) + 1  # bins called negative
    upper = len(places) + 1 - lower
    se, sp = max(1 - below1[at], 1e-3), max(below0[at], 1e-3)
    var_se = noise1**2 * (upper * (1 - se) ** 2 + lower * se**2)
    var_sp = noise0**2 * (lower * (1 - sp) ** 2 + upper * sp**2)
    g_mean = (sp * var_se / se + se * var_sp / sp) / 4
    called = 1 + se + (1 - sp) * noise1 / noise0  # (n1 + called positive) / n1; noise1/noise0 = n0/n1
    f1 = 2 * se / called
    var_f1 = (noise1 / called) ** 2 * (upper * (4 * (1 - f1) ** 2 + f1**2) + lower * f1**2)
    return float(error + THRESHOLD_WEIGHT * (g_mean + var_f1))


def _interpolation(z: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[B−1, C−1]: what is given at some places of z, in all of them; linear between, constant outside."""
    return np.stack([np.interp(z, z[places], row) for row in np.eye(len(places))])

"""The models whose scores are judged at the hospitals: trained and cut on synthetic rows, sent as derived columns.

"Train on synthetic, test on real": for each judged level of the target one model against the rest. Two thirds of the
synthetic rows train it; the others, which it has not seen, fix its threshold and the cuts of its score. All of that
is free: no record of a patient is looked at. discrimination.py reads the hospitals' noised answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cohortium.common.derived import Joint, Scored, Trees
from cohortium.common.evaluation.base import LEVELS_AT_MOST
from cohortium.common.evaluation.boosting import TREES, boosted_trees
from cohortium.common.evaluation.score_bins import Cuts, cuts
from cohortium.common.evaluation.utility import CASES_AT_LEAST, CannotBeAssessed

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid

SIGMAS_AT_LEAST = 5.0
"""A class whose noised size is not so many of its standard deviations above zero is not judged."""
FRESH_SHARE = 1 / 3
TREES_AT_LEAST = 30
BINS_EXPECTED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelModel:
    """One level of the target against the rest. Its histogram: outcome no, yes, not known, each by bin of the score."""

    label: str
    scored: Scored = field(repr=False)
    cuts: Cuts = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """What the hospitals are asked for. levels: one model each; notes: for the reader."""

    target: str
    levels: tuple[LevelModel, ...]
    notes: tuple[str, ...]
    patients: float

    @property
    def derived(self) -> tuple[Scored, ...]:
        """For `Tallies(derived=..., part="holdout")`."""
        return tuple(level.scored for level in self.levels)

    @property
    def dim(self) -> int:
        return sum(scored.bins for scored in self.derived)


def train_predictor(
    *,
    codes: np.ndarray,
    grids: Sequence[Grid],
    target: int,
    features: Sequence[int],
    noise_multiplier: float,
    patients: float,
    seed: int = 0,
) -> Predictor:
    """Train on the synthetic rows and fix the threshold and the cuts on others of them.

    codes: int32 [rows, columns], fine codes of synthetic rows; target, features: indices of columns; noise_multiplier:
    the noise of the query in units of its sensitivity, which is √levels; patients: roughly how many are held out
    (public). A third of the rows, by seed, trains nothing and fixes the cuts. A target with two levels is judged by
    its last one, one with more by each against the rest. Raises CannotBeAssessed, with the reason as a sentence.
    """
    grid = grids[target]
    features = [c for c in features if c != target]
    if not features:
        raise CannotBeAssessed("There is no column beside the target to predict it from.")
    rng = np.random.default_rng([seed, 11])
    rows = rng.permutation(np.flatnonzero(codes[:, target] != grid.missing))
    fresh, train = np.split(rows, [round(FRESH_SHARE * len(rows))])
    share = np.bincount(codes[fresh, target], minlength=grid.size)[: grid.missing] / max(len(fresh), 1)
    wanted, notes = _levels(share, grid, codes[fresh, target], codes[train, target], patients, noise_multiplier)
    sigma = noise_multiplier * float(np.sqrt(len(wanted)))
    # Many levels share the time that one model may take at a hospital.
    trees = max(TREES // len(wanted), TREES_AT_LEAST)
    levels = []
    for code in wanted:
        model = boosted_trees(
            codes=codes[train],
            hit=codes[train, target] == code,
            grids=grids,
            features=features,
            seed=seed,
            trees=trees,
        )
        chosen = cuts(score=model.score(codes[fresh]), hit=codes[fresh, target] == code, sigma=sigma, patients=patients)
        levels.append(_level_model(_label(grid, code), model, chosen, target, code, grid.size))
    return Predictor(target=grid.name, levels=tuple(levels), notes=notes, patients=patients)


def _levels(
    share: np.ndarray,
    grid: Grid,
    fresh: np.ndarray,
    train: np.ndarray,
    patients: float,
    noise_multiplier: float,
) -> tuple[list[int], tuple[str, ...]]:
    """Codes of the levels to ask about: common enough, by the synthetic rows, to be judged through the noise."""
    if len(share) > LEVELS_AT_MOST:
        raise CannotBeAssessed(
            f"The target {grid.name} has {len(share)} values; at most {LEVELS_AT_MOST} are possible."
        )
    listed = [1] if len(share) == 2 else list(range(len(share)))
    both = [min(share[c], 1 - share[c]) for c in listed]
    rows = [min(int((part == c).sum()), int((part != c).sum())) for c in listed for part in (fresh, train)]
    seen = [c for i, c in enumerate(listed) if min(rows[2 * i : 2 * i + 2]) >= CASES_AT_LEAST]
    seen.sort(key=lambda c: -both[listed.index(c)])
    # Fewer levels are asked with less noise each; three bins or so is what the smallest one gets.
    while seen:
        needed = SIGMAS_AT_LEAST * noise_multiplier * np.sqrt(BINS_EXPECTED * len(seen))
        if patients * both[listed.index(seen[-1])] > needed:
            break
        seen.pop()
    if not seen:
        raise CannotBeAssessed(
            f"The synthetic rows hold too few patients with, or without, each level of {grid.name} for the noise."
        )
    notes: tuple[str, ...] = ()
    if len(seen) < len(listed):
        notes = (f"{len(listed) - len(seen)} levels of {grid.name} are too rare for the noise and are left out.",)
    return sorted(seen), notes


def _level_model(label: str, model: Trees, chosen: Cuts, target: int, code: int, size: int) -> LevelModel:
    outcome = np.zeros(size, dtype=np.int32)
    outcome[code], outcome[-1] = 1, 2
    by = Joint(columns=(target,), maps=(outcome,), sizes=(3,))
    return LevelModel(label=label, scored=Scored(score=model, edges=chosen.edges, by=by), cuts=chosen)


def _label(grid: Grid, code: int) -> str:
    return str(grid.decode(np.array([code], dtype=np.int32), np.zeros(1)).iloc[0])

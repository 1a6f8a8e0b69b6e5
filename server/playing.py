"""Estimates of the same analyses on replayed releases, each in a world of known truth: what intervals are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.combining import FEWEST, Combined, combine
from cohortium.common.evaluation.estimands import Estimand, Fitted, Regression
from cohortium.common.evaluation.imposed import World
from cohortium.common.evaluation.regression import CannotFit
from cohortium.common.generators.base import Model
from cohortium.server.replicates import ROWS, Release

POPULATION_BLOCKS = 4
FIRST = 6  # plays whose truths are scattered by the sampling error alone, until the whole spread is known
FIRST_WIDTH = 3.0  # sampling errors
WIDTH = 2.5  # spreads: far enough that the slope is known to a tenth, near enough that the line is one
MOST_FAILURES = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Play:
    """One replay. truths, values: of each estimand of the pack, float64 [k]; failed: why there is no value (NaN), or
    ""."""

    truths: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    failed: tuple[str, ...]


def population_of(model: Model, *, seed: int) -> np.ndarray:
    """The released model's rows, among whom invented patients are drawn: int32 [POPULATION_BLOCKS · ROWS, columns]."""
    return np.asarray(model.sample(POPULATION_BLOCKS * ROWS, seed=seed))


def columns_of(pack: Sequence[Estimand]) -> frozenset[int]:
    return frozenset[int]().union(*(one.columns for one in pack))


def plays(
    release: Release,
    population: np.ndarray,
    pack: Sequence[Estimand],
    own: Sequence[Fitted],
    *,
    patients: int,
    count: int,
    seed: int,
    kept: Sequence[Play] = (),
    imposed: bool = True,
) -> Iterator[Play]:
    """Replays of a pack from len(kept) on, up to `count`.

    Each depends on the seed, its number and the first FIRST ones alone, so that kept ones go on as if nothing had
    happened. Raises CannotFit where the population cannot carry a regression.

    imposed: draw the regressions' outcomes from their own models at scattered truths; else every replay is one of the
    released table as it is, which does not show what the generator itself cannot express.
    """
    scattered = [imposed and isinstance(one, Regression) for one in pack]
    world = World.of(population, pack if imposed else ())
    centres = [
        q.values if far else one.fit(population).values for one, q, far in zip(pack, own, scattered, strict=True)
    ]
    errors = [q.errors * (ROWS / patients) ** 0.5 for q in own]
    done = list(kept)
    while len(done) < count:
        i = len(done)
        steps = [FIRST_WIDTH * e for e in errors] if i < FIRST else _steps(done[:FIRST], errors)
        # The same signs, turned round, come right after: the truths stay balanced about their centre.
        signs = np.random.default_rng([seed, i // 2, 0x7369])
        turn = 1.0 if i % 2 == 0 else -1.0
        truths = tuple(
            centre + (turn * signs.choice([-1.0, 1.0], size=len(centre)) * step if far else 0.0)
            for centre, step, far in zip(centres, steps, scattered, strict=True)
        )
        rng = np.random.default_rng([seed, i, 0x706C])
        rows = release.replay(
            world.draw(patients, truths if imposed else (), rng), columns_of(pack), seed=int(rng.integers(2**62))
        )
        values, failed = [], []
        for one, truth in zip(pack, truths, strict=True):
            try:
                values.append(one.fit(rows).values)
                failed.append("")
            except CannotFit as error:
                values.append(np.full(len(truth), np.nan))
                failed.append(str(error))
        done.append(Play(truths=truths, values=tuple(values), failed=tuple(failed)))
        yield done[-1]


def _steps(first: Sequence[Play], errors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """How far truths go from their centre, per estimand [k]; never nearer than the first ones went."""
    out = []
    for j, error in enumerate(errors):
        good = [play for play in first if not play.failed[j]]
        step = FIRST_WIDTH * error
        if len(good) >= FEWEST:
            spread = [
                combine(0.0, [p.values[j][k] for p in good], [p.truths[j][k] for p in good]).spread
                for k in range(len(error))
            ]
            step = np.maximum(step, WIDTH * np.array(spread))
        out.append(step)
    return out


def combined(own: Fitted, done: Sequence[Play], position: int, *, level: float) -> tuple[Combined, ...]:
    """The intervals of the pack's estimand at `position`, one for each of its terms.

    Raises CannotFit where too many replays had no estimate: those that had one would not tell the spread.
    """
    good = [play for play in done if not play.failed[position]]
    if len(good) < max(FEWEST, (1 - MOST_FAILURES) * len(done)):
        reason = next((play.failed[position] for play in done if play.failed[position]), "too few replicates")
        raise CannotFit(f"{len(done) - len(good)} of {len(done)} replicates have no estimate: {reason}")
    return tuple(
        combine(
            float(own.values[k]),
            [float(p.values[position][k]) for p in good],
            [float(p.truths[position][k]) for p in good],
            level=level,
        )
        for k in range(len(own.values))
    )

"""Mixture first, network second: the network learns from the mixture's rows for free, then from patients.

1. measure, fit the mixture                         (budget: the measuring phases)
2. pre-train the network on the mixture's own rows  (free)
3. DP-SGD from there                                (budget: "train")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.autoregressive import (
    dp_steps,
    gradient_phase,
    hidden_for,
    train,
)
from cohortium.common.generators.base import Ask, Facts, Phase, Progress, Settings
from cohortium.common.generators.measure import Shares, measure, measuring_phases
from cohortium.common.generators.mixture import fit_mixture
from cohortium.common.generators.model import MixtureModel, NadeModel, targets_of, with_outcome
from cohortium.common.generators.nade import Nade
from cohortium.common.generators.steps import Adam
from cohortium.common.generators.threads import one_thread

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.schema import Schema

MOST_PRETRAIN_ROWS = 20_000
PRETRAIN_EPOCHS = 10
PRETRAIN_BATCH = 500
PRETRAIN_RATE = 0.01
WARM_RATE = 0.01


class Joined:
    """The mixture, refined by DP-SGD at the hospitals."""

    name = "joined"

    def __init__(self, *, rounds: int | None = None) -> None:
        self._rounds = rounds

    def _steps(self, facts: Facts) -> int:
        return self._rounds or dp_steps(facts)

    def phases(self, facts: Facts) -> tuple[Phase, ...]:
        first = measuring_phases(facts, Shares(ranges=0.08, grain=0.08, bins=0.19, pairs=0.30))
        return (*first, gradient_phase(facts, 0.35, self._steps(facts)))

    def fit(
        self,
        ask: Ask,
        *,
        schema: Schema,
        grids: tuple[Grid, ...],
        facts: Facts,
        settings: Settings,
        progress: Progress | None = None,
    ) -> NadeModel:
        measured = measure(ask, grids=grids, facts=facts, phases=self.phases(facts))
        weights, tables = fit_mixture(measured, facts=facts, seed=settings.seed, progress=progress)
        targets = targets_of(measured, weights, tables)
        mixture = MixtureModel(bins=measured.bins, weights=weights, tables=tables, targets=targets)
        hidden = hidden_for(facts)
        network = Nade({"kind": "nade", "bins": [b.size for b in measured.bins], "hidden": hidden})
        with one_thread():
            warm = pretrain(
                network,
                network.start(measured.one_way, seed=settings.seed),
                mixture,
                patients=measured.total,
                seed=settings.seed,
                progress=progress,
            )
            parameters = train(
                ask,
                network,
                warm,
                measured,
                steps=self._steps(facts),
                rate=WARM_RATE,
                facts=facts,
                settings=settings,
                progress=progress,
            )
        model = NadeModel(bins=measured.bins, parameters=parameters, hidden=hidden, targets=targets)
        return with_outcome(model, facts.target, seen=measured.seen, seed=settings.seed, by_class=measured.by_class)


def pretrain(
    network: Nade,
    parameters: NDArray[np.float32],
    mixture: MixtureModel,
    *,
    patients: float,
    seed: int,
    progress: Progress | None,
) -> NDArray[np.float32]:
    """Fit the network to rows that the mixture draws: no record is involved.

    patients: the noised number of them; few patients need few rows.
    """
    rng = np.random.default_rng([seed, 0x7072])
    batches = max(4, min(MOST_PRETRAIN_ROWS, int(5 * patients)) // PRETRAIN_BATCH)
    rows = mixture.draw(batches * PRETRAIN_BATCH, rng)
    optimiser = Adam(size=network.size, rate=PRETRAIN_RATE)
    here = parameters.astype(np.float64)
    ones = np.ones(PRETRAIN_BATCH)
    steps = PRETRAIN_EPOCHS * batches
    order = rng.permutation(len(rows))
    for step in range(steps):
        at = step % batches
        if at == 0:
            order = rng.permutation(len(rows))
        batch = rows[order[at * PRETRAIN_BATCH : (at + 1) * PRETRAIN_BATCH]]
        gradient = network.plain_gradient(here.astype(np.float32), batch, ones)
        optimiser.rate = PRETRAIN_RATE * (1.0 - 0.9 * step / steps)
        here = here + optimiser.step(gradient / PRETRAIN_BATCH)
        if progress is not None and step % 50 == 0:
            progress("warming the network up on the mixture's rows", step / steps)
    return here.astype(np.float32)

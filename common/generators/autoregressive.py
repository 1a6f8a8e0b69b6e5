"""An autoregressive network over adaptive bins, trained by DP-SGD; cold here, warm in `joined`.

The sites answer `Gradient` queries: per-row clipped gradients summed over Poisson-sampled patients. The
coordinator divides by the expected batch (rate × noised number of patients: never a private count) and takes
an Adam step; the average of the last weights is the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cohortium.common.generators.base import Ask, Facts, Phase, Progress, Settings
from cohortium.common.generators.herding import Targets
from cohortium.common.generators.measure import Measured, Shares, measure, measuring_phases, most_bins
from cohortium.common.generators.model import NadeModel
from cohortium.common.generators.nade import Nade
from cohortium.common.generators.steps import Adam, server_step
from cohortium.common.generators.threads import one_thread
from cohortium.common.queries import MAX_PARAMETER, Gradient, LocalSteps

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.schema import Schema

CLIP = 1.0
LEARNING_RATE = 0.03
LOCAL_RATE = 0.5  # of the sites' own steps, plain SGD
AVERAGE = 0.9
SAMPLING_RATE = 0.25
MANY_SITES = 30


def hidden_for(facts: Facts) -> int:
    """Hidden units by public rule: more parameters are more noise."""
    return 32 if facts.epsilon >= 10 and len(facts.columns) <= 100 else 16


def dp_steps(facts: Facts) -> int:
    """Rounds of DP-SGD by public rule: few patients gain nothing from many noisy steps, and a secure sum of many
    sites, in which each meets each other, makes a round dear (docs/generators.md has what fewer rounds cost)."""
    few = facts.patients is not None and facts.patients < 2000
    return 40 if few or facts.sites > MANY_SITES else 100


def gradient_phase(facts: Facts, share: float, steps: int) -> Phase:
    bins = [most_bins(facts, c) for c in range(len(facts.columns))]
    return Phase(
        name="train",
        purpose="the network's clipped gradients over sampled patients (DP-SGD)",
        kind="gradient",
        share=share,
        max_dim=Nade({"kind": "nade", "bins": bins, "hidden": hidden_for(facts)}).size,
        repeats=steps,
        sampling_rate=SAMPLING_RATE,
    )


def train(
    ask: Ask,
    network: Nade,
    parameters: NDArray[np.float32],
    measured: Measured,
    *,
    steps: int,
    rate: float,
    facts: Facts,
    settings: Settings,
    progress: Progress | None,
) -> NDArray[np.float32]:
    """DP-SGD from `parameters`; the exponential average of the weights, float32 [d]. A void round moves nothing."""
    here = np.clip(parameters.astype(np.float64), -MAX_PARAMETER, MAX_PARAMETER)
    average = here.copy()
    expected = max(SAMPLING_RATE * measured.total, 1.0)
    local = None
    if settings.local_steps > 1:
        # Every site divides by the same public share of the expected batch: weights are no row counts.
        local = LocalSteps(
            steps=settings.local_steps,
            learning_rate=LOCAL_RATE,
            denominator=max(expected / facts.sites, 1.0),
            fedprox_mu=settings.fedprox_mu,
        )
    optimiser = Adam(size=network.size, rate=rate)
    on_updates = server_step(settings.server_step, size=network.size, rate=rate)
    maps = tuple(b.map for b in measured.bins)
    for step in range(steps):
        answer = ask(
            "train",
            Gradient(
                network=network.spec,
                maps=maps,
                parameters=here.astype(np.float32),
                clip_norm_l2=CLIP,
                path="exact" if settings.exact else "fast",
                local=local,
            ),
        )
        if answer.sites == 0:
            continue
        if local is None:
            here = here + optimiser.step(answer.values / expected)
        else:
            here = here + on_updates.step(-answer.values)
        here = np.clip(here, -MAX_PARAMETER, MAX_PARAMETER)  # no noise, however large, makes a weight infinite
        keep = min(AVERAGE, (step + 1) / (step + 10))
        average = keep * average + (1 - keep) * here
        if progress is not None:
            progress("training at the hospitals", (step + 1) / steps)
    return average.astype(np.float32)


def cold_targets(measured: Measured) -> Targets:
    """Without pairs asked, herding matches the one-ways alone."""
    return Targets(one_way=measured.one_way, features=measured.features, gram=np.zeros_like(measured.gram))


class Autoregressive:
    """DP-SGD alone: the reference."""

    name = "autoregressive"

    def __init__(self, *, rounds: int | None = None) -> None:
        self._rounds = rounds

    def phases(self, facts: Facts) -> tuple[Phase, ...]:
        first = measuring_phases(facts, Shares(ranges=0.07, grain=0.07, bins=0.16, pairs=0.0))
        return (*first, gradient_phase(facts, 0.70, self._rounds or dp_steps(facts)))

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
        phases = self.phases(facts)
        measured = measure(ask, grids=grids, facts=facts, phases=phases)
        hidden = hidden_for(facts)
        network = Nade({"kind": "nade", "bins": [b.size for b in measured.bins], "hidden": hidden})
        with one_thread():
            parameters = train(
                ask,
                network,
                network.start(measured.one_way, seed=settings.seed),
                measured,
                steps=self._rounds or dp_steps(facts),
                rate=LEARNING_RATE,
                facts=facts,
                settings=settings,
                progress=progress,
            )
        return NadeModel(bins=measured.bins, parameters=parameters, hidden=hidden, targets=cold_targets(measured))

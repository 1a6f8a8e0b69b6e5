"""How the coordinator moves the parameters: on noised gradients, or on the mean of the hospitals' updates.

With one step a round the sites send gradients and Adam moves. With several local steps they send updates Δ, and
the server step treats their mean as a direction: free of budget, because it is post-processing of noised sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cohortium.common.generators.base import Floats

ServerStep = Literal["average", "momentum", "adam"]
BETA_1, BETA_2 = 0.8, 0.999


class Step(Protocol):
    def step(self, gradient: Floats) -> Floats:
        """What to add to the parameters, for a gradient (or minus an update)."""
        ...


@dataclass(slots=True)
class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) on one vector, in float64; on updates it is FedAdam (Reddi et al. 2021)."""

    size: int
    rate: float
    beta_1: float = BETA_1
    beta_2: float = BETA_2
    steps: int = 0
    mean: Floats | None = None
    square: Floats | None = None

    def step(self, gradient: Floats) -> Floats:
        self.steps += 1
        if self.mean is None or self.square is None:
            self.mean, self.square = np.zeros(self.size), np.zeros(self.size)
        self.mean = self.beta_1 * self.mean + (1 - self.beta_1) * gradient
        self.square = self.beta_2 * self.square + (1 - self.beta_2) * gradient**2
        mean = self.mean / (1 - self.beta_1**self.steps)
        square = self.square / (1 - self.beta_2**self.steps)
        return -self.rate * mean / (np.sqrt(square) + 1e-8)


@dataclass(slots=True)
class Average:
    """FedAvg (McMahan et al. 2017): move by the mean update."""

    def step(self, gradient: Floats) -> Floats:
        return -gradient


@dataclass(slots=True)
class Momentum:
    """FedAvgM (Hsu, Qi, Brown 2019): a running sum of mean updates."""

    beta: float = 0.9
    velocity: Floats | None = None

    def step(self, gradient: Floats) -> Floats:
        self.velocity = gradient if self.velocity is None else self.beta * self.velocity + gradient
        return -(1 - self.beta) * self.velocity


def server_step(name: ServerStep, *, size: int, rate: float) -> Step:
    """The step that a study names."""
    if name == "adam":
        return Adam(size=size, rate=rate)
    return Momentum() if name == "momentum" else Average()

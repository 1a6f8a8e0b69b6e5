"""What a generator is: a plan of phases, a program that asks noised questions, a model that samples.

A generator never sees records. `fit` asks (`Ask`), every answer is a noised sum, and everything it computes
from the answers is post-processing: free of budget, and a deterministic function of answers and seed, so
that K hospitals with the same answers give the same model bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cohortium.common.encoding import Codes, Grid
    from cohortium.common.queries import Kind
    from cohortium.common.schema import Schema

Floats = NDArray[np.float64]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A noised sum. values: float64 [dim] in data units; sigma: standard deviation of the noise on each
    coordinate, public; sites: how many hospitals it sums over."""

    values: Floats
    sigma: float
    sites: int


Ask = Callable[[str, Any], Answer]  # ask(phase name, query)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is public before the first record is read; every choice of a generator rests on this alone.

    columns: (kind, fine size, categorical) of each modelled column; patients: a public rough number, None
    where the study does not tell; target: index of the target column, None without one.
    """

    columns: tuple[tuple[str, int, bool], ...]
    epsilon: float
    patients: int | None
    sites: int
    mode: Literal["secure-sum", "local"]
    target: int | None

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("Facts: at least one modelled column")
        if not self.epsilon > 0:
            raise ValueError("Facts: epsilon must be above 0")
        if self.patients is not None and self.patients < 1:
            raise ValueError("Facts: patients must be at least 1 where told")
        if self.target is not None and not 0 <= self.target < len(self.columns):
            raise ValueError("Facts: target is not a modelled column")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One line of the plan's table: what is asked, how often, for which part of the budget.

    share: part of the whole budget in terms of μ² (Gaussian DP); the shares of all phases sum to 1.
    max_dim: the largest vector that the phase may ask for.
    """

    name: str
    purpose: str
    kind: Kind
    share: float
    max_dim: int
    repeats: int = 1
    sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Phase {self.name}: share must lie in (0, 1]")
        if self.repeats < 1 or self.max_dim < 1:
            raise ValueError(f"Phase {self.name}: repeats and max_dim must be at least 1")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"Phase {self.name}: sampling_rate must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """seed: of everything random after the noise (initial weights, model samples); no privacy rests on it.

    exact: gradients on the bit-identical path (slow; tests and small runs). local_steps: DP-SGD steps that a site
    makes before it sends its update (`local` mode); then server_step and fedprox_mu say how updates are used.
    """

    seed: int = 0
    exact: bool = False
    local_steps: int = 1
    server_step: Literal["average", "momentum", "adam"] = "average"
    fedprox_mu: float = 0.0


class Model(Protocol):
    """A fitted generator: arrays and JSON, nothing that runs."""

    @property
    def kind(self) -> str: ...

    def sample(self, rows: int, *, seed: int, where: Mapping[int, NDArray[np.bool_]] | None = None) -> Codes:
        """Fine codes, int32 [rows, columns]. `where`: allowed fine codes of some columns."""
        ...

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays for an npz file and a JSON header holding `kind`."""
        ...


class Generator(Protocol):
    name: str

    def phases(self, facts: Facts) -> tuple[Phase, ...]: ...

    def fit(
        self,
        ask: Ask,
        *,
        schema: Schema,
        grids: tuple[Grid, ...],
        facts: Facts,
        settings: Settings,
        progress: Progress | None = None,
    ) -> Model: ...


class Network(Protocol):
    """A model whose per-row gradients a hospital can clip. Same maths on two paths.

    size: number of parameters d; parameters travel as float32 [d].
    """

    size: int

    def gradient_sum(
        self,
        parameters: NDArray[np.float32],
        bins: NDArray[np.integer[Any]],
        row_weight: Floats,
        clip: float,
    ) -> Floats:
        """Σ_r w_r · min(1, C/‖g_r‖) · g_r, float64 [d]; bins int [rows, columns], row_weight [rows].

        A row's term must be the same bits wherever it stands: `Gradient.sensitivity_l2` builds on it.
        """
        ...

    def row_gradient(self, parameters: NDArray[np.float32], bins: NDArray[np.integer[Any]]) -> Floats:
        """The gradient of one row (bins int [columns]), unclipped, float64 [d]; of that row alone."""
        ...


def max_fine_dim(facts: Facts) -> int:
    """Cells of all fine grids together: the size of the first histogram query."""
    return sum(size for _, size, _ in facts.columns)

"""What every part of a private evaluation works on: the synthetic rows in codes, and the door to held-out patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.bins import Bins
from cohortium.common.evaluation.findings import Finding

if TYPE_CHECKING:
    from cohortium.common.encoding import Grid
    from cohortium.common.schema import Column
    from cohortium.common.study import Study


class Unanswered(Exception):
    """A question stayed without an answer: its round was void. The rest of the evaluation goes on."""


class AnswerLike(Protocol):
    """common/generators/base.Answer: the noised sum and the standard deviation of its noise."""

    @property
    def values(self) -> np.ndarray: ...
    @property
    def sigma(self) -> float: ...


Ask = Callable[[str, Any], AnswerLike]


@dataclass(frozen=True, kw_only=True, slots=True)
class RealRows:
    """Held-out rows that are on this machine, in a simulation only. codes int32 [rows, columns]; weights [rows]."""

    codes: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """study: what to ask; ask may raise Unanswered. grids, codes: synthetic rows in fine codes, int32 [rows, columns].

    noise: release's name -> noise multiplier of the plan; a release that is not in it is not asked. expected: roughly
    how many are held out, by public numbers; patients: the same once a count was released. Bins and cuts are chosen by
    them. real: the exact twin of a simulation. seed: of everything that is not a release's noise.
    """

    study: Study
    grids: Sequence[Grid]
    codes: np.ndarray = field(repr=False)
    noise: Mapping[str, float]
    ask: Ask = field(repr=False)
    expected: float
    patients: float
    seed: int
    real: RealRows | None = field(default=None, repr=False)

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.study.schema.modelled

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def index(self, name: str) -> int:
        return self.names.index(name)

    def drawn(self, most: int) -> int | None:
        """How many things a picture shows; the exact twin computes them all, because the private side chooses."""
        return most if self.real is None else None

    def planned(self, phase: str) -> bool:
        return phase in self.noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """The first answer: every column's noised counts, in bins of the synthetic table.

    patients, patients_sd: how many are held out, inferred from them. missing: share without a value, per column.
    """

    bins: tuple[Bins, ...] = field(repr=False)
    noised: tuple[np.ndarray, ...] = field(repr=False)
    sigma: float
    patients: float
    patients_sd: float

    @property
    def stands_out(self) -> bool:
        """There are surely patients: their number is more than twice its own noise."""
        return self.patients > max(2 * self.patients_sd, 1.0)


def finding(key: str, label: str, figure: Figure) -> Finding:
    return Finding(key=key, named=NamedFigure(label=label, figure=figure))


def floats(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)

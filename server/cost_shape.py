"""What a plan will ask, before anything runs: its questions rehearsed on a population that nobody measured.

The generator's own measuring program is asked what it would ask, and is answered from an assumed population: numbers
lie around the middle of their range, levels are equally frequent, one cell in twenty is missing where it may be.
So lengths of answers and bytes of questions come from the code that will ask them. How many bins a column really
gets depends on its records; the plan's own lengths are the upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cohortium.common.encoding import Grid, grids
from cohortium.common.generators.autoregressive import CLIP, hidden_for
from cohortium.common.generators.base import Answer, Facts, Floats, Generator
from cohortium.common.generators.measure import Measured, is_fine, measure
from cohortium.common.generators.mixture import FINE_STEPS, STEPS, components_for
from cohortium.common.generators.nade import Nade
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.protocol.messages import canonical
from cohortium.common.queries import AnyQuery, Counts, Gradient, Moments
from cohortium.server.planning import plan_for

if TYPE_CHECKING:
    from cohortium.common.study import Study

MISSING = 0.05
SPREAD = 1 / 6
"""Of the assumed population: missing cells, and a number's standard deviation in widths of its range."""
ASSUMED_PATIENTS = 10_000
"""Where the study does not say how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One stage as it will be asked. dim: numbers of an answer; wire: bytes of a question without its envelope.

    counted: columns of a histogram; width: features of a Gram matrix, all columns together.
    """

    stage: Stage
    dim: int
    wire: int
    counted: int = 0
    width: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A whole plan as it will be asked. cells: fine codes; bins, width: adaptive bins and features of all columns.

    tables: Σ over columns of bins × features; components, steps: of the mixture's fit, 0 where there is none;
    hidden, parameters: of the network, 0 where there is none; block: rows that a hospital's gradients take at once.
    """

    asked: tuple[Asked, ...]
    columns: int
    cells: int
    bins: int
    width: int
    tables: int
    components: int
    steps: int
    hidden: int
    parameters: int
    block: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A plan and its shape."""

    plan: Plan
    shape: Shape


def planned(study: Study, *, sites: int | Sequence[str]) -> Planned:
    """The plan of a study for some hospitals, and what it will ask. Raises CohortiumError as `study check` does."""
    names = [f"site-{i + 1:03d}" for i in range(sites)] if isinstance(sites, int) else sites
    plan, generator, facts = plan_for(study, names)
    return Planned(plan=plan, shape=shape_of(study, plan, generator, facts))


def shape_of(study: Study, plan: Plan, generator: Generator, facts: Facts) -> Shape:
    """Ask the assumed population. Post-processing (the fits) is left out: it takes long and asks nothing."""
    made = grids(study.schema)
    rehearsed = _Rehearsed(plan=plan, grids=made, patients=study.patients or ASSUMED_PATIENTS)
    phases = generator.phases(facts)
    measured = measure(rehearsed, grids=made, facts=facts, phases=phases)
    gradients = any(stage.kind == "gradient" for stage in plan.stages)
    network = None
    if gradients:
        network = Nade({"kind": "nade", "bins": [b.size for b in measured.bins], "hidden": hidden_for(facts)})
        rehearsed("train", _gradient(network, measured))
    mixed = plan.generator != "autoregressive"
    return Shape(
        asked=tuple(rehearsed.asked.get(stage.name) or _declared(stage, facts) for stage in plan.stages),
        columns=len(made),
        cells=sum(grid.size for grid in made),
        bins=sum(b.size for b in measured.bins),
        width=sum(f.shape[1] for f in measured.features),
        tables=sum(f.size for f in measured.features),
        components=components_for(measured) if mixed else 0,
        steps=(FINE_STEPS if is_fine(facts) else STEPS) if mixed else 0,
        hidden=0 if network is None else network.hidden,
        parameters=0 if network is None else network.size,
        block=1 if network is None else network.block_rows,
    )


def _declared(stage: Stage, facts: Facts) -> Asked:
    """A question of the evaluation is made from the synthetic table: only its longest answer is known."""
    return Asked(stage=stage, dim=stage.max_dim, wire=0, counted=len(facts.columns))


def _gradient(network: Nade, measured: Measured) -> Gradient:
    return Gradient(
        network=network.spec,
        maps=tuple(b.map for b in measured.bins),
        parameters=np.zeros(network.size, dtype=np.float32),
        clip_norm_l2=CLIP,
    )


class _Rehearsed:
    """Callable as ask(phase, query) -> Answer: what the assumed population says, with the plan's noise."""

    def __init__(self, *, plan: Plan, grids: tuple[Grid, ...], patients: int) -> None:
        self._plan, self._shares = plan, [patients * assumed(grid) for grid in grids]
        self._rng = np.random.default_rng(0)  # the same forecast each time; no privacy rests on it
        self.asked: dict[str, Asked] = {}

    def __call__(self, phase: str, query: AnyQuery) -> Answer:
        stage = next(stage for stage in self._plan.stages if stage.name == phase)
        self.asked[phase] = Asked(
            stage=stage,
            dim=query.dim,
            wire=wire_bytes(query),
            counted=len(query.columns) if isinstance(query, Counts) else 0,
            width=sum(query.widths) if isinstance(query, Moments) else 0,
        )
        plan = self._plan
        inflated = len(plan.sites) / plan.shares if plan.mode == "secure-sum" else len(plan.sites)
        sigma = stage.noise_multiplier * query.sensitivity_l2 * math.sqrt(inflated)
        true = np.zeros(query.dim)
        if isinstance(query, Counts):
            parts = zip(query.columns, query.maps, query.bins, strict=True)
            true = np.concatenate([np.bincount(m, weights=self._shares[c], minlength=b) for c, m, b in parts])
        return Answer(values=true + sigma * self._rng.standard_normal(query.dim), sigma=sigma, sites=len(plan.sites))


def assumed(grid: Grid) -> Floats:
    """Shares of a column's fine codes, [size]; the last code is a missing value."""
    cells = grid.size - 1
    share = np.ones(cells)
    if not grid.categorical and cells > 1:
        share = np.exp(-0.5 * ((np.linspace(0.0, 1.0, cells) - 0.5) / SPREAD) ** 2)
    gone = 0.0 if grid.required else MISSING
    return np.append(share * (1.0 - gone) / share.sum(), gone)


def wire_bytes(query: AnyQuery) -> int:
    """Bytes of a question: its fields, its arrays, and their entries in an envelope's header."""
    fields, blobs = query.to_wire()
    listed: list[Any] = [[f"query/{name}", len(blob), "0" * 64] for name, blob in sorted(blobs.items())]
    return len(canonical(fields)) + len(canonical(listed)) + sum(map(len, blobs.values()))

"""A release played again on invented patients: the run's very questions, noise of the run's very size, the same fit.

No record is touched and no budget is spent: the patients are rows of the run's own model, and the noise, drawn by the
same primitive, hides nobody. Keys are seeded, so that replicates come again and can be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cohortium.common.encoding import Grid, Records
from cohortium.common.errors import UsageError
from cohortium.common.generators.base import Answer, Facts, Phase
from cohortium.common.generators.unshrunk import MEASURING, PAIRS, fit_unshrunk, measure_unshrunk
from cohortium.common.privacy.entropy import SeededEntropy
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.privacy.release import Mechanism, release
from cohortium.common.queries import AnyQuery
from cohortium.server.runs import RunFolder, plan_for_run

ROWS = 8192
"""Synthetic rows of one analysis: a block of the sampler, so that each is herded as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What is public about a release, enough to play it again.

    variance_factors: phase -> how much larger the noise's variance was than the plan's (more honest sites answered
    than the plan counts on). Facts and phases are those of the run's generator.
    """

    plan: Plan
    grids: tuple[Grid, ...]
    facts: Facts
    phases: tuple[Phase, ...]
    variance_factors: Mapping[str, float]

    @property
    def has_pairs(self) -> bool:
        """Whether dependence between columns was measured."""
        return any(phase.name == PAIRS for phase in self.phases)

    def stage(self, phase: str) -> Stage:
        return next(stage for stage in self.plan.stages if stage.name == phase)

    def rows(self, ask: Any, columns: Collection[int], *, seed: int, count: int = ROWS) -> tuple[np.ndarray, float]:
        """(synthetic rows that inference analyses, int32 [count, all columns]; the noised number of patients).

        columns: those of the analysis; the others are left at 0. seed: of fit and rows.
        """
        measured = measure_unshrunk(ask, grids=self.grids, facts=self.facts, phases=self.phases)
        chosen = sorted(columns)
        out = np.zeros((count, len(self.grids)), dtype=np.int32)
        out[:, chosen] = fit_unshrunk(measured, chosen, seed=seed).sample(count, seed=seed)
        return out, measured.total

    def replay(self, codes: np.ndarray, columns: Collection[int], *, seed: int, count: int = ROWS) -> np.ndarray:
        """Such rows out of the release of other patients. codes: int32 [patients, columns]; seed: of the noise too."""
        return self.rows(Replay(release=self, codes=codes, seed=seed), columns, seed=seed, count=count)[0]


@dataclass(kw_only=True)
class Replay:
    """Callable as ask(phase, query): answers about `codes`, each row a patient, noised like the run's."""

    release: Release
    codes: np.ndarray
    seed: int
    _records: Records | None = field(default=None, init=False)

    def __call__(self, phase: str, query: AnyQuery) -> Answer:
        if self._records is None:
            self._records = patients(self.codes)
        stage = self.release.stage(phase)
        multiplier = stage.noise_multiplier * self.release.variance_factors[phase] ** 0.5
        released = release(
            query=query,
            records=self._records,
            mechanism=Mechanism(noise_multiplier=multiplier),
            entropy=SeededEntropy(seed=self.seed, site="replay"),
            run="replay",
            index=stage.first,
            head="replay",
        )
        return Answer(
            values=released.values * released.lattice,
            sigma=multiplier * query.sensitivity_l2,
            sites=len(self.release.plan.sites),
        )


def patients(codes: np.ndarray) -> Records:
    """Rows as patients of their own. Nothing here samples patients, so that they need no identity."""
    count = len(codes)
    return Records(
        codes=np.ascontiguousarray(codes, dtype=np.int32),
        patient=np.arange(count, dtype=np.int64),
        identity=np.zeros((count, 16), dtype=np.uint8),
        rows_per_patient=np.ones(count, dtype=np.int64),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Callable as ask(phase, query): the answers that a run got, from its folder."""

    answers: Mapping[str, tuple[np.ndarray, float, float]]  # values, lattice, multiplier with its factor
    sites: int

    def __call__(self, phase: str, query: AnyQuery) -> Answer:
        values, lattice, multiplier = self.answers[phase]
        if len(values) != query.dim:
            raise UsageError(
                "ANALYZE-VERSION",
                f"this version asks another question in phase {phase!r} than the run did",
                hint="analyse with the version of Cohortium that made the run",
            )
        return Answer(values=values * lattice, sigma=multiplier * query.sensitivity_l2, sites=self.sites)


def of_run(folder: RunFolder) -> tuple[Release, Kept]:
    """A finished run's release and the answers it got. Raises UsageError where they are not all there."""
    plan = folder.plan()
    _, generator, facts = plan_for_run(folder.study(), plan)
    phases: tuple[Phase, ...] = tuple(generator.phases(facts))
    answers, factors = {}, {}
    for stage in plan.stages:
        if stage.name not in MEASURING:
            continue
        path = folder.inner / "answers" / f"{stage.first:05d}.npz"
        if not path.exists():
            raise UsageError(
                "ANALYZE-ANSWERS",
                f"the noised answer of phase {stage.name!r} is not in the run's folder",
                where=(str(path),),
                hint="analyse in the coordinator's folder of a finished run; a release does not hold the answers",
            )
        with np.load(path, allow_pickle=False) as file:
            facts_ = json.loads(str(file["facts"]))
            values = file["values"].astype(np.float64)
        factors[stage.name] = float.fromhex(facts_["variance_factor"])
        multiplier = stage.noise_multiplier * factors[stage.name] ** 0.5
        answers[stage.name] = (values, float.fromhex(facts_["lattice"]), multiplier)
    made = Release(plan=plan, grids=folder.grids(), facts=facts, phases=phases, variance_factors=factors)
    return made, Kept(answers=answers, sites=len(plan.sites))

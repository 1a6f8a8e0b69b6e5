"""`ask` over a federation: the plan's releases in order, each recorded, each kept so that a run can resume.

A generator's `fit` is a deterministic function of the answers, so resuming is replaying: finished answers come from
disk (after a check that the question is the same), the first unfinished one goes to the sites.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cohortium.common.errors import CheckFailed, PeerUnreachable, ProtocolError
from cohortium.common.generators.base import Answer
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.protocol.messages import content_digest, digest
from cohortium.common.queries import AnyQuery, Gradient
from cohortium.strategies.base import SiteSum, Strategy


class Stopped(Exception):
    """Somebody asked the run to stop; raised between two releases, never inside one."""


@dataclass(kw_only=True)
class FederatedAsk:
    """Callable as ask(phase, query) -> Answer. folder: where answers are kept, one file a release."""

    plan: Plan
    run: str
    strategy: Strategy
    ledger: Ledger
    folder: Path
    on_release: Callable[[dict[str, Any]], None]
    stop: Callable[[], bool] = lambda: False
    rounds: list[dict[str, Any]] = field(default_factory=list)
    _done: dict[str, int] = field(default_factory=dict)

    def __call__(self, phase: str, query: AnyQuery) -> Answer:
        stage = next((s for s in self.plan.stages if s.name == phase), None)
        if stage is None or self._done.get(phase, 0) >= stage.repeats:
            raise ProtocolError("ASK-NOT-IN-PLAN", f"the plan has no further release for phase {phase!r}")
        index = stage.first + self._done.get(phase, 0)
        self._done[phase] = self._done.get(phase, 0) + 1
        name = _digest(query)
        kept = self._kept(index, name)
        if kept is None:
            if self.stop():
                raise Stopped
            kept = self._release(index, stage, query, name)
        total, facts = kept
        self.rounds.append(facts)
        if facts["void"] and stage.kind != "gradient":
            raise PeerUnreachable(
                "RUN-VOID",
                f"release {index} ({phase}) is void: too few sites stayed to the end ({facts['void']})",
                left="what it was charged stays charged; the plan holds no second attempt",
                hint="bring the sites back and start a new run of the study",
            )
        self.on_release(facts)
        return _answer(total, facts, stage, query)

    def _release(self, index: int, stage: Stage, query: AnyQuery, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Ask the sites. After a crash the same question goes out again: a site that had sealed its answer sends
        the same bytes, one that had not begun begins, one that died inside stays charged and counts as dropped."""
        started = time.monotonic()
        following = query.dim if stage.kind == "gradient" and index + 1 < stage.first + stage.repeats else None
        void = ""
        try:
            answer = self.strategy.answer(index, stage, query, next_dim=following)
        except ProtocolError as error:
            if not error.code.startswith("SUM-"):
                raise
            # Void: charged at the sites, and nothing came out.
            void, nothing = error.code, np.zeros(query.dim, dtype=np.int64)
            answer = SiteSum(
                values=nothing, lattice=query.lattice, sites=(), variance_factor=0.0, dropped=self.plan.sites
            )
        facts = {
            "index": index,
            "purpose": stage.name,
            "query": name,
            "sites": list(answer.sites),
            "dropped": list(answer.dropped),
            "seconds": round(time.monotonic() - started, 4),
            "void": void,
            "variance_factor": float(answer.variance_factor).hex(),
            "lattice": answer.lattice.hex(),
            "bytes": max(answer.sent_bytes.values(), default=0),
        }
        self._keep(index, answer, facts)
        self._record(index, stage, answer.values, void)
        return answer.values, facts

    def _record(self, index: int, stage: Stage, values: np.ndarray, void: str) -> None:
        """The study's line of a release. The sites' ledgers charged it before they read a record; this one says
        what became of it."""
        self.ledger.reserve(
            run=self.run,
            release_id=str(index),
            event=stage.event,
            count=stage.steps,
            plan_digest=self.plan.digest,
            purpose=stage.name,
            sealed="" if void else digest(values.astype("<i8").tobytes()),
        )
        if void:
            self.ledger.advance(self.run, str(index), "BURNED")
        else:
            self.ledger.advance(self.run, str(index), "RELEASED", later=True)

    def _keep(self, index: int, answer: SiteSum, facts: dict[str, Any]) -> None:
        """On disk before the ledger says so, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{index:05d}.npz"
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, values=answer.values, facts=np.array(json.dumps(facts)))  # noise does not compress
        path.with_suffix(".tmp").replace(path)

    def _kept(self, index: int, name: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        path = self.folder / f"{index:05d}.npz"
        if not path.exists():
            return None
        with np.load(path) as file:
            values, facts = file["values"], json.loads(str(file["facts"]))
        if facts["query"] != name:
            raise CheckFailed(
                "RESUME-QUERY",
                f"release {index} was answered for another question",
                where=(str(path),),
                hint="resume with the version of Cohortium that began the run",
            )
        state = self.ledger.state(self.run, str(index))
        if state == "NONE":  # a crash fell between the file and its line
            self._record(index, self.plan.stage_of(index), values, facts["void"])
        elif state == "SEALED":  # or before its last line was written
            self.ledger.advance(self.run, str(index), "RELEASED", later=True)
        return values, facts


def _answer(values: np.ndarray, facts: dict[str, Any], stage: Stage, query: AnyQuery) -> Answer:
    lattice, factor = float.fromhex(facts["lattice"]), float.fromhex(facts["variance_factor"])
    data = values.astype(np.float64) * lattice
    sigma = stage.noise_multiplier * query.sensitivity_l2 * factor**0.5
    if isinstance(query, Gradient) and query.local is not None and facts["sites"]:
        # Updates, not gradients: their mean over the sites that answered.
        data = data / len(facts["sites"])
    return Answer(values=data, sigma=sigma, sites=len(facts["sites"]))


def _digest(query: AnyQuery) -> str:
    """Names a question, so that a resumed run can tell that it asks the same."""
    fields, blobs = query.to_wire()
    return content_digest(query.kind, fields, blobs)

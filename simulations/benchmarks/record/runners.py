"""How each kind of method makes its table: ours and the baselines in a process of this package, peers in their own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cohortium.common.errors import CohortiumError
from cohortium.common.processes import parent
from cohortium.simulations.benchmarks.record import child, results
from cohortium.simulations.benchmarks.record.cells import Cell, Made, Prepared
from cohortium.simulations.benchmarks.record.measure import Limits, Measured, measured
from cohortium.simulations.benchmarks.record.methods import REAL, Method
from cohortium.simulations.benchmarks.record.ours import OurJob
from cohortium.simulations.benchmarks.record.peers import Job, Outcome, Peer, environment, run_peer
from cohortium.simulations.benchmarks.record.ruler import shuffled

HERE = Path(__file__).parent
SIMULATION = ("worlds.py", "run.py", "pooled.py", "engines.py", "grid.py")
TOLD_ONLY = ("name", "note", "bins", "private")
"""What a peer is called and may be asked for; all else decides what it makes."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
"""As the peers run: threads that wait for one another burn CPU seconds and would blur the comparison."""


@dataclass(kw_only=True)
class Runners:
    """Callable as make(cell, table, folder). peers: peers.PEERS; cache: where their environments are kept."""

    peers: Mapping[str, Peer]
    cache: Path
    limits: Limits
    delta: float
    _not_installed: dict[str, str] = field(default_factory=dict)
    _codes: dict[str, str] = field(default_factory=dict)

    def __call__(self, cell: Cell, table: Prepared, folder: Path) -> Made:
        if cell.method.family == "reference":
            return Made(synthetic=table.train if cell.method.name == REAL else shuffled(table.train, cell.seed))
        if cell.method.family in ("peer", "oracle", "public"):
            return self._peer(cell, table, folder)
        return self._here(cell, table, folder)

    def code(self, method: Method) -> str:
        """A digest of what makes this method's tables: cells of another one are made again."""
        if method.name not in self._codes:
            self._codes[method.name] = self._code(method)
        return self._codes[method.name]

    def _code(self, method: Method) -> str:
        if method.family == "reference":
            return ""
        if method.family in ("peer", "oracle", "public"):
            peer = self.peers[method.part]
            facts = {name: value for name, value in asdict(peer).items() if name not in TOLD_ONLY}
            return results.digest_of(*peer.sources, more=json.dumps(facts, sort_keys=True))
        parts = [HERE / "ours.py", HERE / "worlds.py", *(HERE.parents[1] / name for name in SIMULATION)]
        if method.part:
            parts += sorted((HERE / "baselines").glob("*.py"))
        return results.digest_of_code(parts, more=results.our_code())

    def _here(self, cell: Cell, table: Prepared, folder: Path) -> Made:
        method = cell.method
        assert cell.epsilon is not None
        job = OurJob(
            world=cell.world,
            train=table.path,
            dictionary=table.dictionary,
            split=cell.world.split(method.split) if method.split else None,
            epsilon=cell.epsilon,
            delta=self.delta,
            seed=cell.seed,
            rows=len(table.train),
            folder=folder / "out",
            local=method.family == "local",
            colluders=method.colluders,
        )
        child.write_job(folder / "job.json", job, baseline=method.part or None)
        command = [sys.executable, "-m", f"{__package__}.child", str(folder / "job.json")]
        environment = {**os.environ, **ONE_THREAD, **parent()}
        found = measured(command, limits=self.limits, words=folder / "words.txt", environment=environment)
        if found.failure is not None:
            return Made(synthetic=None, cost=_cost(found), failure=found.failure)
        said = json.loads((job.folder / child.SAID).read_text(encoding="utf-8"))
        return Made(synthetic=pd.read_parquet(job.folder / child.SYNTHETIC), said=said, cost=_cost(found))

    def _peer(self, cell: Cell, table: Prepared, folder: Path) -> Made:
        """One that does not install fails every cell with pip's words; it is tried once a run."""
        name = cell.method.part
        peer = self.peers[name]
        if name not in self._not_installed:
            try:
                environment(peer, self.cache)
            except CohortiumError as error:
                self._not_installed[name] = f"not installable: {error.sentence}"
        if name in self._not_installed:
            return Made(synthetic=None, failure=self._not_installed[name], said=_asked_for(peer))
        out = folder / "out"
        out.mkdir()
        job = Job(
            train=table.path,
            dictionary=table.dictionary,
            skip=cell.world.skip,
            target=cell.world.target,
            unit=cell.world.unit,
            method=peer.method,
            epsilon=cell.epsilon,
            delta=self.delta,
            seed=cell.seed,
            rows=len(table.train),
            bins=cell.method.bins,
            out=out,
        )
        found = run_peer(
            peer,
            job,
            cache=self.cache,
            limit_cpu_s=self.limits.cpu_s,
            limit_wall_s=self.limits.wall_s,
            limit_memory_gb=self.limits.memory_gb,
        )
        said = found.said or _asked_for(peer)
        if found.synthetic is None:
            return Made(synthetic=None, said=said, cost=_cost(found), failure=found.failure or "it left no table")
        return Made(synthetic=pd.read_parquet(found.synthetic), said=said, cost=_cost(found))


def _cost(found: Measured | Outcome) -> dict[str, float]:
    return {"cpu_s": found.cpu_s, "wall_s": found.wall_s, "peak_mb": found.peak_mb}


def _asked_for(peer: Peer) -> dict[str, Any]:
    """The version of a peer that did not get so far as to say it: the one that was asked for."""
    package, _, version = next(r for r in peer.requirements if not r.startswith("torch==")).partition("==")
    return {"package": package, "version": version}

"""`cohortium analyze`: means, logistic and Cox regressions with intervals that count the privacy noise.

Post-processing of a finished run: it reads the model, the noised answers and the synthetic table, touches no record
and costs no budget. Replays are kept in RUN/replicates/, a file for each set of analyses, and gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cohortium.common.encoding import Grid
from cohortium.common.errors import UsageError
from cohortium.common.evaluation.combining import FEWEST, LEVEL, Combined, plain
from cohortium.common.evaluation.estimands import Estimand, Fitted, Regression, packs
from cohortium.common.evaluation.formulas import Formulas
from cohortium.common.evaluation.regression import CannotFit
from cohortium.common.generators.sampling import table as sample_table
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import canonical
from cohortium.common.schema import Schema
from cohortium.server.playing import Play, columns_of, combined, plays, population_of
from cohortium.server.replicates import ROWS, Release, of_run
from cohortium.server.runs import RunFolder

REPLICATES = 30
FOLDER = "replicates"
FORMAT = "cohortium-replicates/1"

Progress = Callable[[int, int], None]  # replays done, of how many
RATIOS = {"logistic": "odds ratio", "cox": "hazard ratio"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One number. combined: None where it cannot be assessed; naive: (estimate, low, high), None without a fit."""

    name: str
    combined: Combined | None
    naive: tuple[float, float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysed:
    """rows: of the synthetic block that the estimate comes from, used by it; failed: replays without an estimate;
    why: the reason where nothing can be said, or ""."""

    estimand: Estimand
    terms: tuple[Term, ...]
    rows: int
    failed: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Analyses:
    """patients: the noised number. table_rows: of the synthetic table that the naive analysis takes for patients."""

    run: str
    seed: int
    replicates: int
    level: float
    patients: int
    table_rows: int
    found: tuple[Analysed, ...]

    def to_json(self) -> dict[str, Any]:
        """Infinite bounds are null; ratios beside the coefficients of a regression."""
        return {
            "format": "cohortium-analysis/1",
            "run": self.run,
            "seed": self.seed,
            "replicates": self.replicates,
            "level": self.level,
            "patients_noised": self.patients,
            "synthetic_rows": self.table_rows,
            "analyses": [_to_json(one) for one in self.found],
        }


def _to_json(one: Analysed) -> dict[str, Any]:
    ratio = RATIOS.get(one.estimand.kind)

    def numbers(estimate: float, low: float, high: float) -> dict[str, Any]:
        out: dict[str, Any] = {"estimate": estimate, "interval": [_finite(low), _finite(high)]}
        if ratio is not None:
            out[ratio.replace(" ", "_")] = {
                "estimate": math.exp(estimate),
                "interval": [math.exp(low) if low > -math.inf else None, math.exp(high) if high < math.inf else None],
            }
        return out

    terms = []
    for term in one.terms:
        entry: dict[str, Any] = {"term": term.name, "assessed": bool(term.combined and term.combined.assessed)}
        if term.combined is not None and math.isfinite(term.combined.estimate):
            entry |= numbers(term.combined.estimate, term.combined.low, term.combined.high)
            entry |= {"slope": term.combined.slope, "spread": term.combined.spread}
        if term.naive is not None:
            entry["naive"] = numbers(*term.naive)
        terms.append(entry)
    return {
        "kind": one.estimand.kind,
        "analysis": one.estimand.text,
        "rows_used": one.rows,
        "replicates_without_estimate": one.failed,
        "cannot_be_assessed": one.why or None,
        "terms": terms,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_formulas(
    folder: RunFolder, *, means: Sequence[str], logistic: Sequence[str], cox: Sequence[str]
) -> tuple[Estimand, ...]:
    """What was typed, against the run's dictionary; UsageError with the fix."""
    read = Formulas(folder.study().schema.modelled, folder.grids())
    out: list[Estimand] = [read.mean(text) for text in means]
    out += [read.logistic(text) for text in logistic]
    out += [read.cox(text) for text in cox]
    if not out:
        raise UsageError(
            "ANALYZE-NOTHING",
            "nothing to analyse",
            hint="--mean age, --logistic 'death ~ age', --cox 'time, event ~ age'",
        )
    return tuple({one.text: one for one in out}.values())


def analyze(
    folder: RunFolder,
    estimands: Sequence[Estimand],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
    progress: Progress = lambda done, of: None,
) -> Analyses:
    """Every estimand's estimate with its combined interval, and the naive one beside it.

    Raises UsageError where the run is unfinished, its answers are gone, or its generator measured no dependence.
    """
    if replicates < FEWEST:
        raise UsageError("ANALYZE-REPLICATES", f"at least {FEWEST} replicates", hint=f"--replicates {REPLICATES}")
    model = folder.model()
    release, kept = of_run(folder)
    regressions = [one for one in estimands if isinstance(one, Regression)]
    if regressions and not release.has_pairs:
        raise UsageError(
            "ANALYZE-GENERATOR",
            f"generator {release.plan.generator!r} did not measure how columns move together",
            hint='regressions need a run with [generator] name = "auto", "mixture" or "joined"; means work here',
        )
    population = population_of(model, seed=seed)
    naive = _naive(folder, release.grids, release.plan, seed=seed)
    found: dict[str, Analysed] = {}
    total = 0.0
    ready: list[Estimand] = []
    for one in estimands:
        try:
            one.fit(population)
            ready.append(one)
        except CannotFit as error:
            found[one.text] = _nothing(one, naive, str(error), level)
    cache = _Cache(folder, release, seed=seed)
    waiting = packs(ready)
    of = replicates * len(waiting)
    done = 0
    while waiting:
        pack = waiting.pop(0)
        rows, total = release.rows(kept, columns_of(pack), seed=seed)
        own, lost = _own(pack, rows)
        for one, why in lost:
            found[one.text] = _nothing(one, naive, why, level)
        if lost:
            # Without them the pack has other columns, so that it is fitted anew.
            good = tuple(one for one in pack if one.text not in found)
            waiting = [good, *waiting] if good else waiting
            continue
        played = cache.read(pack)[:replicates]
        progress(done + len(played), of)
        for play in plays(
            release, population, pack, own, patients=round(total), count=replicates, seed=seed, kept=played
        ):
            played.append(play)
            cache.keep(pack, play)
            progress(done + len(played), of)
        done += replicates
        for position, (one, fit) in enumerate(zip(pack, own, strict=True)):
            failed = sum(bool(play.failed[position]) for play in played)
            try:
                intervals = combined(fit, played, position, level=level)
            except CannotFit as error:
                found[one.text] = replace(_nothing(one, naive, str(error), level), rows=fit.rows, failed=failed)
                continue
            terms = tuple(
                Term(name=name, combined=interval, naive=beside)
                for name, interval, beside in zip(one.names, intervals, _plainly(one, naive, level), strict=True)
            )
            found[one.text] = Analysed(estimand=one, terms=terms, rows=fit.rows, failed=failed, why="")
    return Analyses(
        run=str(folder.facts()["run"]),
        seed=seed,
        replicates=replicates,
        level=level,
        patients=round(total),
        table_rows=len(naive),
        found=tuple(found[one.text] for one in estimands),
    )


def _own(pack: Sequence[Estimand], rows: np.ndarray) -> tuple[list[Fitted], list[tuple[Estimand, str]]]:
    fits, lost = [], []
    for one in pack:
        try:
            fits.append(one.fit(rows))
        except CannotFit as error:
            lost.append((one, str(error)))
    return fits, lost


def _naive(folder: RunFolder, grids: tuple[Grid, ...], plan: Plan, *, seed: int) -> np.ndarray:
    """The released synthetic table in codes, int32 [rows, columns]; drawn where the run has not written it yet."""
    schema: Schema = folder.study().schema
    path = folder.root / "synthetic.parquet"
    if path.exists():
        rows = pd.read_parquet(path)
    else:
        rows = sample_table(folder.model(), schema, grids, plan.rows, seed=seed)
    return np.column_stack(
        [grid.encode(rows[column.name]) for column, grid in zip(schema.modelled, grids, strict=True)]
    )


def _plainly(one: Estimand, naive: np.ndarray, level: float) -> list[tuple[float, float, float] | None]:
    try:
        fit = one.fit(naive)
    except CannotFit:
        return [None] * len(one.names)
    return [(float(v), *plain(float(v), float(e), level=level)) for v, e in zip(fit.values, fit.errors, strict=True)]


def _nothing(one: Estimand, naive: np.ndarray, why: str, level: float) -> Analysed:
    terms = tuple(
        Term(name=name, combined=None, naive=beside)
        for name, beside in zip(one.names, _plainly(one, naive, level), strict=True)
    )
    return Analysed(estimand=one, terms=terms, rows=0, failed=0, why=why)


class _Cache:
    """Replays on disk: RUN/replicates/NAME.jsonl, NAME the digest of all that they depend on; a line each."""

    def __init__(self, folder: RunFolder, release: Release, *, seed: int) -> None:
        self._root = folder.root / FOLDER
        self._about = {
            "format": FORMAT,
            "model": hashlib.sha256((folder.inner / "model.npz").read_bytes()).hexdigest(),
            "plan": release.plan.digest,
            "rows": ROWS,
            "seed": seed,
        }

    def _path(self, pack: Sequence[Estimand]) -> tuple[Path, dict[str, Any]]:
        about = {**self._about, "analyses": [one.text for one in pack]}
        return self._root / f"{hashlib.sha256(canonical(about)).hexdigest()[:16]}.jsonl", about

    def read(self, pack: Sequence[Estimand]) -> list[Play]:
        """Those of an earlier call, up to a line that a crash cut short; what comes after it is dropped."""
        path, about = self._path(pack)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        out: list[Play] = []
        try:
            for at, line in enumerate(lines):
                entry = json.loads(line)
                if (at == 0) != ("format" in entry):
                    break
                if at:
                    out.append(_play(entry, pack))
        except (ValueError, KeyError, TypeError):
            pass
        self._root.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(about) + "\n" + "".join(_line(play) for play in out), encoding="utf-8")
        part.replace(path)
        return out

    def keep(self, pack: Sequence[Estimand], play: Play) -> None:
        with self._path(pack)[0].open("a", encoding="utf-8") as file:
            file.write(_line(play))


def _line(play: Play) -> str:
    values = [None if why else list(map(float, v)) for v, why in zip(play.values, play.failed, strict=True)]
    entry = {"truths": [list(map(float, t)) for t in play.truths], "values": values, "failed": list(play.failed)}
    return json.dumps(entry, allow_nan=False) + "\n"


def _play(entry: dict[str, Any], pack: Sequence[Estimand]) -> Play:
    sizes = [len(one.names) for one in pack]
    truths = tuple(np.array(t, dtype=float) for t in entry["truths"])
    values = tuple(
        np.full(size, np.nan) if v is None else np.array(v, dtype=float)
        for v, size in zip(entry["values"], sizes, strict=True)
    )
    if [len(t) for t in truths] != sizes or [len(v) for v in values] != sizes:
        raise ValueError("a replay of other analyses")
    return Play(truths=truths, values=values, failed=tuple(map(str, entry["failed"])))

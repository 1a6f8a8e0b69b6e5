"""The end of a simulation: sample, score against the real side, sign what is published, write report and result.

Everything that result.json says about privacy comes from the ledgers' lines (server/audit.claims), and every file
it lists is signed in the study's ledger, so `cohortium audit` can hold the folder to its words.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cohortium.common.evaluation.base import (
    BudgetFacts,
    NamedFigure,
    PlanRow,
    ReportFacts,
    RoundRow,
    Scores,
    from_json,
)
from cohortium.common.evaluation.exact import exact_scores
from cohortium.common.evaluation.report import render
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.audit import COORDINATOR, PUBLISHED, claims, said_digest
from cohortium.server.runs import RunFolder
from cohortium.server.sampling import write_rows
from cohortium.simulations.run import events_of, real_side, refuse_unfinished

NOT_PROTECTED = (
    "What the records of all patients together say about everybody: a rule learned from the whole cohort applies to "
    "people who took part and to people who did not.",
    "Facts that are public by agreement: the dictionary, the sites' names, who answered which round.",
    "A patient who is in more hospitals than the study states: see the ε for 2 and 3 hospitals.",
    "Hospitals that lie about their own data (poisoning): they can spoil the result, not another hospital's privacy.",
)
REHEARSAL = (
    "This is a rehearsal with --seed: its noise can be computed again by anyone who knows the seed. It shows what a "
    "study would give; it must not be published as private."
)
GUESSED = "guessed-ranges"
"""The study ledger's note on a run whose dictionary holds levels or ranges that were read off a table."""
GUESSED_WARNING = (
    "The dictionary still holds levels or ranges that were guessed from a table (--accept-guessed-ranges). What they "
    "tell about its rows is outside the ε: publish nothing unless they are checked or that table is public anyway."
)
NOISELESS = "Noise is switched off: there is no privacy at all. For tests only."

SCORED_ROWS = 100_000
"""Real rows and synthetic rows that the report scores at most: a million of each would cost minutes and gigabytes."""

Progress = Callable[[str], None]


def finish(out: Path, *, progress: Progress = lambda _: None, score: bool = True) -> dict[str, Any]:
    """Write synthetic.parquet, synthetic.csv, report.html and result.json; return the result."""
    refuse_unfinished(out)
    folder = RunFolder(root=out)
    study, plan, facts = folder.study(), folder.plan(), folder.facts()
    progress("sampling the synthetic table")
    write_rows(folder, plan.rows, [out / "synthetic.parquet", out / "synthetic.csv"], seed=int(facts["seed"]))
    scores: Scores | None = None
    scored = "all rows"
    if score:
        progress("scoring against the simulated hospitals' real rows")
        real = real_side(out, most_rows=SCORED_ROWS)
        synthetic = _first_rows(out / "synthetic.parquet", SCORED_ROWS)
        if real.share < 1.0 or plan.rows > len(synthetic):
            scored = (
                f"{len(synthetic):,} of {plan.rows:,} synthetic rows against a random {real.share:.1%} of the patients"
            )
        scores = exact_scores(
            schema=study.schema,
            train=real.train,
            test=real.test,
            synthetic=synthetic,
            target=study.target,
            unit=plan.unit,
            seed=int(facts["seed"]),
        )
    progress("signing what is published")
    files = {name: _sha256(out / name) for name in ("synthetic.parquet", "synthetic.csv", "run/model.npz")}
    key = folder.key()
    guessed = bool(facts.get("guessed_ranges"))
    warnings = tuple(
        text
        for on, text in (
            (facts["rehearsal"], REHEARSAL),
            (not facts["noise"], NOISELESS),
            (guessed, GUESSED_WARNING),
        )
        if on
    )
    said = {"scores": None if scores is None else scores.to_json(), "warnings": list(warnings)}
    with Ledger.open(folder.inner / "ledger.db", key) as ledger:
        if guessed and not any(note["about"] == GUESSED for note in ledger.book.notes):
            ledger.note(GUESSED, run=str(facts["run"]))
        ledger.note(PUBLISHED, run=str(facts["run"]), files=files, said=said_digest(said))
        ledger.export(folder.inner / "ledger.jsonl")
    books = read_books(out, plan, facts)
    claimed = claims(plan, str(facts["run"]), books)
    report = _report_facts(folder, plan, facts, claimed, warnings, files, books, scored)
    progress("writing the report")
    result: dict[str, Any] = {
        "format": "cohortium-result/1",
        "study": {"id": study.id, "title": study.title, "generator": plan.generator, "mode": plan.mode},
        "run": facts["run"],
        **claimed,
        "plan": {"digest": plan.digest, "epsilon": plan.epsilon, "releases": plan.releases},
        "files": files,
        "warnings": list(warnings),
        "facts": report.to_json(),
        "scores": None if scores is None else scores.to_json(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    render(report, scores, out / "report.html")
    return result


def _first_rows(path: Path, most: int) -> pd.DataFrame:
    """The first rows of a synthetic table: as good as any, since rows are drawn alike."""
    batches, have = [], 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            batches.append(batch.slice(0, most - have))
            have += len(batches[-1])
            if have >= most:
                break
    return pa.Table.from_batches(batches).to_pandas()


def rewrite_report(out: Path) -> Path:
    """report.html again from result.json alone."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    scores = None if result["scores"] is None else Scores.from_json(result["scores"])
    return render(ReportFacts.from_json(result["facts"]), scores, out / "report.html")


def read_books(out: Path, plan: Plan, facts: dict[str, Any]) -> dict[str, tuple[Book, str]]:
    """owner -> (what its exported ledger says, head), every chain and signature verified."""
    keys = {COORDINATOR: RunFolder(root=out).key().public_key().public_bytes_raw().hex(), **facts["public_keys"]}
    books = {}
    for owner, key in keys.items():
        path = out / "run" / "ledger.jsonl" if owner == COORDINATOR else out / "sites" / owner / "ledger.jsonl"
        public = public_from_raw(bytes.fromhex(key))
        books[owner] = chain.replay(chain.read_jsonl(path), owner=owner, public=public)
    return books


def _report_facts(
    folder: RunFolder,
    plan: Plan,
    facts: dict[str, Any],
    claimed: dict[str, Any],
    warnings: tuple[str, ...],
    files: dict[str, str],
    books: dict[str, tuple[Book, str]],
    scored: str,
) -> ReportFacts:
    study = folder.study()
    cumulated = {stage.name: epsilon for stage, epsilon in plan.cumulated()}
    rows = tuple(
        PlanRow(
            id=stage.name,
            purpose=stage.purpose,
            kind=stage.kind,
            repeats=stage.repeats,
            sampling_rate=stage.event.probability,
            noise_multiplier=stage.noise_multiplier,
            epsilon_cumulated=cumulated[stage.name],
        )
        for stage in plan.stages
    )
    price = {(row["relation"], row["hospitals"]): float(row["epsilon"]) for row in claimed["privacy"]["prices"]}
    budget = BudgetFacts(
        epsilon_total=plan.epsilon,
        epsilon_spent=price["add-remove", plan.hospitals],
        delta=plan.delta,
        replace_one=price["replace-one", plan.hospitals],
        hospitals2=price["add-remove", 2],
        hospitals3=price["add-remove", 3],
    )
    last = {event["index"]: event for event in events_of(folder.root) if event["event"] == "release"}
    rounds = tuple(
        RoundRow(
            round=index,
            purpose=event["purpose"],
            answered=tuple(event["sites"]),
            dropped=tuple(event["dropped"]),
            # An answer takes longer over more rows: finer than this, a time would be an un-noised measurement of them.
            seconds=round(float(event["seconds"]), 1),
        )
        for index, event in sorted(last.items())
    )
    private: tuple[NamedFigure, ...] = ()
    path = folder.inner / "evaluation.json"
    if path.exists():
        private = tuple(from_json(NamedFigure, entry) for entry in json.loads(path.read_text()))
    versions = {name: importlib.metadata.version(name) for name in ("cohortium", "flwr", "torch", "dp-accounting")}
    provenance = {
        "Study": f"{study.id} ({study.digest()[:16]}…)",
        "Run": str(facts["run"]),
        "Plan digest (SHA-256)": plan.digest,
        "Dictionary digest (SHA-256)": plan.dictionary_digest,
        **{f"Ledger head of {owner}": f"line {book.size - 1}, {head}" for owner, (book, head) in books.items()},
        **{f"SHA-256 of {name}": value for name, value in files.items()},
        "Split of the simulation": str(facts["split"]),
        "Scored on": scored,
        "Seed of everything but the noise": str(facts["seed"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Python": platform.python_version(),
        **dict(study.schema.about),
    }
    return ReportFacts(
        study_id=study.id,
        title=study.title,
        statement=claimed["privacy"]["sentence"],
        mode="simulation",
        plan=rows,
        budget=budget,
        rounds=rounds,
        provenance=provenance,
        warnings=warnings,
        private_scores=private,
        not_protected=NOT_PROTECTED,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

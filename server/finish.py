"""The end of a run: sample, sign what is published, write result and report, so that `cohortium audit` can check it.

Everything that result.json says about privacy comes from the ledgers' lines (server/audit.claims), and every file
it lists is signed in the study's ledger. A simulation adds scores against its real rows before (simulations/finish);
a consortium has no real row, and takes the sites' ledgers from its mirror.

    python -m cohortium.server.finish run RUN MIRROR.db       the end of a consortium's run, in a process of its own
    python -m cohortium.server.finish rows RUN NUMBER FILE    other rows of a finished run
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.evaluation.assess import with_exact
from cohortium.common.evaluation.base import (
    BudgetFacts,
    PlanRow,
    ReportFacts,
    RoundRow,
    Scores,
    to_json,
)
from cohortium.common.evaluation.findings import Findings
from cohortium.common.evaluation.report import render
from cohortium.common.evaluation.summary_pdf import write_summary
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import PUBLISHED, Book
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.audit import COORDINATOR, bare_digest, claims, said_digest, write_manifest
from cohortium.server.evaluate import free_sections, kept
from cohortium.server.mirror import Mirror
from cohortium.server.runs import SAMPLES, RunFolder
from cohortium.server.sampling import write_rows

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
LEDGERS = "run/ledgers"
AUDITED = "rehearsal_audit.json"
"""In a run's folder: the lower bound on ε that a rehearsal with canaries proved (simulations/rehearsal.py)."""

Progress = Callable[[str], None]


def finish_run(root: Path, *, mirror: Path, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The end of a consortium's run: its result. It may be written again after a crash.

    mirror: the verified copies of the sites' ledgers (mirror.db). Raises Refused RUN-UNFINISHED before the fit is done.
    """
    folder = RunFolder(root=root)
    if not (folder.inner / "model.npz").exists():
        raise Refused(
            "RUN-UNFINISHED", "this run has no fitted model", where=(str(root),), hint="wait for it: cohortium watch"
        )
    facts = folder.facts()
    progress("taking the sites' ledgers from the mirror")
    export_ledgers(folder, mirror)
    progress("sampling the synthetic table")
    sample(folder)
    about = {"Consortium": str(facts["consortium"])}
    if (folder.inner / "evaluation.json").exists():
        about["Scored on"] = "held-out patients, at the hospitals"
    return publish(folder, mode="deployment", about=about, findings=kept(folder), progress=progress)


def export_ledgers(folder: RunFolder, mirror: Path) -> None:
    """run/ledgers/SITE.jsonl as the sites themselves would export them, and the manifest that names them.

    A site that never sent a line took no part; the manifest says so.
    """
    plan, facts = folder.plan(), folder.facts()
    keys: dict[str, str] = dict(facts["public_keys"])
    places, silent = {COORDINATOR: "run/ledger.jsonl"}, []
    (folder.root / LEDGERS).mkdir(exist_ok=True)
    with Mirror(mirror, {site: public_from_raw(bytes.fromhex(key)) for site, key in keys.items()}) as copies:
        for site in sorted(keys):
            if not copies.size(site):
                silent.append(site)
                continue
            places[site] = f"{LEDGERS}/{site}.jsonl"
            copies.export(site, folder.root / places[site])
    keys[COORDINATOR] = folder.key().public_key().public_bytes_raw().hex()
    write_manifest(
        folder.root, run=str(facts["run"]), plan=plan, public_keys=keys, ledgers=places, silent=tuple(silent)
    )


def sample(folder: RunFolder) -> None:
    """synthetic.parquet and synthetic.csv: as many rows as the plan releases, balanced as the study says."""
    outs = [folder.root / name for name in SAMPLES]
    wanted = folder.study().release
    write_rows(
        folder,
        folder.plan().rows,
        outs,
        seed=int(folder.facts()["seed"]),
        balance=wanted.balance,
        minimum_share=dict(wanted.minimum_share),
        enforce_rules=wanted.enforce_rules,
        k_anonymity=wanted.k_anonymity,
        l_diversity=wanted.l_diversity,
    )


def publish(
    folder: RunFolder,
    *,
    mode: Literal["simulation", "deployment"],
    about: Mapping[str, str],
    scores: Scores | None = None,
    findings: Findings | None = None,
    exact: Mapping[str, float] | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Sign what is published, then write report.html and result.json; return the result.

    about: provenance lines that only the caller knows. scores: against real rows, where there are any. findings: of
    the private evaluation; exact: its twin without noise, by key, in a simulation only.
    """
    study, plan, facts = folder.study(), folder.plan(), folder.facts()
    progress("signing what is published")
    files = {name: _sha256(folder.root / name) for name in (*SAMPLES, "run/model.npz")}
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
    evaluation = findings_of(folder, findings)
    said = {
        "scores": None if scores is None else scores.to_json(),
        "warnings": list(warnings),
        "evaluation": evaluation.to_json(),
        "exact_evaluation": None if exact is None else to_json(dict(exact)),
        "verdicts": to_json(evaluation.verdicts),
        "rehearsal_audit": _rehearsal_audit(folder),
    }
    with Ledger.open(folder.inner / "ledger.db", folder.key()) as ledger:
        if guessed and not any(note["about"] == GUESSED for note in ledger.book.notes):
            ledger.note(GUESSED, run=str(facts["run"]))
        signed = {"said": said_digest(said), "bare": bare_digest(said)}  # bare: what a simulation's release still says
        ledger.note(PUBLISHED, run=str(facts["run"]), files=files, **signed)
        ledger.export(folder.inner / "ledger.jsonl")
    books = read_books(folder)
    claimed = claims(plan, str(facts["run"]), books)
    report = _report_facts(folder, claimed, warnings, files, books, mode, about, evaluation)
    progress("writing the report")
    result: dict[str, Any] = {
        "format": "cohortium-result/1",
        "study": {"id": study.id, "title": study.title, "generator": plan.generator, "mode": plan.mode},
        "run": facts["run"],
        **claimed,
        "plan": {"digest": plan.digest, "epsilon": plan.epsilon, "releases": plan.releases},
        "files": files,
        "facts": report.to_json(),
        **said,
    }
    part = folder.root / "result.json.part"
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, folder.root / "result.json")
    rewrite_report(folder.root)
    return result


def _rehearsal_audit(folder: RunFolder) -> dict[str, Any] | None:
    path = folder.root / AUDITED
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def rewrite_report(out: Path) -> Path:
    """report.html and summary.pdf again from result.json alone."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    facts = ReportFacts.from_json(result["facts"])
    scores = None if result["scores"] is None else Scores.from_json(result["scores"])
    findings = Findings.from_json(result["evaluation"]) if result.get("evaluation") else None
    if findings is not None and result.get("exact_evaluation"):
        findings = with_exact(findings, result["exact_evaluation"])
    bound = result.get("rehearsal_audit")
    write_summary(facts, scores, findings, bound, out / "summary.pdf")
    return render(facts, scores, out / "report.html", findings=findings, audit=bound)


def findings_of(folder: RunFolder, findings: Findings | None) -> Findings:
    """What was found at the hospitals, and what the synthetic rows show by themselves."""
    free = free_sections(folder.study(), folder.root / SAMPLES[0])
    if findings is None:
        return Findings(sections=free, verdicts=(), headline="", patients=None, epsilon=None)
    return replace(findings, sections=(*findings.sections, *free))


def read_books(folder: RunFolder) -> dict[str, tuple[Book, str]]:
    """owner -> (what its exported ledger says, head), every chain and signature verified; places as the manifest."""
    facts = folder.facts()
    manifest = json.loads((folder.root / "manifest.json").read_text(encoding="utf-8"))
    silent = manifest.get("silent", [])
    places = {COORDINATOR: manifest["ledgers"][COORDINATOR], **manifest["ledgers"]["sites"]}
    keys = {COORDINATOR: folder.key().public_key().public_bytes_raw().hex(), **facts["public_keys"]}
    books = {}
    for owner, key in keys.items():
        if owner not in silent:
            lines = chain.read_jsonl(folder.root / places[owner])
            books[owner] = chain.replay(lines, owner=owner, public=public_from_raw(bytes.fromhex(key)))
    return books


def _report_facts(
    folder: RunFolder,
    claimed: dict[str, Any],
    warnings: tuple[str, ...],
    files: dict[str, str],
    books: dict[str, tuple[Book, str]],
    mode: Literal["simulation", "deployment"],
    about: Mapping[str, str],
    evaluation: Findings,
) -> ReportFacts:
    study, plan, facts = folder.study(), folder.plan(), folder.facts()
    price = {(row["relation"], row["hospitals"]): float(row["epsilon"]) for row in claimed["privacy"]["prices"]}
    budget = BudgetFacts(
        epsilon_total=plan.epsilon,
        epsilon_spent=price["add-remove", plan.hospitals],
        delta=plan.delta,
        replace_one=price["replace-one", plan.hospitals],
        hospitals2=price["add-remove", 2],
        hospitals3=price["add-remove", 3],
    )
    # The main figures: those of single columns, levels and groups have a dot in their key.
    private = tuple(
        f.named for section in evaluation.sections for f in section.findings if evaluation.patients and "." not in f.key
    )
    versions = {name: importlib.metadata.version(name) for name in ("cohortium", "flwr", "torch", "dp-accounting")}
    provenance = {
        "Study": f"{study.id} ({study.digest()[:16]}…)",
        "Run": str(facts["run"]),
        "Plan digest (SHA-256)": plan.digest,
        "Dictionary digest (SHA-256)": plan.dictionary_digest,
        **{f"Ledger head of {owner}": f"line {book.size - 1}, {head}" for owner, (book, head) in books.items()},
        **{f"SHA-256 of {name}": value for name, value in files.items()},
        **about,
        "Seed of everything but the noise": str(facts["seed"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Python": platform.python_version(),
        **dict(study.schema.about),
    }
    return ReportFacts(
        study_id=study.id,
        title=study.title,
        statement=claimed["privacy"]["sentence"],
        mode=mode,
        plan=_plan_rows(plan),
        budget=budget,
        rounds=_rounds(folder),
        provenance=provenance,
        warnings=warnings,
        private_scores=private,
        not_protected=NOT_PROTECTED,
    )


def _plan_rows(plan: Plan) -> tuple[PlanRow, ...]:
    cumulated = {stage.name: epsilon for stage, epsilon in plan.cumulated()}
    return tuple(
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


def _rounds(folder: RunFolder) -> tuple[RoundRow, ...]:
    last = {event["index"]: event for event in folder.events() if event["event"] == "release"}
    return tuple(
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(words: list[str]) -> int:
    """For the service: what went wrong is one line of JSON on stdout, the exit code is the error's."""
    try:
        if words[0] == "run":
            finish_run(Path(words[1]), mirror=Path(words[2]))
        else:
            folder = RunFolder(root=Path(words[1]))
            wanted = folder.study().release
            # A researcher's rows keep the study's rules and its k and l, as the published table does.
            write_rows(
                folder,
                int(words[2]),
                [Path(words[3])],
                seed=secrets.randbelow(2**31),
                enforce_rules=wanted.enforce_rules,
                k_anonymity=wanted.k_anonymity,
                l_diversity=wanted.l_diversity,
            )
    except CohortiumError as error:
        sys.stdout.write(json.dumps(error.as_json()) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

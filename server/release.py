"""`cohortium release RUN`: a signed folder with everything that a reader of the synthetic table needs, and no more.

    FOLDER/synthetic.parquet synthetic.csv dictionary.json datapackage.json      the rows and what they mean
    FOLDER/report.html result.json                                              the report, and the same facts
    FOLDER/data-card.md model-card.md dpia-annex.md hipaa-annex.md README.md     server/documents, filled from facts
    FOLDER/study.toml plan.json proposal.bin manifest.json run/                  what `cohortium audit` checks
    FOLDER/release.json signatures/SITE.json                                    who stands for it (release_manifest)

The folder is made of a finished run that passes its audit and the gate. A simulation's exact scores compare with real
rows without noise: they are never released, and the manifest says that they were withheld.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.errors import CheckFailed, Refused, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.release_manifest import (
    ENVELOPE,
    SIGNATURES,
    Manifest,
    file_digests,
    plain_name,
    sign_release,
)
from cohortium.common.schema import Schema
from cohortium.server.audit import COORDINATOR, AuditReport, audit, without_exact, write_manifest
from cohortium.server.finish import read_books, rewrite_report
from cohortium.server.release_documents import DocumentFacts, write_documents
from cohortium.server.release_gate import Finding, decide, minimum_of, refuse
from cohortium.server.runs import RunFolder

AUDITED = ("study.toml", "dictionary.json", "plan.json", "proposal.bin")
WITHHELD = ("scores", "exact_evaluation")
"""What a simulation's result.json holds beyond noised facts: figures that saw real rows."""
RELEASED = (
    *("format", "study", "run", "privacy", "ledgers", "plan", "files", "warnings", "facts"),
    *("evaluation", "verdicts", "rehearsal_audit"),
)
"""What may be handed out of a simulation's result.json: facts, and what was made of noised answers."""
SCORED_ON = "Scored on"
"""A simulation's line of provenance that tells how many real rows there are."""
PACKAGES = ("cohortium", "flwr", "torch", "dp-accounting", "cryptography", "pyarrow")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """A release that was written. needed: how many sites still have to sign it."""

    folder: Path
    manifest: Manifest
    gate: tuple[Finding, ...]

    @property
    def needed(self) -> int:
        return int(self.manifest.predicate["sites_needed"])

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "release": self.manifest.digest,
            "files": self.manifest.subjects,
            "sites_needed": self.needed,
            "statement": self.manifest.predicate["statement"]["sentence"],
            "warnings": self.manifest.predicate["warnings"],
            "gate": [finding.to_json() for finding in self.gate],
        }


def release(
    root: Path,
    out: Path | None = None,
    *,
    rehearsal: bool = False,
    accept_guessed: bool = False,
    progress: Progress = lambda _: None,
    clock: Callable[[], float] = time.time,
) -> Released:
    """Write the release of a finished run, signed by the coordinator; the sites sign afterwards.

    root: the run's folder, with the coordinator's key. out: a folder that does not exist or is empty (default
    RUN/release). Nothing is written when the gate says no: Refused RELEASE-AUDIT, RELEASE-REHEARSAL, RELEASE-GUESSED,
    RELEASE-THRESHOLD. UsageError RELEASE-EXISTS; Refused RELEASE-UNFINISHED.
    """
    folder = RunFolder(root=root)
    target = root / "release" if out is None else out
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            "RELEASE-EXISTS", "a release is never written over", where=(str(target),), hint="choose another --out"
        )
    result = _result(root)
    progress("auditing the run")
    audited = audit(root)
    gate = decide(
        result,
        audited,
        minimum_of(folder.study().release),
        rehearsal=rehearsal,
        accept_guessed=accept_guessed,
    )
    refuse(gate)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        progress("gathering the files")
        manifest = _build(folder, part, result, gate, audited, at=int(clock()), progress=progress)
        part.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Released(folder=target, manifest=manifest, gate=gate)


def _result(root: Path) -> dict[str, Any]:
    path = root / "result.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value["privacy"], dict) and isinstance(value["files"], dict):
            return dict(value)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Refused(
        "RELEASE-UNFINISHED", "this run has no result to release", where=(str(path),), hint="cohortium watch, or resume"
    )


def _build(
    folder: RunFolder,
    part: Path,
    result: dict[str, Any],
    gate: tuple[Finding, ...],
    audited: AuditReport,
    *,
    at: int,
    progress: Progress,
) -> Manifest:
    plan, study = folder.plan(), folder.study()
    books = read_books(folder)
    withheld = _write_result(part, result)
    for name in (*AUDITED, *result["files"]):
        _copy(folder.root, part, name)
    _write_ledgers(folder, part, plan, books)
    (part / "datapackage.json").write_text(
        json.dumps(data_package(study.schema, study.id, study.title), indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    progress("writing report and documents")
    rewrite_report(part)
    needed = signatures_needed(plan)
    facts = DocumentFacts(
        study=study,
        plan=plan,
        result=json.loads((part / "result.json").read_text(encoding="utf-8")),
        books={owner: book for owner, (book, _) in books.items()},
        gate=gate,
        keys=audited.keys,
        needed=needed,
        at=at,
        withheld=withheld,
    )
    write_documents(part, facts)
    progress("signing")
    predicate = {
        **folder_facts(part),
        "withheld": list(withheld),
        "gate": [finding.to_json() for finding in gate],
        "versions": versions(),
        "at": at,
    }
    manifest = Manifest.of(_listed(part), predicate)
    (part / SIGNATURES).mkdir()
    (part / ENVELOPE).write_bytes(sign_release(manifest, folder.key()).to_bytes())
    return manifest


def folder_facts(folder: Path) -> dict[str, Any]:
    """The part of the predicate that a release's own files give: written by `release`, held against by `verify`.

    Raises KeyError, TypeError or ValueError where a file does not hold what it should, OSError where it is missing.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    plan = Plan.loads((folder / "plan.json").read_bytes())
    places = {COORDINATOR: manifest["ledgers"][COORDINATOR], **manifest["ledgers"]["sites"]}
    keys = {COORDINATOR: manifest["public_keys"][COORDINATOR], **manifest["public_keys"]["sites"]}
    privacy = result["privacy"]
    return {
        "run": manifest["run"],
        "mode": result["facts"]["mode"],
        "study": {"id": plan.study, "title": result["study"]["title"], "sha256": plan.study_digest},
        "dictionary": {"file": "dictionary.json", "sha256": plan.dictionary_digest},
        "plan": {"file": "plan.json", "sha256": plan.digest},
        "keys": keys,
        "ledgers": {
            owner: {"file": places[owner], "size": head["size"], "hash": head["hash"]}
            for owner, head in result["ledgers"].items()
        },
        "silent": sorted(manifest.get("silent", [])),
        "statement": {
            "terms": privacy["statement"],
            "sentence": privacy["sentence"],
            "rehearsal": privacy["rehearsal"],
        },
        "warnings": list(result["warnings"]),
        "sites_needed": signatures_needed(plan),
    }


def signatures_needed(plan: Plan) -> int:
    """How many sites have to sign: t of a secure sum; in local mode, which trusts nobody, more than half."""
    return plan.survivors if plan.mode == "secure-sum" else len(plan.sites) // 2 + 1


def versions() -> dict[str, str]:
    """What made this release."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def data_package(schema: Schema, name: str, title: str) -> dict[str, Any]:
    """A Frictionless data package: the dictionary of the columns that are in the synthetic files, beside the files."""
    document = schema.to_dict()
    kept = {column.name for column in schema.modelled}
    table = {
        "fields": [field for field in document["fields"] if field["name"] in kept],
        "missingValues": [""],
    }
    about = {key: value for key, value in dict(schema.about).items() if key not in ("name", "title")}
    return {
        "profile": "tabular-data-package",
        "name": name,
        "title": title,
        **about,
        "resources": [
            {
                "profile": "tabular-data-resource",
                "name": "synthetic",
                "path": "synthetic.csv",
                "format": "csv",
                "encoding": "utf-8",
                "schema": table,
            }
        ],
    }


def _write_result(part: Path, result: Mapping[str, Any]) -> tuple[str, ...]:
    """result.json without what saw real rows; what was left out."""
    held = tuple(name for name in WITHHELD if result.get(name) is not None)
    simulation = result["facts"].get("mode") == "simulation"
    shown: dict[str, Any] = dict(result)
    if simulation:
        shown = {key: without_exact(value) for key, value in result.items() if key in RELEASED}
    if held and not simulation:  # no real row is at a coordinator: such figures come from nowhere
        raise CheckFailed("RELEASE-SCORES", "a deployment's result holds exact scores", where=("result.json:scores",))
    shown["scores"] = None
    if simulation:
        facts = dict(shown["facts"])
        facts["provenance"] = {k: v for k, v in facts["provenance"].items() if k != SCORED_ON}
        shown["facts"] = facts
    (part / "result.json").write_text(json.dumps(shown, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return held


def _write_ledgers(folder: RunFolder, part: Path, plan: Plan, books: Mapping[str, tuple[Book, str]]) -> None:
    """The ledgers under one roof, and the manifest that `cohortium audit` starts from."""
    old = json.loads((folder.root / "manifest.json").read_text(encoding="utf-8"))
    sources = {COORDINATOR: old["ledgers"][COORDINATOR], **old["ledgers"]["sites"]}
    keys = {COORDINATOR: old["public_keys"][COORDINATOR], **old["public_keys"]["sites"]}
    places: dict[str, str] = {}
    for owner in books:
        places[owner] = "run/ledger.jsonl" if owner == COORDINATOR else f"run/ledgers/{plain_name(owner)}.jsonl"
        lines = list(chain.read_jsonl(folder.root / sources[owner]))
        (part / places[owner]).parent.mkdir(parents=True, exist_ok=True)
        chain.write_jsonl(lines, part / places[owner])
    write_manifest(
        part,
        run=str(old["run"]),
        plan=plan,
        public_keys=keys,
        ledgers=places,
        silent=tuple(old.get("silent", ())),
    )


def _copy(source: Path, target: Path, name: str) -> None:
    """One file of the run; the audit has checked that the names lie inside it."""
    path = source / name
    if not path.is_file() or path.is_symlink():
        raise CheckFailed("RELEASE-FILE", "a file of the run is missing", where=(str(path),))
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target / name)


def _listed(part: Path) -> dict[str, str]:
    found = file_digests(part)
    wrong = [name for name, sha in found.items() if sha is None]
    if wrong:
        raise CheckFailed("RELEASE-FILE", "something in the folder is no plain file", where=(wrong[0],))
    return {name: sha for name, sha in found.items() if sha is not None}

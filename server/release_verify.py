"""`cohortium verify FOLDER`: whether a release is whole, true to its ledgers and signed, offline, by the folder alone.

    VERIFY-MANIFEST     release.json cannot be read, or says something that the folder's own files do not
    VERIFY-COORDINATOR  the coordinator's signature is missing or wrong
    VERIFY-SIGNATURE    a file in signatures/ is not its site's signature under this very release
    VERIFY-THRESHOLD    fewer sites signed than the plan wants
    VERIFY-ROWS         the synthetic rows were changed, are missing, or are not those of plan and dictionary
    VERIFY-REPORT       result.json or report.html was changed or is missing
    VERIFY-LEDGER       a ledger was changed, swapped or shortened, or does not back the result
    VERIFY-PLAN         study, plan, proposal or dictionary were changed, or do not belong together
    VERIFY-STATEMENT    the privacy statement is not what the ledgers give
    VERIFY-KEYS         a key is another than the coordinator proposed to the sites
    VERIFY-FILE         another file was changed or is missing
    VERIFY-EXTRA        a file that nobody signed, or something that is no plain file
    VERIFY-ROOT         a fingerprint that the reader knows is of no key that signed

What it trusts are the keys of those who signed, and it prints their fingerprints: with none of them known, a folder can
only be shown to agree with itself. `--root` names fingerprints that came by another way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import read_proposal
from cohortium.common.protocol.release_manifest import (
    ENVELOPE,
    SIGNATURES,
    Envelope,
    Manifest,
    file_digests,
    key_id,
    signature_file,
)
from cohortium.common.protocol.signing import fingerprint, public_from_raw
from cohortium.common.schema import Schema
from cohortium.server.audit import COORDINATOR, Check, audit
from cohortium.server.release import WITHHELD, folder_facts
from cohortium.server.release_gate import Finding

SHORTEST_FINGERPRINT = 32
"""Hex digits: 128 bits, what `cohortium audit` prints."""
_BY_FILE = (
    ("synthetic.", "VERIFY-ROWS"),
    ("result.json", "VERIFY-REPORT"),
    ("report.", "VERIFY-REPORT"),
    ("run/ledger", "VERIFY-LEDGER"),
    ("manifest.json", "VERIFY-LEDGER"),
    ("plan.json", "VERIFY-PLAN"),
    ("proposal.bin", "VERIFY-PLAN"),
    ("study.toml", "VERIFY-PLAN"),
    ("dictionary.json", "VERIFY-PLAN"),
)
_BY_CHECK = (
    ("file synthetic.", "VERIFY-ROWS"),
    ("file ", "VERIFY-FILE"),
    ("plan", "VERIFY-PLAN"),
    ("claim", "VERIFY-STATEMENT"),
    ("budget", "VERIFY-STATEMENT"),
    ("scores", "VERIFY-REPORT"),
    ("files", "VERIFY-REPORT"),
    ("keys", "VERIFY-KEYS"),
    ("", "VERIFY-LEDGER"),  # ledger, events, sites, agreement, claimed ledgers
)
_BY_FACT = {
    "plan": "VERIFY-PLAN",
    "dictionary": "VERIFY-PLAN",
    "study": "VERIFY-PLAN",
    "keys": "VERIFY-KEYS",
    "ledgers": "VERIFY-LEDGER",
    "silent": "VERIFY-LEDGER",
    "statement": "VERIFY-STATEMENT",
    "warnings": "VERIFY-STATEMENT",
    "sites_needed": "VERIFY-THRESHOLD",
}


@dataclass(kw_only=True, slots=True)
class Verified:
    """All findings in order. signers: who signed, fingerprint by name; needed: how many sites have to."""

    folder: str
    release: str = ""
    sentence: str = ""
    rehearsal: bool = False
    findings: list[Finding] = field(default_factory=list)
    signers: dict[str, str] = field(default_factory=dict)
    needed: int = 0
    epsilons: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.findings) and all(finding.ok for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of what is wrong, each once, in order."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings if not finding.ok))

    def add(self, code: str, name: str, ok: bool, detail: str) -> bool:
        self.findings.append(Finding(code=code, name=name, ok=ok, detail=detail))
        return ok

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "folder": self.folder,
            "release": self.release,
            "statement": self.sentence,
            "rehearsal": self.rehearsal,
            "codes": list(self.codes),
            "signers": self.signers,
            "sites_needed": self.needed,
            "epsilons": self.epsilons,
            "findings": [finding.to_json() for finding in self.findings],
        }


def verify(folder: Path, *, roots: Sequence[str] = ()) -> Verified:
    """Every check; one that cannot be made fails. No file of the folder is trusted, and none is written.

    roots: fingerprints that the reader knows, each "HEX" or "NAME=HEX", of 32 hex digits or more; each must be of a key
    that signed. Raises UsageError: VERIFY-FOLDER where there is no release at all, VERIFY-FINGERPRINT.
    """
    known = [_root(text) for text in roots]
    if not (folder / ENVELOPE).is_file():
        raise UsageError(
            "VERIFY-FOLDER",
            "this folder holds no release",
            where=(str(folder / ENVELOPE),),
            hint="name the folder that `cohortium release` wrote",
        )
    report = Verified(folder=str(folder))
    manifest = _manifest(report, folder)
    if manifest is None:
        return report
    _files(report, folder, manifest)
    _audited(report, folder, manifest)
    plan = _facts(report, folder, manifest)
    keys = _keys(report, manifest)
    _signatures(report, folder, manifest, keys)
    if plan is not None:
        _proposal(report, folder, plan, str(manifest.predicate.get("run")), keys)
        _rows(report, folder, plan)
    _roots(report, known, keys)
    return report


def _manifest(report: Verified, folder: Path) -> Manifest | None:
    try:
        manifest = Manifest.read(Envelope.read((folder / ENVELOPE).read_bytes()).payload)
        statement = manifest.predicate["statement"]
        report.sentence, report.rehearsal = str(statement["sentence"]), bool(statement["rehearsal"])
    except (OSError, CohortiumError, KeyError, TypeError) as error:
        detail = error.sentence if isinstance(error, CohortiumError) else "it lacks what every release says"
        report.add("VERIFY-MANIFEST", "manifest", False, detail)
        return None
    report.release = manifest.digest
    report.add("VERIFY-MANIFEST", "manifest", True, f"release {manifest.digest[:16]}…, {len(manifest.subjects)} files")
    return manifest


def _files(report: Verified, folder: Path, manifest: Manifest) -> None:
    """Every signed file is there with its digest, and nothing else is."""
    found = file_digests(folder)
    changed = 0
    for name, sha in manifest.subjects.items():
        code = _code(_BY_FILE, name, "VERIFY-FILE")
        if name not in found or found[name] is None:
            changed += 1
            report.add(code, f"file {name}", False, "it is missing or cannot be read")
        elif found[name] != sha:
            changed += 1
            report.add(
                code, f"file {name}", False, f"it was changed: SHA-256 {str(found[name])[:16]}…, signed {sha[:16]}…"
            )
    if not changed:
        report.add("VERIFY-FILE", "files", True, f"{len(manifest.subjects)} files have the signed SHA-256")
    for name in sorted(set(found) - set(manifest.subjects)):
        report.add("VERIFY-EXTRA", f"file {name}", False, "nobody signed it")


def _audited(report: Verified, folder: Path, manifest: Manifest) -> None:
    """The ledgers again, line by line, and every ε from them (server/audit)."""
    try:
        audited = audit(folder)
    except CohortiumError as error:
        report.add("VERIFY-LEDGER", "audit", False, error.sentence)
        return
    report.epsilons = audited.epsilons
    # The study's ledger signed the exact scores too; where they were withheld, this manifest signs result.json instead.
    withheld = manifest.predicate.get("withheld") == list(WITHHELD) and _has_no_scores(folder)
    bad = {check.name for check in audited.checks if not check.ok}
    # What cannot be held against a broken ledger or plan is no fault of its own.
    broken = any(name.startswith("ledger ") or name == "keys" for name in bad)
    follow = {"claimed ε", "claimed ledgers", "files", "scores"} if broken else set()
    follow |= {"claimed ε"} if "plan" in bad else set()
    follow |= {"scores"} if withheld else set()
    checks = [check for check in audited.checks if check.name not in follow]
    for check in checks:
        if not check.ok:
            report.add(_check_code(check), f"audit: {check.name}", False, check.detail)
    if all(check.ok for check in checks):
        report.add("VERIFY-LEDGER", "audit", True, f"{len(checks)} checks of ledgers, ε and claims hold")


def _has_no_scores(folder: Path) -> bool:
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result["scores"] is None and result["facts"]["mode"] == "simulation"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _facts(report: Verified, folder: Path, manifest: Manifest) -> Plan | None:
    """The manifest says what the folder's files say, and the threshold is the plan's."""
    try:
        own = folder_facts(folder)
        plan = Plan.loads((folder / "plan.json").read_bytes())
    except (OSError, CohortiumError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        report.add("VERIFY-MANIFEST", "facts", False, "the folder's files cannot be read")
        return None
    report.needed = int(own["sites_needed"])
    wrong = [name for name, value in own.items() if manifest.predicate.get(name) != value]
    for name in wrong:
        code = _BY_FACT.get(name, "VERIFY-MANIFEST")
        report.add(code, f"manifest: {name}", False, "the manifest and the folder's files differ in it")
    if not wrong:
        report.add("VERIFY-MANIFEST", "facts", True, "plan, keys, ledgers and statement are those of the files")
    return plan


def _keys(report: Verified, manifest: Manifest) -> dict[str, Ed25519PublicKey]:
    try:
        given = manifest.predicate["keys"]
        found = {str(owner): public_from_raw(bytes.fromhex(key)) for owner, key in given.items()}
        if COORDINATOR not in found or len(set(given.values())) != len(given):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, CohortiumError):
        report.add("VERIFY-KEYS", "keys", False, "the manifest does not give each signer one key of its own")
        return {}
    return found


def _signatures(report: Verified, folder: Path, manifest: Manifest, keys: dict[str, Ed25519PublicKey]) -> None:
    coordinator = keys.get(COORDINATOR)
    signed = coordinator is not None and _signed(folder / ENVELOPE, manifest, coordinator)
    report.add(
        "VERIFY-COORDINATOR",
        "coordinator's signature",
        signed,
        "verified" if signed else "it is missing or does not fit: the manifest is not the coordinator's",
    )
    if signed and coordinator is not None:
        report.signers[COORDINATOR] = fingerprint(coordinator)
    places = {signature_file(owner): owner for owner in keys if owner != COORDINATOR}
    there = sorted(path.relative_to(folder).as_posix() for path in (folder / SIGNATURES).rglob("*"))
    for name in there:
        owner = places.get(name)
        if owner is None:
            report.add("VERIFY-SIGNATURE", name, False, "the signature of no site of this plan")
        elif not _signed(folder / name, manifest, keys[owner]):
            report.add("VERIFY-SIGNATURE", name, False, f"{owner} did not sign this release")
        else:
            report.signers[owner] = fingerprint(keys[owner])
    sites = [owner for owner in report.signers if owner != COORDINATOR]
    detail = f"{len(sites)} of {len(places)} sites signed, {report.needed} are needed"
    report.add("VERIFY-THRESHOLD", "sites' signatures", 0 < report.needed <= len(sites), detail)


def _signed(path: Path, manifest: Manifest, public: Ed25519PublicKey) -> bool:
    try:
        if path.is_symlink():
            return False
        envelope = Envelope.read(path.read_bytes())
    except (OSError, CohortiumError):
        return False
    return envelope.payload == manifest.payload and envelope.signed_by(public)


def _proposal(report: Verified, folder: Path, plan: Plan, run: str, keys: dict[str, Ed25519PublicKey]) -> None:
    """The coordinator proposed this plan, this dictionary and these keys to the sites before anything was asked."""
    try:
        proposal = read_proposal((folder / "proposal.bin").read_bytes(), keys[COORDINATOR])
        schema = Schema.load(folder / "dictionary.json")
    except (OSError, KeyError, CohortiumError) as error:
        why = error.sentence if isinstance(error, CohortiumError) else "it cannot be read"
        report.add("VERIFY-PLAN", "proposal", False, f"proposal or dictionary: {why}")
        return
    same = (proposal.run, proposal.plan.digest) == (run, plan.digest)
    report.add("VERIFY-PLAN", "proposal", same, "of this run and plan" if same else "of another run or plan")
    same = schema.digest() == plan.dictionary_digest
    report.add("VERIFY-PLAN", "dictionary", same, "the plan's" if same else "not the dictionary that the plan names")
    same = proposal.identities == {owner: key for owner, key in keys.items() if owner != COORDINATOR}
    report.add("VERIFY-KEYS", "keys", same, "as proposed to the sites" if same else "not those proposed to the sites")


def _rows(report: Verified, folder: Path, plan: Plan) -> None:
    """The Parquet file has the plan's rows and the dictionary's columns. That the CSV says the same is signed."""
    try:
        with pq.ParquetFile(folder / "synthetic.parquet") as file:
            rows, names = file.metadata.num_rows, list(file.schema_arrow.names)
        wanted = [column.name for column in Schema.load(folder / "dictionary.json").modelled]
    except (OSError, pa.ArrowException, CohortiumError):
        report.add("VERIFY-ROWS", "rows", False, "synthetic.parquet or the dictionary cannot be read")
        return
    ok = rows == plan.rows and names == wanted
    report.add(
        "VERIFY-ROWS", "rows", ok, f"{rows:,} rows of {len(names)} columns; planned {plan.rows:,} of {len(wanted)}"
    )


def _roots(report: Verified, known: Sequence[tuple[str, str]], keys: dict[str, Ed25519PublicKey]) -> None:
    for name, digits in known:
        match = [
            owner
            for owner in report.signers
            if owner in keys and key_id(keys[owner]).startswith(digits) and name in ("", owner)
        ]
        who = name or "a known key"
        detail = f"{match[0]} signed with the key that you know" if match else "no signature is of that key"
        report.add("VERIFY-ROOT", f"{who} {digits[:8]}…", bool(match), detail)


def _root(text: str) -> tuple[str, str]:
    name, _, digits = text.rpartition("=")
    plain = digits.replace(" ", "").replace(":", "").lower()
    if not SHORTEST_FINGERPRINT <= len(plain) <= 64 or not set(plain) <= set("0123456789abcdef"):
        raise UsageError(
            "VERIFY-FINGERPRINT",
            f"a fingerprint has {SHORTEST_FINGERPRINT} to 64 hex digits",
            hint='--root "north=ab12 cd34 …", as `cohortium audit` or `cohortium site init` print it',
        )
    return name, plain


def _check_code(check: Check) -> str:
    if check.name == "claimed ledgers":
        return "VERIFY-LEDGER"
    return _code(_BY_CHECK, check.name, "VERIFY-LEDGER")


def _code(table: Sequence[tuple[str, str]], name: str, default: str) -> str:
    return next((code for start, code in table if name.startswith(start)), default)

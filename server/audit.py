"""`cohortium audit DIR`: recompute a study's guarantee from its files alone, offline, on any laptop.

    manifest.json   format, run, plan {file, sha256}, public_keys and ledgers {coordinator, sites {name}}; silent:
                    sites of a consortium's run that never sent a ledger line, if any
    plan.json       the plan; its digest is that of its canonical JSON, and stands in every charge
    ledgers         exported JSONL (or the SQLite file itself): one of the study, one of each site
    result.json     what the study claims: privacy {delta, prices, statement}, ledgers {heads}, files {sha256}

The audit trusts nothing but the public keys in the manifest, whose fingerprints it prints so that a reader
can compare them with those that the hospitals announce. It shares the chain's rules and the accountant with
the writer, and no other code of the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.accountant import prices
from cohortium.common.privacy.budget import Event, Statement
from cohortium.common.privacy.chain import PUBLISHED, REHEARSAL, Book, Entry, Line
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import canonical

FORMAT = "cohortium-manifest/1"
REHEARSED = (
    "NOT PRIVATE: a rehearsal, whose noise is off or can be computed from its seed. With fresh noise it would be: "
)
COORDINATOR = "coordinator"
SAID = ("evaluation", "exact_evaluation", "verdicts", "rehearsal_audit")
"""What a result says beside scores and warnings, where it says it: all of it is signed in the study's ledger."""
EXACT = "exact"
"""Whatever stands under a name that begins so, at any depth of a simulation's result, saw real rows without noise."""
TOLERANCE = 1e-6
"""Relative: two machines' FFTs differ by less, and no claim is worth more digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at. detail says what was found, in a sentence for people."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(kw_only=True, slots=True)
class AuditReport:
    """All checks in order. epsilons: recomputed, as `accountant.prices` lists them. keys: fingerprints."""

    directory: str
    checks: list[Check] = field(default_factory=list)
    epsilons: list[dict[str, Any]] = field(default_factory=list)
    delta: float | None = None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def add(self, name: str, ok: bool, detail: str) -> bool:
        self.checks.append(Check(name=name, ok=ok, detail=detail))
        return ok

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "directory": self.directory,
            "delta": self.delta,
            "epsilons": self.epsilons,
            "keys": self.keys,
            "checks": [check.to_json() for check in self.checks],
        }


def audit(directory: Path) -> AuditReport:
    """Run every check; one that cannot be made fails. Raises UsageError only when there is no manifest."""
    directory = Path(directory)
    report = AuditReport(directory=str(directory))
    manifest = _manifest(directory)
    plan = _check_plan(report, directory, manifest)
    books = _check_ledgers(report, directory, manifest)
    if plan is not None and books:
        run = str(manifest.get("run", ""))
        _check_events(report, plan, run, books, _silent(manifest))
        _check_agreement(report, plan, run, books)
        _recompute(report, plan, run, books)
    _check_claims(report, directory, plan, str(manifest.get("run", "")), books)
    _check_files(report, directory, str(manifest.get("run", "")), books)
    return report


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    manifest = _read_json(path)
    if manifest is None or manifest.get("format") != FORMAT:
        raise UsageError(
            "AUDIT-MANIFEST",
            "this folder holds no manifest of a finished study",
            where=(str(path),),
            hint="name the folder that `cohortium simulate --out` wrote, or runs/RUN of a consortium's run",
        )
    return manifest


def _check_plan(report: AuditReport, directory: Path, manifest: dict[str, Any]) -> Plan | None:
    entry = manifest.get("plan")
    claimed = entry.get("sha256") if isinstance(entry, dict) else None
    name = entry.get("file", "plan.json") if isinstance(entry, dict) else "plan.json"
    value = _read_json(_inside(directory, name))
    try:
        if value is None:
            raise CheckFailed("AUDIT-PLAN", "the plan cannot be read")
        plan = Plan.from_json(value)
    except CohortiumError as error:
        report.add("plan", False, error.sentence)
        return None
    report.add("plan", plan.digest == claimed, f"plan {plan.digest[:16]}… has the digest that the manifest names")
    return plan if plan.digest == claimed else None


def _check_ledgers(report: AuditReport, directory: Path, manifest: dict[str, Any]) -> dict[str, tuple[Book, str]]:
    """owner -> (book, head hash) of each ledger that verifies, the coordinator's first."""
    keys, files = manifest.get("public_keys"), manifest.get("ledgers")
    sites = keys.get("sites") if isinstance(keys, dict) else None
    if not (isinstance(keys, dict) and isinstance(sites, dict) and isinstance(files, dict)) or COORDINATOR in sites:
        report.add("keys", False, "the manifest does not list public keys and ledgers")
        return {}
    owners = {COORDINATOR: keys.get("coordinator"), **sites}
    named = files.get("sites") if isinstance(files.get("sites"), dict) else {}
    places = {COORDINATOR: files.get("coordinator", "run/ledger.jsonl"), **(named or {})}
    books: dict[str, tuple[Book, str]] = {}
    silent = _silent(manifest) & set(sites)
    for owner, key in owners.items():
        if owner in silent:
            # Nothing is taken on trust: every release that was used needs its survivors' lines in the other ledgers.
            report.add(f"ledger {owner}", True, "no line of it was ever seen: it had no part in the result")
            continue
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(key)))
            report.keys[owner] = fingerprint(public)
            path = _inside(directory, places.get(owner, f"sites/{owner}/ledger.jsonl"))
            book, head = chain.replay(_lines(path), owner=owner, public=public)
        except CohortiumError as error:
            report.add(f"ledger {owner}", False, f"{error.code}: {error.sentence}")
        except ValueError:
            report.add(f"ledger {owner}", False, "its public key is not an Ed25519 key")
        else:
            books[owner] = (book, head)
            report.add(f"ledger {owner}", True, f"{book.size} lines, chain and every signature verified")
    return books if len(books) == len(owners) - len(silent) else {}


def _silent(manifest: dict[str, Any]) -> set[str]:
    named = manifest.get("silent", [])
    return {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()


def _check_events(
    report: AuditReport, plan: Plan, run: str, books: dict[str, tuple[Book, str]], silent: set[str]
) -> None:
    """Every charge is a release of the plan, with the plan's mechanism, under the plan's digest."""
    for owner, (book, _) in books.items():
        wrong = [
            f"release {entry.release}: {why}" for entry in _entries(book, run) if (why := _not_in_plan(plan, entry))
        ]
        count = len(_entries(book, run))
        detail = f"{count} charges, each as the plan says"
        if others := len(book.entries) - count:
            detail += f"; {others} charges of other runs are not part of this study"
        report.add(f"events {owner}", not wrong, wrong[0] if wrong else detail)
    missing = sorted(set(plan.sites) ^ ((set(books) - {COORDINATOR}) | silent))
    report.add("sites", not missing, f"not in both ledgers and plan: {missing}" if missing else "as planned")


def _not_in_plan(plan: Plan, entry: Entry) -> str:
    try:
        stage = plan.stage_of(_index(entry))
    except (CohortiumError, ValueError):
        return "the plan has no such release"
    if entry.plan != plan.digest:
        return "it was charged under another plan"
    if (entry.event, entry.count) != (stage.event, stage.steps):
        return f"it ran {entry.event} × {entry.count}, planned was {stage.event} × {stage.steps}"
    return ""


def _check_agreement(report: AuditReport, plan: Plan, run: str, books: dict[str, tuple[Book, str]]) -> None:
    """What the study used, enough sites had sealed; in a secure sum they all signed one survivor set."""
    sites = {owner: book for owner, (book, _) in books.items() if owner != COORDINATOR}
    needed = plan.survivors if plan.mode == "secure-sum" else 1
    used = [entry for entry in _entries(books[COORDINATOR][0], run) if entry.state == "RELEASED"]
    wrong: list[str] = []
    for entry in used:
        there = [e for book in sites.values() if (e := book.entries.get((run, entry.release)))]
        if sum(e.state in ("SEALED", "UNMASKED", "RELEASED") for e in there) < needed:
            wrong.append(f"release {entry.release} was used, but fewer than {needed} sites sealed it")
        ballots = {e.ballot for e in [*there, entry] if e.ballot}
        if len(ballots) > 1:
            wrong.append(f"release {entry.release}: the sites signed {len(ballots)} different survivor sets")
    study = {entry.release for entry in _entries(books[COORDINATOR][0], run)}
    for owner, book in sites.items():
        extra = [e.release for e in _entries(book, run) if e.release not in study]
        if extra:
            wrong.append(f"{owner} charged release {extra[0]}, which the study's ledger does not know")
    if not used:
        wrong.append(f"the study's ledger holds no finished release of run {run!r}")
    report.add("agreement", not wrong, wrong[0] if wrong else f"{len(used)} releases, backed by the sites")


def _recompute(report: AuditReport, plan: Plan, run: str, books: dict[str, tuple[Book, str]]) -> None:
    """Epsilons of what was charged against the plan's budget."""
    report.delta = plan.delta
    report.epsilons = spent_prices(plan, run, [book for book, _ in books.values()])
    spent = _epsilon(report.epsilons, "add-remove", plan.hospitals)
    for row in report.epsilons:
        where = "1 hospital" if row["hospitals"] == 1 else f"{row['hospitals']} hospitals"
        report.add(f"ε {row['relation']}, {where}", True, f"{row['epsilon']} at δ = {plan.delta:g}, from the ledgers")
    detail = f"ε = {spent:.6g} spent of {plan.epsilon:g} (patient in {plan.hospitals}) at δ = {plan.delta:g}"
    report.add("budget", spent <= plan.epsilon * (1 + TOLERANCE), detail)


def spent_prices(plan: Plan, run: str, books: Sequence[Book]) -> list[dict[str, Any]]:
    """Every printed epsilon of what these ledgers charged to a run; the dearest ledger and part count."""
    charged = [
        _grouped([(entry.event, entry.count) for entry in _entries(book, run) if _part(plan, entry) == part])
        for book in books
        for part in ("train", "holdout")
    ]
    return prices(charged, delta=plan.delta, hospitals=sorted({1, 2, 3, plan.hospitals}))


def claims(plan: Plan, run: str, ledgers: Mapping[str, tuple[Book, str]]) -> dict[str, Any]:
    """The sections `privacy` and `ledgers` of result.json. ledgers: owner -> (book, head hash)."""
    rows = spent_prices(plan, run, [book for book, _ in ledgers.values()])
    rehearsal = rehearsed(run, [book for book, _ in ledgers.values()])
    statement = plan.statement(epsilon=_epsilon(rows, "add-remove", plan.hospitals))
    return {
        "privacy": {
            "delta": plan.delta,
            "prices": rows,
            "statement": statement.to_json(),
            "rehearsal": rehearsal,
            "sentence": (REHEARSED if rehearsal else "") + statement.sentence(),
        },
        "ledgers": {owner: {"size": book.size, "hash": head} for owner, (book, head) in ledgers.items()},
    }


def rehearsed(run: str, books: Sequence[Book]) -> bool:
    """Whether any ledger says that the run's noise was off or came from a seed."""
    return any(n["about"] == REHEARSAL and n["fields"].get("run") == run for book in books for n in book.notes)


def _grouped(events: list[tuple[Event, int]]) -> list[tuple[Event, int]]:
    counts: dict[Event, int] = {}
    for event, count in events:
        counts[event] = counts.get(event, 0) + count
    return list(counts.items())


def _check_claims(
    report: AuditReport, directory: Path, plan: Plan | None, run: str, books: dict[str, tuple[Book, str]]
) -> None:
    """result.json says nothing about privacy or ledgers that the ledgers do not show."""
    result = _read_json(directory / "result.json")
    if result is None:
        report.add("claims", False, "result.json is missing or cannot be read")
        return
    privacy = result.get("privacy")
    if not isinstance(privacy, dict) or plan is None or not report.epsilons:
        report.add("claimed ε", False, "there is no claim, or nothing to hold it against")
    else:
        wrong = _wrong_prices(report, plan, privacy, rehearsal=rehearsed(run, [book for book, _ in books.values()]))
        report.add("claimed ε", not wrong, wrong or "every epsilon and the statement are what the ledgers give")
    claimed = result.get("ledgers")
    heads = {owner: {"size": book.size, "hash": head} for owner, (book, head) in books.items()}
    ok = bool(heads) and claimed == heads
    report.add("claimed ledgers", ok, "heads as recorded" if ok else "result.json names other ledger heads")


def _check_files(report: AuditReport, directory: Path, run: str, books: dict[str, tuple[Book, str]]) -> None:
    """The published files are those whose digests the coordinator signed; result.json names the same."""
    files = (_read_json(directory / "result.json") or {}).get("files")
    if not isinstance(files, dict) or not files:
        report.add("files", False, "result.json does not list the published files")
        return
    signed = [note["fields"] for note in books[COORDINATOR][0].noted(PUBLISHED, run)] if books else []
    ok = bool(signed) and signed[-1].get("files") == files
    report.add("files", ok, "listed and signed in the study's ledger" if ok else "not those signed in the ledger")
    result = _read_json(directory / "result.json") or {}
    if "scores" in result or (signed and "said" in signed[-1]):
        ok, detail = _as_signed(result, signed[-1]) if signed else (False, "nothing was signed")
        report.add("scores", ok, detail)
    for name, digest in sorted(files.items()):
        try:
            found = _sha256(_inside(directory, name))
        except (OSError, CheckFailed):
            report.add(f"file {name}", False, "it cannot be read")
            continue
        same = found == digest
        report.add(f"file {name}", same, f"SHA-256 {found[:16]}…, {'as' if same else 'not as'} recorded")


def _as_signed(result: Mapping[str, Any], note: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether scores, figures and warnings are those of the ledger's note, and what was found."""
    try:
        if note.get("said") == said_digest(result):
            return True, "scores and warnings as signed"
        if _is_bare(result) and note.get("bare") == bare_digest(result):
            # A release of a simulation: figures that saw real rows were left out, as the same note foresaw.
            return True, "scores and warnings as signed, without those that saw real rows"
    except RecursionError:
        pass
    return False, "scores or warnings are not those signed"


def said_digest(result: Mapping[str, Any]) -> str:
    """Names the scores, figures and warnings of a result.json: SHA-256 of their JSON with sorted keys."""
    said = {name: result.get(name) for name in ("scores", "warnings")}
    # Absent from a result of an earlier version.
    said |= {name: result[name] for name in SAID if result.get(name) is not None}
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def bare_digest(result: Mapping[str, Any]) -> str:
    """`said_digest` of what a release may say: no exact scores, and nothing whose name begins with "exact"."""
    said = {name: without_exact(result.get(name)) for name in ("warnings", *SAID) if not name.startswith(EXACT)}
    return said_digest({"scores": None, **said})


def without_exact(value: Any) -> Any:
    """A JSON value without what compares with real rows and has no noise: keys that begin with EXACT."""
    if isinstance(value, dict):
        return {key: without_exact(item) for key, item in value.items() if not str(key).startswith(EXACT)}
    return [without_exact(item) for item in value] if isinstance(value, list) else value


def _is_bare(result: Mapping[str, Any]) -> bool:
    """Nothing is there that a release leaves out: figures put back afterwards do not pass as left out."""
    evaluation = result.get("evaluation")
    exact = result.get("scores") is not None or result.get("exact_evaluation") is not None
    return not exact and without_exact(evaluation) == evaluation


def _wrong_prices(report: AuditReport, plan: Plan, privacy: dict[str, Any], *, rehearsal: bool) -> str:
    """The first claim that is wrong, or ""."""
    try:
        claims = {(row["relation"], row["hospitals"]): _number(row["epsilon"]) for row in privacy["prices"]}
        statement = Statement.from_json(privacy["statement"])
        delta = _number(privacy["delta"])
    except (KeyError, TypeError, ValueError, CohortiumError):
        return "privacy needs `delta`, `prices` and `statement`"
    for row in report.epsilons:
        claim, actual = claims.get((row["relation"], row["hospitals"])), _number(row["epsilon"])
        if claim is None or not _close(claim, actual):
            kind = f"{row['relation']}, {row['hospitals']} hospitals"
            return f"{kind}: claimed {claim}, the ledgers give {actual:.6g}"
    spent = _epsilon(report.epsilons, "add-remove", plan.hospitals)
    sentence = (REHEARSED if rehearsal else "") + statement.sentence()
    if privacy.get("rehearsal") is not rehearsal or privacy.get("sentence") != sentence:
        return "the sentence is not that of the statement, or a rehearsal is not called one"
    if (
        statement != plan.statement(epsilon=statement.epsilon)
        or delta != plan.delta
        or not _close(statement.epsilon, spent)
    ):
        return "the statement is not that of the plan and the ledgers"
    return ""


def fingerprint(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw key in groups of four, to be read out on the telephone."""
    text = hashlib.sha256(public.public_bytes_raw()).hexdigest()[:32]
    return " ".join(text[at : at + 4] for at in range(0, 32, 4))


def _entries(book: Book, run: str) -> list[Entry]:
    return [entry for entry in book.entries.values() if entry.run == run]


def _index(entry: Entry) -> int:
    """A release's index in the plan, which is its name in the ledgers, spelled in one way only."""
    index = int(entry.release)
    if str(index) != entry.release:
        raise ValueError("another spelling")
    return index


def _part(plan: Plan, entry: Entry) -> str:
    """Training or held out; a release unknown to the plan counts as training (its check fails anyway)."""
    try:
        return plan.stage_of(_index(entry)).part
    except (CohortiumError, ValueError):
        return "train"


def _epsilon(rows: list[dict[str, Any]], relation: str, hospitals: int) -> float:
    for row in rows:
        if (row["relation"], row["hospitals"]) == (relation, hospitals):
            return _number(row["epsilon"])
    return math.inf


def _number(value: Any) -> float:
    return math.inf if value == "inf" else float(value)


def _close(first: float, second: float) -> bool:
    return first == second or abs(first - second) <= TOLERANCE * max(abs(first), abs(second))


def _lines(path: Path) -> list[Line]:
    if path.suffix == ".db":
        return Ledger.open(path).lines()
    return list(chain.read_jsonl(path))


def _inside(directory: Path, name: Any) -> Path:
    """A file of the folder; a name that leads out of it is refused."""
    path = (directory / str(name)).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise CheckFailed("AUDIT-PATH", "a file name that leads out of the folder")
    return path


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    directory: Path,
    *,
    run: str,
    plan: Plan,
    public_keys: dict[str, str],
    ledgers: dict[str, str],
    silent: Sequence[str] = (),
) -> None:
    """What `audit` starts from. public_keys, ledgers: owner -> hex key, file inside the folder.

    silent: sites that never sent a ledger line; they have a key and no ledger.
    """
    manifest = {
        "format": FORMAT,
        "run": run,
        "plan": {"file": "plan.json", "sha256": plan.digest},
        "public_keys": _split(public_keys),
        "ledgers": _split(ledgers),
    }
    if silent:
        manifest["silent"] = sorted(silent)
    (Path(directory) / "manifest.json").write_bytes(canonical(manifest) + b"\n")


def _split(by_owner: dict[str, str]) -> dict[str, Any]:
    sites = {owner: value for owner, value in by_owner.items() if owner != COORDINATOR}
    return {COORDINATOR: by_owner[COORDINATOR], "sites": sites}

"""`cohortium site sign`: a site's signature under a release, after the site has held it against what it knows itself.

A site signs nothing on the coordinator's word. Its own approval names the plan and all keys; its own ledger names what
it was asked; the other ledgers lie in the folder and are replayed with the keys that the officer approved. Only then
does the identity key sign, for this one release. Nothing of the site but 64 bytes gets into the folder.

    SITE/guard/{site.toml,site.key,ledger.db,approved/RUN/}    a hospital's directory; a simulation's site has no guard/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.client.policy import Policy
from cohortium.common.errors import CheckFailed, CohortiumError, ProtocolError, Refused, UsageError
from cohortium.common.modes import refuse_open
from cohortium.common.privacy import chain
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.budget import Event, Statement
from cohortium.common.privacy.chain import PUBLISHED, REHEARSAL, Book, Entry
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import COORDINATOR, Proposal, is_run_id, read_proposal
from cohortium.common.protocol.certificates import write_file
from cohortium.common.protocol.release_manifest import (
    ENVELOPE,
    Envelope,
    Manifest,
    file_digests,
    is_inside,
    sign_release,
    signature_file,
)
from cohortium.common.protocol.signing import fingerprint, load_private, public_from_raw

TOLERANCE = 1e-6
"""Relative, as in the audit: two machines' FFTs differ by less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseSigned:
    """What a site stands for now. checks: what was looked at before, in words."""

    site: str
    run: str
    release: str
    key: str
    file: Path
    sentence: str
    checks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "run": self.run,
            "release": self.release,
            "key": self.key,
            "file": str(self.file),
            "statement": self.sentence,
            "checks": list(self.checks),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseChecked:
    """A release that this site may sign."""

    guard: Path
    policy: Policy
    manifest: Manifest
    proposal: Proposal
    sentence: str
    rehearsal: bool
    checks: tuple[str, ...]


def check_release(directory: Path, folder: Path) -> ReleaseChecked:
    """Hold a release against this site's approval, key and ledger. Reads no record and writes nothing.

    Raises CheckFailed or Refused: RELEASE-COORDINATOR (not signed by the coordinator whom site.toml names),
    RELEASE-FILE (a file is not as signed), RELEASE-APPROVAL (this site approved no such run), RELEASE-PLAN,
    RELEASE-KEY, RELEASE-LEDGER (a ledger, or this site's part in it), RELEASE-STATEMENT, RELEASE-ROWS.
    """
    guard = directory / "guard" if (directory / "guard").is_dir() else directory
    policy = Policy.load(guard / "site.toml")
    manifest = _manifest(folder, policy)
    _same_files(folder, manifest)
    facts = manifest.predicate
    proposal = _approved(guard, policy, str(facts.get("run", "")))
    _same_plan(folder, facts, proposal)
    key = load_private(guard / "site.key").public_key()
    if key != proposal.identities.get(policy.name):
        raise Refused(
            "RELEASE-KEY",
            "this site's key is not the one under which it took part in this run",
            hint="after a change of keys the sites that kept theirs sign",
        )
    books = _ledgers(folder, facts, proposal, public_from_raw(bytes.fromhex(policy.coordinator_key)))
    charged = _own_ledger(guard, policy, facts, proposal, books)
    sentence, rehearsal = _statement(facts, proposal, books)
    _published(books[COORDINATOR], proposal.run, manifest)
    return ReleaseChecked(
        guard=guard,
        policy=policy,
        manifest=manifest,
        proposal=proposal,
        sentence=sentence,
        rehearsal=rehearsal,
        checks=(
            f"release {manifest.digest[:16]}… of run {proposal.run}, signed by the coordinator",
            f"{len(manifest.subjects)} files have the signed SHA-256",
            f"plan {proposal.plan.digest[:16]}… is the one that this site's officer approved",
            f"{charged} charges of the run in this site's ledger, and its head is in the release",
            f"{len(books)} ledgers verified with the approved keys",
            "the privacy statement is what these ledgers give",
        ),
    )


def endorse(checked: ReleaseChecked, folder: Path, out: Path | None = None) -> ReleaseSigned:
    """Put this site's signature into the folder, or into `out` where the folder is a copy that cannot be written."""
    refuse_open(checked.guard / "site.key")
    key = load_private(checked.guard / "site.key")
    name = checked.policy.name
    path = folder / signature_file(name) if out is None else out
    path.parent.mkdir(exist_ok=True)
    write_file(path, sign_release(checked.manifest, key).to_bytes(), 0o644)
    return ReleaseSigned(
        site=name,
        run=checked.proposal.run,
        release=checked.manifest.digest,
        key=fingerprint(key.public_key()),
        file=path,
        sentence=checked.sentence,
        checks=checked.checks,
    )


def _manifest(folder: Path, policy: Policy) -> Manifest:
    try:
        envelope = Envelope.read((folder / ENVELOPE).read_bytes())
    except OSError:
        raise UsageError(
            "RELEASE-FOLDER",
            "this folder holds no release",
            where=(str(folder / ENVELOPE),),
            hint="name the folder that the coordinator handed over",
        ) from None
    if not envelope.signed_by(public_from_raw(bytes.fromhex(policy.coordinator_key))):
        raise CheckFailed(
            "RELEASE-COORDINATOR",
            "this release is not signed by the coordinator that this site knows",
            hint="compare coordinator_key in site.toml with the coordinator by telephone",
        )
    return Manifest.read(envelope.payload)


def _same_files(folder: Path, manifest: Manifest) -> None:
    found = file_digests(folder)
    for name in sorted(set(found) | set(manifest.subjects)):
        if name not in manifest.subjects:
            raise CheckFailed("RELEASE-FILE", "a file of the folder is not in its manifest", where=(name,))
        if found.get(name) != manifest.subjects[name]:
            raise CheckFailed(
                "RELEASE-FILE",
                "a file of the release is not the one that the coordinator signed",
                where=(name,),
                hint="fetch the folder again; do not sign this one",
            )


def _approved(guard: Path, policy: Policy, run: str) -> Proposal:
    """The proposal that was approved here. It may have expired, or been taken back, since the run."""
    path = guard / "approved" / run / "proposal.bin"
    if not is_run_id(run) or not path.is_file():
        raise Refused("RELEASE-APPROVAL", "this site approved no such run", hint="cohortium site ledger lists its runs")
    proposal = read_proposal(path.read_bytes(), public_from_raw(bytes.fromhex(policy.coordinator_key)))
    if proposal.run != run:
        raise Refused("RELEASE-APPROVAL", "the proposal that lies here is for another run")
    return proposal


def _same_plan(folder: Path, facts: Mapping[str, Any], proposal: Proposal) -> None:
    plan = proposal.plan
    keys = {owner: key.public_bytes_raw().hex() for owner, key in proposal.identities.items()}
    given = facts.get("keys")
    told = {owner: key for owner, key in given.items() if owner != COORDINATOR} if isinstance(given, dict) else {}
    named, dictionary = facts.get("plan"), facts.get("dictionary")
    ok = isinstance(named, dict) and named.get("sha256") == plan.digest
    ok = ok and isinstance(dictionary, dict) and dictionary.get("sha256") == plan.dictionary_digest
    try:
        ok = ok and Plan.loads((folder / "plan.json").read_bytes()).digest == plan.digest
        ok = ok and (folder / "proposal.bin").read_bytes() == proposal.envelope
    except (OSError, CohortiumError):
        ok = False
    if not ok:
        raise CheckFailed("RELEASE-PLAN", "the release names another plan than the one that was approved here")
    if told != keys:
        raise CheckFailed("RELEASE-PLAN", "the release names other sites' keys than those that were approved here")
    wanted = plan.survivors if plan.mode == "secure-sum" else len(plan.sites) // 2 + 1
    if facts.get("sites_needed") != wanted:
        raise CheckFailed("RELEASE-PLAN", f"the release asks for another number of signatures than {wanted}")


def _ledgers(
    folder: Path, facts: Mapping[str, Any], proposal: Proposal, coordinator: Ed25519PublicKey
) -> dict[str, Book]:
    """Every ledger of the folder, replayed with the approved keys, as long as the manifest says."""
    named = facts.get("ledgers")
    keys = {COORDINATOR: coordinator, **proposal.identities}
    silent = facts.get("silent")
    if not isinstance(named, dict) or not isinstance(silent, list) or COORDINATOR not in named:
        raise CheckFailed("RELEASE-LEDGER", "the release does not list its ledgers")
    if set(named) | set(map(str, silent)) != set(keys) or set(named) & set(map(str, silent)):
        raise CheckFailed("RELEASE-LEDGER", "the release does not have a ledger of every site that took part")
    books = {}
    for owner, entry in named.items():
        try:
            if not is_inside(entry["file"]):
                raise CheckFailed("RELEASE-LEDGER", "a ledger's file lies outside the folder")
            book, head = chain.replay(chain.read_jsonl(folder / entry["file"]), owner=owner, public=keys[owner])
            same = (entry["size"], entry["hash"]) == (book.size, head)
        except (KeyError, TypeError):
            same = False
        except (CheckFailed, ProtocolError) as error:
            raise CheckFailed("RELEASE-LEDGER", f"the ledger of {owner}: {error.sentence}", where=error.where) from None
        if not same:
            raise CheckFailed("RELEASE-LEDGER", f"the ledger of {owner} is not the one that the release names")
        books[owner] = book
    return books


def _own_ledger(
    guard: Path, policy: Policy, facts: Mapping[str, Any], proposal: Proposal, books: Mapping[str, Book]
) -> int:
    """This site's charges of the run are those in the release: nothing left out, nothing added; how many they are."""
    run, name = proposal.run, policy.name
    with Ledger.open(guard / "ledger.db") as ledger:
        mine = _entries(ledger.book, run)
        if name in facts["silent"]:
            if mine:
                raise CheckFailed(
                    "RELEASE-LEDGER", "the release calls this site silent, but it was charged for the run"
                )
            return 0
        size, head = facts["ledgers"][name]["size"], facts["ledgers"][name]["hash"]
        if type(size) is not int or ledger.hash_at(size) != head:
            raise CheckFailed(
                "RELEASE-LEDGER",
                "the ledger of this site in the release is not this site's",
                hint="cohortium site ledger --verify; then call the coordinator",
            )
    there = _entries(books[name], run)
    if [(e.release, e.event, e.count, e.plan) for e in mine] != [(e.release, e.event, e.count, e.plan) for e in there]:
        raise CheckFailed(
            "RELEASE-LEDGER", "this site was charged for releases of the run that came after its ledger here"
        )
    if any(entry.plan != proposal.plan.digest for entry in mine):
        raise CheckFailed("RELEASE-LEDGER", "this site was charged for the run under another plan")
    return len(mine)


def _statement(facts: Mapping[str, Any], proposal: Proposal, books: Mapping[str, Book]) -> tuple[str, bool]:
    """The statement's words and whether it is a rehearsal, recomputed from the ledgers."""
    plan, run = proposal.plan, proposal.run
    spent = max(_spent(plan, book, run) for book in books.values())
    if not spent <= plan.epsilon * (1 + TOLERANCE):
        raise CheckFailed("RELEASE-STATEMENT", "the ledgers were charged more than the approved plan's epsilon")
    rehearsal = any(book.noted(REHEARSAL, run) for book in books.values())
    try:
        given = facts["statement"]
        stated = Statement.from_json(given["terms"])
        sentence, marked = given["sentence"], given["rehearsal"]
    except (KeyError, TypeError, CohortiumError):
        raise CheckFailed("RELEASE-STATEMENT", "the release makes no privacy statement that can be read") from None
    same = stated.epsilon == spent or abs(stated.epsilon - spent) <= TOLERANCE * max(stated.epsilon, spent)
    if not same or stated != plan.statement(epsilon=stated.epsilon):
        raise CheckFailed(
            "RELEASE-STATEMENT", f"the release states another guarantee than the ledgers give (ε = {spent:.6g})"
        )
    if marked is not rehearsal or not isinstance(sentence, str) or not sentence.endswith(stated.sentence()):
        raise CheckFailed("RELEASE-STATEMENT", "the statement's words are not those of its numbers")
    if rehearsal and not sentence.startswith("NOT PRIVATE"):
        raise CheckFailed("RELEASE-STATEMENT", "the run was a rehearsal, and the release does not say so")
    if not rehearsal and sentence != stated.sentence():
        raise CheckFailed("RELEASE-STATEMENT", "the statement says more than its numbers")
    return sentence, rehearsal


def _spent(plan: Plan, book: Book, run: str) -> float:
    """ε of what one ledger charged to the run; the dearer of training and held-out patients."""
    parts: dict[str, dict[Event, int]] = {"train": {}, "holdout": {}}
    for entry in _entries(book, run):
        try:
            part = plan.stage_of(int(entry.release)).part
        except (CohortiumError, ValueError):
            raise CheckFailed(
                "RELEASE-LEDGER", "a ledger holds a charge of the run that its plan does not know"
            ) from None
        parts[part][entry.event] = parts[part].get(entry.event, 0) + entry.count
    return max(epsilon(list(events.items()), delta=plan.delta, hospitals=plan.hospitals) for events in parts.values())


def _published(study: Book, run: str, manifest: Manifest) -> None:
    """The rows are those that the coordinator wrote into the study's ledger."""
    notes = [note["fields"].get("files") for note in study.noted(PUBLISHED, run)]
    files = notes[-1] if notes else None
    rows = [name for name in manifest.subjects if name.startswith("synthetic.")]
    if not isinstance(files, dict) or not rows or any(files.get(name) != manifest.subjects[name] for name in rows):
        raise CheckFailed("RELEASE-ROWS", "the rows are not those that the study's ledger names")


def _entries(book: Book, run: str) -> list[Entry]:
    return [entry for entry in book.entries.values() if entry.run == run]

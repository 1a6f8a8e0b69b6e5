"""Another Ed25519 identity for a site: signed by the old key, the new key and the officer; no charge is lost.

A ledger belongs to its key, and witnesses remember ledgers by their key, so a new key opens a new ledger. Its first
lines reserve again everything that the old one ever charged, under the same runs and releases: the lifetime cap goes
on counting, and nothing that was answered once can be asked for again. They are burned at once: charged, never run.
The old ledger ends with a signed note that names the new key, and stays in SITE/guard/ledgers for ever.

A crash at any point leaves a guard that refuses (key and ledger do not fit) or the old state; the same command again
goes on where it stopped. Proposals name the old key, so every approval ends and running studies end for this site.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.client.approval import approvals, withdraw
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.modes import make_private
from cohortium.common.privacy.chain import CARRIED, REHEARSAL
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.invitation import sign_rotation
from cohortium.common.protocol.signing import fingerprint, generate, load_private, save_private

ROTATED = "rotated"

Tell = Callable[[bytes, bytes, bytes, bytes], None]
"""(new identity, signature by old, by new, by officer) to the coordinator."""
Known = Callable[[], str]
"""Hex of this site's identity by the coordinator's word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotated:
    old: str  # fingerprints
    new: str
    carried: int  # releases
    withdrawn: tuple[str, ...]  # runs


def rotate(site: Site, officer: Ed25519PrivateKey, *, tell: Tell, known: Known) -> Rotated:
    """Change the identity, or go on with a change that was interrupted. The guard must not run (LEDGER-BUSY)."""
    work = site.guard / "rotation"
    old = load_private(site.guard / "site.key")
    name = site.policy().name
    if not (work / "site.key").exists():
        if work.exists() and not (work / "ledger.db").exists():
            shutil.rmtree(work)
        if not work.exists():
            make_private(work)
            save_private(generate(), work / "site.key")
        else:  # the key went to its place already: only the end is missing
            return _finish(site, work, old.public_key(), old)
    new = load_private(work / "site.key")
    if not (work / "told").exists():
        with Ledger.open(site.guard / "ledger.db", old) as ledger:  # takes the writer's lock: no guard beside us
            _carry(ledger, work, name, new)
            _tell(name, old, new, officer, tell, known)
            if not any(note["about"] == ROTATED for note in ledger.book.notes):
                ledger.note(ROTATED, public_key=new.public_key().public_bytes_raw().hex())
        (work / "told").write_bytes(old.public_key().public_bytes_raw())
    return _finish(site, work, Ed25519PublicKey.from_public_bytes((work / "told").read_bytes()), new)


def _carry(ledger: Ledger, work: Path, name: str, new: Ed25519PrivateKey) -> None:
    """The new ledger: every charge of the old one. Made anew each time until the coordinator has agreed."""
    for path in work.glob("ledger.db*"):
        path.unlink()
    head = ledger.head()
    with Ledger.create(work / "ledger.db", name, new) as carried:
        # Earlier changes of keys, and that a run was a rehearsal, are told for ever.
        for note in ledger.book.notes:
            if note["about"] in (CARRIED, REHEARSAL):
                carried.note(note["about"], **note["fields"])
        carried.note(CARRIED, public_key=ledger.public_key, size=head.size, hash=head.hash)
        for entry in ledger.book.entries.values():
            carried.reserve(
                run=entry.run,
                release_id=entry.release,
                attempt=entry.attempt,
                event=entry.event,
                count=entry.count,
                plan_digest=entry.plan,
                purpose=entry.purpose,
            )
        carried.recover()
        if _total(carried) != _total(ledger):
            raise Refused("ROTATE-CHARGE", "the new ledger would not hold every charge of the old one")


def _total(ledger: Ledger) -> list[tuple[str, str, str, int]]:
    return sorted((e.run, e.release, str(e.event.to_json()), e.count) for e in ledger.book.entries.values())


def _tell(
    name: str, old: Ed25519PrivateKey, new: Ed25519PrivateKey, officer: Ed25519PrivateKey, tell: Tell, known: Known
) -> None:
    public = new.public_key()
    signed = [sign_rotation(key, site=name, old=old.public_key(), new=public) for key in (old, new, officer)]
    try:
        tell(public.public_bytes_raw(), *signed)
    except CohortiumError:
        # An answer that was lost: the coordinator has the new key already.
        if known() != public.public_bytes_raw().hex():
            raise


def _finish(site: Site, work: Path, old: Ed25519PublicKey, key: Ed25519PrivateKey) -> Rotated:
    """Put ledger and key in their places; each step may have happened already."""
    kept = make_private(site.guard / "ledgers")
    target = kept / f"{old.public_bytes_raw().hex()[:16]}.db"
    if (work / "ledger.db").exists():
        if not target.exists():
            with Ledger.open(site.guard / "ledger.db") as ledger:
                ledger.export(target.with_suffix(".jsonl"))
            _move_database(site.guard / "ledger.db", target)
        _move_database(work / "ledger.db", site.guard / "ledger.db")
    if (work / "site.key").exists():
        os.replace(work / "site.key", site.guard / "site.key")
    shutil.rmtree(work)
    withdrawn = tuple(run for run in approvals(site.guard) if withdraw(site.guard, run))
    new = load_private(site.guard / "site.key").public_key()
    with Ledger.open(site.guard / "ledger.db") as ledger:
        carried = len(ledger.book.entries)
    return Rotated(old=fingerprint(old), new=fingerprint(new), carried=carried, withdrawn=withdrawn)


def _move_database(path: Path, target: Path) -> None:
    """A closed SQLite file with whatever lies beside it."""
    for ending in ("-wal", "-shm"):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            os.replace(beside, target.with_name(target.name + ending))
    os.replace(path, target)

"""This hospital as a witness of the others' ledgers: the newest checkpoint of each, durable before it co-signs.

SITE/guard/witness.db holds the checkpoints as their owners signed them, so each row proves itself, and two of one
owner that contradict each other (table `conflicts`) are evidence that nobody can deny. Ledgers are named by their
owner's key, not by a name that another proposal may give to somebody else; but once an owner came with a new key,
its old one is over (table `owners`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.chain import Checkpoint

_TABLES = (
    "CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, owner TEXT NOT NULL, note TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, key TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS conflicts (key TEXT NOT NULL, seen TEXT NOT NULL, claimed TEXT NOT NULL) STRICT",
)
MAX_NOTE = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """heads: what may be co-signed, by site. refused: site -> WITNESS-..."""

    heads: dict[str, Checkpoint]
    refused: dict[str, str]


class Witness:
    """What this hospital saw of the others' ledgers."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise CheckFailed("WITNESS-DAMAGED", "this hospital's memory of the others' ledgers is damaged")
        for statement in _TABLES:
            self._db.execute(statement)

    def seen(self, public: Ed25519PublicKey) -> Checkpoint | None:
        """The newest head of a key's ledger, or None; CheckFailed WITNESS-DAMAGED where the row lies."""
        row = self._db.execute("SELECT owner, note FROM seen WHERE key = ?", (_name(public),)).fetchone()
        if row is None:
            return None
        try:
            return chain.verify_checkpoint(row[1], public, owner=row[0])
        except CheckFailed:
            raise CheckFailed("WITNESS-DAMAGED", "this hospital's memory of the others' ledgers is damaged") from None

    def sizes(self, identities: Mapping[str, Ed25519PublicKey]) -> dict[str, int]:
        """How long each site's ledger was when it was last seen: from there on its growth has to be shown."""
        return {
            site: head.size for site, public in sorted(identities.items()) if (head := self.seen(public)) is not None
        }

    def examine(
        self,
        notes: Mapping[str, object],
        proofs: Mapping[str, bytes],
        *,
        identities: Mapping[str, Ed25519PublicKey],
        own: str,
    ) -> Examined:
        """Check the others' checkpoints and keep the newer ones; on disk when this returns.

        notes: site -> signed checkpoint. One site's wrong checkpoint does not stop the others'. Raises CheckFailed
        CHECKPOINT-... where a note is not even its owner's, and KeyError for a site that the plan does not name.
        """
        heads: dict[str, Checkpoint] = {}
        refused: dict[str, str] = {}
        newer: list[tuple[str, str, str]] = []
        conflicts: list[tuple[str, str, str]] = []
        for site, note in sorted(notes.items()):
            if site == own:
                continue
            public = identities[site]
            if not isinstance(note, str) or len(note) > MAX_NOTE:
                raise CheckFailed("CHECKPOINT-FORM", "not a signed checkpoint")
            claimed, before = chain.verify_checkpoint(note, public, owner=site), self.seen(public)
            if before is not None and self._given_up(site, public):
                # Another key of this owner was seen since: its old ledger, put back, would forget what came after.
                refused[site] = witness.ROLLBACK
                continue
            try:
                witness.check_extends(before, claimed, proofs.get(site, b""))
            except CheckFailed as error:
                refused[site] = error.code
                if error.code in (witness.FORK, witness.ROLLBACK):
                    conflicts.append((_name(public), self._note(public), note))
                continue
            heads[site] = claimed
            if before is None or claimed.size > before.size:
                newer.append((_name(public), site, note))
        if newer or conflicts:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", newer)
                self._db.executemany(
                    "INSERT OR REPLACE INTO owners VALUES (?, ?)", [(site, name) for name, site, _ in newer]
                )
                for row in conflicts:
                    self._db.execute(
                        "INSERT INTO conflicts SELECT ?1, ?2, ?3 WHERE NOT EXISTS"
                        " (SELECT 1 FROM conflicts WHERE (key, seen, claimed) = (?1, ?2, ?3))",
                        row,
                    )
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        return Examined(heads=heads, refused=refused)

    def conflicts(self) -> list[tuple[str, str, str]]:
        """(key, checkpoint seen, checkpoint claimed) of every contradiction, each signed by the key's holder."""
        return [tuple(row) for row in self._db.execute("SELECT key, seen, claimed FROM conflicts")]

    def _given_up(self, owner: str, public: Ed25519PublicKey) -> bool:
        """Whether this owner was seen with another key after this one."""
        row = self._db.execute("SELECT key FROM owners WHERE owner = ?", (owner,)).fetchone()
        return row is not None and row[0] != _name(public)

    def _note(self, public: Ed25519PublicKey) -> str:
        row = self._db.execute("SELECT note FROM seen WHERE key = ?", (_name(public),)).fetchone()
        return "" if row is None else str(row[0])

    def close(self) -> None:
        self._db.close()


def _name(public: Ed25519PublicKey) -> str:
    return public.public_bytes_raw().hex()

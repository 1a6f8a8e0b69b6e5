"""What a guard must remember between two messages: round secrets and sealed bytes, durable before anything leaves.

One SQLite file in the site's directory, mode 0600: a put is one transaction, flushed to disk, whole or not at all.
Values that are replaced or removed are overwritten (secure_delete), so that a finished round's secrets are gone.
Each value carries a checksum of its name and bytes: a bit that a disk turned ends in CheckFailed VAULT-DAMAGED.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from cohortium.common.errors import CheckFailed


class Vault:
    """Named byte strings on disk."""

    def __init__(self, path: Path) -> None:
        """Opens the file and looks at every value in it: a damaged vault is refused whole, before it is used."""
        new = not path.exists()
        if new:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS vault"
                " (name TEXT PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL) STRICT"
            )
            if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise _damaged(path)
            for name, value, checksum in self._db.execute("SELECT name, value, checksum FROM vault"):
                if _checksum(name, value) != checksum:
                    raise _damaged(path)
        except BaseException as error:
            self._db.close()
            if isinstance(error, (sqlite3.DatabaseError, UnicodeDecodeError)) and not isinstance(
                error, sqlite3.OperationalError
            ):
                raise _damaged(path) from None
            raise

    def get(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM vault WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def names(self, prefix: str) -> list[str]:
        """The names that begin so, sorted."""
        query = "SELECT name FROM vault WHERE substr(name, 1, ?) = ? ORDER BY name"
        return [str(name) for (name,) in self._db.execute(query, (len(prefix), prefix))]

    def put(self, values: Mapping[str, bytes | None]) -> None:
        """Write all of them or none; None removes. On disk when this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for name, value in values.items():
                if value is None:
                    self._db.execute("DELETE FROM vault WHERE name = ?", (name,))
                else:
                    row = (name, value, _checksum(name, value))
                    self._db.execute("INSERT OR REPLACE INTO vault VALUES (?, ?, ?)", row)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk may have ended it already
                self._db.execute("ROLLBACK")
            raise
        if None in values.values():
            # Until a checkpoint, the write-ahead log still holds what was removed and all that was replaced before.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._db.close()


def _checksum(name: str, value: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\x00" + value).digest()[:16]


def _damaged(path: Path) -> CheckFailed:
    return CheckFailed(
        "VAULT-DAMAGED",
        "the guard's memory is damaged: a value is not what was written",
        where=(str(path),),
        hint="look at the disk; with the file gone the guard starts no old round again, and the run goes on without it",
    )

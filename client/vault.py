"""What a guard must remember between two messages: round secrets and sealed bytes, durable before anything leaves.

One SQLite file in the site's directory, mode 0600: a put is one transaction, flushed to disk, whole or not at all.
Values that are replaced or removed are overwritten (secure_delete), so that a finished round's secrets are gone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path


class Vault:
    """Named byte strings on disk."""

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        if new:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=ON")
        self._db.execute("CREATE TABLE IF NOT EXISTS vault (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT")

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
                    self._db.execute("INSERT OR REPLACE INTO vault VALUES (?, ?)", (name, value))
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        if None in values.values():
            # Until a checkpoint, the write-ahead log still holds what was removed and all that was replaced before.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._db.close()

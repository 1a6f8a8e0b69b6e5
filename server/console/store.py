"""CONSORTIUM/console/accounts.db: the file behind accounts, sessions and tries; threads and processes share it."""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "accounts.db"
_TABLES = (
    """CREATE TABLE IF NOT EXISTS accounts (
         name TEXT PRIMARY KEY, role TEXT NOT NULL, site TEXT NOT NULL, password TEXT NOT NULL, change_by INTEGER,
         totp TEXT NOT NULL, totp_step INTEGER NOT NULL, issuer TEXT NOT NULL, subject TEXT NOT NULL,
         since INTEGER NOT NULL, last_in INTEGER, closed_at INTEGER
       ) STRICT""",
    "CREATE UNIQUE INDEX IF NOT EXISTS accounts_subject ON accounts (issuer, subject) WHERE issuer <> ''",
    """CREATE TABLE IF NOT EXISTS sessions (
         hash BLOB PRIMARY KEY, name TEXT NOT NULL REFERENCES accounts, csrf TEXT NOT NULL, began INTEGER NOT NULL,
         seen INTEGER NOT NULL, factor INTEGER NOT NULL, complete INTEGER NOT NULL, pending TEXT NOT NULL,
         address TEXT NOT NULL
       ) STRICT""",
    "CREATE TABLE IF NOT EXISTS browsers (hash BLOB PRIMARY KEY, name TEXT NOT NULL, since INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS tries (n INTEGER PRIMARY KEY, who BLOB NOT NULL, at INTEGER NOT NULL) STRICT",
    "CREATE INDEX IF NOT EXISTS tries_who ON tries (who, at)",
    "CREATE TABLE IF NOT EXISTS told (n INTEGER PRIMARY KEY, about TEXT NOT NULL, fields TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS salt (one INTEGER PRIMARY KEY CHECK (one = 1), value BLOB NOT NULL) STRICT",
)


class Store:
    """The open file, mode 0600; made where there is none."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        if os.geteuid() == 0:  # made by root on the shell, it still is the service's file
            owner = os.stat(path.parent.parent)
            for made in (path.parent, path):
                os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=False)
        self.lock = threading.RLock()
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self.db.execute("PRAGMA journal_mode=WAL")
        with self.write() as db:
            for statement in _TABLES:
                db.execute(statement)
            db.execute("INSERT OR IGNORE INTO salt VALUES (1, ?)", (secrets.token_bytes(32),))
        self.salt: bytes = self.one("SELECT value FROM salt", ())[0]

    def close(self) -> None:
        self.db.close()

    def one(self, query: str, values: tuple[Any, ...]) -> Any:
        with self.lock:
            return self.db.execute(query, values).fetchone()

    def all(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self.lock:
            return self.db.execute(query, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                self.db.execute("ROLLBACK")
                raise


def someone_may_sign_in(console: Path) -> bool:
    """Whether the folder of a console has an open account. For `serve`: reads only, and makes nothing."""
    path = console / FILE
    if not path.is_file():
        return False
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2)
        try:
            return bool(db.execute("SELECT EXISTS (SELECT 1 FROM accounts WHERE closed_at IS NULL)").fetchone()[0])
        finally:
            db.close()
    except sqlite3.Error:
        return False

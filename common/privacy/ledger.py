"""The append-only, signed ledger on disk: a line is synced before the thing it pays for happens.

One SQLite file per site and one for the study. WAL with synchronous FULL: when `reserve` returns, the charge
survives a power cut. One writer at a time (an operating-system lock that a killed process lets go), any
number of readers. What was reserved or running when a process died is burned at the next opening: charged,
never run again. A restored older database verifies by itself; only a witness of a newer checkpoint sees it.

A clock that stands more than a day behind the last line is refused (CLOCK-BACK); less than that, as time servers
correct, is written as the last line's time. A clock that is ahead cannot be told from days without work: the line
is written with it, and once the clock is right again the ledger refuses until `accept_clock` notes the correction.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed, Refused, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.chain import Book, Checkpoint, Line, State
from cohortium.common.protocol.messages import canonical

_TABLE = (
    """CREATE TABLE lines (
         n INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, signature TEXT NOT NULL
       ) STRICT""",
    """CREATE TRIGGER lines_no_update BEFORE UPDATE ON lines
         BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER lines_no_delete BEFORE DELETE ON lines
         BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    # INSERT OR REPLACE deletes without firing a delete trigger: only the next number may come in.
    """CREATE TRIGGER lines_in_order BEFORE INSERT ON lines
         WHEN NEW.n <> (SELECT COALESCE(MAX(n), -1) + 1 FROM lines)
         BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)


CLOCK_SLACK_S = 86_400
_NO_DISK = ("SQLITE_FULL", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN")


def _seconds() -> int:
    return int(time.time())


class Ledger:
    """An open ledger. Use it from one thread at a time; close it, or use `with`, for the next writer."""

    def __init__(self, path: Path, key: Ed25519PrivateKey | None, lock: int | None, clock: Callable[[], int]) -> None:
        self.path, self._key, self._lock, self._clock = path, key, lock, clock
        self._book, self._head = Book(), ""
        self._later: list[dict[str, Any]] = []
        if key is None:
            self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
        else:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA busy_timeout=60000")

    @classmethod
    def create(cls, path: Path, owner: str, key: Ed25519PrivateKey, *, clock: Callable[[], int] = _seconds) -> Self:
        """A new ledger with its first line. Refused LEDGER-EXISTS when the file is already there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _take(path)
        try:
            ledger = cls(path, key, lock, clock)
            ledger._db.execute("BEGIN IMMEDIATE")
            # Table and line 0 come in one transaction: a file without the table is a creation that crashed.
            if ledger._db.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
                raise Refused("LEDGER-EXISTS", "a ledger is never started over", where=(str(path),))
            for statement in _TABLE:
                ledger._db.execute(statement)
            public = key.public_key().public_bytes_raw().hex()
            ledger._book.owner = owner
            ledger._write([{"kind": "open", "format": chain.FORMAT, "public_key": public}], begun=True)
        except BaseException as error:
            os.close(lock)
            if isinstance(error, sqlite3.Error):
                raise CheckFailed("LEDGER-FILE", "no ledger can be made here", where=(str(path),)) from None
            raise
        return ledger

    @classmethod
    def open(cls, path: Path, key: Ed25519PrivateKey | None = None, *, clock: Callable[[], int] = _seconds) -> Self:
        """An existing ledger, verified: to write with its owner's key, to read without.

        Opening to write burns what a crash left unfinished. Raises CheckFailed LEDGER-... on any defect and
        Refused LEDGER-BUSY when another process writes.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError("LEDGER-FILE", "there is no ledger here", where=(str(path),))
        lock = None if key is None else _take(path)
        ledger = None
        try:
            ledger = cls(path, key, lock, clock)
            ledger._load()
            if key is not None:
                ledger.recover()
        except BaseException as error:
            if ledger is not None:
                ledger._db.close()
            if lock is not None:
                os.close(lock)
            if isinstance(error, sqlite3.Error):
                if str(getattr(error, "sqlite_errorname", "")).startswith(_NO_DISK):
                    sentence = "the ledger cannot be written: its disk is full, read-only or failing"
                    raise CheckFailed("LEDGER-DISK", sentence, where=(str(path),)) from None
                raise CheckFailed("LEDGER-FILE", "the ledger's file is damaged", where=(str(path),)) from None
            raise
        return ledger

    def _load(self) -> None:
        lines = self.lines()
        if not lines:
            raise CheckFailed("LEDGER-EMPTY", "the ledger holds no line", where=(str(self.path),))
        public = _public(lines[0])
        if self._key is not None and self._key.public_key() != public:
            raise CheckFailed("LEDGER-KEY", "this key does not belong to this ledger", where=(str(self.path),))
        self._book, self._head = chain.replay(lines, public=public, signatures=False)

    def reserve(
        self,
        *,
        run: str,
        release_id: str,
        attempt: int = 0,
        event: Event,
        count: int,
        plan_digest: str,
        purpose: str,
        sealed: str = "",
    ) -> Line:
        """Charge a release, on disk before this returns. Refused LEDGER-ONCE the second time in a run.

        sealed: digest of what is already there, for a study's line of what its sites have charged: SEALED in the
        same transaction, so that no crash can come between and burn it.
        """
        fields = {"run": run, "release": release_id, "attempt": attempt, "event": event.to_json()}
        fields |= {"count": count, "plan": plan_digest, "purpose": purpose}
        bodies: list[dict[str, Any]] = [{"kind": "reserve", **fields}]
        if sealed:
            bodies.append({"kind": "advance", "run": run, "release": release_id, "state": "SEALED", "digest": sealed})
        return self._write(bodies)

    def advance(
        self, run: str, release_id: str, state: State, digest: str | None = None, *, later: bool = False
    ) -> Line | None:
        """Move a release on. SEALED needs the digest of the bytes, which are on disk before this is called.

        digest: for SEALED of the sealed bytes; for what follows, of what closed the release (a survivor set).

        later: write the line with the next one, saving a sync; for RELEASED only, where losing it leaves
        SEALED and the same bytes are sent again. RESERVED may go straight to SEALED: RUNNING is optional.
        """
        body = {"kind": "advance", "run": run, "release": release_id, "state": state, "digest": digest or ""}
        if not later:
            return self._write([body])
        waiting = any((b["run"], b["release"]) == (run, release_id) for b in self._later)
        if state != "RELEASED" or self.state(run, release_id) not in ("SEALED", "UNMASKED") or waiting:
            raise Refused("LEDGER-STATE", "only the last step of a sealed release may wait for the next line")
        if digest and not chain.is_hex(digest, 32):
            raise Refused("LEDGER-FORM", "a digest is the hex of 32 bytes")
        self._later.append(body)
        return None

    def note(self, about: str, **fields: Any) -> Line:
        """A line that charges nothing: the approval of a plan, a start, an end, a checkpoint received."""
        return self._write([{"kind": "note", "about": about, "fields": fields}])

    def check_clock(self) -> int:
        """The time that the next line gets; Refused CLOCK-BACK where the clock is far behind the last line."""
        now = self._clock()
        if now < self._book.at - CLOCK_SLACK_S:
            raise Refused(
                "CLOCK-BACK",
                "this machine's clock is more than a day behind the ledger's last line",
                where=(str(self.path),),
                hint="set the clock; if it was ahead before, the officer accepts the correction in the ledger",
            )
        return max(now, self._book.at)

    def accept_clock(self) -> Line:
        """Go on with a clock that is behind the last line: a signed note says from when to when. For the officer."""
        return self._write([{"kind": "note", "about": chain.CLOCK, "fields": {"was": self._book.at}}], set_clock=True)

    def recover(self) -> list[tuple[str, str]]:
        """Burn everything reserved or running; the releases burned as (run, release_id)."""
        entries = self._book.entries.values()
        unfinished = [(e.run, e.release) for e in entries if e.state in ("RESERVED", "RUNNING")]
        if unfinished:
            self._write(
                [
                    {"kind": "advance", "run": run, "release": release, "state": "BURNED", "digest": ""}
                    for run, release in unfinished
                ]
            )
        return unfinished

    def flush(self) -> None:
        """Write what was left for later."""
        if self._later:
            self._write([])

    def _write(self, bodies: list[dict[str, Any]], *, begun: bool = False, set_clock: bool = False) -> Line:
        """Append lines in one transaction and give the last: all are on disk, or none and it raises."""
        if self._key is None:
            raise Refused("LEDGER-READONLY", "this ledger was opened without its owner's key")
        now = self._clock() if set_clock else self.check_clock()
        pending, self._later = self._later, []
        size, head, owner, before = self._book.size, self._head, self._book.owner, self._book.at
        lines: list[Line] = []
        undo = {
            key: (entry.state, entry.digest, entry.ballot)
            for body in [*pending, *bodies]
            if (entry := self._book.entries.get(key := (body.get("run", ""), body.get("release", ""))))
        }
        try:
            if not begun:
                self._db.execute("BEGIN IMMEDIATE")
            for body in [*pending, *bodies]:
                whole = body | {"n": self._book.size, "owner": owner, "at": now}
                self._book.apply(whole)
                self._head = chain.link(self._head or None, whole)
                line = Line(body=whole, hash=self._head, signature=chain.sign(self._head, self._key))
                row = (line.number, canonical(whole).decode(), line.hash, line.signature)
                self._db.execute("INSERT INTO lines VALUES (?, ?, ?, ?)", row)
                lines.append(line)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._undo(size, head, undo, lines)
            self._book.at = before
            self._later = pending
            raise
        return lines[-1]

    def _undo(
        self, size: int, head: str, states: dict[tuple[str, str], tuple[State, str, str]], lines: list[Line]
    ) -> None:
        """Put the book back to what is on disk."""
        for key, (state, digest, ballot) in states.items():
            entry = self._book.entries[key]
            entry.state, entry.digest, entry.ballot = state, digest, ballot
        for line in lines:
            if line.body["kind"] == "reserve":
                self._book.entries.pop((line.body["run"], line.body["release"]), None)
            elif line.body["kind"] == "note":
                self._book.notes.pop()
        self._book.size, self._head = size, head

    @property
    def owner(self) -> str:
        return self._book.owner

    @property
    def public_key(self) -> str:
        """The owner's Ed25519 key, raw, hex."""
        return self._book.public_key

    @property
    def book(self) -> Book:
        """What the lines say; read it, do not change it."""
        return self._book

    def state(self, run: str, release_id: str) -> str:
        """NONE, RESERVED, RUNNING, SEALED, UNMASKED, RELEASED, BURNED or VOID."""
        return self._book.state(run, release_id)

    def digest(self, run: str, release_id: str) -> str:
        """The digest of the sealed bytes, or ""; a retry sends these bytes and no others."""
        entry = self._book.entries.get((run, release_id))
        return "" if entry is None else entry.digest

    def charged_events(self, run: str | None = None) -> list[tuple[Event, int]]:
        return self._book.charged_events(run)

    def head(self) -> Checkpoint:
        return Checkpoint(owner=self.owner, size=self._book.size, hash=self._head)

    def checkpoint(self) -> str:
        """The signed head, for witnesses."""
        if self._key is None:
            raise Refused("LEDGER-READONLY", "only the owner signs a checkpoint")
        return chain.checkpoint_text(self.head(), self._key)

    def hash_at(self, size: int) -> str:
        """The head when the ledger had `size` lines; "" where it never had so many."""
        if size == 0:
            return chain.EMPTY
        row = self._db.execute("SELECT hash FROM lines WHERE n = ?", (size - 1,)).fetchone()
        return "" if row is None else str(row[0])

    def lines(self, start: int = 0) -> list[Line]:
        """The lines on disk from number `start` on."""
        rows = self._db.execute(
            "SELECT n, body, hash, signature FROM lines WHERE n >= ? ORDER BY n", (start,)
        ).fetchall()
        out = []
        for n, text, line_hash, signature in rows:
            try:
                body = json.loads(text)
                if canonical(body).decode() != text or body["n"] != n:
                    raise ValueError
                out.append(Line.from_json({"body": body, "hash": line_hash, "signature": signature}))
            except (ValueError, TypeError, KeyError):
                raise CheckFailed("LEDGER-FORM", f"line {n} cannot be read", where=(str(self.path),)) from None
        return out

    def export(self, path: Path) -> None:
        """All lines as JSONL; `chain.read_jsonl` and `chain.replay` verify the file without this database."""
        self.flush()
        chain.write_jsonl(self.lines(), Path(path))

    def close(self) -> None:
        try:
            if self._key is not None:
                self.flush()
        finally:  # a full disk must not keep the lock
            self._db.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _public(first: Line) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(first.body["public_key"]))
    except (KeyError, TypeError, ValueError):
        raise CheckFailed("LEDGER-FORM", "the first line does not name the owner's key") from None


def _take(path: Path) -> int:
    """The one writer's lock; the system lets it go when the process ends, however it ends."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Refused(
            "LEDGER-BUSY", "another process writes this ledger", where=(str(path),), hint="wait for it to end"
        ) from None
    return lock

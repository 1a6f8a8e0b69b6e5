"""books.db: what verified ledger lines say, kept so that only new lines are read. A cache: it may be deleted any time.

`follow` is the one way by which a line counts: number, hash, signature and the ledger's own rules
(common/privacy/chain.py), as every other verifier of this house has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError, ProtocolError
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.cap import Cap
from cohortium.common.privacy.chain import Book, Entry, Line
from cohortium.common.protocol.messages import canonical

VERSION = 2
_LARGEST = 2**53
KEPT_NOTES = (chain.REHEARSAL, chain.CARRIED)
"""Notes that change what a charge means; others are only told."""
_TABLES = (
    """CREATE TABLE ledgers (
         owner TEXT NOT NULL, key TEXT NOT NULL, size INTEGER NOT NULL, head TEXT NOT NULL, at INTEGER NOT NULL,
         problem TEXT NOT NULL, cap TEXT NOT NULL, PRIMARY KEY (owner, key)
       ) STRICT""",
    """CREATE TABLE entries (
         owner TEXT NOT NULL, key TEXT NOT NULL, run TEXT NOT NULL, release TEXT NOT NULL, attempt INTEGER NOT NULL,
         event TEXT NOT NULL, count INTEGER NOT NULL, plan TEXT NOT NULL, purpose TEXT NOT NULL, state TEXT NOT NULL,
         digest TEXT NOT NULL, ballot TEXT NOT NULL, PRIMARY KEY (owner, key, run, release)
       ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE notes (owner TEXT NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL) STRICT""",
    """CREATE TABLE times (
         owner TEXT NOT NULL, key TEXT NOT NULL, run TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
         PRIMARY KEY (owner, key, run)
       ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE trail (
         id INTEGER PRIMARY KEY, at INTEGER NOT NULL, kind TEXT NOT NULL, site TEXT NOT NULL, run TEXT NOT NULL,
         what TEXT NOT NULL, code TEXT NOT NULL, told TEXT NOT NULL, origin TEXT NOT NULL
       ) STRICT""",
    "CREATE INDEX trail_at ON trail (at, id)",
    "CREATE INDEX trail_origin ON trail (origin)",
    "CREATE TABLE read_files (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT",
    "CREATE TABLE checks (at INTEGER NOT NULL, found TEXT NOT NULL) STRICT",
)


@dataclass(kw_only=True, slots=True)
class Known:
    """One ledger as far as it was read. head: hex, "" before the first line. problem: "CODE line N: sentence"."""

    owner: str
    key: str
    head: str = ""
    problem: str = ""
    book: Book = field(default_factory=Book)
    times: dict[str, tuple[int, int]] = field(default_factory=dict)
    """run -> seconds of its first and last line."""
    cap: Cap | None = None
    """The lifetime cap, if the newest start of a run says it: a hospital may stop telling."""

    @property
    def size(self) -> int:
        return self.book.size


def follow(known: Known, number: int, text: str, public: Ed25519PublicKey) -> Line:
    """Take one more line of the mirror into the book, or CheckFailed; nothing has changed then."""
    where = f"line {known.size}"
    try:
        line = Line.from_json(json.loads(text))
        if number != known.size or line.number != known.size:
            raise CheckFailed("LEDGER-NUMBER", f"{where} is missing or out of place")
        if chain.link(known.head or None, line.body) != line.hash:
            raise CheckFailed("LEDGER-HASH", f"{where} does not fit the lines before")
        if not chain.signed_by(line, public):
            raise CheckFailed("LEDGER-SIGNATURE", f"{where} is not signed by its owner")
        if line.body.get("owner") != known.owner:
            raise CheckFailed("LEDGER-OWNER", f"{where} is of another ledger")
        if not known.size and line.body.get("public_key") != known.key:
            raise CheckFailed("LEDGER-KEY", "the ledger was opened with another key")
        _refuse_odd(line.body, text)
        known.book.apply(line.body)
    except CheckFailed:
        raise
    except CohortiumError as error:
        raise CheckFailed(error.code, error.sentence) from None
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
        raise CheckFailed("LEDGER-FORM", f"{where} cannot be read") from None
    known.head = line.hash
    if line.body["kind"] == "note" and line.body["about"] == chain.START:
        known.cap = _cap_of(line.body["fields"])
    if line.body["kind"] == "note" and line.body["about"] not in KEPT_NOTES:
        known.book.notes.pop()
    run = run_of(line)
    if run:
        at = int(line.body["at"])
        known.times[run] = (known.times.get(run, (at, at))[0], at)
    return line


def _refuse_odd(body: dict[str, Any], text: str) -> None:
    """A signed line may hold what no guard writes: half a character, or a number that no database takes."""
    if any(isinstance(value, int) and abs(value) > _LARGEST for value in body.values()):
        raise CheckFailed("LEDGER-FORM", f"line {body['n']} holds a number that is too large")
    if "\\ud" in text.lower():
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate is a ValueError


def _cap_of(fields: dict[str, Any]) -> Cap | None:
    """What a site says its cap is: a figure for people, on which nothing is decided here."""
    try:
        return Cap.from_json(fields["cap"])
    except (ProtocolError, LookupError):
        return None


def _cap_text(known: Known) -> str:
    return "" if known.cap is None else canonical(known.cap.to_json()).decode()


def run_of(line: Line) -> str:
    run = line.body["fields"].get("run") if line.body["kind"] == "note" else line.body.get("run")
    return run if isinstance(run, str) else ""


def fingerprint_of(known: Known) -> str:
    """Names all that a ledger's lines add up to: two readings of the same lines agree in it."""
    listed = sorted(
        [e.run, e.release, e.attempt, e.event.to_json(), e.count, e.plan, e.purpose, e.state, e.digest, e.ballot]
        for e in known.book.entries.values()
    )
    notes = [[note["about"], note["fields"]] for note in known.book.notes]
    return hashlib.sha256(canonical([known.size, known.head, listed, notes, _cap_text(known)])).hexdigest()


class Index:
    """The open file. One thread writes; `lock` guards the connection."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.RLock()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            self.db = self._opened()
        except sqlite3.DatabaseError:  # damaged, or of another version: everything in it can be read again
            for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
                name.unlink(missing_ok=True)
            self.db = self._opened()

    def _opened(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=OFF")  # a power cut costs a new reading, no knowledge
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                db.execute("BEGIN")
                for statement in _TABLES:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute("COMMIT")
            elif version != VERSION:
                raise sqlite3.DatabaseError("another version")
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def load(self) -> dict[tuple[str, str], Known]:
        """All that was kept. What cannot be read drops its whole ledger, which is then read again."""
        events: dict[str, Event] = {}
        found: dict[tuple[str, str], Known] = {}
        bad: set[tuple[str, str]] = set()
        with self.lock:
            for owner, key, size, head, at, problem, cap in self.db.execute("SELECT * FROM ledgers"):
                known = Known(owner=owner, key=key, head=head, problem=problem)
                try:
                    known.cap = Cap.from_json(json.loads(cap)) if cap else None
                except (ValueError, CohortiumError):
                    bad.add((owner, key))
                known.book = Book(owner=owner, public_key=key, size=size, at=at)
                found[owner, key] = known
            for row in self.db.execute("SELECT * FROM entries"):
                mine, text = (row[0], row[1]), row[5]
                try:
                    if text not in events:
                        events[text] = Event.from_json(json.loads(text))
                    found[mine].book.entries[row[2], row[3]] = Entry(
                        run=row[2],
                        release=row[3],
                        attempt=row[4],
                        event=events[text],
                        count=row[6],
                        plan=row[7],
                        purpose=row[8],
                        state=row[9],
                        digest=row[10],
                        ballot=row[11],
                    )
                except (ValueError, LookupError, CohortiumError):
                    bad.add(mine)
            for owner, key, body in self.db.execute("SELECT * FROM notes"):
                try:
                    found[owner, key].book.notes.append(json.loads(body))
                except (ValueError, LookupError):
                    bad.add((owner, key))
            for owner, key, run, first, last in self.db.execute("SELECT * FROM times"):
                if (owner, key) in found:
                    found[owner, key].times[run] = first, last
            for owner, key in bad:
                self.forget(owner, key)
                found.pop((owner, key), None)
        return found

    def keep(self, known: Known, lines: Iterable[Line], more: Iterable[tuple[str, tuple[Any, ...]]] = ()) -> None:
        """Write down what these lines changed, all or nothing. more: further statements of the same transaction."""
        given = list(lines)
        names = {(b["run"], b["release"]) for b in (line.body for line in given) if b["kind"] in ("reserve", "advance")}
        mine = (known.owner, known.key)
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self.db.execute(
                    "INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*mine, known.size, known.head, known.book.at, known.problem, _cap_text(known)),
                )
                entries = [known.book.entries[name] for name in names]
                self.db.executemany(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [(*mine, *_row(entry)) for entry in entries],
                )
                notes = [
                    line.body for line in given if line.body["kind"] == "note" and line.body["about"] in KEPT_NOTES
                ]
                self.db.executemany(
                    "INSERT INTO notes VALUES (?, ?, ?)", [(*mine, canonical(note).decode()) for note in notes]
                )
                runs = {run for run in map(run_of, given) if run}
                self.db.executemany(
                    "INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?, ?)",
                    [(*mine, run, *known.times[run]) for run in runs],
                )
                for statement, values in more:
                    self.db.execute(statement, values)
                self.db.execute("COMMIT")
            except BaseException:
                self.db.execute("ROLLBACK")
                raise

    def forget(self, owner: str, key: str) -> None:
        """Drop one ledger, to be read again from its first line."""
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            for table in ("ledgers", "entries", "notes", "times"):
                self.db.execute(f"DELETE FROM {table} WHERE owner = ? AND key = ?", (owner, key))
            self.db.execute("DELETE FROM trail WHERE origin = ?", (f"ledger/{owner}/{key}",))
            self.db.execute("COMMIT")

    def close(self) -> None:
        with self.lock:
            self.db.close()


def _row(entry: Entry) -> tuple[Any, ...]:
    event = canonical(entry.event.to_json()).decode()
    head = (entry.run, entry.release, entry.attempt, event, entry.count, entry.plan, entry.purpose)
    return (*head, entry.state, entry.digest, entry.ballot)

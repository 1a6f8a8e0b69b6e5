"""The coordinator's copy of every site's ledger: each signed line is verified and kept; the past stays put.

A site that sends another line where the mirror already has one has forked its ledger; one that stands behind
the mirror was rolled back (a restored backup); one that skips a line hides something. All three are refused
by a code, and nothing is stored.

A consortium has one mirror over all its runs, so that a roll-back between two runs is seen too; several processes and
threads may have it open. The newest checkpoint that a site signed is kept beside its lines: shown to the site itself,
it is proof against a restored ledger that nobody else could have made.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.chain import Book, Checkpoint, Line
from cohortium.common.protocol.messages import canonical

COORDINATOR = "coordinator"
_TABLES = (
    """CREATE TABLE IF NOT EXISTS lines (
         owner TEXT NOT NULL, key TEXT NOT NULL, n INTEGER NOT NULL, line TEXT NOT NULL, PRIMARY KEY (owner, key, n)
       ) STRICT""",
    """CREATE TABLE IF NOT EXISTS checkpoints (
         owner TEXT NOT NULL, key TEXT NOT NULL, size INTEGER NOT NULL, note TEXT NOT NULL, PRIMARY KEY (owner, key)
       ) STRICT""",
)


class Mirror:
    """Verified copies of the ledgers of named owners. One SQLite file, open in as many threads and processes as like.

    public_keys: owner -> Ed25519 key, from enrolment (never from the ledger itself). A ledger belongs to its key: after
    a change of keys the owner's new ledger is another one, and the old one stays. earlier: owner -> hex of the keys
    that it changed from since it enrolled; their charges must be in the new ledger.
    """

    def __init__(
        self,
        path: Path,
        public_keys: Mapping[str, Ed25519PublicKey],
        *,
        earlier: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._keys = dict(public_keys)
        self._earlier = {owner: tuple(keys) for owner, keys in (earlier or {}).items()}
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        self._db.execute("PRAGMA journal_mode=WAL")
        # Lines are a copy: what a power cut takes, the site sends again. What is co-signed is synced (`cosign`).
        self._db.execute("PRAGMA synchronous=NORMAL")
        for statement in _TABLES:
            self._db.execute(statement)
        self._books: dict[str, Book] = {}
        self._heads: dict[str, str] = {}

    def size(self, owner: str) -> int:
        """How many of the owner's lines are here: the number from which on it should send."""
        return self._book(owner).size

    def book(self, owner: str) -> Book:
        """What the owner's verified lines say; read it, do not change it."""
        return self._book(owner)

    def head(self, owner: str) -> Checkpoint | None:
        """The newest line seen, or None; a site that starts is asked to confirm it."""
        with self._lock:
            book = self._book(owner)
            return Checkpoint(owner=owner, size=book.size, hash=self._heads[owner]) if book.size else None

    def seen(self, owner: str) -> str | None:
        """The newest checkpoint that the owner signed and this mirror confirmed: to be shown to the owner."""
        row = self._db.execute("SELECT note FROM checkpoints WHERE owner = ? AND key = ?", self._id(owner)).fetchone()
        return None if row is None else str(row[0])

    def digests(self, owner: str, start: int, end: int) -> bytes:
        """The digests of the owner's lines start .. end - 1: shows a witness that the ledger only grew."""
        return b"".join(chain.body_digest(line.body) for line in self.lines(owner, start) if line.number < end)

    def receive(self, owner: str, lines: Iterable[Any]) -> int:
        """Verify lines (JSON of `Line`) and keep the new ones; how many were new. All of them or none.

        Lines that are already here must be the same, byte for byte. Raises CheckFailed with MIRROR-FORK,
        MIRROR-GAP, MIRROR-SIGNATURE, MIRROR-HASH or the code of the ledger rule that a line breaks.
        """
        given = list(lines)
        with self._lock:
            self._book(owner)
            if not given:
                return 0
            self._db.execute("BEGIN IMMEDIATE")  # what another process wrote meanwhile is read first
            try:
                rows, head = self._verified(owner, given)
                self._db.executemany("INSERT INTO lines VALUES (?, ?, ?, ?)", rows)
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._books.pop(owner, None)  # a refused batch may have moved the book in memory
                if isinstance(error, CohortiumError) and not isinstance(error, CheckFailed):
                    raise CheckFailed(error.code, f"{owner}: {error.sentence}") from None
                if isinstance(error, (TypeError, ValueError, LookupError, AttributeError, RecursionError)):
                    # A signed line of a form that no guard writes: one site's nonsense stops nobody else's run.
                    raise CheckFailed("MIRROR-FORM", f"{owner}: a line's field is of another type") from None
                raise
            self._heads[owner] = head
            return len(rows)

    def _verified(self, owner: str, given: list[Any]) -> tuple[list[tuple[str, str, int, str]], str]:
        """The rows of the lines that are new, applied to the book, and the head after them."""
        book, head, public = self._book(owner), self._heads[owner], self._keys[owner]
        size = book.size
        rows: list[tuple[str, str, int, str]] = []
        for value in given:
            line = Line.from_json(value)
            if line.number < book.size:
                self._same(owner, line, rows, size)
                continue
            if line.number > book.size:
                raise CheckFailed("MIRROR-GAP", f"{owner}: line {book.size} is missing before {line.number}")
            if chain.link(head or None, line.body) != line.hash:
                raise CheckFailed("MIRROR-HASH", f"{owner}: line {line.number} does not fit the lines before")
            if not chain.signed_by(line, public):
                raise CheckFailed("MIRROR-SIGNATURE", f"{owner}: line {line.number} is not the owner's")
            if line.body.get("owner") != owner:
                raise CheckFailed("MIRROR-OWNER", f"{owner}: line {line.number} is of another ledger")
            book.apply(line.body)
            head = line.hash
            rows.append((*self._id(owner), line.number, canonical(line.to_json()).decode()))
        if book.size and book.public_key != public.public_bytes_raw().hex():
            raise CheckFailed("MIRROR-OWNER", f"{owner}: the ledger was opened with another key")
        if not size:
            self._check_carried(owner, book)
        return rows, head

    def _check_carried(self, owner: str, book: Book) -> None:
        """A new ledger after a change of keys holds every charge of the earlier ones that were seen here.

        Asked of its first lines, which come all at once. CheckFailed MIRROR-CARRIED.
        """
        named = {
            n["fields"].get("public_key"): n["fields"].get("size") for n in book.notes if n["about"] == chain.CARRIED
        }
        for key in {*self._earlier.get(owner, ()), *(key for key in named if isinstance(key, str))}:
            before = self._replayed(owner, key)
            if before is None:
                continue
            missing = [
                name
                for name, entry in before.entries.items()
                if (again := book.entries.get(name)) is None
                or (again.event, again.count, again.plan) != (entry.event, entry.count, entry.plan)
            ]
            told = named.get(key)
            if missing or type(told) is not int or told < before.size:
                raise CheckFailed(
                    "MIRROR-CARRIED",
                    f"{owner}: its new ledger does not hold every charge of the one before the change of keys",
                    hint="the site finishes its rotation with the newest ledger, or enrols anew",
                )

    def _replayed(self, owner: str, key: str) -> Book | None:
        """What is known here of an owner's ledger under an earlier key."""
        query = "SELECT line FROM lines WHERE owner = ? AND key = ? ORDER BY n"
        lines = [Line.from_json(json.loads(text)) for (text,) in self._db.execute(query, (owner, key))]
        if not lines:
            return None
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        return chain.replay(lines, owner=owner, public=public, signatures=False)[0]

    def confirm(self, owner: str, checkpoint: str) -> Checkpoint:
        """Check a site's signed checkpoint against what was mirrored, before it may start.

        Raises CheckFailed MIRROR-ROLLBACK when the site stands behind, MIRROR-FORK when its past differs. A
        checkpoint ahead of the mirror passes: the lines in between have to follow.
        """
        with self._lock:
            known, head = self._book(owner).size, self._heads[owner]
        claimed = chain.verify_checkpoint(checkpoint, self._keys[owner], owner=owner)
        if claimed.size < known:
            raise CheckFailed(
                "MIRROR-ROLLBACK",
                f"{owner}: its ledger ends at line {claimed.size - 1}, but {known} lines were seen",
                hint="the site restored an old ledger: recover the newest one, or enrol anew with a new key",
            )
        if claimed.size == known and claimed.hash != head:
            raise CheckFailed("MIRROR-FORK", f"{owner}: two ledgers of the same length")
        return claimed

    def cosign(self, owner: str, checkpoint: str, key: Ed25519PrivateKey) -> str:
        """The coordinator's word, hex, that this is the newest it saw of the owner's ledger; synced before it is given.

        Raises CheckFailed as `confirm`, and MIRROR-AHEAD where lines up to the checkpoint are missing here: what was
        not seen is not witnessed.
        """
        with self._lock:
            claimed = self.confirm(owner, checkpoint)
            if claimed.size > self._book(owner).size:
                raise CheckFailed("MIRROR-AHEAD", f"{owner}: its newest lines were not seen here yet")
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                self._db.execute(
                    "INSERT INTO checkpoints VALUES (?1, ?2, ?3, ?4) ON CONFLICT (owner, key)"
                    " DO UPDATE SET size = ?3, note = ?4 WHERE ?3 >= size",
                    (*self._id(owner), claimed.size, checkpoint),
                )
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")
            return witness.cosign(claimed, owner=self._keys[owner], witness=COORDINATOR, key=key)

    def lines(self, owner: str, start: int = 0) -> list[Line]:
        rows = self._db.execute(
            "SELECT line FROM lines WHERE owner = ? AND key = ? AND n >= ? ORDER BY n", (*self._id(owner), start)
        ).fetchall()
        return [Line.from_json(json.loads(text)) for (text,) in rows]

    def export(self, owner: str, path: Path) -> None:
        """The owner's lines as JSONL, as the site itself would export them."""
        chain.write_jsonl(self.lines(owner), Path(path))

    def _same(self, owner: str, line: Line, new: list[tuple[str, str, int, str]], size: int) -> None:
        text, known = canonical(line.to_json()).decode(), ""
        if line.number >= size:
            known = new[line.number - size][3]
        elif line.number >= 0:
            query = "SELECT line FROM lines WHERE owner = ? AND key = ? AND n = ?"
            known = self._db.execute(query, (*self._id(owner), line.number)).fetchone()[0]
        if text != known:
            raise CheckFailed("MIRROR-FORK", f"{owner}: line {line.number} differs from the one seen before")

    def _book(self, owner: str) -> Book:
        """The owner's book, with what this or another process has written since."""
        if owner not in self._keys:
            raise CheckFailed("MIRROR-OWNER", f"{owner!r} is not enrolled")
        with self._lock:
            book = self._books.get(owner)
            if book is None:
                lines = self.lines(owner)
                book, head = Book(), ""
                if lines:
                    book, head = chain.replay(lines, owner=owner, public=self._keys[owner], signatures=False)
                self._books[owner], self._heads[owner] = book, head
                return book
            for line in self.lines(owner, book.size):
                if chain.link(self._heads[owner] or None, line.body) != line.hash:
                    raise CheckFailed("MIRROR-HASH", f"{owner}: line {line.number} does not fit the lines before")
                book.apply(line.body)
                self._heads[owner] = line.hash
            return book

    def _id(self, owner: str) -> tuple[str, str]:
        if owner not in self._keys:
            raise CheckFailed("MIRROR-OWNER", f"{owner!r} is not enrolled")
        return owner, self._keys[owner].public_bytes_raw().hex()

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""The coordinator's copy of every site's ledger: each signed line is verified and kept; the past stays put.

A site that sends another line where the mirror already has one has forked its ledger; one that stands behind
the mirror was rolled back (a restored backup); one that skips a line hides something. All three are refused
by a code, and nothing is stored.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book, Checkpoint, Line
from cohortium.common.protocol.messages import canonical

_TABLE = """CREATE TABLE IF NOT EXISTS lines (
  owner TEXT NOT NULL, n INTEGER NOT NULL, line TEXT NOT NULL, PRIMARY KEY (owner, n)
) STRICT"""


class Mirror:
    """Verified copies of the ledgers of named owners. One SQLite file; use it in the thread that opened it.

    public_keys: owner -> Ed25519 key, from enrolment (never from the ledger itself).
    """

    def __init__(self, path: Path, public_keys: Mapping[str, Ed25519PublicKey]) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._keys = dict(public_keys)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")  # a copy: what a power cut takes, the site sends again
        self._db.execute(_TABLE)
        self._books: dict[str, Book] = {}
        self._heads: dict[str, str] = {}
        for owner, public in self._keys.items():
            lines = self.lines(owner)
            self._books[owner], self._heads[owner] = Book(), ""
            if lines:
                self._books[owner], self._heads[owner] = chain.replay(
                    lines, owner=owner, public=public, signatures=False
                )

    def size(self, owner: str) -> int:
        """How many of the owner's lines are here: the number from which on it should send."""
        return self._book(owner).size

    def book(self, owner: str) -> Book:
        """What the owner's verified lines say; read it, do not change it."""
        return self._book(owner)

    def head(self, owner: str) -> Checkpoint | None:
        """The newest line seen, or None; a site that starts is asked to confirm it."""
        book = self._book(owner)
        return Checkpoint(owner=owner, size=book.size, hash=self._heads[owner]) if book.size else None

    def receive(self, owner: str, lines: Iterable[Any]) -> int:
        """Verify lines (JSON of `Line`) and keep the new ones; how many were new. All of them or none.

        Lines that are already here must be the same, byte for byte. Raises CheckFailed with MIRROR-FORK,
        MIRROR-GAP, MIRROR-SIGNATURE, MIRROR-HASH or the code of the ledger rule that a line breaks.
        """
        book, head, public = self._book(owner), self._heads[owner], self._keys[owner]
        size = book.size
        rows: list[tuple[str, int, str]] = []
        try:
            for value in lines:
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
                rows.append((owner, line.number, canonical(line.to_json()).decode()))
            if book.size and book.public_key != public.public_bytes_raw().hex():
                raise CheckFailed("MIRROR-OWNER", f"{owner}: the ledger was opened with another key")
        except BaseException as error:
            self._reload(owner)
            if isinstance(error, CohortiumError) and not isinstance(error, CheckFailed):
                raise CheckFailed(error.code, f"{owner}: {error.sentence}") from None
            raise
        if rows:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO lines VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")
            self._heads[owner] = head
        return len(rows)

    def confirm(self, owner: str, checkpoint: str) -> Checkpoint:
        """Check a site's signed checkpoint against what was mirrored, before it may start.

        Raises CheckFailed MIRROR-ROLLBACK when the site stands behind, MIRROR-FORK when its past differs. A
        checkpoint ahead of the mirror passes: the lines in between have to follow.
        """
        claimed = chain.verify_checkpoint(checkpoint, self._keys[owner], owner=owner)
        known = self._book(owner).size
        if claimed.size < known:
            raise CheckFailed(
                "MIRROR-ROLLBACK",
                f"{owner}: its ledger ends at line {claimed.size - 1}, but {known} lines were seen",
                hint="the site restored an old ledger: recover the newest one, or enrol anew with a new key",
            )
        if claimed.size == known and claimed.hash != self._heads[owner]:
            raise CheckFailed("MIRROR-FORK", f"{owner}: two ledgers of the same length")
        return claimed

    def lines(self, owner: str, start: int = 0) -> list[Line]:
        rows = self._db.execute(
            "SELECT line FROM lines WHERE owner = ? AND n >= ? ORDER BY n", (owner, start)
        ).fetchall()
        return [Line.from_json(json.loads(text)) for (text,) in rows]

    def export(self, owner: str, path: Path) -> None:
        """The owner's lines as JSONL, as the site itself would export them."""
        chain.write_jsonl(self.lines(owner), Path(path))

    def _same(self, owner: str, line: Line, new: list[tuple[str, int, str]], size: int) -> None:
        text, known = canonical(line.to_json()).decode(), ""
        if line.number >= size:
            known = new[line.number - size][2]
        elif line.number >= 0:
            query = "SELECT line FROM lines WHERE owner = ? AND n = ?"
            known = self._db.execute(query, (owner, line.number)).fetchone()[0]
        if text != known:
            raise CheckFailed("MIRROR-FORK", f"{owner}: line {line.number} differs from the one seen before")

    def _reload(self, owner: str) -> None:
        """Forget what a refused batch did to the book in memory."""
        lines = self.lines(owner)
        self._books[owner], self._heads[owner] = Book(), ""
        if lines:
            self._books[owner], self._heads[owner] = chain.replay(
                lines, owner=owner, public=self._keys[owner], signatures=False
            )

    def _book(self, owner: str) -> Book:
        if owner not in self._keys:
            raise CheckFailed("MIRROR-OWNER", f"{owner!r} is not enrolled")
        return self._books[owner]

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

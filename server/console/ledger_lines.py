"""A mirrored ledger's lines as people read them, some at a time."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cohortium.common.errors import CohortiumError
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event

if TYPE_CHECKING:
    from cohortium.server.console.books_picture import LedgerBook

MOST_TEXT = 200
_TOLD = {
    "RUNNING": "works on it",
    "SEALED": "answered; only these bytes may ever leave",
    "UNMASKED": "its mask was taken off with the others'",
    "RELEASED": "sent, and done",
    "BURNED": "broken off: never answered, paid all the same",
    "VOID": "came to nothing: paid all the same",
}
_NOTES = {
    chain.START: "begins, or goes on with, the run",
    chain.REHEARSAL: "the run is a rehearsal, NOT private",
    chain.CARRIED: "this ledger carries on the one before a change of keys",
    chain.CLOCK: "the clock was set back",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One line. state: of its release, or "" ; cost: the event that was charged, in words, "" where nothing was."""

    number: int
    at: int
    kind: str
    run: str
    release: str
    state: str
    told: str
    cost: str
    hash: str
    verified: bool

    def to_json(self) -> dict[str, Any]:
        names = ("number", "at", "kind", "run", "release", "state", "told", "cost", "hash", "verified")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Lines start .. of a ledger of `size` verified lines. next: where the next page begins, None at the end."""

    owner: str
    key: str
    start: int
    size: int
    lines: tuple[Shown, ...]
    next: int | None

    @classmethod
    def empty(cls, owner: str) -> Self:
        return cls(owner=owner, key="", start=0, size=0, lines=(), next=None)

    def to_json(self) -> dict[str, Any]:
        more = {name: getattr(self, name) for name in ("owner", "key", "start", "size", "next")}
        return more | {"lines": [line.to_json() for line in self.lines]}


def read_only(path: Path) -> sqlite3.Connection:
    """The mirror, to look at. Its writers are other processes."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=60)
    db.execute("PRAGMA busy_timeout=60000")
    return db


def page_of(mirror: Path, book: LedgerBook, start: int, limit: int) -> Page:
    """Some lines as they lie in the mirror; those that did not verify are marked, not hidden."""
    if not mirror.exists():
        return Page.empty(book.owner)
    db = read_only(mirror)
    try:
        query = "SELECT n, line FROM lines WHERE owner = ? AND key = ? AND n >= ? ORDER BY n LIMIT ?"
        rows = db.execute(query, (book.owner, book.key, start, limit + 1)).fetchall()
    finally:
        db.close()
    lines = tuple(shown(number, text, verified=number < book.size) for number, text in rows[:limit])
    more = rows[limit][0] if len(rows) > limit else None
    return Page(owner=book.owner, key=book.key, start=start, size=book.size, lines=lines, next=more)


def shown(number: int, text: str, *, verified: bool) -> Shown:
    """One line's text for display; whatever is odd in it is said, never raised."""
    try:
        line = json.loads(text)
        body, line_hash = line["body"], str(line["hash"])
        told, cost = _told(body)
        run = body["fields"].get("run", "") if body["kind"] == "note" else body.get("run", "")
        return Shown(
            number=number,
            at=int(body["at"]) if 0 <= int(body["at"]) < 10**11 else 0,
            kind=_short(body["about"] if body["kind"] == "note" else body["kind"]),
            run=_short(run),
            release=_short(body.get("release", "")),
            state="RESERVED" if body["kind"] == "reserve" else _short(body.get("state", "")),
            told=told,
            cost=cost,
            hash=line_hash[:64],
            verified=verified,
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, CohortiumError):
        blank = {"kind": "unreadable", "run": "", "release": "", "state": "", "cost": "", "hash": ""}
        return Shown(number=number, at=0, told="this line cannot be read", verified=False, **blank)


def _told(body: dict[str, Any]) -> tuple[str, str]:
    kind = body["kind"]
    if kind == "open":
        return "the ledger begins", ""
    if kind == "reserve":
        event, count = Event.from_json(body["event"]), int(body["count"])
        return f"charged for “{_short(body['purpose'])}”", f"{event}" + (f", {count} times" if count > 1 else "")
    if kind == "advance":
        return _TOLD.get(body["state"], "changes its state"), ""
    return _NOTES.get(body["about"], "a note"), ""


def _short(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()[:MOST_TEXT]

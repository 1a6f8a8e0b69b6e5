"""The consortium's trail: approvals, changes of members, how runs went, what ledgers noted; found by who, where, when.

What is kept here is told by others (register, run folders, verified ledger lines) and only gathered. The register
keeps an approval's last word, not those before it; a run's file of events keeps all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Line
from cohortium.server.console.books_index import Index, run_of
from cohortium.server.register import RunRow

KINDS = ("approval", "member", "run", "event", "ledger")
MOST_TEXT = 300
MOST_BYTES = 4_000_000
"""Of one run's events, so much is read at a time."""
Row = tuple[int, str, str, str, str, str, str, str]
_INSERT = "INSERT INTO trail (at, kind, site, run, what, code, told, origin) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One line of the trail. at: seconds since 1970; site, run, code: "" where there is none."""

    at: int
    kind: str
    site: str
    run: str
    what: str
    code: str
    told: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("at", "kind", "site", "run", "what", "code", "told")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is searched for; "" and None: anything. since, until: seconds since 1970, until not included."""

    person: str = ""
    action: str = ""
    site: str = ""
    run: str = ""
    since: int | None = None
    until: int | None = None


def of_line(known_key: str, line: Line) -> tuple[str, tuple[Any, ...]] | None:
    """The statement that adds a ledger's line, if it is of note: the owner's notes, and what was burned or void."""
    body = line.body
    if body["kind"] == "note":
        what = str(body["about"])[:40]
        told = {
            chain.START: "begins, or goes on with, the run",
            chain.REHEARSAL: "says that the run is a rehearsal and not private",
            chain.CARRIED: "began a new ledger after a change of keys",
            chain.CLOCK: "set its ledger's clock back",
        }.get(body["about"], "noted in its ledger")
    elif body["kind"] == "advance" and body["state"] in ("BURNED", "VOID"):
        what = str(body["state"]).lower()
        told = f"release {body['release']} stays paid for and is never answered"
    elif body["kind"] == "open":
        what, told = "open", "began a ledger"
    else:
        return None
    origin = f"ledger/{body['owner']}/{known_key}"
    row = (int(body["at"]), "ledger", str(body["owner"]), run_of(line), what, "", told[:MOST_TEXT], origin)
    return _INSERT, row


def of_register(path: Path) -> list[Row]:
    """Every member's, approval's and run's last word. Read-only, and all at once, which the register never needs."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)
    rows: list[Row] = []
    try:
        for name, role, since, revoked in db.execute("SELECT name, role, since, revoked_at FROM members"):
            rows.append((since, "member", name, "", "enrolled", "", f"takes part as {role}", "register"))
            if revoked is not None:
                rows.append((revoked, "member", name, "", "revoked", "", "was shut out", "register"))
        query = "SELECT name, since, ROW_NUMBER() OVER (PARTITION BY name ORDER BY rowid) FROM identities"
        for name, since, number in db.execute(query):
            if number > 1:
                rows.append((since, "member", name, "", "identity", "", "has another key", "register"))
        query = "SELECT run, site, state, since FROM approvals WHERE state <> 'open'"
        for run, site, state, since in db.execute(query):
            rows.append((since, "approval", site, run, state, "", f"its officer has {state} the run", "register"))
        for run, state, message, since in db.execute("SELECT run, state, message, since FROM runs"):
            code = message.partition(":")[0] if state == "failed" and message[:40].isupper() else ""
            rows.append((since, "run", "", run, state, code, message[:MOST_TEXT] or f"is {state}", "register"))
    finally:
        db.close()
    return rows


def of_event(run: str, event: dict[str, Any]) -> Iterator[Row]:
    """What of one event of a run is of note: everything but a release that all sites answered."""
    event = _whole(event)
    name, at = str(event.get("event", ""))[:40], event.get("at")
    if not isinstance(at, (int, float)) or not 0 <= at < 1e11 or not name:
        return
    origin = f"events/{run}"
    if name == "release":
        codes = event.get("codes")
        codes = codes if isinstance(codes, dict) else {}
        index = str(event.get("index", ""))[:12]
        if event.get("void"):
            why = str(event["void"])[:MOST_TEXT]
            yield int(at), "event", "", run, "void", why[:40], f"release {index} came to nothing: {why}", origin
        dropped = event.get("dropped")
        for site in dropped if isinstance(dropped, list) else ():
            code = str(codes.get(site, ""))[:40]
            yield (
                int(at),
                "event",
                str(site)[:80],
                run,
                "dropped",
                code,
                f"did not take part in release {index}",
                origin,
            )
        return
    code = str(event.get("code") or "")[:40]
    if name == "hello":
        refused = event.get("refused")
        for site, why in (refused if isinstance(refused, dict) else {}).items():
            yield int(at), "event", str(site)[:80], run, "refused", str(why)[:40], "did not begin the run", origin
        sites = event.get("sites")
        told = f"{len(sites)} sites are there" if isinstance(sites, list) else "sites said hello"
    else:
        told = str(event.get("sentence") or event.get("why") or "")[:MOST_TEXT] or {
            "start": "began or went on",
            "try": f"try {str(event.get('number', ''))[:12]} begins",
            "fitted": "the model is fitted",
            "stopped": "stopped between two releases",
            "interrupted": "was interrupted",
        }.get(name, name)
    yield int(at), "event", "", run, name, code, told, origin


def _whole(event: dict[str, Any]) -> dict[str, Any]:
    """The event without halves of characters, which no database takes."""
    text = json.dumps(event, ensure_ascii=False).encode("utf-8", "replace").decode()
    return dict(json.loads(text))


class Gatherer:
    """Keeps the trail up to date; one thread at a time."""

    def __init__(self, index: Index, register: Path, root: Path) -> None:
        self._index, self._register, self._root = index, register, root
        self._seen_register: tuple[int, ...] = ()
        with index.lock:
            self._read = dict(index.db.execute("SELECT name, bytes FROM read_files"))

    def gather(self, runs: Iterable[RunRow]) -> bool:
        """Read what is new in the register and in the runs' files of events; whether anything was."""
        changed = False
        now = _stamp(self._register)
        if now != self._seen_register:
            self._replace(of_register(self._register))
            self._seen_register, changed = now, True
        for row in runs:
            path = self._root / row.folder / "run" / "events.jsonl"
            try:
                size = path.stat().st_size
            except OSError:
                continue
            while self._read.get(row.run, 0) != size and self._events(row.run, path, size):
                changed = True
        return changed

    def _replace(self, rows: Sequence[Row]) -> None:
        with self._index.lock:
            db = self._index.db
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM trail WHERE origin = 'register'")
            db.executemany(_INSERT, rows)
            db.execute("COMMIT")

    def _events(self, run: str, path: Path, size: int) -> bool:
        """Some more of a run's events; False where no whole line is new. A file that shrank is read anew."""
        start = self._read.get(run, 0)
        again = size < start
        start = 0 if again else start
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(MOST_BYTES)
        end = data.rfind(b"\n") + 1
        if not end and not again and len(data) < MOST_BYTES:
            return False
        rows: list[Row] = []
        for text in data[: end or len(data)].splitlines():
            try:
                event = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                rows += of_event(run, event)
        with self._index.lock:
            db = self._index.db
            db.execute("BEGIN IMMEDIATE")
            if again:
                db.execute("DELETE FROM trail WHERE origin = ?", (f"events/{run}",))
            db.executemany(_INSERT, rows)
            self._read[run] = start + (end or len(data))
            db.execute("INSERT OR REPLACE INTO read_files VALUES (?, ?)", (run, self._read[run]))
            db.execute("COMMIT")
        return True


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes whenever the database is written: its own file and its write-ahead log."""
    found: list[int] = []
    for name in (path, Path(f"{path}-wal")):
        try:
            facts = name.stat()
            found += [facts.st_mtime_ns, facts.st_size]
        except OSError:
            found += [0, 0]
    return tuple(found)


def search(db: sqlite3.Connection, wanted: Wanted, *, start: int = 0, limit: int = 100) -> tuple[list[Trace], bool]:
    """Newest first: some of what was searched for, and whether there is more."""
    if wanted.person:  # people's acts stand in the journal
        return [], False
    tests: list[tuple[str, list[Any]]] = [("1", [])]
    tests += [(f"{name} = ?", [value]) for name, value in (("site", wanted.site), ("run", wanted.run)) if value]
    if wanted.action:
        tests.append(("(what = ? OR kind = ? OR code = ?)", [wanted.action] * 3))
    tests += [(t, [edge]) for t, edge in (("at >= ?", wanted.since), ("at < ?", wanted.until)) if edge is not None]
    where = " AND ".join(test for test, _ in tests)
    values = [value for _, some in tests for value in some]
    query = f"SELECT at, kind, site, run, what, code, told FROM trail WHERE {where} ORDER BY at DESC, id DESC"
    rows = db.execute(f"{query} LIMIT ? OFFSET ?", [*values, limit + 1, start]).fetchall()
    names = ("at", "kind", "site", "run", "what", "code", "told")
    return [Trace(**dict(zip(names, row, strict=True))) for row in rows[:limit]], len(rows) > limit

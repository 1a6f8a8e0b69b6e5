"""Everything again from nothing: each mirrored line, each signed checkpoint, each sum, beside what the index had.

Nothing of books.db is believed here. What was remembered is only held against what is found: a ledger whose past is
another one than was read before is a fork or a roll-back, however well it verifies by itself.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain
from cohortium.server.console.books_index import Index, Known, fingerprint_of, follow
from cohortium.server.console.ledger_lines import read_only

KEPT = 50
BREATH = 32
Keys = Callable[[str], Mapping[str, Ed25519PublicKey]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as it should be. line: its number, or None where it is not about one line."""

    site: str
    key: str
    code: str
    line: int | None
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("site", "key", "code", "line", "sentence")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A verification: under way (`running`), or finished. at: when it began; seconds: how long it took."""

    at: float | None
    running: bool = False
    done: int = 0
    whole: int = 0
    seconds: float = 0.0
    ledgers: int = 0
    checkpoints: int = 0
    findings: tuple[Finding, ...] = ()
    wrong_index: tuple[tuple[str, str], ...] = ()
    code: str = ""
    """Why it could not be finished; nothing is known then."""

    @classmethod
    def never(cls) -> Self:
        return cls(at=None)

    @classmethod
    def begun(cls, at: float) -> Self:
        return cls(at=at, running=True)

    @property
    def ok(self) -> bool:
        return self.at is not None and not (self.running or self.findings or self.code)

    def went_on(self, done: int, whole: int) -> Check:
        return replace(self, done=done, whole=whole)

    def broken(self, now: float, code: str) -> Check:
        return replace(self, running=False, code=code, seconds=max(0.0, now - (self.at or now)))

    def with_findings(self, more: tuple[Finding, ...]) -> Check:
        return replace(self, findings=(*self.findings, *more))

    def to_json(self) -> dict[str, Any]:
        names = ("at", "running", "done", "whole", "seconds", "ledgers", "checkpoints", "code", "ok")
        return {name: getattr(self, name) for name in names} | {"findings": [f.to_json() for f in self.findings]}

    def keep(self, index: Index) -> None:
        text = json.dumps(self.to_json())
        with index.lock:
            index.db.execute("INSERT INTO checks VALUES (?, ?)", (int(self.at or 0), text))
            index.db.execute("DELETE FROM checks WHERE rowid <= (SELECT MAX(rowid) FROM checks) - ?", (KEPT,))

    @classmethod
    def kept(cls, index: Index) -> Self:
        """The last one that came to its end, also before the console was started."""
        with index.lock:
            row = index.db.execute("SELECT found FROM checks ORDER BY rowid DESC LIMIT 1").fetchone()
        try:
            value = {} if row is None else json.loads(row[0])
            if not value:
                return cls.never()
            findings = tuple(Finding(**each) for each in value.pop("findings"))
            return cls(**{name: each for name, each in value.items() if name != "ok"}, findings=findings)
        except (ValueError, TypeError, KeyError):
            return cls.never()


def check_all(
    mirror: Path,
    *,
    keys: Keys,
    known: Mapping[tuple[str, str], Known],
    begun: Check,
    clock: Callable[[], float],
    told: Callable[[int, int], None],
    rest: Callable[[], None],
) -> Check:
    """Read the whole mirror from its first line; the caller says when all is done (`running`).

    known: what the index says of each ledger, for as many lines as it read. told(done, whole): progress in lines.
    rest(): called between few lines, may raise to end it.
    """
    if not mirror.exists():
        return replace(begun, seconds=clock() - (begun.at or 0.0))
    db = read_only(mirror)
    findings: list[Finding] = []
    wrong: list[tuple[str, str]] = []
    done = checkpoints = 0
    try:
        query = "SELECT owner, key, COUNT(*) FROM lines GROUP BY owner, key"
        there = {(owner, key): int(count) for owner, key, count in db.execute(query)}
        whole = sum(there.values())
        told(0, whole)
        for (owner, key), _ in there.items():
            public = keys(owner).get(key)
            remembered = known.get((owner, key))
            if public is None:
                sentence = "a ledger whose key the register does not know"
                findings.append(Finding(site=owner, key=key, code="MIRROR-OWNER", line=None, sentence=sentence))
                continue
            now = Known(owner=owner, key=key)
            heads: dict[int, str] = {0: chain.EMPTY}
            same = remembered is None or not remembered.size
            for number, text in db.execute(
                "SELECT n, line FROM lines WHERE owner = ? AND key = ? ORDER BY n", (owner, key)
            ):
                try:
                    follow(now, number, text, public)
                except CheckFailed as error:
                    where = now.size
                    findings.append(Finding(site=owner, key=key, code=error.code, line=where, sentence=error.sentence))
                    break
                heads[now.size] = now.head
                done += 1
                if remembered is not None and now.size == remembered.size:
                    same = True
                    if now.head != remembered.head:
                        sentence = "another line than was read before: two ledgers under one key"
                        at = now.size - 1
                        findings.append(Finding(site=owner, key=key, code="MIRROR-FORK", line=at, sentence=sentence))
                    elif fingerprint_of(now) != fingerprint_of(remembered):
                        sentence = "the console's index said something else; it is made anew"
                        findings.append(Finding(site=owner, key=key, code="BOOKS-INDEX", line=None, sentence=sentence))
                        wrong.append((owner, key))
                if done % BREATH == 0:
                    rest()
                if done % 500 == 0:
                    told(done, whole)
            if not same and remembered is not None and not any(f.key == key for f in findings):
                sentence = f"the mirror ends here, but {remembered.size} lines were read before"
                findings.append(Finding(site=owner, key=key, code="MIRROR-ROLLBACK", line=now.size, sentence=sentence))
            checkpoints += _checkpoint(db, now, heads, public, findings)
        for (owner, key), each in known.items():
            if each.size and (owner, key) not in there:
                sentence = f"no line is here, but {each.size} were read before"
                findings.append(Finding(site=owner, key=key, code="MIRROR-ROLLBACK", line=0, sentence=sentence))
    finally:
        db.close()
    told(whole, whole)
    return replace(
        begun,
        done=done,
        whole=whole,
        seconds=clock() - (begun.at or 0.0),
        ledgers=len(there),
        checkpoints=checkpoints,
        findings=tuple(findings),
        wrong_index=tuple(wrong),
    )


def _checkpoint(
    db: sqlite3.Connection,
    now: Known,
    heads: Mapping[int, str],
    public: Ed25519PublicKey,
    findings: list[Finding],
) -> int:
    """The newest head that the owner signed and the coordinator confirmed has to lie on the chain; 1 where there is
    one."""
    row = db.execute("SELECT note FROM checkpoints WHERE owner = ? AND key = ?", (now.owner, now.key)).fetchone()
    if row is None:
        return 0
    line: int | None = None
    try:
        head = chain.verify_checkpoint(row[0], public, owner=now.owner)
        if heads.get(head.size) == head.hash:
            return 1
        behind = head.size > now.size
        line = now.size if behind else head.size - 1
        code = "MIRROR-ROLLBACK" if behind else "MIRROR-FORK"
        sentence = f"the site signed a ledger of {head.size} lines that is not the one here"
    except CheckFailed as error:
        code, sentence = error.code, error.sentence
    findings.append(Finding(site=now.owner, key=now.key, code=code, line=line, sentence=sentence))
    return 1

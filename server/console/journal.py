"""What people did in the console: an append-only, hash-chained, signed record, made of the same lines as a ledger.

Each action has two lines: "asked", with who, what, about what and why, on disk before anything is done; and "done" or
"refused" afterwards, with the code. An action without a second line was cut off: look before you repeat it.

Exported, it ends in the head that the coordinator signed (a checkpoint, as witnesses get it), so that a file that was
edited, or that ends early, is found with the coordinator's public key alone: `verify_journal`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError, ProtocolError, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Checkpoint, Line
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.messages import canonical

OWNER = "console"
ASKED, DONE, REFUSED = "asked", "done", "refused"
UNDER_WAY, CUT_OFF, NOTED = "under way", "cut off", "noted"
LEAST_REASON, MOST_REASON = 3, 500
MOST_TEXT = 500
_OWN = ("by", "action", "on", "reason", "asked", "code")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Act:
    """One thing that somebody did. number: of its first line; ended: seconds of its second, None without one.

    outcome: done, refused, under way, cut off (nobody knows how far it came), or noted: it is one line by its nature.
    """

    number: int
    at: int
    by: str
    action: str
    on: str
    reason: str
    outcome: str
    code: str = ""
    ended: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        names = ("number", "at", "by", "action", "on", "reason", "outcome", "code", "ended")
        return {name: getattr(self, name) for name in names} | {"facts": dict(self.facts)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """The last look at every line, hash and signature on disk. problem: "" or "CODE: sentence"."""

    at: float
    size: int
    head: str
    problem: str


class Journal:
    """CONSORTIUM/console/journal.db, signed by the coordinator's key. One process has it open."""

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        self._ledger = Ledger.open(path, key) if path.exists() else Ledger.create(path, OWNER, key)
        self._public = key.public_key()
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._read = 0
        self._acts: dict[int, Act] = {}
        self._verifying = threading.Lock()
        self.verified: Verified | None = None
        """The newest look at all of it; None before the first."""
        self.path = path

    def act(self, by: str, action: str, about: str, reason: str, do: Callable[[], T], **facts: str | int) -> T:
        """Do something in a person's name, a line before and one after. UsageError ACTION-REASON without a reason."""
        reason = " ".join(reason.split())
        if not LEAST_REASON <= len(reason) <= MOST_REASON:
            raise UsageError("ACTION-REASON", f"say why, in {LEAST_REASON} to {MOST_REASON} characters")
        with self._lock:
            fields = {"by": by, "action": action, "on": about, "reason": reason, **facts}
            number = self._ledger.note(ASKED, **fields).number
            self._running.add(number)
        try:
            try:
                result = do()
            except CohortiumError as error:
                self.note(REFUSED, by=by, action=action, on=about, asked=number, code=error.code)
                raise
            except BaseException:
                self.note(REFUSED, by=by, action=action, on=about, asked=number, code="INTERNAL")
                raise
            self.note(DONE, by=by, action=action, on=about, asked=number)
        finally:
            self._running.discard(number)
        return result

    def note(self, about: str, /, **fields: Any) -> int:
        """One line; its number."""
        with self._lock:
            return self._ledger.note(about, **fields).number

    def lines(self, start: int = 0) -> list[Line]:
        with self._lock:
            return self._ledger.lines(start)

    def acts(self) -> list[Act]:
        """What was done, newest first. Only lines that are new since the last call are read."""
        with self._lock:
            new = self._ledger.lines(self._read) if self._ledger.head().size > self._read else []
            for line in new:
                self._take(line)
            self._read += len(new)
            acts, running = list(self._acts.values()), set(self._running)
        return [
            replace(act, outcome=UNDER_WAY) if act.outcome == CUT_OFF and act.number in running else act
            for act in reversed(acts)
        ]

    def _take(self, line: Line) -> None:
        if line.body["kind"] != "note":
            return
        about, fields = line.body["about"], line.body["fields"]
        if about not in (DONE, REFUSED):
            self._acts[line.number] = _act(line)
        elif (asked := fields.get("asked")) in self._acts:
            code, ended = _text(fields.get("code", "")), int(line.body["at"])
            self._acts[asked] = replace(self._acts[asked], outcome=about, code=code, ended=ended)

    @property
    def head(self) -> Checkpoint:
        """How long it is and where it stands, to compare with an exported file."""
        with self._lock:
            return self._ledger.head()

    @property
    def public_key(self) -> str:
        """The coordinator's key, raw, hex: what verifies an exported file."""
        return self._public.public_bytes_raw().hex()

    def verify_beside(self) -> bool:
        """Look at every line in a thread of its own; False where that is under way."""
        if not self._verifying.acquire(blocking=False):
            return False

        def look() -> None:
            try:
                self.verify()
            finally:
                self._verifying.release()

        threading.Thread(target=look, name="journal", daemon=True).start()
        return True

    @property
    def verifying(self) -> bool:
        return self._verifying.locked()

    def verify(self) -> Verified:
        """Every line on disk, from the first: chain, signatures, and the head that this process knows. Kept."""
        problem = ""
        with self._lock:
            known = self._ledger.head()
            try:
                lines = self._ledger.lines()
            except CheckFailed as error:
                lines, problem = [], f"{error.code}: {error.sentence}"
        if not problem:
            try:
                book, head = chain.replay(lines, owner=OWNER, public=self._public)
                if (book.size, head) != (known.size, known.hash):
                    problem = "LEDGER-HEAD: the file is not the one that this console wrote"
            except CheckFailed as error:
                problem = f"{error.code}: {error.sentence}"
        self.verified = Verified(at=time.time(), size=known.size, head=known.hash, problem=problem)
        return self.verified

    def export(self, path: Path) -> None:
        """All lines as JSONL, and the signed head as the last; `verify_journal` checks the file alone."""
        path.write_bytes(self.exported())

    def exported(self) -> bytes:
        with self._lock:
            lines, checkpoint = self._ledger.lines(), self._ledger.checkpoint()
        whole = [canonical(line.to_json()) for line in lines] + [canonical({"checkpoint": checkpoint})]
        return b"".join(text + b"\n" for text in whole)

    def close(self) -> None:
        with self._lock:
            self._ledger.close()


def verify_journal(path: Path, public: Ed25519PublicKey, *, head: str = "") -> Checkpoint:
    """The head of an exported journal, if every line and the end of it are the coordinator's; CheckFailed otherwise.

    head: "SIZE HASH" as the audit page shows it, or the beginning of the hash alone: an older export verifies by
    itself, and only a newer head from elsewhere tells that lines are missing at its end.
    Raises LEDGER-... for a line that was changed, left out or put in; JOURNAL-END where the signed head is missing or
    is another than the lines have; JOURNAL-HEAD where it is not the one that was named.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError:
        raise UsageError("JOURNAL-FILE", "the journal's file cannot be read", where=(str(path),)) from None
    lines, checkpoint = [], ""
    texts = raw.split(b"\n")
    if texts.pop() != b"":
        raise CheckFailed("JOURNAL-END", "the file ends in the middle of a line", where=(str(path),))
    for at, text in enumerate(texts):
        where = (f"{path}:{at + 1}",)
        try:
            value = json.loads(text)
            if canonical(value) != text:
                raise ValueError
        except (ValueError, RecursionError, ProtocolError):
            raise CheckFailed("LEDGER-FORM", f"line {at} is not canonical JSON", where=where) from None
        if isinstance(value, dict) and set(value) == {"checkpoint"}:
            if at != len(texts) - 1:
                raise CheckFailed("JOURNAL-END", "lines follow after the signed head", where=where)
            checkpoint = str(value["checkpoint"])
        else:
            lines.append(Line.from_json(value))
    if not checkpoint:
        raise CheckFailed(
            "JOURNAL-END",
            "the file ends without its signed head: lines may be missing",
            where=(str(path),),
            hint="export it again from the audit page",
        )
    book, found = chain.replay(lines, owner=OWNER, public=public)
    signed = chain.verify_checkpoint(checkpoint, public, owner=OWNER)
    if (signed.size, signed.hash) != (book.size, found):
        raise CheckFailed("JOURNAL-END", f"{book.size} lines are here, the signed head is of {signed.size}")
    named = head.split()
    if named and not (
        (len(named) == 1 or named[0] == str(signed.size)) and len(named[-1]) >= 16 and found.startswith(named[-1])
    ):
        raise CheckFailed("JOURNAL-HEAD", f"its head is {signed.size} {found}, not the one that was named")
    return signed


def _act(line: Line) -> Act:
    """The act that a line begins. Without a second line nobody knows how far it came."""
    about, fields = line.body["about"], line.body["fields"]
    return Act(
        number=line.number,
        at=int(line.body["at"]),
        by=_text(fields.get("by", "")),
        action=_text(fields.get("action", "") if about == ASKED else about),
        on=_text(fields.get("on", "")),
        reason=_text(fields.get("reason", "")),
        outcome=CUT_OFF if about == ASKED else NOTED,
        code=_text(fields.get("code", "")),
        facts={_text(name): _text(value) for name, value in sorted(fields.items()) if name not in _OWN},
    )


def _text(value: object) -> str:
    """For display: what people typed, without halves of characters that cannot be sent."""
    return str(value).encode("utf-8", "replace").decode()[:MOST_TEXT]

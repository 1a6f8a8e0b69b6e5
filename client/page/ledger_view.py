"""The site's own papers, read once for each change: ledger lines, approved proposals, the guard's log of refusals.

Nothing here opens the table. The guard may be running: the ledger is opened to read, which any number may do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cohortium.client.approval import Approval
from cohortium.client.gate import OUTBOUND
from cohortium.client.policy import Policy
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, ProtocolError
from cohortium.common.privacy.chain import Line, is_hex
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.proposals import Proposal, is_run_id, read_proposal
from cohortium.common.protocol.signing import public_from_raw

MOST_LOG_LINES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One line of guard.log: a message was refused. code: what left; local: the guard's own word for it."""

    at: int
    code: str
    local: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """One line of sent.log: an envelope that the guard handed out. bytes: its size; digest: SHA-256, hex."""

    at: int
    kind: str
    run: str
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Papers:
    """All of it, at one moment. sizes: digest of an envelope -> its bytes, of the few that the guard still has."""

    policy: Policy
    lines: tuple[Line, ...]
    proposals: Mapping[str, Proposal]  # run -> what was ever approved here
    refusals: tuple[Refusal, ...]
    sizes: Mapping[str, int]
    sent: tuple[Sent, ...] = ()


@dataclass
class Reader:
    """Papers of a site, read again when a file has changed. Any number of threads."""

    site: Site
    _stamp: object = None
    _papers: Papers | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def papers(self) -> Papers:
        with self._lock:
            stamp = self._now()
            if self._papers is None or stamp != self._stamp:
                self._papers, self._stamp = _read(self.site), stamp
            return self._papers

    def _now(self) -> object:
        guard = self.site.guard
        names = ("site.toml", "ledger.db", "ledger.db-wal", "guard.log", "sent.log", "vault.db", "vault.db-wal")
        approved = sorted((guard / "approved").glob("*/*"))
        return [_stamp(path) for path in (*(guard / name for name in names), *approved)]


def _stamp(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return str(path), 0, 0, 0
    return str(path), found.st_ino, found.st_mtime_ns, found.st_size


def _read(site: Site) -> Papers:
    policy = site.policy()
    with Ledger.open(site.guard / "ledger.db") as ledger:
        lines = tuple(ledger.lines())
    return Papers(
        policy=policy,
        lines=lines,
        proposals=_proposals(site, policy),
        refusals=_refusals(site.guard),
        sizes=_sizes(site.guard / "vault.db"),
        sent=_sent(site.guard),
    )


def _sent(guard: Path) -> tuple[Sent, ...]:
    found: list[Sent] = []
    for name in ("sent.log.1", "sent.log"):
        with contextlib.suppress(OSError):
            for line in (guard / name).read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_LOG_LINES:]:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    run = entry["run"] if is_run_id(str(entry["run"])) else ""
                    if entry["kind"] in OUTBOUND and is_hex(entry["sha256"], 32):
                        size, at = int(entry["bytes"]), int(entry["at"])
                        found.append(Sent(at=at, kind=entry["kind"], run=run, bytes=size, digest=entry["sha256"]))
    return tuple(found[-MOST_LOG_LINES:])


def _proposals(site: Site, policy: Policy) -> dict[str, Proposal]:
    coordinator = public_from_raw(bytes.fromhex(policy.coordinator_key))
    found = {}
    for path in sorted((site.guard / "approved").glob("*/proposal.bin")):
        with contextlib.suppress(OSError, CohortiumError):
            proposal = read_proposal(path.read_bytes(), coordinator)
            if proposal.run == path.parent.name:
                found[proposal.run] = proposal
    return found


def approved_at(site: Site, run: str) -> int:
    """When the officer signed, also where it was taken back; 0 where nobody did."""
    if not is_run_id(run):
        return 0
    for name in ("approval.sig", "approval.withdrawn"):
        with contextlib.suppress(OSError, ProtocolError):
            return Approval.from_bytes((site.guard / "approved" / run / name).read_bytes()).at
    return 0


def _refusals(guard: Path) -> tuple[Refusal, ...]:
    """The newest of guard.log. Its sentences stay there: they are written for the terminal of this hospital's IT."""
    found: list[Refusal] = []
    for name in ("guard.log.1", "guard.log"):
        try:
            text = (guard / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in text.splitlines()[-MOST_LOG_LINES:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                sent = (
                    entry.get("sent", "") if entry.get("event") else entry["code"]
                )  # older lines had it as their code
                if _is_word(sent):
                    local = entry["local"] if _is_word(entry["local"]) else ""
                    found.append(Refusal(at=_seconds(entry["at"]), code=sent, local=local))
    return tuple(found[-MOST_LOG_LINES:])


def _seconds(at: Any) -> int:
    """Of a log line's time: RFC 3339, or seconds since 1970 in older lines."""
    return int(datetime.fromisoformat(at).timestamp()) if isinstance(at, str) else int(at)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 80 and value.isascii() and value.replace("-", "").isalnum()


def _sizes(vault: Path) -> dict[str, int]:
    """Sizes of the sealed bytes that the guard keeps for a repeated question: the newest release's."""
    if not vault.exists():
        return {}
    try:
        db = sqlite3.connect(f"file:{vault}?mode=ro", uri=True, timeout=10)
        try:
            rows = db.execute("SELECT value FROM vault WHERE name = 'sealed'").fetchall()
        finally:
            db.close()
    except sqlite3.Error:
        return {}
    return {hashlib.sha256(bytes(value)).hexdigest(): len(value) for (value,) in rows}

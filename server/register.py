"""register.db: who takes part in a consortium, what was proposed to whom, and how each run stands.

One SQLite file, used by several processes and threads at once: the service asks it on every request, so whoever is
revoked is out with the next one. Tokens of invitations are kept as hashes. Writers queue up (BEGIN IMMEDIATE); what
is written is on disk (synchronous FULL) before the call returns: a used token stays used, a revocation stays.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

from cohortium.common.errors import Refused, UsageError
from cohortium.common.protocol.certificates import COORDINATOR, MEMBER_ROLES, SITE, Owner
from cohortium.common.protocol.invitation import TOKEN_BYTES, token_hash, token_text
from cohortium.common.protocol.messages import digest

ENROLLED, REVOKED = "enrolled", "revoked"
OPEN, APPROVED, DECLINED = "open", "approved", "declined"
RUN_STATES = ("proposed", "approved", "running", "stopping", "finished", "failed", "void")
ENDED = ("finished", "failed", "void")
DAY_S = 86_400
_VERSION = 1
# A run's envelope stands last: what stands behind it costs SQLite a walk over all its pages, for every run of a list.
_TABLES = (
    """CREATE TABLE members (
         name TEXT PRIMARY KEY, role TEXT NOT NULL, state TEXT NOT NULL, identity BLOB NOT NULL, officer BLOB NOT NULL,
         supernode TEXT NOT NULL, request TEXT NOT NULL, since INTEGER NOT NULL, revoked_at INTEGER
       ) STRICT""",
    "CREATE TABLE identities (name TEXT NOT NULL, identity BLOB NOT NULL, since INTEGER NOT NULL) STRICT",
    """CREATE TABLE invitations (
         hash BLOB PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, valid_until INTEGER NOT NULL, used_at INTEGER
       ) STRICT""",
    """CREATE TABLE runs (
         run TEXT PRIMARY KEY, folder TEXT NOT NULL, state TEXT NOT NULL, flower_id TEXT, attempts INTEGER NOT NULL,
         message TEXT NOT NULL, since INTEGER NOT NULL, envelope BLOB NOT NULL
       ) STRICT""",
    """CREATE TABLE approvals (
         run TEXT NOT NULL REFERENCES runs, site TEXT NOT NULL, state TEXT NOT NULL, signature BLOB NOT NULL,
         since INTEGER NOT NULL, PRIMARY KEY (run, site)
       ) STRICT""",
    "CREATE TABLE grants (run TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (run, name)) STRICT",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One who was enrolled. Keys are raw Ed25519, empty for a researcher; supernode is an OpenSSH public key.

    request: fingerprint of the certificate request it enrolled with. since: last enrolment or change of identity;
    revoked_at: last revocation, which stays after a new enrolment. Both in seconds since 1970.
    """

    name: str
    role: str
    state: str
    identity: bytes
    officer: bytes
    supernode: str
    request: str
    since: int
    revoked_at: int | None

    @property
    def active(self) -> bool:
        return self.state == ENROLLED


@dataclass(frozen=True, kw_only=True, slots=True)
class Invited:
    """An invitation as it may be shown: never its token's hash. used_at: when somebody joined with it, or None."""

    name: str
    role: str
    valid_until: int
    used_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a site said to a run. state: "open", "approved" or "declined"; since: seconds since 1970."""

    run: str
    site: str
    state: str
    since: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """How one run stands. folder: where its RunFolder is. since: when state last changed, seconds since 1970."""

    run: str
    folder: str
    state: str
    flower_id: str | None
    attempts: int
    message: str
    since: int


class Register:
    """An open register; made with mode 0600 where there is none. Threads may share it."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = Path(path), clock
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: WeakSet[_Held] = WeakSet()
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with self._write() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _TABLES:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise UsageError("REGISTER-VERSION", "register.db is of another version", where=(str(path),))

    def close(self) -> None:
        with self._lock:
            for held in list(self._opened):
                held.db.close()
            self._opened.clear()
        self._local = threading.local()

    # ---- members --------------------------------------------------------------------------------------------

    def invite(self, name: str, *, role: str = SITE, valid_s: int = DAY_S) -> str:
        """A new one-time token for a name; the text is nowhere on this machine afterwards.

        Inviting again replaces the name's earlier invitations: one paper at a time is good.
        """
        Owner(consortium="x", role=role, name=name)
        if name == COORDINATOR and role == SITE:
            # The coordinator's own ledger, witness and envelopes carry this name.
            raise UsageError("INVITE-NAME", f"no site is named {name!r}", hint="take the hospital's name")
        if role not in MEMBER_ROLES or not 0 < valid_s <= 30 * DAY_S:
            raise UsageError("INVITE-VALUE", "a member is a site, researcher or coordinator, for at most 30 days")
        token = token_text(secrets.token_bytes(TOKEN_BYTES))
        with self._write() as db:
            db.execute("DELETE FROM invitations WHERE name = ? AND used_at IS NULL", (name,))
            values = (token_hash(token), name, role, self._now() + valid_s)
            db.execute("INSERT INTO invitations (hash, name, role, valid_until) VALUES (?, ?, ?, ?)", values)
        return token

    def redeem(self, token: str) -> tuple[str, str]:
        """(name, role) of a token that was never used; afterwards it was. Refused INVITE-REFUSED: unknown, used and
        expired look alike."""
        with self._write() as db:
            return self._redeem(db, token)

    def enrol(
        self, *, name: str, role: str, identity: bytes, officer: bytes, supernode: str, request: str = ""
    ) -> Member:
        """Make a member. The same keys again are the same member (its reply was lost).

        Refused MEMBER-EXISTS: enrolled with other keys or in another role (revoke first); MEMBER-KEYS: a key that
        somebody else has, or one key for two duties.
        """
        with self._write() as db:
            return self._enrol(db, name, role, identity, officer, supernode, request)

    def admit(self, token: str, *, identity: bytes, officer: bytes, supernode: str, request: str) -> Member:
        """`redeem` and `enrol` at once: a token whose request is refused is not used up."""
        with self._write() as db:
            name, role = self._redeem(db, token)
            return self._enrol(db, name, role, identity, officer, supernode, request)

    def invited(self, token: str) -> tuple[str, str] | None:
        """(name, role) of a token that `redeem` would accept now, or None. Uses nothing up."""
        try:
            key = token_hash(token)
        except UsageError:
            return None
        query = "SELECT name, role FROM invitations WHERE hash = ? AND used_at IS NULL AND valid_until > ?"
        row = self._read().execute(query, (key, self._now())).fetchone()
        return None if row is None else (row[0], row[1])

    def invitations(self) -> list[Invited]:
        """Every invitation that was not replaced or withdrawn, the newest first; used and expired ones too."""
        query = "SELECT name, role, valid_until, used_at FROM invitations ORDER BY valid_until DESC, name"
        return [
            Invited(name=row[0], role=row[1], valid_until=row[2], used_at=row[3]) for row in self._read().execute(query)
        ]

    def member(self, name: str) -> Member | None:
        row = self._read().execute(f"{_MEMBER} WHERE name = ?", (name,)).fetchone()
        return None if row is None else _member(row)

    def members(self) -> list[Member]:
        return [_member(row) for row in self._read().execute(f"{_MEMBER} ORDER BY name")]

    def identities(self, name: str) -> list[tuple[bytes, int]]:
        """Every identity that a member ever had, oldest first, with the second since when."""
        query = "SELECT identity, since FROM identities WHERE name = ? ORDER BY rowid"
        return [(row[0], row[1]) for row in self._read().execute(query, (name,))]

    def earlier(self, name: str) -> list[str]:
        """Hex of the identities that a member changed from since it last enrolled, oldest first."""
        member = self.member(name)
        if member is None:
            return []
        # A new enrolment begins a second after the revocation before it, at the earliest; a change of keys needs none.
        since = -1 if member.revoked_at is None else member.revoked_at
        return [key.hex() for key, at in self.identities(name) if at > since and key and key != member.identity]

    def revoke(self, name: str) -> None:
        """Out from now on, with every certificate issued until now; Refused MEMBER-UNKNOWN."""
        with self._write() as db:
            values = (REVOKED, self._now(), name)
            if db.execute("UPDATE members SET state = ?, revoked_at = ? WHERE name = ?", values).rowcount != 1:
                raise _unknown()
            db.execute("DELETE FROM invitations WHERE name = ? AND used_at IS NULL", (name,))

    def revoked(self) -> frozenset[str]:
        return frozenset(r[0] for r in self._read().execute("SELECT name FROM members WHERE state = ?", (REVOKED,)))

    def rotate(self, name: str, identity: bytes) -> Member:
        """Another identity; the caller has verified the three signatures. Refused MEMBER-UNKNOWN, MEMBER-KEYS."""
        with self._write() as db:
            row = db.execute(f"{_MEMBER} WHERE name = ? AND state = ?", (name, ENROLLED)).fetchone()
            if row is None:
                raise _unknown()
            # A key that was given up stays given up.
            used = db.execute("SELECT 1 FROM identities WHERE identity = ?", (identity,)).fetchone()
            other = db.execute("SELECT 1 FROM members WHERE officer = ?", (identity,)).fetchone()
            if used or other:
                raise _keys()
            now = self._now()
            db.execute("UPDATE members SET identity = ?, since = ? WHERE name = ?", (identity, now, name))
            db.execute("INSERT INTO identities VALUES (?, ?, ?)", (name, identity, now))
            return _member(db.execute(f"{_MEMBER} WHERE name = ?", (name,)).fetchone())

    # ---- entitlement ----------------------------------------------------------------------------------------

    def grant(self, run: str, name: str) -> None:
        """Let a member have a run's synthetic rows and status; Refused MEMBER-UNKNOWN, RUN-UNKNOWN."""
        with self._write() as db:
            if db.execute("SELECT 1 FROM members WHERE name = ?", (name,)).fetchone() is None:
                raise _unknown()
            if db.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone() is None:
                raise _no_run()
            db.execute("INSERT OR IGNORE INTO grants VALUES (?, ?)", (run, name))

    def entitled(self, run: str, name: str) -> bool:
        """Whether a member may see a run: a site that the run names, one who was granted it, a coordinator."""
        query = """SELECT 1 FROM members m JOIN runs r ON r.run = ?1 WHERE m.name = ?2 AND m.state = 'enrolled' AND (
                     m.role = 'coordinator'
                     OR (m.role = 'site' AND EXISTS (SELECT 1 FROM approvals WHERE run = ?1 AND site = ?2))
                     OR EXISTS (SELECT 1 FROM grants WHERE run = ?1 AND name = ?2))"""
        return self._read().execute(query, (run, name)).fetchone() is not None

    def grants(self, name: str) -> list[str]:
        """The runs that were granted to a member by name, in order of their names."""
        return [row[0] for row in self._read().execute("SELECT run FROM grants WHERE name = ? ORDER BY run", (name,))]

    # ---- proposals ------------------------------------------------------------------------------------------

    def propose(self, run: str, *, folder: str, envelope: bytes, sites: Sequence[str]) -> None:
        """A new run, open at each of its sites. Refused RUN-EXISTS, MEMBER-UNKNOWN (a site that is not enrolled)."""
        if not sites or len(set(sites)) != len(sites):
            raise UsageError("RUN-SITES", "a run names its sites, each once")
        with self._write() as db:
            if db.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone() is not None:
                raise Refused("RUN-EXISTS", "there is a run of this name")
            for site in sites:
                query = "SELECT 1 FROM members WHERE name = ? AND role = ? AND state = ?"
                if db.execute(query, (site, SITE, ENROLLED)).fetchone() is None:
                    raise _unknown()
            now = self._now()
            db.execute(
                "INSERT INTO runs (run, folder, envelope, state, attempts, message, since)"
                " VALUES (?, ?, ?, 'proposed', 0, '', ?)",
                (run, str(folder), envelope, now),
            )
            db.executemany("INSERT INTO approvals VALUES (?, ?, 'open', x'', ?)", [(run, site, now) for site in sites])

    def proposals(self, site: str) -> list[tuple[str, bytes, str]]:
        """(run, envelope, "open" | "approved" | "declined") of every run that names a site and has not ended."""
        query = f"""SELECT r.run, r.envelope, a.state FROM approvals a JOIN runs r USING (run)
                    WHERE a.site = ? AND r.state NOT IN {ENDED} ORDER BY r.rowid"""
        return [(row[0], row[1], row[2]) for row in self._read().execute(query, (site,))]

    def envelope(self, run: str) -> bytes:
        """The proposal as it was signed; Refused RUN-UNKNOWN."""
        row = self._read().execute("SELECT envelope FROM runs WHERE run = ?", (run,)).fetchone()
        if row is None:
            raise _no_run()
        return bytes(row[0])

    def approve(self, run: str, site: str, *, proposal: str, signature: bytes, declined: bool) -> None:
        """Write a site's word down; it may be changed until the run starts, and said again at any time.

        Refused RUN-UNKNOWN (no such run for this site), PROPOSAL-OTHER (another proposal was approved than the one
        that is open; `proposal` is the SHA-256 of its envelope), RUN-CLOSED.
        """
        state = DECLINED if declined else APPROVED
        with self._write() as db:
            query = """SELECT r.envelope, r.state, a.state, a.signature FROM approvals a JOIN runs r USING (run)
                       WHERE a.run = ? AND a.site = ?"""
            row = db.execute(query, (run, site)).fetchone()
            if row is None:
                raise _no_run()
            if digest(row[0]) != proposal:
                raise Refused("PROPOSAL-OTHER", "another proposal was answered than the one that is open")
            if (row[2], row[3]) == (state, signature):
                return
            if row[1] != "proposed":
                raise Refused("RUN-CLOSED", "the run no longer waits for approvals")
            values = (state, signature, self._now(), run, site)
            db.execute("UPDATE approvals SET state = ?, signature = ?, since = ? WHERE run = ? AND site = ?", values)

    def approvals(self, run: str) -> dict[str, str]:
        """Site -> "open", "approved" or "declined"; empty for an unknown run."""
        query = "SELECT site, state FROM approvals WHERE run = ? ORDER BY site"
        return {row[0]: row[1] for row in self._read().execute(query, (run,))}

    def answers(self, run: str) -> list[Answer]:
        """What the sites said to one run, in order of their names; empty for an unknown run."""
        query = f"{_ANSWER} WHERE run = ? ORDER BY site"
        return [_answer(row) for row in self._read().execute(query, (run,))]

    def answers_to_proposed(self) -> list[Answer]:
        """What the sites said to every run that waits for approvals, in order of run and site."""
        query = f"{_ANSWER} WHERE run IN (SELECT run FROM runs WHERE state = 'proposed') ORDER BY run, site"
        return [_answer(row) for row in self._read().execute(query)]

    def tallies(self) -> dict[str, tuple[int, int]]:
        """Run -> (sites that approved it, sites that it was proposed to)."""
        query = "SELECT run, sum(state = 'approved'), count(*) FROM approvals GROUP BY run"
        return {row[0]: (row[1], row[2]) for row in self._read().execute(query)}

    def runs_that_name(self, site: str) -> set[str]:
        return {row[0] for row in self._read().execute("SELECT run FROM approvals WHERE site = ?", (site,))}

    def signatures(self, run: str) -> dict[str, bytes]:
        """Site -> its officer's signature, of those that approved."""
        query = "SELECT site, signature FROM approvals WHERE run = ? AND state = 'approved' ORDER BY site"
        return {row[0]: bytes(row[1]) for row in self._read().execute(query, (run,))}

    # ---- runs -----------------------------------------------------------------------------------------------

    def runs(self) -> list[RunRow]:
        """Every run, oldest first."""
        return [_run(row) for row in self._read().execute(f"{_RUN} ORDER BY rowid")]

    def run_row(self, run: str) -> RunRow:
        """Refused RUN-UNKNOWN."""
        row = self._read().execute(f"{_RUN} WHERE run = ?", (run,)).fetchone()
        if row is None:
            raise _no_run()
        return _run(row)

    def set_run(
        self,
        run: str,
        *,
        state: str | None = None,
        flower_id: str | int | None = None,
        attempts: int | None = None,
        message: str | None = None,
    ) -> RunRow:
        """Change what is given. Refused RUN-UNKNOWN, RUN-ENDED (a run that ended stays as it ended)."""
        if state is not None and state not in RUN_STATES:
            raise UsageError("RUN-STATE", "no such state of a run")
        with self._write() as db:
            row = db.execute(f"{_RUN} WHERE run = ?", (run,)).fetchone()
            if row is None:
                raise _no_run()
            was = _run(row)
            if was.state in ENDED and state not in (None, was.state):
                raise Refused("RUN-ENDED", "the run has ended")
            values = (
                was.state if state is None else state,
                was.flower_id if flower_id is None else str(flower_id),
                was.attempts if attempts is None else attempts,
                was.message if message is None else message,
                was.since if state in (None, was.state) else self._now(),
                run,
            )
            db.execute(
                "UPDATE runs SET state = ?, flower_id = ?, attempts = ?, message = ?, since = ? WHERE run = ?", values
            )
            return _run(db.execute(f"{_RUN} WHERE run = ?", (run,)).fetchone())

    # ---- inside ---------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._clock())

    def _read(self) -> sqlite3.Connection:
        held: _Held | None = getattr(self._local, "held", None)
        if held is None:
            # One connection a thread; gone with its thread, or closed by whoever calls `close`.
            held = _Held(sqlite3.connect(self.path, isolation_level=None, check_same_thread=False))
            held.db.execute("PRAGMA busy_timeout=60000")
            held.db.execute("PRAGMA journal_mode=WAL")
            held.db.execute("PRAGMA synchronous=FULL")
            held.db.execute("PRAGMA foreign_keys=ON")
            self._local.held = held
            with self._lock:
                self._opened.add(held)
        return held.db

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        db = self._read()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def _redeem(self, db: sqlite3.Connection, token: str) -> tuple[str, str]:
        try:
            key = token_hash(token)
        except UsageError:
            raise _no_invitation() from None
        now = self._now()
        query = "SELECT name, role FROM invitations WHERE hash = ? AND used_at IS NULL AND valid_until > ?"
        row = db.execute(query, (key, now)).fetchone()
        if row is None:
            raise _no_invitation()
        db.execute("UPDATE invitations SET used_at = ? WHERE hash = ?", (now, key))
        return row[0], row[1]

    def _enrol(
        self,
        db: sqlite3.Connection,
        name: str,
        role: str,
        identity: bytes,
        officer: bytes,
        supernode: str,
        request: str,
    ) -> Member:
        Owner(consortium="x", role=role, name=name)
        if role not in MEMBER_ROLES or (role == SITE and not (len(identity) == len(officer) == 32 and supernode)):
            raise Refused("MEMBER-KEYS", "a site has an identity, an officer and a SuperNode key")
        if identity and identity == officer:
            raise _keys()
        row = db.execute(f"{_MEMBER} WHERE name = ?", (name,)).fetchone()
        was = None if row is None else _member(row)
        same = was is not None and (was.role, was.identity, was.officer, was.supernode) == (
            role,
            identity,
            officer,
            supernode,
        )
        if was is not None and was.active and not same:
            raise Refused(
                "MEMBER-EXISTS", "this name is enrolled with other keys", hint=f"cohortium sites revoke {name}"
            )
        for key in filter(None, (identity, officer)):
            query = "SELECT 1 FROM members WHERE name <> ?1 AND (identity = ?2 OR officer = ?2)"
            past = "SELECT 1 FROM identities WHERE name <> ?1 AND identity = ?2"
            if db.execute(query, (name, key)).fetchone() or db.execute(past, (name, key)).fetchone():
                raise _keys()
        query = "SELECT 1 FROM members WHERE name <> ? AND supernode = ? AND supernode <> ''"
        if db.execute(query, (name, supernode)).fetchone():
            raise _keys()
        now = self._now()
        revoked_at = None if was is None else was.revoked_at
        db.execute(
            "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (name, role, ENROLLED, identity, officer, supernode, request, now, revoked_at),
        )
        if identity and (was is None or was.identity != identity):
            db.execute("INSERT INTO identities VALUES (?, ?, ?)", (name, identity, now))
        return _member(db.execute(f"{_MEMBER} WHERE name = ?", (name,)).fetchone())


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Held:
    """A connection that can be held weakly."""

    db: sqlite3.Connection


_MEMBER = "SELECT name, role, state, identity, officer, supernode, request, since, revoked_at FROM members"
_ANSWER = "SELECT run, site, state, since FROM approvals"
_RUN = "SELECT run, folder, state, flower_id, attempts, message, since FROM runs"


def _member(row: Any) -> Member:
    return Member(
        name=row[0],
        role=row[1],
        state=row[2],
        identity=bytes(row[3]),
        officer=bytes(row[4]),
        supernode=row[5],
        request=row[6],
        since=row[7],
        revoked_at=row[8],
    )


def _answer(row: Any) -> Answer:
    return Answer(run=row[0], site=row[1], state=row[2], since=row[3])


def _run(row: Any) -> RunRow:
    return RunRow(
        run=row[0],
        folder=row[1],
        state=row[2],
        flower_id=row[3],
        attempts=row[4],
        message=row[5],
        since=row[6],
    )


def _unknown() -> Refused:
    return Refused("MEMBER-UNKNOWN", "nobody of this name takes part", hint="cohortium sites list")


def _keys() -> Refused:
    return Refused("MEMBER-KEYS", "a key belongs to one member and has one duty")


def _no_run() -> Refused:
    return Refused("RUN-UNKNOWN", "there is no such run")


def _no_invitation() -> Refused:
    return Refused("INVITE-REFUSED", "this invitation is not valid: unknown, used or expired")

"""Who may use the console: accounts, their second factors and their sessions, in CONSORTIUM/console/accounts.db.

Passwords are kept as argon2id hashes (RFC 9106, second recommended option), sessions as SHA-256 of a random token:
whoever reads the file can sign in as nobody, except that TOTP secrets (RFC 6238) must be kept as they are; the file
has mode 0600. An account of an identity provider has no password and no second factor here.

A session begins with the password, is replaced by another one when the second factor was shown, and is never raised.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import argon2
import pyotp

from cohortium.common.errors import Refused, UsageError
from cohortium.server.console.passwords import MOST_PASSWORD, NOBODY, checked
from cohortium.server.console.store import Store
from cohortium.server.console.tries import Tries, place

COORDINATOR, AUDITOR, SITE = "coordinator", "auditor", "site"
ROLES = (COORDINATOR, AUDITOR, SITE)
ONE_TIME_S = 7 * 86_400
"""So long a password that somebody else has set can be used, once, to choose one's own."""
HALF_WAY_S = 600
"""So long a sign-in may take from the password to its end."""
MOST_BROWSERS, BROWSER_S = 20, 90 * 86_400
SWEEP_S = 30
_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
_STEP_S = 30
_MOST_HASHING = 2
"""Argon2 takes 64 MiB each: so many at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """site: the hospital that a member of role "site" belongs to, else "". has_totp: a second factor is enrolled.

    must_change: the password was set by somebody else. last_in: when it signed in last.
    """

    name: str
    role: str
    site: str
    has_totp: bool
    issuer: str
    since: int
    closed_at: int | None
    must_change: bool = False
    last_in: int | None = None

    @property
    def local(self) -> bool:
        return not self.issuer


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """complete: everything was shown. factor: the second factor was. csrf: the token that each of its forms carries.

    until: when it ends if it is used no more; at the latest: began + the longest time of a session.
    """

    account: Account
    csrf: str
    began: int
    seen: int
    complete: bool
    factor: bool = False
    address: str = ""
    until: int = 0


class Accounts:
    """An open file of accounts; made where there is none. Threads may share it."""

    def __init__(
        self, path: Path, *, session_s: int = 12 * 3600, idle_s: int = 3600, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock, self.session_s, self.idle_s = clock, session_s, idle_s
        self._store = Store(path)
        self.tries = Tries(self._store, clock)
        self._hashing = threading.BoundedSemaphore(_MOST_HASHING)
        self._hasher = argon2.PasswordHasher.from_parameters(argon2.profiles.RFC_9106_LOW_MEMORY)
        self._nobody = NOBODY
        self._swept = 0

    def close(self) -> None:
        self._store.close()

    # ---- accounts -------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        role: str,
        password: str | None,
        site: str = "",
        issuer: str = "",
        subject: str = "",
        one_time: bool = False,
    ) -> Account:
        """A new account. one_time: the password has to be changed at the first sign-in, within ONE_TIME_S.

        UsageError ACCOUNT-NAME, ACCOUNT-ROLE, ACCOUNT-PASSWORD; Refused ACCOUNT-EXISTS.
        """
        if not _NAME.fullmatch(name):
            raise UsageError("ACCOUNT-NAME", "a name has small letters, digits and . _ @ -, at most 64")
        _check_role(role, site)
        hashed = "" if password is None else self._hashed(password, name)
        change_by = self._now() + ONE_TIME_S if one_time else None
        with self._store.write() as db:
            if db.execute("SELECT 1 FROM accounts WHERE name = ?", (name,)).fetchone():
                raise Refused("ACCOUNT-EXISTS", f"there is an account {name!r}")
            values = (name, role, site, hashed, change_by, issuer, subject, self._now())
            db.execute("INSERT INTO accounts VALUES (?, ?, ?, ?, ?, '', 0, ?, ?, ?, NULL, NULL)", values)
        return self._known(name)

    def account(self, name: str) -> Account | None:
        row = self._store.one(f"{_ACCOUNT} WHERE name = ?", (name,))
        return None if row is None else _account(row)

    def accounts(self) -> list[Account]:
        return [_account(row) for row in self._store.all(f"{_ACCOUNT} ORDER BY name")]

    def of_subject(self, issuer: str, subject: str) -> Account | None:
        """The account of a person at an identity provider."""
        row = self._store.one(f"{_ACCOUNT} WHERE issuer = ? AND subject = ? AND issuer <> ''", (issuer, subject))
        return None if row is None else _account(row)

    def admit(self, *, issuer: str, subject: str, wish: str, role: str, site: str) -> Account:
        """The account of a person whom an identity provider has just vouched for, with the role that it gives now.

        Made at the first sign-in, under a name like `wish` that nobody has: it never becomes somebody else's account.
        Refused ACCOUNT-CLOSED where a coordinator has closed it.
        """
        _check_role(role, site)
        found = self.of_subject(issuer, subject)
        if found is None:
            plain = re.sub(r"[^a-z0-9._@-]+", "-", wish.lower()).strip("-._@")[:56] or "person"
            number, name = 1, plain
            while self.account(name) is not None:
                number, name = number + 1, f"{plain}-{number + 1}"
            found = self.add(name, role=role, password=None, site=site, issuer=issuer, subject=subject)
        if found.closed_at is not None:
            raise Refused("ACCOUNT-CLOSED", "this account is closed", hint="ask a coordinator of the consortium")
        self.set_role(found.name, role, site)
        return self._known(found.name)

    def close_account(self, name: str) -> None:
        """Out at once, with all sessions; the name stays taken. Refused ACCOUNT-UNKNOWN, ACCOUNT-LAST."""
        with self._store.write() as db:
            row = db.execute("SELECT role, closed_at FROM accounts WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise Refused("ACCOUNT-UNKNOWN", f"there is no account {name!r}")
            query = "SELECT count(*) FROM accounts WHERE role = ? AND closed_at IS NULL AND name <> ?"
            if row == (COORDINATOR, None) and not db.execute(query, (COORDINATOR, name)).fetchone()[0]:
                raise Refused(
                    "ACCOUNT-LAST",
                    f"{name} is the only coordinator who can sign in",
                    hint="add another coordinator first",
                )
            db.execute("UPDATE accounts SET closed_at = ? WHERE name = ? AND closed_at IS NULL", (self._now(), name))
            db.execute("DELETE FROM sessions WHERE name = ?", (name,))
            db.execute("DELETE FROM browsers WHERE name = ?", (name,))

    def set_role(self, name: str, role: str, site: str = "") -> None:
        """What the identity provider says now; an account's sessions end when it changes."""
        _check_role(role, site)
        with self._store.write() as db:
            row = db.execute("SELECT role, site FROM accounts WHERE name = ?", (name,)).fetchone()
            if row is not None and tuple(row) != (role, site):
                db.execute("UPDATE accounts SET role = ?, site = ? WHERE name = ?", (role, site, name))
                db.execute("DELETE FROM sessions WHERE name = ?", (name,))

    def set_password(self, name: str, password: str, *, one_time: bool = False) -> None:
        """Another password; every session of the account ends, and its wrong tries are forgotten."""
        hashed = self._hashed(password, name)
        change_by = self._now() + ONE_TIME_S if one_time else None
        with self._store.write() as db:
            query = "UPDATE accounts SET password = ?, change_by = ? WHERE name = ? AND issuer = ''"
            if db.execute(query, (hashed, change_by, name)).rowcount != 1:
                raise Refused("ACCOUNT-UNKNOWN", f"there is no local account {name!r}")
            db.execute("DELETE FROM sessions WHERE name = ?", (name,))
        self.tries.forget(name)

    # ---- signing in -----------------------------------------------------------------------------------------

    def check_password(self, name: str, password: str, *, address: str, browser: str = "") -> Account | None:
        """The account, or None: wrong, unknown and closed look alike and take as long. Refused SIGN-IN-WAIT.

        browser: the token of `remember`, if the browser has one.
        """
        counted = self.tries.reserve(*self._counted(name, address, browser))
        query = "SELECT password, closed_at, change_by FROM accounts WHERE name = ?"
        row = self._store.one(query, (name,))
        usable = row is not None and row[0] and row[1] is None and (row[2] is None or self._now() <= row[2])
        hashed = row[0] if usable else self._nobody
        try:
            with self._hashing:
                # One character more than any password has: what is too long is wrong, and takes no longer.
                right = self._hasher.verify(hashed, password[: MOST_PASSWORD + 1]) and usable
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            right = False
        if not right:
            return None
        self.tries.forgive(counted)
        return self.account(name)

    def has_password(self, name: str, password: str) -> bool:
        """Whether a local account's password is this one: for somebody who is signed in as it. Counts nothing."""
        row = self._store.one("SELECT password FROM accounts WHERE name = ?", (name,))
        try:
            with self._hashing:
                return bool(row and row[0] and self._hasher.verify(row[0], password[: MOST_PASSWORD + 1]))
        except argon2.exceptions.VerificationError:
            return False

    def check_code(self, name: str, code: str, *, address: str, browser: str = "") -> bool:
        """Whether this is the account's code of now or one step beside it; each is good once. Refused SIGN-IN-WAIT."""
        counted = self.tries.reserve(("code", name), *self._counted(name, address, browser))
        with self._store.write() as db:
            query = "SELECT totp, totp_step FROM accounts WHERE name = ? AND closed_at IS NULL"
            row = db.execute(query, (name,)).fetchone()
            step = self._step(row[0], code, after=row[1]) if row is not None and row[0] else None
            if step is None:
                return False
            db.execute("UPDATE accounts SET totp_step = ? WHERE name = ?", (step, name))
        self.tries.forgive(counted)
        return True

    def enrol_totp(self, name: str, secret: str, code: str) -> bool:
        """Keep a second factor once a code has shown that the person's device has it; never in another's place."""
        step = self._step(secret, code, after=0)
        if step is None:
            return False
        with self._store.write() as db:
            query = "UPDATE accounts SET totp = ?, totp_step = ? WHERE name = ? AND totp = '' AND issuer = ''"
            return db.execute(query, (secret, step, name)).rowcount == 1

    def drop_totp(self, name: str) -> None:
        """For a lost device: the next sign-in asks for a new one. Every session of the account ends."""
        with self._store.write() as db:
            query = "UPDATE accounts SET totp = '', totp_step = 0 WHERE name = ? AND issuer = ''"
            if db.execute(query, (name,)).rowcount != 1:
                raise Refused("ACCOUNT-UNKNOWN", f"there is no local account {name!r}")
            db.execute("DELETE FROM sessions WHERE name = ?", (name,))
            db.execute("DELETE FROM browsers WHERE name = ?", (name,))
        self.tries.forget(name)

    def remember(self, name: str) -> str:
        """A token for a browser in which somebody has just signed in: its wrong tries are counted by themselves."""
        token, now = secrets.token_urlsafe(32), self._now()
        with self._store.write() as db:
            db.execute("INSERT INTO browsers VALUES (?, ?, ?)", (_hash(token), name, now))
            db.execute("DELETE FROM browsers WHERE since < ?", (now - BROWSER_S,))
            kept = "SELECT hash FROM browsers WHERE name = ? ORDER BY since DESC, hash LIMIT ?"
            query = f"DELETE FROM browsers WHERE name = ? AND hash NOT IN ({kept})"
            db.execute(query, (name, name, MOST_BROWSERS))
        return token

    # ---- sessions -------------------------------------------------------------------------------------------

    def begin(self, name: str, *, complete: bool, factor: bool = False, address: str = "", instead_of: str = "") -> str:
        """A new session's token. A session is never raised: each step begins anew and ends the one before it."""
        token, now = secrets.token_urlsafe(32), self._now()
        self.expire(force=True)
        with self._store.write() as db:
            if instead_of:
                db.execute("DELETE FROM sessions WHERE hash = ?", (_hash(instead_of),))
            values = (_hash(token), name, secrets.token_urlsafe(32), now, now, int(factor or complete), int(complete))
            db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, '', ?)", (*values, address))
            if complete:
                db.execute("UPDATE accounts SET last_in = ? WHERE name = ?", (now, name))
        return token

    def session(self, token: str, *, awake: bool = True) -> Session | None:
        """The session of a token while it lasts. awake: looking at it counts as use."""
        row = self._store.one(f"{_SESSION} WHERE hash = ?", (_hash(token),))
        found = None if row is None else self._session(row)
        if found is None:
            return None
        now = self._now()
        if awake and now - found.seen >= 60:
            with self._store.write() as db:
                db.execute("UPDATE sessions SET seen = ? WHERE hash = ?", (now, _hash(token)))
        return found

    def sessions(self, name: str) -> list[Session]:
        """The complete sessions of an account that last, newest first."""
        rows = self._store.all(f"{_SESSION} WHERE name = ? AND complete = 1 ORDER BY began DESC, hash", (name,))
        return [found for found in (self._session(row) for row in rows) if found is not None]

    def pending_totp(self, token: str) -> str:
        """The secret that a session's person is about to enrol: made here, once, and never chosen by a browser."""
        with self._store.write() as db:
            query = "UPDATE sessions SET pending = ? WHERE hash = ? AND pending = ''"
            db.execute(query, (pyotp.random_base32(), _hash(token)))
            row = db.execute("SELECT pending FROM sessions WHERE hash = ?", (_hash(token),)).fetchone()
        return str(row[0]) if row is not None else ""

    def end(self, token: str) -> None:
        with self._store.write() as db:
            db.execute("DELETE FROM sessions WHERE hash = ?", (_hash(token),))

    def end_all(self, name: str) -> None:
        with self._store.write() as db:
            db.execute("DELETE FROM sessions WHERE name = ?", (name,))

    # ---- for the journal ------------------------------------------------------------------------------------

    def expire(self, *, force: bool = False) -> None:
        """End the sessions whose time is over, and leave word of each that was complete."""
        now = self._now()
        if not force and abs(now - self._swept) < SWEEP_S:
            return
        self._swept = now
        over = (now - self.session_s, now - self.idle_s, now - HALF_WAY_S)
        where = "began < ? OR seen < ? OR (complete = 0 AND began < ?)"
        if not self._store.one(f"SELECT 1 FROM sessions WHERE {where} LIMIT 1", over):
            return
        with self._store.write() as db:
            ended = db.execute(f"DELETE FROM sessions WHERE {where} RETURNING name, began, complete", over).fetchall()
            for name, began, complete in ended:
                if complete:
                    why = "age" if began < over[0] else "idle"
                    db.execute(_TELL, ("session-expired", json.dumps({"by": name, "why": why})))

    def tell(self, about: str, **fields: str | int) -> None:
        """Leave word for the journal, which only the console's process may write."""
        with self._store.write() as db:
            db.execute(_TELL, (about, json.dumps(fields)))

    def pass_on(self, note: Callable[..., Any]) -> None:
        """Give what was left for the journal to it: twice after a crash, rather than never."""
        if self._store.one("SELECT 1 FROM told LIMIT 1", ()) is None:
            return
        for number, about, fields in self._store.all("SELECT n, about, fields FROM told ORDER BY n"):
            note(about, **json.loads(fields))
            with self._store.write() as db:
                db.execute("DELETE FROM told WHERE n = ?", (number,))

    # ---- inside ---------------------------------------------------------------------------------------------

    def _counted(self, name: str, address: str, browser: str) -> tuple[tuple[str, str], ...]:
        """What a try is counted as: a browser that this name has signed in with is counted by itself."""
        query = "SELECT 1 FROM browsers WHERE hash = ? AND name = ? AND since >= ?"
        if browser and self._store.one(query, (_hash(browser), name, self._now() - BROWSER_S)):
            return (("browser", _hash(browser).hex()),)
        return (("from", place(address)), ("name", name))

    def _session(self, row: Any) -> Session | None:
        """None where it is over, or its account is closed."""
        name, csrf, began, seen, factor, complete, address = row
        account, now = self.account(name), self._now()
        longest = self.session_s if complete else min(self.session_s, HALF_WAY_S)
        if account is None or account.closed_at is not None or now - began > longest or now - seen > self.idle_s:
            return None
        return Session(
            account=account,
            csrf=csrf,
            began=began,
            seen=seen,
            complete=bool(complete),
            factor=bool(factor),
            address=address,
            until=min(began + longest, seen + self.idle_s),
        )

    def _step(self, secret: str, code: str, *, after: int) -> int | None:
        """The time step whose code this is, now or one beside it, if it is a later one than `after`."""
        now, given = int(self._clock()) // _STEP_S, code.replace(" ", "").encode(errors="replace")
        totp = pyotp.TOTP(secret)
        matching = [
            step
            for step in (now - 1, now, now + 1)
            if secrets.compare_digest(totp.at(step * _STEP_S).encode(), given) and step > after
        ]
        return max(matching, default=None)

    def _hashed(self, password: str, name: str) -> str:
        fine = checked(password, name)
        with self._hashing:
            return self._hasher.hash(fine)

    def _known(self, name: str) -> Account:
        found = self.account(name)
        assert found is not None
        return found

    def _now(self) -> int:
        return int(self._clock())


_ACCOUNT = "SELECT name, role, site, totp, issuer, since, closed_at, change_by, last_in FROM accounts"
_SESSION = "SELECT name, csrf, began, seen, factor, complete, address FROM sessions"
_TELL = "INSERT INTO told (about, fields) VALUES (?, ?)"


def _account(row: Any) -> Account:
    return Account(
        name=row[0],
        role=row[1],
        site=row[2],
        has_totp=bool(row[3]),
        issuer=row[4],
        since=row[5],
        closed_at=row[6],
        must_change=row[7] is not None,
        last_in=row[8],
    )


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _check_role(role: str, site: str) -> None:
    if role not in ROLES or (role == SITE) != bool(site):
        raise UsageError(
            "ACCOUNT-ROLE",
            "a role is coordinator, auditor or site; a site's member names its site",
            hint="--site NAME",
        )

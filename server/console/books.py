"""What the sites' mirrored ledgers say, kept ready: sizes, heads, charges and ε by site and run.

A thread reads what is new in CONSORTIUM/mirror.db every few seconds and verifies each line (`books_index.follow`)
before it counts; requests only look at the finished picture.

Exact: every figure is of verified lines, and says up to which (`SiteBook.size`); charges of all keys that a site ever
had are joined, so nothing gets cheaper by a change of keys. Lags: new lines show after `INTERVAL_S` seconds and the
time to verify them (about 0.2 ms a line); a run's PLD ε after some seconds more, and until then the figure is an upper
bound (`RunSpent.exact` is False). Lines that were read once are not read again: `verify` does that, from nothing.
The index is a cache in CONSORTIUM/console/books.db, believed for speed only.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError
from cohortium.common.privacy.chain import Line
from cohortium.common.protocol.certificates import SITE
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.console import trail
from cohortium.server.console.books_check import Check, Finding, check_all
from cohortium.server.console.books_index import Index, Known, follow
from cohortium.server.console.books_picture import Painter, SiteBook
from cohortium.server.console.books_prices import Prices
from cohortium.server.console.ledger_lines import Page, page_of, read_only
from cohortium.server.consortium import Consortium
from cohortium.server.register import Register

INTERVAL_S = 3.0
CHUNK = 500
PAINT_S = 5.0
BREATH = 32
"""So many lines are verified before other threads get a turn: a page asked for meanwhile does not wait."""
SLOWLY = 60.0
"""While runs go on, working out ε takes at most one part in so many of a core."""
_log = logging.getLogger(__name__)


class Books:
    """All ledgers of a consortium. Threads may ask; `start` begins the thread that reads, `close` ends all."""

    def __init__(
        self,
        consortium: Consortium,
        register: Register,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._consortium, self._register, self._clock = consortium, register, clock
        self._index = Index(path or consortium.root / "console" / "books.db")
        self._prices = Prices(self._index.db, self._index.lock)
        self._painter = Painter(consortium, register, self._prices)
        self._gatherer = trail.Gatherer(self._index, consortium.root / "register.db", consortium.root)
        self._known: dict[tuple[str, str], Known] | None = None
        self._picture: dict[str, SiteBook] = {}
        self._reading = threading.Lock()
        self._asking = threading.Lock()
        self._mirror: sqlite3.Connection | None = None
        self._version = (-1, -1)
        self._members: tuple[tuple[str, str, bytes, str], ...] = ()
        self._again = True
        self._stop, self._started = threading.Event(), False
        self._threads: list[threading.Thread] = []
        self._check = Check.kept(self._index)
        self._waits_until = 0.0
        self.as_of: float | None = None
        """When the index last looked for new lines; None before the first time."""
        self.trouble = ""
        """The code of what keeps the index from being brought up to date, if anything does."""

    # ---- what requests ask --------------------------------------------------------------------------------------

    def site(self, name: str) -> SiteBook:
        """One site's book; an empty one for a site without lines."""
        return self._picture.get(name) or SiteBook.empty(name)

    def sites(self) -> tuple[SiteBook, ...]:
        """Every site that was ever enrolled or that the mirror holds lines of, by name."""
        return tuple(self._picture[name] for name in sorted(self._picture))

    def lines(self, owner: str, start: int = 0, limit: int = 50, *, key: str = "") -> Page:
        """Lines start .. start + limit - 1 of a site's ledger, for display; of the newest ledger, or of a key's."""
        site = self.site(owner)
        wanted = next((each for each in site.ledgers if each.key == key or not key), None)
        if wanted is None:
            return Page.empty(owner)
        return page_of(self._consortium.mirror, wanted, start, limit)

    def search(self, wanted: trail.Wanted, *, start: int = 0, limit: int = 100) -> tuple[list[trail.Trace], bool]:
        """The consortium's trail, newest first, and whether there is more."""
        with self._index.lock:
            return trail.search(self._index.db, wanted, start=start, limit=limit)

    @property
    def check(self) -> Check:
        """The verification under way, or the last one; `Check.never()` before the first."""
        return self._check

    def verify(self) -> bool:
        """Begin to recompute everything from nothing, in the background; False where that is under way already."""
        with self._asking:
            if self._check.running or self._stop.is_set():
                return False
            self._check = Check.begun(self._clock())
            self._spawn("verify", self._verify)
            return True

    # ---- the threads --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read every few seconds; once is enough."""
        with self._asking:
            if not self._started and not self._stop.is_set():
                self._started = True
                self._spawn("books", self._loop)

    def close(self) -> None:
        """End the threads (within the work of a few lines) and close the files."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)
        if self._mirror is not None:
            self._mirror.close()
        self._index.close()

    def wait(self, seconds: float) -> bool:
        """Whether the picture was made once within so many seconds, with every ε; for tests and for a start."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.as_of is not None and not self._painter.missing:
                return True
            time.sleep(0.02)
        return False

    def _spawn(self, name: str, do: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=do, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
                self.price()
            except (OSError, sqlite3.Error, CohortiumError) as error:
                self.trouble = getattr(error, "code", "BOOKS-FILE")
                _log.warning("books: %s: %s", self.trouble, type(error).__name__)
            except Exception:  # a thread that died would leave the page at what was known this morning
                self.trouble = "INTERNAL"
                _log.exception("books")
            self._stop.wait(INTERVAL_S)

    def _verify(self) -> None:
        def told(done: int, whole: int) -> None:
            self._check = self._check.went_on(done, whole)

        try:
            with self._reading:  # nothing is read in meanwhile, so that both mean the same lines
                if self._known is None:
                    self._known = self._index.load()
                check = check_all(
                    self._consortium.mirror,
                    keys=self._keys,
                    known=self._known,
                    begun=self._check,
                    clock=self._clock,
                    told=told,
                    rest=self._rest,
                )
                for owner, key in check.wrong_index:
                    self._index.forget(owner, key)
                    self._known.pop((owner, key), None)
                before = self._picture
                self._prices.forget()
                self._painter.forget()
                self._again = True
            self.refresh()
            self.price(at_once=True)
            check = check.with_findings(_other(before, self._picture))
            self._check = replace(check, running=False, seconds=self._clock() - (check.at or 0.0))
            self._check.keep(self._index)
        except (OSError, sqlite3.Error, CohortiumError) as error:
            self._check = self._check.broken(self._clock(), getattr(error, "code", "BOOKS-FILE"))
        except Exception:
            _log.exception("books: verify")
            self._check = self._check.broken(self._clock(), "INTERNAL")

    def _rest(self) -> None:
        """Let other threads go on; end where the console ends."""
        if self._stop.is_set():
            raise CheckFailed("BOOKS-STOPPED", "the console was stopped before everything was verified")
        time.sleep(0.0004)

    # ---- reading ------------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        """Read, verify and add what is new; how many lines were."""
        with self._reading:
            members = tuple((m.name, m.role, m.identity, m.state) for m in self._register.members())
            again = self._again or self._known is None or members != self._members
            if self._known is None:
                self._known = self._index.load()
            if again:  # a key may be known now that was not; or everything is to be shown anew
                self._version = (-1, -1)
            try:
                new, changed = self._read()
            except BaseException:
                self._known = None  # memory may be ahead of the disk
                raise
            if again:
                changed = {owner for owner, _ in self._known} | {m[0] for m in members if m[1] == SITE}
                self._members, self._again = members, False
            gathered = self._gatherer.gather(self._register.runs())
            for owner in sorted(changed | self._painter.stale(gathered)):
                self._paint(owner)
            self.as_of, self.trouble = self._clock(), ""
            return new

    def price(self, *, at_once: bool = False) -> int:
        """Work out each ε that is missing; how many were. Slowly, where pages already show something."""
        done, owners, painted = 0, set[str](), time.monotonic()
        while not self._stop.is_set() and self._painter.missing:
            started = time.monotonic()
            if not at_once and started < self._waits_until:
                break
            with self._reading:
                owners |= self._painter.work_out()
            done += 1
            now = time.monotonic()
            busy = self._painter.settled and not at_once
            self._waits_until = now + ((now - started) * SLOWLY if busy else 0.0)
            if now - painted > PAINT_S:  # a site has many ε: each is not worth a new picture
                self._paint_all(owners)
                owners, painted = set(), now
            time.sleep(0.002)
        self._paint_all(owners)
        if not self._painter.missing:
            self._painter.settled = True
        return done

    def _paint_all(self, owners: set[str]) -> None:
        for owner in sorted(owners):
            if self._stop.is_set():
                return
            with self._reading:
                self._paint(owner)
            time.sleep(0.001)

    def _paint(self, owner: str) -> None:
        assert self._known is not None
        mine = [known for (name, _), known in self._known.items() if name == owner]
        self._picture = {**self._picture, owner: self._painter.site(owner, mine, self._keys(owner))}

    def _keys(self, owner: str) -> dict[str, Ed25519PublicKey]:
        """Every key that a site ever had, oldest first: from enrolment, never from a ledger."""
        keys = [raw for raw, _ in self._register.identities(owner) if len(raw) == 32]
        return {raw.hex(): public_from_raw(raw) for raw in keys}

    def _read(self) -> tuple[int, set[str]]:
        """(new lines, owners of whom anything changed)."""
        if self._mirror is None:
            if not self._consortium.mirror.exists():
                return 0, set()
            self._mirror = read_only(self._consortium.mirror)
        stat = self._consortium.mirror.stat()
        version = (self._mirror.execute("PRAGMA data_version").fetchone()[0], stat.st_ino)
        if version[1] != self._version[1] and self._version[1] != -1:  # another file lies there now
            self._mirror.close()
            self._mirror = read_only(self._consortium.mirror)
            version = (self._mirror.execute("PRAGMA data_version").fetchone()[0], stat.st_ino)
        if version == self._version:
            return 0, set()
        assert self._known is not None
        new, changed = 0, set()
        query = "SELECT owner, key, MAX(n) + 1 FROM lines GROUP BY owner, key"
        there = {(owner, key): int(size) for owner, key, size in self._mirror.execute(query)}
        for (owner, key), size in there.items():
            before = self._known.get((owner, key))
            was = (before.size, before.problem) if before is not None else (0, "")
            new += self._read_ledger(owner, key, size)
            now = self._known[owner, key]
            if (now.size, now.problem) != was:
                changed.add(owner)
        for name, known in self._known.items():
            if name not in there and not known.problem.startswith("MIRROR-ROLLBACK"):
                known.problem = "MIRROR-ROLLBACK the mirror holds no line of a ledger that was read before"
                self._index.keep(known, ())
                changed.add(name[0])
        self._version = version
        return new, changed

    def _read_ledger(self, owner: str, key: str, size: int) -> int:
        assert self._mirror is not None and self._known is not None
        known = self._known.setdefault((owner, key), Known(owner=owner, key=key))
        public = self._keys(owner).get(key)
        was, new = known.problem, 0
        known.problem = (
            self._odd(known, size) if public else "MIRROR-OWNER a ledger whose key the register does not know"
        )
        while public and not known.problem and known.size < size:
            query = "SELECT n, line FROM lines WHERE owner = ? AND key = ? AND n >= ? ORDER BY n LIMIT ?"
            rows = self._mirror.execute(query, (owner, key, known.size, CHUNK)).fetchall()
            if not rows:
                break
            lines: list[Line] = []
            try:
                for at, (number, text) in enumerate(rows):
                    lines.append(follow(known, number, text, public))
                    if at % BREATH == 0:
                        self._rest()
            except CheckFailed as error:
                if error.code == "BOOKS-STOPPED":
                    raise
                known.problem = f"{error.code} line {known.size}: {error.sentence}"
            more = [told for line in lines if (told := trail.of_line(key, line)) is not None]
            self._index.keep(known, lines, more)
            new += len(lines)
        if known.problem != was and not new:
            self._index.keep(known, ())
        return new

    def _odd(self, known: Known, size: int) -> str:
        """What is wrong with the lines that were read before, as far as one look tells."""
        assert self._mirror is not None
        if size < known.size:
            return f"MIRROR-ROLLBACK line {size}: the mirror ends here, but {known.size} lines were read before"
        if known.problem.startswith("MIRROR-FORK"):
            return known.problem
        if known.size:
            query = "SELECT line FROM lines WHERE owner = ? AND key = ? AND n = ?"
            row = self._mirror.execute(query, (known.owner, known.key, known.size - 1)).fetchone()
            if row is None or f'"hash":"{known.head}"' not in row[0]:
                return f"MIRROR-FORK line {known.size - 1}: another one than was read before"
        return ""


def _other(before: Mapping[str, SiteBook], now: Mapping[str, SiteBook]) -> tuple[Finding, ...]:
    """ε that were shown and are others now, for the same lines: somebody wrote into the cache."""
    found = []
    for name, book in now.items():
        was = before.get(name)
        if was is None or (was.size, was.head) != (book.size, book.head):
            continue
        pairs = [(old, new) for new in book.runs if (old := was.spent(new.run)) is not None and old.exact and new.exact]
        wrong = [new.run for old, new in pairs if not _close(old.epsilon, new.epsilon)]
        if wrong or not _close(was.lifetime, book.lifetime):
            what = f"run {wrong[0]}" if wrong else "its lifetime"
            sentence = f"the console showed another ε for {what}; it is worked out anew"
            found.append(Finding(site=name, key="", code="BOOKS-EPSILON", line=None, sentence=sentence))
    return tuple(found)


def _close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and abs(one - other) <= 1e-6 * abs(other))

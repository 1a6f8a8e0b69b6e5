"""What the pages tell about members: a readiness matrix, one row a site, and everything about one of them.

A row is made of the register, of when `serve` last heard of the member, of the verified mirror (books.py) and of the
newest runs' events. Whether a hospital can afford a study is decided there: its officer cannot approve a plan that
would pass its lifetime cap. A hospital whose policy says `tell_cap` lets it be seen here before anybody is asked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.privacy.cap import Cap
from cohortium.common.protocol.certificates import SITE as SITE_ROLE
from cohortium.common.protocol.signing import fingerprint, public_from_raw
from cohortium.server.console import run_list, run_store
from cohortium.server.console.accounts import SITE, Account
from cohortium.server.console.books_picture import plain
from cohortium.server.console.desk import Desk
from cohortium.server.console.run_list import RunLine
from cohortium.server.register import ENROLLED, Answer, Invited, Member, RunRow

DAY_S = 86_400
MOST_RUNS = 20
NEWEST = 10
"""In so many of the newest runs that began it is counted who dropped."""
SHOWS = ("all", "needs", "enrolled", "revoked")
AWAY, WAITS, ENDED, LEDGER, DEAR = "away", "waits", "certificate", "ledger", "cap"
WEIGHTS = {LEDGER: 16, DEAR: 8, ENDED: 4, WAITS: 2, AWAY: 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Something that a person has to look at. kind: AWAY, WAITS, ENDED, LEDGER, DEAR."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """A site's mirrored ledger. known: False where it is not indexed yet. spent: lifetime ε of the dearest source.

    cap, used: the lifetime cap and the share of it that is used, where the hospital tells.
    """

    known: bool = False
    size: int = 0
    verified: bool = False
    problem: str = ""
    at: int | None = None
    spent: float | None = None
    cap: Cap | None = None
    used: float | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Affords:
    """Whether a site can afford the newest study that waits to begin. run: its proposal.

    fits: by the cap that it told; where it told none, True if its officer approved (nobody can approve what the cap
    does not hold), else None: its officer decides.
    """

    run: str
    approved: bool
    fits: bool | None

    @property
    def words(self) -> str:
        if self.fits is None:
            return "its officer decides"
        return "no, by its cap" if not self.fits else "yes, approved" if self.approved else "yes, by its cap"

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, "approved": self.approved, "fits": self.fits}


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteLine:
    """One member in the matrix. dropped: in how many of the newest runs that name it and began (`ran`).

    affords: None where no study that names it waits to begin.
    """

    name: str
    role: str
    state: str
    since: int
    revoked_at: int | None
    fingerprint: str
    certificate_until: int | None
    last_seen: int | None
    version: str
    waiting: tuple[str, ...]
    ledger: LedgerLine
    affords: Affords | None
    dropped: int
    ran: int
    needs: tuple[Need, ...]

    @property
    def rank(self) -> int:
        return sum(WEIGHTS[need.kind] for need in self.needs)

    def to_json(self) -> dict[str, Any]:
        spent = self.ledger.spent
        return {
            "name": self.name,
            "role": self.role,
            "state": self.state,
            "since": self.since,
            "revoked_at": self.revoked_at,
            "fingerprint": self.fingerprint,
            "certificate_until": self.certificate_until,
            "last_seen": self.last_seen,
            "version": self.version or None,
            "waiting": list(self.waiting),
            "ledger": {
                "lines": self.ledger.size if self.ledger.known else None,
                "verified": self.ledger.verified if self.ledger.known else None,
                "problem": self.ledger.problem or None,
                "epsilon_spent": plain(spent),
                "cap": None if self.ledger.cap is None else self.ledger.cap.to_json(),
                "cap_used": plain(self.ledger.used),
            },
            "affords": None if self.affords is None else self.affords.to_json(),
            "newest_runs": {"dropped": self.dropped, "of": self.ran},
            "needs": [need.text for need in self.needs],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """sites: what needs a human first. counts: how many there are of each choice of SHOWS."""

    sites: tuple[SiteLine, ...]
    counts: Mapping[str, int]
    researchers: tuple[Member, ...]
    invitations: tuple[Invited, ...]


def matrix(desk: Desk, account: Account, *, show: str = "all", text: str = "") -> Matrix:
    """Everybody whom an account sees. A site's member sees its own hospital and nobody else."""
    members = [member for member in desk.register.members() if desk.sees_site(account, member.name)]
    every = lines(desk, [member for member in members if member.role == SITE_ROLE])
    counts = {
        "all": len(every),
        "needs": sum(bool(line.needs) for line in every),
        "enrolled": sum(line.state == ENROLLED for line in every),
        "revoked": sum(line.state != ENROLLED for line in every),
    }
    wanted = text.strip().lower()
    chosen = [
        line
        for line in every
        if (show == "all" or (show == "needs" and line.needs) or line.state == show) and wanted in line.name.lower()
    ]
    own = account.role == SITE
    now = desk.clock()
    return Matrix(
        sites=tuple(sorted(chosen, key=lambda line: (-line.rank, line.name))),
        counts=counts,
        researchers=() if own else tuple(member for member in members if member.role != SITE_ROLE),
        invitations=()
        if own
        else tuple(
            given
            for given in desk.register.invitations()
            if given.used_at is None and given.valid_until > now - 30 * DAY_S
        ),
    )


def lines(desk: Desk, members: Sequence[Member]) -> list[SiteLine]:
    """A line for each member, in the same order."""
    seen, now = desk.seen(), desk.clock()
    runs, answers = desk.register.runs(), desk.register.answers_to_proposed()
    proposed = [row for row in runs if row.state == "proposed"]
    waiting, affords = _waiting(answers), _affords(desk, proposed, answers)
    dropped, ran = _dropped(desk, runs)
    found = []
    for member in members:
        heard = seen.get(member.name, {})
        at, until = _whole(heard.get("at")), _whole(heard.get("certificate_until"))
        ledger = ledger_of(desk, member.name)
        open_, afford = waiting.get(member.name, ()), affords.get(member.name)
        found.append(
            SiteLine(
                name=member.name,
                role=member.role,
                state=member.state,
                since=member.since,
                revoked_at=member.revoked_at,
                fingerprint=fingerprint(public_from_raw(member.identity)) if member.identity else "",
                certificate_until=until,
                last_seen=at,
                version=_version(heard.get("version")),
                waiting=open_,
                ledger=ledger,
                affords=afford,
                dropped=dropped.get(member.name, 0),
                ran=ran.get(member.name, 0),
                needs=_needs(member, at=at, until=until, waiting=open_, ledger=ledger, affords=afford, now=now),
            )
        )
    return found


def ledger_of(desk: Desk, name: str) -> LedgerLine:
    books = getattr(desk, "books", None)
    if books is None:
        return LedgerLine()
    book = books.site(name)
    if book is None:
        return LedgerLine()
    spent = [value for value in (_spent(source) for source in book.sources) if value is not None]
    return LedgerLine(
        known=True,
        size=int(book.size),
        verified=bool(book.verified),
        problem=str(book.problem or ""),
        at=book.at,
        spent=max(spent) if spent else None,
        cap=book.sources[0].cap if book.sources else None,
        used=book.sources[0].used if book.sources else None,
        sources=tuple(str(getattr(source, "name", source)) for source in book.sources),
    )


def _spent(source: Any) -> float | None:
    value = getattr(source, "epsilon", None)
    return float(value) if isinstance(value, (int, float)) else None


def _needs(
    member: Member,
    *,
    at: int | None,
    until: int | None,
    waiting: Sequence[str],
    ledger: LedgerLine,
    affords: Affords | None,
    now: float,
) -> tuple[Need, ...]:
    found = []
    if ledger.problem:
        found.append(Need(kind=LEDGER, text=f"its ledger: {ledger.problem}"))
    if member.state != ENROLLED:
        return tuple(found)
    if until is not None and until < now:
        found.append(Need(kind=ENDED, text="its certificate has ended"))
    if affords is not None and affords.fits is False:
        found.append(Need(kind=DEAR, text=f"its lifetime cap does not hold {affords.run}"))
    if waiting:
        plural = "proposal waits" if len(waiting) == 1 else "proposals wait"
        found.append(Need(kind=WAITS, text=f"{len(waiting)} {plural} for its officer"))
    if (at if at is not None else member.since) < now - DAY_S:
        found.append(Need(kind=AWAY, text="not heard of for a day"))
    return tuple(found)


def _waiting(answers: Sequence[Answer]) -> dict[str, tuple[str, ...]]:
    """Site -> the proposed runs that wait for its officer."""
    found: dict[str, tuple[str, ...]] = {}
    for answer in answers:
        if answer.state == "open":
            found[answer.site] = (*found.get(answer.site, ()), answer.run)
    return found


def _affords(desk: Desk, proposed: Sequence[RunRow], answers: Sequence[Answer]) -> dict[str, Affords]:
    """Site -> of the newest proposal that names it and waits to begin."""
    runs = run_store.runs_of(desk)
    said = {(answer.run, answer.site): answer.state for answer in answers}
    found: dict[str, Affords] = {}
    for row in reversed(proposed):
        for site in runs.brief(row).sites:
            if site not in found:
                approved = said.get((row.run, site)) == "approved"
                told = _fits(desk, site, row)
                found[site] = Affords(run=row.run, approved=approved, fits=(approved or None) if told is None else told)
    return found


def _fits(desk: Desk, site: str, row: RunRow) -> bool | None:
    """By the cap that a hospital told; None where it told none, or the plan cannot be read."""
    sources = desk.books.site(site).sources
    if not sources or sources[0].cap is None:
        return None
    try:
        return sources[0].affords(run_store.runs_of(desk).plan(row))
    except CohortiumError:
        return None


def _dropped(desk: Desk, rows: Sequence[RunRow]) -> tuple[dict[str, int], dict[str, int]]:
    """(site -> runs in which it dropped at least once, site -> runs that name it), of the newest that began."""
    runs = run_store.runs_of(desk)
    begun = [row for row in reversed(rows) if row.attempts][:NEWEST]
    dropped: dict[str, int] = {}
    ran: dict[str, int] = {}
    for row in begun:
        gone = runs.log(row).dropped()
        for site in runs.brief(row).sites:
            ran[site] = ran.get(site, 0) + 1
            dropped[site] = dropped.get(site, 0) + (site in gone)
    return dropped, ran


def _whole(value: Any) -> int | None:
    """A time that a calendar has: seen.json is written by another process."""
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 1e11 else None


def _version(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return text if re.fullmatch(r"[0-9A-Za-z.+-]{1,40}", text) else ""


# ---- one member ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An identity over time. current: the one it has now."""

    fingerprint: str
    since: int
    current: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberView:
    line: SiteLine
    officer: str
    supernode: str
    request: str
    keys: tuple[Key, ...]
    runs: tuple[RunLine, ...]
    grants: tuple[str, ...]
    invitations: tuple[Invited, ...]
    grantable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.line.to_json(),
            "officer": self.officer,
            "supernode": self.supernode,
            "keys": [{"fingerprint": key.fingerprint, "since": key.since, "current": key.current} for key in self.keys],
            "runs": [line.run for line in self.runs],
            "grants": list(self.grants),
        }


def member_view(desk: Desk, account: Account, name: str) -> MemberView:
    """One member. Refused MEMBER-UNKNOWN where there is none or the account does not see it: both look alike."""
    member = desk.register.member(name) if desk.sees_site(account, name) else None
    if member is None:
        raise Refused("MEMBER-UNKNOWN", "nobody of this name takes part", hint="cohortium sites list")
    every = run_list.lines(desk, account)
    granted = desk.register.grants(name)
    own = account.role == SITE
    return MemberView(
        line=lines(desk, [member])[0],
        officer=fingerprint(public_from_raw(member.officer)) if member.officer else "",
        supernode=_of_text(member.supernode),
        request=member.request,
        keys=tuple(
            Key(fingerprint=fingerprint(public_from_raw(key)), since=since, current=key == member.identity)
            for key, since in reversed(desk.register.identities(name))
        ),
        runs=tuple(line for line in every if name in line.brief.sites)[:MOST_RUNS],
        grants=tuple(granted),
        invitations=() if own else tuple(given for given in desk.register.invitations() if given.name == name),
        grantable=tuple(line.run for line in every if line.run not in granted) if member.role != SITE_ROLE else (),
    )


def _of_text(key: str) -> str:
    """SHA-256 of an OpenSSH public key's text in groups of four, to be compared; "" where there is none."""
    text = hashlib.sha256(key.encode()).hexdigest()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4)) if key else ""

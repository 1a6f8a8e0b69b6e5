"""What left here: one row for each message that the site's own papers prove, and one for what was charged and did not.

The ledger has the time and the price of each release, the approved plan says how large it may be, guard.log has the
refusals. Sizes are exact where the guard still holds the sealed bytes, or where the message can be built again;
else "at most", from the plan. Messages of a round that hold nothing made from records leave no line of their own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cohortium.client.page.kinds import CHARGED, KINDS
from cohortium.client.page.ledger_view import Papers
from cohortium.common.privacy import chain
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import MAGIC, SIGNATURE_BYTES, canonical

UNLOGGED = ("site.witnessed", "site.started", "sum.prepared", "site.finished")
"""Kinds that leave no line in this hospital's papers; none of them holds a number made from records."""
SLACK_S = 5
"""How long before its line in sent.log a message's line in the ledger may be."""
_BREAKS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One message, or one charge without a message.

    id: "l12" for ledger line 12, "r3" for refusal 3. numbers_at_most: bytes of numbers made from records (8 each), by
    the plan; None where the plan is not here. bytes: the whole envelope, where known exactly. share: of the lifetime
    cap, of this release; used: of the cap, by all releases up to it. line: the ledger's, or None.
    """

    id: str
    at: int
    kind: str
    run: str = ""
    study: str = ""
    stage: str = ""
    release: str = ""
    numbers_at_most: int | None = 0
    bytes: int | None = None
    share: float = 0.0
    used: float = 0.0
    line: int | None = None
    code: str = ""
    state: str = ""

    @property
    def title(self) -> str:
        return KINDS[self.kind].title

    @property
    def records(self) -> bool:
        return KINDS[self.kind].records

    def to_json(self) -> dict[str, Any]:
        when = f"{datetime.fromtimestamp(self.at, UTC):%Y-%m-%dT%H:%M:%SZ}"
        return {**asdict(self), "at": when, "made_from_records": self.records}


def rows(papers: Papers) -> list[Row]:
    """Every row, oldest first."""
    found = [*_of_ledger(papers), *_of_refusals(papers)]
    if papers.sent:
        return sorted(_with_log(papers, found), key=lambda row: row.at)
    return sorted(found, key=lambda row: (row.at, row.line is None, row.line or 0))


def _with_log(papers: Papers, found: list[Row]) -> list[Row]:
    """The guard's log of what it handed out names every message and its size; the ledger then adds the cost."""
    since = papers.sent[0].at - SLACK_S
    digests = {}
    for line in papers.lines:
        if line.body["kind"] == "advance" and line.body["state"] == "SEALED":
            digests[line.body["run"], line.body["release"]] = line.body["digest"]
    costs = {digests[row.run, row.release]: row for row in found if (row.run, row.release) in digests and row.records}
    made = [row for row in found if row.at < since or row.kind == CHARGED]
    refusals = iter([row for row in found if row.kind == "site.refused" and row.at >= since])
    for number, sent in enumerate(papers.sent):
        row = costs.pop(sent.digest, None)
        if row is not None:
            made.append(replace(row, at=sent.at, bytes=sent.bytes))
        elif sent.kind == "site.refused":
            told = next(refusals, None)
            made.append(
                Row(id=f"s{number}", at=sent.at, kind=sent.kind, code=told.code if told else "", bytes=sent.bytes)
            )
        else:  # also the same sealed bytes once more: they cost nothing
            proposal = papers.proposals.get(sent.run)
            study = "" if proposal is None else proposal.plan.study
            made.append(Row(id=f"s{number}", at=sent.at, kind=sent.kind, run=sent.run, study=study, bytes=sent.bytes))
    return made + [row for row in costs.values() if row.at >= since]


def _of_ledger(papers: Papers) -> list[Row]:
    policy = papers.policy
    cap = policy.cap.filter()
    found: list[Row] = []
    waiting: dict[tuple[str, str], Row] = {}
    spent = 0.0
    for line in papers.lines:
        body, number = line.body, line.number
        if body["kind"] == "note" and body["about"] == chain.START:
            run = str(body["fields"]["run"])
            found.append(_row(papers, number, body["at"], "site.hello", run, used=spent))
        elif body["kind"] == "reserve":
            event = Event.from_json(body["event"])
            share = 0.0 if event.kind == "non-private" else cap.price(event, body["count"]) / cap.room
            spent += share
            waiting[body["run"], body["release"]] = _row(
                papers,
                number,
                body["at"],
                CHARGED,
                body["run"],
                stage=body["purpose"],
                release=body["release"],
                share=share,
                used=spent,
                state="RESERVED",
            )
        elif body["kind"] == "advance":
            row = waiting[body["run"], body["release"]]
            kind = _kind(body["state"], papers.proposals.get(body["run"]))
            if body["state"] in ("SEALED", "BURNED"):
                size = papers.sizes.get(body["digest"])
                del waiting[row.run, row.release]
                found.append(_changed(papers, row, at=body["at"], kind=kind, bytes=size, state=body["state"]))
                waiting[row.run, row.release] = found[-1]
            elif kind:
                found.append(
                    _row(papers, number, body["at"], kind, row.run, stage=row.stage, release=row.release, used=spent)
                )
    found += [row for row in waiting.values() if row.state == "RESERVED"]
    return found


def _kind(state: str, proposal: Any) -> str:
    mode = None if proposal is None else proposal.plan.mode
    if state == "SEALED":
        return "site.noised" if mode == "local" else "sum.masked"
    if state == "BURNED":
        return CHARGED
    if mode == "local":
        return ""  # a release in local mode is over when it is sealed
    return {"UNMASKED": "sum.vote", "RELEASED": "site.revealed"}.get(state, "")


def _row(papers: Papers, number: int, at: int, kind: str, run: str, **more: Any) -> Row:
    proposal = papers.proposals.get(run)
    study = "" if proposal is None else proposal.plan.study
    return Row(id=f"l{number}", line=number, at=at, kind=kind, run=run, study=study, **more)


def _changed(papers: Papers, row: Row, *, at: int, kind: str, bytes: int | None, state: str) -> Row:
    most: int | None = 0
    if KINDS[kind].records:
        proposal = papers.proposals.get(row.run)
        most = None if proposal is None else numbers_at_most(proposal.plan, row.release)
    fields = {name: getattr(row, name) for name in ("id", "line", "run", "study", "stage", "release", "share", "used")}
    return Row(**fields, at=at, kind=kind, bytes=bytes, state=state, numbers_at_most=most)


def numbers_at_most(plan: Plan, release: str) -> int | None:
    """Bytes of the largest vector that a release of a plan may be: eight a number."""
    if not release.isdecimal() or int(release) >= plan.releases:
        return None
    return 8 * plan.stage_of(int(release)).max_dim


def _of_refusals(papers: Papers) -> list[Row]:
    return [
        Row(
            id=f"r{at}",
            at=one.at,
            kind="site.refused",
            code=one.code,
            bytes=refusal_bytes(papers.policy.name, one.code),
        )
        for at, one in enumerate(papers.refusals)
    ]


def refusal_bytes(site: str, code: str) -> int:
    """The size of a refusal's envelope: all of it is public, so it can be counted."""
    header = {"kind": "site.refused", "sender": site, "fields": {"code": code}, "blobs": []}
    return len(MAGIC) + 4 + len(canonical(header)) + SIGNATURE_BYTES


def epsilon_at(papers: Papers, line: int) -> float:
    """ε of everything charged up to a ledger line, at the cap's δ. Some tens of milliseconds the first time."""
    charges = [
        (Event.from_json(one.body["event"]), int(one.body["count"]))
        for one in papers.lines[: line + 1]
        if one.body["kind"] == "reserve"
    ]
    return epsilon(charges, delta=papers.policy.lifetime_delta, hospitals=papers.policy.hospitals)


# ---- choosing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A filter. run, kind: "" is any. since, until: days as 2026-11-22, both included; "" is open."""

    run: str = ""
    kind: str = ""
    since: str = ""
    until: str = ""

    def of(self, found: Iterable[Row]) -> list[Row]:
        first, last = _day(self.since), _day(self.until)
        return [
            row
            for row in found
            if (not self.run or row.run == self.run)
            and (not self.kind or row.kind == self.kind or (self.kind == "records" and row.records))
            and (first is None or row.at >= first)
            and (last is None or row.at < last + 86_400)
        ]

    def query(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value}


def _day(text: str) -> int | None:
    if not text:
        return None
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError:
        return None


# ---- exports ------------------------------------------------------------------------------------------------


def as_jsonl(found: Sequence[Row]) -> str:
    return "".join(json.dumps(row.to_json(), sort_keys=True) + "\n" for row in found)


def as_csv(found: Sequence[Row]) -> str:
    """For a spreadsheet: a text that it could take for a formula gets an apostrophe in front."""
    made = io.StringIO()
    names = [*Row.__dataclass_fields__, "made_from_records"]
    writer = csv.DictWriter(made, names, lineterminator="\r\n")
    writer.writeheader()
    for row in found:
        writer.writerow({name: _plain(value) for name, value in row.to_json().items()})
    return made.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_BREAKS):
        return "'" + value
    return "" if value is None else value

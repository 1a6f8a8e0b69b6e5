"""What the Audit page shows: people's acts from the signed journal, and the consortium's trail."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cohortium.common.errors import UsageError
from cohortium.server.console.journal import Act
from cohortium.server.console.trail import Trace, Wanted

PAGE = 50
DAY_S = 86_400
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def wanted(*, person: str, action: str, site: str, run: str, since: str, until: str) -> Wanted:
    """What a filter's fields ask for; days are whole days of UTC. UsageError AUDIT-DATE."""
    begin, end = _day(since), _day(until)
    return Wanted(
        person=person.strip(),
        action=action.strip(),
        site=site.strip(),
        run=run.strip(),
        since=None if begin is None else int(begin.timestamp()),
        until=None if end is None else int(end.timestamp()) + DAY_S,
    )


def _day(text: str) -> datetime | None:
    if not text:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise UsageError("AUDIT-DATE", "there is no such day", hint="write it as 2026-11-22") from None


def chosen(acts: Iterable[Act], asked: Wanted) -> list[Act]:
    """The acts that a filter asks for. A site or run is one that the act is about, or that its facts name."""
    found = []
    for act in acts:
        named = {act.on, *act.facts.values()}
        if asked.person and act.by != asked.person:
            continue
        if asked.action and asked.action not in (act.action, act.outcome, act.code):
            continue
        if (asked.site and asked.site not in named) or (asked.run and asked.run not in named):
            continue
        if (asked.since is not None and act.at < asked.since) or (asked.until is not None and act.at >= asked.until):
            continue
        found.append(act)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What the filter's fields offer: what there is, sorted."""

    people: tuple[str, ...]
    actions: tuple[str, ...]


def choices(acts: Sequence[Act]) -> Choices:
    people = {act.by for act in acts if act.by}
    return Choices(people=tuple(sorted(people)), actions=tuple(sorted({act.action for act in acts})))


def acts_csv(acts: Iterable[Act]) -> str:
    head = ("line", "time", "person", "action", "about", "reason", "outcome", "code", "ended", "facts")
    rows = (
        (
            *(str(act.number), stamp(act.at), act.by, act.action, act.on, act.reason, act.outcome, act.code),
            "" if act.ended is None else stamp(act.ended),
            "; ".join(f"{name}={value}" for name, value in act.facts.items()),
        )
        for act in acts
    )
    return _csv(head, rows)


def trail_csv(traces: Iterable[Trace]) -> str:
    head = ("time", "kind", "site", "run", "what", "code", "told")
    return _csv(head, ((stamp(t.at), t.kind, t.site, t.run, t.what, t.code, t.told) for t in traces))


def stamp(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _csv(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A spreadsheet must not take what people typed for a formula."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in row])
    return file.getvalue()

"""What needs a human, in the words of Today: each thing with its code, its fix and the page it is on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cohortium.common.errors import CohortiumError
from cohortium.server.console import site_view
from cohortium.server.console.desk import Desk
from cohortium.server.console.run_list import RunLine, named
from cohortium.server.console.today_releases import Signed

DAY_S = 86_400
ISSUER_DAYS = 14
FAILED_DAYS = 7
"""So long a failed run stands among what needs a human: nothing mends it, somebody has to have seen it."""
BAD, CARE = "bad", "care"
MOST_OF_A_KIND = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Something that a human has to do. level: BAD (now) or CARE. about: a run or a site, or ""; to: its page."""

    level: str
    code: str
    title: str
    text: str
    fix: str = ""
    about: str = ""
    to: str = ""
    since: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "code": self.code or None,
            "title": self.title,
            "text": self.text,
            "fix": self.fix or None,
            "about": self.about or None,
            "since": self.since,
        }


def house(desk: Desk, lines: Sequence[RunLine], *, served: bool, members: int) -> list[Item]:
    """The machine itself: service, disk, issuer."""
    root, found = desk.consortium.root, []
    going = [line for line in lines if line.state in ("proposed", "approved", "running", "stopping")]
    if not served and (members or lines):
        found.append(
            Item(
                level=BAD if going else CARE,
                code="SERVE-DOWN",
                title="The service is not running",
                text=f"{len(going)} runs wait for it." if going else "Sites cannot reach this machine.",
                fix=f"cohortium serve {root}",
            )
        )
    trouble = str(getattr(getattr(desk, "books", None), "trouble", "") or "")
    if trouble:
        found.append(
            Item(
                level=BAD,
                code=trouble,
                title="The ledgers' index is not brought up to date",
                text="What is shown of budgets is older than the ledgers.",
                fix="the console's log has the details",
            )
        )
    free, least = shutil.disk_usage(root).free / 1e9, desk.consortium.limits.free_disk_gb
    if free < least:
        found.append(
            Item(
                level=BAD,
                code="DISK-FULL",
                title="The disk is nearly full",
                text=f"{free:.1f} GB are free and {least} are wanted: a run could not write its answers.",
                fix="make room, or lower [limits] free_disk_gb in consortium.toml",
            )
        )
    try:
        ends = desk.consortium.issuer().expires.timestamp()
    except CohortiumError as error:
        text = "Sites cannot renew their certificates."
        found.append(Item(level=BAD, code=error.code, title="The issuer cannot be read", text=text, fix=error.hint))
        return found
    left = (ends - desk.clock()) / DAY_S
    if left < ISSUER_DAYS:
        found.append(
            Item(
                level=BAD if left < 3 else CARE,
                code="ISSUER-ENDS",
                title="The issuer has ended" if left < 0 else f"The issuer ends in {max(round(left), 1)} days",
                text="After that no site can renew its certificate. The root signs a new one.",
                fix=f"fetch the root, then: cohortium consortium issuer {root}",
                since=int(ends),
            )
        )
    return found


def ledgers(sites: Sequence[site_view.SiteLine]) -> list[Item]:
    return [
        Item(
            level=BAD,
            code=line.ledger.problem if line.ledger.problem.isupper() else "LEDGER",
            title=f"The ledger of {line.name} does not hold",
            text=line.ledger.problem,
            fix="ask the site for its newest ledger, and propose nothing to it before you know why",
            about=line.name,
            to=f"/sites/{line.name}",
        )
        for line in sites
        if line.ledger.problem
    ]


def runs(desk: Desk, lines: Sequence[RunLine], *, own: str) -> list[Item]:
    """Runs that a person has to look at: stopped ones, and those that failed lately."""
    found, since = [], desk.clock() - FAILED_DAYS * DAY_S
    for line in lines:
        failed = line.state == "failed" and line.since >= since
        if not (failed or line.state == "stopped"):
            continue
        told = line.message[len(line.code) + 2 :] if line.code else line.message
        found.append(
            Item(
                level=BAD if failed or line.code else CARE,
                code=line.code,
                title=f"{line.run} {'failed' if failed else 'is stopped'}",
                text=told,
                fix="" if own else ("propose the study again" if failed else "look at it, mend the cause, resume it"),
                about=line.run,
                to=f"/runs/{line.run}",
                since=line.since,
            )
        )
    return few(found, "more runs are stopped or failed lately", "/runs?state=stopped")


def proposals(desk: Desk, lines: Sequence[RunLine], *, own: str) -> list[Item]:
    found: list[Item] = []
    proposed = [line for line in lines if line.state == "proposed"]
    answers = desk.register.answers_to_proposed() if proposed else []
    for line in proposed:
        waiting = [each for each in answers if each.run == line.run and each.state == "open" and own in ("", each.site)]
        if not waiting:
            continue
        since = min(each.since for each in waiting)
        found.append(
            Item(
                level=CARE,
                code="",
                title=f"{line.run} waits for your officer" if own else f"{line.run} waits for {len(waiting)} officers",
                text="Nothing is asked before every officer approved."
                if own
                else f"Not approved yet: {named([each.site for each in waiting])}.",
                fix=f"at the hospital: cohortium site inspect DIR {line.run}",
                about=line.run,
                to=f"/runs/{line.run}",
                since=since,
            )
        )
    return few(found, "more proposals wait", "/runs?state=proposed")


def signatures(desk: Desk, lines: Sequence[RunLine], released: Mapping[str, Signed | None], *, own: str) -> list[Item]:
    found = []
    for line in lines:
        state = released.get(line.run)
        if state is None or state.signed >= state.needed or (own and own in state.by):
            continue
        found.append(
            Item(
                level=CARE,
                code="",
                title=f"The release of {line.run} waits for signatures",
                text=f"{state.signed} of {state.needed} sites have signed it.",
                fix="at the hospital: cohortium site sign SITE FOLDER",
                about=line.run,
                to=f"/release/{line.run}",
            )
        )
    return few(found, "more releases wait for signatures", "/release")


def sites(sites: Sequence[site_view.SiteLine], *, own: str) -> list[Item]:
    found = []
    for kind, title, fix in (
        (site_view.ENDED, "certificates have ended", "the site's connection renews it: see that it runs there"),
        (site_view.AWAY, "sites were not heard of for a day", "ask there whether `cohortium site join` runs"),
    ):
        names = [line.name for line in sites if any(need.kind == kind for need in line.needs)]
        if not names:
            continue
        one = {site_view.ENDED: "certificate has ended", site_view.AWAY: "site was not heard of for a day"}[kind]
        found.append(
            Item(
                level=CARE,
                code="",
                title=f"{len(names)} {one if len(names) == 1 else title}",
                text=f"{named(names, 12)}.",
                fix=fix,
                about=names[0] if len(names) == 1 else "",
                to=f"/sites/{names[0]}" if len(names) == 1 else "/sites?show=needs",
            )
        )
    return found


def few(found: list[Item], more: str, to: str) -> list[Item]:
    """The first of a kind, and one line for the rest."""
    if len(found) <= MOST_OF_A_KIND:
        return found
    rest = len(found) - MOST_OF_A_KIND
    level = BAD if any(item.level == BAD for item in found[MOST_OF_A_KIND:]) else CARE
    return [*found[:MOST_OF_A_KIND], Item(level=level, code="", title=f"{rest} {more}", text="", to=to)]

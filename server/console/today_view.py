"""What Today tells: what needs a human first, then what runs, then what was published lately; for a new folder, steps.

A member of a site gets its own hospital's view. Nothing here replays a ledger or reads more than a few runs' files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cohortium.common.protocol.certificates import SITE as SITE_ROLE
from cohortium.server.console import run_list, run_view, site_view
from cohortium.server.console import today_needs as needing
from cohortium.server.console.accounts import SITE, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.run_list import RunLine
from cohortium.server.console.run_view import RunView
from cohortium.server.console.today_releases import Signed, released
from cohortium.server.register import ENROLLED

MOST_LIVE, MOST_LATELY = 3, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """needed, signed: of its release, by signature files that are there; None where nothing is released yet."""

    run: str
    study: str
    at: int
    rehearsal: bool
    needed: int | None
    signed: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    done: bool
    title: str
    text: str
    button: str
    to: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Today:
    """steps: until the first run is published. queue: approved runs that wait their turn."""

    needs: tuple[needing.Item, ...]
    live: tuple[RunView, ...]
    queue: tuple[RunLine, ...]
    lately: tuple[Published, ...]
    steps: tuple[Step, ...]
    served: bool
    sites: int

    def to_json(self) -> dict[str, Any]:
        return {
            "needs": [item.to_json() for item in self.needs],
            "live": [shown.to_json() for shown in self.live],
            "queue": [line.run for line in self.queue],
            "lately": [
                {"run": each.run, "study": each.study, "at": each.at, "rehearsal": each.rehearsal}
                for each in self.lately
            ],
            "steps": [{"title": step.title, "done": step.done} for step in self.steps],
            "served": self.served,
            "sites": self.sites,
        }


def today(desk: Desk, account: Account) -> Today:
    lines = run_list.lines(desk, account)
    members = [m for m in desk.register.members() if m.role == SITE_ROLE and desk.sees_site(account, m.name)]
    sites = site_view.lines(desk, members)
    signed = {line.run: released(desk, line.run) for line in lines if line.state == "finished"}
    served, own = is_served(desk), account.site if account.role == SITE else ""
    needs = [] if own else needing.house(desk, lines, served=served, members=len(members))
    needs += needing.ledgers(sites)
    needs += needing.runs(desk, lines, own=own)
    needs += needing.proposals(desk, lines, own=own)
    needs += needing.signatures(desk, lines, signed, own=own)
    needs += needing.sites(sites, own=own)
    needs.sort(key=lambda item: item.level != needing.BAD)
    running = [line for line in lines if line.state in run_list.LIVE][:MOST_LIVE]
    finished = sorted((line for line in lines if line.state == "finished"), key=lambda line: -line.since)
    return Today(
        needs=tuple(needs),
        live=tuple(run_view.view(desk, desk.register.run_row(line.run)) for line in running),
        queue=tuple(line for line in lines if line.state == "approved"),
        lately=tuple(_published(line, signed[line.run]) for line in finished[:MOST_LATELY]),
        steps=() if own or finished else _steps(desk, lines, enrolled=sum(m.state == ENROLLED for m in members)),
        served=served,
        sites=sum(m.state == ENROLLED for m in members),
    )


def is_served(desk: Desk) -> bool:
    """Whether a `cohortium serve` of this folder is running."""
    from cohortium.server.consortium_cli import is_served as locked

    return locked(desk.consortium)


def _published(line: RunLine, release: Signed | None) -> Published:
    return Published(
        run=line.run,
        study=line.brief.study,
        at=line.since,
        rehearsal=line.brief.rehearsal,
        needed=release.needed if release is not None else None,
        signed=release.signed if release is not None else None,
    )


# ---- the first steps ----------------------------------------------------------------------------------------


def _steps(desk: Desk, lines: Sequence[RunLine], *, enrolled: int) -> tuple[Step, ...]:
    """The way from an empty folder to the first published run; each step ticks itself."""
    now = desk.clock()
    invited = sum(given.used_at is None and given.valid_until > now for given in desk.register.invitations())
    begun = any(line.state not in ("proposed", "void") for line in lines)
    proposed = any(line.state != "void" for line in lines)
    root = desk.consortium.root
    return (
        Step(
            done=enrolled >= 2,
            title="Invite the sites",
            text=f"{enrolled} enrolled, {invited} invited. Each joins with a one-time file while the service runs: "
            f"cohortium serve {root}",
            button="Invite a site",
            to="/sites",
        ),
        Step(
            done=proposed or _has_study(desk),
            title="Write a study",
            text="What is asked, of whom, and what it may cost. The plan is priced while you type.",
            button="New study",
            to="/studies",
        ),
        Step(
            done=begun,
            title="Propose it, and have it approved",
            text="Each site's officer approves at the hospital. Nothing is asked before all have.",
            button="Runs",
            to="/runs",
        ),
        Step(
            done=False,
            title="Watch the run, and publish",
            text="It starts by itself. Its results and its release are here when it is done.",
            button="Runs",
            to="/runs",
        ),
    )


def _has_study(desk: Desk) -> bool:
    folder = desk.folder / "studies"
    return folder.is_dir() and any(folder.iterdir())

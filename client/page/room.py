"""What all pages of one site share while the page is open: the site, its papers, jobs, the door and the journal."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import HTMLResponse

from cohortium.client.page.asked import Offers
from cohortium.client.page.door import Door, user_of
from cohortium.client.page.jobs import Checking, Reporting
from cohortium.client.page.journal import Journal
from cohortium.client.page.ledger_view import Papers, Reader
from cohortium.client.page.sight import Sight, look
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.web.failures import WrongToken
from cohortium.common.web.pages import nav

PRODUCT = "Cohortium at this hospital"
NAV = (
    ("/", "Overview"),
    ("/left", "What left"),
    ("/asked", "What is asked"),
    ("/ledger", "Ledger"),
    ("/check", "Check"),
    ("/report", "Own report"),
    ("/policy", "Policy"),
    ("/journal", "Journal"),
)
DID = {
    "approved": "Approved. The guard answers this plan's questions until the approval ends.",
    "signed": "Signed. Other officers have to sign too, or the coordinator waits for the officer who was enrolled.",
    "untold": "Approved here. The coordinator was not told: this user does not see the courier's certificate.",
    "declined": "Declined. What was charged before stays charged.",
    "paused": "Paused: the guard refuses everything from the next message on.",
    "unpaused": "The guard answers again.",
    "added": "This is the proposal in the file. It was signed by your coordinator.",
}
"""What a page says after an action: named in the address, so that nobody can put words there."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Room:
    """port: set by whoever serves, for the cookie's name and for asking the system who holds a connection."""

    site: Site
    door: Door
    reader: Reader
    offers: Offers
    checking: Checking
    reporting: Reporting
    journal: Journal | None
    clock: Callable[[], float] = time.time

    @classmethod
    def open(cls, site: Site, door: Door, **options: Any) -> Room:
        """The journal needs the guard's directory: without it the page can be read as far as this user sees."""
        sight = look(site)
        usable = sight.sees("guard") and os.access(site.guard, os.W_OK)
        if usable:
            site.refuse_open_guard()
        return cls(
            site=site,
            door=door,
            reader=Reader(site),
            offers=Offers(site),
            checking=Checking(site),
            reporting=Reporting(site),
            journal=Journal(site.guard) if usable else None,
            **options,
        )

    def close(self) -> None:
        self.reporting.stop()
        if self.journal is not None:
            self.journal.close()

    @property
    def sight(self) -> Sight:
        return look(self.site)

    def papers(self) -> Papers:
        self.sight.need(self.site, "guard")
        return self.reader.papers()

    def act(self, action: str, about: str, reason: str, confirm: str, do: Callable[[], T]) -> T:
        """A confirmed action with its reason, in the journal before and after. Refused ACTION-CONFIRM, PAGE-SIGHT."""
        self.sight.need(self.site, "guard")
        if confirm != "yes":
            raise Refused("ACTION-CONFIRM", "the action was not confirmed", hint="tick “I mean this”")
        if self.journal is None:
            raise Refused("PAGE-SIGHT", "this user may read the guard's directory and not change it")
        return self.journal.act(self.sight.user, action, about, reason, do)

    def state(self) -> dict[str, Any]:
        """What stands above every page."""
        sight = self.sight
        found: dict[str, Any] = {
            "name": "",
            "sees": sight.sees("guard"),
            "paused": None,
            "left": None,
            "rehearsal": False,
        }
        with contextlib.suppress(CohortiumError, OSError):
            if sight.sees("guard"):
                found |= {"paused": _since(self.site.paused), "left": _since(self.site.left)}
                policy = self.site.policy()
                found |= {"name": policy.name, "rehearsal": policy.rehearsal is not None}
            elif sight.sees("courier"):
                found["name"] = self.site.settings()["name"]
        return found


def _since(path: Any) -> float | None:
    try:
        return float(path.lstat().st_mtime)
    except OSError:
        return None


# ---- a request ----------------------------------------------------------------------------------------------


class Outside(Exception):
    """No session: the link on the terminal was not used in this browser."""


def room_of(request: Request) -> Room:
    found: Room = request.app.state.room
    return found


def user_of_request(request: Request) -> int | None:
    client, port = request.client, request.app.state.port
    return None if client is None or not port else user_of(client.host, client.port, to=port)


def cookie_name(request: Request) -> str:
    """With the port: two sites' pages on one machine have one cookie jar."""
    return f"cohortium-page-{request.app.state.port}"


async def inside(request: Request) -> Room:
    """A dependency of every route but the door: the one session, and for changes the token of its forms."""
    room = room_of(request)
    if not room.door.knows(request.cookies.get(cookie_name(request), ""), user_of_request(request)):
        raise Outside
    if request.method not in ("GET", "HEAD"):
        given = request.headers.get("x-csrf-token", "")
        if not given:
            form = await request.form()
            value = form.get("csrf", "")
            given = value if isinstance(value, str) else ""
        if not room.door.fits(given):
            raise WrongToken
    request.app.state.touched = time.monotonic()
    request.state.inside = True
    return room


def render(
    request: Request, template: str, /, *, title: str, here: str, status: int = 200, command: Any = None, **facts: Any
) -> HTMLResponse:
    """A page in the shell. here: the entry of the navigation that it stands under."""
    room, pages = room_of(request), request.app.state.pages
    within = getattr(request.state, "inside", False)
    sight = room.sight
    did = DID.get(request.query_params.get("did", ""))
    found: HTMLResponse = pages.page(
        template,
        status=status,
        title=title,
        nav=nav(NAV, here) if within else [],
        csrf=room.door.csrf if within else "",
        account={"to": "/policy#users", "name": sight.user, "role": sight.role} if within else None,
        flash=None if did is None else {"kind": "good", "text": did},
        command=command if within else None,
        now=room.clock(),
        folder=str(room.site.root),
        state=room.state() if within else None,
        sight=sight,
        **facts,
    )
    return found


def part(request: Request, template: str, /, **facts: Any) -> HTMLResponse:
    """A part of a page, for htmx."""
    room, pages = room_of(request), request.app.state.pages
    return HTMLResponse(
        pages.text(template, csrf=room.door.csrf, now=room.clock(), folder=str(room.site.root), **facts)
    )

"""Who runs the page and what this user may read: guard, courier and officer may be three users, and stay so."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from cohortium.client.site import Site
from cohortium.common.errors import Refused, UsageError

HOLDS = {
    "guard": "the policy, the ledger, the approvals and what the guard remembers",
    "courier": "the certificate with which this hospital talks to the coordinator",
    "officer": "the officer's key",
}
WITHOUT = {
    "guard": "what left, the ledger, the policy, pausing and approving are not shown here",
    "courier": "the coordinator cannot be asked for proposals: open one from a file instead",
    "officer": "to approve, name the file of the officer's key where it lies",
}
WHY = {
    "guard": "records and keys are the guard's alone, so that a broken courier can read neither",
    "courier": "the guard's user has no certificate, so that what reads records cannot talk to the outside",
    "officer": "the officer signs, and what answers questions cannot sign for the officer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One of the site's three directories. owner: its user's name, "" where it is not on this machine."""

    name: str
    path: Path
    owner: str
    open: bool

    @property
    def here(self) -> bool:
        return bool(self.owner)

    def sentence(self) -> str:
        """What this user does not see, and why; "" for an open place."""
        if self.open:
            return ""
        found = f"belongs to the user {self.owner}" if self.here else "is not on this machine"
        because = f" It is kept so on purpose: {WHY[self.name]}." if self.here else ""
        return f"{self.path.name} ({HOLDS[self.name]}) {found}; {WITHOUT[self.name]}.{because}"

    def fix(self, root: Path) -> str:
        if self.open or not self.here or self.name == "officer":
            return ""
        return f"sudo -u {self.owner} cohortium site page {root}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    user: str
    places: tuple[Place, ...]

    def sees(self, name: str) -> bool:
        return next(place.open for place in self.places if place.name == name)

    def place(self, name: str) -> Place:
        return next(place for place in self.places if place.name == name)

    @property
    def role(self) -> str:
        """In a word: what this user is to the site."""
        if os.geteuid() == 0:
            return "root"
        seen = [place.name for place in self.places if place.open]
        return "owner of the site" if len(seen) == 3 else " and ".join(seen) or "nobody here"

    def need(self, site: Site, *names: str) -> None:
        """Refused PAGE-SIGHT where this user may not read one of the places."""
        for name in names:
            place = self.place(name)
            if not place.open:
                hint = place.fix(site.root) or f"run the page where {name} lies"
                raise Refused("PAGE-SIGHT", place.sentence().rstrip("."), hint=hint)


def look(site: Site) -> Sight:
    """What this process's user may do, now."""
    places = []
    for name in HOLDS:
        path = getattr(site, name)
        try:
            owner = user_name(os.lstat(path).st_uid)
        except OSError:
            owner = ""
        places.append(Place(name=name, path=path, owner=owner, open=bool(owner) and os.access(path, os.R_OK | os.X_OK)))
    return Sight(user=user_name(os.geteuid()), places=tuple(places))


def open_site(root: Path) -> Site:
    """A directory that `site init` made, whichever part of it this user may enter; UsageError SITE-MISSING."""
    site = Site(root.resolve())
    found = look(site)
    if found.sees("guard"):
        return Site.open(root)
    if not any(place.here for place in found.places):
        raise UsageError(
            "SITE-MISSING",
            "this is not a site's directory",
            where=(str(root),),
            hint="cohortium site init DIR --invitation FILE",
        )
    return site


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

"""A hospital for the page's tests: enrolled by `site init`'s own code, with a run that its guard really answered.

The coordinator's services are real, on loopback. The hospital's keys are those of tests/hospital.py, so that its guard
can be asked as there. MARKER is in the name of every patient of its table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consortium import Party
from hospital import Ward, counts, key, plan, schema, table
from starlette.testclient import TestClient

from cohortium.client import site as site_module
from cohortium.client.approval import approve
from cohortium.client.page.app import create
from cohortium.client.page.door import Door
from cohortium.client.page.room import Room
from cohortium.client.policy_draft import draft_policy
from cohortium.client.site import Site, join_consortium
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.messages import seal
from cohortium.strategies.base import COORDINATOR

BASE = "http://127.0.0.1:7446"
HTML = {"accept": "text/html"}
MARKER = "xqz-4711-marker"
DONE = "run-1"
"""The finished run: tests/hospital.py's."""


class Here(Ward):
    """A ward whose one hospital lies in a site's directory."""

    root: Path

    def directory(self, site: str) -> Path:
        return self.root / "guard"


@dataclass(kw_only=True)
class World:
    """One hospital h, its coordinator, and what the page said on the terminal."""

    party: Party
    site: Site
    ward: Here
    said: list[str] = field(default_factory=list)

    def propose(self, run: str, **options: Any) -> bytes:
        """An open proposal over h alone, in the coordinator's register."""
        agreed = plan(("h",), **options)
        identities = {"h": key("h").public_key().public_bytes_raw().hex()}
        envelope = seal(
            proposal_message(run=run, plan=agreed, identities=identities, schema=schema()), key(COORDINATOR)
        )
        self.party.register.propose(run, folder=run, envelope=envelope, sites=agreed.sites)
        return envelope

    def visitor(self, room: Room) -> TestClient:
        """Somebody with no cookie. Redirects are not followed."""
        return TestClient(
            create(room), base_url=BASE, headers=HTML, follow_redirects=False, raise_server_exceptions=False
        )

    def room(self) -> Room:
        return Room.open(self.site, Door(self.said.append))


def make(folder: Path, party: Party, *, passphrase: str | None = None) -> World:
    keys = iter([key("h"), key("officer of h")])
    before = site_module.generate
    site_module.generate = lambda: next(keys)
    data = folder / "data.parquet"
    table(30, prefix=MARKER).to_parquet(data)
    given = {
        "table": str(data),
        "lifetime_epsilon": 8.0,
        "lifetime_delta": 1e-5,
        "unit": "pid",
        "hospitals": 1,
        "minimum_sites": 1,
        "minimum_colluders": 0,
        "minimum_patients": 10,
        "generators": ["mixture"],
        "strategies": ["local", "secure-sum"],
        "evaluation": True,
    }
    try:
        joined = join_consortium(
            folder / "site",
            invitation=party.invitation("h"),
            policy=draft_policy(given, None, name="h", ask=None),
            passphrase=passphrase,
        )
    finally:
        site_module.generate = before
    agreed = plan(("h",))
    ward = Here(folder=folder, plan=agreed)
    ward.root = joined.site.root
    world = World(party=party, site=joined.site, ward=ward)
    envelope = world.propose(DONE)
    approve(joined.site.guard, envelope, key("officer of h"))
    ward.start()
    for index in range(2):
        assert ward.ask("h", index, counts()).kind == "site.noised"
    assert ward.ask("h", 77, counts()).kind == "site.refused"
    ward.close()
    return world


def enter(world: World, room: Room, **options: Any) -> TestClient:
    """Somebody who used the link. `client.csrf` is the token for forms."""
    client = world.visitor(room)
    answer = client.get("/open", params={"key": room.door.key})
    assert answer.status_code == 200, answer.text
    client.csrf = room.door.csrf  # type: ignore[attr-defined]
    return client


def act(client: TestClient, path: str, **fields: Any) -> Any:
    """POST a confirmed action."""
    given = {"csrf": client.csrf, "reason": "because a test wants it", "confirm": "yes"}  # type: ignore[attr-defined]
    return client.post(path, data={**given, **fields})

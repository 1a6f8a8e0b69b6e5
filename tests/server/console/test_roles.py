"""Every page and every action by every role, by nobody, and by somebody between two factors: walked over, not listed.

What a route lets in is read off the route (test_access shows that the reading finds a missing guard); here each is
asked for real.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from console_routes import roles_of, routes_of
from console_worlds import HTML, desk_over, signed_in, visitor, with_runs
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from cohortium.server.console.access import PUBLIC
from cohortium.server.console.accounts import COORDINATOR, ROLES, SITE
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
ENDLESS = "/events"
LEAVES = ("/sign-out", "/account/password", "/account/everywhere", "/metrics")
"""End the session that asks, or ask for a token of their own: they have tests of their own."""


@dataclass
class World:
    desk: Desk
    done: str
    waiting: str
    routes: list[tuple[str, APIRoute]]

    def path(self, route: str, *, run: str = "") -> str:
        """A route's path with names that exist, as far as there are such."""
        known = {
            "run": run or self.done,
            "site": "site-1",
            "study": "small",
            "kind": "csv",
            "name": "site-1" if route.startswith("/sites") else "data-card.md" if "/documents/" in route else "nobody",
        }
        return re.sub(r"\{(\w+)(:\w+)?\}", lambda found: known.get(found[1], "x"), route)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    field, done, waiting = with_runs(tmp_path_factory.mktemp("roles"), title=HOSTILE)
    with desk_over(field.made) as desk:
        found = [(path, route) for path, route in routes_of(create(desk)) if isinstance(route, APIRoute)]
        routes = [(p, r) for p, r in found if p not in PUBLIC and not p.endswith(ENDLESS) and p not in LEAVES]
        yield World(desk, done, waiting, routes)


@pytest.fixture(scope="module")
def clients(world: World) -> dict[str, TestClient]:
    return {role: signed_in(world.desk, role, site="site-1" if role == SITE else "") for role in ROLES}


def ask(client: TestClient, route: APIRoute, path: str, **options: Any) -> Any:
    return client.request(min(set(route.methods) - {"HEAD"}), path, **options)


def test_nobody_sees_or_does_anything(world: World) -> None:
    nobody = visitor(world.desk)
    assert len(world.routes) > 30
    for path, route in world.routes:
        answer = ask(nobody, route, world.path(path))
        page = "GET" in route.methods
        assert answer.status_code == (303 if page else 401), path
        assert not page or answer.headers["location"].startswith("/sign-in?next="), path
        assert world.done not in answer.text and "site-1" not in answer.text, path
        assert nobody.get(world.path(path), headers={"accept": "*/*"}).status_code in (401, 405), path


def test_a_password_alone_opens_nothing(world: World) -> None:
    """Between the factors: the session is there and not complete."""
    world.desk.accounts.add("halfway", role=COORDINATOR, password=None)
    client = visitor(world.desk)
    client.cookies.set("cohortium-session", world.desk.accounts.begin("halfway", complete=False))
    for path, route in world.routes:
        assert ask(client, route, world.path(path)).status_code in (303, 401), path


def test_every_role_has_what_its_routes_say(world: World, clients: dict[str, TestClient]) -> None:
    for path, route in world.routes:
        if set(route.methods) - {"GET", "HEAD"}:
            continue
        allowed = roles_of(route) or ()
        for role, client in clients.items():
            status = client.get(world.path(path)).status_code
            assert (status == 403) == (role not in allowed), f"{role} {path}: {status}"
            assert status < 500, f"{role} {path}: {status}"


def test_every_action_is_a_roles_own(world: World, clients: dict[str, TestClient]) -> None:
    """Others are refused although they have a session and its token; whoever may is stopped by what is missing."""
    actions = [(path, route) for path, route in world.routes if set(route.methods) - {"GET", "HEAD"}]
    assert len(actions) > 10
    for path, route in actions:
        allowed = roles_of(route) or ()
        for role, client in clients.items():
            answer = ask(client, route, world.path(path), data={"csrf": client.csrf})  # type: ignore[attr-defined]
            assert (answer.status_code == 403) == (role not in allowed), f"{role} {path}: {answer.status_code}"
            assert answer.status_code < 500, f"{role} {path}: {answer.status_code}"


def test_every_action_wants_the_forms_token(world: World, clients: dict[str, TestClient]) -> None:
    other = signed_in(world.desk, COORDINATOR, name="somebody-else")
    for path, route in world.routes:
        if not set(route.methods) - {"GET", "HEAD"}:
            continue
        role = (roles_of(route) or (COORDINATOR,))[0]
        client, fields = clients[role], {"confirm": "yes", "reason": "from another page"}
        for token in ({}, {"csrf": ""}, {"csrf": "0" * 43}, {"csrf": other.csrf}):  # type: ignore[attr-defined]
            answer = ask(client, route, world.path(path), data={**fields, **token})
            assert answer.status_code == 403 and "WEB-TOKEN" in answer.text, f"{path}: {answer.status_code}"
        headers = {"origin": "http://evil.example", "x-csrf-token": client.csrf}  # type: ignore[attr-defined]
        assert ask(client, route, world.path(path), data=fields, headers=headers).status_code == 403, path


def test_every_journalled_action_wants_a_word_and_a_reason(world: World, clients: dict[str, TestClient]) -> None:
    """Without the tick nothing is done and nothing is written down as asked for."""
    coordinator = clients[COORDINATOR]
    quiet = ("/studies/preview", "/studies/new", "/studies/new/dictionary", "/results/{run}/rows")
    before = len(world.desk.journal.lines())
    for path, route in world.routes:
        if (
            not set(route.methods) - {"GET", "HEAD"}
            or path in quiet
            or path.startswith("/whatif")
            or path.endswith("/verify")
        ):
            continue
        answer = ask(coordinator, route, world.path(path), data={"csrf": coordinator.csrf, "reason": "a reason"})  # type: ignore[attr-defined]
        assert answer.status_code in (404, 409, 422), f"{path}: {answer.status_code}"
    asked = [line for line in world.desk.journal.lines()[before:] if line.body.get("about") == "asked"]
    assert asked == []


def test_a_member_of_another_site_finds_nothing(world: World) -> None:
    """The same answer as for what does not exist, and no word of it in any list."""
    outsider = signed_in(world.desk, SITE, site="elsewhere", name="outsider")
    for path, route in world.routes:
        if "GET" not in route.methods:
            continue
        answer = outsider.get(world.path(path))
        assert world.done not in answer.text.replace(world.path(path), ""), path
        if "{run}" in path:
            missing = outsider.get(world.path(path, run="small-ffffffff"))
            assert (answer.status_code, missing.status_code) in ((404, 404), (403, 403)), path
        if path == "/sites/{name}":
            assert answer.status_code == 404


def test_a_member_of_the_site_finds_its_own(world: World, clients: dict[str, TestClient]) -> None:
    member = clients[SITE]
    assert world.done in member.get("/runs").text and member.get(f"/runs/{world.done}").status_code == 200
    sites = member.get("/sites").text
    assert "site-1" in sites and "site-2" not in sites


def test_hostile_names_stay_text_everywhere(world: World, clients: dict[str, TestClient]) -> None:
    """The study's title holds a script; no page says it as anything but text."""
    seen = 0
    for path, route in world.routes:
        if "GET" in route.methods:
            answer = clients[COORDINATOR].get(world.path(path))
            if "text/html" in answer.headers.get("content-type", ""):
                assert "<script>alert" not in answer.text and "<img src=x" not in answer.text, path
                seen += "&lt;script&gt;alert" in answer.text
    assert seen >= 2  # it was shown, so the escaping was at work


def test_hostile_queries_stay_text(world: World, clients: dict[str, TestClient]) -> None:
    for path, route in world.routes:
        if "GET" in route.methods and "{" not in path:
            names = [field.alias for field in route.dependant.query_params]
            for name in names:
                answer = clients[COORDINATOR].get(path, params={name: HOSTILE})
                assert answer.status_code < 500 and "<script>alert" not in answer.text, f"{path}?{name}"


def test_no_page_says_anything_to_a_browser_that_asks_for_json(world: World) -> None:
    """/api is guarded like the pages."""
    nobody = visitor(world.desk)
    apis = [path for path, _ in world.routes if path.startswith("/api/")]
    assert len(apis) >= 6
    for path in apis:
        assert nobody.get(world.path(path), headers={**HTML, "accept": "application/json"}).status_code == 401, path

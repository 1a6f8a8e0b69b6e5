"""Every route is guarded, found by walking over all of them; paths of `next`; who gets which answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from console_routes import roles_of, routes_of
from console_worlds import act, bare, desk_over
from fastapi import FastAPI
from fastapi.routing import APIRoute
from signing_in import Clock, signed_in, visitor
from starlette.testclient import TestClient

from cohortium.server.console.access import COORDINATOR, PUBLIC, TOKEN, local_path
from cohortium.server.console.accounts import AUDITOR, ROLES, SITE
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk
from cohortium.server.console.pages import metrics


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[Desk]:
    with desk_over(bare(tmp_path_factory.mktemp("access")), clock=clock) as found:
        yield found


@pytest.fixture(scope="module")
def auditor(desk: Desk) -> TestClient:
    return signed_in(desk, AUDITOR, name="next")


# ---- every route ---------------------------------------------------------------------------------------------


OTHERS = {
    **{path: set(ROLES) for path in ("/sign-out", "/account/password", "/account/everywhere")},
    **{path: {COORDINATOR, AUDITOR} for path in ("/budget/verify", "/audit/verify")},  # they recompute, no more
    "/results/{run}/rows": {COORDINATOR, SITE},  # takes rows that are published
}
"""Every path but these that wants a form is a coordinator's alone."""


def unguarded(app: FastAPI) -> list[str]:
    found = []
    for path, route in routes_of(app):
        if path in (*PUBLIC, *TOKEN):  # the latter: test_without_a_session_no_route_answers asks them, too
            continue
        if not isinstance(route, APIRoute):
            found.append(f"{path} is no route of ours")
            continue
        roles = roles_of(route)
        if path == "/metrics":  # for a monitoring system, which signs in nowhere: a token of its own
            if not any(part.call is metrics.bearer for part in route.dependant.dependencies):
                found.append(f"{path} has no guard")
        elif not roles:
            found.append(f"{path} has no guard")
        elif not set(roles) <= set(ROLES):
            found.append(f"{path} lets in {roles}")
        elif set(route.methods) - {"GET", "HEAD"} and set(roles) != OTHERS.get(path, {COORDINATOR}):
            found.append(f"{path} lets {roles} change something")
    return found


def test_every_route_is_guarded(desk: Desk) -> None:
    app = create(desk)
    found = [path for path, _ in routes_of(app)]
    assert {"/account", "/people", "/people/{name}/close", "/sign-out"} <= set(found), "it sees what is there"
    assert unguarded(app) == []


def test_an_unguarded_route_is_found(desk: Desk) -> None:
    """The test's own power."""
    app = create(desk)

    @app.get("/planted")
    def planted() -> str:
        return ""

    assert unguarded(app) == ["/planted has no guard"]


def test_a_change_by_anybody_but_a_coordinator_is_found(desk: Desk) -> None:
    from fastapi import Depends

    from cohortium.server.console.access import may

    app = create(desk)

    @app.post("/planted", dependencies=[Depends(may(COORDINATOR, AUDITOR))])
    def planted() -> str:
        return ""

    assert unguarded(app)[0].startswith("/planted lets")


def test_without_a_session_no_route_answers(desk: Desk) -> None:
    """Asked for real, not read from the code: 303 or 401 everywhere, and nothing of the consortium in the answer."""
    app = create(desk)
    client = visitor(desk)
    for path, route in routes_of(app):
        if path in PUBLIC or not isinstance(route, APIRoute):
            continue
        filled = path
        for name in route.param_convertors:
            filled = filled.replace(f"{{{name}}}", "a1").replace(f"{{{name}:path}}", "a1")
        for method in route.methods - {"HEAD"}:
            answer = client.request(method, filled)
            assert answer.status_code in (303, 401), (method, filled, answer.status_code)
            assert "site-1" not in answer.text
            if answer.status_code == 303:
                assert answer.headers["location"].startswith("/sign-in?next=")


@pytest.mark.parametrize("role", [AUDITOR, SITE])
def test_no_action_of_a_coordinator_is_anybody_elses(desk: Desk, role: str) -> None:
    app = create(desk)
    client = signed_in(desk, role, site="site-1" if role == SITE else "")
    csrf = {"x-csrf-token": client.csrf}  # type: ignore[attr-defined]
    tried = 0
    for path, route in routes_of(app):
        if not isinstance(route, APIRoute) or set(route.methods) <= {"GET", "HEAD"} or path in PUBLIC:
            continue
        if roles_of(route) != (COORDINATOR,):
            continue
        filled = path
        for name in route.param_convertors:
            filled = filled.replace(f"{{{name}}}", "a1").replace(f"{{{name}:path}}", "a1")
        answer = client.post(filled, headers=csrf, data={"confirm": "yes", "reason": "to see whether it goes"})
        assert answer.status_code == 403, (filled, answer.status_code)
        tried += 1
    assert tried >= 4


def test_a_wrong_or_absent_token_changes_nothing(desk: Desk) -> None:
    client = signed_in(desk, COORDINATOR)
    fields = {"name": "mallory", "role": "coordinator", "confirm": "yes", "reason": "because"}
    other = signed_in(desk, COORDINATOR, name="another")
    for csrf in ({}, {"csrf": ""}, {"csrf": "x"}, {"csrf": "é"}, {"csrf": other.csrf}):  # type: ignore[attr-defined]
        assert client.post("/people", data={**fields, **csrf}).status_code == 403
        if "csrf" in csrf and csrf["csrf"].isascii():
            assert client.post("/people", data=fields, headers={"x-csrf-token": csrf["csrf"]}).status_code == 403
    assert client.post("/people", json={**fields, "csrf": client.csrf}).status_code == 403  # type: ignore[attr-defined]
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        answer = client.post("/people", data={**fields, "csrf": client.csrf}, headers=headers)  # type: ignore[attr-defined]
        assert answer.status_code == 403
    assert desk.accounts.account("mallory") is None


def test_a_program_gets_401_and_a_part_of_a_page_is_sent_to_sign_in(desk: Desk) -> None:
    client = visitor(desk)
    assert client.get("/account", headers={"accept": "application/json"}).status_code == 401
    part = client.get("/account", headers={"hx-request": "true"})
    assert part.status_code == 401 and part.headers["hx-redirect"] == "/sign-in"
    page = client.get("/account?x=1&y=%2F")
    assert page.status_code == 303 and page.headers["location"] == "/sign-in?next=%2Faccount%3Fx%3D1%26y%3D%252F"


def test_a_session_half_way_opens_nothing(desk: Desk) -> None:
    desk.accounts.add("halfway", role=COORDINATOR, password=None)
    for factor in (False, True):
        client = visitor(desk)
        token = desk.accounts.begin("halfway", complete=False, factor=factor)
        client.cookies.set("cohortium-session", token)
        session = desk.accounts.session(token)
        assert session is not None and client.get("/account").status_code == 303
        assert client.post("/sign-out", data={"csrf": session.csrf}).status_code == 401


# ---- where to go afterwards ----------------------------------------------------------------------------------

NASTY = (
    *("https://evil.example", "http://evil.example/", "//evil.example", "///evil.example", "////evil.example"),
    *("/\\evil.example", "\\/evil.example", "\\\\evil.example", "/\t/evil.example", "/\n/evil.example", "\t//evil"),
    *(" //evil.example", "/ /evil.example", "javascript:alert(1)", "data:text/html,x", "evil.example", "", ".", ".."),
    *(
        "/\r\nset-cookie: a=b",
        "/\x00",
        "/é",
        "/\u2028",
        "/%0d%0a\n",
        "//[",
        "http://[",
        "/a b",
        "/\x7f",
        "/" + "a" * 3000,
    ),
    *("https:/evil.example", "https:evil.example", "?next=//evil", "#//evil", "/\\\t/evil.example", "／/evil.example"),
)


@pytest.mark.parametrize("text", NASTY)
def test_no_other_place_is_gone_to(auditor: TestClient, text: str) -> None:
    assert local_path(text) == "/"
    answer = auditor.get("/sign-in", params={"next": text})
    if len(text) <= 2000:
        assert answer.status_code == 303 and answer.headers["location"] == "/"
    else:
        assert answer.status_code == 422


@pytest.mark.parametrize("text", ["/", "/runs", "/runs/a-1?x=1&y=%2F#part", "/a//b", "/sites/[1]~", "/%5Cevil"])
def test_own_paths_are_kept(text: str) -> None:
    assert local_path(text) == text


def test_what_a_page_asks_by_itself_does_not_keep_the_session_awake(desk: Desk, clock: Clock) -> None:
    client = signed_in(desk, AUDITOR, name="watching")
    for _ in range(5):
        clock.pass_s(desk.accounts.idle_s // 4)
        answer = client.get("/account", headers={"hx-request": "true"})
    assert answer.status_code == 401
    client = signed_in(desk, AUDITOR, name="watching")
    for _ in range(5):
        clock.pass_s(desk.accounts.idle_s // 4)
        assert client.get("/account").status_code == 200


def test_names_of_accounts_are_not_paths(desk: Desk, tmp_path: Path) -> None:
    client = signed_in(desk, COORDINATOR)
    for name in ("..%2F..%2Fx", "A", "%00", "a" * 65, "é"):
        answer = act(client, f"/people/{name}/close")
        assert answer.status_code in (404, 405, 422), name

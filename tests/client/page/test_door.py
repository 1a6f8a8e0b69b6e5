"""The way in: one key, one browser, one user; every route behind it; names, origins, tokens, and 127.0.0.1 only."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from cohortium.client.page.app import create
from cohortium.client.page.door import Door, user_of
from cohortium.client.page.room import Room, inside
from cohortium.client.page.serving import serve
from cohortium.common.errors import Refused, UsageError

OUTSIDE = {"/static/report.css", "/open"}


def routes(room: Room) -> list[APIRoute]:
    """Every route, those of included routers too."""
    found: list[APIRoute] = []

    def walk(some: Any) -> None:
        for route in some:
            if isinstance(route, APIRoute):
                found.append(route)
            elif hasattr(route, "original_router"):
                walk(route.original_router.routes)

    walk(create(room).router.routes)
    return found


def address(route: APIRoute) -> str:
    return route.path.replace("{run}", "run-1")


def test_every_route_but_the_door_asks_who_is_there(room: Room) -> None:
    found = routes(room)
    assert len(found) > 25
    for route in found:
        guarded = any(d.call is inside for d in route.dependant.dependencies)
        assert guarded == (route.path not in OUTSIDE), route.path


def test_without_the_key_there_is_nothing(world: Any, room: Room) -> None:
    stranger = world.visitor(room)
    for route in routes(room):
        if route.path in OUTSIDE:
            continue
        for method in route.methods:
            answer = stranger.request(method, address(route))
            assert answer.status_code == 401, (method, route.path)
            assert "set-cookie" not in answer.headers and "Ledger" not in answer.text
    assert stranger.get("/open", params={"key": "0" * 64}).status_code == 403
    assert stranger.get("/open").status_code == 422


def test_the_key_is_good_once_and_the_terminal_is_told(world: Any, room: Room) -> None:
    said: list[str] = []
    fresh = replace(room, door=Door(said.append))
    client, other = world.visitor(fresh), world.visitor(fresh)
    assert client.head("/open", params={"key": fresh.door.key}).status_code == 405  # a look ahead uses nothing up
    first = client.get("/open", params={"key": fresh.door.key})
    cookie = first.headers["set-cookie"]
    assert first.status_code == 200 and first.headers["refresh"] == "0; url=/"
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and "Path=/" in cookie
    assert fresh.door.key not in first.text and fresh.door.key not in cookie
    assert client.get("/").status_code == 200
    second = other.get("/open", params={"key": fresh.door.key})
    assert second.status_code == 403 and "set-cookie" not in second.headers and "PAGE-KEY-USED" in second.text
    assert other.get("/").status_code == 401
    assert [line.split(".")[0] for line in said] == [
        "Opened in a browser",
        "Somebody tried the link again: it was good once",
    ]


def test_a_key_and_a_cookie_are_long_and_new_each_time() -> None:
    doors = [Door() for _ in range(3)]
    secrets = [text for one in doors for text in (one.key, one.csrf, one._cookie)]
    assert len(set(secrets)) == 9 and all(re.fullmatch("[0-9a-f]{64}", text) for text in secrets)
    assert not doors[0].knows(doors[0]._cookie, None)  # nobody has entered yet


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0:7446", "[::1]:7446", ""])
def test_another_name_of_this_server_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:7446"])
def test_a_form_of_another_page_is_refused(client: TestClient, room: Room, origin: str) -> None:
    given = {"csrf": room.door.csrf, "reason": "abc", "confirm": "yes"}
    assert client.post("/pause", data=given, headers={"origin": origin}).status_code == 403
    assert client.post("/pause", data=given, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert not room.site.paused.exists()


def test_every_change_needs_the_forms_token(client: TestClient, room: Room) -> None:
    changing = [route for route in routes(room) if "POST" in route.methods]
    assert len(changing) == 7
    for route in changing:
        for given in ({}, {"csrf": "0" * 64}, {"csrf": "ü"}, {"csrf": room.door.key}):
            assert client.post(address(route), data=given).status_code == 403, route.path
    assert not room.site.paused.exists()
    assert client.post("/check", headers={"x-csrf-token": room.door.csrf}).status_code == 303
    room.checking.wait(30)


def test_the_session_is_the_user_s_who_opened_it() -> None:
    one = Door()
    cookie = one.enter(one.key, 1000)
    assert one.knows(cookie, 1000) and not one.knows(cookie, 1001) and not one.knows(cookie, None)
    anybody = Door()
    cookie = anybody.enter(anybody.key, None)  # where the system does not say
    assert anybody.knows(cookie, None) and anybody.knows(cookie, 1001)


def test_whose_connection_it_is(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    table.write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
        "   0: 0100007F:1D16 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 1\n"
        "   1: 0100007F:C350 0100007F:1D16 01 00000000:00000000 00:00000000 00000000  1000        0 2\n"
    )
    assert user_of("127.0.0.1", 50000, to=7446, table=table) == 1000
    assert user_of("127.0.0.1", 50001, to=7446, table=table) is None
    assert user_of("10.0.0.1", 50000, to=7446, table=table) is None
    assert user_of("127.0.0.1", 50000, to=7446, table=tmp_path / "none") is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "hospital.example", "127.0.0.1.evil.example"])
def test_any_other_interface_is_refused(host: str, world: Any) -> None:
    with pytest.raises(Refused, match="PAGE-HOST"):
        serve(world.site.root, host=host, browser=False)


def test_a_second_page_of_a_site_is_refused(world: Any, room: Room) -> None:
    with pytest.raises(Refused, match="PAGE-BUSY"):
        world.room()


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SITE-MISSING"):
        serve(tmp_path, browser=False)

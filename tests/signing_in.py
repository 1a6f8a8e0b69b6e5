"""Signing in to the console as a browser does: forms, their tokens, cookies; a clock that a test moves."""

from __future__ import annotations

import re
from html import unescape
from typing import Any
from weakref import WeakKeyDictionary

import argon2
import pyotp
from console_worlds import BASE, HTML, PASSWORD
from fastapi import FastAPI
from starlette.testclient import TestClient

from cohortium.server.console.accounts import COORDINATOR, Accounts
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk

_APPS: WeakKeyDictionary[Desk, FastAPI] = WeakKeyDictionary()
NOON = 1_790_000_000
SECRET = "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP"


class Clock:
    def __init__(self, at: int = NOON) -> None:
        self.at = at

    def __call__(self) -> float:
        return float(self.at)

    def pass_s(self, seconds: int) -> None:
        self.at += seconds


_QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
_NOBODY = _QUICK.hash("nobody has this")


def quick(accounts: Accounts) -> Accounts:
    """The same hashing with hardly any memory: for tests of what is around it."""
    accounts._hasher, accounts._nobody = _QUICK, _NOBODY
    return accounts


def app_of(desk: Desk) -> FastAPI:
    """One application a desk: making its routes takes longer than most requests."""
    if desk not in _APPS:
        _APPS[desk] = create(desk)
    return _APPS[desk]


def visitor(desk: Desk) -> TestClient:
    """Somebody who has not signed in. Redirects are not followed: a test looks at each answer."""
    options: dict[str, Any] = {"base_url": BASE, "headers": HTML, "follow_redirects": False}
    return TestClient(app_of(desk), raise_server_exceptions=False, **options)


def signed_in(desk: Desk, role: str = COORDINATOR, *, site: str = "", name: str = "") -> TestClient:
    """Somebody with everything shown, without its pages. `client.csrf` is the token for its forms."""
    name = name or f"{role}-{site}".strip("-")
    if desk.accounts.account(name) is None:
        desk.accounts.add(name, role=role, password=None, site=site)
    client, token = visitor(desk), desk.accounts.begin(name, complete=True)
    client.cookies.set("cohortium-session", token)
    session = desk.accounts.session(token)
    assert session is not None
    client.csrf = session.csrf  # type: ignore[attr-defined]
    return client


def code_of(clock: Any, secret: str = SECRET) -> str:
    return pyotp.TOTP(secret).at(int(clock()))


def person(desk: Desk, name: str = "anna", *, role: str = COORDINATOR, site: str = "", secret: str = SECRET) -> None:
    """A local account that has enrolled its second factor, long ago."""
    desk.accounts.add(name, role=role, password=PASSWORD, site=site)
    step = int(desk.clock()) - 3600
    with desk.accounts._store.write() as db:
        db.execute("UPDATE accounts SET totp = ?, totp_step = ? WHERE name = ?", (secret, step // 30, name))


def fields(page: str) -> dict[str, str]:
    """The hidden fields of a page's first form with any."""
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', page)
    return {name: unescape(value) for name, value in reversed(found)}


def give_password(client: TestClient, name: str = "anna", password: str = PASSWORD, *, to: str = "/") -> Any:
    page = client.get("/sign-in", params={"next": to})
    return client.post("/sign-in", data={**fields(page.text), "name": name, "password": password})


def give_code(client: TestClient, code: str, *, at: str = "/sign-in/code") -> Any:
    page = client.get(at)
    assert page.status_code == 200, page.headers
    return client.post(at.partition("?")[0], data={**fields(page.text), "code": code})


def sign_in(desk: Desk, client: TestClient | None = None, name: str = "anna", *, to: str = "/") -> TestClient:
    """Through both pages; the client then has a complete session."""
    client = client or visitor(desk)
    first = give_password(client, name, to=to)
    assert first.status_code == 303 and first.headers["location"].startswith("/sign-in/code"), first.text
    second = give_code(client, code_of(desk.clock), at=first.headers["location"])
    assert second.status_code == 303, second.text
    return client


def notes(desk: Desk, about: str) -> list[dict[str, Any]]:
    """The journal's notes of one kind."""
    bodies = [line.body for line in desk.journal.lines()]
    return [body["fields"] for body in bodies if body.get("kind") == "note" and body["about"] == about]

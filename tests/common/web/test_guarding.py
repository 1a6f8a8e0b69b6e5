"""What the guard before every page refuses, and what it puts on every answer, error pages included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cohortium.common.web.guarding import HEADERS, POLICY, REPORT_POLICY, GuardedApp, Guarding

BASE = "http://console.example.org:7445"


async def told(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def broken(request: Request) -> PlainTextResponse:
    raise RuntimeError("a secret of the inside")


async def report(request: Request) -> PlainTextResponse:
    return PlainTextResponse("", headers={"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "max-age=60"})


ROUTES = [
    Route("/", told, methods=["GET", "POST"]),
    Route("/broken", broken),
    Route("/report", report),
    Route("/static/app.css", told),
]


def client(*, secure: bool = False, base: str = BASE, most: int = 1000) -> TestClient:
    app = Guarding(Starlette(routes=ROUTES), names=["console.example.org"], secure=secure, most_bytes=most)
    return TestClient(app, base_url=base, raise_server_exceptions=False)


@pytest.mark.parametrize(
    "host", ["evil.example", "console.example.org.evil.example", "", "console.example.org@evil.example", "[", "a b"]
)
def test_another_name_is_not_this_server(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["console.example.org", "CONSOLE.example.org:7445"])
def test_its_own_name_is(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://console.example.org:7445"},  # another scheme is another origin
        {"origin": "http://console.example.org"},  # and so is another port
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": BASE},
    ],
)
def test_a_change_comes_from_an_own_page(headers: dict[str, str]) -> None:
    assert client().post("/", headers=headers).status_code == 403
    assert client().get("/", headers=headers).status_code == 200  # a link from elsewhere changes nothing


@pytest.mark.parametrize("headers", [{"origin": BASE}, {"origin": BASE, "sec-fetch-site": "same-origin"}, {}])
def test_an_own_page_may(headers: dict[str, str]) -> None:
    assert client().post("/", headers=headers).status_code == 200


def test_over_tls_the_origin_is_https_and_lasting() -> None:
    safe = client(secure=True, base="https://console.example.org")
    assert safe.post("/", headers={"origin": "https://console.example.org"}).status_code == 200
    assert safe.post("/", headers={"origin": "http://console.example.org"}).status_code == 403
    assert "max-age" in safe.get("/").headers["strict-transport-security"]
    assert "strict-transport-security" not in client().get("/").headers


def _pieces(size: int) -> Iterator[bytes]:
    for _ in range(size // 100):
        yield b"x" * 100


@pytest.mark.parametrize("body", [b"x" * 1001, _pieces(1100)], ids=["declared", "in pieces"])
def test_no_body_is_longer_than_the_limit(body: Any) -> None:
    assert client().post("/", content=body).status_code == 413


def test_a_body_at_the_limit_comes_through() -> None:
    assert client().post("/", content=_pieces(1000)).text == "1000"


def test_a_file_may_be_longer_where_one_is_sent() -> None:
    app = Guarding(
        Starlette(routes=ROUTES), names=["console.example.org"], secure=False, most_bytes=10, larger={"/": 500}
    )
    here = TestClient(app, base_url=BASE, raise_server_exceptions=False)
    assert here.post("/", content=b"x" * 500).text == "500" and here.post("/", content=b"x" * 501).status_code == 413
    assert here.post("/report", content=b"x" * 11).status_code == 413


def test_an_unforeseen_error_of_an_application_has_the_headers() -> None:
    """FastAPI answers it outside of all middleware that is added the usual way."""
    made = GuardedApp(routes=[Route("/broken", broken)])
    made.state.guard = lambda inner: Guarding(inner, names=["console.example.org"], secure=False)
    answer = TestClient(made, base_url=BASE, raise_server_exceptions=False).get("/broken")
    assert answer.status_code == 500 and answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize("length", ["-1", "1e3", "٣", "9" * 30])
def test_an_odd_length_is_refused(length: str) -> None:
    answer = client().post("/", content=b"x", headers={"content-length": length.encode()})  # type: ignore[dict-item]
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/", "/broken", "/nowhere", "/static/app.css"])
def test_every_answer_has_the_headers(path: str) -> None:
    answer = client().get(path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert answer.headers["content-security-policy"] == POLICY
    assert "secret" not in answer.text
    assert answer.headers["cache-control"] == ("max-age=3600" if path.startswith("/static") else "no-store")


def test_a_report_keeps_its_own_policy() -> None:
    answer = client().get("/report")
    assert answer.headers["content-security-policy"] == REPORT_POLICY and "sandbox" in REPORT_POLICY
    assert answer.headers["cache-control"] == "max-age=60"


def test_the_policy_allows_nothing_inline_and_nobody_else() -> None:
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY
    assert "default-src 'none'" in POLICY and "frame-ancestors 'none'" in POLICY

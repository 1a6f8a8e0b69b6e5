"""Signing in at an identity provider: a certified one as a process of its own, and one that lies.

The first is npm's `oidc-provider` (OpenID Certified), installed by its lock file beside this test into pytest's cache.
The second is written here: it signs whatever a test wants it to.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import httpx
import pytest
from console_worlds import BASE, bare, desk_over
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
from signing_in import NOON, Clock, notes, visitor

from cohortium.common.errors import PeerUnreachable, Refused
from cohortium.server.console import oidc as module
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.desk import Desk
from cohortium.server.console.oidc import Asked, Person, Provider
from cohortium.server.console.settings import Oidc, Settings

HERE = Path(__file__).parent / "provider"
BACK = f"{BASE}/sign-in/oidc/back"
CLIENT, CLIENT_SECRET = "cohortium", "only for: a test/äöü"
SYMMETRIC = b"a key that was put where everybody can read it"
ROLES = {"coordinators": COORDINATOR, "reviewers": AUDITOR}
SITES = {"north": "site-1", "south": "site-2"}


def settings(issuer: str, **more: Any) -> Oidc:
    given: dict[str, Any] = {"claim": "groups", "roles": ROLES, "sites": SITES, "client_secret": CLIENT_SECRET}
    return Oidc(issuer=issuer, client_id=CLIENT, **{**given, **more})


# ---- a provider that lies ------------------------------------------------------------------------------------


class Liar:
    """An identity provider under a test's orders: `claims`, `header` and `key` of the next ID token, and `papers`."""

    def __init__(self, address: str) -> None:
        self.issuer = address
        self.key = RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})
        self.reset()

    def reset(self) -> None:
        self.claims: dict[str, Any] = {}
        self.header: dict[str, Any] = {"alg": "RS256", "kid": "one"}
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.papers: dict[str, Any] = {}
        self.answer: tuple[int, bytes] | None = None
        self.asked: list[tuple[str, dict[str, str], str]] = []

    def signed(self, claims: dict[str, Any]) -> str:
        return jwt.encode(self.header, claims, self.key, algorithms=["RS256", "HS256", "none"])

    def discovery(self) -> dict[str, Any]:
        names = {"authorization_endpoint": "auth", "token_endpoint": "token", "jwks_uri": "jwks"}
        papers: dict[str, Any] = {name: f"{self.issuer}/{path}" for name, path in names.items()}
        return {"issuer": self.issuer, **papers, **self.papers}

    def reply(self, path: str, form: dict[str, str], authorization: str) -> tuple[int, bytes]:
        self.asked.append((path, form, authorization))
        if path == "/.well-known/openid-configuration":
            return 200, json.dumps(self.discovery()).encode()
        if path == "/jwks":
            return 200, json.dumps(
                {"keys": [self.key.as_dict(private=False), {"kty": "oct", "k": _base64(SYMMETRIC)}]}
            ).encode()
        if self.answer is not None:
            return self.answer
        now = NOON
        claims = {"iss": self.issuer, "sub": "1", "aud": CLIENT, "iat": now, "exp": now + 300, "groups": ["reviewers"]}
        claims = {name: value for name, value in {**claims, **self.claims}.items() if value is not None}
        return 200, json.dumps({"access_token": "a", "token_type": "Bearer", "id_token": self.sign(claims)}).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[Liar]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            self._reply({name: values[0] for name, values in parse_qs(body).items()})

        def _reply(self, form: dict[str, str]) -> None:
            status, content = liar.reply(self.path, form, self.headers.get("authorization", ""))
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    liar = Liar(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield liar
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def liar(server: Liar) -> Liar:
    server.reset()
    return server


def come_back(liar: Liar, provider: Provider | None = None, **answer: Any) -> Person:
    """Begin and finish; the nonce goes where an honest provider puts it, unless the test has put another."""
    provider = provider or Provider(settings(liar.issuer), clock=Clock())
    asked = provider.begin(BACK)
    liar.claims.setdefault("nonce", asked.nonce)
    given = {"state": asked.state, "code": "c0de", **answer}
    return provider.finish(asked, {name: value for name, value in given.items() if value is not None}, BACK)


def refusal(liar: Liar, provider: Provider | None = None, **answer: Any) -> str:
    with pytest.raises((Refused, PeerUnreachable)) as caught:
        come_back(liar, provider, **answer)
    return caught.value.code


def test_the_liar_can_be_honest(liar: Liar) -> None:
    """Without this every refusal below could have another cause."""
    assert come_back(liar) == Person(subject="1", wish="1", role=AUDITOR, site="")
    path, form, authorization = liar.asked[-2] if liar.asked[-1][0] == "/jwks" else liar.asked[-1]
    assert path == "/token" and form["code"] == "c0de" and form["redirect_uri"] == BACK
    assert len(form["code_verifier"]) >= 43 and "client_secret" not in form
    assert base64.b64decode(authorization.removeprefix("Basic ")).decode() == (
        "cohortium:only%20for%3A%20a%20test%2F%C3%A4%C3%B6%C3%BC"
    ), "RFC 6749 2.3.1"


def test_the_browser_is_sent_with_everything_that_binds_the_answer(liar: Liar) -> None:
    provider = Provider(settings(liar.issuer, acr=("gold", "silver")), clock=Clock())
    one, other = provider.begin(BACK), provider.begin(BACK)
    query = {name: values[0] for name, values in parse_qs(urlsplit(one.address).query).items()}
    digest = base64.urlsafe_b64encode(hashlib.sha256(one.verifier.encode()).digest()).decode().rstrip("=")
    assert query == {
        "response_type": "code",
        "client_id": CLIENT,
        "redirect_uri": BACK,
        "scope": "openid profile",
        "state": one.state,
        "nonce": one.nonce,
        "code_challenge": digest,
        "code_challenge_method": "S256",
        "acr_values": "gold silver",
    }
    assert one.verifier not in one.address
    assert not {one.state, one.nonce, one.verifier} & {other.state, other.nonce, other.verifier}


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "another"},
        {"nonce": None, "no_nonce": True},
        {"nonce": ["a", "b"]},
        {"aud": "another client"},
        {"aud": ["another client"]},
        {"aud": "another client", "azp": CLIENT},
        {"aud": [CLIENT, "another"]},  # more than us, and not said for whom it was made
        {"aud": [CLIENT, "another"], "azp": "another"},
        {"aud": None},
        {"azp": "another"},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"iss": ["x"]},
        {"exp": NOON - 61},
        {"exp": None},
        {"exp": "tomorrow"},
        {"iat": None},
        {"iat": NOON + 3600},
        {"nbf": NOON + 3600},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 300},
        {"at_hash": "wrong"},
        {"amr": "pwd"},
    ],
    ids=str,
)
def test_a_token_that_does_not_hold_lets_nobody_in(liar: Liar, claims: dict[str, Any]) -> None:
    if claims.pop("no_nonce", False):
        liar.sign = lambda found: liar.signed({name: v for name, v in found.items() if name != "nonce"})
    liar.claims = claims
    assert refusal(liar) == "OIDC-TOKEN"


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def forged(liar: Liar, how: str) -> Callable[[dict[str, Any]], str]:
    other = RSAKey.generate_key(2048, {"kid": "one"})
    public = liar.key.as_pem(private=False)

    def sign(claims: dict[str, Any]) -> str:
        if how == "none":
            head = _base64(b'{"alg":"none"}')
            return f"{head}.{_base64(json.dumps(claims).encode())}."
        if how == "shared secret":  # the public key taken for a shared secret
            signed = ".".join(_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "kid": "one"}, claims))
            return signed + "." + _base64(hmac.digest(public, signed.encode(), "sha256"))
        if how == "client secret":
            key = OctKey.import_key(CLIENT_SECRET.encode())
            return jwt.encode({"alg": "HS256"}, claims, key, algorithms=["HS256"])
        if how == "published secret":  # a symmetric key among the provider's public ones
            return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SYMMETRIC), algorithms=["HS256"])
        if how == "another key":
            return jwt.encode({"alg": "RS256", "kid": "one"}, claims, other)
        if how == "its own key":
            header = {"alg": "RS256", "kid": "one", "jwk": other.as_dict(private=False)}
            return jwt.encode(header, claims, other)
        if how == "changed":
            head, _, signature = liar.signed(claims).split(".")
            changed = json.dumps({**claims, "groups": ["coordinators"]}).encode()
            return f"{head}.{_base64(changed)}.{signature}"
        if how == "unsigned end":
            return liar.signed(claims).rpartition(".")[0] + "."
        return how

    return sign


@pytest.mark.parametrize(
    "how",
    [
        *("none", "shared secret", "client secret", "published secret", "another key", "its own key", "changed"),
        *("unsigned end", "", "a.b.c", "a" * 10_000, "....", "\x00"),
    ],
    ids=lambda how: how[:20],
)
def test_a_forged_token_lets_nobody_in(liar: Liar, how: str) -> None:
    liar.sign = forged(liar, how)
    assert refusal(liar) == "OIDC-TOKEN"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({"state": "another"}, "OIDC-STATE"),
        ({"state": None}, "OIDC-STATE"),
        ({"state": "é"}, "OIDC-STATE"),
        ({"code": None}, "OIDC-DENIED"),
        ({"code": ""}, "OIDC-DENIED"),
        ({"error": "access_denied", "error_description": "<b>call us</b>"}, "OIDC-DENIED"),
        ({"iss": "https://evil.example"}, "OIDC-ISSUER"),
        ({"iss": ""}, "OIDC-ISSUER"),
    ],
)
def test_an_answer_that_was_not_asked_for(liar: Liar, answer: dict[str, Any], code: str) -> None:
    assert refusal(liar, **answer) == code
    assert not [path for path, *_ in liar.asked if path == "/token"], "no code is sent anywhere"


def test_a_promised_issuer_must_come(liar: Liar) -> None:
    """RFC 9207: leaving it out is how an answer is passed off as another provider's."""
    liar.papers = {"authorization_response_iss_parameter_supported": True}
    assert refusal(liar) == "OIDC-ISSUER"
    liar.claims = {}
    assert come_back(liar, iss=liar.issuer).role == AUDITOR


def test_an_answer_is_used_once(liar: Liar) -> None:
    clock = Clock()
    provider = Provider(settings(liar.issuer), clock=clock)
    asked = provider.begin(BACK)
    liar.claims = {"nonce": asked.nonce}
    answer = {"state": asked.state, "code": "c"}
    assert provider.finish(asked, answer, BACK).role
    sent = len(liar.asked)
    with pytest.raises(Refused, match="OIDC-STATE"):
        provider.finish(asked, answer, BACK)
    assert len(liar.asked) == sent


@pytest.mark.parametrize(
    "papers",
    [
        {"issuer": "https://evil.example"},
        {"issuer": None},
        {"token_endpoint": "http://192.0.2.1/token"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"authorization_endpoint": None},
        {"jwks_uri": "file:///etc/passwd"},
        {"token_endpoint": ["x"]},
    ],
    ids=str,
)
def test_a_description_that_names_others_is_not_used(liar: Liar, papers: dict[str, Any]) -> None:
    liar.papers = papers
    assert refusal(liar) == "OIDC-ISSUER"
    assert len(liar.asked) == 1, "nothing else was asked of anybody"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((400, b'{"error": "invalid_grant"}'), "OIDC-CODE"),
        ((500, b"{}"), "OIDC-PROVIDER"),
        ((302, b""), "OIDC-PROVIDER"),
        ((200, b"<html>"), "OIDC-PROVIDER"),
        ((200, b"[]"), "OIDC-PROVIDER"),
        ((200, b'{"a":' * 100_000), "OIDC-PROVIDER"),
        ((200, b'{"x": "' + b"a" * 2_000_000 + b'"}'), "OIDC-PROVIDER"),
        ((200, b"{}"), "OIDC-TOKEN"),
        ((200, b'{"id_token": 7}'), "OIDC-TOKEN"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_odd_answers_of_the_token_endpoint(liar: Liar, answer: tuple[int, bytes], code: str) -> None:
    liar.answer = answer
    assert refusal(liar) == code


def test_a_provider_that_is_away_is_left_alone_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), []
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening
        provider = Provider(settings(f"http://127.0.0.1:{nobody.getsockname()[1]}"), clock=clock)
        real = Provider._json
        monkeypatch.setattr(Provider, "_json", lambda *a, **k: (asked.append(1), real(*a, **k))[1])
        for _ in range(3):
            with pytest.raises(PeerUnreachable, match="OIDC-PROVIDER"):
                provider.begin(BACK)
        assert len(asked) == 1
        clock.pass_s(module.QUIET_S)
        with pytest.raises(PeerUnreachable):
            provider.begin(BACK)
        assert len(asked) == 2


def test_a_new_key_is_looked_for_once_a_minute(liar: Liar) -> None:
    clock = Clock()
    provider = Provider(settings(liar.issuer), clock=clock)
    old = liar.key
    assert come_back(liar, provider).role
    liar.key = RSAKey.generate_key(2048, {"kid": "two", "use": "sig"})
    try:
        liar.header = {"alg": "RS256", "kid": "two"}
        for _ in range(3):
            liar.claims.pop("nonce", None)
            assert refusal(liar, provider) == "OIDC-TOKEN"
        assert len([1 for path, *_ in liar.asked if path == "/jwks"]) == 1
        clock.pass_s(module.AGAIN_S)
        liar.claims.pop("nonce", None)
        assert come_back(liar, provider).role == AUDITOR
    finally:
        liar.key = old


# ---- who somebody is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "role", "site"),
    [
        (["reviewers"], AUDITOR, ""),
        (["reviewers", "coordinators", "north"], COORDINATOR, ""),
        (["north", "choir"], SITE, "site-1"),
        (["north", "south"], "", ""),
        (["north", "south", "reviewers"], AUDITOR, ""),
        ("coordinators", COORDINATOR, ""),
        (["Coordinators", "coordinators ", "coordinator"], "", ""),
        ([], "", ""),
        (None, "", ""),
        ([["coordinators"], {"coordinators": 1}, 7], "", ""),
        ({"coordinators": True}, "", ""),
    ],
    ids=str,
)
def test_the_claims_values_make_the_role(liar: Liar, groups: Any, role: str, site: str) -> None:
    liar.claims = {"groups": groups}
    found = come_back(liar)
    assert (found.role, found.site) == (role, site)


def test_a_claim_inside_others_is_named_by_its_path(liar: Liar) -> None:
    provider = Provider(settings(liar.issuer, claim="realm_access.roles"), clock=Clock())
    liar.claims = {"realm_access": {"roles": ["north"]}}
    assert come_back(liar, provider).site == "site-1"
    for odd in ({"realm_access": ["roles"]}, {"realm_access": {"roles": None}}, {}):
        liar.claims = odd
        assert come_back(liar, Provider(settings(liar.issuer, claim="realm_access.roles"), clock=Clock())).role == ""


@pytest.mark.parametrize(
    ("more", "claims", "fine"),
    [
        ({"acr": ("gold",)}, {"acr": "gold"}, True),
        ({"acr": ("gold",)}, {"acr": "bronze"}, False),
        ({"acr": ("gold",)}, {}, False),
        ({"acr": ("gold",)}, {"acr": ["gold"]}, False),
        ({"amr": ("otp", "pwd")}, {"amr": ["pwd", "otp", "mfa"]}, True),
        ({"amr": ("otp", "pwd")}, {"amr": ["pwd"]}, False),
        ({"amr": ("otp",)}, {}, False),
    ],
)
def test_a_second_factor_can_be_wanted(liar: Liar, more: dict[str, Any], claims: dict[str, Any], fine: bool) -> None:
    liar.claims = claims
    provider = Provider(settings(liar.issuer, **more), clock=Clock())
    if fine:
        assert come_back(liar, provider).role == AUDITOR
    else:
        assert refusal(liar, provider) == "OIDC-FACTOR"


# ---- through the console's pages, with the liar --------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bare(tmp_path_factory.mktemp("oidc"))


@pytest.fixture(scope="module")
def made(folder: Any, server: Liar) -> Iterator[tuple[Desk, Clock]]:
    clock = Clock()
    with desk_over(folder, Settings(oidc=settings(server.issuer)), clock=clock) as found:
        yield found, clock


@pytest.fixture
def desk(made: tuple[Desk, Clock]) -> Desk:
    found, clock = made
    clock.at = NOON
    for table in ("sessions", "browsers", "tries", "told", "accounts"):
        with found.accounts._store.write() as db:
            db.execute(f"DELETE FROM {table}")
    return found


def through(client: Any, liar: Liar, *, to: str = "/", **claims: Any) -> Any:
    """Off to the provider and back, as a browser does it."""
    away = client.get("/sign-in/oidc", params={"next": to})
    assert away.status_code == 303 and away.headers["location"].startswith(f"{liar.issuer}/auth?")
    query = {name: values[0] for name, values in parse_qs(urlsplit(away.headers["location"]).query).items()}
    liar.claims = {"nonce": query["nonce"], **claims}
    return client.get("/sign-in/oidc/back", params={"state": query["state"], "code": "c"})


def test_somebody_comes_in_and_goes_on_by_a_page_of_ours(desk: Desk, liar: Liar) -> None:
    client = visitor(desk)
    assert "your organisation" in client.get("/sign-in").text
    answer = through(client, liar, to="/account", preferred_username="Nora")
    assert (
        answer.status_code == 200
        and answer.headers["refresh"] == "0; url=/account"
        and 'href="/account"' in answer.text
    )
    assert "samesite=strict" in answer.headers["set-cookie"].lower()
    assert client.get("/account").status_code == 200 and "identity provider" in client.get("/account").text
    nora = desk.accounts.account("nora")
    assert nora is not None and not nora.local and nora.role == AUDITOR
    assert notes(desk, "sign-in")[-1]["how"] == "identity provider"


def test_the_cookie_of_the_way_is_lax_short_and_opens_nothing(desk: Desk, liar: Liar) -> None:
    client = visitor(desk)
    away = client.get("/sign-in/oidc")
    cookie = away.headers["set-cookie"]
    assert "SameSite=lax" in cookie and "HttpOnly" in cookie and "Max-Age=600" in cookie
    query = parse_qs(urlsplit(away.headers["location"]).query)
    for name in ("state", "nonce"):
        assert query[name][0] not in cookie, "sealed: whoever sees the cookie sees nothing"
    client.cookies.set("cohortium-session", client.cookies["cohortium-oidc"])
    assert client.get("/account").status_code == 303


@pytest.mark.parametrize("to", ["https://evil.example", "//evil.example", "/\\evil", "/a\r\nset-cookie: x=y"])
def test_the_way_back_leads_nowhere_else(desk: Desk, liar: Liar, to: str) -> None:
    answer = through(visitor(desk), liar, to=to)
    assert answer.headers["refresh"] == "0; url=/" and "evil" not in answer.text


def test_an_answer_without_a_beginning_in_this_browser_is_refused(desk: Desk, liar: Liar) -> None:
    """Login CSRF: an attacker's own answer, sent to somebody else."""
    attacker, victim = visitor(desk), visitor(desk)
    away = attacker.get("/sign-in/oidc")
    query = {name: values[0] for name, values in parse_qs(urlsplit(away.headers["location"]).query).items()}
    liar.claims = {"nonce": query["nonce"]}
    back = {"state": query["state"], "code": "c"}
    for cookie in (None, "made-up", visitor(desk).get("/sign-in").cookies["cohortium-form"]):
        if cookie is not None:
            victim.cookies.set("cohortium-oidc", cookie)
        answer = victim.get("/sign-in/oidc/back", params=back)
        assert answer.status_code == 409 and "OIDC-STATE" in answer.text
    victim.cookies.clear()
    victim.get("/sign-in/oidc")
    assert victim.get("/sign-in/oidc/back", params=back).status_code == 409, "it began another one"
    assert attacker.get("/sign-in/oidc/back", params=back).status_code == 200


def test_the_way_lapses(desk: Desk, liar: Liar, made: tuple[Desk, Clock]) -> None:
    client = visitor(desk)
    away = client.get("/sign-in/oidc")
    query = {name: values[0] for name, values in parse_qs(urlsplit(away.headers["location"]).query).items()}
    made[1].pass_s(601)
    answer = client.get("/sign-in/oidc/back", params={"state": query["state"], "code": "c"})
    assert answer.status_code == 409 and "OIDC-STATE" in answer.text


def test_the_role_is_read_anew_and_ends_with_the_group(desk: Desk, liar: Liar) -> None:
    client = visitor(desk)
    through(client, liar, groups=["coordinators"])
    assert client.get("/people").status_code == 200
    other = visitor(desk)
    through(other, liar, groups=["north"])
    assert other.get("/api/account").json()["site"] == "site-1"
    assert client.get("/people").status_code == 303, "sessions of the old role have ended"
    answer = through(visitor(desk), liar, groups=["choir"])
    assert answer.status_code == 409 and "OIDC-ROLE" in answer.text
    assert other.get("/account").status_code == 303, "and with no role, all of them"
    assert notes(desk, "sign-in-failed")[-1]["code"] == "OIDC-ROLE"


def test_whom_a_coordinator_shut_out_stays_out(desk: Desk, liar: Liar) -> None:
    desk.accounts.add("boss", role=COORDINATOR, password=None)
    through(visitor(desk), liar, preferred_username="nora")
    desk.accounts.close_account("nora")
    answer = through(visitor(desk), liar)
    assert answer.status_code == 409 and "ACCOUNT-CLOSED" in answer.text


def test_a_name_at_the_provider_is_no_account_here(desk: Desk, liar: Liar) -> None:
    """Somebody who calls himself anna there is not our anna."""
    desk.accounts.add("anna", role=COORDINATOR, password=None)
    client = visitor(desk)
    through(client, liar, preferred_username="anna")
    facts = client.get("/api/account").json()
    assert (facts["name"], facts["role"]) == ("anna-2", AUDITOR)


def test_answers_that_fail_are_counted(desk: Desk, liar: Liar) -> None:
    client = visitor(desk)
    statuses = [through(client, liar, nonce="wrong").status_code for _ in range(12)]
    assert statuses == [409] * 8 + [429] * 4
    sent = len(liar.asked)
    through(client, liar)
    assert not [1 for path, *_ in liar.asked[sent:] if path == "/token"]


def test_what_the_provider_wrote_is_not_repeated(desk: Desk, liar: Liar) -> None:
    client = visitor(desk)
    away = client.get("/sign-in/oidc")
    state = parse_qs(urlsplit(away.headers["location"]).query)["state"][0]
    words = {"state": state, "error": "access_denied", "error_description": "Call 555 and tell us your password"}
    answer = client.get("/sign-in/oidc/back", params=words)
    assert answer.status_code == 409 and "555" not in answer.text and "OIDC-DENIED" in answer.text


# ---- a certified provider, as a process of its own -----------------------------------------------------------


@pytest.fixture(scope="module")
def modules(pytestconfig: pytest.Config) -> Path:
    """node_modules of the lock file; installed once, by npm, into pytest's cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        assert not os.environ.get("CI"), "CI has node and npm"
        pytest.skip("needs node and npm")
    lock = (HERE / "package-lock.json").read_bytes()
    cached = Path(pytestconfig.cache.mkdir("oidc-provider")) / hashlib.sha256(lock).hexdigest()[:16]  # type: ignore[union-attr]
    if not (cached / "done").exists():
        fresh = cached.with_name(f"{cached.name}.{os.getpid()}")
        fresh.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, fresh)
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=fresh, check=True, capture_output=True
        )
        (fresh / "done").touch()
        shutil.rmtree(cached, ignore_errors=True)
        fresh.rename(cached)
    return cached


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def certified(modules: Path) -> Iterator[str]:
    """The address of a running provider with three people."""
    port = free_port()
    people: Mapping[str, Any] = {
        "carol": {"groups": ["coordinators"]},
        "nils": {"groups": ["north"]},
        "otto": {"groups": ["choir"]},
    }
    asked = {"port": port, "modules": str(modules), "client": CLIENT, "secret": "plain", "back": BACK, "people": people}
    child = subprocess.Popen(
        ["node", str(HERE / "provider.mjs"), json.dumps(asked)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait(10)


@pytest.fixture(scope="module")
def real(certified: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A console for it, with the clock of now."""
    oidc = settings(certified, client_secret="plain")
    with desk_over(bare(tmp_path_factory.mktemp("certified")), Settings(oidc=oidc)) as found:
        yield found


def at_provider(address: str, login: str) -> str:
    """What a person's browser does at the provider: sign in, agree; the address that it is sent back to."""
    with httpx.Client(follow_redirects=False, trust_env=False) as browser:
        answer = browser.get(address)
        for _ in range(12):
            if answer.status_code in (302, 303):
                address = urljoin(address, answer.headers["location"])
                if address.startswith(BACK):
                    return address
                answer = browser.get(address)
                continue
            form = re.search(r'<form[^>]*action="([^"]+)"', answer.text)
            prompt = re.search(r'name="prompt" value="([^"]+)"', answer.text)
            assert form is not None and prompt is not None, answer.text
            address = urljoin(address, form[1])
            answer = browser.post(address, data={"prompt": prompt[1], "login": login, "password": "any"})
    raise AssertionError("the provider did not send the browser back")


def test_a_certified_provider_signs_people_in(real: Desk, certified: str) -> None:
    for login, role, site in (("carol", COORDINATOR, ""), ("nils", SITE, "site-1")):
        client = visitor(real)
        away = client.get("/sign-in/oidc", params={"next": "/account"})
        back = at_provider(away.headers["location"], login)
        assert {"code", "state", "iss"} <= set(parse_qs(urlsplit(back).query)), "RFC 9207"
        answer = client.get(back.removeprefix(BASE))
        assert answer.status_code == 200 and answer.headers["refresh"] == "0; url=/account"
        facts = client.get("/api/account").json()
        assert (facts["name"], facts["role"], facts["site"]) == (login, role, site)


def test_a_certified_provider_and_somebody_without_a_role(real: Desk) -> None:
    client = visitor(real)
    away = client.get("/sign-in/oidc")
    answer = client.get(at_provider(away.headers["location"], "otto").removeprefix(BASE))
    assert answer.status_code == 409 and "OIDC-ROLE" in answer.text and real.accounts.account("otto") is None


def test_a_certified_provider_refuses_a_code_without_its_verifier_and_a_second_time(real: Desk, certified: str) -> None:
    """That PKCE and the single use of codes are really asked for, by somebody who did not write our half."""
    oidc = settings(certified, client_secret="plain")
    provider = Provider(oidc)
    asked = provider.begin(BACK)
    answer = {name: values[0] for name, values in parse_qs(urlsplit(at_provider(asked.address, "carol")).query).items()}
    stolen = Asked(address="", state=asked.state, nonce=asked.nonce, verifier="x" * 64)
    with pytest.raises(Refused, match="OIDC-CODE"):
        Provider(oidc).finish(stolen, answer, BACK)
    asked = provider.begin(BACK)
    answer = {name: values[0] for name, values in parse_qs(urlsplit(at_provider(asked.address, "carol")).query).items()}
    assert Provider(oidc).finish(asked, answer, BACK).role == COORDINATOR
    with pytest.raises(Refused, match="OIDC-CODE"):
        Provider(oidc).finish(asked, answer, BACK)  # another process: ours has forgotten, the provider has not


def test_a_certified_provider_knows_the_wrong_client_secret(certified: str) -> None:
    provider = Provider(settings(certified, client_secret="wrong"))
    asked = provider.begin(BACK)
    answer = {name: values[0] for name, values in parse_qs(urlsplit(at_provider(asked.address, "carol")).query).items()}
    with pytest.raises(Refused, match="OIDC-CODE"):
        provider.finish(asked, answer, BACK)


def test_a_certified_provider_says_no_to_another_way_back(certified: str) -> None:
    address = Provider(settings(certified, client_secret="plain")).begin("http://127.0.0.1:1/elsewhere").address
    answer = httpx.get(address, follow_redirects=False, trust_env=False)
    assert answer.status_code == 400 and "location" not in answer.headers

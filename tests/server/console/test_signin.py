"""Signing in step by step: what each page lets through, cookies, fixation, forged forms, guessing, what is noted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyotp
import pytest
from console_worlds import BASE, PASSWORD, act, bare, desk_over
from signing_in import (
    NOON,
    SECRET,
    Clock,
    app_of,
    code_of,
    fields,
    give_code,
    give_password,
    notes,
    person,
    quick,
    sign_in,
    signed_in,
    visitor,
)
from starlette.testclient import TestClient

from cohortium.common.errors import Refused
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.desk import Desk
from cohortium.server.console.settings import Settings
from cohortium.server.console.tries import LIMITS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bare(tmp_path_factory.mktemp("signin"))


@pytest.fixture(scope="module")
def made(folder: Any) -> Iterator[tuple[Desk, Clock]]:
    clock = Clock()
    with desk_over(folder, clock=clock) as found:
        quick(found.accounts)
        yield found, clock


@pytest.fixture
def clock(made: tuple[Desk, Clock]) -> Clock:
    return made[1]


@pytest.fixture
def desk(made: tuple[Desk, Clock]) -> Desk:
    """A desk with one coordinator, anna, who has a second factor; accounts and clock are as new in each test."""
    found, clock = made
    clock.at = NOON
    for table in ("sessions", "browsers", "tries", "told", "accounts"):
        with found.accounts._store.write() as db:
            db.execute(f"DELETE FROM {table}")
    person(found)
    return found


def noted(desk: Desk, about: str, since: int) -> list[dict[str, Any]]:
    return notes(desk, about)[since:]


# ---- the way in ----------------------------------------------------------------------------------------------


def test_password_then_code_then_where_one_wanted_to_go(desk: Desk) -> None:
    client = visitor(desk)
    first = give_password(client, to="/runs?x=1")
    assert first.headers["location"] == "/sign-in/code?next=%2Fruns%3Fx%3D1"
    assert client.get("/account").status_code == 303, "half way is nowhere"
    second = give_code(client, code_of(desk.clock), at=first.headers["location"])
    assert second.status_code == 303 and second.headers["location"] == "/runs?x=1"
    assert client.get("/account").status_code == 200
    assert client.get("/sign-in").headers["location"] == "/", "who is in goes on"


def test_names_are_taken_as_they_are_typed(desk: Desk) -> None:
    assert give_password(visitor(desk), " Anna ").status_code == 303


@pytest.mark.parametrize("to", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x"])
def test_the_way_in_leads_nowhere_else(desk: Desk, to: str) -> None:
    client = visitor(desk)
    page = client.get("/sign-in", params={"next": to})
    data = {**fields(page.text), "name": "anna", "password": PASSWORD, "next": to}
    first = client.post("/sign-in", data=data)
    assert first.headers["location"] == "/sign-in/code?next=%2F"
    page = client.get("/sign-in/code", params={"next": to})
    data = {**fields(page.text), "code": code_of(desk.clock), "next": to}
    assert client.post("/sign-in/code", data=data).headers["location"] == "/"


def test_enrolment_then_in(desk: Desk, clock: Clock) -> None:
    desk.accounts.add("eve", role=AUDITOR, password=PASSWORD)
    client = visitor(desk)
    first = give_password(client, "eve")
    assert first.headers["location"].startswith("/sign-in/enrol")
    assert client.get("/sign-in/code").headers["location"].startswith("/sign-in/enrol"), "no step is skipped"
    page = client.get("/sign-in/enrol")
    picture = re.search(r"<svg.*?</svg>", page.text, re.DOTALL)
    assert picture is not None and "style=" not in picture[0] and 'role="img"' in picture[0] and "<title>" in picture[0]
    shown = re.search(r"<code>([A-Z2-7 ]{39})</code>", page.text)
    assert shown is not None
    secret = shown[1].replace(" ", "")
    assert client.get("/sign-in/enrol").text.count(shown[1]) == 1, "the same key while it lasts"
    wrong = client.post("/sign-in/enrol", data={**fields(page.text), "code": "000000"})
    assert wrong.status_code == 401 and shown[1] in wrong.text
    own = pyotp.random_base32()
    sneaky = {**fields(page.text), "code": code_of(clock, own), "secret": own, "pending": own}
    assert client.post("/sign-in/enrol", data=sneaky).status_code == 401, "a browser does not choose the key"
    done = client.post("/sign-in/enrol", data={**fields(page.text), "code": code_of(clock, secret)})
    assert done.status_code == 303 and done.headers["location"] == "/" and client.get("/account").status_code == 200
    eve = desk.accounts.account("eve")
    assert eve is not None and eve.has_totp and notes(desk, "second-factor")[-1]["by"] == "eve"


def test_whoever_has_a_factor_is_never_offered_another(desk: Desk) -> None:
    client = visitor(desk)
    give_password(client)
    assert client.get("/sign-in/enrol").headers["location"].startswith("/sign-in/code")
    page = client.get("/sign-in/code")
    other = pyotp.random_base32()
    answer = client.post("/sign-in/enrol", data={**fields(page.text), "code": code_of(desk.clock, other)})
    assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in/code")
    assert client.get("/sign-in/password").headers["location"].startswith("/sign-in/code")
    answer = client.post("/sign-in/password", data={**fields(page.text), "new": "x" * 20, "again": "x" * 20})
    assert answer.headers["location"].startswith("/sign-in/code") and client.get("/account").status_code == 303


def test_a_one_time_password_opens_nothing_until_it_is_changed(desk: Desk, clock: Clock) -> None:
    boss = signed_in(desk, COORDINATOR)
    page = act(boss, "/people", name="zoe", role="auditor")
    shown = re.search(r"<code>([0-9a-f]{6}(?:-[0-9a-f]{6}){3})</code>", page.text)
    assert page.status_code == 200 and shown is not None and page.headers["cache-control"] == "no-store"
    assert shown[1] not in boss.get("/people").text, "shown once"
    client = visitor(desk)
    give_password(client, "zoe", shown[1])
    page = client.get("/sign-in/enrol")
    secret = re.search(r"<code>([A-Z2-7 ]{39})</code>", page.text)
    assert secret is not None
    data = {**fields(page.text), "code": code_of(clock, secret[1].replace(" ", ""))}
    answer = client.post("/sign-in/enrol", data=data)
    assert answer.headers["location"].startswith("/sign-in/password") and client.get("/account").status_code == 303
    page = client.get("/sign-in/password")
    for new, again in (("short", "short"), ("quiet heron nine", "quiet heron ten!"), (shown[1], shown[1])):
        wrong = client.post("/sign-in/password", data={**fields(page.text), "new": new, "again": again})
        assert wrong.status_code == 422 and client.get("/account").status_code == 303
    new = {"new": "quiet heron nine", "again": "quiet heron nine"}
    assert client.post("/sign-in/password", data={**fields(page.text), **new}).headers["location"] == "/"
    assert client.get("/account").status_code == 200
    assert desk.accounts.check_password("zoe", shown[1], address="192.0.2.1") is None


# ---- what does not get in ------------------------------------------------------------------------------------


def test_wrong_unknown_and_closed_look_alike(desk: Desk) -> None:
    desk.accounts.add("gone", role=AUDITOR, password=PASSWORD)
    desk.accounts.close_account("gone")
    answers = set()
    for name, password in (("anna", "wrong password"), ("nobody", PASSWORD), ("gone", PASSWORD), ("", "")):
        answer = give_password(visitor(desk), name, password)
        assert answer.status_code == 401 and "cohortium-session" not in answer.headers.get("set-cookie", "")
        answers.add(re.sub(r'value="[^"]*"', "", answer.text))
    assert len(answers) == 1


def test_a_form_without_its_token_or_with_anothers_is_refused(desk: Desk) -> None:
    """Login CSRF: nobody is signed in as somebody else by a form of another page."""
    mine, theirs = visitor(desk), visitor(desk)
    page, other = mine.get("/sign-in"), theirs.get("/sign-in")
    right = {"name": "anna", "password": PASSWORD}
    for csrf in ("", "x", "é", fields(other.text)["csrf"]):
        assert mine.post("/sign-in", data={**right, "csrf": csrf}).status_code == 403
    bare_client = visitor(desk)
    assert bare_client.post("/sign-in", data={**right, **fields(page.text)}).status_code == 403, "without the cookie"
    bare_client.cookies.set("cohortium-form", "made-up")
    assert bare_client.post("/sign-in", data={**right, **fields(page.text)}).status_code == 403
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert mine.post("/sign-in", data={**right, **fields(page.text)}, headers=headers).status_code == 403
    assert mine.post("/sign-in", data={**right, **fields(page.text)}).status_code == 303


def test_the_token_of_the_form_lapses(desk: Desk, clock: Clock) -> None:
    client = visitor(desk)
    page = client.get("/sign-in")
    clock.pass_s(3601)
    data = {**fields(page.text), "name": "anna", "password": PASSWORD}
    assert client.post("/sign-in", data=data).status_code == 403
    assert give_password(client).status_code == 303, "a page that is loaded again has a new one"


@pytest.mark.parametrize("path", ["/sign-in/code", "/sign-in/enrol", "/sign-in/password"])
def test_steps_want_their_sessions_token(desk: Desk, path: str) -> None:
    client, other = visitor(desk), visitor(desk)
    assert client.get(path).status_code == 303 and client.post(path).status_code == 401
    give_password(client)
    give_password(other)
    foreign = fields(other.get("/sign-in/code").text)["csrf"]
    for csrf in ("", "x", foreign):
        assert client.post(path, data={"csrf": csrf, "code": code_of(desk.clock)}).status_code == 403
    assert client.get("/account").status_code == 303


def test_a_token_from_outside_is_never_made_a_session(desk: Desk) -> None:
    """Session fixation: what a browser brought is worth nothing after a step, whoever planted it."""
    attacker = visitor(desk)
    give_password(attacker)  # a session half way that the attacker knows
    planted = attacker.cookies["cohortium-session"]
    victim = visitor(desk)
    victim.cookies.set("cohortium-session", planted)
    tokens = [planted]
    first = give_password(victim)
    tokens.append(re.search("cohortium-session=([^;]+)", first.headers["set-cookie"])[1])  # type: ignore[index]
    victim.cookies.clear()
    victim.cookies.set("cohortium-session", tokens[-1])
    second = give_code(victim, code_of(desk.clock))
    tokens.append(re.search("cohortium-session=([^;]+)", second.headers["set-cookie"])[1])  # type: ignore[index]
    assert len(set(tokens)) == 3
    last = desk.accounts.session(tokens[-1])
    assert last is not None and last.complete
    assert [desk.accounts.session(token) for token in tokens[:2]] == [None, None], "each step ends the one before"


def test_a_code_is_good_once(desk: Desk, clock: Clock) -> None:
    one, other = visitor(desk), visitor(desk)
    give_password(one)
    give_password(other)
    code = code_of(clock)
    assert give_code(one, code).status_code == 303
    assert give_code(other, code).status_code == 401, "somebody looked over the shoulder"


def test_guessing_ends_and_the_owner_still_gets_in(desk: Desk) -> None:
    owner = sign_in(desk)
    attacker = TestClient(app_of(desk), base_url=BASE, follow_redirects=False, client=("203.0.113.9", 1))
    statuses = [give_password(attacker, "anna", f"wrong password {n}").status_code for n in range(20)]
    most = LIMITS["from"][1]
    assert statuses == [401] * most + [429] * (20 - most)
    told = give_password(attacker, "anna", PASSWORD)
    assert told.status_code == 429 and "SIGN-IN-WAIT" in told.text, "not even with the right one"
    owner.cookies.delete("cohortium-session")
    assert give_password(owner).status_code == 303


def test_guessed_codes_end(desk: Desk, clock: Clock) -> None:
    client = sign_in(desk)  # a known browser: what stops it is its own limit
    client.cookies.delete("cohortium-session")
    clock.pass_s(120)
    give_password(client)
    statuses = [give_code(client, "000000").status_code for _ in range(12)]
    assert statuses == [401] * LIMITS["browser"][1] + [429] * (12 - LIMITS["browser"][1])


# ---- cookies and time ----------------------------------------------------------------------------------------


def cookies(answer: Any) -> dict[str, str]:
    """name -> attributes, in small letters."""
    found = answer.headers.get_list("set-cookie")
    return {cookie.partition("=")[0]: cookie.partition(";")[2].lower() for cookie in found}


def test_cookies_in_the_clear_on_this_machine(desk: Desk) -> None:
    client = visitor(desk)
    form = cookies(client.get("/sign-in"))["cohortium-form"]
    session = cookies(give_password(client))["cohortium-session"]
    for found in (form, session):
        assert "httponly" in found and "samesite=strict" in found and "path=/" in found and "domain" not in found
    assert "max-age" not in session, "it goes with the window"


def test_cookies_over_tls_are_bound_to_it(folder: Any, clock: Clock, desk: Desk) -> None:
    settings = Settings(behind_tls=True, names=("console.example.org",))
    with desk_over(folder_without_journal(folder), settings, clock=clock) as safe:
        quick(safe.accounts)
        person(safe)
        client = TestClient(app_of(safe), base_url="https://console.example.org", follow_redirects=False)
        client.headers["accept"] = "text/html"
        first = client.get("/sign-in")
        assert "max-age=31536000" in first.headers["strict-transport-security"]
        second = give_password(client)
        third = give_code(client, code_of(clock))
        seen = {**cookies(first), **cookies(second), **cookies(third)}
        for name in ("__Host-cohortium-form", "__Host-cohortium-session", "__Host-cohortium-browser"):
            assert {"secure", "httponly", "path=/"} <= {part.strip() for part in seen[name].split(";")}
            assert "domain" not in seen[name]
        assert all(name.startswith("__Host-") for name in seen)
        plain = client.get(
            "/account", headers={"cookie": f"cohortium-session={client.cookies['__Host-cohortium-session']}"}
        )
        assert plain.status_code in (200, 303)


def folder_without_journal(made: Any) -> Any:
    """The same consortium under another folder: one process has a journal open once."""
    import shutil

    from cohortium.server.consortium import Consortium

    to = Path(f"{made.root}-tls")
    if not to.exists():
        shutil.copytree(made.root, to, ignore=shutil.ignore_patterns("console", "*.lock"))
    return Consortium(to)


def test_a_session_ends_idle_and_at_last_and_that_is_noted(desk: Desk, clock: Clock) -> None:
    before = len(notes(desk, "session-expired"))
    client = sign_in(desk)
    clock.pass_s(desk.accounts.idle_s + 1)
    assert client.get("/account").status_code == 303
    assert noted(desk, "session-expired", before) == [{"by": "anna", "why": "idle"}]
    client = sign_in(desk)
    began = clock.at
    while client.get("/account").status_code == 200:
        clock.pass_s(1800)
    assert clock.at - began <= desk.accounts.session_s + 1800
    assert noted(desk, "session-expired", before)[1:] == [{"by": "anna", "why": "age"}]


def test_the_account_page_tells_how_long_it_lasts(desk: Desk, clock: Clock) -> None:
    client = sign_in(desk)
    facts = client.get("/api/account").json()
    assert facts["until"] == clock.at + desk.accounts.idle_s and facts["session_hours"] == 12
    assert "60 min without use" in client.get("/account").text


def test_a_closed_account_is_out_with_its_next_request(desk: Desk) -> None:
    person(desk, "eve", role=AUDITOR)
    boss, client = sign_in(desk), sign_in(desk, name="eve")
    boss.csrf = fields(boss.get("/account").text)["csrf"]  # type: ignore[attr-defined]
    assert client.get("/account").status_code == 200
    assert act(boss, "/people/eve/close").headers["location"] == "/people?did=account-closed"
    assert client.get("/account").status_code == 303
    assert give_password(visitor(desk), "eve").status_code == 401


# ---- out, and one's own account ------------------------------------------------------------------------------


def test_sign_out_ends_the_session_and_wants_its_token(desk: Desk) -> None:
    client = sign_in(desk)
    token = client.cookies["cohortium-session"]
    assert client.get("/sign-out").status_code == 405, "no link and no picture signs anybody out"
    assert client.post("/sign-out").status_code == 403
    answer = client.post("/sign-out", data={"csrf": fields(client.get("/account").text)["csrf"]})
    assert answer.status_code == 303 and "cohortium-session" not in client.cookies
    assert desk.accounts.session(token) is None
    assert notes(desk, "sign-out")[-1] == {"by": "anna"}


def test_a_new_password_keeps_this_window_and_ends_the_others(desk: Desk, clock: Clock) -> None:
    one = sign_in(desk)
    clock.pass_s(60)
    other = sign_in(desk)
    old = one.cookies["cohortium-session"]
    form = {"csrf": fields(one.get("/account").text)["csrf"], "new": "quiet heron nine", "again": "quiet heron nine"}
    wrong = one.post("/account/password", data={**form, "password": "not that one"})
    assert wrong.status_code == 422 and other.get("/account").status_code == 200
    done = one.post("/account/password", data={**form, "password": PASSWORD})
    assert done.headers["location"] == "/account?did=password"
    assert one.get("/account").status_code == 200 and one.cookies["cohortium-session"] != old
    assert other.get("/account").status_code == 303 and desk.accounts.session(old) is None
    assert give_password(visitor(desk), "anna", PASSWORD).status_code == 401


def test_out_everywhere(desk: Desk, clock: Clock) -> None:
    one = sign_in(desk)
    clock.pass_s(60)
    other = sign_in(desk)
    assert len(one.get("/api/account").json()["sessions"]) == 2
    one.post("/account/everywhere", data={"csrf": fields(one.get("/account").text)["csrf"]})
    assert one.get("/account").status_code == other.get("/account").status_code == 303


# ---- people --------------------------------------------------------------------------------------------------


def test_actions_on_people_are_recorded_with_their_reason(desk: Desk) -> None:
    boss = signed_in(desk, COORDINATOR, name="boss")
    start = len(desk.journal.lines())
    act(boss, "/people", name="mia", role="site", site="site-1", reason="our colleague there")
    act(boss, "/people/mia/second-factor", reason="lost her telephone")
    page = act(boss, "/people/mia/password", reason="forgot it")
    assert "one-time password of <strong>mia" in page.text
    assert act(boss, "/people/mia/close", reason="moved on").status_code == 303
    bodies = [line.body for line in desk.journal.lines()[start:]]
    asked = [(b["fields"]["action"], b["fields"]["on"], b["fields"]["reason"]) for b in bodies if b["about"] == "asked"]
    assert asked == [
        ("account-add", "mia", "our colleague there"),
        ("account-second-factor", "mia", "lost her telephone"),
        ("account-password", "mia", "forgot it"),
        ("account-close", "mia", "moved on"),
    ]
    assert [b["about"] for b in bodies] == ["asked", "done"] * 4
    text = str(bodies)
    assert PASSWORD not in text and not re.search(r"[0-9a-f]{6}(-[0-9a-f]{6}){3}", text), "no password in the record"


@pytest.mark.parametrize(
    ("fields_", "code"),
    [
        ({"name": "Bad Name", "role": "auditor"}, "ACCOUNT-NAME"),
        ({"name": "<script>", "role": "auditor"}, "ACCOUNT-NAME"),
        ({"name": "new", "role": "root"}, "ACCOUNT-ROLE"),
        ({"name": "new", "role": "site", "site": ""}, "ACCOUNT-ROLE"),
        ({"name": "new", "role": "site", "site": "elsewhere"}, "MEMBER-UNKNOWN"),
        ({"name": "anna", "role": "auditor"}, "ACCOUNT-EXISTS"),
        ({"name": "new", "role": "auditor", "confirm": "no"}, "ACTION-CONFIRM"),
        ({"name": "new", "role": "auditor", "reason": ""}, "ACTION-REASON"),
    ],
)
def test_people_who_cannot_be_added(desk: Desk, fields_: dict[str, str], code: str) -> None:
    boss = signed_in(desk, COORDINATOR)
    answer = act(boss, "/people", **fields_)
    assert answer.status_code in (404, 409, 422) and code in answer.text
    assert "<script>" not in answer.text and desk.accounts.account("new") is None


def test_an_auditor_sees_people_and_can_do_nothing(desk: Desk) -> None:
    client = signed_in(desk, AUDITOR)
    page = client.get("/people")
    assert page.status_code == 200 and "anna" in page.text and 'action="/people' not in page.text
    assert act(client, "/people", name="new", role="coordinator").status_code == 403
    member = signed_in(desk, SITE, site="site-1")
    assert member.get("/people").status_code == member.get("/api/people").status_code == 403
    assert "/people" not in member.get("/account").text


def test_no_secret_is_in_what_people_lists(desk: Desk) -> None:
    client = signed_in(desk, COORDINATOR)
    told = client.get("/api/people").text + client.get("/people").text
    assert SECRET not in told and "$argon2" not in told


def test_the_only_coordinator_cannot_close_herself(desk: Desk) -> None:
    client = sign_in(desk)
    client.csrf = fields(client.get("/account").text)["csrf"]  # type: ignore[attr-defined]
    answer = act(client, "/people/anna/close")
    assert answer.status_code == 409 and "ACCOUNT-LAST" in answer.text and client.get("/account").status_code == 200


# ---- what is noted -------------------------------------------------------------------------------------------


def test_sign_ins_and_failures_are_noted_without_what_was_typed(desk: Desk, clock: Clock) -> None:
    before = len(desk.journal.lines())
    typed = "my-password-in-the-name-field"
    give_password(visitor(desk), typed, "anna")
    give_password(visitor(desk), "anna", "nearly my password")
    client = visitor(desk)
    give_password(client)
    give_code(client, "123321")
    clock.pass_s(30)
    give_code(client, code_of(clock))
    bodies = [line.body for line in desk.journal.lines()[before:]]
    told = [(b["about"], b["fields"]["by"], b["fields"].get("step", "")) for b in bodies]
    assert told == [
        ("sign-in-failed", "", "password"),
        ("sign-in-failed", "anna", "password"),
        ("sign-in-failed", "anna", "code"),
        ("sign-in", "anna", ""),
    ]
    for secret in (typed, "nearly", "123321", client.cookies["cohortium-session"]):
        assert secret not in str(bodies)


def test_what_the_command_line_did_is_noted_by_the_console(desk: Desk) -> None:
    desk.accounts.tell("command", by="shell:root", action="account-close", on="eve")
    visitor(desk).get("/sign-in")
    assert notes(desk, "command")[-1] == {"by": "shell:root", "action": "account-close", "on": "eve"}


# ---- pages ---------------------------------------------------------------------------------------------------


def test_a_link_from_elsewhere_is_asked_again_from_our_own_page(desk: Desk) -> None:
    """A Strict cookie does not come with a click in a mail: without this, whoever is signed in seems not to be."""
    client = sign_in(desk)
    token = client.cookies["cohortium-session"]
    client.cookies.delete("cohortium-session")
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    page = client.get("/sign-in?next=%2Faccount", headers=headers)
    assert page.status_code == 200 and page.headers["refresh"] == "0; url=/sign-in?next=%2Faccount"
    client.cookies.set("cohortium-session", token)
    assert client.get("/sign-in?next=%2Faccount").headers["location"] == "/account"


def test_an_empty_console_tells_the_first_step(folder: Any, tmp_path: Path) -> None:
    with desk_over(folder_without_journal(folder)) as empty:
        for account in empty.accounts.accounts():
            with empty.accounts._store.write() as db:
                db.execute("DELETE FROM accounts WHERE name = ?", (account.name,))
        page = visitor(empty).get("/sign-in")
        assert "cohortium console user add" in page.text and str(empty.consortium.root) in page.text


def test_pages_have_no_inline_script_style_or_handler(desk: Desk) -> None:
    client = signed_in(desk, COORDINATOR)
    pages = [client.get(path).text for path in ("/account", "/people")]
    fresh = visitor(desk)
    pages.append(fresh.get("/sign-in").text)
    give_password(fresh)
    pages.append(fresh.get("/sign-in/code").text)
    for page in pages:
        assert not re.search(r"<script(?! src=)|<style|\sstyle=|\son[a-z]+=", page)
        assert page.count("<h1") == 1 and "http://" not in page.replace("http://www.w3.org", "")


def test_without_a_provider_its_paths_are_not_there(desk: Desk) -> None:
    client = visitor(desk)
    assert client.get("/sign-in/oidc").status_code == 404 and client.get("/sign-in/oidc/back").status_code == 404


def test_a_journal_that_cannot_be_written_lets_nobody_in(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    client = visitor(desk)
    give_password(client)

    def full(*_: Any, **__: Any) -> int:
        raise Refused("LEDGER-DISK", "the disk is full")

    monkeypatch.setattr(desk.journal, "note", full)
    answer = give_code(client, code_of(desk.clock))
    assert answer.status_code == 409 and "set-cookie" not in answer.headers

"""Accounts: what is kept, how tries are counted, when a session ends, and that a step is never skipped."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyotp
import pytest
from signing_in import SECRET, Clock, code_of, quick

from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.server.console.accounts import (
    AUDITOR,
    COORDINATOR,
    HALF_WAY_S,
    ONE_TIME_S,
    SITE,
    Accounts,
)
from cohortium.server.console.passwords import NOBODY, one_time_password
from cohortium.server.console.store import someone_may_sign_in
from cohortium.server.console.tries import LIMITS, Tries, place

PASSWORD = "seven quiet herons"
HOME = "192.0.2.1"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(tmp_path: Path, clock: Clock) -> Iterator[Accounts]:
    made = quick(Accounts(tmp_path / "console" / "accounts.db", clock=clock))
    made.add("anna", role=COORDINATOR, password=PASSWORD)
    yield made
    made.close()


def code(error: Any) -> str:
    assert isinstance(error.value, CohortiumError)
    return error.value.code


def enrol(accounts: Accounts, name: str = "anna") -> None:
    assert accounts.enrol_totp(name, SECRET, code_of(accounts._clock))


# ---- what is kept --------------------------------------------------------------------------------------------


def test_the_file_is_closed_and_holds_no_password_and_no_token(accounts: Accounts, tmp_path: Path) -> None:
    token, browser = accounts.begin("anna", complete=True), accounts.remember("anna")
    accounts.check_password("correct horse, in the name's field", "x", address=HOME)
    path = tmp_path / "console" / "accounts.db"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    for secret in (PASSWORD, token, browser, "in the name's field"):
        assert secret.encode() not in kept


def test_production_hashes_are_argon2id_with_64_mib(tmp_path: Path) -> None:
    made = Accounts(tmp_path / "console" / "accounts.db")
    made.add("anna", role=COORDINATOR, password=PASSWORD)
    (hashed,) = made._store.one("SELECT password FROM accounts", ())
    assert hashed.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert len(NOBODY) == len(hashed) and NOBODY[:31] == hashed[:31] and not made._hasher.check_needs_rehash(NOBODY)
    assert made.check_password("anna", PASSWORD, address=HOME) is not None
    made.close()


def test_serve_learns_of_the_first_open_account(tmp_path: Path) -> None:
    folder = tmp_path / "console"
    assert not someone_may_sign_in(folder)
    made = quick(Accounts(folder / "accounts.db"))
    assert not someone_may_sign_in(folder)
    made.add("eve", role=AUDITOR, password=PASSWORD)
    assert someone_may_sign_in(folder)
    made.close_account("eve")
    assert not someone_may_sign_in(folder)
    made.add("anna", role=AUDITOR, password=PASSWORD)
    made.close()
    assert someone_may_sign_in(folder), "also while nobody has the file open"
    (folder / "accounts.db").write_bytes(b"not a database, but long enough to be looked at as one" * 20)
    assert not someone_may_sign_in(folder)


@pytest.mark.parametrize("name", ["", "Anna", "-a", "a b", "a/b", "a" * 65, "ä", "a\n", "<b>"])
def test_names_are_plain(accounts: Accounts, name: str) -> None:
    with pytest.raises(UsageError) as error:
        accounts.add(name, role=COORDINATOR, password=PASSWORD)
    assert code(error) == "ACCOUNT-NAME"


@pytest.mark.parametrize(("role", "site"), [("root", ""), (SITE, ""), (COORDINATOR, "site-1"), (AUDITOR, "site-1")])
def test_roles_and_sites_fit_each_other(accounts: Accounts, role: str, site: str) -> None:
    for call in (
        lambda: accounts.add("eve", role=role, password=PASSWORD, site=site),
        lambda: accounts.set_role("anna", role, site),
        lambda: accounts.admit(issuer="i", subject="s", wish="eve", role=role, site=site),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert code(error) == "ACCOUNT-ROLE"


@pytest.mark.parametrize(
    "password", ["", "short", "x" * 201, "aaaaaaaaaaaaaaa", "abababababab", "anna12345678", "ANNA-anna-anna-anna"]
)
def test_easy_passwords_are_refused(accounts: Accounts, password: str) -> None:
    with pytest.raises(UsageError) as error:
        accounts.set_password("anna", password)
    assert code(error) == "ACCOUNT-PASSWORD"
    assert accounts.check_password("anna", PASSWORD, address=HOME) is not None, "the old one still holds"


def test_one_time_passwords_pass_their_own_rules_and_differ(accounts: Accounts) -> None:
    drawn = {one_time_password() for _ in range(50)}
    assert len(drawn) == 50
    for number, password in enumerate(drawn):
        accounts.add(f"p{number}", role=AUDITOR, password=password)


# ---- passwords -----------------------------------------------------------------------------------------------


def test_wrong_unknown_closed_and_without_password_look_alike_and_cost_one_hash_each(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: each try computes exactly one hash, so that an unknown name is as slow as a known one."""
    accounts.add("gone", role=AUDITOR, password=PASSWORD)
    accounts.close_account("gone")
    accounts.admit(issuer="https://i.example", subject="1", wish="oidc", role=AUDITOR, site="")
    accounts.add("late", role=AUDITOR, password=PASSWORD, one_time=True)
    calls: list[str] = []

    class Counting:
        def verify(self, hashed: str, password: str) -> bool:
            calls.append(password)
            return real.verify(hashed, password)

    real = accounts._hasher
    monkeypatch.setattr(accounts, "_hasher", Counting())
    accounts._clock.pass_s(ONE_TIME_S + 1)  # type: ignore[attr-defined]
    tries = [("anna", "wrong password!"), ("nobody", PASSWORD), ("gone", PASSWORD), ("oidc", PASSWORD), ("oidc", "")]
    for number, (name, password) in enumerate([*tries, ("late", PASSWORD), ("anna", PASSWORD + "x" * 300)]):
        assert accounts.check_password(name, password, address=f"192.0.2.{number}") is None
        assert len(calls) == number + 1
    assert accounts.check_password("anna", PASSWORD, address=HOME) is not None and len(calls) == 8


def test_what_comes_after_the_longest_password_counts(accounts: Accounts) -> None:
    longest = ("seven quiet herons " * 11)[:200]
    accounts.set_password("anna", longest)
    assert accounts.check_password("anna", longest, address=HOME) is not None
    assert accounts.check_password("anna", longest + "x", address=HOME) is None


def test_a_new_password_ends_sessions_and_forgets_wrong_tries(accounts: Accounts) -> None:
    token = accounts.begin("anna", complete=True)
    for number in range(LIMITS["name"][1]):
        accounts.check_password("anna", "wrong", address=f"192.0.2.{number}")
    with pytest.raises(Refused) as error:
        accounts.check_password("anna", PASSWORD, address="198.51.100.1")
    assert code(error) == "SIGN-IN-WAIT"
    accounts.set_password("anna", "another quiet heron")
    assert accounts.session(token) is None
    assert accounts.check_password("anna", "another quiet heron", address="198.51.100.1") is not None


def test_a_one_time_password_has_to_be_changed_and_lapses(accounts: Accounts, clock: Clock) -> None:
    accounts.add("eve", role=AUDITOR, password=PASSWORD, one_time=True)
    found = accounts.check_password("eve", PASSWORD, address=HOME)
    assert found is not None and found.must_change
    clock.pass_s(ONE_TIME_S + 1)
    assert accounts.check_password("eve", PASSWORD, address=HOME) is None
    accounts.set_password("eve", "my own quiet heron")
    clock.pass_s(10 * ONE_TIME_S)
    found = accounts.check_password("eve", "my own quiet heron", address=HOME)
    assert found is not None and not found.must_change


# ---- tries ---------------------------------------------------------------------------------------------------


def guess(accounts: Accounts, name: str, address: str, **more: Any) -> bool:
    """False where one has to wait."""
    try:
        accounts.check_password(name, "wrong password", address=address, **more)
    except Refused:
        return False
    return True


def test_one_address_is_stopped_before_any_name(accounts: Accounts) -> None:
    most = LIMITS["from"][1]
    assert sum(guess(accounts, "anna", "203.0.113.9") for _ in range(100)) == most
    assert not guess(accounts, "another", "203.0.113.9"), "whatever name it goes on with"
    assert accounts.check_password("anna", PASSWORD, address=HOME) is not None, "its owner is not shut out by it"


def test_even_the_right_password_waits(accounts: Accounts) -> None:
    while guess(accounts, "anna", HOME):
        pass
    with pytest.raises(Refused) as error:
        accounts.check_password("anna", PASSWORD, address=HOME)
    assert code(error) == "SIGN-IN-WAIT"


def test_many_addresses_shut_out_strange_browsers_only(accounts: Accounts, clock: Clock) -> None:
    """Nobody can lock a coordinator out for ever from elsewhere: the browser she uses is counted by itself."""
    browser = accounts.remember("anna")
    accounts.add("eve", role=AUDITOR, password=PASSWORD)
    for number in range(100):
        guess(accounts, "anna", f"203.0.113.{number}")
    assert not guess(accounts, "anna", HOME)
    assert accounts.check_password("anna", PASSWORD, address=HOME, browser=browser) is not None
    assert not guess(accounts, "anna", HOME, browser="made up"), "a token that nobody gave changes nothing"
    assert sum(guess(accounts, "anna", "203.0.113.200", browser=browser) for _ in range(50)) == LIMITS["browser"][1]
    while guess(accounts, "eve", HOME, browser=browser):
        pass
    assert not guess(accounts, "another", HOME), "a known browser of somebody else is a strange one: its address counts"
    clock.pass_s(LIMITS["name"][0] + 1)
    assert accounts.check_password("anna", PASSWORD, address=HOME) is not None, "nothing is for ever"


def test_a_name_that_nobody_has_waits_just_as_long(accounts: Accounts) -> None:
    for name in ("anna", "nobody"):
        count = sum(guess(accounts, name, f"203.0.113.{n}" if name == "anna" else f"198.51.100.{n}") for n in range(50))
        assert count == LIMITS["name"][1]


def test_the_limits_stand_in_the_order_that_they_promise() -> None:
    assert LIMITS["from"][1] * 2 < LIMITS["name"][1], "one address never reaches the limit of a name"


def test_a_right_try_is_forgiven(accounts: Accounts) -> None:
    for _ in range(5 * LIMITS["from"][1]):
        assert accounts.check_password("anna", PASSWORD, address=HOME) is not None


def test_tries_at_the_same_time_are_counted_before_they_are_looked_at(accounts: Accounts) -> None:
    """Forty tries at once get no more looks than forty one after the other."""
    looked: list[int] = []
    start = threading.Barrier(40)

    def attack() -> None:
        start.wait()
        looked.append(guess(accounts, "anna", "203.0.113.9"))

    threads = [threading.Thread(target=attack) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(looked) == LIMITS["from"][1]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("a made-up header", "another", True),
        ("", "unix", True),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (place(one) == place(other)) is same


def test_old_tries_are_swept_away(accounts: Accounts, clock: Clock) -> None:
    guess(accounts, "anna", HOME)
    clock.pass_s(max(window for window, _ in LIMITS.values()) + 1)
    Tries(accounts._store, clock).reserve(("from", HOME))
    assert accounts._store.one("SELECT count(*) FROM tries", ()) == (1,)


# ---- the second factor ---------------------------------------------------------------------------------------


def test_a_code_is_good_once_and_beside_its_time_step(accounts: Accounts, clock: Clock) -> None:
    enrol(accounts)
    assert not accounts.check_code("anna", code_of(clock), address=HOME), "used at enrolment"
    clock.pass_s(60)
    before = pyotp.TOTP(SECRET).at(int(clock()) - 30)
    assert accounts.check_code("anna", before[:3] + " " + before[3:], address=HOME), "a slow hand"
    assert not accounts.check_code("anna", before, address=HOME)
    assert accounts.check_code("anna", pyotp.TOTP(SECRET).at(int(clock()) + 30), address=HOME), "a fast clock"
    assert not accounts.check_code("anna", code_of(clock), address=HOME), "an older one than the last"
    clock.pass_s(300)
    for wrong in ("", "0", "abcdef", "١٢٣٤٥٦", "\ud800", pyotp.TOTP(SECRET).at(int(clock()) + 90)):
        assert not accounts.check_code("anna", wrong, address="198.51.100.3")


def test_codes_are_counted_for_a_day_wherever_they_come_from(accounts: Accounts, clock: Clock) -> None:
    enrol(accounts)
    clock.pass_s(60)
    for number in range(LIMITS["code"][1]):
        assert not accounts.check_code("anna", "000000", address=f"192.0.2.{number}")
    clock.pass_s(3600)
    with pytest.raises(Refused) as error:
        accounts.check_code("anna", code_of(clock), address="198.51.100.1")
    assert code(error) == "SIGN-IN-WAIT"
    clock.pass_s(86_400)
    assert accounts.check_code("anna", code_of(clock), address="198.51.100.1")


def test_an_enrolled_factor_is_not_replaced_by_enrolling_another(accounts: Accounts, clock: Clock) -> None:
    enrol(accounts)
    other = pyotp.random_base32()
    assert not accounts.enrol_totp("anna", other, code_of(clock, other))
    clock.pass_s(60)
    assert accounts.check_code("anna", code_of(clock), address=HOME)
    accounts.drop_totp("anna")
    assert not accounts.check_code("anna", code_of(clock), address=HOME), "no factor, no code"
    assert accounts.enrol_totp("anna", other, code_of(clock, other))


def test_an_account_of_a_provider_has_neither_password_nor_factor(accounts: Accounts, clock: Clock) -> None:
    found = accounts.admit(issuer="https://i.example", subject="1", wish="eve", role=AUDITOR, site="")
    assert not accounts.enrol_totp(found.name, SECRET, code_of(clock))
    for call in (lambda: accounts.set_password("eve", PASSWORD), lambda: accounts.drop_totp("eve")):
        with pytest.raises(Refused):
            call()


# ---- sessions ------------------------------------------------------------------------------------------------


def test_each_step_is_a_session_of_its_own_and_ends_the_one_before(accounts: Accounts) -> None:
    first = accounts.begin("anna", complete=False)
    second = accounts.begin("anna", complete=True, instead_of=first)
    half = accounts.session(second)
    assert first != second and accounts.session(first) is None and half is not None and half.complete
    assert accounts.session("") is None and accounts.session(second + "x") is None and accounts.session("é") is None


def test_a_session_ends_when_idle_and_when_old(accounts: Accounts, clock: Clock) -> None:
    token = accounts.begin("anna", complete=True)
    for _ in range(13):
        clock.pass_s(accounts.idle_s - 1)
        found = accounts.session(token)
        if found is None:
            break
        assert found.until <= found.began + accounts.session_s
    assert accounts.session(token) is None and clock.at - 1_790_000_000 > accounts.session_s - accounts.idle_s
    token = accounts.begin("anna", complete=True)
    clock.pass_s(accounts.idle_s + 1)
    assert accounts.session(token) is None


def test_what_a_page_asks_by_itself_does_not_keep_a_session_awake(accounts: Accounts, clock: Clock) -> None:
    token = accounts.begin("anna", complete=True)
    for _ in range(4):
        assert accounts.session(token, awake=False) is not None
        clock.pass_s(accounts.idle_s // 3)
    assert accounts.session(token) is None


def test_a_sign_in_half_way_does_not_last(accounts: Accounts, clock: Clock) -> None:
    token = accounts.begin("anna", complete=False)
    clock.pass_s(HALF_WAY_S + 1)
    assert accounts.session(token) is None


@pytest.mark.parametrize("how", ["close", "password", "totp", "role", "everywhere"])
def test_sessions_end_with_what_they_stood_on(accounts: Accounts, how: str) -> None:
    accounts.add("eve", role=COORDINATOR, password=PASSWORD)
    token, other = accounts.begin("eve", complete=True), accounts.begin("anna", complete=True)
    {
        "close": lambda: accounts.close_account("eve"),
        "password": lambda: accounts.set_password("eve", "another quiet heron"),
        "totp": lambda: accounts.drop_totp("eve"),
        "role": lambda: accounts.set_role("eve", AUDITOR),
        "everywhere": lambda: accounts.end_all("eve"),
    }[how]()
    assert accounts.session(token) is None and accounts.session(other) is not None


def test_the_last_coordinator_is_not_closed(accounts: Accounts) -> None:
    accounts.add("eve", role=AUDITOR, password=PASSWORD)
    with pytest.raises(Refused) as error:
        accounts.close_account("anna")
    assert code(error) == "ACCOUNT-LAST"
    accounts.add("carl", role=COORDINATOR, password=PASSWORD)
    accounts.close_account("anna")
    accounts.close_account("anna")
    with pytest.raises(Refused):
        accounts.close_account("nobody")


def test_expiries_and_commands_are_left_for_the_journal(accounts: Accounts, clock: Clock, tmp_path: Path) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    def note(about: str, **fields: Any) -> None:
        told.append((about, fields))

    accounts.begin("anna", complete=True)
    accounts.begin("anna", complete=False)
    clock.pass_s(accounts.idle_s + 1)
    other = Accounts(tmp_path / "console" / "accounts.db", clock=clock)  # the command line, another process
    other.tell("command", by="shell:x", action="account-add", on="eve")
    other.close()
    accounts.expire()
    accounts.pass_on(note)
    accounts.pass_on(note)
    commanded = ("command", {"by": "shell:x", "action": "account-add", "on": "eve"})
    assert told == [commanded, ("session-expired", {"by": "anna", "why": "idle"})], "nothing of one half way, and once"


def test_what_the_journal_could_not_take_is_kept(accounts: Accounts) -> None:
    accounts.tell("command", by="x")

    def broken(about: str, **fields: Any) -> None:
        raise OSError

    with pytest.raises(OSError):
        accounts.pass_on(broken)
    kept: list[str] = []
    accounts.pass_on(lambda about, **fields: kept.append(about))
    assert kept == ["command"]


# ---- people of a provider ------------------------------------------------------------------------------------


def test_somebody_from_a_provider_never_becomes_a_local_account(accounts: Accounts) -> None:
    found = accounts.admit(issuer="https://i.example", subject="1", wish="Anna", role=AUDITOR, site="")
    assert found.name == "anna-2" and found.role == AUDITOR
    again = accounts.admit(issuer="https://i.example", subject="1", wish="somebody else", role=SITE, site="site-1")
    assert (again.name, again.role, again.site) == ("anna-2", SITE, "site-1"), "known by issuer and subject alone"
    other = accounts.admit(issuer="https://j.example", subject="1", wish="anna", role=AUDITOR, site="")
    assert other.name == "anna-3"
    assert accounts.of_subject("", "") is None, "local accounts have no subject"
    odd = accounts.admit(issuer="https://i.example", subject="2", wish="<script>\n../..", role=AUDITOR, site="")
    assert odd.name == "script"
    assert accounts.admit(issuer="https://i.example", subject="3", wish="王", role=AUDITOR, site="").name == "person"


def test_a_closed_account_of_a_provider_stays_closed(accounts: Accounts) -> None:
    accounts.admit(issuer="https://i.example", subject="1", wish="eve", role=AUDITOR, site="")
    accounts.close_account("eve")
    with pytest.raises(Refused) as error:
        accounts.admit(issuer="https://i.example", subject="1", wish="eve", role=COORDINATOR, site="")
    assert code(error) == "ACCOUNT-CLOSED"
    eve = accounts.account("eve")
    assert eve is not None and eve.role == AUDITOR


def test_the_file_itself_refuses_a_second_account_of_a_subject(accounts: Accounts) -> None:
    accounts.add("one", role=AUDITOR, password=None, issuer="https://i.example", subject="1")
    with pytest.raises(sqlite3.IntegrityError):
        accounts.add("two", role=AUDITOR, password=None, issuer="https://i.example", subject="1")

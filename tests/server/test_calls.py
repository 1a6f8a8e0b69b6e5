"""What a call is asked although TLS has looked at it: each check holds when TLS itself is got round."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from consortium import HOUR, NAME, Leaf, enrol_member, leaf, make_pki

from cohortium.common.protocol.service import ServiceCode, user_agent
from cohortium.server.attempts import Attempts, address_of
from cohortium.server.calls import Calls, Refusal, Rule
from cohortium.server.pki import Issuer
from cohortium.server.register import Register

SITE_ONLY = Rule(roles=frozenset({"site"}), deadline_s=30.0, most_bytes=100, at_once=2)


class Context:
    """As much of a call as is looked at; what TLS would have refused is let through."""

    def __init__(self, who: Leaf | None, *, left: float = 10.0, tls: bytes = b"TLSv1.3", agent: str = "") -> None:
        self.left, self.cancelled, self.agent = left, False, agent
        self.auth: dict[str, list[bytes]] = {"ssl_tls_version": [tls]}
        if who is not None:
            end = b"-----END CERTIFICATE-----\n"
            self.auth["x509_pem_cert"] = [who.chain.split(end)[0] + end]

    def auth_context(self) -> dict[str, list[bytes]]:
        return self.auth

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("user-agent", self.agent)] if self.agent else []

    def time_remaining(self) -> float:
        return self.left

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Issuer:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def register(tmp_path: Path) -> Register:
    made = Register(tmp_path / "register.db")
    enrol_member(made, "north")
    enrol_member(made, "mia", role="researcher")
    return made


@pytest.fixture
def calls(register: Register) -> Iterator[Calls]:
    made = Calls(rules={}, consortium=NAME, register=register)
    yield made
    made.close()


def code(calls: Calls, context: Any, rule: Rule = SITE_ONLY) -> str:
    try:
        with calls._admitted("Method", rule, context) as caller:
            assert caller is not None
            return f"served {caller.name}"
    except Refusal as refusal:
        return refusal.code.value


def test_a_good_call_is_served(calls: Calls, issuer: Issuer) -> None:
    assert code(calls, Context(leaf(issuer, "north"))) == "served north"


def test_each_bad_credential_has_its_code_although_tls_let_it_through(
    calls: Calls, issuer: Issuer, register: Register, tmp_path: Path
) -> None:
    """Red when one check of `_caller` is taken out, whatever TLS does."""
    now = datetime.now(UTC)
    server = Leaf(**dict(zip(("chain", "key"), issuer.server_leaf(["localhost"]), strict=True)))
    foreign = make_pki(tmp_path / "other", name="another")
    found = {
        "none": code(calls, Context(None)),
        "foreign": code(calls, Context(leaf(foreign, "north"))),
        "expired": code(calls, Context(leaf(issuer, "north", now=now - 48 * HOUR))),
        "future": code(calls, Context(leaf(issuer, "north", now=now + HOUR))),
        "purpose": code(calls, Context(server)),
        "unknown": code(calls, Context(leaf(issuer, "south"))),
        "other role": code(calls, Context(leaf(issuer, "mia", role="site"))),
        "role": code(calls, Context(leaf(issuer, "mia", role="researcher"))),
        "tls": code(calls, Context(leaf(issuer, "north"), tls=b"TLSv1.2")),
        "not a certificate": code(calls, _with(Context(None), b"-----BEGIN CERTIFICATE-----\nx")),
    }
    register.revoke("north")
    found["revoked"] = code(calls, Context(leaf(issuer, "north")))
    assert found == {
        "none": "CERT-MISSING",
        "foreign": "CERT-FOREIGN",
        "expired": "CERT-EXPIRED",
        "future": "CERT-NOT-YET-VALID",
        "purpose": "CERT-PURPOSE",
        "unknown": "MEMBER-UNKNOWN",
        "other role": "MEMBER-UNKNOWN",
        "role": "ROLE-DENIED",
        "tls": "TLS-VERSION",
        "not a certificate": "CERT-NAME",
        "revoked": "MEMBER-REVOKED",
    }


def _with(context: Context, pem: bytes) -> Context:
    context.auth["x509_pem_cert"] = [pem]
    return context


def test_a_certificate_from_before_a_revocation_stays_out_after_a_new_enrolment(
    calls: Calls, issuer: Issuer, register: Register
) -> None:
    """Red when only the member's present state is asked: whoever stole the old key would be back in."""
    stolen = leaf(issuer, "north")
    register.revoke("north")
    enrol_member(register, "north")
    assert code(calls, Context(stolen)) == "MEMBER-REVOKED"
    fresh = leaf(issuer, "north", now=datetime.fromtimestamp(int(time.time()) + 1, UTC))
    assert code(calls, Context(fresh)) == "served north"


def test_whoever_is_let_in_is_told_with_its_version(register: Register, issuer: Issuer) -> None:
    told: list[tuple[str, str]] = []
    calls = Calls(rules={}, consortium=NAME, register=register, on_call=lambda *said: told.append(said))
    for agent in (f"{user_agent()} grpc-python/1.85.1", "grpc-python/1.85.1", "cohortium/<b> x", ""):
        assert code(calls, Context(leaf(issuer, "north"), agent=agent)) == "served north"
    assert code(calls, Context(leaf(issuer, "mia", role="researcher"), agent=user_agent())) == "ROLE-DENIED"
    calls.close()
    version = importlib.metadata.version("cohortium")
    assert told == [("north", version), ("north", ""), ("north", ""), ("north", "")]


def test_deadlines(calls: Calls, issuer: Issuer) -> None:
    who = leaf(issuer, "north")
    assert code(calls, Context(who, left=1e10)) == "DEADLINE-MISSING"
    assert code(calls, Context(who, left=float("inf"))) == "DEADLINE-MISSING"
    assert code(calls, Context(who, left=33.0)) == "DEADLINE-TOO-LONG"
    assert code(calls, Context(who, left=30.0)) == "served north"
    lasting = Rule(roles=frozenset({"site"}), deadline_s=None, most_bytes=1)
    assert code(calls, Context(who, left=1e10), lasting) == "served north"


def test_one_member_has_so_many_calls_at_once_and_no_more(calls: Calls, issuer: Issuer, register: Register) -> None:
    enrol_member(register, "south")
    who, other = leaf(issuer, "north"), leaf(issuer, "south")
    with calls._admitted("Method", SITE_ONLY, Context(who)):  # type: ignore[arg-type]
        with calls._admitted("Method", SITE_ONLY, Context(who)):  # type: ignore[arg-type]
            assert code(calls, Context(who)) == "BUSY"
            assert code(calls, Context(other)) == "served south"
        assert code(calls, Context(who)) == "served north"
    assert not calls._open and not calls._counts


def test_a_method_without_a_rule_is_not_served(register: Register) -> None:
    calls = Calls(rules={}, consortium=NAME, register=register)
    with pytest.raises(KeyError):
        calls.handlers("Enrolment", object())
    calls.close()


def test_every_code_has_a_status() -> None:
    from cohortium.common.protocol.service import STATUS

    assert set(STATUS) == set(ServiceCode)


# ---- failed enrolments --------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert address_of("ipv4:10.0.0.1:4711") == "10.0.0.1"
    assert address_of("ipv6:%5B2001:db8::1%5D:4711") == address_of("ipv6:[2001:db8::2]:1") == "2001:db8::/64"
    assert address_of("ipv6:[::ffff:10.0.0.1]:1") == "10.0.0.1"
    assert address_of("unix:/x") == "unix"


def test_five_failures_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])
    for _ in range(5):
        assert attempts.allowed("ipv4:10.0.0.1:1")
        attempts.failed("ipv4:10.0.0.1:2")
    assert not attempts.allowed("ipv4:10.0.0.1:3")
    assert attempts.allowed("ipv4:10.0.0.2:3")
    now[0] = 61.0
    assert attempts.allowed("ipv4:10.0.0.1:3")


def test_the_table_of_failures_does_not_grow_without_end() -> None:
    attempts = Attempts()
    for i in range(5000):
        attempts.failed(f"ipv4:10.{i // 65536}.{i // 256 % 256}.{i % 256}:1")
    assert len(attempts._failed) == 4096

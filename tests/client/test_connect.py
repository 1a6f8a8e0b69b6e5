"""Each thing that can be wrong between a member and the coordinator ends in its own code, with a fix."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from consortium import HOUR, Leaf, Party, enrol_member, leaf, make_pki, start_party
from grpc import RpcError, StatusCode

from cohortium.client import connect
from cohortium.client.connect import check_own, explain, look_closer, open_channel, read_leaf
from cohortium.common.errors import CohortiumError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.certificates import key_pem as pem_of
from cohortium.common.protocol.certificates import new_key, write_file
from cohortium.common.protocol.service import ServiceCode


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    made = start_party(tmp_path_factory.mktemp("party"))
    yield made
    made.stop()


def ask(courier: Path, method: str = "Members", request: Any = None) -> CohortiumError | None:
    """What a person sees who asks for something with a member's directory."""
    try:
        with open_channel(courier) as channel:
            stub = rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
            getattr(stub, method)(request or pb.Nothing(), timeout=5)
    except RpcError as error:
        return explain(error, courier)
    except CohortiumError as error:
        return error
    return None


def test_a_member_is_served(party: Party) -> None:
    assert ask(party.directory("ok", party.member("ok"))) is None
    assert check_own(party.directory("ok", None)).name == "ok"


def test_the_eight_bad_credentials_have_eight_codes_and_fixes(party: Party, tmp_path: Path) -> None:
    """No certificate, foreign, ended, not begun, wrong purpose, revoked, unknown, wrong role: as hospital IT meets
    them. That the server refuses each of them by itself stands in tests/server/test_service.py."""
    now = datetime.now(UTC)
    pair = party.issuer.server_leaf(["localhost"])
    credentials = {
        "none": None,
        "foreign": leaf(make_pki(tmp_path), "north"),
        "expired": leaf(party.issuer, "north", now=now - 48 * HOUR),
        "future": leaf(party.issuer, "north", now=now + 48 * HOUR),
        "purpose": Leaf(chain=pair[0], key=pair[1]),
        "revoked": party.member("north"),
        "unknown": leaf(party.issuer, "nobody"),
        "role": party.member("mia", role="researcher"),
    }
    party.register.revoke("north")
    found = {name: ask(party.directory(f"bad-{name}", who)) for name, who in credentials.items()}
    assert {name: error.code for name, error in found.items() if error is not None} == {
        "none": "CERT-MISSING",
        "foreign": "CERT-FOREIGN",
        "expired": "CERT-EXPIRED",
        "future": "CERT-NOT-YET-VALID",
        "purpose": "CERT-PURPOSE",
        "revoked": "MEMBER-REVOKED",
        "unknown": "MEMBER-UNKNOWN",
        "role": "ROLE-DENIED",
    }
    assert len({error.hint for error in found.values() if error is not None}) == 8
    assert all(error is not None and error.hint and error.exit_code == 3 for error in found.values())


def test_files_that_cannot_be_used(party: Party) -> None:
    place = party.directory("files", party.member("files"))
    good = (place / "leaf.key").read_bytes()
    write_file(place / "leaf.key", pem_of(new_key()), 0o600)
    assert _code(place) == "CERT-KEY"
    write_file(place / "leaf.key", good, 0o644)
    assert _code(place) == "KEY-MODE"
    (place / "leaf.key").unlink()
    assert _code(place) == "KEY-MISSING"
    write_file(place / "leaf.key", good, 0o600)
    assert _code(place) is None
    (place / "courier.toml").write_text('service_address = "no address"')
    assert _code(place) == "COURIER-SETTINGS"
    (place / "root.pem").unlink()
    assert _code(place) == "ROOT-MISSING"


def _code(place: Path) -> str | None:
    error = ask(place)
    return None if error is None else error.code


def test_a_renewal_that_was_cut_off_is_finished(party: Party) -> None:
    """New certificate in place, its key still beside the old one: the moment in which a crash would lock a site out."""
    place = party.directory("cut", party.member("cut"))
    after = leaf(party.issuer, "cut")
    write_file(place / "leaf.key.next", after.key, 0o600)
    assert read_leaf(place)[1] != after.key  # asked for, not answered yet: the old pair is the pair
    assert (place / "leaf.key.next").exists()
    write_file(place / "leaf.pem", after.chain, 0o644)
    assert read_leaf(place) == (after.chain, after.key)
    assert not (place / "leaf.key.next").exists()
    assert ask(place) is None


# ---- connections --------------------------------------------------------------------------------------------


def _to(place: Path, address: str) -> Path:
    (place / "courier.toml").write_text(f'service_address = "{address}"\n')
    return place


def test_nobody_there(party: Party) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    place = _to(party.directory("away", party.member("away")), f"127.0.0.1:{port}")
    error = ask(place)
    assert error is not None and (error.code, error.exit_code) == ("COORDINATOR-UNREACHABLE", 4)


def test_somebody_else_there(party: Party, tmp_path: Path) -> None:
    """Another consortium's service, and ours under a name that its certificate does not hold."""
    other = start_party(tmp_path)
    place = _to(party.directory("else", party.member("else")), other.address)
    assert _code(place) == "COORDINATOR-FOREIGN"
    other.stop()
    assert party.service is not None
    assert _code(_to(place, f"127.0.0.2:{party.service.port}")) in ("COORDINATOR-UNREACHABLE", "COORDINATOR-FOREIGN")


def test_a_server_that_says_nothing(party: Party) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = _to(party.directory("silent", party.member("silent")), f"127.0.0.1:{silent.getsockname()[1]}")
        with open_channel(place) as channel, pytest.raises(RpcError) as caught:
            rpc.ConsortiumStub(channel).Members(pb.Nothing(), timeout=0.5)  # type: ignore[no-untyped-call]
        assert explain(caught.value).code == "COORDINATOR-TIMEOUT"


def test_a_server_that_cuts_every_connection_refuses_the_certificate(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refused certificate looks like over TLS 1.3 where our own check was content (a clock far off)."""
    enrol_member(party.register, "late")
    place = party.directory("late", leaf(party.issuer, "late", now=datetime.now(UTC) - 48 * HOUR))
    monkeypatch.setattr(connect, "check_own", lambda courier: None)
    error = ask(place)
    assert error is not None and error.code == "CERT-REFUSED"


def test_all_is_well_by_now(party: Party) -> None:
    assert look_closer(party.directory("ok2", party.member("ok2"))) is None


def test_a_service_of_others_is_told_apart(party: Party) -> None:
    channel = party.channel(party.member("other"))
    with pytest.raises(RpcError) as caught:
        channel.unary_unary("/some.Other/Method")(b"", timeout=5)
    assert caught.value.code() is StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    assert explain(caught.value).code == "COORDINATOR-OTHER"


def test_every_code_of_the_service_has_words_and_a_fix() -> None:
    assert set(connect._TOLD) == set(ServiceCode)
    assert all(sentence and hint for sentence, hint in connect._TOLD.values())


def test_readers_and_a_renewal_at_the_same_time(party: Party) -> None:
    """No reader ever sees halves of two pairs, and no renewal loses its key."""
    place = party.directory("busy", party.member("busy"))
    over, seen = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            try:
                read_leaf(place)
            except CohortiumError as error:
                seen.append(error.code)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    from cohortium.client.enrolment import renew

    for _ in range(10):
        renew(place)
    over.set()
    for thread in threads:
        thread.join()
    assert seen == []
    assert ask(place) is None

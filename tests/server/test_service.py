"""The coordinator's services over real TLS: who may do what, what a refusal says, and that nothing else leaves."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from consortium import (
    HOUR,
    NAME,
    Leaf,
    Party,
    enrol_member,
    leaf,
    make_pki,
    public,
    signer,
    start_party,
    supernode,
)
from grpc import RpcError, StatusCode, channel_ready_future

from cohortium.client.connect import connect_with
from cohortium.common.errors import UsageError
from cohortium.common.proposals import APPROVAL, approval_statement, read_proposal
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.certificates import key_pem, make_csr, new_key
from cohortium.common.protocol.invitation import prove_identity, sign_rotation, token_text
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.service import STATUS, ServiceCode
from cohortium.common.protocol.signing import sign_statement
from cohortium.server.pki import Issuer, save_server_leaf
from cohortium.server.register import Register
from cohortium.server.service import METHODS

PROTO = Path(__file__).resolve().parents[2] / "common" / "protocol" / "consortium.proto"
PLANTED = "patient Jane Doe 4711 has stage IV"


@pytest.fixture
def party(tmp_path: Path) -> Iterator[Party]:
    made = start_party(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def proposed(party: Party) -> str:
    for name in ("north", "south", "west"):
        enrol_member(party.register, name)
    party.register.propose("run-1", folder="runs/run-1", envelope=_proposal(), sites=["north", "south"])
    return "run-1"


def _proposal() -> bytes:
    from hospital import plan, proposal

    return proposal(plan(("north", "south")))


def said(call: Callable[[], Any]) -> str:
    """The details of the status that a call ends with, after checking that they are one fixed code."""
    try:
        answer = call()
        if hasattr(answer, "__next__"):
            for _ in answer:
                pass
    except RpcError as error:
        code = ServiceCode(error.details())  # type: ignore[attr-defined]
        assert error.code() is STATUS[code]  # type: ignore[attr-defined]
        assert not error.trailing_metadata()  # type: ignore[attr-defined]
        return code.value
    return "served"


def requests() -> dict[str, Any]:
    """A request of each method, good enough to be let in."""
    return {
        "Renew": pb.CertificateRequest(csr=b"x"),
        "Rotate": pb.Rotation(),
        "Members": pb.Nothing(),
        "Proposals": pb.Nothing(),
        "Approve": pb.Approval(run="none"),
        "Relay": iter([pb.Frame(seq=1)]),
        "Witness": pb.Checkpoint(text="head"),
        "Status": pb.RunName(),
        "Rows": pb.RowsRequest(run="none"),
        "Revoke": pb.MemberName(name="none"),
        "Stop": pb.RunName(run="none"),
    }


# ---- authorisation ------------------------------------------------------------------------------------------


def test_every_method_of_the_proto_has_the_roles_that_its_comment_names() -> None:
    """Red when a method is added without a rule, or rule and comment part."""
    text = PROTO.read_text().split("service Consortium {")[1].split("\n}")[0]
    found = re.findall(r"// ([^\n]*(?:site|coordinator|researcher)[^\n]*)\n\s*rpc (\w+)", text)
    methods = [m.name for m in pb.DESCRIPTOR.services_by_name["Consortium"].methods]
    assert [name for _, name in found] == methods == list(METHODS)
    for comment, name in found:
        roles = set(re.findall(r"\b(site|researcher|coordinator)\b", re.split(r"[:.]", comment)[0]))
        assert METHODS[name].roles == roles, name


@pytest.mark.parametrize("role", ["site", "researcher", "coordinator"])
def test_a_role_gets_exactly_its_methods(party: Party, role: str) -> None:
    stub = party.stub(party.member("someone", role=role))
    for name, request in requests().items():
        timeout = {} if name == "Relay" else {"timeout": 5}
        answer = said(lambda n=name, r=request, t=timeout: getattr(stub, n)(r, **t))  # type: ignore[misc]
        assert (answer == "ROLE-DENIED") == (role not in METHODS[name].roles), (name, answer)


# ---- credentials --------------------------------------------------------------------------------------------


def _not_let_in(party: Party, who: Leaf | None) -> bool:
    """Whether the connection itself is refused, and nothing at all is said to this client."""
    with party.channel(who) as channel:
        stub = rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(RpcError) as caught:
            stub.Members(pb.Nothing(), timeout=5)
        return caught.value.code() is StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_bad_credentials_are_refused_by_the_server_whatever_the_client_checked(party: Party, tmp_path: Path) -> None:
    good, now = party.member("north"), datetime.now(UTC)
    assert said(lambda: party.stub(good).Members(pb.Nothing(), timeout=5)) == "served"
    server = Leaf(**dict(zip(("chain", "key"), party.issuer.server_leaf(["localhost"]), strict=True)))
    assert _not_let_in(party, None)
    assert _not_let_in(party, leaf(make_pki(tmp_path / "foreign"), "north"))
    assert _not_let_in(party, leaf(party.issuer, "north", now=now - 48 * HOUR))
    assert _not_let_in(party, leaf(party.issuer, "north", now=now + 48 * HOUR))
    assert _not_let_in(party, server)
    unknown = party.stub(leaf(party.issuer, "nobody"))
    assert said(lambda: unknown.Members(pb.Nothing(), timeout=5)) == "MEMBER-UNKNOWN"
    other_role = party.stub(leaf(party.issuer, "north", role="coordinator"))
    assert said(lambda: other_role.Revoke(pb.MemberName(name="north"), timeout=5)) == "MEMBER-UNKNOWN"


def test_revocation_holds_from_the_next_request_on(party: Party) -> None:
    stub = party.stub(party.member("north"))
    boss = party.stub(party.member("ann", role="coordinator"))
    assert said(lambda: stub.Members(pb.Nothing(), timeout=5)) == "served"
    boss.Revoke(pb.MemberName(name="north"), timeout=5)
    assert said(lambda: stub.Members(pb.Nothing(), timeout=5)) == "MEMBER-REVOKED"
    assert party.hub.revoked == ["north"]
    assert said(lambda: boss.Revoke(pb.MemberName(name="nobody"), timeout=5)) == "NAME-UNKNOWN"


class _Feed:
    """Frames of a client, one by one, until `end`."""

    def __init__(self) -> None:
        self._ready, self._frames, self._over = threading.Condition(), [pb.Frame(seq=1)], False

    def __iter__(self) -> Iterator[pb.Frame]:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._frames or self._over)
                if not self._frames:
                    return
                frame = self._frames.pop(0)
            yield frame

    def send(self, frame: pb.Frame) -> None:
        with self._ready:
            self._frames.append(frame)
            self._ready.notify_all()

    def end(self) -> None:
        with self._ready:
            self._over = True
            self._ready.notify_all()


def test_an_open_stream_is_cut_when_another_process_revokes(party: Party, tmp_path: Path) -> None:
    """`cohortium sites revoke` writes to register.db and knows nothing of the service. Red without `_watch`."""
    feed = _Feed()
    call = party.stub(party.member("north")).Relay(iter(feed), timeout=20)
    assert next(call).run == "north"
    Register(tmp_path / "register.db").revoke("north")
    began = time.monotonic()
    with pytest.raises(RpcError):
        next(call)
    feed.end()
    assert time.monotonic() - began < 4
    assert party.hub.revoked == ["north"]


def test_a_revoked_member_gets_no_further_frame_through(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame is a request: no wait for the next look of `_watch`. Red without the check in `_frames`."""
    monkeypatch.setattr("cohortium.server.calls.FAREWELL_S", 60.0)
    feed = _Feed()
    call = party.stub(party.member("north")).Relay(iter(feed), timeout=20)
    assert next(call).seq == 1
    party.register.revoke("north")
    feed.send(pb.Frame(seq=2))
    with pytest.raises(RpcError):
        next(call)
    feed.end()


@pytest.mark.slow
def test_an_open_stream_ends_with_its_certificate(party: Party) -> None:
    enrol_member(party.register, "north")
    who, began = leaf(party.issuer, "north", hours=5 / 3600), time.time()
    feed = _Feed()
    stub = party.stub(who)
    call = stub.Relay(iter(feed), timeout=20)
    assert next(call).seq == 1
    with pytest.raises(RpcError):
        next(call)
    assert time.time() < began + 12
    feed.end()
    # The connection is still open, and still of no use.
    assert said(lambda: stub.Members(pb.Nothing(), timeout=5)) == "CERT-EXPIRED"


# ---- limits -------------------------------------------------------------------------------------------------


def test_deadlines_are_asked_for(party: Party) -> None:
    stub = party.stub(party.member("north"))
    assert said(lambda: stub.Members(pb.Nothing())) == "DEADLINE-MISSING"
    assert said(lambda: stub.Members(pb.Nothing(), timeout=3600)) == "DEADLINE-TOO-LONG"
    assert said(lambda: stub.Proposals(pb.Nothing())) == "DEADLINE-MISSING"


def test_only_the_relay_takes_large_messages(party: Party) -> None:
    channel = party.channel(party.member("north"))
    stub = rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
    assert said(lambda: stub.Witness(pb.Checkpoint(text="x" * 70_000), timeout=5)) == "TOO-LARGE"
    assert said(lambda: stub.Witness(pb.Checkpoint(text="x" * 20_000), timeout=5)) == "MALFORMED"
    raw = channel.unary_unary("/cohortium.v1.Consortium/Status")
    assert said(lambda: raw(b"\xff\xff\xff", timeout=5)) == "MALFORMED"
    big = next(stub.Relay(iter([pb.Frame(seq=1, envelope=bytes(20_000_000))])))
    assert len(big.envelope) == 20_000_000
    with pytest.raises(RpcError):
        list(stub.Relay(iter([pb.Frame(seq=1, envelope=bytes(65 * 1024 * 1024))])))


def test_nothing_but_the_service_is_served(party: Party) -> None:
    channel = party.channel(party.member("north"))
    for path in (
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/cohortium.v1.Hub/Attach",
        "/cohortium.v1.Enrolment/Enrol",
        "/cohortium.v1.Guard/Handle",
    ):
        with pytest.raises(RpcError) as caught:
            channel.unary_unary(path)(b"", timeout=5)
        assert caught.value.code() is StatusCode.UNIMPLEMENTED, path  # type: ignore[attr-defined]


def test_a_second_server_does_not_share_the_port(party: Party) -> None:
    from cohortium.server.listening import listen

    assert party.service is not None
    pki = party.folder / "pki"
    with pytest.raises(UsageError, match="PORT-BUSY"):
        listen(
            [],
            host="127.0.0.1",
            port=party.service.port,
            chain=pki / "server.pem",
            key=pki / "server.key",
            root=party.issuer.root_pem,
            require_client=True,
            threads=1,
            connections=1,
            most_bytes=1,
        )


# ---- only codes leave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError(PLANTED), KeyError(PLANTED), UsageError(PLANTED, PLANTED)])
def test_no_text_of_an_exception_leaves(party: Party, proposed: str, error: Exception, caplog: Any) -> None:
    """Red when any handler is not wrapped: gRPC itself would send "Exception calling application: <text>"."""
    party.backing.fail = error
    party.register.set_run(proposed, state="finished")
    stub, boss = party.stub(leaf(party.issuer, "north")), party.stub(party.member("ann", role="coordinator"))
    assert said(lambda: stub.Status(pb.RunName(run=proposed), timeout=5)) == "INTERNAL"
    assert said(lambda: stub.Rows(pb.RowsRequest(run=proposed, format="csv"), timeout=5)) == "INTERNAL"
    assert said(lambda: boss.Stop(pb.RunName(run=proposed), timeout=5)) == "INTERNAL"
    witness = "WITNESS-REFUSED" if isinstance(error, UsageError) else "INTERNAL"
    assert said(lambda: stub.Witness(pb.Checkpoint(text="head"), timeout=5)) == witness
    assert PLANTED not in caplog.text and "INTERNAL" not in PLANTED


def test_an_error_of_ours_with_a_code_of_the_service_keeps_it(party: Party, proposed: str) -> None:
    party.backing.fail = UsageError("RUN-NOT-READY", PLANTED)
    stub = party.stub(leaf(party.issuer, "north"))
    assert said(lambda: stub.Status(pb.RunName(run=proposed), timeout=5)) == "RUN-NOT-READY"
    assert said(lambda: stub.Witness(pb.Checkpoint(text="forked"), timeout=5)) == "WITNESS-REFUSED"


def test_a_hub_that_fails_says_nothing_either(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Iterator[pb.Frame]:
        yield pb.Frame(seq=1)
        raise RuntimeError(PLANTED)

    monkeypatch.setattr(party.hub, "relay", broken)
    assert said(lambda: party.stub(party.member("north")).Relay(iter([pb.Frame()]))) == "INTERNAL"


# ---- what the methods do ------------------------------------------------------------------------------------


def test_members_are_told_to_sites_without_researchers(party: Party) -> None:
    north = party.stub(party.member("north"))
    boss = party.stub(party.member("ann", role="coordinator"))
    enrol_member(party.register, "mia", role="researcher")
    seen = north.Members(pb.Nothing(), timeout=5).members
    assert [(m.name, m.role, m.identity) for m in seen] == [("north", "site", public("north"))]
    assert [m.name for m in boss.Members(pb.Nothing(), timeout=5).members] == ["ann", "mia", "north"]


def test_a_proposal_is_answered_with_the_officers_signature(party: Party, proposed: str) -> None:
    stub = party.stub(leaf(party.issuer, "north"))
    (offered,) = stub.Proposals(pb.Nothing(), timeout=5)
    assert (offered.run, offered.state) == (proposed, "open")
    statement = approval_statement("north", read_proposal(offered.envelope, signer("coordinator").public_key()))
    good = {
        "run": proposed,
        "proposal": digest(offered.envelope),
        "signature": sign_statement(signer("officer of north"), APPROVAL, statement),
    }

    def answer(**changes: Any) -> str:
        return said(lambda: stub.Approve(pb.Approval(**(good | changes)), timeout=5))

    assert answer(signature=sign_statement(signer("north"), APPROVAL, statement)) == "APPROVAL-SIGNATURE"
    assert answer(signature=b"") == "APPROVAL-SIGNATURE"
    other = statement | {"site": "south"}
    assert answer(signature=sign_statement(signer("officer of north"), APPROVAL, other)) == "APPROVAL-SIGNATURE"
    assert answer(proposal="0" * 64) == "PROPOSAL-OTHER"
    assert answer(run="run-9") == "RUN-UNKNOWN"
    assert answer(declined=True) == "MALFORMED"
    assert party.register.approvals(proposed) == {"north": "open", "south": "open"}
    assert answer() == "served"
    assert party.register.approvals(proposed) == {"north": "approved", "south": "open"}
    west = party.stub(leaf(party.issuer, "west"))
    assert list(west.Proposals(pb.Nothing(), timeout=5)) == []
    assert said(lambda: west.Approve(pb.Approval(**good), timeout=5)) == "RUN-UNKNOWN"


def test_a_run_of_others_looks_like_none(party: Party, proposed: str) -> None:
    mia = party.member("mia", role="researcher")
    for who in (leaf(party.issuer, "west"), mia):
        stub = party.stub(who)
        for run in (proposed, "run-9"):
            assert said(lambda s=stub, r=run: s.Status(pb.RunName(run=r), timeout=5)) == "RUN-UNKNOWN"  # type: ignore[misc]
            rows = pb.RowsRequest(run=run, format="csv")
            assert said(lambda s=stub, r=rows: s.Rows(r, timeout=5)) == "RUN-UNKNOWN"  # type: ignore[misc]
    party.register.grant(proposed, "mia")
    assert "mia" in party.stub(mia).Status(pb.RunName(run=proposed), timeout=5).json


def test_rows_come_in_chunks_when_the_run_has_finished(party: Party, proposed: str) -> None:
    stub = party.stub(leaf(party.issuer, "north"))
    wanted = pb.RowsRequest(run=proposed, format="csv")
    assert said(lambda: stub.Rows(wanted, timeout=5)) == "RUN-NOT-READY"
    party.register.set_run(proposed, state="finished")
    assert said(lambda: stub.Rows(pb.RowsRequest(run=proposed, format="xls"), timeout=5)) == "MALFORMED"
    got = [chunk.data for chunk in stub.Rows(wanted, timeout=5)]
    assert b"".join(got) == b"a,b\n" + b"x" * 600_000
    assert max(map(len, got)) <= 256 * 1024


def test_a_certificate_is_renewed_for_ones_own_name_only(party: Party) -> None:
    stub, key = party.stub(party.member("north")), new_key()

    def csr(name: str, role: str = "site") -> pb.CertificateRequest:
        return pb.CertificateRequest(csr=make_csr(key, consortium=NAME, role=role, name=name))

    renewed = Leaf(chain=stub.Renew(csr("north"), timeout=5).chain, key=key_pem(key))
    assert said(lambda: party.stub(renewed).Members(pb.Nothing(), timeout=5)) == "served"
    assert said(lambda: stub.Renew(csr("south"), timeout=5)) == "CSR-REFUSED"
    assert said(lambda: stub.Renew(csr("north", "coordinator"), timeout=5)) == "CSR-REFUSED"
    assert said(lambda: stub.Renew(pb.CertificateRequest(csr=b"x"), timeout=5)) == "CSR-REFUSED"


def test_an_identity_changes_with_three_signatures(party: Party, proposed: str) -> None:
    """Red when any one of the three is not looked at."""
    stub = party.stub(leaf(party.issuer, "north"))
    old, new = signer("north").public_key(), signer("next").public_key()
    signers = {"by_old": "north", "by_new": "next", "by_officer": "officer of north"}
    good: dict[str, Any] = {
        field: sign_rotation(signer(name), site="north", old=old, new=new) for field, name in signers.items()
    }
    good["identity"] = public("next")

    def answer(**changes: Any) -> str:
        return said(lambda: stub.Rotate(pb.Rotation(**(good | changes)), timeout=5))

    for field in signers:
        assert answer(**{field: b""}) == "ROTATE-REFUSED"
        wrong = sign_rotation(signer("mallory"), site="north", old=old, new=new)
        assert answer(**{field: wrong}) == "ROTATE-REFUSED"
    assert answer(identity=public("mallory")) == "ROTATE-REFUSED"
    party.register.set_run(proposed, state="running")
    assert answer() == "ROTATE-REFUSED"
    party.register.set_run(proposed, state="finished")
    assert answer() == "served"
    assert party.register.member("north").identity == public("next")  # type: ignore[union-attr]
    assert answer() == "ROTATE-REFUSED"


# ---- enrolment ----------------------------------------------------------------------------------------------


def _request(token: str, name: str = "north", **changes: Any) -> pb.EnrolmentRequest:
    csr = make_csr(new_key(), consortium=NAME, role="site", name=name)
    officer, key = signer("officer of " + name).public_key(), signer(name)
    proof = prove_identity(key, token=token, csr=csr, officer=officer, supernode=supernode(name))
    given = {
        "token": token,
        "csr": csr,
        "identity": public(name),
        "identity_proof": proof,
        "officer": officer.public_bytes_raw(),
        "supernode": supernode(name),
    }
    return pb.EnrolmentRequest(**(given | changes))


def _enrol(party: Party) -> Any:
    return rpc.EnrolmentStub(connect_with(party.enrol_address, party.issuer.root_pem)).Enrol  # type: ignore[no-untyped-call]


def test_enrolment_makes_a_member(party: Party) -> None:
    reply = _enrol(party)(_request(party.register.invite("north")), timeout=5)
    assert (reply.name, reply.consortium, reply.service_address) == ("north", NAME, party.address)
    assert reply.coordinator == public("coordinator")
    member = party.register.member("north")
    assert member is not None and member.identity == public("north")
    assert party.enrolled == [(member, importlib.metadata.version("cohortium"))]


def test_wrong_used_ended_and_anothers_token_are_answered_alike(party: Party) -> None:
    enrol = _enrol(party)
    used = party.register.invite("north")
    enrol(_request(used), timeout=5)
    ended = party.register.invite("south", valid_s=1)
    anothers = party.register.invite("west")
    time.sleep(1.1)
    answers = {
        said(lambda t=token, n=name: enrol(_request(t, n), timeout=5))  # type: ignore[misc]
        for token, name in (
            (token_text(bytes(16)), "north"),
            (used, "north"),
            (ended, "south"),
            (anothers, "south"),
        )
    }
    assert answers == {"INVITE-REFUSED"}
    assert party.register.invited(anothers) == ("west", "site")


def test_failed_tokens_are_rate_limited_by_address(party: Party) -> None:
    enrol, good = _enrol(party), party.register.invite("north")
    found = [said(lambda: enrol(_request(token_text(os.urandom(16))), timeout=5)) for _ in range(7)]
    assert found == ["INVITE-REFUSED"] * 5 + ["RATE-LIMITED"] * 2
    assert said(lambda: enrol(_request(good), timeout=5)) == "RATE-LIMITED"
    assert party.register.invited(good) is not None


def test_enrolments_that_are_refused_leave_the_token_good(party: Party) -> None:
    enrol, token = _enrol(party), party.register.invite("north")
    foreign_csr = make_csr(new_key(), consortium=NAME, role="site", name="north")
    researcher = make_csr(new_key(), consortium=NAME, role="researcher", name="north")
    for changes, expected in (
        ({"csr": foreign_csr}, "ENROL-PROOF"),
        ({"identity": public("mallory")}, "ENROL-PROOF"),
        ({"officer": public("mallory")}, "ENROL-PROOF"),
        ({"supernode": supernode("mallory")}, "ENROL-PROOF"),
        ({"identity_proof": b""}, "ENROL-PROOF"),
        ({"csr": b"x"}, "CSR-REFUSED"),
        ({"csr": researcher}, "INVITE-REFUSED"),
    ):
        assert said(lambda c=changes: enrol(_request(token, **c), timeout=5)) == expected  # type: ignore[misc]
    assert said(lambda: enrol(pb.EnrolmentRequest(token="x" * 70_000), timeout=5)) == "TOO-LARGE"
    assert said(lambda: enrol(_request(token), timeout=5)) == "served"


def test_of_many_enrolments_with_one_token_one_succeeds(party: Party) -> None:
    enrol, token = _enrol(party), party.register.invite("north")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: said(lambda: enrol(_request(token), timeout=10)), range(5)))
    assert found.count("served") == 1, found
    assert set(found) <= {"served", "INVITE-REFUSED"}


def test_a_researcher_enrols_without_keys(party: Party) -> None:
    token = party.register.invite("mia", role="researcher")
    csr = make_csr(new_key(), consortium=NAME, role="researcher", name="mia")
    enrol = _enrol(party)
    with_key = pb.EnrolmentRequest(token=token, csr=csr, identity=public("mia"))
    assert said(lambda: enrol(with_key, timeout=5)) == "ENROL-KEYS"
    assert said(lambda: enrol(pb.EnrolmentRequest(token=token, csr=csr), timeout=5)) == "served"


def test_one_who_was_revoked_comes_back_with_a_new_invitation_only(party: Party) -> None:
    old, key = party.member("north"), new_key()
    while time.time() % 1 > 0.1:  # revoked and enrolled within one second, which is all that a certificate tells
        time.sleep(0.01)
    party.register.revoke("north")
    token = party.register.invite("north")
    csr = make_csr(key, consortium=NAME, role="site", name="north")
    officer = signer("officer of north").public_key()
    proof = prove_identity(signer("north"), token=token, csr=csr, officer=officer, supernode=supernode("north"))
    reply = _enrol(party)(_request(token, csr=csr, identity_proof=proof), timeout=5)
    back = Leaf(chain=reply.chain, key=key_pem(key))
    assert said(lambda: party.stub(back).Members(pb.Nothing(), timeout=5)) == "served"
    assert said(lambda: party.stub(old).Members(pb.Nothing(), timeout=5)) == "MEMBER-REVOKED"


def test_an_enrolment_holds_although_flower_did_not_hear_of_it(party: Party, caplog: Any) -> None:
    class Broken(list):  # type: ignore[type-arg]
        def append(self, member: Any) -> None:
            raise RuntimeError(PLANTED)

    party.stop()
    again = Party(folder=party.folder, issuer=party.issuer, register=party.register, enrolled=Broken())
    again.start()
    assert said(lambda: _enrol(again)(_request(again.register.invite("north")), timeout=5)) == "served"
    again.stop()
    assert "RuntimeError" in caplog.text and PLANTED not in caplog.text


# ---- certificates of the server -----------------------------------------------------------------------------


def test_a_renewed_server_certificate_is_served_without_a_restart(party: Party) -> None:
    """Red with static credentials. Half a pair on disk must not stop the server."""
    import ssl

    assert party.service is not None
    port, pki = party.service.port, party.folder / "pki"

    def served() -> str:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=5)

    who = party.member("north")
    first, pair = served(), party.issuer.server_leaf(["127.0.0.1"])
    (pki / "server.pem").write_bytes(pair[0])
    assert served() == first
    save_server_leaf(pki, pair)
    assert served() == pair[0].decode().split("-----END CERTIFICATE-----\n")[0] + "-----END CERTIFICATE-----\n" != first
    assert said(lambda: party.stub(who).Members(pb.Nothing(), timeout=5)) == "served"
    (pki / "server.key").unlink()
    assert said(lambda: party.stub(who).Members(pb.Nothing(), timeout=5)) == "served"


def test_a_member_cannot_pose_as_the_service(tmp_path: Path, issuer_of: Issuer) -> None:
    """Its leaf is for clients, and names no host."""
    from concurrent.futures import ThreadPoolExecutor as Pool

    import grpc

    from cohortium.common.protocol.certificates import server_credentials

    rogue = leaf(issuer_of, "north")
    server = grpc.server(Pool(1))
    port = server.add_secure_port(
        "127.0.0.1:0", server_credentials(rogue.chain, rogue.key, issuer_of.root_pem, require_client=False)
    )
    server.start()
    with connect_with(f"127.0.0.1:{port}", issuer_of.root_pem) as channel, pytest.raises(Exception):  # noqa: B017
        channel_ready_future(channel).result(timeout=1)
    server.stop(0)


@pytest.fixture
def issuer_of(tmp_path: Path) -> Issuer:
    return make_pki(tmp_path / "made")


_LATE = """
import grpc, sys, pathlib
sys.path.insert(0, sys.argv[1])
from consortium import start_party
try:
    start_party(pathlib.Path(sys.argv[2]))
except Exception as error:
    print(error.code)
"""


@pytest.mark.slow
def test_a_process_that_cannot_refuse_tls_1_2_does_not_serve(tmp_path: Path) -> None:
    """gRPC was loaded too early there. Red without the probe of one's own port."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")}
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _LATE, tests, str(tmp_path)], capture_output=True, text=True, timeout=60, env=clean
    )
    assert done.stdout.strip() == "TLS-VERSION", done.stderr

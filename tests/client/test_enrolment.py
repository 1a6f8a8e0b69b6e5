"""From an invitation to a certificate and on to the next one, with a coordinator that may lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from consortium import HOUR, NAME, Party, leaf, make_pki, public, signer, start_party, supernode

from cohortium.client import enrolment
from cohortium.client.connect import open_channel, read_leaf
from cohortium.client.enrolment import Enrolled, enrol, renew
from cohortium.common.errors import CohortiumError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.certificates import fingerprint, load_chain, owner_of, read_csr
from cohortium.common.protocol.invitation import Invitation
from cohortium.server.service import _Enrolment


@pytest.fixture
def party(tmp_path: Path) -> Iterator[Party]:
    made = start_party(tmp_path)
    yield made
    made.stop()


def join(invitation: Invitation, **options: Any) -> Enrolled:
    given = {
        "identity": signer(invitation.name),
        "officer_public": signer("officer of " + invitation.name).public_key(),
        "supernode_public": supernode(invitation.name),
    }
    return enrol(invitation, **(given | options))


def refused(code: str, call: Callable[..., Any], *args: Any, **options: Any) -> CohortiumError:
    with pytest.raises(CohortiumError) as caught:
        call(*args, **options)
    assert caught.value.code == code
    return caught.value


def test_from_an_invitation_to_the_first_call(party: Party) -> None:
    given = Invitation.from_text(party.invitation("north").to_text())
    made = join(given)
    assert (made.name, made.consortium, made.service_address) == ("north", NAME, party.address)
    assert made.coordinator == public("coordinator")
    place = party.directory("north", None)
    made.save(place)
    assert (place / "leaf.key").stat().st_mode & 0o777 == 0o600
    with open_channel(place) as channel:
        stub = rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
        assert [m.name for m in stub.Members(pb.Nothing(), timeout=5).members] == ["north"]


def test_both_ends_show_the_same_fingerprints(party: Party) -> None:
    """What people read to each other by telephone comes from different bytes at each end."""
    from cohortium.common.protocol import signing

    made = join(party.invitation("north"))
    member = party.register.member("north")
    assert member is not None
    assert made.request == member.request
    assert made.identity == signing.fingerprint(signing.public_from_raw(member.identity))
    assert made.root_print == fingerprint(party.issuer.root_pem)
    assert made.coordinator_print == signing.fingerprint(signer("coordinator").public_key())


def test_the_coordinator_never_sees_a_key(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[pb.EnrolmentRequest] = []
    serve = _Enrolment.Enrol

    def spied(self: Any, request: Any, *rest: Any) -> Any:
        seen.append(request)
        return serve(self, request, *rest)

    monkeypatch.setattr(_Enrolment, "Enrol", spied)
    party.enrolment.stop(0).wait()  # type: ignore[union-attr]
    party.service.stop(0).wait()  # type: ignore[union-attr]
    party.start()
    made = join(party.invitation("north"))
    (request,) = seen
    sent = request.SerializeToString()
    assert b"PRIVATE" not in sent and signer("north").private_bytes_raw() not in sent
    assert read_csr(request.csr)[1] == load_chain(made.chain)[0].public_key()
    assert b"PRIVATE" in made.key and "PRIVATE" not in repr(made)


def test_invitations_that_do_not_work(party: Party) -> None:
    used = party.invitation("north")
    join(used)
    refused("INVITE-REFUSED", join, used)
    ended = party.invitation("south", valid_until=datetime.now(UTC) - timedelta(seconds=1))
    refused("INVITE-EXPIRED", join, ended)
    renamed = dataclasses.replace(party.invitation("south"), name="west")
    refused("INVITE-REFUSED", join, renamed)
    refused("ENROL-KEYS", join, party.invitation("south"), supernode_public="")
    refused("ENROL-KEYS", join, party.invitation("south"), supernode_public="ssh-ed25519 AAAA")
    refused("ENROL-KEYS", join, party.invitation("south"), supernode_public=supernode("north"))


def test_a_server_under_another_root_gets_no_token(party: Party, tmp_path: Path) -> None:
    """The invitation names the root: whoever answers at that address without it learns nothing."""
    other = make_pki(tmp_path / "other")
    given = party.invitation("north", root_pem=other.root_pem)
    error = refused("COORDINATOR-FOREIGN", join, given)
    assert error.hint
    assert party.register.invited(given.token) == ("north", "site")


def _lying(party: Party, monkeypatch: pytest.MonkeyPatch, change: Callable[[pb.EnrolmentReply], None]) -> None:
    serve = _Enrolment.Enrol

    def lie(self: Any, *given: Any) -> Any:
        reply = serve(self, *given)
        change(reply)
        return reply

    for running in (party.enrolment, party.service):
        running.stop(0).wait()  # type: ignore[union-attr]
    monkeypatch.setattr(_Enrolment, "Enrol", lie)
    party.start()


@pytest.mark.parametrize("what", ["chain", "name", "consortium", "coordinator", "service_address", "own_leaf", "none"])
def test_an_answer_that_does_not_fit_is_refused(party: Party, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Red when any one check of the reply is taken out."""

    def change(reply: pb.EnrolmentReply) -> None:
        if what == "chain":
            reply.chain = leaf(party.issuer, "north").chain  # of a key that the coordinator has
        elif what == "own_leaf":
            reply.chain = b""
        elif what == "coordinator":
            reply.coordinator = b"short"
        elif what == "service_address":
            reply.service_address = "evil.example.org:1/x"
        elif what != "none":
            setattr(reply, what, "another")

    _lying(party, monkeypatch, change)
    if what == "none":
        assert join(party.invitation("north")).name == "north"
    else:
        refused("ENROL-REPLY", join, party.invitation("north"))


def test_a_researcher_brings_no_keys(party: Party) -> None:
    given = party.invitation("mia", role="researcher")
    made = enrol(given)
    assert owner_of(made.chain).role == "researcher" and made.identity == ""
    refused("ENROL-KEYS", join, party.invitation("eva", role="researcher"))


# ---- renewal ------------------------------------------------------------------------------------------------


def test_a_renewal_changes_key_and_certificate(party: Party) -> None:
    place = party.directory("north", party.member("north"))
    before = read_leaf(place)
    renew(place)
    after = read_leaf(place)
    assert after[0] != before[0] and after[1] != before[1]
    assert sorted(p.name for p in place.iterdir()) == ["courier.toml", "leaf.key", "leaf.pem", "root.pem"]
    renew(place)


@pytest.mark.parametrize("step", range(1, 4))
def test_a_renewal_that_is_killed_leaves_a_pair_that_works(
    party: Party, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed before each change of the directory. Red when certificate and key are written in another order."""
    place = party.directory("north", party.member("north"))
    steps = [0]

    def may_die(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            steps[0] += 1
            if steps[0] == step:
                raise KeyboardInterrupt
            return real(*given)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(enrolment, "write_file", may_die(enrolment.write_file))
        patch.setattr(enrolment, "finish_renewal", may_die(enrolment.finish_renewal))
        with pytest.raises(KeyboardInterrupt):
            renew(place)
    renew(place)
    with open_channel(place) as channel:
        stub = rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
        assert stub.Members(pb.Nothing(), timeout=5).members


def test_a_renewal_is_refused_to_who_is_out(party: Party) -> None:
    place = party.directory("north", party.member("north"))
    before = read_leaf(place)
    party.register.revoke("north")
    refused("MEMBER-REVOKED", renew, place)
    assert read_leaf(place) == before
    ended = party.directory("south", leaf(party.issuer, "south", now=datetime.now(UTC) - 48 * HOUR))
    refused("CERT-EXPIRED", renew, ended)


def test_a_renewed_certificate_of_another_is_not_taken(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    from cohortium.server.service import _Consortium

    def lie(self: Any, *_: Any) -> pb.Certificate:
        return pb.Certificate(chain=leaf(party.issuer, "north").chain)

    place = party.directory("north", party.member("north"))
    for running in (party.enrolment, party.service):
        running.stop(0).wait()  # type: ignore[union-attr]
    monkeypatch.setattr(_Consortium, "Renew", lie)
    party.start()
    place = party.directory("north", None)
    before = read_leaf(place)
    refused("ENROL-REPLY", renew, place)
    assert read_leaf(place) == before

"""The coordinator's services: Consortium (mutual TLS) and Enrolment (server's certificate only), on ports of their own.

Who may call what stands in METHODS, as the comments of consortium.proto say. `server/calls` checks the caller; here
is what each method does, and that a member sees only what concerns it: a run that is not its own looks like none.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CohortiumError
from cohortium.common.proposals import APPROVAL, approval_statement, read_proposal
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol.certificates import COORDINATOR, RESEARCHER, SITE, fingerprint, read_csr
from cohortium.common.protocol.invitation import check_identity, check_rotation
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.service import (
    CALL_S,
    MOST_RELAY_BYTES,
    MOST_REQUEST_BYTES,
    ROW_CHUNK_BYTES,
    ROWS_S,
    ServiceCode,
)
from cohortium.common.protocol.signing import SIGNATURE_BYTES, public_from_raw, verify_statement
from cohortium.common.protocol.sockets import FRAME_ROOM_BYTES
from cohortium.server.attempts import Attempts
from cohortium.server.calls import Caller, Calls, Refusal, Rule, said_version
from cohortium.server.listening import Listening, listen
from cohortium.server.pki import Issuer
from cohortium.server.register import Member, Register, RunRow

_LOG = logging.getLogger("cohortium.server.service")
MOST_ROWS = 1_000_000_000
MOST_CHECKPOINT = 16 * 1024
SERVICE_THREADS = 256
ENROL_THREADS = 8


def _rule(*roles: str, deadline_s: float | None = CALL_S, most: int = MOST_REQUEST_BYTES, at_once: int = 4) -> Rule:
    return Rule(roles=frozenset(roles), deadline_s=deadline_s, most_bytes=most, at_once=at_once)


METHODS: dict[str, Rule] = {
    "Renew": _rule(SITE, RESEARCHER),
    "Rotate": _rule(SITE),
    "Members": _rule(SITE, COORDINATOR),
    "Proposals": _rule(SITE),
    "Approve": _rule(SITE),
    "Relay": _rule(SITE, deadline_s=None, most=MOST_RELAY_BYTES + FRAME_ROOM_BYTES, at_once=16),
    "Witness": _rule(SITE),
    "Status": _rule(SITE, RESEARCHER, COORDINATOR),
    "Rows": _rule(SITE, RESEARCHER, COORDINATOR, deadline_s=ROWS_S, at_once=2),
    "Revoke": _rule(COORDINATOR),
    "Stop": _rule(COORDINATOR),
}
"""Every method of Consortium: who may call it, and within what limits."""
ENROLMENT = {"Enrol": _rule()}


class Backing(Protocol):
    """What the service asks of the rest of the coordinator. A CohortiumError whose code is a ServiceCode reaches
    the caller as that code, anything else as INTERNAL."""

    def status(self, run: str | None, member: Member) -> dict[str, Any]:
        """Of one run, or (None) of every run that the member may see. Plain JSON values."""

    def rows(self, run: str, rows: int, format: str) -> Iterator[bytes]:
        """A finished run's synthetic rows as the bytes of one file; 0 rows: the release's own number."""

    def stop(self, run: str) -> None: ...

    def witness(self, site: str, checkpoint: str) -> list[str]:
        """Co-signatures over a site's checkpoint, "name hex" each."""


class Relays(Protocol):
    """What the service asks of the hub (server/hub)."""

    def relay(self, site: str, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]: ...

    def revoke(self, site: str) -> None: ...


class Addresses(Protocol):
    """host:port of Consortium and of Flower's Fleet API, as a site is to dial them."""

    @property
    def service(self) -> str: ...

    @property
    def fleet(self) -> str: ...


def start_service(
    *,
    host: str,
    port: int,
    issuer: Issuer | Callable[[], Issuer],
    register: Register,
    hub: Relays,
    backing: Backing,
    server_chain: Path | bytes,
    server_key: Path | bytes,
    coordinator_key_public: Ed25519PublicKey,
    consortium: str,
    on_call: Callable[[str, str], None] | None = None,
) -> Listening:
    """Serve Consortium. issuer: a function where it may be replaced while this runs. on_call: told the name and the
    version of whoever calls. server_chain and server_key as
    paths are looked at before each handshake. Raises UsageError PORT-BUSY, Refused TLS-VERSION."""
    calls = Calls(rules=METHODS, consortium=consortium, register=register, on_revoked=hub.revoke, on_call=on_call)
    servicer = _Consortium(_asked(issuer), register, hub, backing, coordinator_key_public)
    try:
        return listen(
            [calls.handlers("Consortium", servicer)],
            host=host,
            port=port,
            chain=server_chain,
            key=server_key,
            root=_asked(issuer)().root_pem,
            require_client=True,
            threads=SERVICE_THREADS,
            connections=1000,
            most_bytes=MOST_RELAY_BYTES,
            on_stop=calls.close,
        )
    except BaseException:
        calls.close()
        raise


def start_enrolment(
    *,
    host: str,
    port: int,
    issuer: Issuer | Callable[[], Issuer],
    register: Register,
    server_chain: Path | bytes,
    server_key: Path | bytes,
    coordinator_key_public: Ed25519PublicKey,
    consortium: str,
    addresses: Addresses,
    on_enrolled: Callable[[Member, str], None] = lambda member, version: None,
    attempts: Attempts | None = None,
) -> Listening:
    """Serve Enrolment; addresses are told to each new member.

    on_enrolled: told of each new member and of the version that it runs, to register its SuperNode key with Flower. If
    it fails the enrolment holds all the same, because the token is used up: whoever serves registers all active
    members again from time to time.
    """
    servicer = _Enrolment(
        _asked(issuer),
        register,
        pb.EnrolmentReply(
            consortium=consortium,
            coordinator=coordinator_key_public.public_bytes_raw(),
            service_address=addresses.service,
            fleet_address=addresses.fleet,
        ),
        on_enrolled,
        attempts or Attempts(),
    )
    return listen(
        [Calls(rules=ENROLMENT).handlers("Enrolment", servicer)],
        host=host,
        port=port,
        chain=server_chain,
        key=server_key,
        root=_asked(issuer)().root_pem,
        require_client=False,
        threads=ENROL_THREADS,
        connections=100,
        most_bytes=MOST_REQUEST_BYTES,
    )


class _Consortium:
    """One method of this class for each of the service; the caller has been checked against METHODS."""

    def __init__(
        self,
        issuer: Callable[[], Issuer],
        register: Register,
        hub: Relays,
        backing: Backing,
        coordinator: Ed25519PublicKey,
    ) -> None:
        self._issuer, self._register, self._hub, self._backing = issuer, register, hub, backing
        self._coordinator = coordinator

    def Renew(self, request: pb.CertificateRequest, caller: Caller, _: Any) -> pb.Certificate:
        return pb.Certificate(chain=_sign(self._issuer(), request.csr, caller.member))

    def Rotate(self, request: pb.Rotation, caller: Caller, _: Any) -> pb.Member:
        site, member = caller.name, caller.member
        if any(row.state in ("approved", "running", "stopping") for row in self._rows_of(site)):
            # The sites of a run verify each other by the identities that its proposal names.
            raise Refusal(ServiceCode.ROTATE_REFUSED)
        try:
            old, new = public_from_raw(member.identity), public_from_raw(request.identity)
            officer = public_from_raw(member.officer)
            for signer, signature in ((old, request.by_old), (new, request.by_new), (officer, request.by_officer)):
                check_rotation(signer, signature, site=site, old=old, new=new)
            return _told(self._register.rotate(site, request.identity))
        except CohortiumError:
            raise Refusal(ServiceCode.ROTATE_REFUSED) from None

    def Members(self, _: pb.Nothing, caller: Caller, __: Any) -> pb.MemberList:
        members = self._register.members()
        if caller.role == SITE:
            members = [m for m in members if m.role == SITE]
        return pb.MemberList(members=[_told(member) for member in members])

    def Proposals(self, _: pb.Nothing, caller: Caller, __: Any) -> Iterator[pb.Proposal]:
        for run, envelope, state in self._register.proposals(caller.name):
            yield pb.Proposal(run=run, envelope=envelope, state=state)

    def Approve(self, request: pb.Approval, caller: Caller, _: Any) -> pb.Nothing:
        site = caller.name
        if self._register.approvals(request.run).get(site) is None:
            raise Refusal(ServiceCode.RUN_UNKNOWN)
        envelope = self._register.envelope(request.run)
        if digest(envelope) != request.proposal:
            raise Refusal(ServiceCode.PROPOSAL_OTHER)
        if not request.declined:
            statement = approval_statement(site, read_proposal(envelope, self._coordinator))
            _check_officer(caller.member, statement, request.signature)
        elif request.signature:
            raise Refusal(ServiceCode.MALFORMED)
        self._register.approve(
            request.run, site, proposal=request.proposal, signature=request.signature, declined=request.declined
        )
        return pb.Nothing()

    def Relay(self, frames: Iterator[pb.Frame], caller: Caller, context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        return self._hub.relay(caller.name, frames, context)

    def Witness(self, request: pb.Checkpoint, caller: Caller, _: Any) -> pb.Checkpoint:
        if not 0 < len(request.text) <= MOST_CHECKPOINT:
            raise Refusal(ServiceCode.MALFORMED)
        try:
            cosigned = self._backing.witness(caller.name, request.text)
        except CohortiumError:
            raise Refusal(ServiceCode.WITNESS_REFUSED) from None
        return pb.Checkpoint(text=request.text, cosigned=cosigned)

    def Status(self, request: pb.RunName, caller: Caller, _: Any) -> pb.RunStatus:
        if request.run:
            self._check_run(request.run, caller)
        status = self._backing.status(request.run or None, caller.member)
        return pb.RunStatus(json=json.dumps(status, sort_keys=True, allow_nan=False))

    def Rows(self, request: pb.RowsRequest, caller: Caller, _: Any) -> Iterator[pb.RowChunk]:
        self._check_run(request.run, caller)
        if request.format not in ("parquet", "csv") or request.rows > MOST_ROWS:
            raise Refusal(ServiceCode.MALFORMED)
        if self._register.run_row(request.run).state != "finished":
            raise Refusal(ServiceCode.RUN_NOT_READY)
        for data in self._backing.rows(request.run, request.rows, request.format):
            for at in range(0, len(data), ROW_CHUNK_BYTES):
                yield pb.RowChunk(data=data[at : at + ROW_CHUNK_BYTES])

    def Revoke(self, request: pb.MemberName, _: Caller, __: Any) -> pb.Nothing:
        if self._register.member(request.name) is None:
            raise Refusal(ServiceCode.NAME_UNKNOWN)
        self._register.revoke(request.name)
        self._hub.revoke(request.name)
        return pb.Nothing()

    def Stop(self, request: pb.RunName, caller: Caller, _: Any) -> pb.Nothing:
        self._check_run(request.run, caller)
        self._backing.stop(request.run)
        return pb.Nothing()

    def _check_run(self, run: str, caller: Caller) -> None:
        if not self._register.entitled(run, caller.name):
            raise Refusal(ServiceCode.RUN_UNKNOWN)

    def _rows_of(self, site: str) -> list[RunRow]:
        return [self._register.run_row(run) for run, _, _ in self._register.proposals(site)]


class _Enrolment:
    """A site that has an invitation and no certificate yet. The answer to a wrong, a used and an ended token is the
    same; so is the time it takes, as all of them are one missing row."""

    def __init__(
        self,
        issuer: Callable[[], Issuer],
        register: Register,
        reply: pb.EnrolmentReply,
        on_enrolled: Callable[[Member, str], None],
        attempts: Attempts,
    ) -> None:
        self._issuer, self._register, self._reply = issuer, register, reply
        self._on_enrolled, self._attempts = on_enrolled, attempts

    def Enrol(self, request: pb.EnrolmentRequest, _: None, context: grpc.ServicerContext) -> pb.EnrolmentReply:
        peer = context.peer()
        if not self._attempts.allowed(peer):
            raise Refusal(ServiceCode.RATE_LIMITED)
        asked = _asked_owner(request.csr)
        invited = self._register.invited(request.token)
        if invited is None or invited != asked:
            self._attempts.failed(peer)
            raise Refusal(ServiceCode.INVITE_REFUSED)
        _check_keys(invited[1], request)
        self._wait_for_a_later_second(invited[0])
        try:
            member = self._register.admit(
                request.token,
                identity=request.identity,
                officer=request.officer,
                supernode=request.supernode,
                request=fingerprint(request.csr),
            )
        except CohortiumError as error:
            refused = error.code == ServiceCode.INVITE_REFUSED  # two at the same time with one token
            raise Refusal(ServiceCode.INVITE_REFUSED if refused else ServiceCode.ENROL_KEYS) from None
        chain = _sign(self._issuer(), request.csr, member)
        try:
            self._on_enrolled(member, said_version(context))
        except Exception as error:
            _LOG.error("the SuperNode of a new member is not registered yet: %s", type(error).__name__)
        reply = pb.EnrolmentReply(name=member.name, chain=chain)
        reply.MergeFrom(self._reply)
        return reply

    def _wait_for_a_later_second(self, name: str) -> None:
        """A certificate tells its second only, and one of the second of a revocation counts as revoked."""
        member = self._register.member(name)
        if member is not None and member.revoked_at is not None:
            late = member.revoked_at + 1 - time.time()
            if late > 2:
                raise Refusal(ServiceCode.UNAVAILABLE)  # the clock was set back
            time.sleep(max(0.0, late))


# ---- inside -------------------------------------------------------------------------------------------------


def _check_officer(member: Member, statement: dict[str, Any], signature: bytes) -> None:
    try:
        if len(signature) != SIGNATURE_BYTES:
            raise Refusal(ServiceCode.APPROVAL_SIGNATURE)
        officer = public_from_raw(member.officer)
        verify_statement(officer, APPROVAL, statement, signature, code=ServiceCode.APPROVAL_SIGNATURE)
    except CohortiumError:
        raise Refusal(ServiceCode.APPROVAL_SIGNATURE) from None


def _sign(issuer: Issuer, csr: bytes, member: Member) -> bytes:
    try:
        return issuer.sign_csr(csr, role=member.role, name=member.name)
    except CohortiumError as error:
        ours = error.code == "ISSUER-EXPIRED"
        raise Refusal(ServiceCode.UNAVAILABLE if ours else ServiceCode.CSR_REFUSED) from None


def _asked_owner(csr: bytes) -> tuple[str, str]:
    try:
        owner, _ = read_csr(csr)
    except CohortiumError:
        raise Refusal(ServiceCode.CSR_REFUSED) from None
    return owner.name, owner.role


def _check_keys(role: str, request: pb.EnrolmentRequest) -> None:
    """A site shows its identity's signature over everything it sends; others send a request only."""
    if role != SITE:
        if request.identity or request.identity_proof or request.officer or request.supernode:
            raise Refusal(ServiceCode.ENROL_KEYS)
        return
    try:
        identity = public_from_raw(request.identity)
        public_from_raw(request.officer)
        check_identity(
            identity,
            request.identity_proof,
            token=request.token,
            csr=request.csr,
            officer=request.officer,
            supernode=request.supernode,
        )
    except CohortiumError:
        raise Refusal(ServiceCode.ENROL_PROOF) from None
    if not is_supernode_key(request.supernode):
        raise Refusal(ServiceCode.ENROL_KEYS)


def is_supernode_key(text: str) -> bool:
    """Whether a text is one OpenSSH public key on P-384, as Flower wants it."""
    try:
        if len(text) > 1024 or "\n" in text.strip():
            return False
        key = serialization.load_ssh_public_key(text.encode("ascii"))
    except Exception:
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def _told(member: Member) -> pb.Member:
    return pb.Member(
        name=member.name, role=member.role, state=member.state, identity=member.identity, since=member.since
    )


def _asked(issuer: Issuer | Callable[[], Issuer]) -> Callable[[], Issuer]:
    return (lambda: issuer) if isinstance(issuer, Issuer) else issuer

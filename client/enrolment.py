"""How a member gets its certificate, from an invitation the first time and by its last certificate from then on.

The transport key is made here and never leaves this machine; the coordinator sees a request signed by it. The
identity signs the request together with the token and the other public keys, so nobody on the way can exchange one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cohortium.client.connect import (  # before grpc: it turns TLS 1.2 off
    check_address,
    connect_with,
    explain,
    finish_renewal,
    open_channel,
    read_leaf,
    read_root,
)
from cohortium.common.protocol.certificates import (
    CLIENT,
    CertificateError,
    Owner,
    check_chain,
    fingerprint,
    fits,
    key_pem,
    make_csr,
    new_key,
    owner_of,
    write_file,
)

import grpc  # isort: skip
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CohortiumError, ProtocolError, Refused, UsageError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol import signing
from cohortium.common.protocol.certificates import SITE
from cohortium.common.protocol.invitation import Invitation, prove_identity

__all__ = ["Enrolled", "Invitation", "enrol", "renew"]

TIMEOUT_S = 25.0
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrolled:
    """What enrolment gave. chain, key: PEM. coordinator: its Ed25519 key, raw; every proposal is signed by it.

    request, identity, coordinator_print, root_print: fingerprints that both ends read to each other.
    """

    name: str
    role: str
    consortium: str
    chain: bytes
    key: bytes = field(repr=False)
    root: bytes
    coordinator: bytes
    service_address: str
    fleet_address: str
    request: str
    identity: str

    @property
    def coordinator_print(self) -> str:
        return signing.fingerprint(signing.public_from_raw(self.coordinator))

    @property
    def root_print(self) -> str:
        return fingerprint(self.root)

    def save(self, courier: Path) -> None:
        """Put root.pem, leaf.key and leaf.pem into a member's directory."""
        write_file(courier / "root.pem", self.root, 0o644)
        write_file(courier / "leaf.key", self.key, 0o600)
        write_file(courier / "leaf.pem", self.chain, 0o644)


def enrol(
    invitation: Invitation,
    *,
    identity: Ed25519PrivateKey | None = None,
    officer_public: Ed25519PublicKey | None = None,
    supernode_public: str = "",
    now: datetime | None = None,
) -> Enrolled:
    """Use an invitation: make a transport key, prove the identity, get a certificate. Nothing is written to disk.

    identity, officer_public and supernode_public (OpenSSH, P-384) are a site's; other roles have none. Raises
    Refused INVITE-EXPIRED (nothing was sent), INVITE-REFUSED, ENROL-KEYS, RATE-LIMITED, …; CertificateError
    ENROL-REPLY for an answer that does not fit what was asked; PeerUnreachable.
    """
    if invitation.expired(now):
        raise Refused("INVITE-EXPIRED", "the invitation has ended", hint="ask the coordinator for a new one")
    if (invitation.role == SITE) != (identity is not None and officer_public is not None and bool(supernode_public)):
        raise UsageError("ENROL-KEYS", "a site enrols an identity, an officer and a SuperNode key, others none of them")
    key = new_key()
    owner = Owner(consortium=invitation.consortium, role=invitation.role, name=invitation.name)
    csr = make_csr(key, consortium=owner.consortium, role=owner.role, name=owner.name)
    request = pb.EnrolmentRequest(token=invitation.token, csr=csr)
    told = ""
    if identity is not None and officer_public is not None:
        request.identity = identity.public_key().public_bytes_raw()
        request.officer, request.supernode = officer_public.public_bytes_raw(), supernode_public
        request.identity_proof = prove_identity(
            identity, token=invitation.token, csr=csr, officer=officer_public, supernode=supernode_public
        )
        told = signing.fingerprint(identity.public_key())
    with connect_with(check_address(invitation.enrol_address), invitation.root_pem) as channel:
        stub = rpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        reply = _called(lambda: stub.Enrol(request, timeout=TIMEOUT_S))
    pem = key_pem(key)
    _check(reply.chain, pem, invitation.root_pem, owner)
    try:
        signing.public_from_raw(reply.coordinator)
        service, fleet = check_address(reply.service_address), check_address(reply.fleet_address)
    except (ValueError, CohortiumError):
        raise _bad_reply() from None
    if (reply.name, reply.consortium) != (owner.name, owner.consortium):
        raise _bad_reply()
    return Enrolled(
        name=owner.name,
        role=owner.role,
        consortium=owner.consortium,
        chain=reply.chain,
        key=pem,
        root=invitation.root_pem,
        coordinator=reply.coordinator,
        service_address=service,
        fleet_address=fleet,
        request=fingerprint(csr),
        identity=told,
    )


def renew(courier: Path) -> None:
    """A new key and certificate for the same name, asked for with the old one; it must still be valid.

    The new key is on disk before anything is asked and the pair changes over in one step, so whatever is cut off
    where, a pair that fits remains. Channels that are open keep the old certificate: open others.
    """
    chain, _ = read_leaf(courier)
    owner, key = owner_of(chain), new_key()
    pem, following = key_pem(key), courier / "leaf.key.next"
    write_file(following, pem, 0o600)
    csr = make_csr(key, consortium=owner.consortium, role=owner.role, name=owner.name)
    with open_channel(courier) as channel:
        stub = rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
        reply = _called(lambda: stub.Renew(pb.CertificateRequest(csr=csr), timeout=TIMEOUT_S), courier)
    _check(reply.chain, pem, read_root(courier), owner)
    write_file(courier / "leaf.pem", reply.chain, 0o644)  # from here on leaf.key.next is the key (connect.read_leaf)
    finish_renewal(courier, reply.chain)


def _called(call: Callable[[], T], courier: Path | None = None) -> T:
    try:
        return call()
    except grpc.RpcError as error:
        raise explain(error, courier) from None


def _check(chain: bytes, key: bytes, root: bytes, owner: Owner) -> None:
    """A certificate that we were given is ours, for our key, under the root that we know."""
    try:
        good = check_chain(chain, root, usage=CLIENT) == owner and fits(chain, key)
    except CertificateError as error:
        if error.code in ("CERT-NOT-YET-VALID", "CERT-EXPIRED", "CERT-ISSUER-EXPIRED"):
            raise CertificateError(
                error.code,
                "the certificate that the coordinator made is not valid by this machine's clock",
                hint="compare this machine's clock with the coordinator's (timedatectl)",
            ) from None
        good = False
    if not good:
        raise _bad_reply()


def _bad_reply() -> ProtocolError:
    return ProtocolError(
        "ENROL-REPLY",
        "the coordinator's answer does not fit what was asked",
        hint="do not go on: compare the fingerprints with the coordinator by telephone",
    )

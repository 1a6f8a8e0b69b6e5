"""A member's way to the coordinator's service, and what a failed connection means for hospital IT.

Over TLS 1.3 a refused certificate looks like any cut connection, so one's own certificate is looked at first, on this
machine: each thing that can be wrong with it ends in its own code and fix. What only the other end knows (revoked,
unknown, not allowed) comes back as a fixed code of `protocol/service`.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
import tomllib
from datetime import datetime
from pathlib import Path
from typing import cast

from cohortium.common.protocol.certificates import (  # before grpc: it turns TLS 1.2 off
    CLIENT,
    CertificateError,
    Owner,
    channel_credentials,
    check_chain,
    fits,
    read_private,
    sync_folder,
)

import grpc  # isort: skip

from cohortium.common.errors import CohortiumError, PeerUnreachable, ProtocolError, Refused, UsageError
from cohortium.common.protocol.service import MOST_RELAY_BYTES, ServiceCode, code_of, user_agent
from cohortium.common.protocol.sockets import client_options

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")
_PROBE_S = 5.0
_TRIES, _TRY_AGAIN_S = 3, 0.05
_INVITE_AGAIN = "ask the coordinator for a new invitation, then: cohortium site init INVITATION"
_CLOCK = "compare this machine's clock with the coordinator's (timedatectl), then try again"
_OWN_FIXES = {
    "CERT-FORMAT": _INVITE_AGAIN,
    "CERT-FOREIGN": f"leaf.pem and root.pem are of two consortia: put back the ones of this site, or {_INVITE_AGAIN}",
    "CERT-EXPIRED": f"the courier, which renews it, was off for too long, or a clock is wrong; {_INVITE_AGAIN}",
    "CERT-NOT-YET-VALID": _CLOCK,
    "CERT-ISSUER-EXPIRED": f"{_CLOCK}; if the clock is right, the coordinator has to make a new issuer",
    "CERT-PURPOSE": f"leaf.pem is not a member's certificate: put back the one of this site, or {_INVITE_AGAIN}",
    "CERT-NAME": _INVITE_AGAIN,
}
_TOLD: dict[ServiceCode, tuple[str, str]] = {
    ServiceCode.TLS_VERSION: ("the coordinator accepts TLS 1.3 only", "let no proxy stand between that ends TLS"),
    ServiceCode.CERT_MISSING: ("the coordinator saw no certificate of ours", _INVITE_AGAIN),
    ServiceCode.CERT_FOREIGN: ("our certificate is of another consortium", _OWN_FIXES["CERT-FOREIGN"]),
    ServiceCode.CERT_EXPIRED: ("our certificate has ended by the coordinator's clock", _OWN_FIXES["CERT-EXPIRED"]),
    ServiceCode.CERT_NOT_YET_VALID: ("our certificate begins in the future by the coordinator's clock", _CLOCK),
    ServiceCode.CERT_PURPOSE: ("our certificate is made for another purpose", _OWN_FIXES["CERT-PURPOSE"]),
    ServiceCode.CERT_NAME: ("our certificate does not name a member", _INVITE_AGAIN),
    ServiceCode.MEMBER_UNKNOWN: (
        "our certificate is good, but nobody of this name and role is enrolled",
        f"tell the coordinator (its register may have been put back to an older one); {_INVITE_AGAIN}",
    ),
    ServiceCode.MEMBER_REVOKED: (
        "the coordinator has revoked this member",
        f"stop the courier (cohortium site pause) and ask the coordinator why; to come back, {_INVITE_AGAIN}",
    ),
    ServiceCode.ROLE_DENIED: (
        "a member of this role may not do this",
        "use the directory of the member who may: a site, a researcher and a coordinator have different rights",
    ),
    ServiceCode.DEADLINE_MISSING: ("the call has no deadline", "this is a bug of ours: report it"),
    ServiceCode.DEADLINE_TOO_LONG: ("the call's deadline is too long", "this is a bug of ours, or a clock jumped"),
    ServiceCode.TOO_LARGE: ("the request is too large", "this is a bug of ours: report it"),
    ServiceCode.MALFORMED: ("the request is malformed", "bring both ends to the same version of Cohortium"),
    ServiceCode.BUSY: ("too many calls of this member at once", "wait a little; is the courier running twice?"),
    ServiceCode.INVITE_REFUSED: (
        "this invitation is not valid: unknown, used, ended or for another name",
        "ask the coordinator for a new invitation",
    ),
    ServiceCode.ENROL_PROOF: ("the identity's signature does not fit the request", "this is a bug of ours: report it"),
    ServiceCode.ENROL_KEYS: (
        "the coordinator does not take these keys: the name is enrolled with others, or somebody else has one of them",
        "ask the coordinator to revoke this name first, and begin with an empty directory",
    ),
    ServiceCode.RATE_LIMITED: ("too many failed attempts from this address", "wait a minute"),
    ServiceCode.CSR_REFUSED: ("the coordinator does not sign this request", "this is a bug of ours: report it"),
    ServiceCode.ROTATE_REFUSED: (
        "the coordinator does not take this new identity",
        "wait until no run of this site is under way, and use a key that was never used before",
    ),
    ServiceCode.NAME_UNKNOWN: ("nobody of this name takes part", "cohortium sites list"),
    ServiceCode.RUN_UNKNOWN: ("the coordinator has no such run for this member", "cohortium site inspect"),
    ServiceCode.RUN_NOT_READY: ("the run has not finished", "cohortium watch"),
    ServiceCode.RUN_CLOSED: ("the run no longer waits for approvals", "cohortium site inspect"),
    ServiceCode.PROPOSAL_OTHER: ("another proposal is open under this name", "cohortium site inspect"),
    ServiceCode.APPROVAL_SIGNATURE: (
        "the approval is not signed by the officer's key that was enrolled",
        "approve with the officer's key that this site enrolled with",
    ),
    ServiceCode.WITNESS_REFUSED: (
        "the coordinator's copy of the ledger does not agree with this one",
        "an older ledger was put back, or two machines use it: bring the newest one back",
    ),
    ServiceCode.UNAVAILABLE: ("the coordinator cannot do this now", "try again, and tell the coordinator if it stays"),
    ServiceCode.INTERNAL: ("the coordinator failed", "tell the coordinator: its log says where"),
}


# ---- our own certificate ------------------------------------------------------------------------------------


def read_leaf(courier: Path) -> tuple[bytes, bytes]:
    """(chain, key) of a member's directory in PEM; CertificateError CERT-MISSING, CERT-KEY, UsageError KEY-….

    A renewal that was cut off between its two files is finished here; one that is under way is waited for.
    """
    for _ in range(_TRIES):
        try:
            chain = (courier / "leaf.pem").read_bytes()
        except OSError:
            raise CertificateError(
                "CERT-MISSING",
                "there is no certificate of this member",
                where=(str(courier / "leaf.pem"),),
                hint=_INVITE_AGAIN,
            ) from None
        finish_renewal(courier, chain)
        key = read_private(courier / "leaf.key")
        if fits(chain, key):
            return chain, key
        time.sleep(_TRY_AGAIN_S)
    raise CertificateError(
        "CERT-KEY",
        "leaf.pem is not the certificate of leaf.key",
        where=(str(courier / "leaf.pem"), str(courier / "leaf.key")),
        hint=f"put back the pair of this site, or {_INVITE_AGAIN}",
    )


def finish_renewal(courier: Path, chain: bytes) -> None:
    """Let the key that waits in leaf.key.next be the key, if it is the one of the certificate that is in place."""
    following = courier / "leaf.key.next"
    try:
        if following.exists() and fits(chain, read_private(following)):
            os.replace(following, courier / "leaf.key")
            sync_folder(courier)
    except (UsageError, FileNotFoundError):
        pass  # another process has just done it


def check_own(courier: Path, *, now: datetime | None = None) -> Owner:
    """Whom our certificate names, if the coordinator can accept it; CertificateError with the cause and its fix."""
    chain, _ = read_leaf(courier)
    try:
        owner = check_chain(chain, read_root(courier), usage=CLIENT, now=now)
        if owner.role == "service":
            raise CertificateError("CERT-NAME", "the certificate is not a member's")
    except CertificateError as error:
        hint = error.hint or _OWN_FIXES.get(error.code, "")
        raise CertificateError(error.code, error.sentence, where=(str(courier / "leaf.pem"),), hint=hint) from None
    return owner


def read_root(courier: Path) -> bytes:
    try:
        return (courier / "root.pem").read_bytes()
    except OSError:
        raise CertificateError(
            "ROOT-MISSING",
            "the consortium's root certificate is missing",
            where=(str(courier / "root.pem"),),
            hint="take it from the invitation",
        ) from None


# ---- connecting ---------------------------------------------------------------------------------------------


def service_address(courier: Path) -> str:
    """host:port of the coordinator's service, from courier.toml; UsageError COURIER-SETTINGS."""
    path = courier / "courier.toml"
    try:
        return check_address(tomllib.loads(path.read_text(encoding="utf-8"))["service_address"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError("COURIER-SETTINGS", "courier.toml cannot be read", where=(str(path),)) from None


def check_address(text: str) -> str:
    if not _ADDRESS.fullmatch(text):
        raise ValueError("an address is host:port")
    return text


def open_channel(courier: Path) -> grpc.Channel:
    """A channel to the coordinator's service with this member's certificate; it keeps the certificate that it was
    opened with, so open another one after a renewal. Connects on first use: see `explain`.

    Raises CertificateError (see `check_own`), UsageError COURIER-SETTINGS, KEY-….
    """
    check_own(courier)
    return connect_with(service_address(courier), read_root(courier), *read_leaf(courier))


def connect_with(address: str, root: bytes, chain: bytes | None = None, key: bytes | None = None) -> grpc.Channel:
    """A channel with given credentials (PEM); with chain and key mutual TLS."""
    options = [
        *client_options(max_envelope_bytes=MOST_RELAY_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.primary_user_agent", user_agent()),
    ]
    return grpc.secure_channel(address, channel_credentials(root, chain, key), options=options)


# ---- what went wrong ----------------------------------------------------------------------------------------


def explain(error: grpc.RpcError, courier: Path | None = None) -> CohortiumError:
    """The error that a failed call means, with its fix. courier: the member's directory, to look closer where the
    connection itself failed."""
    call = cast("object", error)  # whatever a stub raises is a Call as well, which the type stubs deny
    status, text = (call.code(), call.details() or "") if isinstance(call, grpc.Call) else (None, "")
    code = code_of(text)
    if code is not None:
        sentence, hint = _TOLD[code]
        kind = PeerUnreachable if code in (ServiceCode.UNAVAILABLE, ServiceCode.INTERNAL) else Refused
        return kind(code.value, sentence, hint=hint)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerUnreachable(
            "COORDINATOR-TIMEOUT",
            "the coordinator did not answer in time",
            hint="try again; if it stays, ask whether a firewall drops packets to the service's port",
        )
    if status is grpc.StatusCode.CANCELLED:
        return PeerUnreachable("LINK-CUT", "the coordinator ended the connection", hint="try again in a moment")
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PeerUnreachable("COORDINATOR-BUSY", "the coordinator takes no more calls now", hint="try again later")
    if status is grpc.StatusCode.UNAVAILABLE:
        if courier is not None:
            found = look_closer(courier)
            if found is not None:
                return found
        if "CERTIFICATE_VERIFY_FAILED" in text or "Hostname Verification" in text or "Peer name" in text:
            return _foreign()
        return _unreachable()
    return ProtocolError(
        "COORDINATOR-OTHER",
        f"something answers there that is not our coordinator's service (gRPC status {getattr(status, 'name', '?')})",
        hint="check service_address in courier.toml, and that both ends have the same version of Cohortium",
    )


def look_closer(courier: Path) -> CohortiumError | None:
    """Why no connection stands, by one made in full view: who answers, and whether our certificate is taken. None
    where all is well by now."""
    try:
        check_own(courier)
        host, _, port = service_address(courier).rpartition(":")
        context = ssl.create_default_context(cafile=str(courier / "root.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(courier / "leaf.pem", courier / "leaf.key")
    except CohortiumError as error:
        return error
    except (ssl.SSLError, OSError):
        return None
    host = host.strip("[]")
    try:
        raw = socket.create_connection((host, int(port)), _PROBE_S)
    except OSError:
        return _unreachable()
    try:
        with raw, context.wrap_socket(raw, server_hostname=host) as link:
            # The answer to a client's certificate comes after the handshake: ask for the first word of HTTP/2.
            link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            return None if link.recv(1) else _not_taken()
    except ssl.SSLCertVerificationError:
        return _foreign()
    except (ssl.SSLError, ConnectionError):
        return _not_taken()
    except OSError:
        return _unreachable()


def _unreachable() -> CohortiumError:
    return PeerUnreachable(
        "COORDINATOR-UNREACHABLE",
        "the coordinator's service cannot be reached",
        hint="check that service_address resolves and that the firewall lets this machine out to its port; "
        "if so, ask the coordinator whether it is serving",
    )


def _foreign() -> CohortiumError:
    return Refused(
        "COORDINATOR-FOREIGN",
        "whoever answers there has no valid certificate of this consortium for that name",
        hint="do not go on: compare this machine's clock and root.pem's fingerprint with the coordinator by telephone; "
        "a proxy that opens TLS has to let this address through untouched",
    )


def _not_taken() -> CohortiumError:
    return Refused(
        "CERT-REFUSED",
        "the coordinator ended the connection when it saw our certificate",
        hint=f"compare the clocks and root.pem's fingerprint with the coordinator by telephone; else {_INVITE_AGAIN}",
    )

"""What both ends of the coordinator's services agree on: fixed codes of refusal, sizes, times.

A call that fails ends with a gRPC status whose details are exactly one `ServiceCode`: no text of an exception, no
name and no number leaves. The status class (StatusCode) is for machines between, the code is for the other end.
"""

from __future__ import annotations

import importlib.metadata
import re
from enum import StrEnum

import grpc

MOST_RELAY_BYTES = 64 * 1024 * 1024
"""The longest envelope on a stream."""
MOST_REQUEST_BYTES = 64 * 1024
"""The longest request of any other method."""
ROW_CHUNK_BYTES = 256 * 1024
CALL_S = 30.0
"""The longest deadline of a short call."""
ROWS_S = 4 * 3600.0
"""The longest deadline of a download of rows."""


class ServiceCode(StrEnum):
    """Everything that a coordinator's service says to a caller it refuses."""

    # the connection and who calls
    TLS_VERSION = "TLS-VERSION"
    CERT_MISSING = "CERT-MISSING"
    CERT_FOREIGN = "CERT-FOREIGN"
    CERT_EXPIRED = "CERT-EXPIRED"
    CERT_NOT_YET_VALID = "CERT-NOT-YET-VALID"
    CERT_PURPOSE = "CERT-PURPOSE"
    CERT_NAME = "CERT-NAME"
    MEMBER_UNKNOWN = "MEMBER-UNKNOWN"
    MEMBER_REVOKED = "MEMBER-REVOKED"
    ROLE_DENIED = "ROLE-DENIED"
    # the call
    DEADLINE_MISSING = "DEADLINE-MISSING"
    DEADLINE_TOO_LONG = "DEADLINE-TOO-LONG"
    TOO_LARGE = "TOO-LARGE"
    MALFORMED = "MALFORMED"
    BUSY = "BUSY"
    # enrolment
    INVITE_REFUSED = "INVITE-REFUSED"
    ENROL_PROOF = "ENROL-PROOF"
    ENROL_KEYS = "ENROL-KEYS"
    RATE_LIMITED = "RATE-LIMITED"
    # what was asked for
    CSR_REFUSED = "CSR-REFUSED"
    ROTATE_REFUSED = "ROTATE-REFUSED"
    NAME_UNKNOWN = "NAME-UNKNOWN"
    RUN_UNKNOWN = "RUN-UNKNOWN"
    RUN_NOT_READY = "RUN-NOT-READY"
    RUN_CLOSED = "RUN-CLOSED"
    PROPOSAL_OTHER = "PROPOSAL-OTHER"
    APPROVAL_SIGNATURE = "APPROVAL-SIGNATURE"
    WITNESS_REFUSED = "WITNESS-REFUSED"
    # ours
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


_S = grpc.StatusCode
STATUS: dict[ServiceCode, grpc.StatusCode] = {
    ServiceCode.TLS_VERSION: _S.UNAUTHENTICATED,
    ServiceCode.CERT_MISSING: _S.UNAUTHENTICATED,
    ServiceCode.CERT_FOREIGN: _S.UNAUTHENTICATED,
    ServiceCode.CERT_EXPIRED: _S.UNAUTHENTICATED,
    ServiceCode.CERT_NOT_YET_VALID: _S.UNAUTHENTICATED,
    ServiceCode.CERT_PURPOSE: _S.UNAUTHENTICATED,
    ServiceCode.CERT_NAME: _S.UNAUTHENTICATED,
    ServiceCode.MEMBER_UNKNOWN: _S.UNAUTHENTICATED,
    ServiceCode.MEMBER_REVOKED: _S.PERMISSION_DENIED,
    ServiceCode.ROLE_DENIED: _S.PERMISSION_DENIED,
    ServiceCode.DEADLINE_MISSING: _S.INVALID_ARGUMENT,
    ServiceCode.DEADLINE_TOO_LONG: _S.INVALID_ARGUMENT,
    ServiceCode.TOO_LARGE: _S.RESOURCE_EXHAUSTED,
    ServiceCode.MALFORMED: _S.INVALID_ARGUMENT,
    ServiceCode.BUSY: _S.RESOURCE_EXHAUSTED,
    ServiceCode.INVITE_REFUSED: _S.PERMISSION_DENIED,
    ServiceCode.ENROL_PROOF: _S.INVALID_ARGUMENT,
    ServiceCode.ENROL_KEYS: _S.FAILED_PRECONDITION,
    ServiceCode.RATE_LIMITED: _S.RESOURCE_EXHAUSTED,
    ServiceCode.CSR_REFUSED: _S.INVALID_ARGUMENT,
    ServiceCode.ROTATE_REFUSED: _S.FAILED_PRECONDITION,
    ServiceCode.NAME_UNKNOWN: _S.NOT_FOUND,
    ServiceCode.RUN_UNKNOWN: _S.NOT_FOUND,
    ServiceCode.RUN_NOT_READY: _S.FAILED_PRECONDITION,
    ServiceCode.RUN_CLOSED: _S.FAILED_PRECONDITION,
    ServiceCode.PROPOSAL_OTHER: _S.FAILED_PRECONDITION,
    ServiceCode.APPROVAL_SIGNATURE: _S.INVALID_ARGUMENT,
    ServiceCode.WITNESS_REFUSED: _S.FAILED_PRECONDITION,
    ServiceCode.UNAVAILABLE: _S.UNAVAILABLE,
    ServiceCode.INTERNAL: _S.INTERNAL,
}


def code_of(details: str | None) -> ServiceCode | None:
    """The code in a status' details; None for anything that a service of ours did not say."""
    try:
        return ServiceCode(details or "")
    except ValueError:
        return None


def user_agent() -> str:
    """What this program calls itself in its calls: the coordinator shows which version a site runs."""
    return f"cohortium/{importlib.metadata.version('cohortium')}"


def version_of(agent: str) -> str:
    """The version in a caller's user agent, or "" where there is none that looks like one. Nothing is decided on it."""
    found = re.match(r"cohortium/([0-9A-Za-z.+-]{1,40})(?: |$)", agent)
    return "" if found is None else found[1]

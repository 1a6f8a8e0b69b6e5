"""How a web application tells an error: the facts that the command line prints, and the HTTP status that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from cohortium.common.errors import CohortiumError, PeerUnreachable, ProtocolError, Refused, UsageError

_KINDS = ((UsageError, 422), (Refused, 409), (ProtocolError, 409), (PeerUnreachable, 503))


def status_of(error: CohortiumError, own: Mapping[str, int]) -> int:
    """own: code -> status, where an application knows better than the kind of the error does."""
    if error.code in own:
        return own[error.code]
    if error.code.endswith(("-UNKNOWN", "-MISSING")):
        return 404
    return next((status for kind, status in _KINDS if isinstance(error, kind)), 500 if error.exit_code == 70 else 409)


def failure(code: str, sentence: str, fix: str) -> dict[str, Any]:
    """As CohortiumError.as_json() gives it, for what is no CohortiumError."""
    return {"error": code, "sentence": sentence, "where": [], "left": "", "fix": fix}


def wrong_address(error: HTTPException) -> dict[str, Any]:
    return failure("WEB-PAGE", "there is no such page" if error.status_code == 404 else str(error.detail), "")


def wrong_values(error: RequestValidationError) -> dict[str, Any]:
    """Names the fields, never their values."""
    named = ", ".join(sorted({str(entry["loc"][-1]) for entry in error.errors()}))
    return failure("WEB-VALUE", f"a value cannot be used: {named}", "go back and look at it")

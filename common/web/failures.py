"""How a web application tells an error: the facts that the command line prints, and the HTTP status that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from cohortium.common.errors import CohortiumError, PeerUnreachable, ProtocolError, Refused, UsageError

_KINDS = ((UsageError, 422), (Refused, 409), (ProtocolError, 409), (PeerUnreachable, 503))


class WrongToken(Exception):
    """A form came without its session's token."""


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


def answer_failures(
    app: FastAPI, page: Callable[[Request, dict[str, Any], int], Response], *, own: Mapping[str, int]
) -> None:
    """What every application of ours answers alike: our errors, a form of another session, no page, a wrong value.

    page: the application's own way to show (request, facts, status); own: see `status_of`.
    """

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, CohortiumError)
        return page(request, error.as_json(), status_of(error, own))

    async def token(request: Request, error: Exception) -> Response:
        facts = failure("WEB-TOKEN", "this form is not of your session", "go back, load the page again and repeat it")
        return page(request, facts, 403)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = page(request, wrong_address(error), error.status_code)
        answer.headers.update(error.headers or {})
        return answer

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return page(request, wrong_values(error), 422)

    app.add_exception_handler(CohortiumError, ours)
    app.add_exception_handler(WrongToken, token)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)

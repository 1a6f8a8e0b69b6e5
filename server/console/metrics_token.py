"""Who may read /metrics: whoever has the bearer token of CONSORTIUM/console/metrics.token, from wherever it comes.

The loopback interface is no exception: other users of the machine are not the coordinator.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from cohortium.common.errors import CohortiumError
from cohortium.common.modes import make_private, refuse_open, write_private

FILE = "metrics.token"
TOKEN_BYTES = 32


def token(folder: Path, *, new: bool = False) -> str:
    """The bearer token in CONSORTIUM/console/metrics.token (mode 0600), made where there is none.

    folder: desk.folder. new: another one; whoever has the old one is out with the next request.
    Raises Refused MODE-OPEN where others may read the file.
    """
    path = make_private(folder) / FILE
    if new or not path.exists():
        write_private(path, secrets.token_urlsafe(TOKEN_BYTES).encode() + b"\n")
    refuse_open(path)
    return path.read_text(encoding="ascii").strip()


def may_scrape(folder: Path, authorization: str) -> bool:
    """Whether an Authorization header carries the token; compared in constant time. False where it cannot be read."""
    kind, _, given = authorization.partition(" ")
    try:
        wanted = token(folder)
    except (CohortiumError, OSError, ValueError):
        return False
    same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), wanted.encode())
    return same and kind.lower() == "bearer" and len(wanted) >= TOKEN_BYTES

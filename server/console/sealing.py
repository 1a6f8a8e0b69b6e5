"""What a browser carries through a sign-in, before it has a session: sealed by this process, and worthless after it."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets

from cryptography.fernet import Fernet, InvalidToken

_SEAL = Fernet(Fernet.generate_key())
_KEY = secrets.token_bytes(32)


def seal(what: str, facts: dict[str, str], *, at: float) -> str:
    """Facts for a browser to carry: it can neither read nor change them, nor use them for anything else."""
    return _SEAL.encrypt_at_time(json.dumps({**facts, "what": what}).encode(), int(at)).decode()


def unseal(what: str, text: str, most_s: int, *, at: float) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(_SEAL.decrypt_at_time(text.encode(), most_s, int(at)))
    except (InvalidToken, ValueError):
        return None
    return found if found["what"] == what else None


def form_token(cookie: str) -> str:
    return hmac.digest(_KEY, b"form\0" + cookie.encode(), hashlib.sha256).hex()


def same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))

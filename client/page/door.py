"""The way into the page: a key that is good once, then a cookie for the one browser that used it.

The key comes from the operating system. Whoever presents it first gets the only session there is; every other is told
so, and so is the terminal. Where the system says which of its users holds a connection, the session is that user's
alone: cookies of 127.0.0.1 do not tell one port's server from another's.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable
from pathlib import Path

from cohortium.common.errors import Refused
from cohortium.common.privacy.entropy import Purpose, SystemEntropy

CONNECTIONS = Path("/proc/net/tcp")
Say = Callable[[str], None]


class Door:
    """Thread-safe. `key` is for the link on the terminal; `csrf` for the forms of the one session."""

    def __init__(self, say: Say = lambda text: None) -> None:
        self.key, self.csrf, self._cookie = (_draw(label) for label in ("page-key", "page-form", "page-session"))
        self._used, self._say, self._lock = False, say, threading.Lock()
        self._user: int | None = None

    def enter(self, key: str, user: int | None) -> str:
        """The session's cookie for the right key, the first time. Refused PAGE-KEY, PAGE-KEY-USED."""
        if not hmac.compare_digest(key.encode("utf-8", "replace"), self.key.encode()):
            raise Refused(
                "PAGE-KEY", "this link has another key than the one on the terminal", hint="copy the whole link"
            )
        with self._lock:
            if self._used:
                self._say("Somebody tried the link again: it was good once. If it was not you, end this with Ctrl-C.")
                raise Refused(
                    "PAGE-KEY-USED",
                    "this link was used already; it is good once",
                    hint="if it was not you: Ctrl-C in the terminal, and start the page again",
                )
            self._used, self._user = True, user
        self._say("Opened in a browser. The link is used up." + ("" if user is None else f" (user {user})"))
        return self._cookie

    def knows(self, cookie: str, user: int | None) -> bool:
        """Whether this is the session's cookie, from the user that the session belongs to."""
        same = hmac.compare_digest(cookie.encode("utf-8", "replace"), self._cookie.encode())
        return self._used and same and (self._user is None or user == self._user)

    def fits(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.csrf.encode())


def _draw(label: str) -> str:
    return SystemEntropy().key(Purpose(label=label, run="", release=0)).hex()


def user_of(host: str, port: int, *, to: int, table: Path = CONNECTIONS) -> int | None:
    """Which user of this machine holds a loopback connection, by Linux' table; None where the system does not say.

    host, port: the browser's end. to: this server's port.
    """
    if host != "127.0.0.1":
        return None
    here, there = f"0100007F:{port:04X}", f"0100007F:{to:04X}"
    try:
        lines = table.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == here and fields[2] == there and fields[7].isdigit():
            return int(fields[7])
    return None

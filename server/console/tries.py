"""How often somebody may try to sign in: a try is counted before it is looked at, and forgiven when it was right.

    from     8 in 15 min   one address (one network of IPv6): guessing from one place ends here, first of all
    name    24 in 15 min   one name, from browsers that nobody has signed in with: only several addresses reach it
    browser  8 in 15 min   one name from a browser that has signed in with it before, counted by itself
    code    20 in 24 h     codes of one account; whoever tries them has its password

So whoever guesses from elsewhere is stopped by the address first, and who attacks a name from many addresses shuts out
strange browsers only: the person's own goes on (OWASP, "device cookies"). What is counted is kept as a keyed hash: a
password is easily typed into the field of the name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable

from cohortium.common.errors import Refused
from cohortium.server.console.store import Store

LIMITS = {"from": (900, 8), "name": (900, 24), "browser": (900, 8), "code": (86_400, 20)}
"""kind -> (window in seconds, most tries in it)."""
_LONGEST = max(window for window, _ in LIMITS.values())


class Tries:
    """The counted tries of one file of accounts."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock

    def reserve(self, *what: tuple[str, str]) -> tuple[int, ...]:
        """Count one try of each (kind, who); Refused SIGN-IN-WAIT, counting nothing, where one has none left."""
        now, rows = int(self._clock()), []
        with self._store.write() as db:
            db.execute("DELETE FROM tries WHERE at <= ?", (now - _LONGEST,))
            for kind, who in what:
                window, most = LIMITS[kind]
                key = self._key(kind, who)
                query = "SELECT count(*), min(at) FROM tries WHERE who = ? AND at > ?"
                count, first = db.execute(query, (key, now - window)).fetchone()
                if count >= most:
                    wait = max(first + window - now, 1)
                    raise Refused(
                        "SIGN-IN-WAIT",
                        f"too many wrong tries; it goes on in {-(-wait // 60)} min",
                        hint="a coordinator's command line can set a new password: cohortium console user password",
                    )
                rows.append((key, now))
            return tuple(
                int(db.execute("INSERT INTO tries (who, at) VALUES (?, ?)", row).lastrowid or 0) for row in rows
            )

    def forgive(self, reserved: tuple[int, ...]) -> None:
        """They were right."""
        with self._store.write() as db:
            db.executemany("DELETE FROM tries WHERE n = ?", [(number,) for number in reserved])

    def forget(self, name: str) -> None:
        """For an account with a new password or without its second factor: it starts anew."""
        with self._store.write() as db:
            db.executemany("DELETE FROM tries WHERE who = ?", [(self._key(kind, name),) for kind in ("name", "code")])

    def _key(self, kind: str, who: str) -> bytes:
        return hmac.digest(self._store.salt, f"{kind}\0{who}".encode(errors="replace"), hashlib.sha256)[:16]


def place(address: str) -> str:
    """What is counted as one address: an IPv4 address, or the network of 64 bits that an IPv6 address is in."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            return str(ipaddress.ip_network((found.packed[:8] + bytes(8), 64)))
        found = found.ipv4_mapped
    return str(found)

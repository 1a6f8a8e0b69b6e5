"""How often one address may fail to enrol: a few times a minute, then it waits. No table grows without end."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import unquote

MOST_FAILURES = 5
WINDOW_S = 60.0
MOST_ADDRESSES = 4096


class Attempts:
    """Failures of the last minute by address (IPv6: by its /64, which one machine may have to itself)."""

    def __init__(self, *, most: int = MOST_FAILURES, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, list[float]] = OrderedDict()

    def allowed(self, peer: str) -> bool:
        """Whether a peer (as gRPC names it, "ipv4:127.0.0.1:4711") may try now."""
        with self._lock:
            return len(self._recent(address_of(peer))) < self._most

    def failed(self, peer: str) -> None:
        address = address_of(peer)
        with self._lock:
            times = [*self._recent(address), self._clock()]
            self._failed[address] = times[-self._most :]
            self._failed.move_to_end(address)
            while len(self._failed) > MOST_ADDRESSES:
                self._failed.popitem(last=False)

    def _recent(self, address: str) -> list[float]:
        since = self._clock() - WINDOW_S
        return [at for at in self._failed.get(address, ()) if at > since]


def address_of(peer: str) -> str:
    """The part of a peer's name that a failure is charged to."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return kind
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)

"""ε of what ledgers charged, worked out once for each multiset of events and kept by its digest.

Two rules, both of common/privacy/accountant.py and both never too low:
    run       PLD, as a study's statement says it; for one run, whose plan was fixed before it began
    lifetime  the smallest cap with which a hospital's own filter (RDP at one fixed order) would have let all of it
              pass. It holds however later runs were chosen after seeing earlier results, which PLD does not.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import threading
from collections.abc import Mapping

from cohortium.common.errors import UsageError
from cohortium.common.privacy.accountant import RdpFilter, epsilon
from cohortium.common.privacy.budget import Event
from cohortium.common.protocol.messages import canonical

Charges = Mapping[Event, int]
PLD, FILTER = "pld", "filter"
TABLE = """CREATE TABLE IF NOT EXISTS epsilons (
             name TEXT PRIMARY KEY, rule TEXT NOT NULL, value TEXT NOT NULL
           ) STRICT"""
_FINEST, _STEP, _STEPS = 1e-3, 1.002, 8100  # caps from 0.001 to some 10,000, each 0.2 % above the one before


class Prices:
    """Epsilons by the digest of their events. One thread works them out; any may ask what is known."""

    def __init__(self, db: sqlite3.Connection, lock: threading.RLock) -> None:
        self._db, self._lock = db, lock
        self._caps: dict[tuple[int, float, int], RdpFilter | None] = {}
        self._divergences: dict[tuple[Event, int, int], float] = {}
        with lock:
            db.execute(TABLE)
            self._known = {row[0]: float.fromhex(row[1]) for row in db.execute("SELECT name, value FROM epsilons")}

    def known(self, rule: str, charges: Charges, delta: float, hospitals: int) -> float | None:
        """What was worked out before; None where nothing was."""
        return self._known.get(name_of(rule, charges, delta, hospitals))

    def work_out(self, rule: str, charges: Charges, delta: float, hospitals: int) -> float:
        """The ε of these events, kept. A PLD takes up to a second, a filter's cap milliseconds."""
        name = name_of(rule, charges, delta, hospitals)
        value = self._known.get(name)
        if value is None:
            if rule == PLD:
                value = epsilon(list(charges.items()), delta=delta, hospitals=hospitals)
            else:
                value = self._least_cap(charges, delta, hospitals)
            with self._lock:
                self._db.execute("INSERT OR REPLACE INTO epsilons VALUES (?, ?, ?)", (name, rule, value.hex()))
            self._known[name] = value
        return value

    def forget(self) -> None:
        """Everything that was kept: the next questions are worked out anew."""
        with self._lock:
            self._db.execute("DELETE FROM epsilons")
        self._known.clear()

    def shares(self, parts: Mapping[str, Charges], cap: float, delta: float, hospitals: int) -> dict[str, float]:
        """How a lifetime's spending divides among named parts: at one order divergences simply add up. Sums to 1."""
        if not parts or not math.isfinite(cap) or cap <= 0:
            return {}
        found = self._cap(_at_least(cap), delta, hospitals)
        if found is None:
            return {}
        spent = {name: self._divergence(charges, found) for name, charges in parts.items()}
        whole = math.fsum(spent.values())
        return {name: value / whole for name, value in spent.items()} if whole else {}

    def _least_cap(self, charges: Charges, delta: float, hospitals: int) -> float:
        charged = {event: count for event, count in charges.items() if count}
        if not charged:
            return 0.0
        if any(event.kind == "non-private" for event in charged):
            return math.inf
        low, high = 0, _STEPS  # low: does not fit, or is the first of all
        if not self._fits(charged, high, delta, hospitals):
            return math.inf
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(charged, middle, delta, hospitals):
                high = middle
            else:
                low = middle
        return _FINEST * _STEP**high

    def _fits(self, charges: Charges, step: int, delta: float, hospitals: int) -> bool:
        cap = self._cap(step, delta, hospitals)
        return cap is not None and self._divergence(charges, cap) <= cap.room

    def _cap(self, step: int, delta: float, hospitals: int) -> RdpFilter | None:
        name = step, delta, hospitals
        if name not in self._caps:
            try:
                self._caps[name] = RdpFilter(epsilon=_FINEST * _STEP**step, delta=delta, hospitals=hospitals)
            except UsageError:  # no room at any order: nothing fits under so small a cap
                self._caps[name] = None
        return self._caps[name]

    def _divergence(self, charges: Charges, cap: RdpFilter) -> float:
        total = []
        for event, count in charges.items():
            name = event, cap.order, cap.hospitals
            if name not in self._divergences:
                self._divergences[name] = cap.price(event)
            total.append(count * self._divergences[name])
        return math.fsum(total)


def _at_least(cap: float) -> int:
    return min(_STEPS, max(0, math.ceil(math.log(cap / _FINEST) / math.log(_STEP) - 1e-9)))


def name_of(rule: str, charges: Charges, delta: float, hospitals: int) -> str:
    """SHA-256 of rule, events, δ and hospitals: equal spending has one name."""
    listed = sorted([canonical(event.to_json()).decode(), count] for event, count in charges.items() if count)
    whole = {"rule": rule, "events": listed, "delta": float(delta).hex(), "hospitals": hospitals}
    return hashlib.sha256(canonical(whole)).hexdigest()

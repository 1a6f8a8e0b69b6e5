"""What a run has done and spent, read from its files: for `watch`, for the members' Status, for the last word.

Epsilons come from the mirrored ledgers, never from the plan: what was charged counts, whatever became of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cohortium.common.errors import CohortiumError
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.budget import Event, rounded_up
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.mirror import Mirror
from cohortium.server.runs import RunFolder

RECENT = 20
"""So many releases give the pace from which the time left is worked out."""


def spent(folder: RunFolder, mirror: Path) -> float:
    """ε that this run was charged, by the dearest of the sites' mirrored ledgers, as the plan states it."""
    if not mirror.exists():
        return 0.0
    plan, facts = folder.plan(), folder.facts()
    run, keys = str(facts["run"]), {s: public_from_raw(bytes.fromhex(k)) for s, k in facts["public_keys"].items()}
    charged: set[tuple[tuple[Event, int], ...]] = set()
    with Mirror(mirror, keys) as copies:
        for site in keys:
            # Training and held-out patients are different people: the dearer part counts, not the sum.
            parts: dict[str, dict[Event, int]] = {}
            for entry in copies.book(site).entries.values():
                if entry.run == run:
                    part = parts.setdefault(plan.stage_of(int(entry.release)).part, {})
                    part[entry.event] = part.get(entry.event, 0) + entry.count
            charged |= {tuple(part.items()) for part in parts.values()}
    return max((epsilon(list(part), delta=plan.delta, hospitals=plan.hospitals) for part in charged), default=0.0)


def told_spent(folder: RunFolder, mirror: Path) -> str:
    """What was spent, in a sentence; it says so when the ledgers cannot tell."""
    try:
        plan, value = folder.plan(), spent(folder, mirror)
    except CohortiumError as error:
        return f"What was spent cannot be told ({error.code}): ask the sites for `cohortium site ledger`."
    if value == 0.0:
        return "Nothing was spent."
    return f"Spent so far: ε = {rounded_up(value)} of {plan.epsilon:g} at δ = {plan.delta:g}."


class Progress:
    """Facts of runs as plain JSON. Epsilons are worked out again only after another release."""

    def __init__(self, mirror: Path) -> None:
        self._mirror = mirror
        self._spent: dict[str, tuple[int, float]] = {}

    def of(self, folder: RunFolder, *, exact_epsilon: bool = True) -> dict[str, Any]:
        """Releases, phase, dropped sites, ε, and the time left of one run."""
        plan, facts = folder.plan(), folder.facts()
        done = folder.releases_done()
        events = folder.events()
        last = {event["index"]: event for event in events if event["event"] == "release"}
        dropped: dict[str, int] = {}
        for event in last.values():
            for site in event["dropped"]:
                dropped[site] = dropped.get(site, 0) + 1
        epsilon_now = self._epsilon(folder, done) if exact_epsilon else None
        return {
            "study": plan.study,
            "sites": list(plan.sites),
            "rehearsal": bool(facts["rehearsal"]) or not facts["noise"],
            "releases": {"done": done, "planned": plan.releases},
            "phase": last[max(last)]["purpose"] if last else None,
            "void": sum(bool(event["void"]) for event in last.values()),
            "dropped": dropped,
            "epsilon": {
                "spent": _plain(epsilon_now),
                "planned": _plain(plan.epsilon),
                "delta": plan.delta,
                "hospitals": plan.hospitals,
            },
            "seconds_left": _seconds_left(events, plan.releases - done),
            "published": (folder.root / "result.json").exists(),
        }

    def _epsilon(self, folder: RunFolder, done: int) -> float | None:
        run = folder.root.name
        known = self._spent.get(run)
        if known is not None and known[0] == done and done:
            return known[1]
        try:
            value = spent(folder, self._mirror)
        except CohortiumError:
            return None  # the ledgers' own checks will say what is wrong; a display does not stop for it
        self._spent[run] = done, value
        return value


def _seconds_left(events: list[Mapping[str, Any]] | list[dict[str, Any]], missing: int) -> float | None:
    """From the time between the newest releases of the attempt under way; None before there are two."""
    start = max((at for at, event in enumerate(events) if event["event"] == "start"), default=0)
    # A resumed run tells its kept releases again at once: they say nothing about the pace.
    at = [float(e["at"]) for e in events[start:] if e["event"] == "release"][-RECENT:]
    if missing <= 0 or len(at) < 2 or at[-1] <= at[0]:
        return None if missing > 0 else 0.0
    return round((at[-1] - at[0]) / (len(at) - 1) * missing, 1)


def _plain(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value

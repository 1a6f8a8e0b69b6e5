"""A ServerApp's courier that pulls cables by a script, and what is remembered of a run for its checks."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from net_party import SEED, Party
from netspaces import Net

from cohortium.client.loading import load_records
from cohortium.client.policy import Policy
from cohortium.common.encoding import Records
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.entropy import SeededEntropy
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.release import release
from cohortium.common.protocol.signing import public_from_raw
from cohortium.common.queries import AnyQuery
from cohortium.server import runs
from cohortium.server.asking import FederatedAsk
from cohortium.server.runs import RunFolder, drive
from cohortium.server.stream import StreamCourier, Timings
from cohortium.strategies.base import SiteSum
from cohortium.strategies.secure_sum import SecureSum

Moment = Literal["asked", "answered", "after"]
BACK_WITHIN_S = 20.0
BEFORE = -1
"""In the place of a release's number: before the first one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One pulled cable.

    label: the exchange, as drive names it: "discover", "hello", "witness", "start", "3/mask", … moment: before the
    question leaves ("asked"), when the guard has answered and the answer has not left ("answered"), when the exchange
    is over ("after"; the coordinator goes on when the cable is back, if it comes back). seconds: how long; None: until
    the next release, or the one after that where the cut lay between two.
    """

    site: str
    label: str
    moment: Moment = "asked"
    seconds: float | None = None


@dataclass(kw_only=True)
class Script:
    """Cuts, each made once. `done` in order; `down`: site -> the release in which the cable goes back."""

    net: Net
    cuts: list[Cut]
    done: list[Cut] = field(default_factory=list)
    down: dict[str, int] = field(default_factory=dict)

    def take(self, label: str, moment: Moment) -> list[Cut]:
        found = [cut for cut in self.cuts if cut.label == label and cut.moment == moment]
        self.cuts = [cut for cut in self.cuts if cut not in found]
        self.done += found
        return found

    def pull(self, cut: Cut) -> None:
        if cut.seconds is None:
            self.down[cut.site] = release_of(cut.label) + (2 if cut.moment == "after" else 1)
        self.net.cut(cut.site)

    def back(self, now: int | None) -> list[str]:
        """Put back the cables whose time is over (now: the release that begins; None: all)."""
        due = [site for site, at in self.down.items() if now is None or at <= now]
        for site in due:
            del self.down[site]
            self.net.heal(site)
        return due


def release_of(label: str) -> int:
    head = label.partition("/")[0]
    return int(head) if head.isdigit() else BEFORE


class CutCourier(StreamCourier):
    """script: what happens to the cables. party: whose couriers hold answers back."""

    def __init__(self, party: Party, script: Script, **more: Any) -> None:
        super().__init__(party.grid(is_cut=script.net.is_cut), socket=party.coordinator / "hub.sock", **more)
        self._party, self._script = party, script
        self._at = BEFORE

    def discover(self, *args: Any, **more: Any) -> tuple[str, ...]:
        self._begin("discover")
        return super().discover(*args, **more)

    def exchange(self, messages: Mapping[str, bytes], *, label: str = "", **more: Any) -> dict[str, bytes]:
        if label == "finish":
            self._wait_for(self._script.back(None))
        elif release_of(label) > self._at:
            self._at = release_of(label)
            self._wait_for(self._script.back(self._at))
        self._begin(label)
        try:
            return super().exchange(messages, label=label, **more)
        finally:
            for cut in self._script.take(label, "after"):
                self._script.pull(cut)
                if cut.seconds is not None:
                    time.sleep(cut.seconds)
                    self._script.net.heal(cut.site)

    def _begin(self, label: str) -> None:
        for cut in self._script.take(label, "asked"):
            self._script.pull(cut)
            if cut.seconds is not None:
                timer = threading.Timer(cut.seconds, self._script.net.heal, (cut.site,))
                timer.daemon = True
                timer.start()
        for cut in self._script.take(label, "answered"):
            threading.Thread(target=self._when_answered, args=(cut,), daemon=True).start()

    def _when_answered(self, cut: Cut) -> None:
        child = self._party.children[f"courier-{cut.site}"]
        child.say("hold")
        child.wait("holding", timeout_s=60.0)
        self._script.pull(cut)
        child.say("go")
        if cut.seconds is not None:
            time.sleep(cut.seconds)
            self._script.net.heal(cut.site)

    def _wait_for(self, sites: list[str]) -> None:
        """Streams of cables that were just put back: the next release is not about them."""
        deadline = time.monotonic() + BACK_WITHIN_S
        while not set(sites) <= set(self.connected) and time.monotonic() < deadline:
            time.sleep(0.02)


@dataclass(kw_only=True)
class Seen:
    """What a run gave out, over all attempts: questions, and every sum that anybody could have learned."""

    questions: dict[int, AnyQuery] = field(default_factory=dict)
    sums: dict[int, list[tuple[tuple[str, ...], bytes]]] = field(default_factory=dict)


def run_once(
    party: Party,
    root: Path,
    script: Script,
    seen: Seen,
    *,
    lost_s: float,
    answer_s: float,
    hello_s: float = 60.0,
    stop: Any = lambda: False,
) -> None:
    """One attempt at a run, as the conductor starts it. Raises what drive raises; the cables are back afterwards.

    lost_s, answer_s: what the sites are given (in the field 60 s without a stream, and 600 s with one).
    """
    timings = Timings(reopen_s=0.3, reopen_again_s=0.5, message_s=2.0, opening_s=2.0, lost_s=lost_s, hub_s=0.05)
    really_ask, really_sum = FederatedAsk._release, SecureSum.answer

    def asked(self: FederatedAsk, index: int, stage: Any, query: AnyQuery, name: str) -> Any:
        seen.questions[index] = query
        return really_ask(self, index, stage, query, name)

    def summed(self: SecureSum, index: int, *args: Any, **more: Any) -> SiteSum:
        found = really_sum(self, index, *args, **more)
        seen.sums.setdefault(index, []).append((found.sites, found.values.tobytes()))
        return found

    courier = CutCourier(party, script, run=str(RunFolder(root=root).facts()["run"]), timings=timings)
    with (
        patch.object(FederatedAsk, "_release", asked),
        patch.object(SecureSum, "answer", summed),
        patch.object(runs, "ANSWER_TIMEOUT_S", answer_s),
        patch.object(runs, "HELLO_TIMEOUT_S", hello_s),
    ):
        try:
            drive(courier, root, stop=stop)
        finally:
            courier.close()
            script.back(None)


# ---- what must hold afterwards --------------------------------------------------------------------------------


def releases(root: Path) -> dict[int, dict[str, Any]]:
    return {event["index"]: event for event in RunFolder(root=root).events() if event["event"] == "release"}


def answer(root: Path, index: int) -> np.ndarray:
    with np.load(root / "run" / "answers" / f"{index:05d}.npz") as file:
        return np.asarray(file["values"])


def book(party: Party, root: Path, owner: str) -> Book:
    """What the owner's own ledger says, verified from its first line."""
    folder = RunFolder(root=root)
    path = folder.inner / "ledger.db" if owner == "coordinator" else party.site(owner) / "ledger.db"
    raw = {"coordinator": folder.key().public_key().public_bytes_raw().hex(), **folder.facts()["public_keys"]}[owner]
    ledger = Ledger.open(path)
    try:
        return chain.replay(ledger.lines(), owner=owner, public=public_from_raw(bytes.fromhex(raw)))[0]
    finally:
        ledger.close()


def states(party: Party, root: Path, owner: str) -> dict[int, str]:
    """release -> state in this run. That no release is reserved twice is a rule of the chain itself."""
    run = RunFolder(root=root).facts()["run"]
    return {int(r): e.state for (of, r), e in book(party, root, owner).entries.items() if of == run}


def contribution(party: Party, root: Path, site: str, index: int, query: AnyQuery, records: Records) -> np.ndarray:
    """What a site adds to a sum: its clipped records and its noise, which a rehearsal can draw again."""
    plan = party.plan(root)
    made = release(
        query=query,
        records=records,
        mechanism=plan.stage_of(index).mechanism(shares=plan.shares),
        entropy=SeededEntropy(seed=SEED, site=site),
        run=str(RunFolder(root=root).facts()["run"]),
        index=index,
        head="",
    )
    return made.values


def records_of(party: Party, root: Path) -> dict[str, Records]:
    schema, unit = RunFolder(root=root).study().schema, party.plan(root).unit
    found = {}
    for site in party.sites:
        place = party.site(site)
        found[site] = load_records(place, Policy.load(place / "site.toml"), schema=schema, unit=unit)
    return found


def check_exact(party: Party, root: Path, seen: Seen, records: Mapping[str, Records]) -> dict[int, dict[str, Any]]:
    """Every release so far: the sum of exactly the sites it names, or void; one sum each, one survivor set at every
    site, and a charge at every site that answered. Returns the releases."""
    found = releases(root)
    books = {site: book(party, root, site) for site in party.sites}
    run, study = str(RunFolder(root=root).facts()["run"]), book(party, root, "coordinator")
    for index, sums in seen.sums.items():
        assert len(set(sums)) == 1, f"release {index} has {len(set(sums))} different sums"
    for index, event in found.items():
        values, entry = answer(root, index), study.entries[run, str(index)]
        entries = {site: b.entries[run, str(index)] for site, b in books.items() if (run, str(index)) in b.entries}
        ballots = {site: entry.ballot for site, entry in entries.items() if entry.ballot}
        assert len(set(ballots.values())) <= 1, f"release {index}: sites signed different survivor sets {ballots}"
        if event["void"]:
            assert event["void"].startswith("SUM-") and not event["sites"] and not values.any()
            assert index not in seen.sums and entry.state == "BURNED"
            continue
        assert set(event["sites"]) | set(event["dropped"]) == set(party.sites)
        assert set(ballots) <= set(event["sites"]), "a site that was left out voted"
        assert len(ballots) >= party.plan(root).survivors
        assert set(event["sites"]) <= set(entries), "a sum holds a site that was not charged"
        parts = [contribution(party, root, s, index, seen.questions[index], records[s]) for s in event["sites"]]
        assert np.array_equal(values, np.sum(parts, axis=0)), f"release {index} is not the sum of {event['sites']}"
        assert seen.sums[index][0] == (tuple(event["sites"]), values.tobytes())
        assert entry.state == "RELEASED"
    return found

"""Envelopes to sites and back over a Flower Grid, with our own polling (Grid.send_and_receive sleeps 3 s).

The courier decides nothing about a study: it finds out which node is which site, sends each site its envelope
and collects what comes back in time. A site that does not answer, answers late, answers with an error or
refuses is *absent*, with a reason from a fixed list; the protocol above decides what absence means.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from cohortium.common.errors import PeerUnreachable, ProtocolError
from cohortium.common.protocol.flower import CARRY, HELLO, STREAM, Parcel, request, unpack

FIRST_POLL_S = 0.005
LONGEST_POLL_S = 0.25
HELLO_AGAIN_S = 2.0
LONGEST_HELLO_S = 15.0
# A reply's lifetime is worked out on the site's clock: a message outlives its wait by what clocks may differ.
CLOCK_SKEW_S = 300.0


class Absence(StrEnum):
    """Why a site's envelope is missing from an exchange."""

    UNKNOWN = "SITE-UNKNOWN"  # no node said hello under this name
    NOT_SENT = "SITE-NOT-SENT"  # the SuperLink did not take the message
    TIMEOUT = "SITE-TIMEOUT"  # no answer in time
    FLOWER = "SITE-FLOWER-ERROR"  # Flower answered in the site's place: node gone, app crashed
    MALFORMED = "SITE-MALFORMED"  # an answer that is no parcel of ours, or comes from another node
    REFUSED = "SITE-REFUSED"  # the courier's fixed refusal
    STOPPED = "SITE-STOPPED-WAITING"  # enough others had answered


@runtime_checkable
class Clock(Protocol):
    """Seconds and waiting. The in-process grid is its own clock, so that simulated delays cost no time."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class WallClock:
    def __init__(self, stop: threading.Event | None) -> None:
        self._stop = stop or threading.Event()

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)


class GridCourier:
    """exchange() is all the study's loop needs; discover() comes first.

    grid: any flwr.serverapp.Grid. stop: when set, the next wait raises PeerUnreachable RUN-STOPPED.
    absent: why sites are missing from the last exchange. ignored: how many replies were dropped so far
    because nobody waited for them: second and late answers, answers to nothing.
    """

    def __init__(self, grid: Grid, *, stop: threading.Event | None = None) -> None:
        self._grid = grid
        self._stop = stop or threading.Event()
        self._clock: Clock = grid if isinstance(grid, Clock) else WallClock(self._stop)
        self._nodes: dict[str, int] = {}
        self.absent: dict[str, Absence] = {}
        self.ignored = 0

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that said hello, sorted."""
        return tuple(sorted(self._nodes))

    def discover(self, expected: Collection[str], *, timeout_s: float, quorum: int | None = None) -> tuple[str, ...]:
        """Say hello to every node until all expected sites answered, or until the time is up.

        Returns the expected sites that are there, sorted; they replace what an earlier call found. Nodes with
        other names are left alone. PeerUnreachable GRID-TOO-FEW-SITES if fewer than `quorum` (default: all)
        answered; ProtocolError GRID-SITE-TWICE if two nodes answer to one name.
        """
        names = frozenset(expected)
        found: dict[str, int] = {}
        answered: set[int] = set()
        waiting: dict[str, int] = {}
        pause: dict[int, float] = {}
        due: dict[int, float] = {}
        deadline = self._clock.now() + timeout_s
        look, poll = self._clock.now(), FIRST_POLL_S
        while True:
            now = self._clock.now()
            if now >= look:
                look = now + HELLO_AGAIN_S
                for node in self._node_ids():
                    if node in answered or now < due.get(node, now):
                        continue
                    # A SuperNode answers in order: asked again faster than it can answer, it never catches up.
                    pause[node] = min(2 * pause.get(node, HELLO_AGAIN_S / 2), LONGEST_HELLO_S)
                    due[node] = now + pause[node]
                    waiting |= self._push({node: Parcel()}, HELLO, "discover", deadline - now, {})
            parcels: dict[int, Parcel] = {}
            if waiting:
                self._pull(waiting, parcels, {})
            for node in sorted(set(parcels) - answered):
                answered.add(node)
                site = parcels[node].site
                if site in names and site in found:
                    raise ProtocolError(
                        "GRID-SITE-TWICE", f"two nodes answer as {site!r}", hint="stop one of its SuperNodes"
                    )
                if site in names:
                    found[site] = node
            if names <= set(found) or now >= deadline:
                break
            poll = FIRST_POLL_S if parcels else min(poll * 1.5, LONGEST_POLL_S)
            self._sleep(min(poll, look - now, deadline - now))
        self._nodes = found
        if len(found) < (len(names) if quorum is None else quorum):
            raise PeerUnreachable(
                "GRID-TOO-FEW-SITES",
                f"{len(found)} of {len(names)} sites answered within {timeout_s:g} s",
                where=tuple(sorted(names - set(found))),
                hint="start the missing sites' SuperNodes, then resume the run",
            )
        return self.sites

    def exchange(
        self,
        messages: Mapping[str, bytes],
        *,
        timeout_s: float,
        quorum: int | None = None,
        grace_s: float = 5.0,
        label: str = "",
    ) -> dict[str, bytes]:
        """Send each site its envelope; return the envelopes that came back, keyed by site, in sorted order.

        Waits until every site has answered or is known to be absent, at most timeout_s. With `quorum`, waits
        at most grace_s after so many envelopes have come. Fewer than quorum is no error here. label: a public
        word that names the exchange in Flower's records (and in a simulation's fault script).
        """
        nodes = {self._nodes[site]: site for site in sorted(messages) if site in self._nodes}
        parcels, absent = self._round(
            {node: Parcel(envelope=messages[site], site=site) for node, site in nodes.items()},
            CARRY,
            label,
            wait_s=timeout_s,
            quorum=quorum,
            grace_s=grace_s,
        )
        self.absent = {site: Absence.UNKNOWN for site in messages if site not in self._nodes}
        self.absent |= {nodes[node]: reason for node, reason in absent.items()}
        return {site: parcels[node].envelope for node, site in nodes.items() if node in parcels}

    def invite(self, invitations: Mapping[str, bytes], *, wait_s: float) -> None:
        """Ask sites to open a stream. What counts is who opens one; the answers only end the wait.

        A site that does not answer has perhaps come back as another node: it is looked for again.
        """
        parcels = {
            self._nodes[site]: Parcel(envelope=envelope, site=site)
            for site, envelope in invitations.items()
            if site in self._nodes
        }
        _, absent = self._round(parcels, STREAM, "stream", wait_s=wait_s)
        missing = {site for site in invitations if self._nodes.get(site) in absent}
        if missing:
            known = set(self._nodes.values()) - set(absent)
            nodes = [node for node in self._node_ids() if node not in known]
            hellos, _ = self._round({node: Parcel() for node in nodes}, HELLO, "discover", wait_s=wait_s / 2)
            self._nodes |= {parcel.site: node for node, parcel in hellos.items() if parcel.site in missing}

    def _round(
        self,
        parcels: Mapping[int, Parcel],
        action: str,
        label: str,
        *,
        wait_s: float,
        quorum: int | None = None,
        grace_s: float = 0.0,
    ) -> tuple[dict[int, Parcel], dict[int, Absence]]:
        """One message to each node and the first answer of each: (parcels, reasons for the missing ones)."""
        got: dict[int, Parcel] = {}
        absent: dict[int, Absence] = {}
        deadline = self._clock.now() + wait_s
        waiting = self._push(parcels, action, label, wait_s, absent)
        poll, late = FIRST_POLL_S, Absence.TIMEOUT
        while waiting:
            before = len(waiting)
            self._pull(waiting, got, absent)
            if quorum is not None and len(got) >= quorum:
                enough = self._clock.now() + grace_s
                if enough < deadline:
                    deadline, late = enough, Absence.STOPPED
                quorum = None
            left_s = deadline - self._clock.now()
            if not waiting or left_s <= 0:
                break
            poll = FIRST_POLL_S if len(waiting) < before else min(poll * 1.5, LONGEST_POLL_S)
            self._sleep(min(poll, left_s))
        absent |= dict.fromkeys(waiting.values(), late)
        return got, absent

    def _push(
        self,
        parcels: Mapping[int, Parcel],
        action: str,
        label: str,
        wait_s: float,
        absent: dict[int, Absence],
    ) -> dict[str, int]:
        """Message id -> node. One push each: a batch returns fewer ids than messages when one is refused."""
        waiting: dict[str, int] = {}
        for node, parcel in parcels.items():
            message = request(parcel, node_id=node, action=action, label=label, ttl_s=wait_s + CLOCK_SKEW_S)
            try:
                ids = [str(name) for name in self._grid.push_messages([message]) if name]
            except Exception:
                ids = []
            if len(ids) == 1:
                waiting[ids[0]] = node
            else:
                absent[node] = Absence.NOT_SENT
        return waiting

    def _pull(self, waiting: dict[str, int], got: dict[int, Parcel], absent: dict[int, Absence]) -> None:
        """Take what has arrived. Only ids still waited for are asked for: an in-memory SuperLink raises a
        KeyError on one it has delivered already, and late answers are of no use to anyone."""
        try:
            replies = list(self._grid.pull_messages(list(waiting)))
        except Exception as error:
            raise PeerUnreachable(
                "GRID-DOWN", "the SuperLink does not answer", hint="start it, then resume the run"
            ) from error
        for message in replies:
            to = message.metadata.reply_to_message_id
            node = waiting.get(to)
            if node is None:
                self.ignored += 1
                continue
            del waiting[to]
            parcel = _parcel(message, node)
            if isinstance(parcel, Parcel):
                got[node] = parcel
            else:
                absent[node] = parcel

    def _node_ids(self) -> list[int]:
        try:
            return sorted(self._grid.get_node_ids())
        except Exception as error:
            raise PeerUnreachable("GRID-DOWN", "the SuperLink does not answer", hint="start it") from error

    def _sleep(self, seconds: float) -> None:
        if not self._stop.is_set():
            self._clock.sleep(max(seconds, 0.0))
        if self._stop.is_set():
            raise PeerUnreachable("RUN-STOPPED", "the run was stopped while it waited for sites")


def _parcel(message: Message, node: int) -> Parcel | Absence:
    # An error's text comes from the site's machine verbatim: it is neither kept nor shown.
    if message.has_error():
        return Absence.FLOWER
    if message.metadata.src_node_id != node:
        return Absence.MALFORMED
    try:
        parcel = unpack(message.content)
    except ProtocolError:
        return Absence.MALFORMED
    return Absence.REFUSED if parcel.refusal is not None else parcel

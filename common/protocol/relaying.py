"""One site's questions and answers over a link that may break at any moment: both ends' bookkeeping, no I/O.

A question carries a number that only grows; its answer carries the same number. The asking end keeps a question until
its answer is there, the answering end keeps an answer until it is acknowledged. After a reconnection each tells the
highest number it has from the other, the rest is sent again, and what comes twice is dropped. So a question reaches the
guard at least once, and once only while the courier lives; the guard gives the same bytes to the same question.

The opening: the courier's first frame names run, ticket, what it has (ack) and of which numbering (envelope); the hub's
first frame says its own ack and numbering, or the code that refuses the stream. A numbering lasts as long as the hub
remembers it: where the two differ, one end has begun anew, and both begin anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.messages import canonical

TICKET_BYTES = 16
MAX_RUN = 200
MOST_UNANSWERED = 2
"""Questions that a site may owe at a time. A third one means that nobody waits for the first any more."""


class Code(StrEnum):
    """All that the ends of a link say beside envelopes."""

    # ServerApp to hub
    ATTACH = "ATTACH"
    # hub to ServerApp
    CONNECTED = "CONNECTED"
    LOST = "LOST"
    REPLACED = "REPLACED"  # another ServerApp attached for this run
    SLOW = "SLOW"  # the ServerApp does not read what it is sent
    # hub to courier; all of them final
    END = "END"  # the run is over (ServerApp to hub too)
    SUPERSEDED = "SUPERSEDED"  # the site opened a newer stream
    UNKNOWN_RUN = "UNKNOWN-RUN"
    WRONG_TICKET = "WRONG-TICKET"
    REVOKED = "REVOKED"
    BAD_FRAME = "BAD-FRAME"
    TOO_LARGE = "TOO-LARGE"
    BUSY = "BUSY"


def invitation(run: str, ticket: bytes) -> bytes:
    """What a Flower message holds that asks a courier for a stream. It proves nothing: the site's certificate does."""
    return canonical({"run": run, "ticket": ticket.hex()})


def read_invitation(said: bytes) -> tuple[str, bytes]:
    """(run, ticket); ProtocolError RELAY-INVITATION for anything that `invitation` does not make."""
    try:
        if len(said) > 4 * MAX_RUN:
            raise ValueError
        value = json.loads(said)
        run, ticket = value["run"], bytes.fromhex(value["ticket"])
        if not (check_run(run) and len(ticket) == TICKET_BYTES and invitation(run, ticket) == said):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ProtocolError("RELAY-INVITATION", "a message that asks for no stream of ours") from None
    return run, ticket


def check_run(name: object) -> bool:
    """Whether this can be a run's name."""
    return isinstance(name, str) and 0 < len(name) <= MAX_RUN and name.isascii() and name.isprintable()


@dataclass(kw_only=True, slots=True)
class Asking:
    """The hub's end: questions that wait for their answers. number -> (exchange, envelope), in order."""

    numbering: bytes
    sent: int = 0
    received: int = 0
    waiting: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def ask(self, exchange: int, envelope: bytes) -> None:
        """Take a question; the same exchange a second time is the same question, and the oldest gives way."""
        if any(known == exchange for known, _ in self.waiting.values()):
            return
        self.sent += 1
        self.waiting[self.sent] = (exchange, envelope)
        while len(self.waiting) > MOST_UNANSWERED:
            del self.waiting[min(self.waiting)]

    def resume(self, acknowledged: int, numbering: bytes) -> int:
        """Where a stream begins: above what its courier has, or at the start for one that knows another numbering."""
        if numbering != self.numbering:
            return 0
        if not 0 <= acknowledged <= self.sent:
            raise ProtocolError("RELAY-ACK", "an acknowledgement of what was never sent")
        return acknowledged

    def after(self, cursor: int) -> tuple[int, bytes] | None:
        """The next question to send on a stream that has sent all up to `cursor`."""
        numbers = [number for number in self.waiting if number > cursor]
        return (min(numbers), self.waiting[min(numbers)][1]) if numbers else None

    def answered(self, number: int) -> int | None:
        """The exchange that an answer belongs to, once; None for one that nobody waits for: drop it."""
        found = self.waiting.pop(number, None)
        if found is None:
            return None
        self.received = max(self.received, number)
        return found[0]


@dataclass(kw_only=True, slots=True)
class Answering:
    """The courier's end: the highest question it has taken, and answers not yet acknowledged, (envelope, code)."""

    numbering: bytes = b""
    received: int = 0
    kept: dict[int, tuple[bytes, str]] = field(default_factory=dict)

    def resume(self, acknowledged: int, numbering: bytes) -> None:
        """What the hub's opening said."""
        if numbering != self.numbering:
            self.numbering, self.received = numbering, 0
            self.kept.clear()
        self.acknowledged(acknowledged)

    def take(self, number: int) -> bool:
        """Whether this question is new; it counts as received from now on."""
        if number <= self.received:
            return False
        self.received = number
        return True

    def answer(self, number: int, envelope: bytes, code: str = "") -> None:
        self.kept[number] = (envelope, code)
        while len(self.kept) > MOST_UNANSWERED:
            del self.kept[min(self.kept)]

    def acknowledged(self, number: int) -> None:
        for known in [known for known in self.kept if known <= number]:
            del self.kept[known]

    def after(self, cursor: int) -> int | None:
        """The next answer to send on a stream that has sent all up to `cursor`."""
        return min((number for number in self.kept if number > cursor), default=None)

"""What can go wrong between coordinator and site, as a script that repeats exactly.

absent          the node is gone: Flower answers in its place, the site never sees the message
lost            the message vanishes, nobody answers
reply-lost      the site does its work, the answer vanishes
late            the site does its work, the answer arrives `seconds` later
twice           the site gets the message twice, both answers arrive
held            the site gets the message only after its next one; that answer vanishes
replay          the site first gets its previous message again
stale           the answer's envelope is swapped for the site's previous one
tamper-request  one bit of the envelope flips on the way to the site
tamper-reply    one bit of the envelope flips on the way back
crash           the client process dies before it reads the message
crash-after     the client process dies after its work, before the answer is sent
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from flwr.app import Message

from cohortium.common.errors import UsageError
from cohortium.common.protocol.flower import pack, unpack

Kind = Literal[
    "absent",
    "lost",
    "reply-lost",
    "late",
    "twice",
    "held",
    "replay",
    "stale",
    "tamper-request",
    "tamper-reply",
    "crash",
    "crash-after",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One line of the script.

    site, label: shell patterns for the site's name and the exchange's label; the first is "discover".
    skip: so many matching messages of a site pass first. times: then so many suffer, None for all.
    seconds: for "late". bit: which bit of the envelope flips, counted from its start modulo its length.
    """

    kind: Kind
    site: str = "*"
    label: str = "*"
    skip: int = 0
    times: int | None = 1
    seconds: float = 0.0
    bit: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError("FAULT-KIND", f"unknown fault {self.kind!r}", hint=", ".join(get_args(Kind)))
        if self.skip < 0 or (self.times is not None and self.times < 1) or self.bit < 0:
            raise UsageError("FAULT-COUNT", "skip and bit start at 0, times at 1")
        if (self.kind == "late") != (self.seconds > 0):
            raise UsageError("FAULT-SECONDS", "seconds belong to a late answer, and are more than 0")


class Faults:
    """A script being played: the first line that applies to a message decides its fate."""

    def __init__(self, script: Iterable[Fault] = ()) -> None:
        self._script = tuple(script)
        self._seen: Counter[tuple[int, str]] = Counter()

    def next(self, site: str, label: str) -> Fault | None:
        """The fate of the next message to `site`; every matching line counts it, whichever one acts."""
        chosen: Fault | None = None
        for at, fault in enumerate(self._script):
            if not (fnmatchcase(site, fault.site) and fnmatchcase(label, fault.label)):
                continue
            seen = self._seen[at, site]
            self._seen[at, site] += 1
            hit = seen >= fault.skip and (fault.times is None or seen < fault.skip + fault.times)
            if hit and chosen is None:
                chosen = fault
        return chosen


def flip_bit(message: Message, bit: int) -> None:
    """Tamper with the envelope in place; an empty envelope stays as it is."""
    parcel = unpack(message.content)
    envelope = bytearray(parcel.envelope)
    if envelope:
        bit %= 8 * len(envelope)
        envelope[bit // 8] ^= 1 << (bit % 8)
        message.content = pack(replace(parcel, envelope=bytes(envelope)))


def swap_envelope(message: Message, other: Message) -> None:
    """Give a reply the envelope of another one, in place."""
    message.content = pack(replace(unpack(message.content), envelope=unpack(other.content).envelope))

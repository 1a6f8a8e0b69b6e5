"""Our bytes inside Flower's messages: the only code that touches a RecordDict.

Flower is the messenger and is not trusted with data, so a message is one *parcel*: an opaque signed envelope
and two words that anyone may read. What else Flower offers to carry (metrics, arrays, error texts) is refused
on arrival, so that no second channel grows beside the door.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

# Flower reads this switch when it is first imported and reports runs to its makers unless it is "0".
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import flwr.supercore.telemetry
from flwr.app import ConfigRecord, Context, Message, RecordDict

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.messages import MAX_ENVELOPE_BYTES

# A process that Flower itself starts has imported Flower before us, so the switch it read is set again. Even
# switched off, Flower 1.41 puts a report together for every event: it writes an id into the home directory
# and starts `file` and `uname`. With this nothing is put together.
if os.environ["FLWR_TELEMETRY_ENABLED"] != "1":
    flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED = "0"
    flwr.supercore.telemetry.create_event = lambda event_type, event_details: "disabled"

RECORD = "cohortium"
HELLO = "hello"
CARRY = "carry"
STREAM = "stream"
MAX_WORD = 200


class Refusal(StrEnum):
    """All that a courier may say when it has no envelope to bring back."""

    NO_GUARD = "COURIER-NO-GUARD"
    GUARD_FAILED = "COURIER-GUARD-FAILED"
    BAD_PARCEL = "COURIER-BAD-PARCEL"
    NO_STREAM = "COURIER-NO-STREAM"
    TOO_LARGE = "COURIER-TOO-LARGE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """One Flower message's content.

    envelope: signed bytes, opaque to Flower and to the courier; empty in a hello and in a refusal.
    site: a routing label. It proves nothing: who sent an envelope is decided by its signature.
    refusal: None, or the fixed code that stands in for an envelope.
    """

    envelope: bytes = b""
    site: str = ""
    refusal: Refusal | None = None

    def __post_init__(self) -> None:
        if len(self.envelope) > MAX_ENVELOPE_BYTES:
            raise ProtocolError("FLOWER-SIZE", f"an envelope may hold {MAX_ENVELOPE_BYTES} bytes at most")
        if len(self.site) > MAX_WORD or not self.site.isprintable():
            raise ProtocolError("FLOWER-FORMAT", f"a site's label is at most {MAX_WORD} printable characters")
        if self.refusal is not None and self.envelope:
            raise ProtocolError("FLOWER-FORMAT", "a refusal carries no envelope")


def pack(parcel: Parcel) -> RecordDict:
    """The parcel as Flower's content: one ConfigRecord with three fixed keys."""
    refusal = "" if parcel.refusal is None else parcel.refusal.value
    return RecordDict({RECORD: ConfigRecord({"envelope": parcel.envelope, "site": parcel.site, "refusal": refusal})})


def unpack(records: RecordDict) -> Parcel:
    """The parcel of a content; ProtocolError FLOWER-FORMAT if anything is missing, mistyped or extra."""
    if list(records) != [RECORD] or not isinstance(records[RECORD], ConfigRecord):
        raise ProtocolError("FLOWER-FORMAT", "a message carries exactly one record, ours")
    record = dict(records[RECORD])
    if set(record) != {"envelope", "site", "refusal"}:
        raise ProtocolError("FLOWER-FORMAT", "the record's keys are not ours")
    envelope, site, refusal = record["envelope"], record["site"], record["refusal"]
    if not (type(envelope) is bytes and type(site) is str and type(refusal) is str):
        raise ProtocolError("FLOWER-FORMAT", "the record's values have other types than ours")
    if refusal and refusal not in set(Refusal):
        raise ProtocolError("FLOWER-FORMAT", "a refusal outside the fixed list")
    return Parcel(envelope=envelope, site=site, refusal=Refusal(refusal) if refusal else None)


def request(parcel: Parcel, *, node_id: int, action: str, label: str, ttl_s: float) -> Message:
    """A message to one node. action: HELLO, CARRY or STREAM. label: a public word, such as a round's name."""
    return Message(pack(parcel), node_id, f"query.{action}", ttl=ttl_s, group_id=label)


def reply(parcel: Parcel, *, to: Message) -> Message:
    return Message(pack(parcel), reply_to=to)


def blank_context(
    *, run_id: int, node_id: int, node_config: Mapping[str, str | int], run_config: Mapping[str, str | int]
) -> Context:
    """What Flower hands an app beside the message, for the in-process grid."""
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )

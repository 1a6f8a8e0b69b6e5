"""Reading a message's fields: exact names, exact types, one spelling; anything else is SUM-FORMAT."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.messages import Message

MAX_NAME = 100


class LabelledBytes(Protocol):
    """Randomness handed in: the operating system's in the field, a seeded one in tests.

    A label is asked for once per source; asked again, it may give the same bytes.
    """

    def bytes_for(self, label: str, length: int) -> bytes: ...


def malformed(what: str) -> ProtocolError:
    return ProtocolError("SUM-FORMAT", what)


def expect(message: Message, kind: str, fields: set[str], *, blobs: bool = False) -> dict[str, Any]:
    """The fields of a message of this kind that has exactly these; blobs only where announced."""
    if message.kind != kind:
        raise ProtocolError("SUM-KIND", f"expected {kind}")
    if set(message.fields) != fields or (message.blobs and not blobs):
        raise malformed(f"{kind} has other fields")
    return message.fields


def text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise malformed(f"a name has 1 to {MAX_NAME} characters")
    return value


def hexadecimal(value: object, length: int) -> bytes:
    """Bytes of an exact length from lower-case hex (the one spelling)."""
    try:
        raw = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != length or raw.hex() != value:
        raise malformed(f"{length} bytes in lower-case hex expected")
    return raw


def sha(value: object) -> str:
    return hexadecimal(value, 32).hex()


def names(value: object) -> tuple[str, ...]:
    """A strictly ascending list of names: a set has one spelling."""
    if not isinstance(value, list):
        raise malformed("a list of names expected")
    out = tuple(text(item) for item in value)
    if any(a >= b for a, b in pairwise(out)):
        raise malformed("names stand in ascending order, each once")
    return out


def rows(value: object, width: int) -> list[list[Any]]:
    if not isinstance(value, list) or not all(isinstance(r, list) and len(r) == width for r in value):
        raise malformed(f"a list of rows of {width} expected")
    return value


def table(value: object, length: int) -> dict[str, bytes]:
    """{name: bytes of an exact length}."""
    if not isinstance(value, dict):
        raise malformed("a table by name expected")
    return {text(name): hexadecimal(item, length) for name, item in value.items()}

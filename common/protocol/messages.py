"""Envelopes: the one byte format that crosses the border, canonical and signed.

    envelope = MAGIC | u32 header length | canonical JSON header | blobs, in the header's order | Ed25519 signature
The header names the kind, the sender, plain fields (no floats: numbers that matter are integers or hex
strings) and, for each blob, name, length and SHA-256. One message has exactly one encoding, so a digest names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import ProtocolError

MAGIC = b"COH1"
SIGNATURE_BYTES = 64
MAX_ENVELOPE_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024 * 1024
_DOMAIN = b"cohortium/envelope/1\x00"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII, no floats: equal values give equal bytes.

    Raises ProtocolError on a float (floats have no canonical form that two languages agree on).
    """
    _refuse_floats(value)
    return _ENCODER.encode(value).encode("ascii")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _refuse_floats(value: Any) -> None:
    # A roster of a hundred sites is mostly strings in lists: those are passed over without a call of their own.
    if isinstance(value, float):
        raise ProtocolError("MSG-FLOAT", "a signed message may not hold a float; write float.hex()")
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str and not isinstance(key, str):
                raise ProtocolError("MSG-KEY", "keys of a signed message are strings")
        items: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    else:
        return
    for item in items:
        if type(item) is not str and type(item) is not int:
            _refuse_floats(item)


def digest(data: bytes) -> str:
    """SHA-256, lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def content_digest(kind: str, fields: dict[str, Any], blobs: Mapping[str, bytes]) -> str:
    """Names what is said, whoever says it: SHA-256 over kind, fields and each blob's name and digest."""
    listed = [[name, digest(blobs[name])] for name in sorted(blobs)]
    return digest(canonical({"kind": kind, "fields": fields, "blobs": listed}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """kind and sender, plain fields, and named byte strings."""

    kind: str
    sender: str
    fields: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)


def seal(message: Message, key: Ed25519PrivateKey) -> bytes:
    """The signed envelope of a message."""
    body = _body(message)
    return body + key.sign(_DOMAIN + body)


def unseal(envelope: bytes, public: Ed25519PublicKey, *, sender: str) -> Message:
    """The message of an envelope that `sender` signed; ProtocolError with a code for anything else."""
    if not SIGNATURE_BYTES < len(envelope) <= MAX_ENVELOPE_BYTES:
        raise ProtocolError("MSG-SIZE", "envelope too short or too long")
    body, signature = envelope[:-SIGNATURE_BYTES], envelope[-SIGNATURE_BYTES:]
    try:
        public.verify(signature, _DOMAIN + body)
    except InvalidSignature:
        raise ProtocolError("MSG-SIGNATURE", "the signature does not fit the sender") from None
    message = _parse(body)
    if message.sender != sender:
        raise ProtocolError("MSG-SENDER", "the envelope names another sender")
    return message


def peek_sender(envelope: bytes) -> str:
    """Who an envelope claims to be from; unverified, for picking the key to verify with."""
    return _parse(envelope[:-SIGNATURE_BYTES]).sender


def _body(message: Message) -> bytes:
    names = sorted(message.blobs)
    header = canonical(
        {
            "kind": message.kind,
            "sender": message.sender,
            "fields": message.fields,
            "blobs": [[n, len(message.blobs[n]), digest(message.blobs[n])] for n in names],
        }
    )
    return b"".join([MAGIC, len(header).to_bytes(4, "big"), header, *(message.blobs[n] for n in names)])


def _parse(body: bytes) -> Message:
    if len(body) < 8 or body[:4] != MAGIC:
        raise ProtocolError("MSG-FORMAT", "not an envelope")
    length = int.from_bytes(body[4:8], "big")
    if length > MAX_HEADER_BYTES or 8 + length > len(body):
        raise ProtocolError("MSG-FORMAT", "header length out of range")
    try:
        raw = body[8 : 8 + length]
        header = json.loads(raw)
        message_blobs: dict[str, bytes] = {}
        at = 8 + length
        for name, size, sha in header["blobs"]:
            if not isinstance(name, str) or not isinstance(size, int) or size < 0:
                raise ProtocolError("MSG-FORMAT", "a blob's entry is malformed")
            blob = body[at : at + size]
            if len(blob) != size or digest(blob) != sha:
                raise ProtocolError("MSG-FORMAT", "a blob does not fit its digest")
            message_blobs[name] = blob
            at += size
        if at != len(body):
            raise ProtocolError("MSG-FORMAT", "bytes after the last blob")
        kind, sender, fields = header["kind"], header["sender"], header["fields"]
        if not (isinstance(kind, str) and isinstance(sender, str) and isinstance(fields, dict)):
            raise ProtocolError("MSG-FORMAT", "kind, sender or fields of a wrong type")
        if set(header) != {"kind", "sender", "fields", "blobs"} or canonical(header) != raw:
            raise ProtocolError("MSG-FORMAT", "the header is not in canonical form")
    except ProtocolError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ProtocolError("MSG-FORMAT", "the header cannot be read") from None
    return Message(kind=kind, sender=sender, fields=fields, blobs=message_blobs)

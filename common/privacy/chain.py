"""The ledger's lines without a database: hash chain, signatures, rules. Verifies exported files alone.

    hash_n = SHA256(domain | hash_(n-1) | SHA256(canonical JSON of body n))   signature_n = Ed25519(domain | hash_n)
The body names its number and owner; line 0 names the owner's key. Because a body enters by its digest, a list of
32-byte digests proves to a witness that one head extends another, and says nothing of the bodies. `Book` replays
bodies and refuses any that break the rules, so the writer and every verifier apply the same ones:

    NONE -> RESERVED -> RUNNING -> SEALED -> UNMASKED -> RELEASED
               |___________|______^  |___________|________^
               BURNED (crash)        VOID (round void)
A reserved release is charged for ever, whatever becomes of it. Time never runs backwards from line to line, but in a
note about `clock`, by which the owner admits that its clock was wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed, ProtocolError, Refused
from cohortium.common.privacy.budget import Event
from cohortium.common.protocol.messages import canonical

FORMAT = "cohortium-ledger/2"
REHEARSAL = "rehearsal"
"""A site's note on a run whose noise can be computed from a seed, or is off: such a run is never private."""
PUBLISHED = "published"
"""The study's note that names what was published: fields {"run": ..., "files": {name: SHA-256}}."""
START = "start"
"""A site's note that it is about to begin, or to go on with, a run: its nonce sets two copies of a ledger apart."""
CARRIED = "carried"
"""A new ledger's note after a change of keys: whose charges its first lines reserve again (public_key, size, hash)."""
CLOCK = "clock"
"""A note that sets the ledger's time back, after a clock that was ahead."""
EMPTY = "00" * 32
"""The head of a ledger without lines."""
_LINK = b"cohortium/ledger-line/2\x00"
_SIGN = b"cohortium/ledger-signature/2\x00"
DIGEST_BYTES = 32

State = Literal["RESERVED", "RUNNING", "SEALED", "UNMASKED", "RELEASED", "BURNED", "VOID"]
NEXT: dict[str, tuple[State, ...]] = {
    "RESERVED": ("RUNNING", "SEALED", "BURNED"),
    "RUNNING": ("SEALED", "BURNED"),
    "SEALED": ("UNMASKED", "RELEASED", "VOID"),
    "UNMASKED": ("RELEASED", "VOID"),
    "RELEASED": (),
    "BURNED": (),
    "VOID": (),
}
_FIELDS = {
    "open": {"format", "public_key"},
    "reserve": {"run", "release", "attempt", "event", "count", "plan", "purpose"},
    "advance": {"run", "release", "state", "digest"},
    "note": {"about", "fields"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One signed line. hash and signature are lower-case hex."""

    body: dict[str, Any]
    hash: str
    signature: str

    @property
    def number(self) -> int:
        return int(self.body["n"])

    def to_json(self) -> dict[str, Any]:
        return {"body": self.body, "hash": self.hash, "signature": self.signature}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """A line of its JSON, not verified yet; CheckFailed LEDGER-FORM when it is not even a line."""
        if not (isinstance(value, dict) and set(value) == {"body", "hash", "signature"}):
            raise CheckFailed("LEDGER-FORM", "not a ledger line")
        body, line_hash, signature = value["body"], value["hash"], value["signature"]
        if not (isinstance(body, dict) and type(body.get("n")) is int):
            raise CheckFailed("LEDGER-FORM", "a ledger line without a numbered body")
        if not (is_hex(line_hash, 32) and is_hex(signature, 64)):
            raise CheckFailed("LEDGER-FORM", "a ledger line's hash or signature is not hex of the right length")
        return cls(body=body, hash=line_hash, signature=signature)


def body_digest(body: dict[str, Any]) -> bytes:
    """What of a body goes into the chain: 32 bytes, which an owner may show without showing the body."""
    return hashlib.sha256(canonical(body)).digest()


def link(previous: str | None, body: dict[str, Any]) -> str:
    """The hash of a line; previous is None for line 0."""
    return extend(previous or EMPTY, body_digest(body))


def extend(head: str, digests: bytes) -> str:
    """The head after lines of which only the bodies' digests are known, 32 bytes each, one after the other.

    Raises CheckFailed CHECKPOINT-PROOF when they are no whole number of digests.
    """
    if len(digests) % DIGEST_BYTES:
        raise CheckFailed("CHECKPOINT-PROOF", "a proof is a list of digests of 32 bytes")
    now = bytes.fromhex(head)
    for at in range(0, len(digests), DIGEST_BYTES):
        now = hashlib.sha256(_LINK + now + digests[at : at + DIGEST_BYTES]).digest()
    return now.hex()


def sign(line_hash: str, key: Ed25519PrivateKey) -> str:
    return key.sign(_SIGN + bytes.fromhex(line_hash)).hex()


def signed_by(line: Line, public: Ed25519PublicKey) -> bool:
    try:
        public.verify(bytes.fromhex(line.signature), _SIGN + bytes.fromhex(line.hash))
    except InvalidSignature:
        return False
    return True


@dataclass(kw_only=True, slots=True)
class Entry:
    """A reserved release and what became of it."""

    run: str
    release: str
    attempt: int
    event: Event
    count: int
    plan: str
    purpose: str
    state: State = "RESERVED"
    digest: str = ""
    """SHA-256 of the sealed bytes; the only bytes that may ever be sent for this release."""
    ballot: str = ""
    """Digest that closed the release: in a secure sum, of the one survivor set that this site signed."""


@dataclass(slots=True)
class Book:
    """What the lines so far say. `apply` accepts the next body or raises; it never half-applies one."""

    owner: str = ""
    public_key: str = ""
    size: int = 0
    at: int = 0
    """Unix time of the last line."""
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def noted(self, about: str, run: str) -> list[dict[str, Any]]:
        """The notes of a kind on a run, oldest first."""
        return [note for note in self.notes if note["about"] == about and note["fields"].get("run") == run]

    def apply(self, body: dict[str, Any]) -> None:
        kind = body.get("kind")
        if kind not in _FIELDS or set(body) != _FIELDS[kind] | {"n", "owner", "kind", "at"}:
            raise CheckFailed("LEDGER-FORM", "a ledger line of an unknown kind or with other fields than its kind's")
        if body["n"] != self.size or type(body["n"]) is not int or type(body["at"]) is not int:
            raise CheckFailed("LEDGER-NUMBER", f"line {self.size} is missing or out of place")
        if body["at"] < self.at and not (kind == "note" and body["about"] == CLOCK):
            raise CheckFailed("LEDGER-TIME", f"line {self.size} is older than the line before")
        if (kind == "open") != (self.size == 0):
            raise CheckFailed("LEDGER-FORM", "a ledger opens with its first line and only there")
        if self.size and body["owner"] != self.owner:
            raise CheckFailed("LEDGER-OWNER", "a line of another owner's ledger")
        getattr(self, f"_{kind}")(body)
        self.size, self.at = self.size + 1, body["at"]

    def _open(self, body: dict[str, Any]) -> None:
        if body["format"] != FORMAT or not is_hex(body["public_key"], 32) or not _is_name(body["owner"]):
            raise CheckFailed("LEDGER-FORM", "the first line names the format, the owner and the owner's key")
        self.owner, self.public_key = body["owner"], body["public_key"]

    def _reserve(self, body: dict[str, Any]) -> None:
        run, release, attempt, count = body["run"], body["release"], body["attempt"], body["count"]
        if not (_is_name(run) and _is_name(release) and isinstance(body["purpose"], str)):
            raise ProtocolError("LEDGER-FORM", "run, release and purpose are short texts")
        if type(count) is not int or count < 1 or type(attempt) is not int or attempt < 0:
            raise ProtocolError("LEDGER-FORM", "a count is 1 or more, an attempt 0 or more")
        if not is_hex(body["plan"], 32):
            raise ProtocolError("LEDGER-FORM", "a plan is named by its SHA-256")
        if (run, release) in self.entries:
            raise Refused(
                "LEDGER-ONCE",
                f"release {release!r} of run {run!r} was already reserved; each is paid and answered once",
                left=f"its state is {self.entries[run, release].state}",
                hint="send the sealed bytes again, or start a new run",
            )
        event = Event.from_json(body["event"])
        self.entries[run, release] = Entry(
            run=run,
            release=release,
            attempt=attempt,
            event=event,
            count=count,
            plan=body["plan"],
            purpose=body["purpose"],
        )

    def _advance(self, body: dict[str, Any]) -> None:
        entry = self.entries.get((body["run"], body["release"]))
        state, digest = body["state"], body["digest"]
        if entry is None:
            raise Refused("LEDGER-STATE", f"release {str(body['release'])[:80]!r} was never reserved")
        if state not in NEXT[entry.state]:
            raise Refused(
                "LEDGER-STATE", f"release {entry.release!r} cannot go from {entry.state} to {str(state)[:20]}"
            )
        if not (digest == "" or is_hex(digest, 32)) or (state == "SEALED" and not digest):
            raise ProtocolError("LEDGER-FORM", "sealing names the SHA-256 of the sealed bytes")
        if state != "SEALED" and digest and entry.ballot not in ("", digest):
            raise Refused("LEDGER-BALLOT", f"release {entry.release!r} is closed by the survivor set that it names")
        entry.state = state
        if state == "SEALED":
            entry.digest = digest
        elif digest:
            entry.ballot = digest

    def _note(self, body: dict[str, Any]) -> None:
        if not (_is_name(body["about"]) and isinstance(body["fields"], dict)):
            raise ProtocolError("LEDGER-FORM", "a note says what it is about, and has fields")
        self.notes.append(body)

    def charged_events(self, run: str | None = None) -> list[tuple[Event, int]]:
        """Every reserved event, burned and void ones included."""
        return [(e.event, e.count) for e in self.entries.values() if run is None or e.run == run]

    def state(self, run: str, release: str) -> str:
        entry = self.entries.get((run, release))
        return "NONE" if entry is None else entry.state


def replay(
    lines: Iterable[Line], *, owner: str | None = None, public: Ed25519PublicKey, signatures: bool = True
) -> tuple[Book, str]:
    """The book and head hash of a whole chain, or CheckFailed naming the first line that is wrong.

    signatures False checks the last one only: it signs the head hash, which fixes every line before it.
    """
    book, head, last = Book(), None, None
    for line in lines:
        where = (f"line {book.size}",)
        try:
            expected = link(head, line.body)
        except ProtocolError as error:
            raise CheckFailed("LEDGER-FORM", error.sentence, where=where) from None
        if line.body.get("n") != book.size:
            raise CheckFailed("LEDGER-NUMBER", f"line {book.size} is missing or out of place", where=where)
        if expected != line.hash:
            raise CheckFailed("LEDGER-HASH", f"line {book.size} does not fit its hash", where=where)
        if signatures and not signed_by(line, public):
            raise CheckFailed("LEDGER-SIGNATURE", f"line {book.size} is not signed by its owner", where=where)
        try:
            book.apply(line.body)
        except (Refused, ProtocolError, CheckFailed) as error:
            raise CheckFailed(error.code, f"line {book.size}: {error.sentence}", where=where) from None
        head, last = line.hash, line
    if head is None or last is None:
        raise CheckFailed("LEDGER-EMPTY", "the ledger holds no line")
    if not signatures and not signed_by(last, public):
        raise CheckFailed("LEDGER-SIGNATURE", "the last line is not signed by its owner")
    if book.public_key != public.public_bytes_raw().hex():
        raise CheckFailed("LEDGER-KEY", "the ledger was opened with another key than its owner's")
    if owner is not None and book.owner != owner:
        raise CheckFailed("LEDGER-OWNER", f"the ledger of {book.owner!r}, not of {owner!r}")
    return book, head


def read_jsonl(path: Path) -> Iterator[Line]:
    """The lines of an exported ledger; each must be in canonical form, so that one ledger has one file."""
    try:
        raw = path.read_bytes()
    except OSError:
        raise CheckFailed("LEDGER-FILE", "the ledger's file cannot be read", where=(str(path),)) from None
    if raw and not raw.endswith(b"\n"):
        raise CheckFailed("LEDGER-FORM", "the file ends in the middle of a line", where=(str(path),))
    for at, text in enumerate(raw.split(b"\n")[:-1]):
        try:
            value = json.loads(text)
            ok = canonical(value) == text
        except (ValueError, RecursionError, ProtocolError):
            ok = False
        if not ok:
            raise CheckFailed("LEDGER-FORM", f"line {at} is not canonical JSON", where=(f"{path}:{at + 1}",))
        yield Line.from_json(value)


def write_jsonl(lines: Iterable[Line], path: Path) -> None:
    path.write_bytes(b"".join(canonical(line.to_json()) + b"\n" for line in lines))


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """How long a ledger is and where it stands: what a witness remembers, to see rollbacks and forks."""

    owner: str
    size: int
    hash: str


def checkpoint_text(head: Checkpoint, key: Ed25519PrivateKey) -> str:
    """A signed note in the shape of C2SP tlog-checkpoint: origin, size, hash in base64, signature line.

    The hash is the chain's head, not a Merkle root; the origin says so by its format.
    """
    name = _origin(head.owner)
    text = f"{name}\n{head.size}\n{_base64(bytes.fromhex(head.hash))}\n"
    mark = _key_mark(name, key.public_key()) + key.sign(text.encode())
    return f"{text}\n— {name} {_base64(mark)}\n"


def verify_checkpoint(text: str, public: Ed25519PublicKey, *, owner: str | None = None) -> Checkpoint:
    """The checkpoint that the key's holder signed; CheckFailed CHECKPOINT-... for anything else."""
    try:
        note, tail = text.split("\n\n")
        name, size, root = note.split("\n")
        dash, signer, mark = tail.removesuffix("\n").split(" ")
        number, raw = int(size), base64.b64decode(mark, validate=True)
        head = base64.b64decode(root, validate=True)
        well_formed = dash == "—" and signer == name and str(number) == size and number > 0
        well_formed = well_formed and len(head) == 32 and len(raw) == 68 and name.startswith(_ORIGIN)
        signed = (note + "\n").encode()  # a lone surrogate is a ValueError too
    except ValueError:
        well_formed = False
    if not well_formed:
        raise CheckFailed("CHECKPOINT-FORM", "not a signed checkpoint")
    try:
        public.verify(raw[4:], signed)
    except InvalidSignature:
        raise CheckFailed("CHECKPOINT-SIGNATURE", "the checkpoint is not signed by its owner") from None
    found = unquote(name.removeprefix(_ORIGIN))
    if raw[:4] != _key_mark(name, public) or (owner is not None and found != owner):
        raise CheckFailed("CHECKPOINT-OWNER", "the checkpoint names another owner or key")
    return Checkpoint(owner=found, size=number, hash=head.hex())


_ORIGIN = f"{FORMAT}/"


def _origin(owner: str) -> str:
    return _ORIGIN + quote(owner, safe="")


def _key_mark(name: str, public: Ed25519PublicKey) -> bytes:
    return hashlib.sha256(name.encode() + b"\n\x01" + public.public_bytes_raw()).digest()[:4]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def is_hex(value: Any, size: int) -> bool:
    return isinstance(value, str) and len(value) == 2 * size and set(value) <= set("0123456789abcdef")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200

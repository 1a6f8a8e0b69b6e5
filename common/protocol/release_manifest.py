"""What is signed under a release: an in-toto statement in DSSE envelopes, one envelope for each who signs.

    FOLDER/release.json              the envelope that the coordinator signed
    FOLDER/signatures/SITE.json      the same statement, signed by a site
    statement = {_type, subject [{name, digest {sha256}}], predicateType, predicate}     canonical JSON, no floats
    signature = Ed25519("DSSEv1" SP len(type) SP type SP len(payload) SP payload)

The subjects are all files of the folder but the envelopes. A signature made here fits nothing else that a site signs:
every other preimage of this package begins with "cohortium".
Sources: in-toto Attestation Framework, Statement v1; DSSE v1.0.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.messages import canonical, digest

ENVELOPE = "release.json"
SIGNATURES = "signatures"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cohortium:release:1"
MOST_BYTES = 64 * 1024 * 1024
MOST_SIGNATURES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What everybody signs. payload: its canonical bytes; subjects: file -> SHA-256 in hex."""

    payload: bytes
    subjects: dict[str, str]
    predicate: dict[str, Any]

    @classmethod
    def of(cls, subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> Self:
        """A manifest to be signed. ProtocolError RELEASE-FORM for a name that leads out of a folder, MSG-FLOAT."""
        listed = [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)]
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": listed,
            "predicateType": PREDICATE_TYPE,
            "predicate": dict(predicate),
        }
        return cls.read(canonical(statement))

    @classmethod
    def read(cls, payload: bytes) -> Self:
        """The manifest of its bytes; ProtocolError RELEASE-FORM for anything that `of` would not have written."""
        try:
            value = json.loads(payload)
            if set(value) != {"_type", "subject", "predicateType", "predicate"} or canonical(value) != payload:
                raise ValueError
            if (value["_type"], value["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
                raise ValueError
            subjects: dict[str, str] = {}
            for entry in value["subject"]:
                name, sha = entry["name"], entry["digest"]["sha256"]
                fits = set(entry) == {"name", "digest"} and set(entry["digest"]) == {"sha256"}
                if not (fits and is_inside(name) and _is_digest(sha)) or name in subjects:
                    raise ValueError
                subjects[name] = sha
            if not subjects or not isinstance(value["predicate"], dict):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _unreadable("the release's manifest") from None
        return cls(payload=payload, subjects=subjects, predicate=value["predicate"])

    @property
    def digest(self) -> str:
        """SHA-256 of the payload: names this release and no other."""
        return digest(self.payload)


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """A payload and who claims to have signed it: (key id, signature). Nothing is verified yet."""

    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """The envelope of its file's bytes; ProtocolError RELEASE-FORM."""
        try:
            if len(raw) > MOST_BYTES:
                raise ValueError
            value = json.loads(raw)
            if set(value) != {"payloadType", "payload", "signatures"} or value["payloadType"] != PAYLOAD_TYPE:
                raise ValueError
            found = tuple((_text(s["keyid"]), _unbase64(s["sig"])) for s in value["signatures"])
            if not 1 <= len(found) <= MOST_SIGNATURES:
                raise ValueError
            return cls(payload=_unbase64(value["payload"]), signatures=found)
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
            raise _unreadable("an envelope of the release") from None

    def to_bytes(self) -> bytes:
        """One line of JSON."""
        signatures = [{"keyid": name, "sig": _base64(signature)} for name, signature in self.signatures]
        value = {"payloadType": PAYLOAD_TYPE, "payload": _base64(self.payload), "signatures": signatures}
        return canonical(value) + b"\n"

    def signed_by(self, public: Ed25519PublicKey) -> bool:
        """Whether one of the signatures is this key's. The key ids are hints and are not asked."""
        for _, signature in self.signatures:
            try:
                public.verify(signature, _preimage(self.payload))
            except InvalidSignature:
                continue
            return True
        return False


def sign_release(manifest: Manifest, key: Ed25519PrivateKey) -> Envelope:
    """The envelope that says: the holder of this key stands for this release."""
    signature = key.sign(_preimage(manifest.payload))
    return Envelope(payload=manifest.payload, signatures=((key_id(key.public_key()), signature),))


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw key, hex: the fingerprint that people compare, without gaps."""
    return digest(public.public_bytes_raw())


def signature_file(owner: str) -> str:
    """Where a site's envelope lies in the folder; a name leads nowhere else, whatever it holds."""
    return f"{SIGNATURES}/{plain_name(owner)}.json"


def plain_name(owner: str) -> str:
    """A site's name as part of a file name."""
    return quote(owner, safe=" ")


def file_digests(folder: Path) -> dict[str, str | None]:
    """Every file of a release but its envelopes: name -> SHA-256; None for what is no plain, readable file.

    Names are relative, with slashes. Links are not followed: what lies behind one is not in the folder.
    """
    found: dict[str, str | None] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        for name in sorted((*folders, *files)):
            path = here / name
            relative = path.relative_to(folder).as_posix()
            kind = os.lstat(path).st_mode
            if stat.S_ISDIR(kind):
                continue
            if stat.S_ISREG(kind) and (relative == ENVELOPE or relative.startswith(SIGNATURES + "/")):
                continue
            found[relative] = _sha256(path) if stat.S_ISREG(kind) else None
    return found


def is_inside(name: Any) -> bool:
    """Whether a name is that of a file inside the folder, spelled in one way only."""
    if not isinstance(name, str) or not name or "\\" in name or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name != "."


def _preimage(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unbase64(text: Any) -> bytes:
    return base64.b64decode(_text(text), validate=True)


def _unreadable(what: str) -> ProtocolError:
    return ProtocolError("RELEASE-FORM", f"{what} cannot be read")

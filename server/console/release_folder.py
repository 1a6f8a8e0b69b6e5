"""A written release on the coordinator's disk: who signed it, a site's signature taken in, the folder as one zip.

Only what the coordinator's own key signed is called a release here, and only signed files are handed out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import CheckFailed, CohortiumError, ProtocolError, Refused
from cohortium.common.protocol.certificates import write_file
from cohortium.common.protocol.release_manifest import (
    ENVELOPE,
    SIGNATURES,
    Envelope,
    Manifest,
    signature_file,
)
from cohortium.common.protocol.signing import fingerprint, public_from_raw
from cohortium.server.audit import COORDINATOR
from cohortium.server.release_gate import Finding

VALID, INVALID, MISSING = "valid", "invalid", "missing"
FOLDER = "release"
"""RUN/release, where `cohortium release RUN` writes."""
MOST_SIGNATURE = 1_500_000
PIECE = 256 * 1024
_SAFE = re.compile(r"[A-Za-z0-9 ._%~-]+(/[A-Za-z0-9 ._%~-]+)*")
_DENSE = (".parquet", ".npz", ".pdf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """One site's: VALID, INVALID (a file that is not this site's signature under this release) or MISSING."""

    site: str
    state: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A release whose manifest the coordinator's key signed. gate: what the gate found when it let it go."""

    folder: Path
    manifest: Manifest
    keys: Mapping[str, Ed25519PublicKey]
    coordinator: str
    signatures: tuple[Signature, ...]
    strange: tuple[str, ...]
    needed: int
    at: int
    sentence: str
    rehearsal: bool
    warnings: tuple[str, ...]
    gate: tuple[Finding, ...]

    @property
    def signed(self) -> int:
        return sum(one.state == VALID for one in self.signatures)

    @property
    def complete(self) -> bool:
        return self.signed >= self.needed

    def to_json(self) -> dict[str, Any]:
        return {
            "release": self.manifest.digest,
            "at": self.at,
            "statement": self.sentence,
            "rehearsal": self.rehearsal,
            "coordinator": self.coordinator,
            "sites_needed": self.needed,
            "sites_signed": self.signed,
            "complete": self.complete,
            "signatures": [
                {"site": one.site, "state": one.state, "fingerprint": one.fingerprint} for one in self.signatures
            ],
            "files": self.manifest.subjects,
        }


def read_written(folder: Path, coordinator: Ed25519PublicKey) -> Written:
    """The release in a folder; Refused RELEASE-MISSING, CheckFailed RELEASE-FOLDER (not what this key signed)."""
    path = folder / ENVELOPE
    try:
        if folder.is_symlink() or path.is_symlink():
            raise OSError
        envelope = Envelope.read(path.read_bytes())
        manifest = Manifest.read(envelope.payload)
        facts = manifest.predicate
        keys = {str(o): public_from_raw(bytes.fromhex(key)) for o, key in facts["keys"].items() if o != COORDINATOR}
        statement = facts["statement"]
        fits = envelope.signed_by(coordinator) and facts["keys"][COORDINATOR] == coordinator.public_bytes_raw().hex()
        if not fits:
            raise ValueError
        here = {place.name for place in (folder / SIGNATURES).iterdir()}
        return Written(
            folder=folder,
            manifest=manifest,
            keys=keys,
            coordinator=fingerprint(coordinator),
            signatures=tuple(_signature(folder, site, key, envelope.payload) for site, key in sorted(keys.items())),
            strange=tuple(sorted(here - {Path(signature_file(site)).name for site in keys})),
            needed=int(facts["sites_needed"]),
            at=int(facts["at"]),
            sentence=str(statement["sentence"]),
            rehearsal=statement["rehearsal"] is not False,
            warnings=tuple(str(text) for text in facts["warnings"]),
            gate=tuple(
                Finding(code=str(f["code"]), name=str(f["name"]), ok=f["ok"] is True, detail=str(f["detail"]))
                for f in facts["gate"]
            ),
        )
    except FileNotFoundError as error:
        if not path.exists():
            raise Refused("RELEASE-MISSING", "no release of this run is written") from None
        raise _spoiled() from error
    except (OSError, CohortiumError, KeyError, TypeError, ValueError, AttributeError):
        raise _spoiled() from None


def _spoiled() -> CheckFailed:
    return CheckFailed(
        "RELEASE-FOLDER",
        "what lies in the release's folder is not what this coordinator signed",
        where=(f"{FOLDER}/{ENVELOPE}",),
        hint="cohortium verify RUN/release says more; move the folder away and release the run again",
    )


def _signature(folder: Path, site: str, key: Ed25519PublicKey, payload: bytes) -> Signature:
    path = folder / signature_file(site)
    state = MISSING
    if path.exists() or path.is_symlink():
        state = INVALID
        try:
            if not path.is_symlink():
                envelope = Envelope.read(path.read_bytes())
                state = VALID if envelope.payload == payload and envelope.signed_by(key) else INVALID
        except (OSError, ProtocolError):
            pass
    return Signature(site=site, state=state, fingerprint=fingerprint(key))


def stamps(folder: Path) -> tuple[Any, ...]:
    """Changes with the manifest and with every signature's file; () where no release is."""
    places = [folder / ENVELOPE]
    with contextlib.suppress(OSError):
        places += sorted((folder / SIGNATURES).iterdir())
    found = []
    for place in places:
        try:
            at = place.lstat()
        except OSError:
            continue
        found.append((place.name, at.st_mtime_ns, at.st_size, at.st_ino))
    return tuple(found)


# ---- a signature from a site --------------------------------------------------------------------------------


def take_signature(written: Written, raw: bytes) -> str:
    """Put a site's signature into the folder; the site, told by its key, never by the file's name.

    ProtocolError RELEASE-FORM; CheckFailed SIGNATURE-OTHER (another release), SIGNATURE-KEY (no site of this plan).
    """
    envelope = Envelope.read(raw)
    if envelope.payload != written.manifest.payload:
        raise CheckFailed(
            "SIGNATURE-OTHER",
            "this file signs another release, or a changed copy of this one",
            left="nothing was taken in",
            hint="send the site the folder as it is downloaded here, and let it sign that",
        )
    site = next((site for site, key in written.keys.items() if envelope.signed_by(key)), None)
    if site is None:
        raise CheckFailed(
            "SIGNATURE-KEY",
            "no site of this plan signed this with the key under which it took part",
            left="nothing was taken in",
            hint="after a change of keys the sites that kept theirs sign",
        )
    write_file(written.folder / signature_file(site), raw, 0o644)
    return site


# ---- the folder as one file ---------------------------------------------------------------------------------


def packed(written: Written, top: str) -> Iterator[bytes]:
    """A zip of the signed files and the valid signatures, below a folder `top`, in pieces.

    Every file is held against its signed digest before the first piece: CheckFailed RELEASE-FILE.
    """
    names = sorted(written.manifest.subjects)
    for name in names:
        path = written.folder / name
        if not _SAFE.fullmatch(name) or not _is_plain(written.folder, name) or _sha256(path) != _signed(written, name):
            raise CheckFailed(
                "RELEASE-FILE",
                "a file of the release is missing or was changed after it was signed",
                where=(name,),
                left="nothing was handed out",
                hint="cohortium verify RUN/release lists every such file",
            )
    names += [ENVELOPE, *(signature_file(one.site) for one in written.signatures if one.state == VALID)]
    return _zip(written.folder, top, names)


def _zip(folder: Path, top: str, names: list[str]) -> Iterator[bytes]:
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", allowZip64=True) as archive:
        for name in names:
            info = zipfile.ZipInfo.from_file(folder / name, f"{top}/{name}", strict_timestamps=False)
            info.external_attr = 0o100644 << 16
            info.compress_type = zipfile.ZIP_STORED if name.endswith(_DENSE) else zipfile.ZIP_DEFLATED
            with (folder / name).open("rb") as source, archive.open(info, "w", force_zip64=True) as entry:
                while piece := source.read(PIECE):
                    entry.write(piece)
                    yield from sink.taken()
        yield from sink.taken()
    yield from sink.taken()


class _Sink:
    """Where a zip is written piece by piece: no seeking, nothing on disk."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""

    def taken(self) -> Iterator[bytes]:
        pieces, self._pieces = self._pieces, []
        if pieces:
            yield b"".join(pieces)


def _signed(written: Written, name: str) -> str:
    return written.manifest.subjects[name]


def _is_plain(folder: Path, name: str) -> bool:
    """Whether neither the file nor a folder on the way to it is a link."""
    parts = Path(name).parts
    ways = [folder.joinpath(*parts[: at + 1]) for at in range(len(parts))]
    return ways[-1].is_file() and not any(os.path.islink(way) for way in ways)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

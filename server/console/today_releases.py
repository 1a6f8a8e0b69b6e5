"""How far releases are signed, by the files that are there, for Today. The Release page verifies them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from cohortium.common.errors import CohortiumError
from cohortium.common.protocol.release_manifest import ENVELOPE, SIGNATURES, Envelope, Manifest, signature_file
from cohortium.server.console.desk import Desk


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """needed: sites that have to sign; by: those whose signature file is there. The Release page verifies them."""

    needed: int
    signed: int
    by: frozenset[str]


_read: dict[Path, tuple[tuple[int, int], Signed | None]] = {}
_lock = threading.Lock()


def released(desk: Desk, run: str) -> Signed | None:
    """How far a run's release is signed; None where there is none, or it cannot be read. Read again when it changes."""
    folder = desk.consortium.runs / run / "release"
    try:
        stamp = (folder / ENVELOPE).stat().st_mtime_ns, (folder / SIGNATURES).stat().st_mtime_ns
    except OSError:
        return None
    with _lock:
        known = _read.get(folder)
    if known is not None and known[0] == stamp:
        return known[1]
    try:
        manifest = Manifest.read(Envelope.read((folder / ENVELOPE).read_bytes()).payload)
        needed = int(manifest.predicate["sites_needed"])
        files = {path.name for path in (folder / SIGNATURES).iterdir()}
        sites = desk.register.approvals(run)
        by = frozenset(site for site in sites if Path(signature_file(site)).name in files)
        found: Signed | None = Signed(needed=needed, signed=len(by), by=by)
    except (OSError, CohortiumError, KeyError, TypeError, ValueError):
        found = None
    with _lock:
        _read[folder] = stamp, found
    return found

"""What the members' service asks this machine: how runs stand, synthetic rows, a stop, a co-signature.

The service has checked who asks and what for; nothing here decides about access, except that a status without a
run's name holds what its member may see.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cohortium.common.errors import PeerUnreachable, Refused, UsageError
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.conduct import ask_to_stop, told_state
from cohortium.server.consortium import Consortium
from cohortium.server.mirror import Mirror
from cohortium.server.progress import Progress
from cohortium.server.register import Register, RunRow
from cohortium.server.runs import SAMPLES, RunFolder
from cohortium.server.seen import Seen
from cohortium.server.witnesses import between_runs

CHUNK_BYTES = 256 * 1024
MOST_ROWS = 10_000_000
SAMPLING_S = 1800.0


def row_facts(consortium: Consortium, register: Register, row: RunRow, progress: Progress) -> dict[str, Any]:
    """One run as `cohortium watch --json` prints it."""
    folder = RunFolder(root=consortium.root / row.folder)
    facts = {
        "run": row.run,
        "state": told_state(row),
        "since": row.since,
        "attempts": row.attempts,
        "message": row.message,
        "approvals": register.approvals(row.run),
    }
    return facts | progress.of(folder)


class LiveBacking:
    """The Backing of server/service.py over a consortium's directory. Any thread may call it."""

    def __init__(self, consortium: Consortium, register: Register, seen: Seen) -> None:
        self._consortium, self._register, self._seen = consortium, register, seen
        self._progress = Progress(consortium.mirror)
        self._sampling = threading.Semaphore(1)
        self._witnessing = threading.Lock()

    def status(self, run: str | None, member: Any) -> dict[str, Any]:
        """The run, or {"runs": [...]} of all that the member may see. Refused RUN-UNKNOWN."""
        name = str(getattr(member, "name", member))
        self._seen.saw(name)
        if run:
            row = self._register.run_row(run)
            return row_facts(self._consortium, self._register, row, self._progress)
        rows = [row for row in self._register.runs() if self._register.entitled(row.run, name)]
        return {"runs": [row_facts(self._consortium, self._register, row, self._progress) for row in rows]}

    def rows(self, run: str, rows: int, format: str) -> Iterator[bytes]:
        """The published table, or as many rows as are asked for, in pieces. rows 0: the published ones.

        Refused RUN-UNFINISHED, BUSY; UsageError ROWS-FORMAT, ROWS-NUMBER. All before the first piece.
        """
        if format not in ("parquet", "csv"):
            raise UsageError("ROWS-FORMAT", "rows come as parquet or csv")
        if not 0 <= rows <= MOST_ROWS:
            raise UsageError("ROWS-NUMBER", f"at most {MOST_ROWS:,} rows at once")
        row = self._register.run_row(run)
        folder = RunFolder(root=self._consortium.root / row.folder)
        if row.state != "finished":
            raise Refused("RUN-UNFINISHED", "this run has published nothing yet")
        if rows in (0, folder.plan().rows):
            return _pieces(folder.root / next(name for name in SAMPLES if name.endswith(format)))
        return self._sampled(folder, rows, format)

    def stop(self, run: str) -> None:
        ask_to_stop(self._register, run)

    def witness(self, site: str, checkpoint_text: str) -> list[str]:
        """The coordinator's co-signature of a site's checkpoint; [] where its lines are not here yet.

        CheckFailed MIRROR-ROLLBACK, MIRROR-FORK, CHECKPOINT-...
        """
        self._seen.saw(site)
        member = self._register.member(site)
        if member is None or not member.active:
            raise Refused("MEMBER-UNKNOWN", "nobody of this name takes part")
        with self._witnessing, Mirror(self._consortium.mirror, {site: public_from_raw(member.identity)}) as mirror:
            return between_runs(mirror, site, checkpoint_text, self._consortium.key())

    def _sampled(self, folder: RunFolder, rows: int, format: str) -> Iterator[bytes]:
        """In a process of its own: sampling wants the memory of a whole model, and the service's threads their time."""
        if not self._sampling.acquire(blocking=False):
            raise Refused("BUSY", "rows are being sampled for somebody else", hint="ask again in a minute")
        try:
            place = tempfile.TemporaryDirectory(prefix="rows-", dir=self._consortium.runs)
            out = Path(place.name) / f"rows.{format}"
            command = [sys.executable, "-m", "cohortium.server.finish", "rows", str(folder.root), str(rows), str(out)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SAMPLING_S)
            if done.returncode or not out.exists():
                raise PeerUnreachable("UNAVAILABLE", "the rows could not be sampled")
        except subprocess.TimeoutExpired:
            raise PeerUnreachable("UNAVAILABLE", "sampling took too long") from None
        finally:
            self._sampling.release()

        def pieces() -> Iterator[bytes]:
            with place:
                yield from _pieces(out)

        return pieces()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece

"""A run's events as they grow: read once, kept, and only what was appended is read again.

    log = RunLog(RUN/run/events.jsonl);  log.refresh() -> whether anything was new
    log.releases    index -> what became of it;   log.marks: starts, hellos, failures, in order

Events are the coordinator's own files, but what stands in them came from sites: nothing here trusts a field's type.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_MARKS = 200
RECENT = 20
"""So many releases give the pace, as in server/progress.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """One release. sites: how many answered; void: a code where nothing came out, else ""; at: seconds since 1970."""

    index: int
    sites: int
    dropped: tuple[str, ...]
    void: str
    seconds: float
    at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Anything but a release: "try", "start", "hello", "failed", "stopped", "fitted"."""

    event: str
    at: float
    sites: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    number: int = 0
    code: str = ""
    sentence: str = ""
    fix: str = ""


@dataclass(kw_only=True)
class RunLog:
    """Threads may share it; `releases` and `marks` are replaced or added to, never changed under a reader."""

    path: Path
    releases: dict[int, Done] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    pace: list[float] = field(default_factory=list)
    _read: int = 0
    _stamp: tuple[int, int, int] = (0, 0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Changes whenever something new was read."""
        return self._stamp

    def refresh(self) -> bool:
        """Read what is new. A file that became shorter, or another one, is read anew."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        stamp = stat.st_ino, stat.st_size, stat.st_mtime_ns
        with self._lock:
            if stamp == self._stamp:
                return False
            if stat.st_ino != self._stamp[0] or stat.st_size < self._read:
                self._read, self.releases, self.marks, self.pace = 0, {}, [], []
            with self.path.open("rb") as file:
                file.seek(self._read)
                block = file.read(stat.st_size - self._read)
            whole = block.rfind(b"\n") + 1  # a line that is being written is read the next time
            self._read += whole
            self._stamp = stamp
            releases, marks = dict(self.releases), list(self.marks)
            for line in block[:whole].splitlines():
                self._take(line, releases, marks)
            self.releases, self.marks = releases, marks[-MOST_MARKS:]
        return True

    def seconds_left(self, missing: int) -> float | None:
        """From the time between the newest releases of the attempt under way; None before there are two."""
        at = self.pace[-RECENT:]
        if missing <= 0:
            return 0.0
        if len(at) < 2 or at[-1] <= at[0]:
            return None
        return (at[-1] - at[0]) / (len(at) - 1) * missing

    def dropped(self) -> dict[str, int]:
        """Site -> in how many releases it dropped."""
        found: dict[str, int] = {}
        for done in self.releases.values():
            for site in done.dropped:
                found[site] = found.get(site, 0) + 1
        return found

    def last(self) -> Mark | None:
        return self.marks[-1] if self.marks else None

    def _take(self, line: bytes, releases: dict[int, Done], marks: list[Mark]) -> None:
        try:
            value = json.loads(line)
            at = _number(value["at"])
            if value["event"] == "release":
                index = int(value["index"])
                # A resumed run tells its kept releases again at once: the first time is when it happened.
                first = releases[index].at if index in releases else at
                releases[index] = Done(
                    index=index,
                    sites=len(value["sites"]),
                    dropped=tuple(str(site) for site in value["dropped"]),
                    void=str(value["void"]),
                    seconds=_number(value["seconds"]),
                    at=first,
                )
                self.pace = [*self.pace[-RECENT:], at]
                return
            marks.append(_mark(str(value["event"]), at, value))
            if value["event"] == "start":
                self.pace = []
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return  # cut short by a crash, or of another version: left out


def _number(value: Any) -> float:
    """Finite, not negative, and a time that a calendar has; ValueError."""
    found = float(value)
    if not 0 <= found < 1e11:
        raise ValueError
    return found


def _mark(event: str, at: float, value: dict[str, Any]) -> Mark:
    refused = value.get("refused") or {}
    return Mark(
        event=event,
        at=at,
        sites=tuple(str(site) for site in value.get("sites") or ()),
        refused=tuple(sorted((str(site), str(code)) for site, code in refused.items())),
        number=int(value.get("number") or 0),
        code=str(value.get("code") or ""),
        sentence=str(value.get("sentence") or ""),
        fix=str(value.get("fix") or ""),
    )

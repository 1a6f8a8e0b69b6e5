"""When each member was last heard of: a small file that `serve` writes and `sites list` reads, for display only."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cohortium.common.protocol import certificates

WRITE_EVERY_S = 5.0


class Seen:
    """path: CONSORTIUM/seen.json, {name: {"at": seconds since 1970, ...facts}}. Any thread may call."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._facts = load(path)
        self._written = 0.0
        self._changed = False

    def saw(self, name: str, **facts: Any) -> None:
        """This member has just been heard of."""
        with self._lock:
            self._facts[name] = {**self._facts.get(name, {}), "at": int(self._clock()), **facts}
            self._changed = True
            if self._clock() - self._written >= WRITE_EVERY_S:
                self._write()

    def flush(self) -> None:
        with self._lock:
            if self._changed:
                self._write()

    def _write(self) -> None:
        # A full disk shall stop a run with its own message, not because a display cannot be written.
        with contextlib.suppress(OSError):
            certificates.write_file(self._path, json.dumps(self._facts, sort_keys=True).encode(), 0o600)
            self._written, self._changed = self._clock(), False


def load(path: Path) -> dict[str, dict[str, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

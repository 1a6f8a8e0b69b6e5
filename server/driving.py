"""Who drives a run: one process at a time, and whether the last one still lives.

    RUN/driver    Flower's id of the attempt that took the run, locked for as long as its process lives

Flower misses a killed ServerApp only when a minute of heartbeats is gone; the system lets go of a lock at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cohortium.common.errors import Refused

NAME = "driver"
WAIT_S = 15.0


@contextlib.contextmanager
def driving(root: Path, attempt: int, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Drive the run in `root` as Flower's run `attempt`, alone.

    Refused RUN-DRIVEN where another process still does after wait_s.
    """
    lock = os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while not _locked(lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Refused(
                    "RUN-DRIVEN",
                    "another process drives this run",
                    where=(str(root),),
                    hint="two services must not share a consortium's directory; stop one of them",
                )
            time.sleep(0.1)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{attempt}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def has_ended(root: Path, attempt: int) -> bool:
    """Whether this attempt took the run and its process is gone. False where it never did, or a later one has."""
    try:
        lock = os.open(root / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _locked(lock, fcntl.LOCK_SH) and os.pread(lock, 40, 0) == f"{attempt}\n".encode()
    finally:
        os.close(lock)


def _locked(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""What was worked out of files, kept until they change: at once, or in a thread beside the requests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from cohortium.common.errors import CohortiumError

JOBS_KEPT = 200
T = TypeVar("T")


class Kept(Generic[T]):
    """What was worked out of a file, by run, until the file changes. Errors are kept like values."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._found: OrderedDict[str, tuple[Any, T | CohortiumError]] = OrderedDict()

    def get(self, key: str, stamp: Any, make: Callable[[], T]) -> T:
        with self._lock:
            known = self._found.get(key)
        if known is None or known[0] != stamp:
            made: T | CohortiumError
            try:
                made = make()
            except CohortiumError as error:
                made = error
            known = stamp, made
            with self._lock:
                self._found[key] = known
                self._found.move_to_end(key)
                while len(self._found) > self._most:
                    self._found.popitem(last=False)
        if isinstance(known[1], CohortiumError):
            raise known[1].with_traceback(None)
        return known[1]


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does; None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Jobs(Generic[T]):
    """Work beside the requests, one piece at a time: each key's newest result, until its stamp changes."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self._worker, self._lock = worker, threading.Lock()
        self._known: OrderedDict[str, tuple[Any, Future[T]]] = OrderedDict()

    def ask(self, key: str, stamp: Any, make: Callable[[], T], *, again: bool = False) -> Future[T]:
        """again: make it anew although nothing changed; what is under way is not started twice."""
        with self._lock:
            known = self._known.get(key)
            if known is not None and (not known[1].done() or (known[0] == stamp and not again)):
                return known[1]
            future = self._worker.submit(make)
            self._known[key] = stamp, future
            self._known.move_to_end(key)
            while len(self._known) > JOBS_KEPT:
                self._known.popitem(last=False)
            return future

    def known(self, key: str, stamp: Any) -> Future[T] | None:
        """What was asked before and is under way, or still holds."""
        with self._lock:
            known = self._known.get(key)
        return known[1] if known is not None and (known[0] == stamp or not known[1].done()) else None

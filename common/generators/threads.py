"""One thread for torch and BLAS: sums have one order, and a fit is the same on machines of every size.

Several cores are used by several blocks at once (`in_order`), each on one thread. torch itself is loaded when
something of it is first used: it takes a second and 150 MB, and most commands, and every site of a `mixture`, never do.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from cohortium.common.late import Late

if TYPE_CHECKING:
    import torch as torch
    from threadpoolctl import ThreadpoolController

T = TypeVar("T")
WORKERS_AT_MOST = 4


class _Torch(Late):
    """torch; loaded inside `one_thread` it begins with one thread, as if it had been there before."""

    def load(self) -> ModuleType:
        global _default
        with _lock:
            first = "torch" not in sys.modules
            module = super().load()
            if first:
                _default = module.get_num_threads()
                if _open:
                    module.set_num_threads(1)
        return module


if not TYPE_CHECKING:
    torch = _Torch("torch")

_lock = threading.RLock()
_open = 0
_default = 1  # torch's own number of threads, once it is loaded


@lru_cache(maxsize=4)
def _libraries(*loaded: bool) -> ThreadpoolController:
    """The BLAS libraries of this process; looked for again, a millisecond, when one that brings its own was loaded."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    global _open
    with _lock:
        _open += 1
        module = sys.modules.get("torch")
        before = None if module is None else module.get_num_threads()
        if module is not None:
            module.set_num_threads(1)
    try:
        with _libraries("torch" in sys.modules, "scipy" in sys.modules).limit(limits=1, user_api="blas"):
            yield
    finally:
        with _lock:
            _open -= 1
            module = sys.modules.get("torch")
            if module is not None:
                module.set_num_threads(_default if before is None else before)


def in_order(make: Callable[[int], T], count: int) -> Iterator[T]:
    """make(0), make(1), … make(count − 1), some ahead of time on other cores; what each gives depends on its number
    alone. At most as many as there are workers wait to be taken, so memory stays that of a few blocks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(WORKERS_AT_MOST, cores, count)
    if workers <= 1:
        yield from map(make, range(count))
        return
    waiting: deque[Future[T]] = deque()
    # The count of threads is a setting of the process: it is put back when the last block is done, not by each.
    with one_thread(), ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for number in range(count):
                waiting.append(pool.submit(make, number))
                if len(waiting) >= workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""One thread for torch and BLAS: sums have one order, and a fit is the same on machines of every size.

Several cores are used by several blocks at once (`in_order`), each on one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

T = TypeVar("T")
WORKERS_AT_MOST = 4


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # looking for them takes a millisecond: once


@contextmanager
def one_thread() -> Iterator[None]:
    import torch  # takes a second: whoever only asks for a status never comes here

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


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

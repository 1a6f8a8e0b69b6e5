"""One thread for torch and BLAS: sums have one order, and a fit is the same on machines of every size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

_LIBRARIES = ThreadpoolController()  # looking for them takes a millisecond: once


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _LIBRARIES.limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)

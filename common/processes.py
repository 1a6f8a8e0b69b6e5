"""What the processes that we start have in common: how they end."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator


def leave_with(parent: int) -> None:
    """End this process by SIGTERM when its parent has gone, so that a killed supervisor leaves no child behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def stopping(
    stop: threading.Event, *, impatient: bool = False, also: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`.

    impatient: a second SIGINT raises KeyboardInterrupt. also: called at the first signal. Outside the main thread,
    where Python allows no handlers, whoever made `stop` sets it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: object) -> None:
        if impatient and stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.is_set():
            also()
        # Never here: the main thread may hold the event's lock, about to wait, and would wait for itself. Nor through
        # threading.Thread, whose start takes a lock of its own.
        _thread.start_new_thread(stop.set, ())

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

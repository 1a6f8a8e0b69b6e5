"""What the processes that we start have in common: how they end."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

PARENT = "COHORTIUM_PARENT"
"""The supervisor's process id, in a child's environment. Asked of the system later, a child whose supervisor died
while it was loading its modules would take its adopter for the supervisor and stay for ever."""
LEAVE_WITHIN_S = 10.0


def parent() -> dict[str, str]:
    """What a supervisor adds to the environment of a child that calls `leave_with_parent`."""
    return {PARENT: str(os.getpid())}


def leave_with_parent() -> None:
    """End this process when its supervisor has gone: by SIGTERM, and by SIGKILL if it is still there after a while."""
    supervisor = int(os.environ.pop(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LEAVE_WITHIN_S)
        os.kill(os.getpid(), signal.SIGKILL)

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

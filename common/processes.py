"""What the child processes that we start have in common."""

from __future__ import annotations

import os
import signal
import threading
import time


def leave_with(parent: int) -> None:
    """End this process by SIGTERM when its parent has gone, so that a killed supervisor leaves no child behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()

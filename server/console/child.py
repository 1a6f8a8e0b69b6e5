"""The console as `cohortium serve` has it: a child process that is started when somebody could sign in, and again when
it ends. Nothing else of the service waits for it or fails with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cohortium.common.modes import make_private
from cohortium.common.processes import parent
from cohortium.server.console.store import someone_may_sign_in

READY_WITHIN_S = 60.0
STOP_WITHIN_S = 10.0
LONGEST_BACK_OFF_S = 60.0
STEADY_S = 60.0
"""So long it has to live for its next end to count as the first."""
MOST_ERRORS_BYTES = 1_000_000

Say = Callable[[str, str], None]


class ConsoleChild:
    """root: the consortium's folder. say(event, text): one line for the operator."""

    def __init__(self, root: Path, say: Say, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._say, self._clock = root, say, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = threading.Event()
        self._reader: threading.Thread | None = None
        self._told = ""
        self._began = self._not_before = float("-inf")
        self._back_off_s = 1.0
        self._hinted = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, within_s: float = READY_WITHIN_S) -> None:
        """At the service's start: come back when the console answers, or has said why it does not."""
        self.look()
        if self._process is not None:
            self._answered.wait(within_s)

    def look(self) -> None:
        """Once a tick: start it if somebody has got an account by now, or if it ended; never waits."""
        if self.alive:
            if self._clock() - self._began > STEADY_S:
                self._back_off_s = 1.0
            return
        if self._process is not None:
            self._gone(self._process.returncode)
        if self._clock() < self._not_before:
            return
        if not someone_may_sign_in(self._root / "console"):
            if not self._hinted:
                self._hinted = True
                told = f"nobody has an account yet: cohortium console user add {self._root} NAME --role coordinator"
                self._say("console", told)
            return
        self._launch()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        if self._reader is not None:
            self._reader.join(5.0)

    def _launch(self) -> None:
        folder = make_private(self._root / "console")
        errors = folder / "console.err"
        with contextlib.suppress(FileNotFoundError):
            if errors.stat().st_size > MOST_ERRORS_BYTES:
                errors.replace(folder / "console.err.1")
        with open(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as err:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cohortium.server.console", str(self._root)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                env={**os.environ, **parent()},
                # Ctrl-C in the terminal is the service's business: it stops its children in order.
                start_new_session=True,
            )
        self._process, self._began = process, self._clock()
        self._answered = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(process, self._answered), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes], answered: threading.Event) -> None:
        """What it says: where it is ready, or why it is not."""
        assert process.stdout is not None
        with process.stdout as said:
            for line in said:
                facts = _json(line)
                if "ready" in facts:
                    self._told = ""
                    self._say("started", f"console on {facts['ready']}")
                    answered.set()
                elif "error" in facts:
                    told = f"the console does not run: {facts['error']}: {facts.get('sentence', '')}"
                    told += f" Fix: {facts['fix']}" if facts.get("fix") else ""
                    if told != self._told:  # the same thing again a minute later is no news
                        self._told = told
                        self._say("warning", told)
        answered.set()

    def _gone(self, code: int) -> None:
        """It ended by itself: again later, and later and later."""
        if self._reader is not None:
            self._reader.join(5.0)
        self._process = None
        self._not_before = self._clock() + self._back_off_s
        if not self._told:
            self._say("restart", f"the console ended ({code}); it is started again in {self._back_off_s:.0f} s")
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)


def _json(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

"""What takes longer than a page: the checks, in a thread, and the site's own report, in a process. One of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cohortium.client.checks import Check, each_check
from cohortium.client.site import Site
from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.common.proposals import is_run_id

ENDINGS = (".parquet", ".csv")
MOST_REPORT_BYTES = 50_000_000


class Checking:
    """The preflight: `state` says what was found until now, however far it is."""

    def __init__(self, site: Site) -> None:
        self._site, self._lock = site, threading.Lock()
        self._found: list[Check] = []
        self._thread: threading.Thread | None = None
        self.started: float | None = None
        self.ended: float | None = None
        self.failed = ""

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def found(self) -> list[Check]:
        with self._lock:
            return list(self._found)

    def start(self, *, network: bool) -> bool:
        """False where it runs already."""
        with self._lock:
            if self.running:
                return False
            self._found, self.started, self.ended, self.failed = [], time.time(), None, ""
            self._thread = threading.Thread(target=self._run, args=(network,), daemon=True)
            self._thread.start()
            return True

    def _run(self, network: bool) -> None:
        try:
            for step in self._steps(network):
                with self._lock:
                    self._found += step
        except Exception as error:  # its words may hold values of the table
            self.failed = type(error).__name__
        self.ended = time.time()

    def _steps(self, network: bool) -> Iterator[list[Check]]:
        return each_check(self._site, network=network)

    def wait(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)


class Reporting:
    """`cohortium site report` in a process of its own. Its page stays in SITE/guard/reports and is never sent."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._lock = threading.Lock()
        self.run = ""
        self.started: float | None = None
        self.error: dict[str, Any] | None = None

    @property
    def running(self) -> bool:
        return self._reader is not None and self._reader.is_alive()

    def start(self, rows: str, run: str) -> None:
        """rows: the file's absolute path. UsageError REPORT-FILE, REPORT-RUN; Refused REPORT-BUSY."""
        if not is_run_id(run):
            raise UsageError("REPORT-RUN", "which run made these rows?")
        path = Path(rows)
        usable = path.is_absolute() and path.suffix in ENDINGS and rows.isprintable()
        if not usable or not path.is_file():
            raise UsageError(
                "REPORT-FILE",
                "there is no such file of synthetic rows",
                hint=f"the whole path of a file that ends in {' or '.join(ENDINGS)}",
            )
        command = [sys.executable, "-P", "-m", "cohortium.client.cli", "report", str(self._site.root)]
        with self._lock:
            if self.running:
                raise Refused("REPORT-BUSY", "a report is being made", hint="wait for it")
            self.error, self.run, self.started = None, run, time.time()
            self._process = subprocess.Popen(
                [*command, "--run", run, "--json", "--", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self._site.root,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Only an error's code and words are looked at; the figures stay in their file."""
        assert process.stdout is not None
        said = process.stdout.read(MOST_REPORT_BYTES)
        if process.wait() == 0:
            return
        try:
            found = json.loads(said)
            error = {name: found[name] for name in ("error", "sentence", "where", "left", "fix")}
        except (ValueError, KeyError, TypeError):
            error = CohortiumError("REPORT-FAILED", "the report was not made", hint="run it in a terminal").as_json()
        self.error = error

    def wait(self, timeout_s: float) -> None:
        if self._reader is not None:
            self._reader.join(timeout_s)

    def stop(self) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                self._process.wait(10)


def reports(guard: Path) -> list[tuple[str, float]]:
    """(run, when it was made) of every report here, newest first."""
    found = []
    for path in (guard / "reports").glob("*.html"):
        if is_run_id(path.stem) and not path.is_symlink():
            found.append((path.stem, path.stat().st_mtime))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def report_page(guard: Path, run: str) -> bytes:
    """The page of a report; UsageError REPORT-UNKNOWN. Never through a link: it is read with this user's rights."""
    path = guard / "reports" / f"{run}.html"
    try:
        if not is_run_id(run):
            raise FileNotFoundError
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            return file.read(MOST_REPORT_BYTES)
    except OSError:
        raise UsageError("REPORT-UNKNOWN", "there is no such report here") from None

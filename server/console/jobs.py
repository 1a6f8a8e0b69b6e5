"""What-if simulations of the console: each a folder and, while it runs, a child process. One runs at a time.

    CONSORTIUM/console/what-if/ID/job.json study.toml dictionary.json table.csv|table.parquet    written here
    CONSORTIUM/console/what-if/ID/progress.json error.json out/ log.txt                          written by the child

How a job stands is read off its files and whether its child lives, so that it survives a restart of the console: what
was running is then "interrupted", and going on loses no fit that was made. The table is never opened in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_private
from cohortium.common.processes import parent
from cohortium.server.console.desk import Desk

MODULE = "cohortium.simulations.what_if_job"
IDENTITY = r"w[0-9a-f]{12}"
RUNNING, DONE, FAILED, CANCELLED, INTERRUPTED = "running", "done", "failed", "cancelled", "interrupted"
MOST_TABLE = 50_000_000
MOST_JOBS = 100
MOST_EPSILONS, MOST_SEEDS = 12, 50
MOST_JSON = 5_000_000
LEAVES_WITHIN_S = 5.0
_PARQUET = b"PAR1"
_RESULT = frozenset(
    {"finished", "points", "references", "refused", "stand_in", "columns", "patients", "sites", "mode", "seeds", "says"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One what-if. at: when it was asked for, seconds since 1970. draft: its study's id. epsilon: what the study plans.

    state: "running", "done", "failed", "cancelled" or "interrupted". result: as in what-if.json, as far as it is.
    """

    id: str
    at: float
    by: str
    draft: str
    digest: str
    file: str
    sha256: str
    size: int
    epsilon: float | None
    epsilons: tuple[float, ...]
    seeds: int
    split: str | None
    state: str
    done: int
    of: int
    what: str
    error: dict[str, Any] | None
    result: dict[str, Any] | None

    @property
    def active(self) -> bool:
        return self.state == RUNNING


class Jobs:
    """The what-ifs in a folder. Threads may share it; `close` ends the child."""

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time, command: Sequence[str] = ()) -> None:
        self.root, self._clock = root, clock
        self._command = list(command) or [sys.executable, "-m", MODULE]
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._running = ""

    # ---- reads ----------------------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """Newest first."""
        if not self.root.is_dir():
            return []
        found = [self._read(path) for path in self.root.iterdir() if re.fullmatch(IDENTITY, path.name)]
        return sorted((job for job in found if job is not None), key=lambda job: (-job.at, job.id))

    def job(self, name: str) -> Job:
        """Refused WHAT-IF-UNKNOWN."""
        found = self._read(self.root / name) if re.fullmatch(IDENTITY, name) else None
        if found is None:
            raise Refused("WHAT-IF-UNKNOWN", "there is no such what-if")
        return found

    def _read(self, folder: Path) -> Job | None:
        asked = _json(folder / "job.json")
        if asked is None:
            return None
        result, error = _json(folder / "out" / "what-if.json"), _json(folder / "error.json")
        progress = _json(folder / "progress.json") or {}
        of = len(asked["epsilons"]) * asked["seeds"] + asked["seeds"]
        if result is not None and not set(result) >= _RESULT:
            result = None
        finished = result is not None and bool(result["finished"])
        if self._lives(folder.name):
            state = RUNNING
        elif error is not None:
            state = FAILED
        elif finished and (folder / "out" / "what-if.html").exists():
            state = DONE
        else:
            state = CANCELLED if (folder / "cancelled").exists() else INTERRUPTED
        return Job(
            id=folder.name,
            state=state,
            done=of if state == DONE else int(progress.get("done", 0)),
            of=of,
            what=str(progress.get("what", "reading the table")),
            error=error if state == FAILED else None,
            result=result,
            **{
                key: asked[key] for key in ("at", "by", "draft", "digest", "file", "sha256", "size", "epsilon", "split")
            },
            epsilons=tuple(asked["epsilons"]),
            seeds=asked["seeds"],
        )

    def _lives(self, name: str) -> bool:
        child = self._child
        return self._running == name and child is not None and child.poll() is None

    # ---- what people do -------------------------------------------------------------------------------------

    def make(
        self,
        *,
        by: str,
        draft: str,
        study: str,
        dictionary: str,
        table: bytes,
        file: str,
        epsilon: float | None,
        epsilons: Sequence[float],
        seeds: int,
        split: str | None,
    ) -> str:
        """A new job, not yet started; its id. study: the text of study.toml, whose dictionary is dictionary.json.

        UsageError WHAT-IF-TABLE, WHAT-IF-EPSILONS, WHAT-IF-SEEDS; Refused WHAT-IF-FULL.
        """
        if not table or len(table) > MOST_TABLE:
            raise UsageError(
                "WHAT-IF-TABLE",
                "there is no table" if not table else f"the table has more than {MOST_TABLE // 10**6} MB",
                hint="a CSV or Parquet file; a sample of some thousand patients is enough",
            )
        if not 1 <= len(epsilons) <= MOST_EPSILONS or not all(0 < e <= 100 for e in epsilons):
            raise UsageError("WHAT-IF-EPSILONS", f"1 to {MOST_EPSILONS} ε above 0 and at most 100", hint="0.5 1 3 10")
        if not 1 <= seeds <= MOST_SEEDS:
            raise UsageError("WHAT-IF-SEEDS", f"1 to {MOST_SEEDS} repetitions", hint="3")
        make_private(self.root)
        if sum(1 for _ in self.root.iterdir()) >= MOST_JOBS:
            raise Refused("WHAT-IF-FULL", f"there are {MOST_JOBS} what-ifs already", hint="remove one that is over")
        name = "w" + secrets.token_hex(6)
        part = self.root / f".{name}.part"
        make_private(part)
        try:
            # The name that people gave it is shown; the file is called by what is in it.
            stored = "table.parquet" if table[:4] == _PARQUET else "table.csv"
            (part / stored).write_bytes(table)
            (part / "study.toml").write_text(study, encoding="utf-8")
            (part / "dictionary.json").write_text(dictionary, encoding="utf-8")
            facts = {
                "at": self._clock(),
                "by": by,
                "draft": draft,
                "digest": digest_of(study, dictionary),
                "file": file[:200],
                "table": stored,
                "sha256": hashlib.sha256(table).hexdigest(),
                "size": len(table),
                "epsilon": epsilon,
                "epsilons": sorted(set(epsilons)),
                "seeds": seeds,
                "split": split,
            }
            (part / "job.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.root / name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return name

    def start(self, name: str) -> None:
        """Start a job, or go on with it. Refused WHAT-IF-BUSY while one runs, WHAT-IF-DONE."""
        with self._lock:
            job = self.job(name)
            if self._child is not None and self._child.poll() is None:
                raise Refused("WHAT-IF-BUSY", "a what-if is running: one at a time", hint="wait for it, or cancel it")
            if job.state == DONE:
                raise Refused("WHAT-IF-DONE", "it is done")
            folder = self.root / name
            for left in ("cancelled", "error.json"):
                (folder / left).unlink(missing_ok=True)
            with (folder / "log.txt").open("ab") as log:
                self._child = subprocess.Popen(
                    [*self._command, str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **parent(), "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            self._running = name

    def cancel(self, name: str) -> None:
        """End a job; what it made stays. Refused WHAT-IF-STOPPED where it does not run."""
        with self._lock:
            if not self.job(name).active:
                raise Refused("WHAT-IF-STOPPED", "it does not run")
            (self.root / name / "cancelled").touch()
            self._end()

    def remove(self, name: str) -> None:
        """Its folder, with the stand-in table. Refused WHAT-IF-BUSY while it runs."""
        with self._lock:
            if self.job(name).active:
                raise Refused("WHAT-IF-BUSY", "it is running", hint="cancel it first")
            shutil.rmtree(self.root / name)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        child, self._child, self._running = self._child, None, ""
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(LEAVES_WITHIN_S)
        except subprocess.TimeoutExpired:
            # A fit takes long and nothing is lost: each one that is made lies on disk.
            child.kill()
            child.wait()


def _sound(result: dict[str, Any]) -> bool:
    """Whether it has the shape of what_if.py's result: pages and previews rely on it."""
    points, references = result.get("points"), result.get("references")
    if not set(result) >= _RESULT or not isinstance(points, list) or not isinstance(references, dict):
        return False
    if not all(isinstance(part, dict) and {"real", "shuffled"} <= set(part) for part in references.values()):
        return False
    return all(
        isinstance(point, dict)
        and isinstance(point.get("epsilon"), int | float)
        and isinstance(point.get("scores"), dict)
        and {"generator", "fits"} <= set(point)
        and all(name in references for name in point["scores"])
        for point in points
    )


def digest_of(study: str, dictionary: str) -> str:
    """Names what a draft says, to the byte."""
    return hashlib.sha256(f"{len(study)}\n{study}{dictionary}".encode()).hexdigest()


def _json(path: Path) -> dict[str, Any] | None:
    """A file of ours, or None where it is not there, not whole or beyond reason."""
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_size <= MOST_JSON:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
    return None


# ---- what is known of quality -------------------------------------------------------------------------------

SIMILAR: Mapping[str, float] = {"columns": 1.5, "patients": 2.0, "epsilon": 1.5}
"""By which factor a what-if may differ from a study and still say something of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the nearest past what-if found at its nearest ε."""

    job: Job
    point: dict[str, Any]


def nearest(jobs: Sequence[Job], *, columns: int, patients: int | None, epsilon: float, mode: str) -> Known | None:
    """The point of a finished what-if of this consortium that is most like a study; None where none is like it."""
    if patients is None:
        return None
    best: tuple[float, Known] | None = None
    for job in jobs:
        result = job.result
        if job.state != DONE or result is None or result["mode"] != mode or not result["patients"]:
            continue
        apart = max(
            _ratio(result["columns"], columns, SIMILAR["columns"]),
            _ratio(result["patients"], patients, SIMILAR["patients"]),
        )
        for point in result["points"]:
            far = max(apart, _ratio(point["epsilon"], epsilon, SIMILAR["epsilon"]))
            if far <= 1.0 and (best is None or far < best[0]):
                best = far, Known(job=job, point=point)
    return None if best is None else best[1]


def _ratio(one: float, other: float, most: float) -> float:
    """How far apart, 1 at the factor that is allowed."""
    return abs(math.log(one / other)) / math.log(most) if one > 0 and other > 0 else math.inf


_OF: WeakKeyDictionary[Desk, Jobs] = WeakKeyDictionary()
_OF_LOCK = threading.Lock()


def jobs_of(desk: Desk) -> Jobs:
    with _OF_LOCK:
        if desk not in _OF:
            _OF[desk] = Jobs(desk.folder / "what-if", clock=desk.clock)
        return _OF[desk]


def close_jobs(desk: Desk) -> None:
    with _OF_LOCK:
        found = _OF.pop(desk, None)
    if found is not None:
        found.close()

"""`cohortium site join`: guard and courier as two processes, under two users where root starts them.

Either is started again when it ends, after a pause that doubles from 1 to 60 seconds and is forgotten after two good
minutes. Exit codes 2 and 3 say that a person has to act (a file that is missing, a key that others may read): then
both stop and the command ends with that code. What the processes print goes to SITE/logs, five files of 2 MB each.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Literal

from cohortium.client.site import Site, User, give_to
from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_private
from cohortium.common.processes import stopping

Part = Literal["guard", "courier"]
PARTS: tuple[Part, ...] = ("guard", "courier")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
WELL_AFTER_S = 120.0
STOP_WITHIN_S = 35.0  # a guard may be in the middle of a release
LOG_BYTES, LOG_FILES = 2_000_000, 5
TELL_PERSON = (2, 3)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded before any fork
INHERITED = ("LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "COHORTIUM_DEBUG", "PYTHONPATH")
WAY_OUT = ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")

Say = Callable[[str], None]


def command(site: Site, part: Part) -> list[str]:
    """The process of a part: nothing but Python and its directory on the command line."""
    module = {"guard": "cohortium.client.guard_service", "courier": "cohortium.client.courier"}[part]
    start = [sys.executable, "-P", "-m", module]  # -P: nothing is imported from the directory it starts in
    return [*start, str(site.guard), str(site.socket)] if part == "guard" else [*start, str(site.courier)]


def environment(site: Site, part: Part, secrets: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a part may know of our environment; the guard also the variable that its password is in."""
    names = INHERITED if part == "guard" else (*INHERITED, *WAY_OUT)
    made = {name: os.environ[name] for name in names if name in os.environ}
    made |= {"PATH": os.defpath, "HOME": str(site.guard if part == "guard" else site.courier)}
    made |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    if part == "guard":
        password = site.policy().password or ""
        if password.startswith("env:") and password[4:] in os.environ:
            made[password[4:]] = os.environ[password[4:]]
    return made | dict(secrets or {})


@dataclass(kw_only=True)
class Supervised:
    """One part: its process, and when it is due again."""

    part: Part
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    started_at: float = 0.0  # by the wall clock
    pause: float = 0.0
    due: float = 0.0
    starts: int = 0
    ready: bool = False
    words: list[str] = field(default_factory=list)  # the last lines that it printed


class Supervisor:
    """Keeps the parts of a site running until `stop` is set. Use it from one thread: children end with it."""

    def __init__(
        self,
        site: Site,
        *,
        parts: tuple[Part, ...] = PARTS,
        users: Mapping[Part, User] | None = None,
        say: Say = lambda text: None,
        commands: Callable[[Site, Part], list[str]] = command,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.site, self.users, self._say, self._commands, self._clock = site, dict(users or {}), say, commands, clock
        self.parts = {part: Supervised(part=part) for part in parts}
        self._said_ready = False
        self._loggers = {part: _logger(site, part) for part in parts}

    def run(self, stop: threading.Event) -> int:
        """Supervise until `stop`; 0, or the exit code of a part that needs a person."""
        try:
            while not stop.is_set():
                code = self.step()
                if code:
                    return code
                stop.wait(0.2)
            return 0
        finally:
            self.stop()

    def step(self) -> int:
        """Start what is due, notice what ended; an exit code that is not 0 ends the supervision."""
        for child in self.parts.values():
            if child.process is None:
                if self._clock() >= child.due and self._may_start(child):
                    self._start(child)
                continue
            code = child.process.poll()
            if code is None:
                self._look(child)
                continue
            ran = self._clock() - child.started
            child.process, child.ready = None, False
            if code in TELL_PERSON:
                self._say(f"{child.part} ended with code {code}:")
                time.sleep(0.1)  # its last words are on their way
                for line in child.words[-8:]:
                    self._say(f"  {line}")
                return code
            child.pause = FIRST_PAUSE_S if ran > WELL_AFTER_S else min(max(child.pause * 2, 1.0), LONGEST_PAUSE_S)
            child.due = self._clock() + child.pause
            self._say(f"{child.part} ended ({_how(code)}) after {ran:.0f} s; again in {child.pause:.0f} s")
        return 0

    def _may_start(self, child: Supervised) -> bool:
        """The courier waits for the first socket, so that its first messages find a guard."""
        guard = self.parts.get("guard")
        return child.part == "guard" or guard is None or guard.ready or child.starts > 0

    def _start(self, child: Supervised) -> None:
        part = child.part
        owner = self.users.get(part)
        place = self.site.guard if part == "guard" else self.site.courier
        child.started_at = time.time() - 0.05  # file times are coarser than this clock
        child.process = subprocess.Popen(
            self._commands(self.site, part),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=place,
            env=environment(self.site, part),
            start_new_session=True,
            umask=0o077,
            preexec_fn=partial(_end_with, os.getpid()),
            user=None if owner is None else owner.uid,
            group=None if owner is None else owner.gid,
            extra_groups=None if owner is None else list(owner.groups),
        )
        child.started, child.starts, child.words = self._clock(), child.starts + 1, []
        assert child.process.stdout is not None
        threading.Thread(target=_copy, args=(child.process.stdout, self._loggers[part], child), daemon=True).start()

    def _look(self, child: Supervised) -> None:
        if not child.ready:
            if child.part == "guard":
                child.ready = _bound_since(self.site.socket, child.started_at)
            else:
                child.ready = any("connected" in line for line in child.words)
            if child.ready:
                self._say(f"{child.part} is ready")
        if not self._said_ready and all(other.ready for other in self.parts.values()):
            self._said_ready = True
            self._say(f"ready: {' and '.join(self.parts)} of {self.site.root} are running")

    def stop(self) -> None:
        """SIGTERM to all, SIGKILL to whoever is still there after STOP_WITHIN_S. The courier goes first."""
        running = [child.process for child in reversed(self.parts.values()) if child.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_WITHIN_S
        for process in running:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in self.parts.values():
            child.process = None
        for logger in self._loggers.values():
            for handler in list(logger.handlers):
                handler.close()
                logger.removeHandler(handler)


def join(
    site: Site,
    *,
    only: Part | None = None,
    guard_user: str | None = None,
    courier_user: str | None = None,
    say: Say = lambda text: None,
) -> int:
    """Supervise until SIGTERM or SIGINT. Refused MODE-OPEN, SITE-USERS, SITE-LEFT before anything is started."""
    from cohortium.client.site import user

    refuse_left(site)
    users: dict[Part, User] = {}
    if (guard_user is None) != (courier_user is None):
        raise UsageError("SITE-USERS", "two users are named, or none", hint="--guard-user U --courier-user V")
    if guard_user is not None and courier_user is not None:
        users = {"guard": user(guard_user), "courier": user(courier_user)}
        give_to(site, guard=users["guard"], courier=users["courier"])
    elif os.geteuid() == 0:
        say("warning: both processes run as root; name two users: --guard-user U --courier-user V")
    parts: tuple[Part, ...] = PARTS if only is None else (only,)
    for part in parts:
        refuse_open_part(site, part)
    if "guard" in parts and site.paused.exists():
        say("this site is paused: the guard will refuse every message until `cohortium site unpause`")
    make_private(site.logs)
    stop = threading.Event()
    with stopping(stop):
        return Supervisor(site, parts=parts, users=users, say=say).run(stop)


def become(site: Site, part: Part) -> None:
    """This very process becomes one part, for containers: no supervisor, words to the container's log."""
    refuse_left(site)
    refuse_open_part(site, part)
    argv = command(site, part)
    os.umask(0o077)
    os.execve(argv[0], argv, environment(site, part))


def refuse_open_part(site: Site, part: Part) -> None:
    if part == "guard":
        site.refuse_open_guard()
    else:
        site.refuse_open_courier()


def refuse_left(site: Site) -> None:
    """Refused SITE-LEFT once the site has left its consortium."""
    with contextlib.suppress(PermissionError):  # the courier's user cannot look; its guard will not answer then
        if site.left.exists():
            raise Refused(
                "SITE-LEFT", "this site has left its consortium", where=(str(site.root),), hint="cohortium site init"
            )


def _bound_since(socket: Path, at: float) -> bool:
    """Whether a guard bound this socket after a moment: one that a crash left behind does not count.

    Asking it over gRPC would start gRPC's threads in the one process that must go on forking.
    """
    try:
        return socket.is_socket() and os.stat(socket).st_ctime >= at
    except OSError:
        return False


def _how(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _end_with(supervisor: int) -> None:
    """A child of a killed supervisor ends too: a guard that nobody stops would keep the ledger's lock."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != supervisor:  # it died before this child could ask for the signal
            os._exit(1)


def _logger(site: Site, part: Part) -> logging.Logger:
    make_private(site.logs)
    logger = logging.getLogger(f"cohortium.site.{site.root}.{part}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.handlers.RotatingFileHandler(
        site.logs / f"{part}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, delay=False
    )
    os.chmod(site.logs / f"{part}.log", 0o600)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    return logger


def _copy(stream: IO[bytes], logger: logging.Logger, child: Supervised) -> None:
    """A part's output into its log, line by line; the disk being full stops the log and nothing else."""
    for raw in iter(lambda: stream.readline(8192), b""):
        line = raw.decode("utf-8", "replace").rstrip("\n")
        child.words = [*child.words[-20:], line]
        with contextlib.suppress(OSError, ValueError):
            logger.info("%s", line)
    stream.close()

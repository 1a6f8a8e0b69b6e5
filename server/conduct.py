"""The conductor: takes every run of the register from its proposal to its end, and takes it up again after a crash.

    proposed --every officer approved--> approved --start--> running --model on disk--> finished
        |                                   ^                   |
        | declined, withdrawn               |   back-off        | Flower's run ended without a model
        v                                   +-------------------+--- patience or tries used up, or `stop`: stopped
       void                                                     +--- nothing can mend it: failed

What it knows is in the register and in the run's folder, so a new conductor goes on where the last one died. Flower
comes in through `Engine`, four calls; the end of a run through `finish`. One run is under way at a time: they share
one mirror, and the sites' machines.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from cohortium.common.errors import CohortiumError
from cohortium.common.protocol import certificates
from cohortium.server import driving
from cohortium.server.consortium import Consortium
from cohortium.server.progress import told_spent
from cohortium.server.register import Register, RunRow
from cohortium.server.runs import RunFolder

FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 300.0
UNKNOWN_S = 120.0
"""So long a SuperLink that answers may not know a run before the run counts as lost."""

WAITING = ("GRID-", "RUN-TOO-FEW", "RUN-STOPPED", "STREAM-", "HUB-", "SUPERLINK-")
"""Sites, Flower or the hub are away: waiting mends it, for as long as the consortium has patience."""
HELD = frozenset({"RUN-PLAN", "RESUME-QUERY", "RUN-MISSING", "RUN-DIRECTORY", "RUN-TRANSPORT", "RUN-HUB"})
"""A person has to do something first: put back a version or a file."""
FINAL = frozenset({"RUN-VOID"})
"""No resumption mends it. Anything else is tried again a few times: a crash, a full disk, a killed process."""
STOP_GRACE_S = 60.0
"""So long the release under way may take to its end when a run is stopped."""
KILLED = "RUN-KILLED"
STOP = "stop"
"""A file of this name in the run's folder ends its ServerApp after the release under way."""


class Engine(Protocol):
    """What the conductor wants of Flower (server/superlink.SuperLink); PeerUnreachable while it is away."""

    def start_run(self, run_config: Mapping[str, str], /) -> int: ...

    def run_status(self, run_id: int, /) -> str: ...

    def stop_run(self, run_id: int, /) -> None: ...


Finish = Callable[[RunFolder, Path], None]
"""Publish a fitted run: (its folder, the mirror). Raises CohortiumError."""
Say = Callable[[str, str, str], None]
"""(run, state, message) of every change, for the service's log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tries:
    """RUN/tries.json: how often the run was started since its last new release, and when that was."""

    count: int = 0
    releases: int = 0
    since: float = 0.0

    @classmethod
    def load(cls, root: Path) -> Tries:
        try:
            return cls(**json.loads((root / "tries.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, root: Path) -> None:
        certificates.write_file(root / "tries.json", json.dumps(asdict(self)).encode(), 0o600)


def is_stopped(row: RunRow) -> bool:
    """Stopped and let go by Flower: `cohortium resume` goes on with it."""
    return row.state == "stopping" and row.flower_id == ""


def told_state(row: RunRow) -> str:
    """The state as people read it."""
    return "stopped" if is_stopped(row) else row.state


def is_fitted(folder: RunFolder) -> bool:
    """Whether the model is on disk, scored and noted in the study's ledger."""
    return (folder.inner / "model.npz").exists() and any(e["event"] == "fitted" for e in folder.events())


class Conductor:
    """Call `tick` again and again, from one thread. clock: seconds since 1970."""

    def __init__(
        self,
        *,
        consortium: Consortium,
        register: Register,
        engine: Engine,
        finish: Finish,
        transport: str = "stream",
        clock: Callable[[], float] = time.time,
        say: Say = lambda run, state, message: None,
    ) -> None:
        self._consortium, self._register, self._engine = consortium, register, engine
        self._finish, self._transport, self._clock, self._say = finish, transport, clock, say
        self._not_before: dict[str, float] = {}
        self._unknown: dict[str, float] = {}
        self._started: set[str] = set()

    def tick(self) -> None:
        """Look at every run once and do what its state asks for."""
        rows = [row for row in self._register.runs() if row.state not in ("finished", "failed", "void")]
        for row in rows:
            if row.state == "proposed":
                self._proposed(row)
            elif row.state == "running":
                self._running(row)
            elif row.state == "stopping" and not is_stopped(row):
                self._stopping(row)
        for row in self._register.runs():
            if row.state == "approved" and not self._busy() and self._clock() >= self._not_before.get(row.run, 0.0):
                self._start(row)

    def _busy(self) -> bool:
        return any(r.state == "running" or (r.state == "stopping" and not is_stopped(r)) for r in self._register.runs())

    # ---- one step for each state ----------------------------------------------------------------------------

    def _proposed(self, row: RunRow) -> None:
        answers = self._register.approvals(row.run)
        declined = sorted(site for site, state in answers.items() if state == "declined")
        gone = sorted(site for site in answers if site in self._register.revoked())
        if declined or gone:
            why = f"declined by {', '.join(declined)}" if declined else f"no longer a member: {', '.join(gone)}"
            self._set(row, "void", f"{why}. Nothing was asked and nothing was spent: propose it with other sites.")
        elif answers and all(state == "approved" for state in answers.values()):
            self._set(row, "approved", "every site's officer approved")

    def _start(self, row: RunRow) -> None:
        folder = self._folder(row)
        if is_fitted(folder):  # only its end is missing: no site is asked for that
            self._publish(row, folder)
            return
        if self._register.run_row(row.run).state != "approved":
            return  # somebody stopped it since this tick began
        tries, done = Tries.load(folder.root), folder.releases_done()
        if done > tries.releases or not tries.since:
            tries = Tries(count=0, releases=done, since=self._clock())
        Tries(count=tries.count + 1, releases=tries.releases, since=tries.since).save(folder.root)
        # The intention first: a crash from here on counts as a try that failed, and a Flower run that nobody
        # remembers cannot write beside the next one, for the study's ledger has one writer.
        self._set(row, "running", "starting", flower_id="", attempts=row.attempts + 1)
        folder.note("try", number=row.attempts + 1)  # what stood before it is not this try's last word
        (folder.root / STOP).unlink(missing_ok=True)
        transport = str(folder.facts().get("transport") or self._transport)
        try:
            flower = self._engine.start_run(
                {
                    "run-directory": str(folder.root.resolve()),
                    "transport": transport,
                    "hub": str(self._consortium.hub.resolve()),
                }
            )
        except CohortiumError as error:
            self._again(row, folder, error.code, error.sentence)
            return
        self._started.add(row.run)
        told = self._register.set_run(row.run, flower_id=str(flower), message=f"try {row.attempts + 1}, {transport}")
        self._say(row.run, told.state, told.message)

    def _running(self, row: RunRow) -> None:
        if self._has_left(row):
            self._ended(row, stopped=False)

    def _stopping(self, row: RunRow) -> None:
        if row.flower_id is None:
            self._set(row, "void", "withdrawn before it began. Nothing was asked and nothing was spent.")
            return
        if self._has_left(row):
            self._ended(row, stopped=True)
            return
        (self._folder(row).root / STOP).touch()  # the ServerApp looks for it between two releases
        if self._clock() - row.since < STOP_GRACE_S:
            return
        try:
            self._engine.stop_run(int(row.flower_id))
        except CohortiumError:
            return  # the next tick tries again

    def _ended(self, row: RunRow, *, stopped: bool) -> None:
        folder = self._folder(row)
        self._unknown.pop(row.run, None)
        if is_fitted(folder):
            self._publish(row, folder)
            return
        if stopped or _last(folder).get("event") == "stopped":
            self._hold(row, folder, "Stopped.")
            return
        code, sentence = _failure(folder)
        if code in FINAL:
            self._set(row, "failed", f"{code}: {sentence}. {self._spent(folder)} Propose the study again.")
        elif code in HELD:
            self._hold(row, folder, f"{code}: {sentence}. {_fix(folder)}")
        else:
            self._again(row, folder, code, sentence)

    def _again(self, row: RunRow, folder: RunFolder, code: str, sentence: str) -> None:
        """Back to the queue, later; or held when neither patience nor tries are left."""
        tries, limits = Tries.load(folder.root), self._consortium.limits
        if folder.releases_done() > tries.releases:  # it got on: everything is counted anew
            tries = Tries(count=1, releases=folder.releases_done(), since=self._clock())
            tries.save(folder.root)
        waited_h = (self._clock() - tries.since) / 3600
        waiting = code.startswith(WAITING)
        if waited_h >= limits.patience_hours if waiting else tries.count >= limits.resume_attempts:
            self._hold(row, folder, f"{code}: {sentence}. Gave up after {tries.count} tries without a new release.")
            return
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(tries.count - 1, 10), LONGEST_WAIT_S)
        if code == KILLED and row.run not in self._started:
            wait_s = FIRST_WAIT_S  # the service itself was started again: that says nothing against the run
        self._not_before[row.run] = self._clock() + wait_s
        message = f"{code}: {sentence}. {self._spent(folder)} Goes on in {wait_s:.0f} s."
        now = self._register.run_row(row.run).state
        if now == "stopping":  # asked for while it was being started
            self._hold(row, folder, "Stopped.")
            return
        self._set(row, "approved", message, flower_id="")

    def _publish(self, row: RunRow, folder: RunFolder) -> None:
        self._set(row, "running", "fitted; sampling and writing the report")
        try:
            self._finish(folder, self._consortium.mirror)
        except CohortiumError as error:
            self._hold(row, folder, f"{error.code}: {error.sentence}. The model is there, its publication failed.")
            return
        self._set(row, "finished", f"published. {self._spent(folder)}")

    # ---- helpers --------------------------------------------------------------------------------------------

    def _has_left(self, row: RunRow) -> bool:
        """Whether nothing drives the run any more; the end of its process counts before Flower has noticed."""
        if not row.flower_id or not driving.has_ended(self._folder(row).root, int(row.flower_id)):
            status = self._status(row)
            return status is not None and status.startswith("finished")
        with contextlib.suppress(CohortiumError, KeyError):
            self._engine.stop_run(int(row.flower_id))
        return True

    def _status(self, row: RunRow) -> str | None:
        """Flower's word on the run; finished:lost where nobody can know of it any more; None: not known now."""
        if not row.flower_id:
            return "finished:lost"
        try:
            status = self._engine.run_status(int(row.flower_id))
        except (CohortiumError, KeyError):
            since = self._unknown.setdefault(row.run, self._clock())
            return "finished:lost" if self._clock() - since > UNKNOWN_S else None
        self._unknown.pop(row.run, None)
        return status

    def _hold(self, row: RunRow, folder: RunFolder, why: str) -> None:
        # Members read this message too: it names no path of this machine.
        hint = f"Nothing is paid twice: cohortium resume DIR {row.run}"
        self._set(row, "stopping", f"{why} {self._spent(folder)} {hint}", flower_id="")

    def _set(
        self, row: RunRow, state: str, message: str, *, flower_id: str | None = None, attempts: int | None = None
    ) -> None:
        now = self._register.set_run(row.run, state=state, message=message, flower_id=flower_id, attempts=attempts)
        self._say(row.run, told_state(now), message)

    def _folder(self, row: RunRow) -> RunFolder:
        return RunFolder(root=self._consortium.root / row.folder)

    def _spent(self, folder: RunFolder) -> str:
        return told_spent(folder, self._consortium.mirror)


def _failure(folder: RunFolder) -> tuple[str, str]:
    """(code, sentence) that the newest attempt ended with; RUN-KILLED when it could not say anything."""
    last = _last(folder)
    if last.get("event") != "failed":
        return KILLED, "the run's process ended without a word"
    return str(last.get("code", KILLED)), str(last.get("sentence", ""))


def _fix(folder: RunFolder) -> str:
    return str(_last(folder).get("fix", ""))


def _last(folder: RunFolder) -> dict[str, object]:
    events = folder.events()
    return events[-1] if events else {}


def ask_to_stop(register: Register, run: str) -> RunRow:
    """The conductor stops the run at its next tick. Raises Refused RUN-ENDED, RUN-UNKNOWN."""
    row = register.run_row(run)
    return row if is_stopped(row) else register.set_run(run, state="stopping", message="stop was asked for")


def ask_to_resume(consortium: Consortium, register: Register, run: str) -> RunRow:
    """Put a stopped run back into the queue, its tries forgotten. Raises Refused RUN-NOT-STOPPED, RUN-UNKNOWN."""
    from cohortium.common.errors import Refused

    row = register.run_row(run)
    if not is_stopped(row):
        ended = row.state in ("finished", "failed", "void")
        raise Refused(
            "RUN-NOT-STOPPED",
            f"the run is {told_state(row)}; only a stopped one goes on",
            left=row.message,
            hint="propose the study again" if ended else f"cohortium watch {consortium.root} {run}",
        )
    (consortium.root / row.folder / "tries.json").unlink(missing_ok=True)
    return register.set_run(run, state="approved", message="goes on")

"""How a run stands on its way to a release: every check, what to do, and whose turn it is.

The gate's audit and a reader's verification replay whole ledgers. They are made in one thread beside the requests and
kept until a file changes; a page shows "looking" until then, and never takes "not looked at" for "ok".
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from cohortium.common.errors import CheckFailed, CohortiumError, Refused
from cohortium.server.audit import AuditReport, audit
from cohortium.server.console import release_folder
from cohortium.server.console.desk import Desk
from cohortium.server.console.kept import Jobs, Kept, stamp
from cohortium.server.console.release_checklist import Item, Looked, checklist
from cohortium.server.console.release_folder import FOLDER, Written, read_written
from cohortium.server.console.result_file import REHEARSAL, Whole, read_result
from cohortium.server.console.result_view import results_of
from cohortium.server.finish import read_books
from cohortium.server.register import RunRow
from cohortium.server.release import Released, release, signatures_needed
from cohortium.server.release_documents import DOCUMENTS, DocumentFacts, write_documents
from cohortium.server.release_gate import Finding, decide, minimum_of
from cohortium.server.release_verify import Verified, verify
from cohortium.server.runs import SAMPLES, RunFolder

BY_WORD = ("RELEASE-REHEARSAL", "RELEASE-GUESSED")
"""Findings that a person may answer for, by name: --rehearsal and --accept-guessed-ranges."""
TO_COMPLETE = "To be completed"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One run: its result or why there is none, its release or why not, the gate (None: looking), a reader's check."""

    run: str
    whole: Whole | None
    problem: CohortiumError | None
    written: Written | None
    spoiled: CohortiumError | None
    looked: Looked | None
    verified: Verified | None
    verifying: bool
    items: tuple[Item, ...]

    @property
    def looking(self) -> bool:
        return self.whole is not None and self.written is None and self.spoiled is None and self.looked is None

    @property
    def loud(self) -> str:
        """Why it is not private, or ""; what was released speaks before what lies in the run's folder."""
        if self.written is not None and self.written.rehearsal:
            return REHEARSAL
        return "" if self.whole is None else self.whole.card.loud

    @property
    def open_for_release(self) -> bool:
        """Whether the form is shown. The gate decides again when it is sent."""
        return self.whole is not None and self.written is None and self.spoiled is None and self.looked is not None

    @property
    def firm(self) -> tuple[str, ...]:
        """What stops the release and no person's word opens."""
        codes = () if self.looked is None else self.looked.codes
        return tuple(dict.fromkeys(code for code in codes if code not in BY_WORD))

    def stops(self, code: str) -> bool:
        return self.looked is not None and code in self.looked.codes

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "not_private": self.loud,
            "looking": self.looking,
            "checklist": [item.to_json() for item in self.items],
            "release": None if self.written is None else self.written.to_json(),
            "verification": None
            if self.verified is None
            else {key: value for key, value in self.verified.to_json().items() if key != "epsilons"},
        }


class Releases:
    """The releases of one consortium. Threads may share it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk.consortium, desk.clock
        self._results = results_of(desk)
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="release")
        self._gates: Jobs[Looked] = Jobs(worker)
        self._checks: Jobs[Verified] = Jobs(worker)
        self._written: Kept[Written] = Kept(500)
        self._releasing = threading.Lock()

    def root(self, row: RunRow) -> Path:
        return self._desk[0].root / row.folder

    def written(self, row: RunRow) -> Written:
        """Refused RELEASE-MISSING; CheckFailed RELEASE-FOLDER."""
        folder = self.root(row) / FOLDER
        key = self._desk[0].key().public_key()
        return self._written.get(row.run, release_folder.stamps(folder), lambda: read_written(folder, key))

    def standing(self, row: RunRow, *, verify_now: bool = False) -> Standing:
        whole, problem = _or_error(lambda: self._results.whole(row))
        written, spoiled = _or_error(lambda: self.written(row))
        if spoiled is not None and spoiled.code == "RELEASE-MISSING":
            spoiled = None
        looked = None
        if whole is not None and written is None and spoiled is None:
            future = self._gates.ask(row.run, _gate_stamp(self.root(row)), lambda: look(self.root(row), self._desk[1]))
            looked = future.result() if future.done() else None
        verified, verifying = self._verification(row, written, verify_now)
        items = checklist(whole, problem, written, spoiled, looked, verified, verifying)
        return Standing(
            run=row.run,
            whole=whole,
            problem=problem,
            written=written,
            spoiled=spoiled,
            looked=looked,
            verified=verified,
            verifying=verifying,
            items=items,
        )

    def _verification(self, row: RunRow, written: Written | None, now: bool) -> tuple[Verified | None, bool]:
        if written is None:
            return None, False
        state = _folder_stamp(written.folder)
        if now:
            future: Future[Verified] | None = self._checks.ask(
                row.run, state, lambda: verified_folder(written.folder), again=True
            )
        else:
            future = self._checks.known(row.run, state)
        if future is None:
            return None, False
        return (future.result(), False) if future.done() else (None, True)

    def release(self, row: RunRow, *, rehearsal: bool, accept_guessed: bool) -> Released:
        """As `cohortium release RUN`: the gate decides on what lies on disk now, not on what a page showed before.

        Refused RELEASE-BUSY while another is written; CheckFailed RELEASE-WRITE; and what `release` raises.
        """
        self._results.whole(row)
        if not self._releasing.acquire(blocking=False):
            raise Refused("RELEASE-BUSY", "another release is being written", hint="wait a minute and look again")
        try:
            return release(self.root(row), rehearsal=rehearsal, accept_guessed=accept_guessed, clock=self._desk[1])
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            raise CheckFailed(
                "RELEASE-WRITE",
                "the release could not be written",
                where=(f"{row.run}/{FOLDER}",),
                left="nothing was written; the run is as before",
                hint=f"cohortium release {self.root(row)} says more",
            ) from None
        finally:
            self._releasing.release()


_KEPT: WeakKeyDictionary[Desk, Releases] = WeakKeyDictionary()
_MAKING = threading.Lock()


def releases_of(desk: Desk) -> Releases:
    with _MAKING:
        if desk not in _KEPT:
            _KEPT[desk] = Releases(desk)
        return _KEPT[desk]


# ---- what takes long ----------------------------------------------------------------------------------------


def look(root: Path, clock: Callable[[], float]) -> Looked:
    """The gate's answers as they stand, without anybody's word for what it stops, and drafts of the documents."""
    try:
        folder = RunFolder(root=root)
        result = read_result(root / "result.json")
        audited = audit(root)
        findings = decide(result, audited, minimum_of(folder.study().release))
        return Looked(findings=findings, drafts=_drafts(folder, result, findings, audited, int(clock())))
    except CohortiumError as error:
        return Looked(error=error)
    except Exception:  # whatever is in those files: a check that cannot be made fails
        return Looked(error=CheckFailed("RELEASE-LOOK", "the gate could not look at this run: its files are damaged"))


def _drafts(
    folder: RunFolder, result: Mapping[str, Any], gate: tuple[Finding, ...], audited: AuditReport, at: int
) -> dict[str, str]:
    """The documents that a release would hold now. None where the audit fails: nothing is written from such files."""
    if not audited.ok:
        return {}
    plan = folder.plan()
    facts = DocumentFacts(
        study=folder.study(),
        plan=plan,
        result=result,
        books={owner: book for owner, (book, _) in read_books(folder).items()},
        gate=gate,
        keys=audited.keys,
        needed=signatures_needed(plan),
        at=at,
        withheld=(),
    )
    with tempfile.TemporaryDirectory(prefix="drafts-") as place:
        part = Path(place)
        for name in SAMPLES:
            (part / name).symlink_to((folder.root / name).resolve())
        write_documents(part, facts)
        return {name: (part / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def verified_folder(folder: Path) -> Verified:
    """As `cohortium verify FOLDER`; what cannot be checked at all fails."""
    try:
        return verify(folder)
    except Exception as error:
        made = Verified(folder=str(folder))
        code, why = (error.code, error.sentence) if isinstance(error, CohortiumError) else ("VERIFY-FILE", "damaged")
        made.add(code, "folder", False, f"the folder cannot be checked: {why}")
        return made


def _gate_stamp(root: Path) -> tuple[Any, ...]:
    names = ("result.json", "manifest.json", "plan.json", "study.toml", "run.json", "run/ledger.jsonl", "run/model.npz")
    places = [root / name for name in (*names, *SAMPLES)]
    with contextlib.suppress(OSError):
        places += sorted((root / "run" / "ledgers").iterdir())
    return tuple(stamp(place) for place in places)


def _folder_stamp(folder: Path) -> tuple[Any, ...]:
    return tuple((str(place), stamp(place)) for place in sorted(folder.rglob("*")))


def _or_error(make: Callable[[], T]) -> tuple[T | None, CohortiumError | None]:
    try:
        return make(), None
    except CohortiumError as error:
        return None, error

"""The checklist of a release: every check with how it stands, what to do, and whose turn it is. Pure: reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cohortium.common.errors import CohortiumError, Refused
from cohortium.server.console.release_folder import INVALID, MISSING, Written
from cohortium.server.console.result_file import Whole
from cohortium.server.release_gate import Finding, refuse
from cohortium.server.release_verify import Verified

OK, MISSES, FAILED, LOOKING, WORD = "ok", "missing", "failed", "looking", "by a person's word"
ORDER = (FAILED, MISSES, WORD, LOOKING, OK)
"""What needs a human goes first."""
COORDINATOR, SITES, READER, NOBODY = "coordinator", "sites", "anybody", ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A line of the checklist. code: what is wrong, as the command line says it; todo: what to do; turn: whose."""

    code: str
    name: str
    state: str
    detail: str
    todo: str = ""
    turn: str = NOBODY

    def to_json(self) -> dict[str, str]:
        return {
            "code": self.code,
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "todo": self.todo,
            "turn": self.turn,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What the gate says of a run that is not released yet. drafts: the documents as they would be written."""

    findings: tuple[Finding, ...] = ()
    error: CohortiumError | None = None
    drafts: Mapping[str, str] = field(default_factory=dict)

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(finding.code for finding in self.findings if not finding.ok)


def checklist(
    whole: Whole | None,
    problem: CohortiumError | None,
    written: Written | None,
    spoiled: CohortiumError | None,
    looked: Looked | None,
    verified: Verified | None,
    verifying: bool,
) -> tuple[Item, ...]:
    """Every check with its state; those that need a human first."""
    found = [_result_item(whole, problem)]
    if written is not None:
        found += [gate_then(finding, written) for finding in written.gate]
    elif spoiled is None and whole is not None:
        found += _gate_now(looked)
    found.append(_folder_item(whole, written, spoiled, looked))
    if written is not None:
        found += _signature_items(written)
        found.append(_verified_item(written, verified, verifying))
    return tuple(sorted(found, key=lambda item: ORDER.index(item.state)))


def _result_item(whole: Whole | None, problem: CohortiumError | None) -> Item:
    if whole is not None:
        return Item(code="", name="result", state=OK, detail="the run is finished and has published its result")
    assert problem is not None
    waits = problem.code == "RUN-UNFINISHED"
    return Item(
        code=problem.code,
        name="result",
        state=MISSES if waits else FAILED,
        detail=problem.sentence,
        todo=problem.hint,
        turn=COORDINATOR,
    )


def _gate_now(looked: Looked | None) -> list[Item]:
    if looked is None:
        return [Item(code="", name="gate", state=LOOKING, detail="ledgers and files are being checked")]
    if looked.error is not None:
        error = looked.error
        return [
            Item(code=error.code, name="gate", state=FAILED, detail=error.sentence, todo=error.hint, turn=COORDINATOR)
        ]
    return [
        Item(
            code="" if finding.ok else finding.code,
            name=finding.name,
            state=OK if finding.ok else FAILED,
            detail=finding.detail,
            todo=hint_of(finding),
            turn=NOBODY if finding.ok else COORDINATOR,
        )
        for finding in looked.findings
    ]


def gate_then(finding: Finding, written: Written) -> Item:
    """As it was when the release was let go. What only a person's word let pass is never shown as plainly ok."""
    by_word = (finding.code == "RELEASE-REHEARSAL" and written.rehearsal) or (
        finding.code == "RELEASE-GUESSED" and any("guessed" in text for text in written.warnings)
    )
    state = FAILED if not finding.ok else WORD if by_word else OK
    code = finding.code if state != OK else ""
    return Item(code=code, name=finding.name, state=state, detail=finding.detail, todo=hint_of(finding))


def hint_of(finding: Finding) -> str:
    """What the command line says to a release that this finding alone would stop."""
    try:
        refuse([finding])
    except Refused as refused:
        return refused.hint
    return ""


def _folder_item(
    whole: Whole | None, written: Written | None, spoiled: CohortiumError | None, looked: Looked | None
) -> Item:
    if spoiled is not None:
        return Item(
            code=spoiled.code,
            name="folder",
            state=FAILED,
            detail=spoiled.sentence,
            todo=spoiled.hint,
            turn=COORDINATOR,
        )
    if written is not None:
        detail = f"{len(written.manifest.subjects)} files, signed by the coordinator"
        return Item(code="", name="folder", state=OK, detail=detail)
    lets = whole is not None and looked is not None and looked.error is None and not looked.codes
    todo = "release it, below" if lets else "first, what the gate asks for" if looked else "the gate looks first"
    detail = "no release is written yet"
    return Item(code="RELEASE-MISSING", name="folder", state=MISSES, detail=detail, todo=todo, turn=COORDINATOR)


def _signature_items(written: Written) -> list[Item]:
    missing = [one.site for one in written.signatures if one.state == MISSING]
    bad = [one.site for one in written.signatures if one.state == INVALID]
    detail = f"{written.signed} of {len(written.signatures)} sites signed, {written.needed} are needed"
    found = [
        Item(
            code="" if written.complete else "VERIFY-THRESHOLD",
            name="sites' signatures",
            state=OK if written.complete else MISSES,
            detail=detail,
            todo=""
            if written.complete
            else f"each site holds the folder against its own ledger and signs; open: {', '.join(missing + bad)}",
            turn=NOBODY if written.complete else SITES,
        )
    ]
    found += [
        Item(
            code="VERIFY-SIGNATURE",
            name=f"signature of {name}",
            state=FAILED,
            detail="the file there is not a signature under this release",
            todo="take the site's own file in again, or remove it from signatures/",
            turn=COORDINATOR,
        )
        for name in (*bad, *written.strange)
    ]
    return found


def _verified_item(written: Written, verified: Verified | None, verifying: bool) -> Item:
    if verified is None:
        detail = "a reader's check is under way" if verifying else "nobody has checked the folder as a reader does"
        todo, state = ("", LOOKING) if verifying else ("verify now, below", MISSES)
        return Item(code="", name="reader's check", state=state, detail=detail, todo=todo, turn=READER)
    bad = sum(not finding.ok for finding in verified.findings)
    if verified.ok:
        return Item(code="", name="reader's check", state=OK, detail=f"{len(verified.findings)} checks hold")
    return Item(
        code=", ".join(verified.codes),
        name="reader's check",
        state=FAILED,
        detail=f"{bad} of {len(verified.findings)} checks fail",
        todo="see each of them below",
        turn=SITES if verified.codes == ("VERIFY-THRESHOLD",) else COORDINATOR,
    )

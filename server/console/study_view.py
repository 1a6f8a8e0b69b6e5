"""Proposed studies as the console shows them: by study, each proposal a version; what changed between two of them.

A proposal never changes once it is written, so what was read of it is kept; only how its run stands is asked anew.
"""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import read_proposal
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.signing import fingerprint
from cohortium.common.schema import Column, Schema, write_bound
from cohortium.common.study import Study
from cohortium.server.console.desk import Desk
from cohortium.server.runs import RunFolder

MOST_COLUMNS_SHOWN = 500
MOST_LEVELS_SHOWN = 12
MOST_TEXT_SHOWN = 300
KINDS = {
    "counts": "a histogram: how many patients are in each cell",
    "moments": "moments: how columns move together",
    "gradient": "a gradient: which way the model should move",
    "sums": "sums of bounded values",
    "tallies": "a histogram of what the synthetic table says of each patient",
    "estimates": "sums of bounded scores of a regression",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One proposal of a study. at: when it was written, seconds since 1970; epsilon: the plan's budget.

    proposal: SHA-256 of what the coordinator signed. rehearsal, noise, guessed: what run.json says of its privacy.
    """

    run: str
    study: str
    title: str
    at: float
    proposal: str
    epsilon: float
    delta: float
    generator: str
    mode: str
    sites: tuple[str, ...]
    releases: int
    rehearsal: bool
    noise: bool
    guessed: bool
    state: str

    @property
    def warning(self) -> str:
        """The loud words, where this is no real study."""
        if not self.noise:
            return "NO NOISE, NOT private"
        return "rehearsal, NOT private" if self.rehearsal else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "study": self.study,
            "title": self.title,
            "proposed_at": self.at,
            "proposal": self.proposal,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "generator": self.generator,
            "mode": self.mode,
            "sites": list(self.sites),
            "releases": self.releases,
            "warning": self.warning,
            "state": self.state,
        }


_KEPT: WeakKeyDictionary[Desk, dict[str, dict[str, Any] | None]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def studies(desk: Desk) -> dict[str, list[Version]]:
    """Every study that was proposed, the latest first; its versions, the latest first."""
    found: dict[str, list[Version]] = {}
    with _LOCK:
        kept = _KEPT.setdefault(desk, {})
    for row in reversed(desk.register.runs()):
        if row.run not in kept:
            kept[row.run] = _read(desk, row.run, desk.consortium.root / row.folder)
        facts = kept[row.run]
        if facts is not None:
            found.setdefault(facts["study"], []).append(Version(**facts, state=desk.state(row)))
    return found


def versions(desk: Desk, study: str) -> list[Version]:
    """The versions of one study, the latest first; Refused STUDY-UNKNOWN."""
    found = studies(desk).get(study)
    if not found:
        raise Refused("STUDY-UNKNOWN", "no such study was proposed")
    return found


def _read(desk: Desk, run: str, folder: Path) -> dict[str, Any] | None:
    """None where the folder of a run is gone or broken: the page of runs says so, and this one has nothing to show."""
    try:
        place = RunFolder(root=folder)
        plan, facts = place.plan(), place.facts()
        head = tomllib.loads((folder / "study.toml").read_text(encoding="utf-8"))["study"]
        return {
            "run": run,
            "study": plan.study,
            "title": str(head["title"]),
            "at": (folder / "proposal.bin").stat().st_mtime,
            "proposal": digest(desk.register.envelope(run)),
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "generator": plan.generator,
            "mode": plan.mode,
            "sites": plan.sites,
            "releases": plan.releases,
            "rehearsal": bool(facts["rehearsal"]),
            "noise": bool(facts["noise"]),
            "guessed": bool(facts.get("guessed_ranges")),
        }
    except (OSError, ValueError, KeyError, TypeError, CohortiumError):
        return None


# ---- one version --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A version, read from its folder and held against the signature. problem: what does not fit, "" where all does."""

    study: Study
    plan: Plan
    toml: str
    dictionary: str
    plan_json: str
    signer: str
    problem: str


def signed(desk: Desk, version: Version) -> Signed:
    """Read a version's files and check the coordinator's signature over plan and dictionary."""
    folder = RunFolder(root=desk.consortium.root / desk.register.run_row(version.run).folder)
    study, plan, key = folder.study(), folder.plan(), desk.consortium.key().public_key()
    problem = ""
    try:
        proposal = read_proposal(desk.register.envelope(version.run), key)
        if proposal.plan.digest != plan.digest:
            problem = "plan.json is not the plan that was signed"
        elif study.digest() != plan.study_digest:
            problem = "study.toml is not the study that the signed plan names"
    except CohortiumError as error:
        problem = f"{error.code}: {error.sentence}"
    return Signed(
        study=study,
        plan=plan,
        toml=(folder.root / "study.toml").read_text(encoding="utf-8"),
        dictionary=(folder.root / "dictionary.json").read_text(encoding="utf-8"),
        plan_json=json.dumps(plan.to_json()),
        signer=fingerprint(key),
        problem=problem,
    )


def column_rows(schema: Schema) -> list[dict[str, Any]]:
    """The dictionary as a table for people, MOST_COLUMNS_SHOWN columns at most."""
    return [
        {
            "name": column.name,
            "kind": column.kind,
            "values": values_told(column),
            "unit": column.unit,
            "role": column.role or "",
            "missing": "no" if column.required else "yes",
            "guessed": column.guessed,
            "description": _cut(column.description),
        }
        for column in schema.columns[:MOST_COLUMNS_SHOWN]
    ]


def values_told(column: Column) -> str:
    """Levels or range in words."""
    if column.identifier:
        return "never leaves the hospital"
    if column.levels is not None:
        shown = ", ".join(column.levels[:MOST_LEVELS_SHOWN])
        more = len(column.levels) - MOST_LEVELS_SHOWN
        return _cut(shown) + (f" and {more:,} more" if more > 0 else "")
    assert column.minimum is not None and column.maximum is not None
    low, high = (write_bound(column.kind, bound) for bound in (column.minimum, column.maximum))
    step = "" if column.resolution is None else f" in steps of {column.resolution:g}"
    return f"{_number(low)} to {_number(high)}{step}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT_SHOWN else text[: MOST_TEXT_SHOWN - 1] + "…"


# ---- what changed -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One setting that differs. old, new: "" where it was not there. privacy: it bears on the promise to patients."""

    place: str
    old: str
    new: str
    privacy: bool

    def to_json(self) -> dict[str, Any]:
        return {"place": self.place, "old": self.old, "new": self.new, "privacy": self.privacy}


_PRIVACY_SECTIONS = ("privacy", "strategy", "sites")
_PRIVACY_KEYS = (
    *("study.exclude", "study.rows_per_patient", "evaluation.epsilon", "evaluation.holdout", "evaluation.attack"),
    *("release.k_anonymity", "release.l_diversity"),
)
_PRIVACY_PROPERTIES = ("role", "x-guessed")


def changes(old: tuple[str, str], new: tuple[str, str]) -> list[Change]:
    """Differences between two (study.toml, dictionary.json), field by field; those of privacy come first."""
    before, after = (dict(_flat(tomllib.loads(text))) for text in (old[0], new[0]))
    found = [
        Change(place=_told(key), old=_text(before.get(key)), new=_text(after.get(key)), privacy=_of_privacy(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    found += _dictionary_changes(json.loads(old[1]), json.loads(new[1]))
    return sorted(found, key=lambda change: not change.privacy)


def _flat(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        place = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _flat(value, place)
        else:
            yield place, value


def _of_privacy(key: str) -> bool:
    return key.split(".")[0] in _PRIVACY_SECTIONS or key in _PRIVACY_KEYS


def _told(key: str) -> str:
    section, _, rest = key.partition(".")
    return f"[{section}] {rest}" if rest else section


def _dictionary_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    before, after = ({field["name"]: field for field in part["fields"]} for part in (old, new))
    found = []
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            there = f"a column: {(after if name in after else before)[name]['type']}"
            was, now = ("", there) if name not in before else (there, "")
            found.append(Change(place=f"dictionary: {name}", old=was, new=now, privacy=True))
            continue
        one, other = dict(_flat(before[name])), dict(_flat(after[name]))
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                place = f"dictionary: {name}, {key.removeprefix('constraints.')}"
                was, now = _listed(one.get(key), other.get(key))
                found.append(Change(place=place, old=was, new=now, privacy=key in _PRIVACY_PROPERTIES))
    if [n for n in before if n in after] != [n for n in after if n in before]:
        found.append(Change(place="dictionary: order of columns", old="another", new="", privacy=False))
    for key in dict.fromkeys([*old, *new]):
        if key != "fields" and old.get(key) != new.get(key):
            was, now = _text(old.get(key)), _text(new.get(key))
            found.append(Change(place=f"dictionary: {key}", old=was, new=now, privacy=False))
    return found


def _listed(old: Any, new: Any) -> tuple[str, str]:
    """Two lists of levels: only what differs, where a list is long."""
    if not (isinstance(old, list) and isinstance(new, list)) or len(old) + len(new) <= 2 * MOST_LEVELS_SHOWN:
        return _text(old), _text(new)
    was, now = set(map(str, old)), set(map(str, new))
    gone, come = [v for v in old if str(v) not in now], [v for v in new if str(v) not in was]
    return f"{len(old):,} levels; gone: {_text(gone) or 'none'}", f"{len(new):,} levels; new: {_text(come) or 'none'}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        shown: Sequence[Any] = value[: 2 * MOST_LEVELS_SHOWN]
        more = len(value) - len(shown)
        return _cut(", ".join(map(_text, shown))) + (f" and {more:,} more" if more else "")
    if isinstance(value, bool):
        return "true" if value else "false"
    return _cut(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))

"""The gate between a finished run and its release: lets a whole release go, or stops it. Never a single row.

Deleting rows that equal real ones would tell by their absence who took part, so the gate looks at what is public
already: the audit, the warnings, and the verdicts for which the study named the least word before anything was asked:

    [release]
    minimum = {prediction = "usable with care"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cohortium.common.errors import Refused
from cohortium.common.study_release import WORDS, Release
from cohortium.server.audit import AuditReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at. code: stable, names what is wrong where it is not ok."""

    code: str
    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "name": self.name, "ok": self.ok, "detail": self.detail}


def decide(
    result: Mapping[str, Any],
    audited: AuditReport,
    minimum: Mapping[str, str],
    *,
    rehearsal: bool = False,
    accept_guessed: bool = False,
) -> tuple[Finding, ...]:
    """Every question of the gate with its answer. The release goes only where all are ok (`refuse` raises).

    result: result.json. minimum: use -> least word (`minimum_of`). rehearsal, accept_guessed: a person's explicit word
    that a release which is not private, or whose ranges were read off a table, may be written all the same.
    """
    bad = [check.name for check in audited.checks if not check.ok]
    found = [
        Finding(
            code="RELEASE-AUDIT",
            name="audit",
            ok=audited.ok,
            detail=f"the run's audit fails: {', '.join(bad[:4])}" if bad else f"{len(audited.checks)} checks hold",
        )
    ]
    not_private = bool(result["privacy"]["rehearsal"])
    found.append(
        Finding(
            code="RELEASE-REHEARSAL",
            name="privacy",
            ok=rehearsal or not not_private,
            detail="a rehearsal, whose noise can be computed again: NOT PRIVATE"
            if not_private
            else "every release ran with fresh noise",
        )
    )
    guessed = any("guessed" in str(text) for text in result.get("warnings", []))
    found.append(
        Finding(
            code="RELEASE-GUESSED",
            name="dictionary",
            ok=accept_guessed or not guessed,
            detail="levels or ranges were read off a table, outside the ε" if guessed else "public knowledge only",
        )
    )
    given = verdicts(result)
    found += [_threshold(use, word, given) for use, word in sorted(minimum.items())]
    return tuple(found)


def refuse(findings: Sequence[Finding]) -> None:
    """Raise Refused with the first code that is not ok, and all of their sentences."""
    wrong = [finding for finding in findings if not finding.ok]
    if not wrong:
        return
    hints = {
        "RELEASE-AUDIT": "cohortium audit RUN says more; nothing is released before it holds",
        "RELEASE-REHEARSAL": "run the study without --seed; --rehearsal writes a folder that says it is not private",
        "RELEASE-GUESSED": "check each range against public knowledge, or --accept-guessed-ranges where it is public",
        "RELEASE-THRESHOLD": "the study agreed on this before: propose another run, or another study",
    }
    raise Refused(
        wrong[0].code,
        "the gate stops this release as a whole: " + "; ".join(finding.detail for finding in wrong),
        left="nothing was written; the run and its ledgers are as before",
        hint=hints[wrong[0].code],
    )


def minimum_of(release: Release) -> dict[str, str]:
    """`[release] minimum` of a study: use -> word. Empty where the study sets none."""
    return dict(release.minimum)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One verdict of a result. private: it was made of noised answers, so that it may be printed in a release."""

    use: str
    word: str
    sentence: str
    thresholds: str
    private: bool


def verdicts(result: Mapping[str, Any]) -> dict[str, Given]:
    """use (as `slug` spells it) -> verdict; a private one goes before the exact one of a simulation."""
    facts = result.get("facts")
    places = [
        (result, True),
        (facts if isinstance(facts, Mapping) else {}, True),
        (result.get("private_scores") or {}, True),
        (result.get("scores") or {}, False),
    ]
    found: dict[str, Given] = {}
    for place, private in places:
        tiles = place.get("verdicts") if isinstance(place, Mapping) else None
        for tile in tiles if isinstance(tiles, (list, tuple)) else ():
            if isinstance(tile, Mapping) and isinstance(tile.get("use"), str) and isinstance(tile.get("word"), str):
                given = Given(
                    use=tile["use"],
                    word=tile["word"],
                    sentence=str(tile.get("sentence", "")),
                    thresholds=str(tile.get("thresholds", "")),
                    private=private,
                )
                found.setdefault(slug(given.use), given)
    return found


def slug(use: str) -> str:
    """A use in small letters, digits and dashes: people write it in more than one way."""
    return re.sub(r"[^a-z0-9]+", "-", use.lower()).strip("-")


def _threshold(use: str, wanted: str, given: Mapping[str, Given]) -> Finding:
    """Fail closed: an unknown word, a use without a verdict and a verdict that is none are all below the least."""
    found = given.get(slug(use))
    ok = False
    if wanted not in WORDS:
        detail = f"{use}: {wanted!r} is not a verdict's word"
    elif found is None:
        detail = f"{use}: the study wants at least {wanted!r}, and there is no verdict for it"
    else:
        ok = found.word in WORDS and WORDS.index(found.word) >= WORDS.index(wanted)
        # An exact score of a simulation saw real rows: its word is not repeated in what is handed out.
        shown = f"it is {found.word!r}" if found.private or not ok else "it is reached"
        detail = f"{use}: the study wants at least {wanted!r}; {shown}"
    return Finding(code="RELEASE-THRESHOLD", name=f"minimum for {slug(use)}", ok=ok, detail=detail)

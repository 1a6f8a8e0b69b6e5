"""result.json of a consortium's run, read with care: what the gallery needs of it, or all.

A consortium's result holds noised figures only. One that holds exact scores compares with real rows: that is a
simulation's, never passed a gate, and is refused here as a whole, its report with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.errors import ProtocolError, Refused
from cohortium.common.evaluation.base import ReportFacts, Verdict, from_json
from cohortium.common.evaluation.findings import Finding, Findings
from cohortium.common.evaluation.report_sections import is_main
from cohortium.server.showing import SHOWN

FIGURES_DRAWN = 3
MAIN = ("column_agreement", "correlation_similarity", "tstr_auc", *SHOWN)
"""The figures of a card by preference: one of columns, one of relations, one of use, then whatever is known."""
MOST_BYTES = 64_000_000
REHEARSAL = "rehearsal, NOT private"
NO_NOISE = "no noise, NOT private"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A run in the gallery. loud: why it is not private, or "". epsilon: for as many hospitals as the study states."""

    run: str
    study: str
    title: str
    generator: str
    mode: str
    loud: str
    epsilon: float
    delta: float
    headline: str
    tiles: tuple[tuple[str, str], ...]
    figures: tuple[Finding, ...]
    patients: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "study": self.study,
            "title": self.title,
            "generator": self.generator,
            "mode": self.mode,
            "not_private": self.loud,
            "epsilon": _plain(self.epsilon),
            "delta": self.delta,
            "headline": self.headline,
            "verdicts": [{"use": use, "word": word} for use, word in self.tiles],
            "figures": [figure_json(found) for found in self.figures],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A whole result. prices: (relation, hospitals, ε); hospitals: how many a patient may be in, says the study."""

    card: Card
    facts: ReportFacts
    findings: Findings | None
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    sentence: str
    prices: tuple[tuple[str, int, float], ...]
    hospitals: int
    files: Mapping[str, str]
    ledgers: Mapping[str, tuple[int, str]]
    plan: str

    @property
    def named(self) -> tuple[Finding, ...]:
        """The main figures, in the report's order."""
        sections = () if self.findings is None else self.findings.sections
        return tuple(found for section in sections for found in section.findings if is_main(found))

    def price(self, relation: str, hospitals: int) -> float | None:
        return next((e for r, k, e in self.prices if (r, k) == (relation, hospitals)), None)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.card.to_json(),
            "figures": [figure_json(found) for found in self.named],
            "verdicts": [
                {"use": v.use, "word": v.word, "sentence": v.sentence, "thresholds": v.thresholds}
                for v in self.verdicts
            ],
            "statement": self.sentence,
            "prices": [{"relation": r, "hospitals": k, "epsilon": _plain(e)} for r, k, e in self.prices],
            "warnings": list(self.warnings),
            "plan": self.plan,
            "files": dict(self.files),
            "ledgers": {owner: {"size": size, "hash": head} for owner, (size, head) in self.ledgers.items()},
            "provenance": dict(self.facts.provenance),
        }


def figure_json(found: Finding) -> dict[str, Any]:
    figure = found.named.figure
    return {
        "key": found.key,
        "label": found.named.label,
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "reference": figure.reference,
        "unit": figure.unit,
        "better": figure.direction,
        "reason": figure.reason,
    }


# ---- reading ------------------------------------------------------------------------------------------------


def read_result(path: Path) -> dict[str, Any]:
    """result.json as it lies there; Refused RESULT-MISSING, ProtocolError RESULT-FORM."""
    try:
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            raise ValueError
        value = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
        if not isinstance(value, dict):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(
            "RESULT-MISSING", "this run has no result.json", where=("result.json",), hint="cohortium resume writes it"
        ) from None
    except (OSError, ValueError, RecursionError):
        raise _unreadable() from None
    return value


def card_of(run: str, value: Mapping[str, Any]) -> Card:
    """What the gallery shows; nothing else of the result is looked at. ProtocolError RESULT-FORM, RESULT-EXACT."""
    try:
        _only_noised(value)
        study, privacy = value["study"], value["privacy"]
        hospitals = int(privacy["statement"]["hospitals"])
        price = {(p["relation"], int(p["hospitals"])): _epsilon(p["epsilon"]) for p in privacy["prices"]}
        spent = price["add-remove", hospitals]
        evaluation = value.get("evaluation") or {}
        found = [f for section in evaluation.get("sections", ()) for f in section["findings"] if _drawn(f)]
        found.sort(key=lambda f: MAIN.index(f["key"]))
        patients = evaluation.get("patients")
        return Card(
            run=run,
            study=_text(study["id"]),
            title=_text(study["title"]),
            generator=_text(study["generator"]),
            mode=_text(study["mode"]),
            loud=_loud(privacy, spent),
            epsilon=spent,
            delta=float(privacy["delta"]),
            headline=_text(evaluation.get("headline", "")),
            tiles=tuple((_text(v["use"]), _text(v["word"])) for v in value.get("verdicts") or ()),
            figures=tuple(from_json(Finding, f) for f in found[:FIGURES_DRAWN]),
            patients=None if patients is None else float(patients),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise _unreadable() from None


def whole_of(run: str, value: Mapping[str, Any]) -> Whole:
    """All of a result; ProtocolError RESULT-FORM, RESULT-EXACT."""
    card = card_of(run, value)
    try:
        privacy = value["privacy"]
        findings = Findings.from_json(value["evaluation"]) if value.get("evaluation") else None
        return Whole(
            card=card,
            facts=ReportFacts.from_json(value["facts"]),
            findings=findings,
            verdicts=tuple(from_json(Verdict, v) for v in value.get("verdicts") or ()),
            warnings=tuple(_text(w) for w in value["warnings"]),
            sentence=_text(privacy["sentence"]),
            prices=tuple(
                (_text(p["relation"]), int(p["hospitals"]), _epsilon(p["epsilon"])) for p in privacy["prices"]
            ),
            hospitals=int(privacy["statement"]["hospitals"]),
            files={_text(name): _text(sha) for name, sha in value["files"].items()},
            ledgers={_text(o): (int(h["size"]), _text(h["hash"])) for o, h in value["ledgers"].items()},
            plan=_text(value["plan"]["digest"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise _unreadable() from None


def _only_noised(value: Mapping[str, Any]) -> None:
    exact = value.get("scores") is not None or value.get("exact_evaluation") is not None
    if exact or value["facts"]["mode"] != "deployment":
        raise ProtocolError(
            "RESULT-EXACT",
            "this result compares with real rows, as only a simulation's does: it is not shown",
            where=("result.json",),
            hint="a consortium's result is written by the run itself; nothing is copied into its folder",
        )


def _loud(privacy: Mapping[str, Any], spent: float) -> str:
    """Fail closed: whatever is not plainly private is called what it is."""
    if privacy["rehearsal"] is not False or _text(privacy["sentence"]).startswith("NOT PRIVATE"):
        return REHEARSAL
    return "" if math.isfinite(spent) else NO_NOISE


def _drawn(found: Mapping[str, Any]) -> bool:
    figure = found["named"]["figure"]
    return found["key"] in SHOWN and figure["value"] is not None and figure["direction"] == "higher"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _epsilon(value: Any) -> float:
    return math.inf if value == "inf" else float(value)


def _plain(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _unreadable() -> ProtocolError:
    return ProtocolError(
        "RESULT-FORM",
        "the result of this run cannot be read",
        where=("result.json",),
        hint="restore the file from a backup, then: cohortium audit RUN",
    )

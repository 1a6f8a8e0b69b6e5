"""What an evaluation could not say, gathered from every figure without a value, with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cohortium.common.evaluation.base import Figure, ReportFacts, Scores
from cohortium.common.evaluation.findings import Findings, Section
from cohortium.common.evaluation.report_sections import ALWAYS, OPTIONAL, TITLES

NAMED_TOGETHER = 8
NUMBER = re.compile(r"[−-]?\d[\d.,]*(?:e[+-]?\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """What could not be assessed, and why."""

    where: str
    what: str
    why: str


def gaps(facts: ReportFacts, findings: Findings | None, scores: Scores | None) -> list[Gap]:
    """Everything that could not be assessed, with remarks and what was not asked for, in the report's order.

    Figures of a section whose reasons differ in their numbers only stand together.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (where, reason without numbers): (what, reason)

    def add(where: str, label: str, why: str) -> None:
        found.setdefault((where, NUMBER.sub("…", why)), []).append((label, why))

    if findings is None:
        for row in facts.private_scores:
            if row.figure.value is None:
                add("Private evaluation", row.label, row.figure.reason)
    else:
        for tile in findings.verdicts:
            if tile.word == "cannot be assessed":
                add("Verdict", tile.use, tile.sentence)
        for section in findings.sections:
            for label, figure in _figures(section):
                if figure.value is None:
                    add(section.title, label, figure.reason)
            for note in section.notes:
                found.setdefault((section.title, note), []).append(("", note))
        present = {section.key for section in findings.sections}
        left = [t for k, t in TITLES.items() if k not in present and k not in ALWAYS and k not in OPTIONAL]
        for title in left:
            add("Whole sections", title, "not part of this evaluation")
    if scores is not None:
        for line in scores.unassessed:
            found.setdefault(("Exact comparison, simulation only", line), []).append(("", line))
    return [_gap(where, why, entries) for (where, why), entries in found.items()]


def _figures(section: Section) -> Iterator[tuple[str, Figure]]:
    for finding in section.findings:
        yield finding.named.label, finding.named.figure
    for forest in section.forests:
        for effect in forest.rows:
            yield f"{forest.title}: {effect.label}", effect.figure
            if effect.beside is not None:
                yield f"{forest.title}: {effect.label} ({forest.beside_name})", effect.beside
    for found in section.maps:
        for pair in found.worst:
            yield f"{pair.first} with {pair.second}", pair.real
    for share in section.shares:
        yield share.name, share.distance


def _gap(where: str, why: str, entries: list[tuple[str, str]]) -> Gap:
    labels = [label for label in dict.fromkeys(label for label, _ in entries) if label]
    more = len(labels) - NAMED_TOGETHER
    what = ", ".join(labels[:NAMED_TOGETHER]) + (f" and {more} more" if more > 0 else "")
    reasons = {reason for _, reason in entries}
    return Gap(where=where, what=what, why=reasons.pop() if len(reasons) == 1 else why)

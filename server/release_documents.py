"""The documents of a release: cards and annexes, filled from study, plan, ledgers and result, in Markdown.

Every number in them stands in a signed file beside them or follows from one by a formula that is printed with it. What
only people can say (purpose, lawful basis, the expert's opinion) is left as a line to be completed, never guessed.
Names and titles are other people's text: all of it is escaped.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from cohortium.common.privacy.budget import rounded_up
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.release_manifest import signature_file
from cohortium.common.rules import sentence
from cohortium.common.schema import Column, write_bound
from cohortium.common.study import Study
from cohortium.common.study_release import how_sampled
from cohortium.server.audit import COORDINATOR
from cohortium.server.release_gate import Finding, verdicts

DOCUMENTS = ("README.md", "data-card.md", "model-card.md", "dpia-annex.md", "hipaa-annex.md")
FALSE_ALARMS = (0.01, 0.05, 0.10)
PRIORS = (0.50, 0.10)
FIGURES_LISTED = 12
LEVELS_LISTED = 12
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentFacts:
    """What the templates may use. result: as it is released. at: Unix time. needed: signatures of sites."""

    study: Study
    plan: Plan
    result: Mapping[str, Any]
    books: Mapping[str, Book]
    gate: tuple[Finding, ...]
    keys: Mapping[str, str]
    needed: int
    at: int
    withheld: tuple[str, ...]


class Plain(str):
    """Text that is Markdown already and is not escaped again."""

    __slots__ = ()


def write_documents(folder: Path, facts: DocumentFacts) -> None:
    """Every document of DOCUMENTS into the folder, which holds the rows; the same facts give the same bytes."""
    environment = jinja2.Environment(
        autoescape=False,  # Markdown, not HTML: `finalize` escapes every value that is not Plain
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: escaped(value) if isinstance(value, str) and not isinstance(value, Plain) else value,
    )
    environment.filters |= {"epsilon": epsilon, "number": number, "amount": amount, "share": share}
    values = _values(facts, folder)
    place = resources.files("cohortium.server").joinpath("documents")
    for name in DOCUMENTS:
        template = environment.from_string(place.joinpath(f"{name}.j2").read_text(encoding="utf-8"))
        (folder / name).write_text(template.render(**values), encoding="utf-8", errors="replace")


def escaped(text: str) -> Plain:
    """A text as one line of Markdown that shows itself: no table cell ends, no link, no HTML, no control characters."""
    line = " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())
    return Plain(_SPECIAL.sub(r"\\\1", line).replace("://", ":\u200b//"))


def epsilon(value: Any) -> Plain:
    """Rounded up, never down."""
    amount_ = math.inf if value == "inf" else float(value)
    return Plain("∞" if math.isinf(amount_) else rounded_up(amount_))


def number(value: Any, digits: int = 3) -> Plain:
    return Plain("–" if value is None else f"{float(value):.{digits}f}")


def share(value: float) -> Plain:
    """A bound in per cent, rounded up."""
    return Plain(f"{math.ceil(value * 1000 - 1e-9) / 10:.1f} %")


def amount(value: int) -> Plain:
    return Plain(f"{value:,}")


def _values(facts: DocumentFacts, folder: Path) -> dict[str, Any]:
    plan, study, result = facts.plan, facts.study, facts.result
    prices = {(row["relation"], row["hospitals"]): row["epsilon"] for row in result["privacy"]["prices"]}
    spent = _float(prices["add-remove", plan.hospitals])
    cumulated = {stage.name: price for stage, price in plan.cumulated()}
    rounds = result["facts"].get("rounds", [])
    private = [given for given in verdicts(result).values() if given.private]
    audited = result.get("rehearsal_audit")
    return {
        "study": study,
        "plan": plan,
        "schema": study.schema,
        "about": dict(study.schema.about),
        "result": result,
        "mode": result["facts"]["mode"],
        "rehearsal": result["privacy"]["rehearsal"],
        "statement": result["privacy"]["sentence"],
        "warnings": result["warnings"],
        "not_protected": result["facts"].get("not_protected", []),
        "columns": [_column(column) for column in study.schema.modelled],
        "dropped": [column.name for column in study.schema.columns if column.identifier],
        "roles": {
            role: [column.name for column in study.schema.with_role(role) if not column.identifier]
            for role in ("quasi-identifier", "sensitive", "target", "time", "event", "site")
        },
        "dates": [column.name for column in study.schema.modelled if column.kind in ("date", "datetime")],
        "guessed": list(study.schema.guessed),
        "sampled": how_sampled(study.release, study.schema),
        "rules": [(rule.name, sentence(rule, study.schema.columns)) for rule in study.schema.rules],
        "shares": [(c.name, level, part) for c in study.schema.modelled for level, part in c.reference_shares],
        "smallest": _smallest_group(folder, study),
        "old_ages": [c.name for c in study.schema.modelled if _above_89(c)],
        "stages": [(stage, cumulated[stage.name]) for stage in plan.stages],
        "prices": prices,
        "spent": spent,
        "verdicts": private,
        "figures": [_figure(row) for row in result["facts"].get("private_scores", [])[:FIGURES_LISTED]],
        "figures_in_all": len(result["facts"].get("private_scores", [])),
        "audited": audited if isinstance(audited, Mapping) else None,
        "rounds": len(rounds),
        "dropouts": sum(1 for row in rounds if row.get("dropped")),
        "ledgers": [_ledger(owner, book, plan, str(result["run"])) for owner, book in facts.books.items()],
        "gate": facts.gate,
        "keys": facts.keys,
        "needed": facts.needed,
        "signatures": [signature_file(name) for name in plan.sites],
        "released": _when(facts.at),
        "withheld": facts.withheld,
        "membership": [(alarms, membership_bound(spent, plan.delta, alarms)) for alarms in FALSE_ALARMS],
        "guesses": [(prior, max(prior, 1 - prior), guess_bound(spent, plan.delta, prior)) for prior in PRIORS],
        "between_two": guess_bound(_float(prices["replace-one", plan.hospitals]), plan.delta, 0.5),
        "replaced": _float(prices["replace-one", plan.hospitals]),
        "todo": Plain("**To be completed:** "),
    }


def membership_bound(spent: float, delta: float, false_alarms: float) -> float:
    """The most often that any test can recognise a patient who took part, at a share of false alarms.

    Of all tests against an (ε, δ)-private result (Kairouz, Oh & Viswanath 2015, theorem 2.1): both
    e^ε·f + δ and 1 − e^(−ε)(1 − f − δ) bound the share of true alarms.
    """
    if math.isinf(spent):
        return 1.0
    first = math.exp(min(spent, 700.0)) * false_alarms + delta
    second = 1.0 - math.exp(-spent) * (1.0 - false_alarms - delta)
    return min(1.0, first, second)


def guess_bound(spent: float, delta: float, prior: float) -> float:
    """The most often that anybody guesses right whether a patient took part, whose chance to do so was `prior`.

    The corners of the same region: answer always no, follow the best test, answer always yes.
    """
    if math.isinf(spent):
        return 1.0
    odds = math.exp(-spent)
    test = (1.0 + delta * odds) / (1.0 + odds)
    return min(1.0, max(1.0 - prior + prior * delta, test, prior + (1.0 - prior) * delta))


def _column(column: Column) -> dict[str, Any]:
    if column.levels is not None:
        shown = list(column.levels[:LEVELS_LISTED])
        values = ", ".join(shown) + (f", … ({len(column.levels)} levels)" if len(column.levels) > len(shown) else "")
    else:
        ends = [
            write_bound(column.kind, float(bound)) for bound in (column.minimum, column.maximum) if bound is not None
        ]
        values = " to ".join(f"{end:g}" if isinstance(end, float) else str(end) for end in ends)
    return {
        "name": column.name,
        "kind": column.kind,
        "range": values,
        "unit": column.unit,
        "role": column.role,
        "missing": "no" if column.required else "yes",
        "description": column.description,
    }


def _smallest_group(folder: Path, study: Study) -> int | None:
    """Rows of the rarest combination of quasi-identifiers in the released table, counted; None without a target."""
    if study.release.k_anonymity is None and study.release.l_diversity is None:
        return None
    names = [column.name for column in study.schema.modelled if column.role == "quasi-identifier"]
    rows = pd.read_parquet(folder / "synthetic.parquet", columns=names)
    return int(rows.groupby(names, dropna=False, observed=True).size().min())


def _above_89(column: Column) -> bool:
    named = re.search(r"(^|[^a-z])age([^a-z]|$)", column.name.lower()) is not None
    return named and not column.categorical and column.maximum is not None and column.maximum > 89


def _figure(row: Mapping[str, Any]) -> dict[str, Any]:
    figure = row["figure"]
    known = figure.get("value") is not None
    return {
        "label": row["label"],
        "value": number(figure["value"]) if known else "cannot be assessed",
        "interval": f"{number(figure['low'])} to {number(figure['high'])}" if figure.get("low") is not None else "–",
        "reference": number(figure.get("reference")),
    }


def _ledger(owner: str, book: Book, plan: Plan, run: str) -> dict[str, Any]:
    mine = [entry for entry in book.entries.values() if entry.run == run]
    states = Counter(entry.state for entry in mine)
    return {
        "owner": owner,
        "who": "the coordinator (the study's ledger)" if owner == COORDINATOR else owner,
        "lines": book.size,
        "charges": len(mine),
        "unused": states["BURNED"] + states["VOID"],
        "until": _when(book.at),
        "planned": plan.releases,
    }


def _when(seconds: int) -> Plain:
    return Plain(f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC")


def _float(value: Any) -> float:
    return math.inf if value == "inf" else float(value)

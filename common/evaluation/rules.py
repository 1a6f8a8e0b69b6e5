"""The report's section on clinical rules: what the dictionary demands of a row, held against the synthetic rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.findings import Finding, Section, Table, TableRow
from cohortium.common.rule_checks import RuleResult, breaking_rows, check_rules
from cohortium.common.rules import sentence

if TYPE_CHECKING:
    import pandas as pd

    from cohortium.common.schema import Schema

KEY = "rules_broken"


def rules_section(schema: Schema, table: pd.DataFrame, *, enforced: bool = False) -> Section | None:
    """Every rule with the rows that it applies to and those that break it; None for a dictionary without rules.

    table: synthetic rows. enforced: rows that broke a rule were drawn again, as the study says.
    """
    if not schema.rules:
        return None
    results = check_rules(schema, table)
    broken = int(np.sum(breaking_rows(schema, table)))
    rows = tuple(
        _row(result, sentence(rule, schema.columns)) for rule, result in zip(schema.rules, results, strict=True)
    )
    notes = [
        f"{result.name}: no row to which it applies, so nothing can be said."
        for result in results
        if not result.applicable
    ]
    if enforced:
        notes.append("The study has rows that break a rule drawn again, so none does.")
    how = f"{broken:,} of {len(table):,} synthetic rows break at least one of {len(results)} rules."
    figure = (
        Figure(value=broken / len(table), unit="share", direction="lower", how=how)
        if len(table)
        else Figure.unknown("there are no rows", unit="share", direction="lower")
    )
    return Section(
        key="rules",
        title="Clinical rules",
        intro=(
            "Rules of the dictionary, held against the synthetic rows: no record was asked, so this is exact and costs "
            "nothing. A rule applies to a row where every value that it needs is there."
        ),
        findings=(Finding(key=KEY, named=NamedFigure(label="Rows that break a clinical rule", figure=figure)),),
        tables=(
            Table(
                title="Rules",
                head=("rule", "what it says", "rows it applies to", "rows that break it", "share"),
                rows=rows,
                caption=how,
            ),
        ),
        notes=tuple(notes),
    )


def _row(result: RuleResult, text: str) -> TableRow:
    share = "–" if result.share is None else percent(result.share)
    return TableRow(cells=(result.name, text, f"{result.applicable:,}", f"{result.broken:,}", share))


def percent(share: float) -> str:
    """A share for people; what is above 0 and below 1 is never printed as 0 or 100 per cent."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"

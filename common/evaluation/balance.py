"""The report's section on representation: how large each group of the synthetic table is, against public figures.

Reads synthetic rows and the dictionary only. Whether the hospitals' own patients are as the public figures say is
another question, which the private evaluation answers (subgroups.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cohortium.common.encoding import grids
from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.findings import Finding, Section, Table, TableRow
from cohortium.common.evaluation.rules import percent

if TYPE_CHECKING:
    import pandas as pd

    from cohortium.common.schema import Column, Schema

LEVELS_AT_MOST = 12
MINIMUM_SHARE = 0.05
"""A group below this share of the rows is called small: a convention, stated in the table, not a test."""
ROLES = ("site", "quasi-identifier", "target")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One level of one column. share: of the rows in which the column has a value. reference: the public share."""

    level: str
    rows: int
    share: float
    reference: float | None = None

    @property
    def difference(self) -> float | None:
        return None if self.reference is None else self.share - self.reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """A column's groups in the dictionary's order; missing: rows without a value."""

    column: str
    groups: tuple[Group, ...]
    missing: int

    @property
    def ratio(self) -> float | None:
        """Largest group over smallest; None where a group has no row."""
        rows = [group.rows for group in self.groups]
        return max(rows) / min(rows) if min(rows) > 0 else None

    @property
    def empty(self) -> tuple[str, ...]:
        return tuple(group.level for group in self.groups if group.rows == 0)

    def below(self, share: float) -> tuple[str, ...]:
        return tuple(group.level for group in self.groups if group.share < share)


def group_columns(schema: Schema, target: str | None = None) -> tuple[Column, ...]:
    """Columns of 2 to 12 levels: sites, quasi-identifiers, targets, those with public shares, and `target`."""
    return tuple(
        column
        for column in schema.modelled
        if column.levels is not None
        and 2 <= len(column.levels) <= LEVELS_AT_MOST
        and (column.role in ROLES or column.name == target or column.reference_shares)
    )


def balance_of(
    schema: Schema, table: pd.DataFrame, column: Column, *, reference: Mapping[str, float] | None = None
) -> Balance:
    """Rows and shares of each level; reference: level -> public share, instead of the dictionary's."""
    grid = grids(schema)[[c.name for c in schema.modelled].index(column.name)]
    counts = np.bincount(grid.encode(table[column.name]), minlength=grid.size)
    known = max(int(counts[:-1].sum()), 1)
    public = dict(column.reference_shares) if reference is None else dict(reference)
    groups = tuple(
        Group(level=level, rows=int(count), share=float(count / known), reference=public.get(level))
        for level, count in zip(column.levels or (), counts[:-1], strict=True)
    )
    return Balance(column=column.name, groups=groups, missing=int(counts[-1]))


def balance_section(
    schema: Schema,
    table: pd.DataFrame,
    reference: Mapping[str, Mapping[str, float]] | None = None,
    *,
    target: str | None = None,
    minimum_share: float = MINIMUM_SHARE,
    sampled: str = "",
) -> Section | None:
    """Group sizes of the synthetic table, or None where it has no group columns.

    reference: column -> level -> public share, before those of the dictionary. sampled: a sentence on how rows were
    balanced, if they were. The figure is the largest difference to a public share, where there are any.
    """
    found = [
        balance_of(schema, table, column, reference=(reference or {}).get(column.name))
        for column in group_columns(schema, target)
    ]
    if not found:
        return None
    compared = any(group.reference is not None for balance in found for group in balance.groups)
    head = ("column", "group", "rows", "share", *(("public share", "difference") if compared else ()), "remark")
    rows = tuple(
        _row(balance, group, minimum_share, compared=compared) for balance in found for group in balance.groups
    )
    ratios = tuple(
        TableRow(
            cells=(
                balance.column,
                "–" if balance.ratio is None else f"{balance.ratio:.1f}",
                ", ".join(balance.below(minimum_share)) or "none",
                f"{balance.missing:,}",
            )
        )
        for balance in found
    )
    return Section(
        key="balance",
        title="Who is in the table",
        intro=(
            "How large each group of the synthetic table is. No record was asked, so this is exact and costs nothing. "
            + ("Public shares are those that the dictionary states. " if compared else "")
            + sampled
        ).strip(),
        findings=_findings(found),
        tables=(
            Table(title="Groups", head=head, rows=rows, caption="Shares of the rows in which the column has a value."),
            Table(
                title="Imbalance",
                head=(
                    "column",
                    "largest over smallest",
                    f"groups under {percent(minimum_share)}",
                    "rows without value",
                ),
                rows=ratios,
            ),
        ),
        notes=tuple(
            f"{balance.column}: no row for {', '.join(balance.empty)}; results for such a group cannot be drawn from "
            "this table."
            for balance in found
            if balance.empty
        ),
    )


def _row(balance: Balance, group: Group, minimum_share: float, *, compared: bool) -> TableRow:
    remark = "no row" if group.rows == 0 else "small" if group.share < minimum_share else ""
    public: tuple[str, ...] = ()
    if compared:
        difference = group.difference
        public = (
            "–" if group.reference is None else percent(group.reference),
            "–" if difference is None else f"{100 * difference:+.1f} points",
        )
    return TableRow(cells=(balance.column, group.level, f"{group.rows:,}", percent(group.share), *public, remark))


def _findings(found: list[Balance]) -> tuple[Finding, ...]:
    gaps = [
        (abs(group.difference), balance.column, group.level)
        for balance in found
        for group in balance.groups
        if group.difference is not None
    ]
    if not gaps:
        return ()
    gap, column, level = max(gaps)
    how = f"Of all groups with a public share the one farthest from it is {level} ({column})."
    figure = Figure(value=gap, unit="share", direction="lower", how=how)
    return (
        Finding(
            key="largest_gap_to_public", named=NamedFigure(label="Largest difference to a public share", figure=figure)
        ),
    )

"""What the page shows of the findings: each section's pictures with the table behind each.

A view made of texts and finished SVG: the templates lay it out and escape the texts. Pictures are limited in number,
tables in length; what is left out is said where it is left out, and result.json has all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from cohortium.common.evaluation.base import Figure, Scores
from cohortium.common.evaluation.findings import Curves, DifferenceMap, Finding, Findings, Forest, Section, Shares
from cohortium.common.evaluation.pictures import Identifiers, heat_map
from cohortium.common.evaluation.pictures_curves import curves_picture, styled, thinned
from cohortium.common.evaluation.pictures_forest import findings_picture, forest_picture
from cohortium.common.evaluation.pictures_shares import shares_picture
from cohortium.common.evaluation.report_text import UNKNOWN, interval, number, percent, reference

ROWS_DRAWN = 12
PICTURES_OF_ROWS = 3
SHARES_DRAWN = 24
NAMES_DRAWN = 40
POINTS_LISTED = 60
ROWS_SHOWN = 40

HELD_OUT, SYNTHETIC, FRESH, EXACT = "held-out", "synthetic", "fresh", "exact"
KEYS = {
    "dot": "figure and 95 % interval",
    HELD_OUT: "held-out patients, noised, with 95 % interval",
    SYNTHETIC: "synthetic rows",
    FRESH: "reference (what it is, says the table)",
    EXACT: "exact, simulation only",
}
TITLES = {
    "fidelity": "Fidelity: one column at a time",
    "associations": "Associations between columns",
    "prediction": "Utility: training a prediction model",
    "survival": "Survival",
    "replication": "Replication of analyses",
    "privacy": "Privacy",
    "nearness": "How near synthetic rows lie to patients",
    "fairness": "Fairness between groups",
    "rare": "Rare categories",
    "rules": "Clinical rules",
    "balance": "Balance and representativeness",
}
"""The order of the sections and the headings of those that the findings do not bring."""
ALWAYS = ("privacy",)
FROM_SCORES = ("fidelity", "associations", "prediction")
OPTIONAL = ("nearness",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A table of texts; the first cell of a row is its header. folded: shown on demand."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False

    @property
    def words(self) -> frozenset[int]:
        """The columns that hold words, not numbers."""
        cells = ((i, c) for row in self.rows for i, c in enumerate(row) if c != UNKNOWN)
        return frozenset(i for i, c in cells if c[:1].isalpha())


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A picture with its words. legend: (CSS class of the sample, text)."""

    title: str
    svg: Markup
    table: Listing
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Pictures side by side. layout: two, grid-small or grid-map (report.css)."""

    layout: str
    pictures: tuple[Drawn, ...]
    note: str = ""
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A section of the page. place: its id, safe to write; section: None where only exact scores or facts fill it."""

    key: str
    place: str
    title: str
    section: Section | None = None
    groups: tuple[Group, ...] = ()
    tables: tuple[Listing, ...] = ()
    missing: tuple[str, ...] = ()


def blocks(ids: Identifiers, findings: Findings | None, scores: Scores | None) -> list[Block]:
    """All sections in the report's order; unknown ones follow in the order of the findings."""
    by_key: dict[str, list[Section]] = {}
    for section in () if findings is None else findings.sections:
        by_key.setdefault(section.key, []).append(section)
    out = []
    for key, title in TITLES.items():
        found = by_key.pop(key, [])
        if not found and (key in ALWAYS or (key in FROM_SCORES and scores is not None)):
            out.append(Block(key=key, place=key, title=title))
        for n, section in enumerate(found):
            out.append(_block(ids, section, key if not n else f"{key}-{n + 1}"))
    rest = [section for sections in by_key.values() for section in sections]
    out += [_block(ids, section, f"other-{n + 1}") for n, section in enumerate(rest)]
    return out


def _block(ids: Identifiers, section: Section, place: str) -> Block:
    groups = [*_figures(ids, section)]
    if section.curves:
        groups.append(Group(layout="two", pictures=tuple(_curves(ids, c) for c in section.curves)))
    forests = tuple(drawn for f in section.forests if _known(f) for drawn in _forest(ids, f))
    if forests:
        groups.append(Group(layout="two", pictures=forests))
    groups += [_map(ids, m) for m in section.maps]
    tables = [_worst(m) for m in section.maps if m.worst]
    if section.findings and all(f.named.figure.value is None for f in section.findings):
        tables.append(_figure_table(section.title, section.findings))
    if section.shares:
        group, table = _shares(ids, section.shares)
        groups.append(group)
        tables += [table] if table else []
    for t in section.tables:
        rows = tuple(row.cells for row in t.rows)
        caption = f"{t.title}. {t.caption}" if t.caption else t.title
        tables.append(Listing(caption=caption, head=t.head, rows=rows, folded=len(rows) > ROWS_SHOWN))
    missing = [f.named.label for f in section.findings if f.named.figure.value is None and is_main(f)]
    missing += [forest.title for forest in section.forests if not _known(forest)]
    return Block(
        key=section.key,
        place=place,
        title=section.title or TITLES.get(section.key, section.key),
        section=section,
        groups=tuple(groups),
        tables=tuple(tables),
        missing=tuple(missing),
    )


def _figures(ids: Identifiers, section: Section) -> list[Group]:
    """Dot plots of the main figures that are known: shares of one by which way is better, all else by unit.

    Figures of single columns, levels and groups have a dot in their key and stand in the table; they are drawn where
    a section has no others.
    """
    known = [f for f in section.findings if f.named.figure.value is not None]
    main = [f for f in known if is_main(f)] or known
    sets: dict[str, list[Finding]] = {}
    for finding in main:
        sets.setdefault(_axis_of(finding), []).append(finding)
    drawn = []
    for title, rows in sets.items():
        part = rows[:ROWS_DRAWN]
        zero = part[0].named.figure.direction == "lower"
        svg = Markup(findings_picture(ids, part, title=f"{section.title}: {title}", from_zero=zero))
        drawn.append(Drawn(title=title, svg=svg, table=_figure_table(section.title, part)))
    if not drawn:
        return []
    # The whole set once, behind the last picture, so that what cannot be assessed stands in a table as well.
    more = len(section.findings) - sum(len(rows[:ROWS_DRAWN]) for rows in sets.values())
    caption = f"The table has {more} more figures." if more else ""
    drawn[-1] = replace(drawn[-1], table=_figure_table(section.title, section.findings), caption=caption)
    legend = [("dot", KEYS["dot"])]
    legend += [(FRESH, KEYS[FRESH])] if any(f.named.figure.reference is not None for f in main) else []
    legend += [(EXACT, KEYS[EXACT])] if any(f.exact is not None for f in main) else []
    return [Group(layout="two", pictures=tuple(drawn), legend=tuple(legend))]


def is_main(finding: Finding) -> bool:
    """Not of a single column, level or group: those have a dot in their key."""
    return "." not in finding.key


def _axis_of(finding: Finding) -> str:
    f = finding.named.figure
    ends = [v for v in (f.value, f.low, f.high, f.reference, finding.exact) if v is not None]
    if min(ends) >= -0.02 and max(ends) <= 1.02:
        return {"higher": "Higher is better", "lower": "Lower is better"}.get(f.direction, "Figures")
    return f.unit[:1].upper() + f.unit[1:] if f.unit else "Other figures"


def _figure_table(title: str, rows: Sequence[Finding]) -> Listing:
    exact = any(r.exact is not None for r in rows)
    head = ["Figure", "Value (95 % interval)", "Fresh real sample", *(["Exact (simulation only)"] if exact else [])]
    return Listing(
        caption=f"{title}: figures",
        head=(*head, "Better", "Remark"),
        rows=tuple(
            (
                r.named.label + (f" [{r.named.figure.unit}]" if r.named.figure.unit else ""),
                interval(r.named.figure),
                reference(r.named.figure),
                *([number(r.exact)] if exact else []),
                "" if r.named.figure.direction == "none" else r.named.figure.direction,
                remark(r.named.figure),
            )
            for r in rows
        ),
        folded=True,
    )


def remark(figure: Figure) -> str:
    """Why there is no value, or how it was computed and what the reference is."""
    if figure.value is None:
        return figure.reason
    parts = [figure.how, f"Reference: {figure.reference_text}" if figure.reference_text else ""]
    return ". ".join(p.rstrip(".") for p in parts if p)


def _curves(ids: Identifiers, curves: Curves) -> Drawn:
    shown = styled(curves.lines)
    legend = tuple((f"line {s.hue} {s.dash} {'banded' if s.line.low else ''}".strip(), s.line.label) for s in shown)
    left_out = len(curves.lines) - len(shown)
    caption = curves.caption + (f" {left_out} more lines are in the table." if left_out else "")
    rows = []
    for line in curves.lines:
        for i in thinned(line, POINTS_LISTED):
            ends = "" if not line.low else f"{number(line.low[i])} to {number(line.high[i])}"
            rows.append((line.label, number(line.x[i]), number(line.y[i]), ends))
    for row in curves.counts:
        title = f"{row.label}: {curves.count_title or 'number'}"
        rows += [(title, number(at), number(v), "") for at, v in zip(curves.count_places, row.values)]
    most = max((len(line.x) for line in curves.lines), default=0)
    thin = f"; of a line with more points, {POINTS_LISTED}" if most > POINTS_LISTED else ""
    head = ("Line", curves.x_label or "x", curves.y_label or "y", "95 % interval")
    table = Listing(caption=f"{curves.title}: points{thin}", head=head, rows=tuple(rows), folded=True)
    return Drawn(
        title=curves.title,
        svg=Markup(curves_picture(ids, curves)),
        table=table,
        caption=caption.strip(),
        legend=legend,
    )


def _known(forest: Forest) -> list[Figure]:
    return [f for r in forest.rows for f in (r.figure, r.beside) if f is not None and f.value is not None]


def _forest(ids: Identifiers, forest: Forest) -> list[Drawn]:
    parts = [forest.rows[i : i + ROWS_DRAWN] for i in range(0, len(forest.rows), ROWS_DRAWN)]
    known = _known(forest)
    beside = any(r.beside is not None for r in forest.rows)
    legend = [(HELD_OUT, f"{forest.name}, 95 % interval")]
    legend += [(SYNTHETIC, f"{forest.beside_name}, 95 % interval")] if beside else []
    if forest.line is not None:
        legend.append(("limit", f"{forest.line_name}: {number(forest.line)}".replace("-", "−")))
    legend += [(FRESH, KEYS[FRESH])] if any(f.reference is not None for f in known) else []
    exact = any(r.exact is not None for r in forest.rows)
    legend += [(EXACT, KEYS[EXACT])] if exact else []
    head = ["Row", f"{forest.name} (95 % interval)", *([f"{forest.beside_name} (95 % interval)"] if beside else [])]
    head += [*(["Exact (simulation only)"] if exact else []), "Remark"]
    out = []
    for n, part in enumerate(parts[:PICTURES_OF_ROWS]):
        last = n == min(len(parts), PICTURES_OF_ROWS) - 1
        start = n * ROWS_DRAWN
        listed = forest.rows[start:] if last else part
        rows = tuple(
            (
                r.label,
                interval(r.figure),
                *([("–" if r.beside is None else interval(r.beside))] if beside else []),
                *([number(r.exact)] if exact else []),
                remark(r.figure),
            )
            for r in listed
        )
        title = forest.title if len(parts) == 1 else f"{forest.title} ({n + 1} of {len(parts)})"
        caption = forest.caption + (f" {len(listed) - len(part)} more are in the table." if listed != part else "")
        out.append(
            Drawn(
                title=title,
                svg=Markup(forest_picture(ids, replace(forest, title=title), first=start, last=start + ROWS_DRAWN)),
                table=Listing(caption=title, head=tuple(head), rows=rows, folded=True),
                caption=caption.strip(),
                legend=tuple(legend),
            )
        )
    return out


def _map(ids: Identifiers, found: DifferenceMap) -> Group:
    """The maps of the columns with the greatest differences where there are too many to draw."""
    n = len(found.names)
    gap = [[s - r for s, r in zip(a, b)] for a, b in zip(found.synthetic, found.real)]
    size = [max((abs(v) for j, v in enumerate(row) if j != i), default=0.0) for i, row in enumerate(gap)]
    chosen = sorted(sorted(range(n), key=lambda i: -size[i])[:NAMES_DRAWN])
    names = [found.names[i] for i in chosen]
    signed = "Correlation of each pair of columns; blue below 0, orange above, darkest at ±1."
    made = (
        ("Held-out patients, inferred", found.real, 1.0, signed),
        ("Synthetic rows", found.synthetic, 1.0, signed),
        ("Synthetic minus held-out", gap, 0.5, "Difference; blue below 0, orange above, darkest at ±0.5."),
    )
    drawn = []
    for title, matrix, darkest, desc in made:
        part = [[matrix[i][j] for j in chosen] for i in chosen]
        svg = heat_map(ids, names, part, title=f"{found.title}: {title}", difference=True, darkest=darkest, desc=desc)
        rows = tuple((name, *(number(v, 2) for v in row)) for name, row in zip(names, part))
        table = Listing(caption=f"{found.title}: {title}", head=("Column", *names), rows=rows, folded=True)
        drawn.append(Drawn(title=title, svg=Markup(svg), table=table, caption=desc))
    note = found.caption
    if len(chosen) < n:
        note = f"{note} Drawn: the {len(chosen)} of {n} columns with the greatest differences.".strip()
    return Group(layout="grid-map", pictures=tuple(drawn), note=note)


def _worst(found: DifferenceMap) -> Listing:
    exact = any(p.exact is not None for p in found.worst)
    head = ("Column", "with", "Held-out (95 % interval)", "Synthetic", "Difference (inferred)")
    rows = tuple(
        (
            p.first,
            p.second,
            interval(p.real),
            number(p.synthetic),
            _signed(p.difference),
            *([number(p.exact)] if exact else []),
        )
        for p in found.worst
    )
    return Listing(
        caption=f"{found.title}: the pairs that differ most",
        head=(*head, "Held-out, exact (simulation only)") if exact else head,
        rows=rows,
        folded=len(found.worst) > ROWS_SHOWN,
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def ranked_shares(shares: Sequence[Shares]) -> list[Shares]:
    """The farthest from held-out patients, beyond what a fresh sample would be, first; the unknown last."""

    def above(s: Shares) -> float:
        return float("-inf") if s.distance.value is None else s.distance.value - (s.distance.reference or 0.0)

    return sorted(shares, key=lambda s: -above(s))


def _shares(ids: Identifiers, shares: Sequence[Shares]) -> tuple[Group, Listing | None]:
    ranked = ranked_shares(shares)
    chosen = list(shares) if len(shares) <= SHARES_DRAWN else ranked[:SHARES_DRAWN]
    drawn = tuple(
        Drawn(
            title=s.name,
            svg=Markup(shares_picture(ids, s)),
            table=_cells(s),
            caption=" · ".join([*([s.unit] if s.unit else []), f"distance {interval(s.distance)}"]),
        )
        for s in chosen
    )
    legend = [("bar", KEYS[SYNTHETIC]), ("shade", "held-out patients and what the noise leaves (95 %)")]
    legend += [(EXACT, KEYS[EXACT])] if any(s.exact for s in chosen) else []
    note, table = "", None
    if len(chosen) < len(shares):
        note = f"The {len(chosen)} of {len(shares)} columns that are farthest from held-out patients."
    if len(shares) > 1:
        table = Listing(
            caption=f"All {len(shares)} columns, farthest from held-out patients first",
            head=("Column", "Distance (95 % interval)", "Fresh real sample", "Remark"),
            rows=tuple((s.name, interval(s.distance), reference(s.distance), s.distance.reason) for s in ranked),
            folded=True,
        )
    return Group(layout="grid-small", pictures=drawn, note=note, legend=tuple(legend)), table


def _cells(s: Shares) -> Listing:
    exact = len(s.exact) == len(s.labels)
    rows = tuple(
        (label, percent(a), percent(b), f"{percent(low)} to {percent(high)}", *([percent(s.exact[i])] if exact else []))
        for i, (label, a, b, low, high) in enumerate(zip(s.labels, s.synthetic, s.real, s.low, s.high))
    )
    head = ("Cell", "Synthetic", "Held-out", "Band", *(("Exact",) if exact else ()))
    return Listing(caption=f"Shares of {s.name}", head=head, rows=rows, folded=True)

"""The site's page: one HTML file that opens offline, without a script or a request. Computes nothing.

Names of columns are written by people and escaped by Jinja; the pictures escape their own text. Look, colours and print
are those of the run's report (common/evaluation/report.css).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from cohortium.client.diagnostics.facts import Diagnosis, Histogram, Item, Section
from cohortium.client.diagnostics.intervals import wilson
from cohortium.common.evaluation import pictures
from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.report import amount, templates

Picture = tuple[str, Markup]


def page(found: Diagnosis) -> str:
    """The page as HTML text; the same diagnosis gives the same bytes."""
    environment = templates()
    environment.filters |= {"amount": amount, "shown": shown, "beside": beside, "number": number}
    environment.filters |= {"attacks": attacks_of, "others": others_of}
    css = resources.files("cohortium.common.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    ids = pictures.Identifiers()
    drawn = {section.key: _drawn(ids, section) for section in found.sections}
    return environment.from_string(template).render(found=found, css=Markup(css), drawn=drawn)


def number(value: float | None, unit: str = "share") -> str:
    """Counts as they are, all else to three digits after the point; a true minus."""
    if value is None:
        return "–"
    whole = unit in ("rows", "values", "columns") and float(value).is_integer()
    return (f"{value:.0f}" if whole or abs(value) >= 1000 else f"{value:.3f}").replace("-", "−")


def shown(figure: Figure) -> str:
    """Value and interval as text."""
    if figure.value is None:
        return "cannot be assessed"
    text = number(figure.value, figure.unit)
    if figure.low is None or figure.high is None:
        return text
    return f"{text} ({number(figure.low, figure.unit)} to {number(figure.high, figure.unit)})"


def beside(figure: Figure) -> str:
    """The reference and what it is."""
    if figure.reference is None:
        return "–"
    return f"{number(figure.reference, figure.unit)}: {figure.reference_text}"


def _drawn(ids: pictures.Identifiers, section: Section) -> list[Picture]:
    if section.key in ("attacks", "anonymity"):
        return _of_attacks(ids, section)
    made = [(h.title, Markup(histogram(ids, h))) for h in section.histograms]
    if section.key == "similarity":
        chosen = _named(section.items, ("patients_nearer", "rows_nearer"))
        return made + _dots(ids, chosen, "Nearer to training than to held-out patients?", line=0.5)
    if section.key == "membership":
        return _dots(ids, _named(section.items, ("membership_auc",)), "Membership attack", line=0.5)
    return _dots(ids, _named(section.items, None), "Area under the ROC curve", line=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One attack: its four figures side by side."""

    label: str
    residual: Item
    train: Item
    control: Item
    blind: Item


def attacks_of(section: Section) -> list[Row]:
    """The attacks among a section's figures, which belong together by their keys."""
    by_key = {item.key: item for item in section.items}
    names = [key.removesuffix("_residual") for key in by_key if key.endswith("_residual")]
    return [
        Row(
            label=by_key[f"{name}_residual"].label.rpartition(":")[0],
            residual=by_key[f"{name}_residual"],
            train=by_key[f"{name}_train"],
            control=by_key[f"{name}_control"],
            blind=by_key[f"{name}_blind"],
        )
        for name in names
    ]


def others_of(section: Section) -> list[Item]:
    """The figures that belong to no attack."""
    taken = {i.key for row in attacks_of(section) for i in (row.residual, row.train, row.control, row.blind)}
    return [item for item in section.items if item.key not in taken]


def _of_attacks(ids: pictures.Identifiers, section: Section) -> list[Picture]:
    """Success on training patients with the control as its mark; residual risks around 0."""
    rates, gains = [], []
    for row in attacks_of(section):
        train, control = row.train.figure, row.control.figure
        if train.value is not None:
            both = Figure(value=train.value, low=train.low, high=train.high, reference=control.value)
            rates.append(NamedFigure(label=row.label, figure=both))
        if row.residual.figure.value is not None:
            gains.append(NamedFigure(label=row.label, figure=row.residual.figure))
    return [
        *_dots(ids, rates, "Success on training patients (mark: held-out patients)", line=None, whole=True),
        *_dots(ids, gains, "Residual risk (0: no gain from training)", line=0.0),
    ]


def _named(items: Iterable[Item], keys: tuple[str, ...] | None) -> list[NamedFigure]:
    return [
        NamedFigure(label=i.label, figure=i.figure)
        for i in items
        if (keys is None or i.key in keys) and i.figure.value is not None
    ]


def _dots(
    ids: pictures.Identifiers, rows: list[NamedFigure], title: str, *, line: float | None, whole: bool = False
) -> list[Picture]:
    if not rows:
        return []
    ends = [v for r in rows for v in (r.figure.value, r.figure.low, r.figure.high) if v is not None]
    ends += [] if line is None else [line]
    low = 0.0 if whole else max(-1.0, math.floor(min(ends) * 10) / 10)
    high = 1.0 if whole else min(1.0, math.ceil(max(ends) * 10) / 10)
    high = max(high, low + 0.1)
    return [(title, Markup(pictures.dot_plot(ids, rows, title=title, low=low, high=high, line=line)))]


def histogram(ids: pictures.Identifiers, found: Histogram) -> str:
    """Bars of training patients against the held-out patients' line, with the band that sampling alone gives it."""
    top, bottom, left, right = 8.0, 150.0, 34.0, 352.0
    n = len(found.train)
    bands = [wilson(round(share * found.control_patients), found.control_patients) for share in found.control]
    most = max([*found.train, *(high for _, high in bands), 1e-9])
    step, scale = (right - left) / n, (bottom - top) / (most * 1.04)
    body = [f'<path class="grid" d="M{left:g} {bottom:g}H{right:g}"/>']
    for part in (0.5, 1.0):
        y = bottom - part * most * scale
        body.append(
            f'<path class="grid" d="M{left:g} {y:.1f}H{right:g}"/><text class="small" x="{left - 4:g}" y="{y + 3:.1f}" '
            f'text-anchor="end">{100 * part * most:.1f}%</text>'
        )
    for i, share in enumerate(found.train):
        x, height = left + i * step, share * scale
        body.append(
            f'<rect class="syn" x="{x + step * 0.12:.2f}" y="{bottom - height:.2f}" width="{step * 0.76:.2f}" '
            f'height="{height:.2f}"/>'
        )
        if found.control:
            low, high = (bottom - end * scale for end in bands[i])
            body.append(
                f'<rect class="band" x="{x:.2f}" y="{high:.2f}" width="{step:.2f}" '
                f'height="{max(low - high, 0.6):.2f}"/><path class="real" d="M{x:.2f} '
                f'{bottom - found.control[i] * scale:.2f}h{step:.2f}"/>'
            )
    for x, anchor, value in ((left, "start", found.edges[0]), (right, "end", found.edges[-1])):
        body.append(f'<text x="{x:g}" y="{bottom + 15:g}" text-anchor="{anchor}">{value:.3f}</text>')
    body.append(
        f'<text x="{(left + right) / 2:g}" y="{bottom + 15:g}" text-anchor="middle">'
        f"{pictures.escape(found.axis)}</text>"
    )
    control = f"{found.control_patients} held-out patients" if found.control else "no held-out patients"
    desc = f"Shares of {found.train_patients} training patients and {control} in {n} bins; a table below has them."
    return pictures.frame(ids, bottom + 24, found.title, desc, body)

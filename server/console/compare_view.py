"""Two to four results side by side: the same figures with their intervals, and what the studies did differently.

Two runs are called different in a figure only where their intervals do not overlap. That is a cautious rule: intervals
may overlap although there is a difference, and of many figures one may part by chance.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.findings import Finding
from cohortium.common.evaluation.pictures import Identifiers, cut, escape, frame, short
from cohortium.common.evaluation.pictures_axes import Scale, scale_over
from cohortium.common.evaluation.report_text import interval, number
from cohortium.common.schema import Schema
from cohortium.server.console.result_file import Whole

LEAST, MOST = 2, 4
PICTURES = 12
LETTERS = "ABCD"
TEXT_SHOWN = 200
LEFT, RIGHT, TOP, ROW = 14.0, 346.0, 4.0, 38.0
SHAPES: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f"M{short(x - 4.5)} {y:g}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    lambda x, y: f"M{short(x - 4)} {y - 4:g}h8v8h-8z",
    lambda x, y: f"M{short(x)} {y - 5.5:g}l5.5 9.5h-11z",
    lambda x, y: f"M{short(x)} {y - 6:g}l6 6l-6 6l-6 -6z",
)
SHAPE_NAMES = ("disc", "square", "triangle", "diamond")
"""One for each run, beside its letter and its colour: nobody has to tell colours apart."""
CAVEATS = (
    "“Differs” stands only where the 95 % intervals of two runs do not overlap. Where they overlap, nothing is shown: "
    "neither that the runs differ nor that they are alike.",
    "Many figures are compared at once, so one of them may part by chance. Runs over the same hospitals were scored on "
    "patients of the same hospitals: their intervals are not independent.",
    "A reference says what real rows of that size would score. It depends on the run: compare each value with its own.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One figure over all runs; None where a run has no such figure. differs: pairs (higher, lower) of run indices."""

    key: str
    label: str
    unit: str
    direction: str
    figures: tuple[Figure | None, ...]
    differs: tuple[tuple[int, int], ...]

    @property
    def known(self) -> bool:
        return any(f is not None and f.value is not None for f in self.figures)

    @property
    def words(self) -> str:
        """Which runs differ, in words; what cannot be told is told."""
        if self.differs:
            return "; ".join(self._pair(high, low) for high, low in self.differs)
        whole = sum(f is not None and f.low is not None for f in self.figures)
        if whole < LEAST:
            return "cannot be told: fewer than two intervals"
        return "no difference shown: intervals overlap"

    def _pair(self, high: int, low: int) -> str:
        better = {"higher": f", {LETTERS[high]} better", "lower": f", {LETTERS[low]} better"}.get(self.direction, "")
        return f"differs: {LETTERS[high]} above {LETTERS[low]}{better}"

    def to_json(self, runs: Sequence[str]) -> dict[str, Any]:
        names = ("value", "low", "high", "reference", "reason")
        told = [None if f is None else {name: getattr(f, name) for name in names} for f in self.figures]
        return {
            "key": self.key,
            "label": self.label,
            "unit": self.unit,
            "better": self.direction,
            "runs": dict(zip(runs, told)),
            "differs": [{"higher": runs[high], "lower": runs[low]} for high, low in self.differs],
            "words": self.words,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A line of the studies that is not the same in all; texts in the order of the runs."""

    name: str
    values: tuple[str, ...]


def chosen(runs: Sequence[str]) -> tuple[str, ...]:
    """The runs to compare, each once; UsageError COMPARE-NUMBER."""
    found = tuple(dict.fromkeys(run for run in runs if run))
    if not LEAST <= len(found) <= MOST:
        raise UsageError(
            "COMPARE-NUMBER",
            f"{LEAST} to {MOST} runs are compared, not {len(found)}",
            hint="tick them in the gallery: /results",
        )
    return found


def compare(wholes: Sequence[Whole]) -> list[Compared]:
    """Every main figure that any of the runs has, in the first run's order."""
    by_key: dict[str, list[Finding | None]] = {}
    for at, whole in enumerate(wholes):
        for found in whole.named:
            by_key.setdefault(found.key, [None] * len(wholes))[at] = found
    return [_compared(key, row) for key, row in by_key.items()]


def differ(first: Figure | None, second: Figure | None) -> int:
    """1: the first lies wholly above the second; −1: below; 0: they overlap, touch, or an interval is missing."""
    if first is None or second is None:
        return 0
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return 0
    return 1 if first.low > second.high else -1 if second.low > first.high else 0


def _compared(key: str, row: Sequence[Finding | None]) -> Compared:
    one = next(found for found in row if found is not None)
    figures = tuple(None if found is None else found.named.figure for found in row)
    pairs = []
    for a, b in combinations(range(len(row)), 2):
        side = differ(figures[a], figures[b])
        if side:
            pairs.append((a, b) if side > 0 else (b, a))
    return Compared(
        key=key,
        label=one.named.label,
        unit=one.named.figure.unit,
        direction=one.named.figure.direction,
        figures=figures,
        differs=tuple(pairs),
    )


# ---- the studies --------------------------------------------------------------------------------------------


def settings(folders: Sequence[Path]) -> list[Setting]:
    """Every line of study.toml, and the dictionary's columns, in which the runs' studies are not all the same."""
    flat = [_flat(folder / "study.toml") for folder in folders]
    names = list(dict.fromkeys(name for one in flat for name in one))
    found = []
    for name in names:
        values = tuple(one.get(name, "–") for one in flat)
        if len(set(values)) > 1 and name != "study.dictionary":
            found.append(Setting(name=name, values=values))
    return found + _columns(folders)


def _flat(path: Path) -> dict[str, str]:
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {"study.toml": "cannot be read"}
    return dict(_leaves(value, ""))


def _leaves(value: Mapping[str, Any], before: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found += _leaves(inner, f"{before}{name}.")
        else:
            text = inner if isinstance(inner, str) else str(inner)
            found.append((before + name, text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + "…"))
    return found


def _columns(folders: Sequence[Path]) -> list[Setting]:
    """Columns that not all dictionaries have, and those that all have but describe differently."""
    columns = []
    for folder in folders:
        try:
            schema = Schema.load(folder / "dictionary.json")
            columns.append({column.name: column for column in schema.columns})
        except (OSError, ValueError, CohortiumError):
            return [Setting(name="dictionary", values=tuple("cannot be compared" for _ in folders))]
    names = list(dict.fromkeys(name for one in columns for name in one))
    missing = [name for name in names if any(name not in one for one in columns)]
    changed = [name for name in names if name not in missing and len({repr(one[name]) for one in columns}) > 1]
    found = [
        Setting(name=f"column {name}", values=tuple("yes" if name in c else "no" for c in columns)) for name in missing
    ]
    return found + [
        Setting(name=f"column {name}", values=tuple("described differently" for _ in columns)) for name in changed
    ]


# ---- the picture --------------------------------------------------------------------------------------------


def pictures(ids: Identifiers, compared: Sequence[Compared], runs: Sequence[str]) -> list[tuple[Compared, Markup]]:
    """A small picture of each figure that is known of a run, at most PICTURES; those that differ first."""
    known = sorted((c for c in compared if c.known), key=lambda c: not c.differs)
    return [(one, Markup(figure_picture(ids, one, runs))) for one in known[:PICTURES]]


def figure_picture(ids: Identifiers, one: Compared, runs: Sequence[str]) -> str:
    """One figure: for each run its value, interval and reference on a common axis, with its letter and shape."""
    scale = _scale(one.figures)
    bottom = TOP + ROW * len(runs)
    body = []
    for at, text in scale.ticks():
        x = short(scale.at(at))
        body.append(
            f'<path class="grid" d="M{x} {TOP:g}V{bottom:g}"/>'
            f'<text class="small" x="{x}" y="{bottom + 14:g}" text-anchor="middle">{text}</text>'
        )
    for at, (run, figure) in enumerate(zip(runs, one.figures)):
        body.append(_row(at, run, figure, scale))
    said = "; ".join(f"{LETTERS[i]}, {run}: {_told(f)}" for i, (run, f) in enumerate(zip(runs, one.figures)))
    desc = f"Axis from {number(scale.low)} to {number(scale.high)}. {said}. {one.words}."
    return frame(ids, bottom + 20, f"{one.label}, by run", desc, body)


def _row(at: int, run: str, figure: Figure | None, scale: Scale) -> str:
    top = TOP + ROW * at
    y = top + 26
    words = (
        f'<text class="halo" x="{LEFT:g}" y="{top + 13:g}"><title>{escape(run)}</title>'
        f"{LETTERS[at]} · {cut(run, 22)}</text>"
        f'<text class="halo" x="{RIGHT:g}" y="{top + 13:g}" text-anchor="end">{escape(_told(figure))}</text>'
    )
    if figure is None or figure.value is None:
        return words
    marks = []
    if figure.reference is not None:
        marks.append(f'<path class="mark" d="M{short(scale.at(figure.reference))} {y - 7:g}v14"/>')
    if figure.low is not None and figure.high is not None:
        marks.append(f'<path class="curve" d="M{short(scale.at(figure.low))} {y:g}H{short(scale.at(figure.high))}"/>')
    marks.append(f'<path class="spot" d="{SHAPES[at](scale.at(figure.value), y)}"/>')
    return f'{words}<g class="hue-{at}">{"".join(marks)}</g>'


def sample(at: int) -> Markup:
    """A run's mark for the legend."""
    return Markup(
        '<svg viewBox="0 0 22 12" aria-hidden="true"><g class="hue-{}"><path class="curve" d="M0 6H22"/>'
        '<path class="spot" d="{}"/></g></svg>'
    ).format(at, Markup(SHAPES[at](11, 6)))


def _told(figure: Figure | None) -> str:
    return "not measured" if figure is None else interval(figure).replace(" (no interval)", "")


def _scale(figures: Sequence[Figure | None]) -> Scale:
    known = [f for f in figures if f is not None and f.value is not None]
    values = [v for f in known for v in (f.value, f.reference) if v is not None]
    ends = [(f.low, f.high) for f in known if f.low is not None and f.high is not None]
    return scale_over(values, ends, start=LEFT + 6, end=RIGHT - 6)

"""Curves, forests, axes and small multiples: what is drawn lies where the numbers say, and nothing escapes."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from reporting import HOSTILE, Reader, figure, roc, sections, shares, spoiled, survival

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.findings import CountRow, Curves, Effect, Finding, Forest, Line
from cohortium.common.evaluation.pictures import Identifiers
from cohortium.common.evaluation.pictures_axes import Scale, scale_over
from cohortium.common.evaluation.pictures_curves import LEFT, RIGHT, TOP, curves_picture, styled, thinned
from cohortium.common.evaluation.pictures_forest import findings_picture, forest_picture
from cohortium.common.evaluation.pictures_shares import shares_picture
from cohortium.common.evaluation.report_text import interval, lower, number


def frame(*lines: Line, **more: object) -> Curves:
    given = {"title": "t", "x_label": "x", "y_label": "y", "x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}
    return Curves(**(given | more), lines=lines)  # type: ignore[arg-type]


def places(text: str, name: str) -> list[list[tuple[float, float]]]:
    """The corners of every path of a class."""
    found = re.findall(rf'<path class="{name}[^"]*" d="([^"]*)"', text)
    return [[(float(a), float(b)) for a, b in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d)] for d in found]


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0.0, 1.0, False),
        (-3.2, 17.0, False),
        (0.4, 2.5, True),
        (1e-4, 1e5, True),
        (0.0, 1e-7, False),
        (99.0, 2e6, False),
    ],
)
def test_an_axis_is_linear_or_logarithmic_and_its_ticks_lie_on_it(low: float, high: float, log: bool) -> None:
    scale = Scale(low=low, high=high, start=10.0, end=110.0, log=log)
    assert scale.at(low) == pytest.approx(10.0) and scale.at(high) == pytest.approx(110.0)
    assert scale.at(low - 1e9) == pytest.approx(10.0) and scale.at(high + 1e9) == pytest.approx(110.0)
    middle = math.sqrt(low * high) if log else (low + high) / 2
    assert scale.at(middle) == pytest.approx(60.0)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 6
    assert len({text for _, text in ticks}) == len(ticks)
    for value, text in ticks:
        said = float(text.replace("−", "-").replace("\u202f", ""))
        assert low - 1e-9 <= value <= high * (1 + 1e-9)
        assert said == pytest.approx(value, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("low", "high", "log"), [(1.0, 1.0, False), (0.0, 1.0, True), (math.nan, 1.0, False)])
def test_an_impossible_axis_is_refused(low: float, high: float, log: bool) -> None:
    with pytest.raises(ValueError, match="axis"):
        Scale(low=low, high=high, start=0.0, end=1.0, log=log)


def test_one_huge_interval_does_not_dwarf_the_rest() -> None:
    scale = scale_over([1.0, 1.1, 1.3], [(0.9, 1.1), (1.0, 1.2), (-500.0, 900.0)], start=0, end=1)
    assert scale.high - scale.low < 3
    plain = scale_over([1.0, 1.1, 1.3], [(0.9, 1.1), (1.0, 1.2), (1.2, 1.4)], start=0, end=1)
    assert plain.low <= 0.9 and plain.high >= 1.4
    for values in ([], [0.0], [5.0], [1e-9], [-2.0, 7e8]):
        made = scale_over(values, start=0, end=1)
        assert made.low < made.high and all(made.low <= v <= made.high for v in values)


def test_a_straight_line_is_drawn_where_it_lies() -> None:
    text = curves_picture(Identifiers(), frame(Line(label="a", x=(0.0, 0.5, 1.0), y=(0.0, 0.5, 1.0))))
    drawn = places(text, "curve")[0]
    bottom = max(y for _, y in drawn)
    assert drawn == [(LEFT, bottom), ((LEFT + RIGHT) / 2, (TOP + bottom) / 2), (RIGHT, TOP)]


def test_steps_hold_until_the_next_point_and_unknown_points_part_the_line() -> None:
    text = curves_picture(Identifiers(), frame(Line(label="a", x=(0.0, 0.5, 1.0), y=(1.0, 0.5, 0.5), step=True)))
    drawn = places(text, "curve")[0]
    assert len(drawn) == 5 and drawn[1][1] == drawn[0][1] and drawn[1][0] == drawn[2][0]
    gap = curves_picture(
        Identifiers(), frame(Line(label="a", x=(0.0, 0.3, 0.6, 0.9, 1.0), y=(0.1, 0.2, None, 0.4, 0.5)))
    )
    assert [len(p) for p in places(gap, "curve")] == [2, 2]
    none = curves_picture(Identifiers(), frame(Line(label="a", x=(0.0, 1.0), y=(None, None))))
    assert places(none, "curve") == [] and "cannot be assessed" in none


def test_a_band_runs_from_high_to_low() -> None:
    line = Line(label="a", x=(0.0, 1.0), y=(0.5, 0.5), low=(0.4, 0.4), high=(0.6, 0.6))
    band = places(curves_picture(Identifiers(), frame(line)), "area")[0]
    assert len(band) == 4 and band[0][1] == band[1][1] < band[2][1] == band[3][1]


def test_real_and_synthetic_can_be_told_apart_without_colour() -> None:
    one = styled([roc("a", "real", 0.4), roc("b", "synthetic", 0.4), roc("c", "reference", 1.0)])
    assert [(s.hue, s.dash) for s in one] == [("hue-ink", ""), ("hue-0", "dash"), ("hue-soft", "dots")]
    arms = styled([survival(str(i), s, 0.01) for s in ("real", "synthetic") for i in range(2)])
    assert [(s.hue, s.dash) for s in arms] == [("hue-0", ""), ("hue-1", ""), ("hue-0", "dash"), ("hue-1", "dash")]
    assert len(styled([roc(str(i), "real", 0.4) for i in range(9)])) == 4


def test_numbers_at_risk_stand_below_their_places_and_never_overlap() -> None:
    at = (0.0, 0.02, 0.04, 0.5, 0.52, 1.0)
    counts = (CountRow(label="all", values=(12345.0, 12000.0, 11000.0, None, 900.0, -3.0)),)
    drawn = frame(Line(label="a", x=(0.0, 1.0), y=(1.0, 0.5)), count_title="At risk", count_places=at, counts=counts)
    text = curves_picture(Identifiers(), drawn)
    below = text[text.index("At risk") :]
    found = [(float(x), t) for x, t in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]*)', below)]
    assert [t for _, t in found] == ["12\u202f345", "–", "0"]
    assert all(b[0] - a[0] > 6 * 6.3 for a, b in pairwise(found))


def test_of_many_points_some_are_drawn_and_the_ends_are_among_them() -> None:
    long = Line(label="a", x=tuple(i / 9999 for i in range(10000)), y=tuple(i / 9999 for i in range(10000)))
    kept = thinned(long, 60)
    assert len(kept) == 60 and kept[0] == 0 and kept[-1] == 9999
    assert len(curves_picture(Identifiers(), frame(long))) < 20_000


def test_a_forest_s_dot_whisker_line_and_exact_mark_lie_on_one_axis() -> None:
    row = Effect(label="age", figure=Figure(value=2.0, low=1.0, high=4.0), beside=figure(2.0, 0.1), exact=2.0)
    text = forest_picture(Identifiers(), Forest(title="f", unit="odds ratio", rows=(row,), line=1.0))
    dot = float(re.findall(r'class="dot" cx="([\d.]+)"', text)[0])
    whisker = re.findall(r'class="whisker" d="M([\d.]+) [\d.]+H([\d.]+)"', text)[0]
    line = float(re.findall(r'class="limit" d="M([\d.]+)', text)[0])
    cross = float(re.findall(r'class="exact" d="M([\d.]+)', text)[0])
    assert line == pytest.approx(float(whisker[0])) and cross + 4.5 == pytest.approx(dot, abs=0.02)
    assert dot == pytest.approx((float(whisker[0]) + float(whisker[1])) / 2, abs=0.02)  # a ratio's axis is logarithmic
    assert "2.000 (1.000 to 4.000)" in text


def test_parts_of_a_forest_share_their_axis() -> None:
    rows = tuple(Effect(label=str(i), figure=Figure(value=float(i * i))) for i in range(20))
    forest = Forest(title="f", unit="difference", rows=rows, line=0.0)
    parts = [forest_picture(Identifiers(), forest, first=a, last=a + 10) for a in (0, 10)]
    axes = [re.findall(r'text-anchor="middle">([^<]*)<', p) for p in parts]
    assert axes[0] == axes[1] and all(p.count('class="dot"') == 10 for p in parts)


def test_an_interval_beyond_the_axis_ends_in_an_arrow() -> None:
    rows = [Effect(label=str(i), figure=figure(1.0 + i / 10, 0.1)) for i in range(5)]
    rows.append(Effect(label="wide", figure=Figure(value=1.2, low=-900.0, high=900.0)))
    text = forest_picture(Identifiers(), Forest(title="f", unit="x", rows=tuple(rows)))
    assert len(re.findall(r'd="M[\d.]+ [\d.]+H[\d.]+M[^"]*M[^"]*"', text)) == 1


def test_unknown_figures_keep_their_row() -> None:
    rows = [Finding(key=str(i), named=NamedFigure(label=f"f{i}", figure=figure(v))) for i, v in enumerate((0.2, None))]
    text = findings_picture(Identifiers(), rows, title="t")
    assert "cannot be assessed" in text and text.count('class="dot"') == 1 and "f1" in text


def test_a_small_multiple_draws_a_noised_share_below_zero_at_zero() -> None:
    made = shares("age", 1)
    text = shares_picture(Identifiers(), made)
    assert text.count('class="syn"') == text.count('class="band"') == text.count('class="exact"') == 8
    heights = [float(h) for h in re.findall(r'class="(?:syn|band)"[^>]* height="(-?[\d.]+)"', text)]
    assert min(heights) >= 0
    below = spoiled(made, "x")
    minus = type(made)(
        **{f: getattr(below, f) for f in made.__dataclass_fields__} | {"real": (-0.5,) * 8, "low": (-0.6,) * 8}
    )
    places_ = [float(y) for y in re.findall(r'class="real" d="M[\d.]+ ([\d.]+)h', shares_picture(Identifiers(), minus))]
    assert places_ == [108.0] * 8


def test_hostile_text_stays_text_in_every_picture() -> None:
    ids = Identifiers()
    for section in (spoiled(s, HOSTILE) for s in sections()):
        made = [curves_picture(ids, c) for c in section.curves] + [forest_picture(ids, f) for f in section.forests]
        made += [shares_picture(ids, s) for s in section.shares]
        made += [findings_picture(ids, section.findings, title=section.title)] if section.findings else []
        for text in made:
            read = Reader(text)
            assert not read.open and "\u202e" not in text and "\x00" not in text
            assert {t for t, _ in read.tags} <= {"svg", "title", "desc", "text", "path", "rect", "circle"}
            assert "nan" not in text.replace("\u202e", "").lower()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"),
        (-0.5, "−0.500"),
        (12.345, "12.3"),
        (1234567.0, "1\u202f234\u202f567"),
        (0.00021, "0.0002"),
        (0.0, "0.000"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_the_ends_of_an_interval_have_the_value_s_digits() -> None:
    assert interval(Figure(value=0.004, low=2e-7, high=0.027)) == "0.004 (0.000 to 0.027)"
    assert interval(Figure(value=0.0003, low=0.0001, high=0.0012)) == "0.0003 (0.0001 to 0.0012)"
    assert lower(1.23456) == "1.234" and lower(0.0) == "0"

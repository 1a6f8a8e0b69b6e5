"""The report of a whole evaluation: order, honesty about what is exact, proven, audited or unknown, hostile input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from reporting import HOSTILE, NAMES, SWAMPED, Reader, facts, figure, findings, sections, spoiled

from cohortium.common.evaluation.base import BudgetFacts, Figure, NamedFigure, ReportFacts
from cohortium.common.evaluation.findings import Finding, Findings, Section
from cohortium.common.evaluation.report import page, render
from cohortium.common.evaluation.report_gaps import gaps
from cohortium.common.evaluation.report_sections import TITLES

PATHS = (
    {"path": "gradients", "epsilon_lower": 1.23456, "epsilon_charged": 4.4, "canaries": 1000},
    {"path": "moments", "epsilon_lower": 0.6, "epsilon_charged": 2.0001, "canaries": 1000},
)
AUDIT = {"epsilon_lower": 1.23456, "method": "one-run audit, 1,000 canaries, 95 % confidence", "paths": PATHS}


@pytest.fixture(scope="module")
def whole() -> str:
    return page(facts(), None, findings(), AUDIT)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(Reader(re.sub(r"<style>.*?</style>", "", text, flags=re.S)).text))


def unknown(found: Findings) -> Findings:
    """The same evaluation with noise that swamps everything."""
    dead = Figure.unknown(SWAMPED)
    return replace(
        found,
        verdicts=tuple(replace(v, word="cannot be assessed", sentence=SWAMPED, figure=dead) for v in found.verdicts),
        sections=tuple(
            replace(
                s,
                findings=tuple(replace(f, named=replace(f.named, figure=dead), exact=None) for f in s.findings),
                curves=(),
                maps=(),
                forests=tuple(
                    replace(f, rows=tuple(replace(r, figure=dead, beside=None, exact=None) for r in f.rows))
                    for f in s.forests
                ),
                shares=tuple(replace(x, distance=dead) for x in s.shares),
            )
            for s in found.sections
        ),
    )


def test_sections_stand_in_the_report_s_order_and_unheard_ones_at_the_end(whole: str) -> None:
    read = Reader(whole)
    heads = [a["id"] for t, a in read.tags if t == "h2"]
    assert heads == ["verdict", "source", "budget", *TITLES, "other-1", "limits", "provenance"]
    assert "A section of tomorrow" in whole
    shuffled = page(facts(), None, findings(tuple(reversed(sections()))), AUDIT)
    assert [a["id"] for t, a in Reader(shuffled).tags if t == "h2"] == heads


def test_the_page_asks_the_network_for_nothing_and_is_the_same_each_time(whole: str) -> None:
    for tag, attributes in Reader(whole).tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "img", "base")
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "srcset"
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert (value or "").startswith(("data:", "#"))
    assert "default-src 'none'" in whole
    assert not re.search(r"https?://|url\(|@import", whole.replace("http://www.w3.org/2000/svg", ""))
    assert whole == page(facts(), None, findings(), AUDIT)


def test_the_exact_figure_stands_beside_figure_interval_and_reference(whole: str) -> None:
    read = plain(whole)
    assert "0.782 (0.761 to 0.803)" in read and "0.792 (0.777 to 0.803)" in read and "0.789" in read
    assert "Exact (simulation only)" in read and "exact, simulation only" in read
    assert whole.count('class="exact"') > 30
    real = findings(
        tuple(
            replace(
                s,
                findings=tuple(replace(f, exact=None) for f in s.findings),
                forests=tuple(replace(f, rows=tuple(replace(r, exact=None) for r in f.rows)) for f in s.forests),
                shares=tuple(replace(x, exact=()) for x in s.shares),
            )
            for s in sections()
        )
    )
    field = page(facts(mode="deployment"), None, replace(real, exact_shown=False), AUDIT)
    assert "xact" not in plain(field) and 'class="exact"' not in field


def test_proven_and_audited_epsilon_stand_together(whole: str) -> None:
    read = plain(whole)
    assert "Proven: spent, add/remove one patient3" in read.replace(" 3", "3")
    assert "at least, in a rehearsal with a plan of its own" in read and "1.234" in read and "1.235" not in read
    assert "one-run audit, 1,000 canaries" in read
    assert "Do not release" not in read and "gradients4.41.234" in read.replace(" ", "") and "2.001" in read
    without = plain(page(facts(), None, findings()))
    assert "No audit of a rehearsal is recorded" in without


def test_an_attack_that_finds_more_than_its_own_plan_charged_is_shouted() -> None:
    wrong = {**AUDIT, "paths": ({**PATHS[0], "epsilon_lower": 4.5}, PATHS[1])}
    assert "Do not release" in plain(page(facts(), None, findings(), wrong))
    other = {**AUDIT, "epsilon_lower": 4.0, "paths": ({**PATHS[0], "epsilon_lower": 4.0},)}
    assert "Do not release" not in plain(page(facts(), None, findings(), other))  # the study's ε is another plan's


@pytest.mark.parametrize(
    "bad", [{}, {"epsilon_lower": "1"}, {"epsilon_lower": math.nan, "method": "x"}, {**AUDIT, "paths": [{}]}]
)
def test_an_audit_without_bound_or_method_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="epsilon_lower"):
        page(facts(), None, findings(), bad)


@pytest.mark.parametrize(
    "more",
    [
        {"statement": "NOT PRIVATE: a rehearsal."},
        {"budget": BudgetFacts(epsilon_total=3.0, epsilon_spent=math.inf, delta=1e-6)},
    ],
)
def test_nothing_is_promised_where_there_is_no_guarantee(more: dict[str, object]) -> None:
    read = plain(page(facts(**more), None, findings(), AUDIT))
    assert "there is no guarantee for this run" in read and "almost as likely" not in read and "Proven:" not in read


def test_what_could_not_be_assessed_is_said_once_with_its_reason() -> None:
    found = gaps(facts(), findings(), None)
    assert {g.where for g in found} == {
        "Verdict",
        "Fidelity: one column at a time",
        "Fairness between groups",
        "Balance and representativeness",
    }
    fairness = next(g for g in found if g.where.startswith("Fairness"))
    assert fairness.why == SWAMPED and "Greatest gap of sensitivity" in fairness.what and "age 80" in fairness.what
    read = plain(page(facts(), None, findings()))
    assert "The sites are not a sample of the country." in read
    few = findings(sections()[:2])
    left = [g.what for g in gaps(facts(), few, None) if g.where == "Whole sections"]
    assert left and "Survival" in left[0]


def test_reasons_that_differ_in_numbers_only_stand_together() -> None:
    rows = tuple(
        Finding(
            key=f"tvd.{i}",
            named=NamedFigure(label=f"c{i}", figure=Figure.unknown(f"anywhere between 0.0{i} and 1e-{i}")),
        )
        for i in range(1, 10)
    )
    found = findings((Section(key="x", title="X", intro="", findings=rows),))
    mine = [g for g in gaps(facts(), found, None) if g.where == "X"]
    assert len(mine) == 1 and mine[0].why == "anywhere between … and …" and mine[0].what.endswith("and 1 more")


def test_everything_unknown_makes_a_page_that_says_so() -> None:
    text = page(facts(), None, unknown(findings()))
    read = Reader(text)
    assert not read.open
    words = plain(text)
    assert "nan" not in words.lower().split()
    assert 'class="dot"' not in re.sub(r"<ul class=\"legend\">.*?</ul>", "", text, flags=re.S)
    for section in sections():
        for found in section.findings:
            assert found.named.label in words


def test_the_page_from_json_is_the_same() -> None:
    found = Findings.from_json(findings().to_json())
    stored = json.loads(json.dumps({"f": found.to_json(), "facts": facts().to_json()}, allow_nan=False))
    again = page(ReportFacts.from_json(stored["facts"]), None, Findings.from_json(stored["f"]), AUDIT)
    assert again == page(ReportFacts.from_json(facts().to_json()), None, found, AUDIT)


def test_hostile_text_stays_text_wherever_a_person_may_write(tmp_path: Path) -> None:
    evil = replace(spoiled(facts(), HOSTILE), mode="simulation")
    out = render(evil, None, tmp_path / "r.html", spoiled(findings(), HOSTILE), {**AUDIT, "method": HOSTILE})
    text = out.read_text(encoding="utf-8")
    read = Reader(text)
    assert not read.open
    assert not {t for t, _ in read.tags} & {"script", "img", "iframe"}
    assert not any(n.startswith("on") for _, a in read.tags for n in a)
    assert "\u202e" not in text and "\x00" not in text
    assert "{{ 7*7 }}" in "".join(read.text) and text.count("<script>") == 0
    ids = [a["id"] for _, a in read.tags if a.get("id")]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-z0-9-]+", str(i)) for i in ids)


def test_many_columns_draw_the_worst_and_list_all() -> None:
    names = tuple(f"{i} {NAMES[2]} with_underscores_and_no_place_to_break_{i}" for i in range(500))
    found = findings(sections(names))
    text = page(facts(), None, found)
    assert text.count("held-out patients and synthetic rows</title>") == 24
    assert "Table: All 500 columns" in text
    rows = re.findall(r'<th scope="row" class="name"><bdi>(\d+) systolic', text)
    assert {int(r) for r in rows} == set(range(500))
    assert "Drawn: the 40 of 500 columns" in text
    assert len(text) < 1_500_000


def test_figures_of_single_columns_stand_in_the_table_and_are_not_drawn() -> None:
    many = tuple(
        Finding(key=f"tvd.c{i}", named=NamedFigure(label=f"c{i}: distance", figure=figure(0.1))) for i in range(60)
    )
    main = Finding(key="tvd", named=NamedFigure(label="Mean distance", figure=figure(0.1)))
    both = page(facts(), None, findings((Section(key="fidelity", title="F", intro="", findings=(main, *many)),)))
    assert both.count('class="dot"') == 2 and "The table has 60 more figures." in both  # one in the legend
    alone = page(facts(), None, findings((Section(key="fidelity", title="F", intro="", findings=many),)))
    assert alone.count('class="dot"') == 13


def test_without_a_private_evaluation_free_sections_are_shown_and_nothing_is_judged() -> None:
    free = replace(findings(sections()[-3:]), verdicts=(), headline="", patients=None, epsilon=None)
    read = plain(page(facts(mode="deployment"), None, free))
    assert "Verdict" not in read and "Clinical rules" in read and "No comparison with real rows was made." in read

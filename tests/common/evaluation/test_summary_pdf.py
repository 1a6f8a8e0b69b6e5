"""The summary: two pages whatever comes, the right text on them, equal bytes for equal input."""

from __future__ import annotations

import re
import zlib
from base64 import a85decode
from dataclasses import replace
from pathlib import Path

import pytest
from reporting import HOSTILE, NAMES, SWAMPED, facts, findings, pdf_pages, sections, spoiled

from cohortium.common.evaluation.base import Figure, PlanRow, Verdict
from cohortium.common.evaluation.findings import Findings, Section
from cohortium.common.evaluation.summary_pdf import write_summary
from cohortium.common.evaluation.summary_sheet import PLAIN, cut, printable, wide, wrap

AUDIT = {"epsilon_lower": 1.23456, "method": "one-run audit, 1,000 canaries"}
LONG = tuple(f"{i} {NAMES[2]} with_underscores_and_no_place_to_break_{i}" for i in range(500))


def unknown() -> Findings:
    found = findings()
    dead = Figure.unknown(SWAMPED)
    return replace(
        found,
        verdicts=tuple(replace(v, word="cannot be assessed", sentence=SWAMPED, figure=dead) for v in found.verdicts),
        sections=tuple(
            replace(
                s,
                findings=tuple(replace(f, named=replace(f.named, figure=dead), exact=None) for f in s.findings),
                curves=(),
                shares=(),
                maps=(),
            )
            for s in found.sections
        ),
    )


def many_verdicts() -> tuple[Verdict, ...]:
    one = findings().verdicts[0]
    return tuple(replace(one, use=f"{one.use} {i} " * 9, sentence=one.sentence * 9) for i in range(20))


def many_figures() -> Findings:
    some = sections()[2].findings
    return findings(tuple(Section(key=f"k{i}", title=f"S{i}", intro="", findings=some) for i in range(60)))


def places(data: bytes) -> list[tuple[float, float]]:
    """Where every piece of text begins [points from the left and from below]."""
    out = []
    for stream in re.findall(rb"stream\n(.*?)endstream", data, re.S):
        content = zlib.decompress(a85decode(stream.strip().removesuffix(b"~>")))
        found = re.findall(rb"1 0 0 1 (-?[\d.]+) (-?[\d.]+) Tm", content)
        out += [(float(x), float(y)) for x, y in found]
    assert len(out) > 10
    return out


CASES = {
    "300 figures": (facts(), many_figures()),
    "all at once": (
        facts(statement="word " * 400, warnings=("w " * 300,) * 9, title="T" * 400),
        replace(many_figures(), verdicts=many_verdicts(), headline="h " * 900),
    ),
    "whole": (facts(), findings()),
    "facts alone": (facts(plan=(), rounds=(), provenance={}, not_protected=()), None),
    "500 columns": (facts(title="T" * 400), findings(sections(LONG))),
    "all unknown": (facts(), unknown()),
    "20 uses": (facts(warnings=("w " * 300,) * 9), replace(findings(), verdicts=many_verdicts(), headline="h " * 900)),
    "60 sites": (facts(provenance={f"Ledger head of {i}": "ab" * 300 for i in range(60)}), findings()),
    "long plan": (
        facts(plan=tuple(replace(facts().plan[0], id=str(i), epsilon_cumulated=i / 90) for i in range(250))),
        findings(),
    ),
    "no privacy": (facts(plan=tuple(replace(r, epsilon_cumulated=float("inf")) for r in facts().plan)), findings()),
    "hostile": (replace(spoiled(facts(), HOSTILE * 4), mode="simulation"), spoiled(findings(), HOSTILE * 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_two_a4_pages_whatever_comes(case: str, tmp_path: Path) -> None:
    given, found = CASES[case]
    data = write_summary(given, None, found, AUDIT, tmp_path / "s.pdf").read_bytes()
    assert data.startswith(b"%PDF-1.") and data.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Type /Page\b(?!s)", data)) == 2
    boxes = [[float(v) for v in b.split()] for b in re.findall(rb"/MediaBox \[([^\]]*)\]", data)]
    assert len(boxes) == 2
    for box in boxes:
        assert box == pytest.approx([0, 0, 595.28, 841.89], abs=0.01)
    for x, y in places(data):  # nothing outside the page or over its footer
        assert 0 < x < 595.28 and (y >= 36 or y == pytest.approx(24, abs=0.1)), (x, y)
    pages = pdf_pages(data)
    assert "Page 1 of 2" in pages[0] and "Page 2 of 2" in pages[1]
    assert not list(tmp_path.glob("*.part"))


def test_what_decides_stands_on_the_first_page(tmp_path: Path) -> None:
    pages = pdf_pages(write_summary(facts(), None, findings(), AUDIT, tmp_path / "s.pdf").read_bytes())
    first = pages[0]
    for word in ("Stroke trial in eight countries", "Describing one column at a time", "good", "usable with care"):
        assert word in first
    assert "not fit" in first and "cannot be assessed" in first
    assert "ε = 3 at δ = 1e-06 for one patient" in first
    assert "ε is at least 1.234 (one-run audit" in first
    assert "0.782 (0.761 to 0.803)" in first and "0.792 (0.777 to 0.803)" in first and "0.789" in first
    second = pages[1]
    assert "ROC" in second and "Survival by arm" in second and "Budget by purpose" in second
    assert "Not protected: What the records" in second and "ab" * 32 in second and "0f" * 32 in second


def test_the_statement_is_never_cut(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(150)]
    data = write_summary(facts(statement=" ".join(words)), None, findings(), None, tmp_path / "s.pdf").read_bytes()
    said = pdf_pages(data)[0]
    assert all(w in said for w in words)


def test_nothing_is_called_proven_where_there_is_no_guarantee(tmp_path: Path) -> None:
    given = facts(statement="NOT PRIVATE: a rehearsal.")
    first = pdf_pages(write_summary(given, None, findings(), None, tmp_path / "s.pdf").read_bytes())[0]
    assert "This run has no guarantee" in first.replace("\n", " ") and "Proven" not in first


def test_an_attack_beyond_the_proof_is_shouted(tmp_path: Path) -> None:
    found = {**AUDIT, "paths": ({"path": "moments", "epsilon_lower": 3.2, "epsilon_charged": 3.1},)}
    first = pdf_pages(write_summary(facts(), None, findings(), found, tmp_path / "s.pdf").read_bytes())[0]
    assert "Do not release" in first


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one = write_summary(facts(), None, findings(), AUDIT, tmp_path / "a.pdf").read_bytes()
    assert one == write_summary(facts(), None, findings(), AUDIT, tmp_path / "b.pdf").read_bytes()
    other = replace(findings(), headline="Another.")
    assert one != write_summary(facts(), None, other, AUDIT, tmp_path / "c.pdf").read_bytes()


def test_it_is_tagged_titled_and_asks_for_nothing(tmp_path: Path) -> None:
    data = write_summary(facts(), None, findings(), AUDIT, tmp_path / "s.pdf").read_bytes()
    for part in (b"/MarkInfo", b"/StructTreeRoot", b"/ParentTree", b"/StructParents 0", b"/StructParents 1", b"/Lang"):
        assert part in data, part
    assert b"/DisplayDocTitle true" in data
    assert re.search(rb"/Title \(Stroke trial in eight countries", data)
    assert data.count(b"/S /Figure") == 4 == data.count(b"/Alt ") and data.count(b"/S /H1") == 1
    assert not re.search(
        rb"/URI|/JavaScript|/JS\b|/Launch|/EmbeddedFile|https?://", data.replace(b"http://www.reportlab.com", b"")
    )
    used = set(re.findall(rb"/BaseFont /(\S+)", data))
    assert used <= {b"Helvetica", b"Helvetica-Bold", b"Courier", b"Symbol", b"ZapfDingbats"}


def test_every_character_has_a_glyph() -> None:
    assert printable("ε δ σ ≤ ≥ − – ∞ ±") == "ε δ σ ≤ ≥ − – ∞ ±"
    assert printable("Łódź Győr čeština") == "Lódz Gyor ceština"
    assert printable("中\u202e\x00🙂\ud800") == "■■■■■"
    assert printable("4\u202f303") == "4\u00a0303"


@pytest.mark.parametrize("text", ["", "a", "word " * 200, "x" * 5000, "a\u00a0b " * 99])
def test_wrapped_lines_fit(text: str) -> None:
    lines = wrap(text, 100.0, 8.0, PLAIN, lines=3)
    assert 1 <= len(lines) <= 3 and all(wide(line, 8.0) <= 100.0 for line in lines)
    assert len(text) < 20 or lines[-1].endswith("…")
    assert wide(cut(text, 40.0, 8.0), 8.0) <= 40.0


def test_a_short_text_is_not_changed_by_wrapping() -> None:
    assert wrap("one two three", 500.0, 8.0, lines=2) == ["one two three"]
    assert " ".join(wrap("one two three four five six", 40.0, 8.0, lines=9)) == "one two three four five six"


def test_a_plan_of_many_releases_draws_those_that_add_most(tmp_path: Path) -> None:
    def stage(name: str, epsilon: float) -> PlanRow:
        return replace(facts().plan[0], id=name, purpose=name, epsilon_cumulated=epsilon)

    plan = (*(stage(f"small{i}", 0.001 * i) for i in range(1, 30)), stage("great", 2.5))
    second = pdf_pages(write_summary(facts(plan=plan), None, findings(), None, tmp_path / "s.pdf").read_bytes())[1]
    assert "great" in second and "(9 of 30)" in second

"""Everybody can read the report: contrast, headings, pictures and tables with names, no overflow on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
from reporting import Reader, facts, findings, sections

from cohortium.common.evaluation import summary_sheet
from cohortium.common.evaluation.report import page

CSS = resources.files("cohortium.common.evaluation").joinpath("report.css").read_text(encoding="utf-8")
TEXT = ("ink", "soft", "blue", "green", "amber", "red")
MARKS = ("ink", "soft", "blue", "orange", "green", "purple", "red")
AUDIT = {"epsilon_lower": 1.2, "method": "canaries"}


@pytest.fixture(scope="module")
def read() -> Reader:
    return Reader(page(facts(), None, findings(), AUDIT))


def schemes() -> dict[str, dict[str, str]]:
    found = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6});", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.S)
    ]
    return dict(zip(("light", "dark", "print"), found, strict=True))


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.2, 1.4.3."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_formula() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21.0) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_has_4_5_and_marks_have_3_to_1(scheme: str) -> None:
    colours = schemes()["light"] | schemes()[scheme]
    for ground in ("paper", "ground"):
        for name in TEXT:
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in MARKS:
        assert contrast(colours[name], colours["paper"]) >= 3.0, name


def test_no_text_has_another_colour() -> None:
    used = set(re.findall(r"(?<![-\w])color: var\(--(\w+)\)", re.sub(r"svg \.hue-\d \{[^}]*\}", "", CSS)))
    used |= set(re.findall(r"svg text \{ fill: var\(--(\w+)\)|svg \.small \{[^}]*fill: var\(--(\w+)\)", CSS)[0])
    assert used - {""} <= set(TEXT)
    assert not re.search(r"(?<![-\w])color: (?!var|light)", CSS)


def test_the_summary_s_colours_have_contrast() -> None:
    for name in ("INK", "SOFT", "GREEN", "AMBER", "RED"):
        assert contrast(getattr(summary_sheet, name), summary_sheet.PAPER) >= 4.5, name


def test_every_picture_has_a_role_a_title_and_a_description(read: Reader) -> None:
    ids = {a["id"]: read.words.get(n, "") for n, (_, a) in enumerate(read.tags) if a.get("id")}
    seen = 0
    for n, (tag, attributes) in enumerate(read.tags):
        if tag != "svg":
            continue
        if attributes.get("aria-hidden") == "true":  # a sample in a legend, with its text beside it
            assert "ul" in read.inside[n]
            continue
        assert attributes["role"] == "img"
        title, desc = (attributes["aria-labelledby"] or "").split()
        assert ids[title].strip() and ids[desc].strip()
        seen += 1
    assert seen >= 25


def test_every_picture_of_the_findings_has_its_table_behind_it(read: Reader) -> None:
    figures = [n for n, (tag, _) in enumerate(read.tags) if tag == "figure"]
    for n, following in zip(figures, [*figures[1:], len(read.tags)]):
        inside = [read.tags[i][0] for i in range(n, following) if "figure" in read.inside[i]]
        words = read.words[n]
        if "Budget burn-down" in words or "Filled: answered" in words:
            continue  # their tables stand below them
        assert inside.count("svg") >= 1 and "details" in inside and "table" in inside, words[:60]


def test_tables_have_names_and_header_cells(read: Reader) -> None:
    for n, (tag, _) in enumerate(read.tags):
        if tag != "table":
            continue
        region = next(a for t, a in reversed(read.tags[:n]) if t == "div")
        assert region["role"] == "region" and region["aria-label"] and region["tabindex"] == "0"
        head = [a for t, a in read.tags[n : n + 12] if t == "th"]
        assert head and all(a.get("scope") in ("col", "row") for a in head)


def test_headings_go_down_one_level_at_a_time(read: Reader) -> None:
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for n, (tag, _) in enumerate(read.tags):
        if re.fullmatch(r"h[1-6]", tag):
            assert read.words.get(n, "").strip()


def test_links_lead_somewhere_and_the_page_says_its_language(read: Reader) -> None:
    ids = {a["id"] for _, a in read.tags if a.get("id")}
    links = [a["href"] or "" for t, a in read.tags if t == "a"]
    assert len(links) > 10 and all(link[1:] in ids for link in links)
    assert ("html", {"lang": "en"}) in read.tags
    for tag, attributes in read.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert all(i in ids for i in (attributes.get(name) or "").split()), tag


PROBE = """<script>onload = () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const wide = document.documentElement.clientWidth, out = [];
  if (document.documentElement.scrollWidth > wide) out.push("the page");
  document.querySelectorAll("body *").forEach(e => {
    if (e.parentElement.closest(".scroll") || (e.closest("svg") && e.tagName != "svg")) return;
    const r = e.getBoundingClientRect();
    if (r.right > wide + 1 || r.left < -1) out.push(e.tagName + "." + e.className);
  });
  document.querySelectorAll("svg[role=img]").forEach(s => {
    const f = s.getBoundingClientRect();
    s.querySelectorAll("text").forEach(t => {
      const r = t.getBoundingClientRect();
      if (r.right > f.right + 1 || r.left < f.left - 1 || r.bottom > f.bottom + 2) out.push("text " + t.textContent);
    });
  });
  parent.postMessage("width " + innerWidth + " outside [" + out.slice(0, 5).join(", ") + "]", "*");
}</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows_in_a_browser(width: int, tmp_path: Path) -> None:
    """The page as it is, with all tables open, but for a script of the test's own; in a frame of that width."""
    names = tuple(f"column number {i} with_underscores_and_no_place_to_break_at_all_{i}" for i in range(30))
    text = page(facts(title="T" * 120), None, findings(sections(names)), AUDIT)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    outer = f"<script>onmessage = e => document.title = e.data</script><iframe src=page.html width={width} height=900>"
    (tmp_path / "outer.html").write_text(f"<!doctype html><title>-</title>{outer}</iframe>", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1400,1000", "--virtual-time-budget=8000", "--dump-dom", f"file://{tmp_path}/outer.html"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search("<title>(.*?)</title>", ran.stdout)
    assert found is not None and found[1] == f"width {width} outside []"

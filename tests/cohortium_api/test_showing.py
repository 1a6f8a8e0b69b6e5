"""How the public types look: short lines, small tables and pictures; escaped, without scripts, for light and dark."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from small import make_quick, small_study, small_table

import cohortium
from cohortium import showing, watching

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e&"
VOID = {"br", "img", "input", "meta", "hr", "path", "rect", "circle"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        yield small_study(
            tmp_path_factory.mktemp("showing"),
            table=small_table(120),
            evaluation="[evaluation]\nepsilon = 1.0\nholdout = 0.2\n",
        )


@pytest.fixture(scope="module")
def study(place: tuple[Path, Path]) -> cohortium.Study:
    return cohortium.load_study(place[0])


@pytest.fixture(scope="module")
def run(study: cohortium.Study, place: tuple[Path, Path]) -> cohortium.Run:
    return cohortium.simulate(study, place[1], out=place[0].parent / "result", split="iid:3", seed=3)


@pytest.fixture(scope="module")
def everything(study: cohortium.Study, run: cohortium.Run) -> dict[str, Any]:
    return {
        "study": study,
        "plan": cohortium.plan(study, sites=3),
        "run": run,
        "scores": cohortium.evaluate(run.directory),
        "audit": cohortium.audit(run.directory),
        "analyses": cohortium.analyze(run.directory, mean=study.schema.modelled[0].name, replicates=5),
    }


class Balanced(HTMLParser):
    """Collects tags and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(page: str) -> Balanced:
    found = Balanced()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


NAMES = ("study", "plan", "run", "scores", "audit", "analyses")


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_short_and_a_page_is_plain_html(everything: dict[str, Any], name: str) -> None:
    value = everything[name]
    line, page = repr(value), value._repr_html_()
    assert "\n" not in line and line.startswith("<") and 20 < len(line) < 240
    found = read(page)
    assert found.tags <= {
        *("div", "style", "table", "caption", "thead", "tbody", "tr", "th", "td", "p", "span", "strong"),
        *("svg", "title", "desc", "text", "path", "rect", "circle", "g", "tspan"),
    }
    assert not {a for a in found.attributes if a.startswith("on") or a in ("style", "href", "src")}
    assert "<table" in page and "<caption>" in page and len(page) < 60_000
    fetched = re.findall(r"https?://[^\"' <]+", page)
    assert set(fetched) <= {"http://www.w3.org/2000/svg"}, "nothing is asked for from anywhere"
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img" and root.find("{http://www.w3.org/2000/svg}title") is not None


def test_the_pictures_are_where_they_say_something(everything: dict[str, Any]) -> None:
    count = {name: value._repr_html_().count("<svg") for name, value in everything.items()}
    assert count["plan"] == count["run"] == 1 and count["scores"] >= 3
    assert count["study"] == count["audit"] == count["analyses"] == 0


def test_ids_are_unique_over_the_outputs_of_a_notebook(everything: dict[str, Any]) -> None:
    pages = "".join(everything[name]._repr_html_() for name in ("plan", "run", "scores", "plan"))
    ids = read(pages).ids
    assert len(ids) == len(set(ids)) > 8


def test_text_has_the_pages_own_colour_and_no_ground_is_painted() -> None:
    """What makes it readable on a light and on a dark page alike."""
    assert "color: inherit" in showing.STYLE and "fill: currentColor" in showing.STYLE
    assert not re.search(r"background(-color)?:(?!\s*transparent)", showing.STYLE)
    greys = re.findall(r"(?<!-)\bcolor:\s*#", showing.STYLE)
    assert greys == []


def test_a_rehearsal_says_loudly_that_it_is_not_private(everything: dict[str, Any]) -> None:
    run, plan = everything["run"], everything["plan"]
    assert "NOT private" in repr(run) and 'class="warning"' in run._repr_html_()
    assert "must not be published" in read(run._repr_html_()).words
    assert "NOT private" in repr(everything["scores"]) and 'class="warning"' in everything["scores"]._repr_html_()
    quiet = replace(plan, stages=tuple(replace(stage, noise_multiplier=0.0) for stage in plan.stages))
    assert "not private" in repr(quiet) and "protects nobody" in quiet._repr_html_()
    assert 'class="warning"' not in plan._repr_html_()


def test_every_text_is_escaped(everything: dict[str, Any]) -> None:
    """Names of studies, columns and files are what somebody typed. Without `_escape` in one place this is red."""
    study, scores = everything["study"], everything["scores"]
    columns = tuple(replace(column, name=HOSTILE) for column in scores.columns)
    auc = tuple(replace(row, label=HOSTILE) for row in scores.auc)
    facts = {**everything["run"].result["facts"], "title": HOSTILE}
    result = {**everything["run"].result, "facts": facts, "verdicts": [{"use": HOSTILE, "word": HOSTILE}]}
    report = everything["audit"]
    hostile = [
        replace(study, title=HOSTILE, id=HOSTILE, sites=(HOSTILE,), target=HOSTILE),
        replace(scores, headline=HOSTILE, basis=HOSTILE, columns=columns, auc=auc),
        cohortium.Run(directory=Path(HOSTILE.replace("/", "|")), result={**result, "warnings": [HOSTILE]}),
        replace(report, directory=HOSTILE, checks=[replace(report.checks[0], name=HOSTILE, detail=HOSTILE)]),
    ]
    for value in hostile:
        page = value._repr_html_()
        found = read(page)
        assert not found.tags & {"script", "img"} and "<script" not in page and "\u202e" not in page
        assert "alert(1)" in found.words, "it is shown, as text"


def test_the_types_know_nothing_of_notebooks_until_the_api_hands_them_out() -> None:
    code = (
        "from cohortium.common.study import Study\nassert not hasattr(Study, '_repr_html_')\n"
        "import cohortium\nassert cohortium.Study is Study and hasattr(Study, '_repr_html_')\n"
        "assert not {'IPython', 'rich'} & set(__import__('sys').modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert showing.dress(int) is int and not hasattr(int, "_repr_html_")


# ---- how far a simulation is ----------------------------------------------------------------------------------


EVENTS = (
    {"event": "start"},
    {"event": "release", "index": 0, "purpose": "[bold]bins[/bold]", "dropped": ["<b>north</b>"]},
    {"event": "fit", "what": "mixture", "share": 0.5},
    {"event": "evaluate", "what": "columns"},
    {"event": "fitted"},
    {"event": "finish", "what": "writing"},
)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a notebook would show, each time it is drawn."""
    drawn: list[str] = []
    module = ModuleType("IPython.display")
    module.HTML = lambda text: text  # type: ignore[attr-defined]

    def display(text: str, *, display_id: bool) -> Any:
        assert display_id
        drawn.append(text)
        return SimpleNamespace(update=drawn.append)

    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(watching, "EVERY_S", 0.0)
    yield drawn


def test_a_notebook_has_one_line_that_is_drawn_over(shown: list[str]) -> None:
    with watching.bar(11, place="notebook") as tell:
        for event in EVENTS:
            tell(dict(event))
    assert len(shown) == len(EVENTS) + 2
    assert all(line.startswith("<progress ") and "<script" not in line for line in shown)
    assert 'max="11" value="1"' in shown[2] and "without &lt;b&gt;north" in shown[2]
    assert "mixture, 50 %" in shown[3] and "1 releases answered" in shown[-1]


def test_a_terminal_has_a_bar_and_a_file_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, wanted in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with watching.bar(2) as tell:
            for event in EVENTS:
                tell(dict(event))
        assert ("writing" in stream.getvalue()) is wanted
    plain = Terminal()
    monkeypatch.setattr(sys, "stderr", plain)
    with watching.bar(2) as tell:
        tell(dict(EVENTS[1]))
    assert "[bold]bins[/bold]" in plain.getvalue(), "a purpose is text, not markup"
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    with watching.bar(2, shown=False) as tell:
        tell(dict(EVENTS[1]))
    assert quiet.getvalue() == ""


def test_simulate_tells_both_the_bar_and_the_caller(
    study: cohortium.Study, place: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[dict[str, Any]] = []
    plain = replace(study, evaluation=None)
    made = cohortium.simulate(plain, place[1], out=tmp_path / "r", split="iid:3", seed=4, on_event=heard.append)
    assert {"start", "release", "fitted"} <= {event["event"] for event in heard}
    assert not [event for event in heard if event["event"] == "finish"]
    assert capsys.readouterr().err == "", "a test's stderr is no terminal"
    assert cohortium.load_study(made.directory / "study.toml").evaluation is None


# ---- the verbs that came with it ------------------------------------------------------------------------------


def test_analyze_takes_one_text_or_several_and_refuses_what_it_does_not_know(everything: dict[str, Any]) -> None:
    found = everything["analyses"]
    assert len(found.found) == 1 and found.replicates == 5 and "found" in dir(found)
    with pytest.raises(cohortium.CohortiumError, match="ANALYZE-NOTHING"):
        cohortium.analyze(everything["run"].directory)
    with pytest.raises(cohortium.CohortiumError):
        cohortium.analyze(everything["run"].directory, mean="nose")


@pytest.mark.parametrize("said", [False, None, 1, "yes"])
def test_tune_wants_the_word_that_the_table_is_not_private(place: tuple[Path, Path], tmp_path: Path, said: Any) -> None:
    with pytest.raises(cohortium.CohortiumError, match="TUNE-DECLARE"):
        cohortium.tune(place[0], place[1], out=tmp_path / "tuned", not_private=said)
    assert not (tmp_path / "tuned").exists()


def test_tune_refuses_a_hospitals_table_whatever_is_said(run: cohortium.Run, place: tuple[Path, Path]) -> None:
    table = next((run.directory / "sites").iterdir()) / "data.parquet"
    with pytest.raises(cohortium.CohortiumError, match="TUNE-PRIVATE"):
        cohortium.tune(place[0], table, out=run.directory / "tuned", not_private=True)


@pytest.mark.slow
def test_tune_writes_a_study_that_loads(study: cohortium.Study, place: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    fits: list[int] = []
    result = cohortium.tune(
        replace(study, evaluation=None),
        place[1],
        out=tmp_path / "tuned",
        not_private=True,
        objectives="tvd1,cpu",
        trials=2,
        confirm=1,
        sites=3,
        on_fit=lambda what, done: fits.append(done),
    )
    assert result["trials"] and fits
    assert cohortium.load_study(tmp_path / "tuned" / "study.toml").privacy == study.privacy

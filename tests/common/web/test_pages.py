"""How pages say times, sizes and budgets, and that a template escapes whatever it is told."""

from __future__ import annotations

import math
import re

import jinja2
import pytest

from cohortium.common.web import pages
from cohortium.common.web.pages import Pages, ago, count, duration, eps, number, report_style, size, when

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (0.2, "1 s"), (59, "59 s"), (60, "1 min"), (5399, "90 min"), (5400, "2 h"), (200_000, "2 days")],
)
def test_a_duration_in_the_largest_unit_that_fits(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_what_is_not_known_is_a_dash_or_never() -> None:
    assert [duration(None), eps(None), size(None), number(None), count(None), str(when(None))] == ["–"] * 6
    assert ago(None, 10.0) == "never"


def test_long_ago_and_a_clock_that_runs_ahead() -> None:
    assert ago(100.0, 130.0) == "just now" and ago(0.0, 600.0) == "10 min ago" and ago(50.0, 10.0) == "just now"


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (12_000, "12 kB"), (5e12, "5000 GB")]
)
def test_sizes(value: float, told: str) -> None:
    assert size(value) == told


@pytest.mark.parametrize("value", [2.9999, 1.0000001, 0.12345])
def test_a_budget_is_never_rounded_down(value: float) -> None:
    assert float(eps(value)) >= value
    assert eps(math.inf) == eps("inf") == "∞"


def test_times_are_utc_and_readable_by_machines() -> None:
    assert str(when(0)) == '<time datetime="1970-01-01T00:00:00Z">1970-01-01 00:00 UTC</time>'


def shell(**facts: object) -> str:
    told = {"title": HOSTILE, "product": "P", "nav": [], "csrf": "", "account": None, "flash": None, "command": HOSTILE}
    return Pages("cohortium.server.console").text("shell.html.j2", **{**told, **facts})


def test_the_shell_escapes_what_it_is_told() -> None:
    page = shell(account={"to": "/account", "name": HOSTILE, "role": HOSTILE}, flash={"kind": "good", "text": HOSTILE})
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") == 5


def test_the_shell_has_nothing_inline_and_asks_nobody_else() -> None:
    """What the Content-Security-Policy would block: then the page would be broken, not unsafe."""
    page = shell()
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|javascript:", page)
    assert all(re.search(r'\bsrc="/static/', tag) for tag in re.findall(r"<script[^>]*>", page))
    assert "http" not in re.sub(r"http-equiv", "", page)


def test_every_template_of_ours_is_free_of_inline_style_and_script() -> None:
    import cohortium.client.page
    import cohortium.server.console

    found = [
        path
        for package in (cohortium.client.page, cohortium.server.console, pages)
        for path in pages.package_path(package.__name__.removesuffix(".pages")).rglob("*.j2")
    ]
    assert len(found) > 10
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]*src=)|\|\s*safe\b|javascript:", text), (
            path.name
        )


def test_a_name_that_nobody_gave_is_an_error_and_no_gap() -> None:
    with pytest.raises(jinja2.UndefinedError):
        Pages("cohortium.server.console").text("shell.html.j2", title="t")


def test_the_console_wears_the_reports_own_sheet() -> None:
    assert "--ink" in report_style() and "prefers-color-scheme: dark" in report_style()

"""Pages from templates: everything escaped, an undefined name is an error, times and figures said in one way.

A template extends `shell.html.j2`. Budgets are rounded up, never down; times are UTC and machine-readable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.responses import HTMLResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from cohortium.common.privacy.budget import rounded_up
from cohortium.common.text import clean

SHARED = "cohortium.common.web"
REPORT_STYLE = ("cohortium.common.evaluation", "report.css")
"""The console looks like the report because it uses the report's own sheet; app.css adds what only an app has."""


class Pages:
    """Renders templates of one application. facts: what every template of it gets."""

    def __init__(self, package: str, **facts: Any) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader(SHARED)]),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda v: clean(v, lines=True) if isinstance(v, str) and not isinstance(v, Markup) else v,
        )
        self._environment.filters.update(
            when=when, ago=ago, eps=eps, size=size, duration=duration, number=number, count=count, cap_used=cap_used
        )
        self._environment.globals.update(facts)

    def text(self, template: str, /, **facts: Any) -> str:
        return self._environment.get_template(template).render(**facts)

    def page(
        self, template: str, /, *, status: int = 200, headers: Mapping[str, str] | None = None, **facts: Any
    ) -> HTMLResponse:
        return HTMLResponse(self.text(template, **facts), status_code=status, headers=dict(headers or {}))


def static() -> Mount:
    """/static: the shared files and the report's sheet, all from the installed package."""
    return Mount("/static", StaticFiles(packages=[(SHARED, "static")], directory=None), name="static")


def report_style() -> str:
    package, name = REPORT_STYLE
    return (resources.files(package) / name).read_text(encoding="utf-8")


def when(seconds: float | None) -> Markup:
    """2026-11-22 14:05 UTC, as a <time>; an en dash where nothing is known."""
    if seconds is None:
        return Markup("–")
    at = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{}</time>').format(f"{at:%Y-%m-%dT%H:%M:%SZ}", f"{at:%Y-%m-%d %H:%M} UTC")


def ago(seconds: float | None, now: float) -> str:
    """How long ago, roughly: "just now", "4 min ago", "3 days ago"; "never" where nothing is known."""
    if seconds is None:
        return "never"
    passed = max(now - seconds, 0)
    return "just now" if passed < 60 else f"{duration(passed)} ago"


def duration(seconds: float | None) -> str:
    """ "40 s", "12 min", "3 h", "5 days": the largest unit that fits."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    for name, unit, until in (("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{round(seconds / unit)} {name}"
    return f"{round(seconds / 86400)} days"


def eps(value: float | str | None) -> str:
    """A privacy loss to three digits, rounded up; "∞" without privacy."""
    if value is None:
        return "–"
    plain = float(value)
    return "∞" if math.isinf(plain) else rounded_up(plain)


def cap_used(share: float | None) -> str:
    """How much of a lifetime cap is used up, rounded up."""
    if share is None:
        return "–"
    return (
        "no cap holds: something ran without noise"
        if math.isinf(share)
        else f"{math.ceil(1000 * share) / 10:.1f} % used"
    )


def size(value: float | None) -> str:
    """Bytes in the unit that suits: "640 B", "12 kB", "3.4 MB"."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError  # the last unit returns


def number(value: float | None) -> str:
    """A score to three decimals; an en dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def package_path(package: str, *parts: str) -> Path:
    return Path(str(resources.files(package).joinpath(*parts)))


def nav(entries: Sequence[tuple[str, str]], here: str) -> list[dict[str, Any]]:
    """(address, title) as the shell wants them; the one the page is in is marked."""
    return [{"to": to, "title": title, "here": to == here} for to, title in entries]

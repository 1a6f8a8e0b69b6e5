"""The page as a process, as a person starts it: link, browser, Ctrl-C, idle end; axe; the site's own report."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from consortium import Party
from hospital import table
from page_worlds import MARKER, act, enter, make
from starlette.testclient import TestClient

from cohortium.client.page import serving
from cohortium.client.page.room import Room
from cohortium.client.page.serving import serve
from cohortium.common.errors import UsageError
from cohortium.common.web.guarding import REPORT_POLICY

START = "import typer; from cohortium.client.page_cli import page; typer.run(page)"
CHROMIUM = "/usr/bin/chromium"
PATHS = ("/", "/left", "/asked", "/asked/run-x", "/ledger", "/check", "/report", "/policy", "/journal")


@pytest.fixture(scope="module")
def served(party: Party, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A hospital whose page no other test of this file has open."""
    made = make(tmp_path_factory.mktemp("served"), party)
    made.propose("run-x")
    return made


def test_it_says_the_link_and_ends_when_nobody_looks(served: Any) -> None:
    said: list[str] = []
    serve(served.site.root, idle_min=0.01, browser=False, say=said.append)
    assert re.fullmatch(r"  http://127\.0\.0\.1:\d+/open\?key=[0-9a-f]{64}", said[1])
    assert "good once" in said[0] and "Ctrl-C" in said[2] and "closed" in said[-1]


def test_a_port_that_is_taken(served: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="PAGE-PORT"):
            serve(served.site.root, port=taken.getsockname()[1], browser=False, say=lambda text: None)


def test_the_browser_s_command_line_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(serving.webbrowser, "open", opened.append)
    path = serving._link_file("http://127.0.0.1:1/open?key=abc")
    serving._open(path)
    assert "abc" not in opened[0] and opened[0].startswith("file://") and "key=abc" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()


@pytest.fixture
def process(served: Any) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(process, link, its lines until then)."""
    words = [sys.executable, "-c", START, str(served.site.root), "--no-browser"]
    started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert started.stderr is not None
    lines = [started.stderr.readline() for _ in range(3)]
    found = re.search(r"http://\S+", "".join(lines))
    assert found, lines
    yield started, found[0], lines
    started.kill()
    started.wait()


@pytest.mark.slow
def test_a_person_s_way_in_a_browser(process: Any, tmp_path: Path) -> None:
    """The link by a file, as the command opens it; every page clean, without errors, requests to others or axe's
    serious findings; by keyboard to the pause and back; Ctrl-C ends it."""
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium here")
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    started, link, _ = process
    base, wrong, elsewhere = link.split("/open")[0], [], []
    file = serving._link_file(link)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: elsewhere.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(file.as_uri())
        page.wait_for_url(base + "/")  # a strict cookie came along, although the way began in a file
        assert page.evaluate("document.cookie") == ""
        for path in PATHS:
            page.goto(base + path)
            page.wait_for_load_state("networkidle")
            found = Axe().run(page).response["violations"]
            assert [f["id"] for f in found if f["impact"] in ("serious", "critical")] == [], path
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        page.goto(base + "/")
        page.locator("details.act summary").first.focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.type("a drill")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url(base + "/?did=paused")
        assert "refuses everything" in page.inner_text("main")
        stranger = browser.new_context().new_page()
        assert stranger.goto(link).status == 403 and stranger.goto(base + "/left").status == 401
        browser.close()
    file.unlink()
    assert [text for text in wrong if "403" not in text and "401" not in text] == []
    assert {url.split("/")[2] for url in elsewhere} == {base.split("/")[2]}
    started.send_signal(signal.SIGINT)
    _, rest = started.communicate(timeout=30)
    assert started.returncode == 0 and "Opened in a browser" in rest and "Traceback" not in rest


@pytest.mark.slow
def test_the_site_s_own_report_is_made_shown_and_stays(served: Any, tmp_path: Path) -> None:
    room: Room = served.room()
    client: TestClient = enter(served, room)
    rows = tmp_path / "rows.parquet"
    table(40, seed=3).drop(columns="pid").to_parquet(rows)
    try:
        assert act(client, "/report", rows=str(rows), run="run-1").status_code == 303
        assert act(client, "/report", rows=str(rows), run="run-1").status_code == 409  # one at a time
        assert "is being made" in client.get("/report/state").text
        room.reporting.wait(120)
        assert "is made. It stays here." in client.get("/report/state").text, room.reporting.error
        shown = client.get("/report/page/run-1")
        assert shown.headers["content-security-policy"] == REPORT_POLICY and "Membership" in shown.text
        assert MARKER not in shown.text and "never sent" in client.get("/report").text
        link = served.site.guard / "reports" / "run-link.html"
        link.symlink_to(served.site.guard / "site.key")
        assert client.get("/report/page/run-link").status_code == 404 and "run-link" not in client.get("/report").text
        rows.write_bytes(b"no table")
        assert act(client, "/report", rows=str(rows), run="run-1").status_code == 303
        room.reporting.wait(120)
        assert "TABLE-FILE" in client.get("/report/state").text
    finally:
        room.close()

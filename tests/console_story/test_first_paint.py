"""How soon a browser paints the first content after years: 50 sites, 200 runs, 100,000 ledger lines.

The console is a process of its own, its index of the ledgers is there, and every load has an empty browser cache.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from browsing import DESKTOP, chromium
from large_world import large_world
from parties import environment, free_ports, wait_for
from playwright.sync_api import Browser, sync_playwright

from cohortium.server.console.accounts import Accounts
from cohortium.server.console.settings import Settings
from cohortium.server.console.store import FILE

MOST_MS, MOST_TIMES = 300, 2.5
LOADS, TRIES = 5, 3
PAGES = ("/", "/studies", "/sites", "/sites/site-07", "/runs", "/runs/RUN", "/budget", "/results", "/release", "/audit")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(chromium() is None, reason="no Chromium here; CI installs it"),
]


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """(address, session, a run that is under way) of a console that has read all ledgers."""
    made = large_world(tmp_path_factory.mktemp("years") / "consortium")
    port = free_ports(1)[0]
    (made.root / "console.toml").write_text(f"[console]\nport = {port}\n")
    (made.root / "console").mkdir(mode=0o700, exist_ok=True)
    accounts = Accounts(made.root / "console" / FILE)
    accounts.add("maria", role="coordinator", password=None)
    session = accounts.begin("maria", complete=True)
    accounts.close()
    run = next(row.run for row in made.register().runs() if row.state == "running")
    process = subprocess.Popen(
        [sys.executable, "-m", "cohortium.server.console", str(made.root)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert "ready" in json.loads(process.stdout.readline())
        wait_for(lambda: _read(made.root), "the ledgers to be read", seconds=240)
        works = psutil.Process(process.pid)
        wait_for(lambda: works.cpu_percent(interval=2.0) < 10.0, "every ε to be worked out", seconds=120)
        # What a page shows for the first time is priced beside the requests and kept: after years, all of it is.
        address = Settings.load(made.root).address
        for path in PAGES:
            asked = {"cookies": {"cohortium-session": session}, "headers": {"accept": "text/html"}}
            assert httpx.get(address + path.replace("RUN", run), **asked).status_code == 200
        wait_for(lambda: works.cpu_percent(interval=3.0) < 5.0, "every price to be worked out", seconds=120)
        yield address, session, run
    finally:
        process.terminate()
        process.wait(30)


def _read(root: Path) -> bool:
    """Whether the console's index holds every mirrored line."""
    with suppress(sqlite3.Error):
        with sqlite3.connect(f"file:{root / 'console' / 'books.db'}?mode=ro", uri=True) as index:
            lines = index.execute("SELECT sum(size) FROM ledgers").fetchone()[0] or 0
        with sqlite3.connect(f"file:{root / 'mirror.db'}?mode=ro", uri=True) as mirror:
            return bool(lines >= mirror.execute("SELECT count(*) FROM lines").fetchone()[0])
    return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.mark.parametrize("path", PAGES)
def test_the_first_content_is_painted_within_300_ms(console: tuple[str, str, str], browser: Browser, path: str) -> None:
    """The median of five loads; three on one side of the limit decide it. The limit is for two cores of one's own:
    where other work has the machine, and the empty sign-in page is slow as well, a page may take no more than
    MOST_TIMES as long, in one of three tries."""
    address, session, run = console
    for _ in range(TRIES):
        painted: list[float] = []
        while max(sum(ms < MOST_MS for ms in painted), sum(ms >= MOST_MS for ms in painted)) <= LOADS // 2:
            painted.append(_painted(browser, address + path.replace("RUN", run), session))
        print(f"{path}: {_told(painted)} ms")
        if sum(ms < MOST_MS for ms in painted) > LOADS // 2:
            return
        empty = [_painted(browser, address + "/sign-in", None) for _ in range(LOADS // 2 + 1)]
        print(f"the sign-in page: {_told(empty)} ms")
        if statistics.median(painted) < MOST_TIMES * statistics.median(empty):
            return
    raise AssertionError(f"{path}: {_told(painted)} ms, the sign-in page {_told(empty)} ms")


def _painted(browser: Browser, address: str, session: str | None) -> float:
    """Milliseconds from the navigation's start to the first content, in a browser profile of its own."""
    context = browser.new_context(viewport=DESKTOP)
    try:
        if session is not None:
            context.add_cookies([{"name": "cohortium-session", "value": session, "url": address}])
        page = context.new_page()
        page.goto(address)
        assert page.locator("h1").count() == 1
        page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length > 0", polling=20)
        return float(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    finally:
        context.close()


def _told(times: list[float]) -> str:
    return ", ".join(f"{ms:.0f}" for ms in times)

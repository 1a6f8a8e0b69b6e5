"""A person with a browser: every page that is opened is looked at for what no page may have.

No error on the browser's console, no request to anywhere else, no serious finding of axe-core. With COHORTIUM_SCREENS
set to a folder, every page is kept there as a picture at desktop and at phone width, light and dark.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, sync_playwright

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SERIOUS = ("serious", "critical")
MOST_TABS = 250
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser of the distribution; playwright's own is not downloaded."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


@dataclass(kw_only=True)
class Person:
    """One browser profile. faults: what was found wrong, in sentences."""

    name: str
    page: Page
    faults: list[str] = field(default_factory=list)
    expected: tuple[int, ...] = ()
    seen: dict[str, int] = field(default_factory=dict)

    def open(self, address: str) -> Page:
        self.page.goto(address)
        self.look()
        return self.page

    def look(self, called: str = "") -> None:
        """Hold the page that is open against what every page has to keep."""
        page = self.page
        page.wait_for_load_state("load")
        where = called or urlsplit(page.url).path
        if page.locator("h1").count() != 1:
            self.faults.append(f"{where}: {page.locator('h1').count()} main headings")
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in SERIOUS:
                nodes = [node["html"][:160] for node in violation["nodes"][:3]]
                self.faults.append(f"{where}: axe {violation['id']} ({violation['impact']}): {nodes}")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            self.faults.append(f"{where}: {wide} pixels too wide at {page.viewport_size}")
        self._keep(where)

    def _keep(self, where: str) -> None:
        folder, page = os.environ.get("COHORTIUM_SCREENS"), self.page
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.name}{where}".lower()).strip("-")
        self.seen[name] = self.seen.get(name, 0) + 1
        page.set_viewport_size(PHONE)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            self.faults.append(f"{where}: {wide} pixels too wide on a phone")
        if folder:
            part = Path(folder) / f"{name}-{self.seen[name]}"
            page.screenshot(path=f"{part}-phone.png", full_page=True)
            page.set_viewport_size(DESKTOP)
            page.screenshot(path=f"{part}.png", full_page=True)
            page.emulate_media(color_scheme="dark")
            page.screenshot(path=f"{part}-dark.png", full_page=True)
            page.emulate_media(color_scheme="light")
        page.set_viewport_size(DESKTOP)

    # ---- keyboard only --------------------------------------------------------------------------------------

    def reach(self, what: str | Locator) -> Locator:
        """Focus an element with the tab key alone; AssertionError when it is never focused."""
        found = self.page.locator(what).first if isinstance(what, str) else what.first
        found.wait_for(state="attached")
        for _ in range(MOST_TABS):
            if found.evaluate("element => document.activeElement === element"):
                return found
            self.page.keyboard.press("Tab")
        raise AssertionError(f"{self.name}: the keyboard does not reach {what} on {self.page.url}")

    def press(self, what: str | Locator, key: str = "Enter") -> None:
        self.reach(what)
        self.page.keyboard.press(key)

    def type_into(self, what: str | Locator, text: str) -> None:
        self.reach(what)
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(text)

    def tick(self, what: str | Locator) -> None:
        found = self.reach(what)
        self.page.keyboard.press("Space")
        assert found.is_checked()

    def choose(self, what: str | Locator, value: str) -> None:
        """An entry of a list, with the arrow keys."""
        found = self.reach(what)
        self.page.keyboard.press("Home")
        for _ in range(found.locator("option").count()):
            if found.input_value() == value:
                return
            self.page.keyboard.press("ArrowDown")
        raise AssertionError(f"{self.name}: no {value} in {what}")


@dataclass(kw_only=True)
class People:
    browser: Browser
    persons: list[Person] = field(default_factory=list)

    def person(self, name: str) -> Person:
        context = self.browser.new_context(viewport=DESKTOP, accept_downloads=True, reduced_motion="reduce")
        context.set_default_timeout(60_000)
        made = Person(name=name, page=context.new_page())
        self.persons.append(made)

        def told(message: ConsoleMessage) -> None:
            if message.type == "error" and not any(f"status of {code}" in message.text for code in made.expected):
                made.faults.append(f"{urlsplit(made.page.url).path}: the browser says {message.text}")

        def asked(request: Request) -> None:
            parts = urlsplit(request.url)
            if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
                made.faults.append(f"{made.page.url} asks {request.url}")

        made.page.on("console", told)
        made.page.on("pageerror", lambda error: made.faults.append(f"{made.page.url}: {error}"))
        context.on("request", asked)
        return made

    def keep_all(self) -> None:
        """Where everybody stands, for whoever looks why the story ended."""
        folder = os.environ.get("COHORTIUM_SCREENS")
        for person in self.persons if folder else ():
            person.page.screenshot(path=f"{folder}/end-{person.name}.png", full_page=True)

    def faults(self) -> list[str]:
        return [f"{person.name} {fault}" for person in self.persons for fault in dict.fromkeys(person.faults)]


@contextmanager
def people() -> Iterator[People]:
    found = chromium()
    assert found is not None, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield People(browser=browser)
        finally:
            browser.close()

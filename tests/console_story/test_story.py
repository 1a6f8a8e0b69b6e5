"""The whole story in a browser: from an empty installation to an auditor who verifies what was released.

A coordinator and four hospitals are processes of their own. Every step that has a page is done on the page, by
coordinator, officers and auditor, without a mouse; every page on the way is held against what `browsing` asks of it.
"""

from __future__ import annotations

import json
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyotp
import pytest
from browsing import DESKTOP, People, Person, chromium, people
from parties import HERE, SITES, Parties, officer_words, parties, wait_for

PASSWORD = "four hospitals and a heart"
RUN = re.compile(r"/runs/([a-z0-9-]+)")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(chromium() is None, reason="no Chromium here; CI installs it"),
]


@dataclass
class Phone:
    """An authenticator app. A code is good once, so the next sign-in takes the next one."""

    secret: str
    last: int = 0

    def code(self) -> str:
        step = max(int(time.time()) // 30, self.last + 1)
        wait_for(lambda: step <= int(time.time()) // 30 + 1, "the next code", seconds=40)
        self.last = step
        return pyotp.TOTP(self.secret).at(step * 30)


def sign_in_by_keyboard(person: Person, address: str, password: str) -> Phone:
    """The first sign-in: password, then a second factor that is set up on the way."""
    page = person.open(address)
    person.type_into("input[name=name]", person.name)
    person.type_into("input[name=password]", password)
    person.press("form[action='/sign-in'] button")
    page.wait_for_url("**/sign-in/enrol**")
    person.look()
    person.press("details summary")
    phone = Phone(page.locator("details code").inner_text().replace(" ", ""))
    person.type_into("input[name=code]", phone.code())
    person.press("form[action='/sign-in/enrol'] button")
    return phone


def confirm(person: Person, title: str, button: str, reason: str, **fields: str) -> None:
    """An action: opened, given its reason, confirmed. By keyboard, like everything here."""
    box = person.page.locator("details.act", has=person.page.locator("summary", has_text=title)).first
    if box.get_attribute("open") is None:
        person.press(box.locator("summary"))
    for name, value in fields.items():
        part = box.locator(f"[name={name}]")
        if part.evaluate("e => e.tagName") == "SELECT":
            person.choose(part, value)
        else:
            person.type_into(part, value)
    person.type_into(box.locator("[name=reason]"), reason)
    person.tick(box.locator("[name=confirm]"))
    with person.page.expect_response(lambda answer: answer.request.method == "POST"):  # or the next step cuts it off
        person.press(box.get_by_role("button", name=button))


def invite(coordinator: Person, parties: Parties, name: str) -> None:
    page = coordinator.page
    page.goto(parties.address + "/sites")
    with page.expect_download() as waiting:
        confirm(coordinator, "Invite a site", "Make the invitation", f"{name} takes part", name=name)
    text = Path(waiting.value.path()).read_bytes()
    parties.join(name, text)


def draft_by_keyboard(coordinator: Person, parties: Parties) -> None:
    """A study typed into the form without a mouse, while the preview follows."""
    page = coordinator.open(parties.address + "/studies/new")
    typed = {
        "id": "heart",
        "title": "Heart disease at four hospitals",
        "target": "disease",
        "patients": "900",
        "epsilon": "3.0",
        "delta": "1e-6",
        "unit": "patient",
        "hospitals_per_patient": "1",
        "survivors": "3",
        "colluders": "1",
        "rounds": "100",
        "evaluation_epsilon": "3.0",
        "holdout": "0.2",
        "rows": "920",
    }
    chosen = {"adjacency": "add-remove", "generator": "joined", "strategy": "secure-sum"}
    for name, value in typed.items():
        coordinator.type_into(f"input[name={name}]", value)
    for name, value in chosen.items():
        coordinator.choose(f"select[name={name}]", value)
    coordinator.reach("textarea[name=dictionary]")
    page.keyboard.insert_text((HERE / "data" / "heart.schema.json").read_text())
    page.get_by_text("Guarantee and price").first.wait_for(timeout=180_000)  # the preview has compiled the plan
    coordinator.look()
    coordinator.press("form.wide > .row button")
    page.wait_for_url("**/drafts/**")


def approve_at_hospital(crowd: People, parties: Parties, site: str, run: str) -> Person:
    """The officer at the hospital's own page: reads what is asked, signs."""
    parties.start(f"page-{site}", "site", "page", parties.site(site), "--no-browser", "--idle", "30")
    found = wait_for(
        lambda: re.search(r"http://127\.0\.0\.1:\d+/open\?key=\S+", parties.log(f"page-{site}")), "the link"
    )
    officer = crowd.person(f"officer-{site}")
    page = officer.page
    page.goto(found[0])
    base = found[0].split("/open")[0]
    page.wait_for_url(base + "/")  # the link's page goes on there by itself
    officer.look()
    officer.open(base + "/asked")
    officer.press(page.get_by_role("link", name=run))
    page.get_by_role("heading", name="The plan in words").wait_for()
    officer.look("/asked/run")
    confirm(officer, "Approve", "Sign and approve", "it is what we agreed on", passphrase=officer_words(site))
    page.get_by_text("approved here").first.wait_for(timeout=180_000)
    return officer


def test_the_whole_story(tmp_path: Path) -> None:
    with parties(tmp_path) as made, people() as crowd:
        try:
            _told(made, crowd, tmp_path)
        except BaseException:
            crowd.keep_all()
            raise
        assert crowd.faults() == []


def _told(made: Parties, crowd: People, tmp_path: Path) -> None:
    made.command(
        *("console", "user", "add", made.consortium, "maria", "--role", "coordinator", "--password", "env:WORDS"),
        given={"WORDS": PASSWORD},
    )
    made.start("serve", "serve", made.consortium)
    made.ready("serve")

    # An empty installation: the pages say what comes next.
    maria = crowd.person("maria")
    page = maria.page
    sign_in_by_keyboard(maria, made.address, PASSWORD)
    page.wait_for_url(made.address + "/")
    maria.look("/ empty")
    for path in ("/sites", "/studies", "/runs", "/budget", "/results", "/release", "/audit", "/whatif", "/account"):
        maria.open(made.address + path)

    # Another person, who may look and change nothing.
    maria.open(made.address + "/people")
    confirm(maria, "Add somebody", "Add", "our data protection officer looks on", name="anna", role="auditor")
    once = page.locator(".flash code").inner_text()

    # Four hospitals are invited here and join there.
    for site in SITES:
        invite(maria, made, site)
    for site in SITES:
        made.ready(site)
    maria.open(made.address + "/sites")
    assert page.get_by_role("row").filter(has_text="enrolled").count() >= len(SITES)

    # The study: typed, previewed, saved, proposed.
    draft_by_keyboard(maria, made)
    page.get_by_text("Sign and propose").first.wait_for(state="attached", timeout=180_000)
    maria.look()
    confirm(maria, "Propose this study", "Sign and propose", "agreed at the consortium's meeting")
    page.wait_for_url(RUN, timeout=180_000)
    found = RUN.search(page.url)
    assert found is not None
    run = found[1]
    maria.look("/runs/run waiting")
    maria.open(made.address + "/studies/heart")

    # Each officer reads and signs at the hospital. The run's page, open all the time, follows by itself.
    page.goto(f"{made.address}/runs/{run}")
    officers = [approve_at_hospital(crowd, made, site, run) for site in SITES]
    folder = made.consortium / "runs" / run
    answers = folder / "run" / "answers"
    wait_for(lambda: len(list(answers.glob("*.npz"))) >= 6, "the sixth release", seconds=120)

    # One site loses power in the middle, and comes back.
    made.cut("budapest")
    wait_for(lambda: any("budapest" in release["dropped"] for release in _releases(folder)), "a round without it")
    made.start("budapest", "site", "join", made.site("budapest"))
    page.get_by_text("running").first.wait_for()
    maria.look("/runs/run live")
    page.get_by_text("finished").first.wait_for(timeout=240_000)
    maria.look("/runs/run finished")
    releases = _releases(folder)
    assert "budapest" not in releases[-1]["dropped"], "it did not come back"
    assert "budapest" in page.locator("main").inner_text()

    # What came out, what left each hospital, and the budget.
    maria.open(made.address + "/")
    maria.open(made.address + "/results")
    maria.open(f"{made.address}/results/{run}")
    maria.open(made.address + "/budget")
    for officer in officers[:1]:
        base = officer.page.url.split("/asked")[0]
        for path in ("/", "/left", "/ledger", "/policy", "/check", "/report"):
            officer.open(base + path)

    # Released: the gate looks, the coordinator signs, hospitals sign, and it is complete.
    maria.open(f"{made.address}/release/{run}")
    page.get_by_text("Write and sign the release").first.wait_for(timeout=180_000)
    confirm(maria, "Write and sign the release", "Release", "the steering board decided so")
    page.get_by_role("heading", name="Signatures").wait_for(timeout=180_000)
    with page.expect_download() as waiting:
        maria.press(page.get_by_role("link", name=re.compile(r"Download .*\.zip")))
    unpacked = _unzipped(Path(waiting.value.path()), tmp_path / "released")
    for site in list(SITES)[:3]:
        signature = tmp_path / f"{site}.json"
        made.command("site", "sign", made.site(site), unpacked, "--yes", "--out", signature)
        page.goto(f"{made.address}/release/{run}")
        maria.reach("input[name=signature]")
        page.locator("input[name=signature]").set_input_files(signature)  # the system's own dialogue is not ours
        confirm(maria, "Take in a site", "Take it in", f"{site} has signed")
        page.wait_for_url("**did=signature**")  # or the next address would meet this one on its way
    page.goto(f"{made.address}/release/{run}?verify=now")
    page.get_by_text("Everything holds.").first.wait_for(timeout=180_000)
    maria.look("/release/run signed")

    # The auditor: reads everything, changes nothing, and verifies without this server.
    anna = crowd.person("anna")
    sign_in_by_keyboard(anna, made.address, once)
    page = anna.page
    page.wait_for_url("**/sign-in/password**")
    anna.look()
    anna.type_into("input[name=new]", "I look and do not touch")
    anna.type_into("input[name=again]", "I look and do not touch")
    anna.press("form[action='/sign-in/password'] button")
    page.wait_for_url(made.address + "/")
    for path in ("/", "/sites", "/sites/budapest", "/studies", "/studies/heart", "/runs", f"/runs/{run}", "/people"):
        anna.open(made.address + path)
    for path in ("/budget", "/results", f"/results/{run}", "/release", f"/release/{run}", "/audit"):
        anna.open(made.address + path)
    told = page.locator("main").inner_text()
    for reason in ("the steering board decided so", "agreed at the consortium's meeting", "cleveland has signed"):
        assert reason in told
    page.goto(f"{made.address}/release/{run}")
    with page.expect_download() as waiting:
        anna.press(page.get_by_role("link", name=re.compile(r"Download .*\.zip")))
    release = _unzipped(Path(waiting.value.path()), tmp_path / "audited")
    said = made.command("verify", release, "--json")
    assert json.loads(said)["ok"] is True
    assert page.viewport_size == DESKTOP


def _releases(run: Path) -> list[dict[str, Any]]:
    lines = (run / "run" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "release"]


def _unzipped(file: Path, to: Path) -> Path:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(to)
    found = [path for path in to.iterdir() if path.is_dir()]
    return found[0] if len(found) == 1 else to

"""The console's own log, over the real application: routes, accounts and errors, and nothing that somebody typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from console_worlds import BASE, HTML, bare, desk_over, signed_in
from starlette.testclient import TestClient

from cohortium.server.console.app import create
from cohortium.server.console.metrics_token import token
from cohortium.server.logs import Access, ConsoleLog

TYPED = "correct-horse-battery"


def test_requests_and_bugs_are_written_down_with_an_id_that_the_page_shows(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        log = ConsoleLog(desk.folder)
        app = create(desk)
        app.state.log = log
        seen_by_all = Access(app, log=log, observe=app.state.observe)
        client = TestClient(
            seen_by_all, base_url=BASE, headers=HTML, follow_redirects=False, raise_server_exceptions=False
        )
        client.cookies.set("cohortium-session", str(signed_in(desk).cookies["cohortium-session"]))
        client.get(f"/runs/{TYPED}?next={TYPED}")
        client.post("/sign-in", data={"name": TYPED, "password": TYPED})
        client.get("/healthz", headers={"host": f"{TYPED}.example.org"})
        desk.register.runs = lambda: [][1]  # type: ignore[assignment,method-assign]
        answer = client.get("/runs")
        shown = re.search(r"has the details under ([0-9a-f]{8})", answer.text)
        assert answer.status_code == 500 and shown is not None and "index out of range" not in answer.text
        del desk.register.runs
        scraped = client.get("/metrics", headers={"authorization": f"Bearer {token(desk.folder)}"}).text
        text = log.path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        (bug,) = [line for line in lines if line["code"] == "WEB-BUG"]
        assert bug["id"] == shown[1] and bug["text"] == "IndexError" and bug["account"] == "coordinator"
        seen = [(line["route"], line["status"]) for line in lines if line["code"] == "WEB-ACCESS"]
        assert seen[0] == ("/runs/{run}", 404) and seen[1][0] == "/sign-in" and seen[2] == ("(none)", 421)
        assert seen[3] == ("/runs", 500)
        assert TYPED not in text
        assert 'cohortium_console_requests_total{method="GET",status="5xx"} 1.0' in scraped

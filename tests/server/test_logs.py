"""Logs: one JSON object a line, codes that are listed and documented, no word that somebody typed."""

from __future__ import annotations

import ast
import json
import logging
import logging.config
import re
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn.config
from fastapi import FastAPI, Request
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient

from cohortium.common.logs import CODES, Entry, entry, rfc3339
from cohortium.server import logs
from cohortium.server.logs import Access, ConsoleLog, captured, of_serve, server_words

ROOT = Path(__file__).resolve().parents[2]
SECRET = "correct-horse-battery"


def lines(log: ConsoleLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


# ---- a line -----------------------------------------------------------------------------------------------------


def test_a_line_is_one_json_object_with_the_agreed_fields_first() -> None:
    made = entry("RUN-HELD", 'stopped\n"by" ann', at=1_795_356_303.12, run="stroke-1", state="stopped")
    text = made.json()
    assert "\n" not in text and text.isascii()
    assert list(json.loads(text)) == ["at", "level", "code", "event", "text", "run", "state"]
    assert json.loads(text)["at"] == "2026-11-22T14:05:03.120Z" == rfc3339(1_795_356_303.12)
    assert datetime.fromisoformat(rfc3339(0.0)) == datetime(1970, 1, 1, tzinfo=UTC)
    assert made.plain() == '2026-11-22 14:05:03 run: stopped\ufffd"by" ann'
    assert "site" not in json.loads(text)


def test_a_code_that_is_not_listed_is_refused_and_so_is_a_field_of_every_line() -> None:
    with pytest.raises(ValueError, match="NEW-CODE"):
        entry("NEW-CODE", "x")
    with pytest.raises(ValueError, match="own"):
        Entry(code="WEB-BUG", text="x", at=0.0, more={"level": "info"})


def test_a_line_is_bounded() -> None:
    assert len(entry("WEB-SERVER", "x" * 10**6, where="y" * 10**6).json()) < 5000


# ---- the list of codes --------------------------------------------------------------------------------------------


def test_every_code_is_documented_as_it_is_and_no_other() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    section = page[page.index("## Logs") :]
    told = re.findall(r"^\| `([A-Z-]+)` \| (\w+) \| ([\w-]+) \|", section, re.MULTILINE)
    assert {code: (level, event) for code, level, event in told} == {c: (v.level, v.event) for c, v in CODES.items()}
    assert len(told) == len(CODES)


SPEAKERS = ("entry", "write", "say", "_note")
"""Functions whose first text is a code, in the modules below."""
SPEAKING = (
    "common/logs.py",
    "server/logs.py",
    "server/console",
    "client/courier.py",
    "client/guard.py",
    "server/serve.py",
)
_SHAPE = re.compile(r"(SERVE|MEMBER|RUN|WEB|GUARD|COURIER)-[A-Z-]+")


def spoken() -> dict[str, set[str]]:
    """File -> every text in the source that is said as a code of a line."""
    found: dict[str, set[str]] = {}
    for place in SPEAKING:
        for path in sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                first = node.args[0]
                said = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
                if name in SPEAKERS and _SHAPE.fullmatch(said):
                    found.setdefault(str(path.relative_to(ROOT)), set()).add(said)
    return found


def test_every_code_in_the_source_is_listed() -> None:
    said = spoken()
    assert said["server/logs.py"] >= {"WEB-ACCESS", "WEB-BUG", "WEB-SERVER"}
    assert set().union(*said.values()) <= set(CODES), "an unlisted code would break the process that says it"
    assert set(logs.SERVED.values()) | set(logs._HELD.values()) <= set(CODES)


# ---- the service ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "text", "wanted"),
    [
        ("ready", "c: members x:1, stream transport", {"code": "SERVE-READY", "level": "info"}),
        ("warning", "DISK-FULL: 0.1 GB are free", {"code": "SERVE-WARNING", "error": "DISK-FULL"}),
        ("enrolled", "north, request AB:CD", {"code": "MEMBER-ENROLLED", "site": "north"}),
        ("revoked", "north", {"code": "MEMBER-REVOKED", "site": "north", "level": "warning"}),
        ("run", "s-1: running. try 1, stream", {"code": "RUN-CHANGED", "run": "s-1", "state": "running"}),
        ("run", "s-1: stopped. RUN-PLAN: gone. Do x", {"code": "RUN-HELD", "run": "s-1", "error": "RUN-PLAN"}),
        ("run", "s-1: void. declined by a", {"code": "RUN-ENDED-BADLY", "level": "error", "run": "s-1"}),
        ("run", "s-1: finished. published.", {"code": "RUN-CHANGED", "state": "finished"}),
        ("run", "something else", {"code": "RUN-CHANGED"}),
        ("console", "nobody has an account yet", {"code": "SERVE-CONSOLE"}),
        ("other", "x", {"code": "SERVE-TOLD"}),
    ],
)
def test_what_the_service_says_has_a_code(event: str, text: str, wanted: dict[str, str]) -> None:
    made = of_serve(event, text).to_json()
    assert made | wanted == made and made["text"] == text
    if event in ("ready", "warning", "enrolled", "revoked", "run"):
        assert made["event"] == event, "scripts look for the word that they always had"


def test_every_word_of_the_service_has_a_code() -> None:
    """Walks over what server/serve.py and the child that it starts say."""
    places = (ROOT / "server" / "serve.py", ROOT / "server" / "console" / "child.py")
    words = {
        node.args[0].value
        for place in places
        for node in ast.walk(ast.parse(place.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("say", "_say")
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }
    assert {"ready", "restart", "revoked"} <= words <= {*logs.SERVED, "run"}


def test_what_modules_log_is_said_without_the_words_of_an_exception() -> None:
    said: list[tuple[str, str]] = []
    with captured(lambda event, text: said.append((event, text))):
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("cohortium.server.calls").exception("the register cannot be read")
        logging.getLogger("cohortium.server.service").info("not worth a line")
    logging.getLogger("cohortium.server.service").error("after the end")
    assert said == [("error", "the register cannot be read (ValueError)")]


# ---- the console ------------------------------------------------------------------------------------------------


@pytest.fixture
def console(tmp_path: Path) -> tuple[ConsoleLog, TestClient, list[tuple[Any, ...]]]:
    log, seen = ConsoleLog(tmp_path / "console"), []  # type: ignore[var-annotated]
    app = FastAPI()

    @app.get("/runs/{run}")
    def run(run: str, request: Request) -> str:
        from types import SimpleNamespace

        request.state.session = SimpleNamespace(account=SimpleNamespace(name="ann"))
        return run

    @app.post("/break")
    def broken() -> None:
        raise ValueError(SECRET)

    @app.get("/healthz")
    def alive() -> str:
        return "ok"

    async def bug(request: Request, error: Exception) -> Any:
        from starlette.responses import PlainTextResponse

        made = log.bug(error, method=request.method, route=logs.route_of(request.scope))
        return PlainTextResponse(made, status_code=500)

    app.add_exception_handler(Exception, bug)
    app.mount("/static", StaticFiles(directory=tmp_path))
    guarded = Access(app, log=log, observe=lambda *facts: seen.append(facts))
    return log, TestClient(guarded, raise_server_exceptions=False), seen


def test_an_access_line_names_the_template_and_never_the_address(console: Any) -> None:
    log, client, seen = console
    client.get(f"/runs/stroke-1?q={SECRET}", headers={"cookie": f"cohortium-session={SECRET}", "x-a": SECRET})
    client.get(f"/{SECRET}", headers={"user-agent": SECRET})
    client.request("BREW", "/runs/x")
    client.get("/healthz")
    client.get(f"/static/{SECRET}.css")
    found = lines(log)
    facts = [(line["method"], line["route"], line["status"], line.get("account")) for line in found]
    assert facts[0] == ("GET", "/runs/{run}", 200, "ann") and facts[1] == ("GET", "(none)", 404, None)
    assert facts[2][0] == "OTHER" and facts[2][2] == 405
    assert facts[3] == ("GET", "/static", 404, None), "a success of /healthz has no line"
    assert SECRET not in log.path.read_text() and "stroke-1" not in log.path.read_text()
    assert all(line["code"] == "WEB-ACCESS" and line["ms"] >= 0 for line in found)
    assert len(seen) == 5 and seen[0][:3] == ("GET", "/runs/{run}", 200) and seen[0][3] > 0


def test_a_bug_has_an_id_that_the_person_sees_and_no_words_of_the_exception(console: Any) -> None:
    log, client, _ = console
    answer = client.post("/break", content=SECRET)
    bug, access = lines(log)
    assert answer.status_code == 500 and bug["id"] == answer.text and len(bug["id"]) == 8
    assert bug["code"] == "WEB-BUG" and bug["level"] == "error" and bug["text"] == "ValueError"
    assert bug["where"].startswith("test_logs.py:") and bug["route"] == "/break"
    assert access["status"] == 500
    assert SECRET not in log.path.read_text()


def test_libraries_speak_into_the_same_file_without_the_words_of_exceptions(tmp_path: Path) -> None:
    log = ConsoleLog(tmp_path)
    before = list(logging.getLogger().handlers)
    logging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)  # a way of its own, as whoever runs uvicorn sets it up
    own = list(logging.getLogger("uvicorn").handlers)
    assert own
    with server_words(log):
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert logging.getLogger().handlers == before and logging.getLogger("uvicorn").handlers == own
    first, second = lines(log)
    assert first["text"] == "Exception in ASGI application (ValueError)" and first["where"].startswith("test_logs.py")
    assert second["text"] == "Invalid HTTP request received." and second["code"] == "WEB-SERVER"
    assert SECRET not in log.path.read_text()


def test_the_log_is_closed_to_others_bounded_and_shared_by_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOG_BYTES", 20_000)
    log = ConsoleLog(tmp_path / "console")

    def many() -> None:
        for _ in range(200):
            log.write("WEB-SERVER", "x" * 100)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted((tmp_path / "console").glob("console.log*"))
    assert len(files) == logs.LOG_FILES
    for path in files:
        assert path.stat().st_size <= 20_000 and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert all(json.loads(line)["code"] == "WEB-SERVER" for line in path.read_text().splitlines())


def test_a_full_disk_stops_the_log_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ConsoleLog(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._handler, "emit", full)
    log.write("WEB-STARTED", "x")
    assert len(log.bug(ValueError(SECRET), method="GET", route="/")) == 8

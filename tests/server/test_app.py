"""The ServerApp runs what the coordinator's own settings name, and every early end is a line for people."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context

from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.protocol.flower import blank_context
from cohortium.server import app, runs
from cohortium.server.app import RunFailed, run_directory
from cohortium.server.asking import Stopped
from cohortium.server.driving import driving


def context(**settings: str) -> Context:
    named = {name.replace("_", "-"): value for name, value in settings.items()}
    return blank_context(run_id=1, node_id=1, node_config={}, run_config=named)


@pytest.fixture
def consortium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs" / "r1").mkdir(parents=True)
    (tmp_path / "runs" / "r1" / "run.json").write_text('{"run": "r1"}')
    monkeypatch.setenv("COHORTIUM_CONSORTIUM", str(tmp_path))
    return tmp_path


def events(root: Path) -> list[dict[str, Any]]:
    path = root / "run" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def drives(monkeypatch: pytest.MonkeyPatch, does: object) -> list[Any]:
    """Put another loop in place of the study's; what it was called with."""
    seen: list[Any] = []

    def drive(courier: object, root: Path, *, stop: Any) -> None:
        seen.append((courier, root, stop))
        if isinstance(does, BaseException):
            raise does

    monkeypatch.setattr(runs, "drive", drive)
    return seen


def test_a_run_of_the_consortium_is_driven_and_its_stop_file_is_heard(
    consortium: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = consortium / "runs" / "r1"
    seen = drives(monkeypatch, None)
    grid: Any = object()
    app._drive(grid, context(run_directory=str(root), transport="flower"))
    ((courier, driven, stop),) = seen
    assert courier is grid and driven == root and not stop()
    (root / "stop").touch()
    assert stop() and events(root) == []


@pytest.mark.parametrize("named", ["", "runs/r1", "/etc", "{0}", "{0}/runs", "{0}/runs/r1/../..", "{0}/runs/link"])
def test_a_directory_that_is_not_the_consortiums_is_refused(consortium: Path, named: str) -> None:
    (consortium / "runs" / "link").symlink_to("/etc")
    with pytest.raises(UsageError) as caught:
        run_directory(context(run_directory=named.format(consortium)))
    assert caught.value.code == "RUN-DIRECTORY"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"transport": "pigeon"}, "RUN-TRANSPORT"),
        ({"transport": "stream", "hub": "/tmp/other.sock"}, "RUN-HUB"),
        ({"transport": "stream"}, "RUN-HUB"),
        ({}, "RUN-HUB"),
    ],
)
def test_other_transports_and_other_hubs_are_refused_and_said(
    consortium: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], code: str
) -> None:
    root = consortium / "runs" / "r1"
    seen = drives(monkeypatch, None)
    with pytest.raises(RunFailed, match=f"^{code}$"):
        app._drive(None, context(run_directory=str(root), **settings))  # type: ignore[arg-type]
    assert seen == [] and [(e["event"], e["code"]) for e in events(root)] == [("failed", code)]


@pytest.mark.parametrize(
    ("does", "code"),
    [
        (PeerUnreachable("GRID-TOO-FEW-SITES", "2 of 4", where=("south",), hint="start them"), "GRID-TOO-FEW-SITES"),
        (ValueError("north: PATIENT-4711"), "BUG-ValueError"),
    ],
)
def test_a_failure_is_a_readable_line_and_flower_hears_the_code_only(
    consortium: Path, monkeypatch: pytest.MonkeyPatch, does: Exception, code: str
) -> None:
    root = consortium / "runs" / "r1"
    drives(monkeypatch, does)
    with pytest.raises(RunFailed) as caught:
        app._drive(None, context(run_directory=str(root), transport="flower"))  # type: ignore[arg-type]
    assert str(caught.value) == code
    (line,) = events(root)
    assert line["event"] == "failed" and line["code"] == code and line["sentence"] and line["fix"] and line["at"] > 0
    assert "4711" not in json.dumps(line)
    log = root / "run" / "serverapp.log"
    assert log.exists() == code.startswith("BUG")
    if log.exists():
        assert "4711" in log.read_text() and log.stat().st_mode & 0o077 == 0


def test_a_stop_ends_well_and_a_signal_leaves_a_line(consortium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = consortium / "runs" / "r1"
    drives(monkeypatch, Stopped())
    app._drive(None, context(run_directory=str(root), transport="flower"))  # type: ignore[arg-type]
    drives(monkeypatch, SystemExit(0))
    with pytest.raises(SystemExit):
        app._drive(None, context(run_directory=str(root), transport="flower"))  # type: ignore[arg-type]
    assert [line["event"] for line in events(root)] == ["stopped", "interrupted"]


def test_a_run_that_another_process_drives_is_left_alone(consortium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = consortium / "runs" / "r1"
    seen = drives(monkeypatch, None)
    monkeypatch.setattr(app, "driving", partial(driving, wait_s=0.1))
    with driving(root, 1), pytest.raises(RunFailed, match="RUN-DRIVEN"):
        app._drive(object(), context(run_directory=str(root), transport="flower"))  # type: ignore[arg-type]
    assert not seen and not events(root), "its events are another's"

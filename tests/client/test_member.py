"""A researcher, from the invitation to the rows, against a real service over TLS."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from consortium import HOUR, Party, enrol_member, leaf, start_party
from typer.testing import CliRunner

from cohortium.client import member
from cohortium.client.connect import read_leaf
from cohortium.client.member import fetch, join, renew_if_due, runs
from cohortium.common.errors import CohortiumError
from cohortium.common.protocol.certificates import load_chain
from cohortium.simulations.cli import app

ROWS = b"a,b\n" + b"x" * 600_000


@pytest.fixture
def party(tmp_path: Path) -> Iterator[Party]:
    made = start_party(tmp_path)
    enrol_member(made.register, "north")
    made.register.propose("run-1", folder="runs/run-1", envelope=b"envelope", sites=["north"])
    made.register.set_run("run-1", state="finished")
    yield made
    made.stop()


@pytest.fixture
def weber(party: Party, tmp_path: Path) -> Path:
    directory = tmp_path / "weber"
    join(directory, party.invitation("weber", role="researcher"))
    return directory


def refused(code: str, call: Any, *given: Any, **options: Any) -> CohortiumError:
    with pytest.raises(CohortiumError) as caught:
        call(*given, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def test_from_the_invitation_to_the_rows(party: Party, weber: Path, tmp_path: Path) -> None:
    refused("RUN-UNKNOWN", fetch, weber, "run-1", tmp_path / "rows.csv")
    assert not list(tmp_path.glob(".rows*")), "nothing half is left"
    party.register.grant("run-1", "weber")
    seen: list[int] = []
    got = fetch(weber, "run-1", tmp_path / "rows.csv", on_bytes=seen.append)
    assert got.path.read_bytes() == ROWS and got.bytes == len(ROWS) and seen[-1] == len(ROWS)
    assert stat.S_IMODE(got.path.stat().st_mode) == 0o600
    refused("FILE-EXISTS", fetch, weber, "run-1", tmp_path / "rows.csv")
    refused("ROWS-FORMAT", fetch, weber, "run-1", tmp_path / "rows.xls")
    assert runs(weber, "run-1") == {"run": "run-1", "asked_by": "weber"}


def test_a_fetch_that_breaks_off_leaves_no_file(party: Party, weber: Path, tmp_path: Path) -> None:
    party.register.grant("run-1", "weber")
    party.backing.fail = RuntimeError("patient 4711")
    error = refused("INTERNAL", fetch, weber, "run-1", tmp_path / "rows.csv")
    assert "4711" not in str(error) and not list(tmp_path.glob("*rows*"))
    party.backing.fail = None
    assert fetch(weber, "run-1", tmp_path / "rows.csv").bytes == len(ROWS)


def test_a_hospital_fetches_with_its_own_directory(party: Party, tmp_path: Path) -> None:
    place = party.directory("north", leaf(party.issuer, "north"))
    place.chmod(0o700)
    assert fetch(place.parent, "run-1", tmp_path / "rows.csv").bytes == len(ROWS)


def test_a_certificate_in_its_last_third_is_renewed_by_a_call(
    party: Party, weber: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = read_leaf(weber)
    assert not renew_if_due(weber) and read_leaf(weber)[0] == before
    monkeypatch.setattr(member, "renew_at", lambda chain: datetime.now(UTC) - HOUR)
    runs(weber, "")
    after, _ = read_leaf(weber)
    assert load_chain(after)[0].serial_number != load_chain(before)[0].serial_number
    monkeypatch.undo()
    assert runs(weber, "")["asked_by"] == "weber"


def test_after_the_end_a_new_invitation_goes_on_in_the_same_directory(party: Party, weber: Path) -> None:
    first, _ = read_leaf(weber)
    join(weber, party.invitation("weber", role="researcher"))
    assert read_leaf(weber)[0] != first and runs(weber, "")["asked_by"] == "weber"
    refused("MEMBER-OTHER", join, weber, party.invitation("meyer", role="researcher"))


def test_what_is_refused(party: Party, weber: Path, tmp_path: Path) -> None:
    refused("INVITE-ROLE", join, tmp_path / "site", party.invitation("south"))
    assert not (tmp_path / "site").exists()
    party.register.revoke("weber")
    refused("MEMBER-REVOKED", runs, weber, "")
    (weber / "leaf.key").chmod(0o644)
    refused("MODE-OPEN", runs, weber, "")


def test_the_commands(party: Party, tmp_path: Path) -> None:
    runner, directory = CliRunner(), tmp_path / "meyer"
    paper = tmp_path / "meyer.invitation"
    paper.write_text(party.invitation("meyer", role="researcher").to_text())
    said = runner.invoke(app, ["member", "join", str(directory), "--invitation", str(paper), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["name"] == "meyer"
    party.register.grant("run-1", "meyer")
    said = runner.invoke(app, ["member", "rows", str(directory), "run-1", "--out", str(tmp_path / "r.csv"), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["bytes"] == len(ROWS)
    said = runner.invoke(app, ["member", "renew", str(directory)])
    assert said.exit_code == 0 and "not due" in said.stdout
    said = runner.invoke(app, ["member", "rows", str(directory), "run-2", "--out", str(tmp_path / "s.csv")])
    assert said.exit_code == 3 and "RUN-UNKNOWN" in said.stderr

"""The console's commands: what they say, in words and in JSON; passwords by reference; what is noted of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conducting import make
from console_worlds import PASSWORD, desk_over
from signing_in import SECRET, code_of, notes, visitor
from typer.testing import CliRunner, Result

from cohortium.common.protocol.sockets import only_one
from cohortium.server.console.accounts import Accounts
from cohortium.server.console_cli import console_app
from cohortium.server.consortium import Consortium


def call(*words: object, code: int = 0, given: str | None = None) -> Result:
    result = CliRunner().invoke(console_app, [str(word) for word in words], input=given)
    assert result.exit_code == code, result.output
    return result


def told(*words: object, code: int = 0) -> Any:
    return json.loads(call(*words, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli") / "consortium").root


@pytest.fixture
def made(folder: Path) -> Path:
    for path in (folder / "console").glob("*"):
        path.unlink()
    (folder / "console.toml").unlink(missing_ok=True)
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    path.chmod(0o600)
    return f"file:{path}"


def test_add_list_close(made: Path, secret: str) -> None:
    assert "Nobody yet" in call("user", "list", made).stdout
    facts = told("user", "add", made, "anna", "--role", "coordinator", "--password", secret)
    assert facts["state"] == "no second factor yet" and facts["role"] == "coordinator" and PASSWORD not in str(facts)
    assert (made / "console").stat().st_mode & 0o777 == 0o700
    told("user", "add", made, "mia", "--role", "site", "--site", "site-1", "--password", secret)
    told("user", "add", made, "carl", "--password", secret)
    assert [p["name"] for p in told("user", "list", made)] == ["anna", "carl", "mia"]
    shown = call("user", "list", made).stdout
    assert "anna" in shown and "site-1" in shown and "never" in shown
    assert told("user", "close", made, "carl") == {"name": "carl", "state": "closed"}
    assert told("user", "close", made, "anna", code=3)["error"] == "ACCOUNT-LAST"
    assert told("user", "close", made, "nobody", code=3)["error"] == "ACCOUNT-UNKNOWN"


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("Anna", "--one-time"), 2, "ACCOUNT-NAME"),
        (("anna", "--role", "root", "--one-time"), 2, "ACCOUNT-ROLE"),
        (("anna", "--role", "site", "--one-time"), 2, "ACCOUNT-ROLE"),
        (("anna", "--role", "site", "--site", "nowhere", "--one-time"), 3, "MEMBER-UNKNOWN"),
        (("anna",), 2, "PASSWORD"),  # nobody is there to type it
        (("anna", "--password", PASSWORD), 2, "PASSWORD"),
        (("anna", "--password", "env:NOT_SET_ANYWHERE"), 2, "PASSWORD"),
        (("anna", "--password", "file:/does/not/exist"), 2, "MODE-MISSING"),
    ],
)
def test_what_is_refused(made: Path, words: tuple[str, ...], code: int, error: str) -> None:
    said = call("user", "add", made, *words, "--json", code=code).stdout
    assert json.loads(said)["error"] == error and PASSWORD not in said
    assert told("user", "list", made) == []


def test_a_password_that_others_may_read_is_refused(made: Path, secret: str) -> None:
    Path(secret.removeprefix("file:")).chmod(0o644)
    assert told("user", "add", made, "anna", "--password", secret, code=3)["error"] == "MODE-OPEN"


def test_a_password_from_the_environment(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_PASSWORD", PASSWORD)
    told("user", "add", made, "anna", "--password", "env:THE_PASSWORD")
    accounts = Accounts(made / "console" / "accounts.db")
    assert accounts.check_password("anna", PASSWORD, address="192.0.2.1") is not None
    accounts.close()


def test_a_one_time_password_is_drawn_and_shown(made: Path, secret: str) -> None:
    one = told("user", "add", made, "anna", "--one-time")
    assert one["state"] == "one-time password" and len(one["one_time_password"]) == 27
    shown = call("user", "password", made, "anna", "--one-time").stdout
    assert "One-time password, shown this once" in shown and one["one_time_password"] not in shown
    assert told("user", "password", made, "anna", "--password", secret) == {"name": "anna"}
    assert told("user", "list", made)[0]["state"] == "no second factor yet"
    assert told("user", "password", made, "nobody", "--one-time", code=3)["error"] == "ACCOUNT-UNKNOWN"


def test_commands_beside_a_running_console(made: Path, secret: str) -> None:
    """What a command does holds with the next request, and the console writes down that it was done."""
    told("user", "add", made, "anna", "--password", secret)
    with desk_over(Consortium(made)) as desk:
        assert desk.accounts.enrol_totp("anna", SECRET, code_of(desk.clock))
        client = visitor(desk)
        client.cookies.set("cohortium-session", desk.accounts.begin("anna", complete=True))
        assert client.get("/account").status_code == 200
        assert told("user", "totp", made, "anna") == {"name": "anna", "second_factor": False}
        assert client.get("/account").status_code == 303
        done = [(note["action"], note["on"]) for note in notes(desk, "command")]
        assert done == [("account-add", "anna"), ("account-second-factor", "anna")]
        assert all(note["by"].startswith("shell:") for note in notes(desk, "command"))


def test_open_tells_the_address_and_what_is_missing(made: Path, secret: str) -> None:
    assert told("open", made) == {"address": "http://127.0.0.1:7445", "runs": False, "accounts": False}
    assert "console user add" in call("open", made).output
    told("user", "add", made, "anna", "--password", secret)
    result = call("open", made)
    assert result.stdout == "http://127.0.0.1:7445\n" and "cohortium serve" in result.output
    lock = only_one(made / "console.lock")
    try:
        assert told("open", made)["runs"] is True
    finally:
        import os

        os.close(lock)
    (made / "console.toml").write_text("[console]\nprot = 1\n")
    assert told("open", made, code=2)["error"] == "STUDY-UNKNOWN"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert told("user", "list", tmp_path, code=2)["error"] == "CONSORTIUM-MISSING"
    assert not (tmp_path / "console").exists()

"""The coordinator's commands: what they say, in words and in JSON, and what they refuse."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from conducting import SITES, Stage, make, say_yes, study_of
from consortium import PASSPHRASE
from typer.testing import CliRunner, Result

from cohortium.common.protocol.invitation import Invitation
from cohortium.common.protocol.sockets import only_one
from cohortium.server.consortium import Consortium
from cohortium.server.seen import Seen
from cohortium.simulations.cli import app


def call(*words: object, code: int = 0, given: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=given)
    assert result.exit_code == code, result.output
    return result


def told(*words: object, code: int = 0) -> Any:
    return json.loads(call(*words, "--json", code=code).stdout)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text(PASSPHRASE + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def made(tmp_path: Path) -> Consortium:
    return make(tmp_path / "consortium")


# ---- consortium init, issuer ---------------------------------------------------------------------------------


def test_init_says_what_to_do_next(tmp_path: Path, secret: Path) -> None:
    words = ("consortium", "init", tmp_path / "c", "--name", "stroke", "--host", "127.0.0.1")
    said = call(*words, "--passphrase-file", secret).stdout
    assert "Root fingerprint" in said and "lock away" in said and "cohortium sites invite" in said
    assert Consortium(tmp_path / "c").addresses.listen == "127.0.0.1"
    facts = told(*words[:2], tmp_path / "d", *words[3:], "--passphrase", f"file:{secret}", "--service-port", 9000)
    assert facts["service"] == "127.0.0.1:9000" and len(facts["root_fingerprint"].split(":")) == 32
    assert PASSPHRASE not in said + json.dumps(facts)
    assert told(*words, "--passphrase-file", secret, code=2)["error"] == "CONSORTIUM-EXISTS"


def test_a_public_host_listens_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT_PASSPHRASE", PASSPHRASE)
    words = ("consortium", "init", tmp_path / "c", "--name", "stroke", "--host", "c.example.org")
    told(*words, "--passphrase", "env:ROOT_PASSPHRASE")
    assert Consortium(tmp_path / "c").addresses.listen == "0.0.0.0"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((), "PASSPHRASE"),  # nobody is there to type it
        (("--passphrase", "correct horse battery staple"), "PASSPHRASE"),
        (("--passphrase", "env:NOT_SET_ANYWHERE"), "PASSPHRASE"),
        (("--passphrase-file", "PATH", "--passphrase", "env:X"), "PASSPHRASE"),
        (("--passphrase-file", "missing"), "MODE-MISSING"),
    ],
)
def test_a_passphrase_comes_by_reference(tmp_path: Path, secret: Path, given: tuple[str, ...], error: str) -> None:
    words = ("consortium", "init", tmp_path / "c", "--name", "stroke", "--host", "127.0.0.1")
    facts = told(*words, *(str(secret) if word == "PATH" else word for word in given), code=2)
    assert facts["error"] == error and "correct horse" not in json.dumps(facts)
    assert not (tmp_path / "c").exists()


def test_a_passphrase_that_others_can_read(tmp_path: Path, secret: Path) -> None:
    secret.chmod(0o644)
    words = ("consortium", "init", tmp_path / "c", "--name", "stroke", "--host", "127.0.0.1")
    assert told(*words, "--passphrase-file", secret, code=3)["error"] == "MODE-OPEN"


def test_a_new_issuer_from_a_root_elsewhere(made: Consortium, secret: Path, tmp_path: Path) -> None:
    os.rename(made.root / "root", tmp_path / "safe")
    before = made.issuer().certificate
    words = ("consortium", "issuer", made.root, "--passphrase-file", secret)
    assert told(*words, code=2)["error"] == "KEY-MISSING"
    told(*words, "--root", tmp_path / "safe")
    assert made.issuer().certificate != before


# ---- sites ---------------------------------------------------------------------------------------------------


def test_an_invitation_is_a_closed_file(made: Consortium, tmp_path: Path) -> None:
    path = tmp_path / "north.invitation"
    said = call("sites", "invite", made.root, "north", "--out", path).stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    invitation = Invitation.from_text(path.read_text())
    assert (invitation.name, invitation.role, invitation.consortium) == ("north", "site", "rare-tumours")
    assert invitation.enrol_address == made.addresses.enrol and invitation.root_fingerprint in said
    assert invitation.token not in said, "the token is in the file and nowhere else"
    assert made.register().redeem(invitation.token) == ("north", "site")
    assert told("sites", "invite", made.root, "north", "--out", path, code=2)["error"] == "INVITE-OUT"


def test_who_is_enrolled_is_not_invited_again(made: Consortium, tmp_path: Path) -> None:
    words = ("sites", "invite", made.root, SITES[0], "--out", tmp_path / "x")
    assert told(*words, code=3)["error"] == "MEMBER-EXISTS" and not (tmp_path / "x").exists()
    told("sites", "revoke", made.root, SITES[0])
    told(*words)


def test_the_list_of_members(made: Consortium) -> None:
    Seen(made.root / "seen.json", clock=lambda: 1_700_000_000).saw(SITES[0], certificate_until=1_700_086_400)
    told("sites", "revoke", made.root, SITES[2])
    rows = {row["name"]: row for row in told("sites", "list", made.root)}
    assert rows[SITES[0]]["last_seen"] == 1_700_000_000 and rows[SITES[0]]["certificate_until"] == 1_700_086_400
    assert rows[SITES[1]]["last_seen"] is None and rows[SITES[1]]["ledger_line"] is None
    assert [row["state"] for row in rows.values()] == ["enrolled", "enrolled", "revoked"]
    assert len(rows[SITES[0]]["fingerprint"].split()) == 8
    said = call("sites", "list", made.root).stdout
    assert all(site in said for site in SITES) and "revoked" in said


def test_unknown_members(made: Consortium) -> None:
    assert told("sites", "revoke", made.root, "nobody", code=3)["error"] == "MEMBER-UNKNOWN"
    assert told("sites", "grant", made.root, "no-run", SITES[0], code=3)["error"] == "RUN-UNKNOWN"


def test_a_researcher_is_let_in_run_by_run(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"))
    register = made.register()
    register.enrol(name="weber", role="researcher", identity=b"", officer=b"", supernode="")
    assert not register.entitled(run, "weber")
    told("sites", "grant", made.root, run, "weber")
    assert register.entitled(run, "weber")


# ---- run, watch, stop, resume --------------------------------------------------------------------------------


def test_run_prints_the_cost_and_wants_a_yes(made: Consortium, tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    assert told("run", made.root, study, code=2)["error"] == "RUN-YES"
    call("run", made.root, study, code=2)
    assert made.register().runs() == []
    said = call("run", made.root, study, "--yes", "--detach")
    assert "Price of the whole plan" in said.stdout and "Follow it" in said.stdout
    (row,) = made.register().runs()
    assert row.state == "proposed" and row.run in said.stderr


def test_a_rehearsal_is_called_one(made: Consortium, tmp_path: Path) -> None:
    said = call("run", made.root, study_of(tmp_path / "study"), "--yes", "--detach", "--seed", 7).stdout
    assert "NOT private" in said
    (run,) = told("watch", made.root)["runs"]
    assert run["run"] == "small-00000007" and run["rehearsal"] is True
    assert "rehearsal" in call("watch", made.root).stdout


def test_run_waits_for_the_end(made: Consortium, tmp_path: Path) -> None:
    """A conductor works beside it, as `serve` does; the officers say no, so it ends soon."""
    study, over = study_of(tmp_path / "study"), threading.Event()

    def beside() -> None:
        stage = Stage(made=made)
        while not over.wait(0.05):
            for row in made.register().runs():
                if row.state == "proposed":
                    say_yes(made, row.run, SITES[0], declined=True)
            stage.tick()

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        facts = told("run", made.root, study, "--yes", code=3)
    finally:
        over.set()
        thread.join()
    assert facts["state"] == "void" and "declined by site-1" in facts["message"]
    assert facts["approvals"] == {SITES[0]: "declined", SITES[1]: "open", SITES[2]: "open"}


def test_watch_shows_how_it_stands(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"))
    stage = Stage(made=made)
    say_yes(made, run, SITES[0])
    facts = told("watch", made.root, run)
    assert facts["state"] == "proposed" and facts["approvals"][SITES[0]] == "approved"
    say_yes(made, run)
    stage.tick()
    stage.release(run)
    planned = made.folder(run).plan().releases
    for at in (0, 1):
        stage.event(run, "release", index=at, purpose="bins", sites=list(SITES), dropped=[], seconds=1.0, void="")
    facts = told("watch", made.root, run)
    assert facts["releases"] == {"done": 1, "planned": planned} and facts["phase"] == "bins"
    assert facts["epsilon"]["spent"] == 0.0 and facts["state"] == "running"
    assert run in call("watch", made.root).stdout
    assert told("watch", made.root, "nothing", code=2)["error"] == "RUN-UNKNOWN"


def test_stop_and_resume(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"))
    stage = Stage(made=made)
    say_yes(made, run)
    stage.tick()
    assert told("resume", made.root, run, code=3)["error"] == "RUN-NOT-STOPPED"
    assert told("stop", made.root, run)["state"] == "stopping"
    stage.end(run)
    stage.tick()
    assert told("watch", made.root, run)["state"] == "stopped"
    followed = call("watch", made.root, run)
    assert "stopped" in followed.stdout and "cohortium resume" in followed.stdout
    assert told("resume", made.root, run)["state"] == "approved"
    stage.tick()
    assert stage.row(run).state == "running"
    assert told("stop", made.root, "nothing", code=3)["error"] == "RUN-UNKNOWN"


def test_they_say_when_nobody_serves(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"))
    assert "not running" in call("stop", made.root, run).stderr and told("watch", made.root)["served"] is False
    lock = only_one(made.root / "serve.lock")
    try:
        assert "not running" not in call("stop", made.root, run).stderr and told("watch", made.root)["served"] is True
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    "words",
    [
        ("sites", "list"),
        ("sites", "invite", "x"),
        ("serve",),
        ("watch",),
        ("stop", "x"),
        ("resume", "x"),
    ],
)
def test_another_folder_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    first = 1 if words[0] != "sites" else 2
    facts = told(*words[:first], tmp_path, *words[first:], code=2)
    assert facts["error"] == "CONSORTIUM-MISSING" and "cohortium consortium init" in facts["fix"]

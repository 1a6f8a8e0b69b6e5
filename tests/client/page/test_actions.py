"""Approve, decline, pause: what the command does, no less; confirmed, with a reason, in the journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from consortium import Party
from hospital import stage
from page_worlds import act, enter, make
from starlette.testclient import TestClient

from cohortium.client.approval import load_approved
from cohortium.client.page.journal import Journal, told
from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.privacy import chain
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.signing import load_private

SECRET = "six words that nobody else knows"


@pytest.fixture(scope="module")
def sealed(party: Party, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A hospital whose officer's key has a passphrase; its page is open."""
    world = make(tmp_path_factory.mktemp("sealed"), party, passphrase=SECRET)
    world.open_room = world.room()
    yield world
    world.open_room.close()


@pytest.fixture(scope="module")
def here(sealed: Any) -> TestClient:
    return enter(sealed, sealed.open_room)


def journal(world: Any) -> list[dict[str, Any]]:
    return told(world.open_room.journal.lines())


def test_approving_as_the_command_does(sealed: Any, here: TestClient) -> None:
    envelope = sealed.propose("run-a", stages=[stage("one", "counts", 0)])
    page = here.get("/asked/run-a")
    assert page.status_code == 200 and digest(envelope) in page.text
    given = {"proposal": digest(envelope), "expires": "30d", "pin_peers": ""}
    wrong = act(here, "/asked/run-a/approve", **given, passphrase="wrong")
    assert wrong.status_code == 422 and "OFFICER-PASSPHRASE" in wrong.text and "wrong" not in wrong.text.lower().split()
    done = act(here, "/asked/run-a/approve", **given, passphrase=SECRET)
    assert (done.status_code, done.headers["location"]) == (303, "/asked/run-a?did=approved")
    load_approved(sealed.site.guard, sealed.site.policy(), "run-a")
    assert sealed.party.register.approvals("run-a")["h"] == "approved"
    shown = here.get("/asked/run-a?did=approved").text
    assert "approved here" in shown and "The guard answers this plan" in shown
    assert [one["ended"] for one in journal(sealed)[:2]] == ["done", "refused: OFFICER-PASSPHRASE"]
    assert journal(sealed)[0]["reason"] == "because a test wants it"


def test_the_passphrase_is_nowhere_afterwards(sealed: Any, here: TestClient, capfd: pytest.CaptureFixture[str]) -> None:
    sealed.propose("run-b", stages=[stage("one", "counts", 0)])
    given = {"proposal": "0" * 64, "expires": "30d"}
    for fields in (given, given | {"expires": "x"}, given | {"proposal": "zz"}, given | {"key": "/nope"}):
        said = act(here, "/asked/run-b/approve", **fields, passphrase=SECRET)
        assert said.status_code in (409, 422) and SECRET not in said.text
    for path in sealed.site.root.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in "".join(capfd.readouterr()) and SECRET not in "".join(sealed.said)


def test_what_is_signed_is_what_was_shown(sealed: Any, here: TestClient) -> None:
    sealed.propose("run-c", stages=[stage("one", "counts", 0)])
    said = act(here, "/asked/run-c/approve", proposal="ab" * 32, expires="30d", passphrase=SECRET)
    assert said.status_code == 409 and "PAGE-CHANGED" in said.text
    assert not (sealed.site.guard / "approved" / "run-c").exists()


def test_nothing_happens_unless_it_is_meant(sealed: Any, here: TestClient) -> None:
    envelope = sealed.propose("run-d", stages=[stage("one", "counts", 0)])
    given = {"proposal": digest(envelope), "expires": "30d", "passphrase": SECRET}
    before = len(journal(sealed))
    assert "ACTION-CONFIRM" in act(here, "/asked/run-d/approve", **given, confirm="").text
    assert "ACTION-REASON" in act(here, "/asked/run-d/approve", **given, reason=" a ").text
    assert "ACTION-CONFIRM" in act(here, "/pause", confirm="no").text
    assert "APPROVE-EXPIRES" in act(here, "/asked/run-d/approve", **given | {"expires": "400d"}).text
    assert not (sealed.site.guard / "approved" / "run-d").exists() and not sealed.site.paused.exists()
    assert len(journal(sealed)) == before + 1  # the last one was asked, and refused


def test_what_policy_or_cap_forbid_has_no_button_and_no_way_round(sealed: Any, here: TestClient) -> None:
    joined = sealed.propose("run-e", generator="joined")
    dear = sealed.propose("run-f", stages=[stage("one", "counts", 0, noise_multiplier=0.6)], epsilon=20.0)
    for run, envelope, code in (("run-e", joined, "POLICY-GENERATOR"), ("run-f", dear, "APPROVE-CAP")):
        shown = here.get(f"/asked/{run}").text
        assert code in shown and "Sign and approve" not in shown
        said = act(here, f"/asked/{run}/approve", proposal=digest(envelope), expires="30d", passphrase=SECRET)
        assert said.status_code == 409 and code in said.text
    assert "does NOT fit" in here.get("/asked/run-f").text


def test_declining_takes_the_approval_back_and_tells(sealed: Any, here: TestClient) -> None:
    envelope = sealed.propose("run-g", stages=[stage("one", "counts", 0)])
    here.get("/asked/run-g")
    given = {"proposal": digest(envelope), "expires": "12h", "passphrase": SECRET, "offline": "yes"}
    assert act(here, "/asked/run-g/approve", **given).headers["location"].endswith("approved")
    assert sealed.party.register.approvals("run-g")["h"] == "open"  # not told, as asked
    said = act(here, "/asked/run-g/decline", proposal=digest(envelope))
    assert said.headers["location"] == "/asked?did=declined"
    assert sealed.party.register.approvals("run-g")["h"] == "declined"
    with pytest.raises(CohortiumError, match="GUARD-NOT-APPROVED"):
        load_approved(sealed.site.guard, sealed.site.policy(), "run-g")


def test_a_proposal_from_a_file(sealed: Any, here: TestClient) -> None:
    from hospital import plan, proposal

    envelope = proposal(plan(("h",)), run="run-file")
    forged = proposal(plan(("h",)), run="run-forged", signer="somebody")

    def give(raw: bytes) -> Any:
        data = {"csrf": here.csrf}  # type: ignore[attr-defined]
        return here.post("/asked/file", data=data, files={"proposal": ("../../x", raw)})

    assert give(envelope).headers["location"] == "/asked/run-file?did=added"
    shown = here.get("/asked/run-file")
    assert shown.status_code == 200 and "from a file" in shown.text
    assert here.get("/asked/run-file/proposal.bin").content == envelope
    assert give(forged).status_code == 409 and here.get("/asked/run-forged").status_code == 404
    assert give(b"").status_code == 422 and give(b"x" * 1_600_000).status_code == 422
    assert give(b"x" * 2_100_000).status_code == 413


def test_pausing_stops_the_guard_and_says_so_everywhere(sealed: Any, here: TestClient) -> None:
    from hospital import counts

    assert act(here, "/pause").headers["location"] == "/?did=paused"
    assert sealed.site.paused.exists() and "refuses everything" in here.get("/ledger").text
    answer = sealed.ward.ask("h", 0, counts())
    assert answer.fields == {"code": "REFUSED-PAUSED"}
    sealed.ward.close()
    assert "REFUSED-PAUSED" in here.get("/left").text
    assert act(here, "/unpause").headers["location"] == "/?did=unpaused"
    assert not sealed.site.paused.exists()
    assert [one["action"] for one in journal(sealed)[:2]] == ["unpause", "pause"]


def test_the_journal_is_a_chain_of_its_own(sealed: Any, here: TestClient, tmp_path: Path) -> None:
    exported = tmp_path / "journal.jsonl"
    exported.write_bytes(here.get("/journal.jsonl").content)
    folder = sealed.site.guard / "page"
    own = load_private(folder / "journal.key").public_key()
    chain.replay(chain.read_jsonl(exported), owner="site-page", public=own)
    assert own != load_private(sealed.site.guard / "site.key").public_key()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert "because a test wants it" in here.get("/journal").text


def test_a_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    guard = tmp_path / "guard"
    guard.mkdir(mode=0o700)
    (guard / "page").mkdir(mode=0o700)
    (guard / "page" / "journal.db").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CohortiumError, match="MODE-OPEN"):
        Journal(guard)
    assert not (tmp_path / "elsewhere").exists()


def test_an_action_that_was_cut_off_says_so(tmp_path: Path) -> None:
    guard = tmp_path / "guard"
    guard.mkdir(mode=0o700)
    book = Journal(guard)
    with pytest.raises(ZeroDivisionError):
        book.act("ana", "approve", "run-1", "it looks fine", lambda: 1 / 0)
    book._write("asked", by="ana", action="pause", on="site", reason="the power went")
    with pytest.raises(UsageError, match="ACTION-REASON"):
        book.act("ana", "pause", "site", "a\x1b[2Jb", lambda: None)
    assert [one["ended"] for one in told(book.lines())] == ["cut off", "refused: INTERNAL"]
    book.close()

"""Sites: the readiness matrix, one member's page, and invite, revoke and grant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_worlds import act, bare, desk_over, signed_in, visitor
from run_worlds import FakeBooks, answered, of_state, world

from cohortium.common.privacy.cap import Cap
from cohortium.common.protocol import certificates
from cohortium.common.protocol.invitation import Invitation, token_hash
from cohortium.server.console import site_view
from cohortium.server.console.desk import Desk

NOW = 1_780_000_000.0
DAY = 86_400


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with desk_over(world(tmp_path_factory.mktemp("sites")), clock=Clock()) as found:
        yield found


@pytest.fixture()
def fresh(tmp_path: Path) -> Iterator[Desk]:
    with desk_over(bare(tmp_path)) as found:
        yield found


def seen(desk: Desk, **facts: Any) -> None:
    whole = {name.replace("_", "-"): value for name, value in facts.items()}
    (desk.consortium.root / "seen.json").write_text(json.dumps(whole))


def account(desk: Desk, role: str = "coordinator", site: str = "") -> Any:
    name = f"look-{role}-{site}".strip("-")
    return desk.accounts.account(name) or desk.accounts.add(name, role=role, password=None, site=site)


# ---- the matrix ----------------------------------------------------------------------------------------------


def test_what_needs_a_human_stands_first_and_says_why(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(
        desk,
        site_01={"at": NOW - 60, "certificate_until": NOW + 900, "version": "1.2.0"},
        site_02={"at": NOW - 2 * DAY, "certificate_until": NOW - 5},
        site_03={"at": NOW - 60, "version": "<script>"},
        site_04={"at": NOW - 60},
    )
    monkeypatch.setattr(desk, "books", FakeBooks(site_03="MIRROR-FORK"))
    run = of_state(desk.consortium, "proposed").run
    found = site_view.matrix(desk, account(desk))
    by = {line.name: line for line in found.sites}
    assert [line.name for line in found.sites] == ["site-03", "site-02", "site-01", "site-04"]
    assert [need.kind for need in by["site-02"].needs] == [site_view.ENDED, site_view.WAITS, site_view.AWAY]
    assert by["site-01"].waiting == (run,) and by["site-01"].version == "1.2.0" and by["site-03"].version == ""
    assert by["site-03"].ledger.problem == "MIRROR-FORK" and by["site-04"].ledger.size == 7
    assert [line.name for line in site_view.matrix(desk, account(desk), show="needs", text="02").sites] == ["site-02"]


def test_who_can_afford_what_waits_is_said_by_the_cap_or_by_the_officer(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = of_state(desk.consortium, "proposed").run
    plan = desk.consortium.folder(run).plan()
    whole = Cap(epsilon=4 * plan.price(), delta=plan.delta, hospitals=1)
    nothing = Cap(epsilon=plan.price() / 8, delta=plan.delta, hospitals=1)
    books = FakeBooks(caps={"site-01": whole, "site-02": nothing})
    monkeypatch.setattr(desk, "books", books)
    assert desk.register.answers(run) and all(answer.state == "open" for answer in desk.register.answers(run)[:2])
    by = {line.name: line for line in site_view.lines(desk, desk.register.members())}
    assert [by[f"site-0{at}"].affords.words for at in (1, 2)] == ["yes, by its cap", "no, by its cap"]
    assert site_view.DEAR in [need.kind for need in by["site-02"].needs]
    quiet = [line for name, line in by.items() if name > "site-02" and line.affords]
    answers = {answer.site: answer.state for answer in desk.register.answers(run)}
    for line in quiet:
        approved = answers[line.name] == "approved"
        assert line.affords.words == ("yes, approved" if approved else "its officer decides")
    page = signed_in(desk, name="anna").get("/sites").text
    assert "no, by its cap" in page and "0.0 % used" in page
    one = signed_in(desk, name="anna").get("/sites/site-02").text
    assert "as the hospital said" in one and "no, by its cap" in one
    facts = signed_in(desk, name="anna").get("/api/sites").json()
    assert facts["sites"][0]["affords"]["fits"] is False


def test_drop_outs_are_counted_over_the_newest_runs_that_began(desk: Desk) -> None:
    run = of_state(desk.consortium, "finished").run
    answered(desk.consortium, run, range(5), dropped={1: ["site-02"], 3: ["site-02"]})
    lines = {line.name: line for line in site_view.lines(desk, desk.register.members())}
    assert (lines["site-02"].dropped, lines["site-02"].ran) == (1, 10), "once a run, however many releases"
    assert (lines["site-01"].dropped, lines["site-01"].ran) == (0, 10)


@pytest.mark.parametrize("told", ["<x>", -1, 1e300, None, [], {"a": 1}])
def test_a_file_that_another_process_wrote_is_not_believed(desk: Desk, told: Any) -> None:
    seen(desk, site_01={"at": told, "certificate_until": told, "version": told})
    line = next(line for line in site_view.lines(desk, desk.register.members()) if line.name == "site-01")
    assert (line.last_seen, line.certificate_until, line.version) == (None, None, "")
    assert signed_in(desk).get("/sites").status_code == 200


def test_a_hospital_sees_itself_and_nobody_else(desk: Desk) -> None:
    member = signed_in(desk, "site", site="site-01")
    assert [line["name"] for line in member.get("/api/sites").json()["sites"]] == ["site-01"]
    page = member.get("/sites").text
    assert "site-02" not in page and "Invite" not in page and "SHA" not in page
    assert member.get("/sites/site-01").status_code == 200
    other, unknown = member.get("/sites/site-02"), member.get("/sites/no-such-site")
    assert other.status_code == 404
    assert other.text.replace("site-02", "no-such-site") == unknown.text
    assert str(desk.consortium.root) not in page + member.get("/sites/site-01").text


def test_nothing_is_for_those_who_did_not_sign_in(desk: Desk) -> None:
    for path in ("/sites", "/api/sites", "/sites/site-01", "/api/sites/site-01"):
        assert visitor(desk).get(path, headers={"accept": "application/json"}).status_code == 401


# ---- one member ----------------------------------------------------------------------------------------------


def test_one_members_page_has_keys_runs_and_identities(fresh: Desk) -> None:
    client = signed_in(fresh)
    fresh.register.rotate("site-1", b"n" * 32)
    facts = client.get("/api/sites/site-1").json()
    assert [key["current"] for key in facts["keys"]] == [True, False] and len(facts["officer"].split()) == 16
    page = client.get("/sites/site-1").text
    assert "Identities over time" in page and facts["keys"][1]["fingerprint"] in page and "given up" in page
    assert (
        "known at the hospital" in page and "no study waits to begin" in page and "No run names this site yet." in page
    )


# ---- actions -------------------------------------------------------------------------------------------------


def invited(client: Any, **fields: Any) -> Any:
    return act(client, "/sites/invite", **{"name": "site-9", "role": "site", "hours": "72", **fields})


def test_an_invitation_is_a_file_once_and_its_token_is_nowhere_else(fresh: Desk) -> None:
    client = signed_in(fresh)
    answer = invited(client, reason="the new hospital")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="site-9.invitation"'
    assert answer.headers["cache-control"] == "no-store"
    made = Invitation.from_text(answer.text)
    assert (made.name, made.role) == ("site-9", "site") and not made.expired()
    assert fresh.register.invited(made.token) == ("site-9", "site")
    page = client.get("/sites").text
    assert certificates.fingerprint(fresh.consortium.root_pem()) in page and "site-9" in page
    everything = page + client.get("/api/sites").text + json.dumps([line.to_json() for line in fresh.journal.lines()])
    assert made.token not in everything and token_hash(made.token).hex() not in everything
    (given,) = fresh.register.invitations()
    assert not {"hash", "token"} & set(given.__slots__) and given.used_at is None
    fresh.register.redeem(made.token)
    assert client.get("/api/sites").json()["invitations"] == [], "used up"


def test_inviting_again_replaces_the_first(fresh: Desk) -> None:
    client = signed_in(fresh)
    first, second = (Invitation.from_text(invited(client).text) for _ in range(2))
    assert fresh.register.invited(first.token) is None and fresh.register.invited(second.token)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"name": "site-1"}, 409),  # enrolled
        ({"name": "coordinator"}, 422),
        ({"name": ""}, 422),
        ({"name": "Ä"}, 422),
        ({"name": 'x"\r\nSet-Cookie: a=b'}, 422),
        ({"name": "../../etc/passwd"}, 422),
        ({"name": "a" * 65}, 422),
        ({"role": "coordinator"}, 422),
        ({"hours": "0"}, 422),
        ({"hours": "721"}, 422),
        ({"hours": "x"}, 422),
        ({"confirm": "no"}, 409),
        ({"reason": ""}, 422),
    ],
)
def test_an_invitation_that_cannot_be_is_refused_and_makes_nothing(
    fresh: Desk, fields: dict[str, str], status: int
) -> None:
    answer = invited(signed_in(fresh), **fields)
    assert answer.status_code == status and "set-cookie" not in answer.headers
    assert fresh.register.invitations() == []


def test_a_revoked_site_is_out_and_may_be_invited_again(fresh: Desk) -> None:
    client = signed_in(fresh)
    answer = act(client, "/sites/site-1/revoke", reason="its key was lost")
    assert (answer.status_code, answer.headers["location"]) == (303, "/sites/site-1?did=revoked")
    assert fresh.register.revoked() == {"site-1"}
    assert "Revoke site-1" not in client.get("/sites/site-1").text
    assert invited(client, name="site-1").status_code == 200
    assert act(client, "/sites/no-such-site/revoke").status_code == 404
    last = next(line.body["fields"] for line in fresh.journal.lines() if line.body.get("about") == "asked")
    assert (last["by"], last["action"], last["on"], last["reason"]) == (
        "coordinator",
        "revoke",
        "site-1",
        "its key was lost",
    )


def test_a_researcher_is_granted_a_run(desk: Desk) -> None:
    desk.register.enrol(name="rita", role="researcher", identity=b"", officer=b"", supernode="")
    client, run = signed_in(desk), of_state(desk.consortium, "finished").run
    assert run in client.get("/sites/rita").text and not desk.register.entitled(run, "rita")
    assert act(client, "/sites/rita/grant", run=run).status_code == 303
    assert desk.register.entitled(run, "rita") and desk.register.grants("rita") == [run]
    assert act(client, "/sites/rita/grant", run="no-such-run").status_code == 404
    assert act(client, "/sites/nobody/grant", run=run).status_code == 404
    assert "rita" in client.get("/sites").text and "rita" not in str(client.get("/api/sites").json()["sites"])


@pytest.mark.parametrize("path", ["/sites/invite", "/sites/site-01/revoke", "/sites/site-01/grant"])
def test_actions_are_the_coordinators_and_want_their_token(desk: Desk, path: str) -> None:
    for role, site in (("auditor", ""), ("site", "site-01")):
        assert act(signed_in(desk, role, site=site), path, name="x", run="y").status_code == 403
    assert signed_in(desk).post(path, data={"name": "x", "confirm": "yes", "reason": "because"}).status_code == 403
    assert desk.register.invitations() == [] and not desk.register.revoked()

"""The commands as hospital IT types them, against the coordinator's real services on loopback."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from consortium import Party, start_party
from hospital import key, plan, schema, stage, table
from typer.testing import CliRunner

from cohortium.client.approval import load_approved
from cohortium.client.cli import site_app
from cohortium.client.policy_draft import draft_policy
from cohortium.client.site import Site
from cohortium.common.privacy import chain
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.messages import seal
from cohortium.common.protocol.signing import load_private
from cohortium.strategies.base import COORDINATOR

POLICY = (
    "--lifetime-epsilon 8 --lifetime-delta 1e-5 --unit pid --hospitals 1 --minimum-sites 1 --minimum-colluders 0 "
    "--minimum-patients 10 --generator mixture --strategy local --strategy secure-sum --evaluation"
)


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    made = start_party(tmp_path_factory.mktemp("party"))
    yield made
    made.stop()


def site(*words: Any, code: int = 0, text: str | None = None) -> Any:
    """Run `cohortium site …`; its JSON, or its whole output where there is none."""
    result = CliRunner().invoke(site_app, [part for word in words for part in shlex.split(str(word))], input=text)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    try:
        return json.loads(result.stdout)
    except ValueError:
        return result.output + result.stderr


class Hospital:
    """One that went through `site init`."""

    def __init__(self, party: Party, folder: Path, name: str, *options: str) -> None:
        self.party, self.name, self.root = party, name, folder / "site"
        self.data, self.invitation = folder / "data.parquet", folder / "invitation"
        table(30, prefix=name).to_parquet(self.data)
        self.invitation.write_text(party.invitation(name).to_text())
        self.made = site(
            "init", self.root, "--invitation", self.invitation, "--table", self.data, POLICY, *options, "--json"
        )

    def propose(self, run: str, **options: Any) -> bytes:
        """A proposal over this hospital and one more, in the coordinator's register."""
        others = ("peer",) if self.party.register.member("peer") else ()
        agreed = plan(tuple(sorted((self.name, *others))), **options)
        identities = {}
        for name in agreed.sites:
            member = self.party.register.member(name)
            assert member is not None
            identities[name] = member.identity.hex()
        message = proposal_message(run=run, plan=agreed, identities=identities, schema=schema())
        envelope = seal(message, key(COORDINATOR))
        self.party.register.propose(run, folder=run, envelope=envelope, sites=agreed.sites)
        return envelope


@pytest.fixture
def hospital(party: Party, tmp_path: Path) -> Hospital:
    number = len(party.register.members())
    return Hospital(party, tmp_path, f"h{number}")


def test_the_walk_of_a_hospital(party: Party, hospital: Hospital) -> None:
    """init, check, inspect, approve, pause, ledger, leave."""
    root, name = hospital.root, hospital.name
    member = party.register.member(name)
    assert hospital.made["name"] == name and member is not None
    run = f"run-{name}"
    hospital.propose(run)

    found = {one["check"]: one for one in site("check", root, "--json", code=1)}
    assert [n for n, one in found.items() if one["word"] == "fail"] == ["fleet port"]
    assert run in found["data"]["result"]  # the open proposal's dictionary was asked for
    assert [o["run"] for o in site("inspect", root, "--json")] == [run]
    facts = site("inspect", root, run, "--json")
    assert facts["run"] == run and facts["state"] == "open" and facts["fits"] and facts["objections"] == []
    assert [row["what"] for row in facts["leaves"]] == ["noised counts of patients in bins"] * 2
    assert 0 == facts["charged_now"]["epsilon"] < facts["charged_after"]["epsilon"] <= 8
    assert facts["sites"][0]["known"] in ("this site", "not pinned") and facts["approval"] is None

    site("approve", root, run, code=2)  # nobody is there to be asked
    done = site("approve", root, run, "--yes --json")
    assert done["complete"] and done["told"] and abs(done["expires"] - time.time() - 30 * 86_400) < 60
    assert party.register.approvals(run)[name] == "approved"
    here = Site.open(root)
    load_approved(here.guard, here.policy(), run)
    assert site("inspect", root, run, "--json")["approval"]["expires"] == done["expires"]

    assert site("pause", root, "--json") == {"paused": True} and here.paused.exists()
    assert site("unpause", root, "--json") == {"paused": False} and not here.paused.exists()

    exported = hospital.data.with_name("ledger.jsonl")
    ledger = site("ledger", root, "--verify", "--export", exported, "--json")
    assert ledger["verified"] == "all" and ledger["total"]["epsilon"] == 0 and ledger["cap"]["epsilon"] == 8
    chain.replay(chain.read_jsonl(exported), owner=name, public=load_private(here.guard / "site.key").public_key())

    site("leave", root, code=2)
    left = site("leave", root, "--yes --json")
    assert left["withdrawn"] == [run] and left["told"] and party.register.approvals(run)[name] == "declined"
    assert (here.guard / "ledger.db").exists()
    assert "SITE-LEFT" in site("join", root, code=3)


def test_a_person_reads_tables(hospital: Hospital) -> None:
    run = f"run-{hospital.name}"
    hospital.propose(run)
    shown = site("inspect", hospital.root, run)
    for word in ("What would leave", "Lifetime cap", "differential privacy", "Never rows", hospital.name):
        assert word in " ".join(shown.split()), word
    assert "Check" in site("check", hospital.root, "--offline") and "Head:" in site("ledger", hospital.root)
    approved = site("approve", hospital.root, run, "--yes")
    assert f"Approved {run} until" in approved


def test_no_word_of_a_plan_hides_another(hospital: Hospital) -> None:
    """Power: as markup, the first stage would make the rest of its line invisible to the officer."""
    run = f"run-{hospital.name}"
    hospital.propose(run, stages=(stage("[i]", "counts", 0, purpose="[b]"),))
    shown = site("inspect", hospital.root, run)
    assert "[i]" in shown and "[b]" in shown


@pytest.mark.parametrize("missing", ["--lifetime-epsilon 8", "--unit pid", "--evaluation", "--generator mixture"])
def test_no_policy_setting_has_a_default(missing: str, party: Party, tmp_path: Path) -> None:
    name = "no" + missing.split()[0].removeprefix("--")
    (tmp_path / "invitation").write_text(party.invitation(name).to_text())
    words = ("init", tmp_path / "site", "--invitation", tmp_path / "invitation", "--table x.parquet")
    said = site(*words, POLICY.replace(missing, ""), "--json", code=2)
    assert said["error"] == "SITE-POLICY-MISSING" and missing.split()[0] in said["fix"]
    assert not (tmp_path / "site").exists() and party.register.member(name) is None
    site(*words, POLICY, "--json")  # the invitation was not used up


def test_a_policy_may_come_from_a_file_and_options_win(party: Party, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        '[data]\ntable = "ward.parquet"\n[policy]\nlifetime_epsilon = 2.0\nlifetime_delta = 1e-6\nunit = "pid"\n'
        "hospitals = 2\nminimum_sites = 4\nminimum_colluders = 1\nminimum_patients = 50\n"
        'generators = ["mixture"]\nstrategies = ["secure-sum"]\nevaluation = false\n'
    )
    (tmp_path / "invitation").write_text(party.invitation("filed").to_text())
    given = ("--invitation", tmp_path / "invitation", "--policy", tmp_path / "policy.toml")
    site("init", tmp_path / "site", *given, "--lifetime-epsilon 1.5 --json")
    made = Site.open(tmp_path / "site").policy()
    assert (made.lifetime_epsilon, made.hospitals, made.evaluation) == (1.5, 2, False)
    assert made.table == str(tmp_path / "ward.parquet")
    (tmp_path / "policy.toml").write_text("[policy]\nlifetime_epsilons = 2\n")
    assert site("init", tmp_path / "b", *given, "--json", code=2)["error"] == "SITE-UNKNOWN"
    (tmp_path / "policy.toml").write_text('[policy]\nevaluation = "false"\n')
    assert site("init", tmp_path / "b", *given, "--json", code=2)["error"] == "SITE-TOML"


def test_another_root_than_the_one_read_out_is_refused(party: Party, tmp_path: Path) -> None:
    (tmp_path / "invitation").write_text(party.invitation("rooted").to_text())
    words = ("init", tmp_path / "site", "--invitation", tmp_path / "invitation", "--table x.parquet", POLICY, "--json")
    assert site(*words, "--root-fingerprint", "AB:" * 31 + "AB", code=3)["error"] == "ROOT-FINGERPRINT"
    right = party.invitation("rooted").root_fingerprint
    (tmp_path / "invitation").write_text(party.invitation("rooted").to_text())
    assert site(*words, "--root-fingerprint", right.lower().replace(":", ""))["root"] == right


def test_a_rehearsal_is_loud(party: Party, tmp_path: Path) -> None:
    (tmp_path / "invitation").write_text(party.invitation("rehearsed").to_text())
    said = site(
        *("init", tmp_path / "site", "--invitation", tmp_path / "invitation", "--table x.parquet", POLICY),
        "--rehearsal-seed 7",
    )
    assert "REHEARSAL" in said and "Never point it at records of real patients" in said
    rehearsal = Site.open(tmp_path / "site").policy().rehearsal
    assert rehearsal is not None and rehearsal.seed == 7


def test_a_password_is_refused_in_the_address_and_taken_by_reference(party: Party, tmp_path: Path) -> None:
    (tmp_path / "invitation").write_text(party.invitation("dbs").to_text())
    words = ("init", tmp_path / "site", "--invitation", tmp_path / "invitation", POLICY, "--query 'SELECT 1' --json")
    said = site(*words, "--table postgresql://reader:hunter2@db/ward", code=2)
    assert said["error"] == "SITE-PASSWORD" and "hunter2" not in json.dumps(said)
    said = site(*words, "--table postgresql://reader@db/ward --password hunter2", code=2)
    assert said["error"] == "SECRET-FORM" and "hunter2" not in json.dumps(said)
    site(*words, "--table postgresql://reader@db/ward --password env:WARD")
    assert Site.open(tmp_path / "site").policy().password == "env:WARD"


def test_what_the_policy_or_the_cap_forbids_is_shown_and_not_approved(party: Party, hospital: Hospital) -> None:
    root, name = hospital.root, hospital.name
    hospital.propose(f"other-{name}", generator="joined")
    facts = site("inspect", root, f"other-{name}", "--json")
    assert [o["error"] for o in facts["objections"]] == ["POLICY-GENERATOR"]
    assert site("approve", root, f"other-{name}", "--yes --json", code=3)["error"] == "POLICY-GENERATOR"
    dear = [stage("one", "counts", 0, noise_multiplier=0.6)]
    hospital.propose(f"dear-{name}", stages=dear, epsilon=20.0)
    assert not site("inspect", root, f"dear-{name}", "--json")["fits"]
    assert site("approve", root, f"dear-{name}", "--yes --json", code=3)["error"] == "APPROVE-CAP"
    assert party.register.approvals(f"dear-{name}")[name] == "open"
    assert not (root / "guard" / "approved").exists()


def test_declining_and_pinning(party: Party, hospital: Hospital) -> None:
    from consortium import enrol_member

    if party.register.member("peer") is None:
        enrol_member(party.register, "peer")
    root, name = hospital.root, hospital.name
    hospital.propose(f"p-{name}")
    before = (root / "guard" / "site.toml").read_text()
    (root / "guard" / "site.toml").write_text("# the officer's own words\n" + before)
    assert site("approve", root, f"p-{name}", "--yes --pin-peers --json")["complete"]
    text = (root / "guard" / "site.toml").read_text()
    peer = party.register.member("peer")
    assert peer is not None and text.startswith("# the officer's own words") and peer.identity.hex() in text
    assert Site.open(root).policy().peers == (("peer", peer.identity.hex()),)
    facts = site("inspect", root, f"p-{name}", "--json")
    assert {row["site"]: row["known"] for row in facts["sites"]} == {name: "this site", "peer": "known"}
    # A peer whose key changed is for a person to look at.
    pinned = text.replace(peer.identity.hex(), "ab" * 32)
    (root / "guard" / "site.toml").write_text(pinned)
    assert site("approve", root, f"p-{name}", "--yes --pin-peers --json", code=3)["error"] == "POLICY-PEERS"
    assert (root / "guard" / "site.toml").read_text() == pinned
    (root / "guard" / "site.toml").write_text(text)
    said = site("approve", root, f"p-{name}", "--decline --json")
    assert said == {"run": f"p-{name}", "decision": "declined", "taken_back": True}
    assert party.register.approvals(f"p-{name}")[name] == "declined"


def test_a_proposal_from_a_file_needs_no_network(party: Party, hospital: Hospital, tmp_path: Path) -> None:
    run = f"file-{hospital.name}"
    (tmp_path / "proposal.bin").write_bytes(hospital.propose(run))
    settings = hospital.root / "courier" / "courier.toml"
    settings.write_text(settings.read_text().replace(party.address, "127.0.0.1:1"))
    assert site("inspect", hospital.root, run, "--json", code=4)["error"] == "COORDINATOR-UNREACHABLE"
    given = ("--file", tmp_path / "proposal.bin")
    assert site("inspect", hospital.root, run, *given, "--json")["run"] == run
    assert site("approve", hospital.root, "other", *given, "--yes --offline --json", code=3)["error"] == "PROPOSAL-RUN"
    assert not site("approve", hospital.root, run, *given, "--yes --offline --json")["told"]
    raw = bytearray((tmp_path / "proposal.bin").read_bytes())
    raw[200] ^= 1
    (tmp_path / "proposal.bin").write_bytes(raw)
    assert site("inspect", hospital.root, run, *given, "--json", code=3)["error"] == "MSG-SIGNATURE"


@pytest.mark.parametrize("span", ["0d", "30", "-3d", "2y", "", "400d", "1.5d"])
def test_an_expiry_is_a_length_of_time(span: str, hospital: Hospital) -> None:
    said = site("approve", hospital.root, "x", "--expires", f"'{span}'", "--yes --json", code=2)
    assert said["error"] == "APPROVE-EXPIRES"


def test_an_officers_key_with_a_passphrase(party: Party, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFICER_WORDS", "six words that nobody else knows")
    made = Hospital(party, tmp_path, "sealed", "--officer-passphrase env:OFFICER_WORDS")
    made.propose("sealed-1")
    assert site("approve", made.root, "sealed-1 --yes --json", code=2)["error"] == "OFFICER-PASSPHRASE"
    said = site("approve", made.root, "sealed-1 --yes --json --officer-passphrase env:OFFICER_WORDS")
    assert said["told"] and "six words" not in json.dumps(said)


def test_rotating_the_identity(party: Party, hospital: Hospital) -> None:
    root, name = hospital.root, hospital.name
    before = party.register.member(name)
    said = site("rotate", root, "--yes --json")
    after, here = party.register.member(name), Site.open(root)
    assert before is not None and after is not None and after.identity != before.identity
    assert load_private(here.guard / "site.key").public_key().public_bytes_raw() == after.identity
    assert said["carried"] == 0
    run = f"new-{name}"
    hospital.propose(run)
    assert site("approve", root, run, "--yes --json")["told"]
    assert len(site("ledger", root, "--json")["earlier"]) == 1


def test_another_certificate_for_the_same_keys(party: Party, hospital: Hospital, tmp_path: Path) -> None:
    root, before = hospital.root, party.register.member(hospital.name)
    leaf, key_before = (root / "courier" / "leaf.pem").read_bytes(), (root / "guard" / "site.key").read_bytes()
    (root / "courier" / "leaf.pem").unlink()
    (tmp_path / "again").write_text(party.invitation(hospital.name).to_text())
    assert site("renew", root, "--invitation", tmp_path / "again", "--json")["certificate_until"] > time.time()
    assert (root / "courier" / "leaf.pem").read_bytes() != leaf
    assert (root / "guard" / "site.key").read_bytes() == key_before
    after = party.register.member(hospital.name)
    assert before is not None and after is not None and after.identity == before.identity
    assert site("inspect", root, "--json") == []  # the service takes it
    (tmp_path / "other").write_text(party.invitation("somebody-else").to_text())
    assert site("renew", root, "--invitation", tmp_path / "other", "--json", code=3)["error"] == "ENROL-OTHER"


def test_the_policy_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "hospital.md").read_text(encoding="utf-8")
    (tmp_path / "policy.toml").write_text(page.split("```ini\n", 1)[1].split("```", 1)[0])
    made = draft_policy({}, tmp_path / "policy.toml", name="north")
    assert made.lifetime_epsilon == 8.0 and made.generators == ("mixture", "joined")


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    for words in ("check", "inspect", "ledger", "pause", "join", "guard", "courier", "leave --yes", "rotate --yes"):
        name, _, rest = words.partition(" ")
        assert "SITE-MISSING" in str(site(name, tmp_path, rest, code=2))

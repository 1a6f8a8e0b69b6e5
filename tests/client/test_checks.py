"""`site check`: every line is green on a good site, and each planted defect turns exactly its own line red."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from consortium import Party, start_party
from hospital import key, plan, policy, schema, table

from cohortium.client import checks
from cohortium.client.approval import approve
from cohortium.client.checks import Check, filesystem_of, run_checks
from cohortium.client.inspection import inspect
from cohortium.client.site import Site, join_consortium
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.proposals import proposal_message, read_proposal
from cohortium.common.protocol.messages import seal
from cohortium.common.protocol.signing import load_private
from cohortium.strategies.base import COORDINATOR


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    made = start_party(tmp_path_factory.mktemp("party"))
    yield made
    made.stop()


@pytest.fixture
def site(party: Party, tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    name = f"s{abs(hash(request.node.name)) % 10**9}"
    data = tmp_path / "data.parquet"
    table(30, prefix="a").to_parquet(data)
    given = policy("x", table=str(data), minimum_patients=10, peers=())
    made = join_consortium(tmp_path / "site", invitation=party.invitation(name), policy=given).site
    agreed = plan((name,))
    identities = {name: load_private(made.guard / "site.key").public_key().public_bytes_raw().hex()}
    message = proposal_message(run="run-1", plan=agreed, identities=identities, schema=schema())
    from cohortium.client.site import load_officer

    approve(
        made.guard,
        seal(message, key(COORDINATOR)),
        load_officer(made.officer / "officer.key", None),
        expires=int(time.time()) + 86_400,
    )
    return made


def lines(site: Site, **options: object) -> dict[str, Check]:
    return {one.name: one for one in run_checks(site, **options)}  # type: ignore[arg-type]


def bad(site: Site) -> set[str]:
    return {name for name, one in lines(site).items() if one.word == "fail"}


def test_a_good_site_passes(site: Site, party: Party) -> None:
    found = lines(site)
    # Nothing of Flower runs in this test, so the fleet port is the one thing that is wrong.
    assert {name for name, one in found.items() if one.word == "fail"} == {"fleet port"}
    assert found["service port"].word == found["data"].word == found["ledger"].word == found["clock"].word == "ok"
    assert found["users"].word == "warn"  # one user owns both here
    assert all(one.fix for one in found.values() if one.word in ("fail", "warn"))
    assert "fleet port" not in lines(site, network=False)


def test_a_rehearsals_ledger_is_told_before_the_guard_refuses(site: Site) -> None:
    """By `site check`, and to the officer by `site inspect`."""
    envelope = (site.guard / "approved" / "run-1" / "proposal.bin").read_bytes()
    proposal = read_proposal(envelope, key(COORDINATOR).public_key())
    assert not inspect(site, proposal).objections and lines(site)["ledger"].word == "ok"
    with Ledger.open(site.guard / "ledger.db", load_private(site.guard / "site.key")) as ledger:
        ledger.note(chain.REHEARSAL, run="run-0")
    assert [error.code for error in inspect(site, proposal).objections] == ["GATE-CAP"]
    assert lines(site)["ledger"].word == "fail"


def open_key(site: Site) -> None:
    (site.guard / "site.key").chmod(0o644)


def open_courier(site: Site) -> None:
    site.courier.chmod(0o755)


def no_table(site: Site) -> None:
    Path(site.policy().table).unlink()


def wrong_table(site: Site) -> None:
    table(30).rename(columns={"age": "years"}).to_parquet(site.policy().table)


def few_patients(site: Site) -> None:
    table(5).to_parquet(site.policy().table)


def flipped_line(site: Site) -> None:
    db = sqlite3.connect(site.guard / "ledger.db")
    db.execute("DROP TRIGGER lines_no_update")
    db.execute("UPDATE lines SET body = replace(body, '\"at\":', '\"at\":1')")
    db.commit()
    db.close()


def other_key(site: Site) -> None:
    (site.guard / "site.key").write_bytes((site.officer / "officer.key").read_bytes())


def broken_approval(site: Site) -> None:
    path = site.guard / "approved" / "run-1" / "approval.sig"
    path.write_bytes(path.read_bytes().replace(b'"expires":', b'"expires":1'))


def other_leaf(site: Site) -> None:
    from cohortium.common.protocol.certificates import key_pem, new_key

    (site.courier / "leaf.key").write_bytes(key_pem(new_key()))


def other_root(site: Site) -> None:
    from consortium import make_pki

    place = site.root / "other"
    place.mkdir()
    (site.courier / "root.pem").write_bytes(make_pki(place, name="others").root_pem)


def wrong_address(site: Site) -> None:
    text = site.settings_path.read_text()
    address = site.settings()["service_address"]
    site.settings_path.write_text(text.replace(f'service_address = "{address}"', 'service_address = "127.0.0.1:1"'))


def misspelt(site: Site) -> None:
    site.policy_path.write_text(site.policy_path.read_text().replace("minimum_sites", "minimum_site"))


DEFECTS: dict[str, tuple[Callable[[Site], None], set[str]]] = {
    "a key that others may read": (open_key, {"files and modes", "keys", "approvals"}),
    "an open directory": (open_courier, {"files and modes"}),
    "no table": (no_table, {"data"}),
    "another table": (wrong_table, {"data"}),
    "too few patients": (few_patients, {"data"}),
    "a changed ledger line": (flipped_line, {"ledger", "keys", "clock"}),
    "another identity": (other_key, {"keys"}),
    "a changed expiry": (broken_approval, {"approvals"}),
    "another transport key": (other_leaf, {"keys"}),
    "another root": (other_root, {"certificate", "service port"}),
    "another address": (wrong_address, {"service port"}),
    "a policy that cannot be read": (misspelt, {"policy", "keys", "ledger", "approvals", "data"}),
}


@pytest.mark.parametrize("why", DEFECTS)
def test_each_defect_turns_its_own_line_red(why: str, site: Site) -> None:
    plant, expected = DEFECTS[why]
    plant(site)
    found = bad(site) - {"fleet port"}
    assert found and found <= expected, (why, found)
    for name, one in lines(site).items():
        if name in found:
            assert one.fix or one.problem, name


def test_a_clock_before_ledger_or_certificate_is_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for off_days in (-2, -30):
        monkeypatch.setattr(checks.time, "time", lambda off=off_days: now + off * 86_400)
        found = checks.check_clock(site)
        assert found.word == "fail" and "behind" in found.result and "timedatectl" in found.fix
    monkeypatch.setattr(checks.time, "time", lambda: now)
    assert checks.check_clock(site).word == "ok"


def test_a_disk_and_a_package_that_do_not_do_are_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**8})())
    assert checks.check_disk(site).word == "fail"
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "1.40.0")
    found = checks.check_versions()
    assert found.word == "fail" and "flwr==1.41" in found.fix


def test_a_network_file_system_is_found(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        f"36 22 0:40 / {site.root} rw shared:9 - nfs4 files:/export rw\n"
        f"37 22 0:41 / {site.root}-other rw - tmpfs none rw\n"
    )
    assert filesystem_of(site.guard, mounts) == "nfs4" and filesystem_of(Path("/usr"), mounts) == "ext4"
    monkeypatch.setattr(checks, "filesystem_of", lambda path, _: "nfs4")
    assert checks.check_filesystem(site).word == "fail"


def test_a_cap_that_is_nearly_used_up_and_a_computation_without_noise_are_told(site: Site) -> None:
    with Ledger.open(site.guard / "ledger.db", load_private(site.guard / "site.key")) as ledger:
        loud = Event(kind="gaussian", noise_multiplier=0.4)
        ledger.reserve(run="old", release_id="0", event=loud, count=1, plan_digest="0" * 64, purpose="x")
    assert checks.check_ledger(site).word == "warn"
    with Ledger.open(site.guard / "ledger.db", load_private(site.guard / "site.key")) as ledger:
        plain = Event(kind="non-private")
        ledger.reserve(run="old", release_id="1", event=plain, count=1, plan_digest="0" * 64, purpose="x")
    assert checks.check_ledger(site).word == "fail"


def test_a_rehearsal_and_unpinned_peers_are_never_green(site: Site) -> None:
    from cohortium.client.policy import Rehearsal

    policy(site.policy().name, peers=None).save(site.policy_path)
    assert "peers" in checks.check_policy(site).problem
    policy(site.policy().name, rehearsal=Rehearsal(seed=1)).save(site.policy_path)
    assert checks.check_policy(site).word == "warn" and "seed" in checks.check_policy(site).problem


def test_a_pause_and_an_expired_approval_are_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1 in force" in checks.check_approvals(site).result
    site.paused.touch()
    assert checks.check_approvals(site).word == "warn"
    site.paused.unlink()
    later = time.time() + 90_000
    monkeypatch.setattr(checks.time, "time", lambda: later)
    assert checks.check_approvals(site).result == "0 in force, 1 expired"


def test_how_many_patients_there_are_is_not_on_the_screen(site: Site) -> None:
    """A screen is photographed and a ticket mailed: exact counts stay in the guard."""
    text = " ".join(" ".join(one.to_json().values()) for one in run_checks(site, network=False))
    assert " 30 " not in text and "30 patients" not in text


def test_a_gpu_is_named_as_its_driver_names_it(tmp_path: Path) -> None:
    assert checks.check_gpu(tmp_path).result.startswith("none")
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    assert checks.check_gpu(tmp_path).result == "NVIDIA H100"

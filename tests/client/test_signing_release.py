"""A site signs a release only when its own approval, key and ledger say the same, whatever the coordinator signed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hospital import key
from releasing import RUN, Finished, charge, edit_json, finished, reserve, resigned
from typer.testing import CliRunner

from cohortium.client.cli import site_app
from cohortium.client.signing_release import check_release, endorse
from cohortium.common.errors import CohortiumError
from cohortium.common.privacy.chain import REHEARSAL
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.release_manifest import (
    ENVELOPE,
    Envelope,
    Manifest,
    file_digests,
    sign_release,
    signature_file,
)
from cohortium.common.protocol.signing import save_private
from cohortium.server.release import release


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    run = finished(tmp_path_factory.mktemp("run"))
    folder = tmp_path_factory.mktemp("release") / "out"
    release(run.root, folder)
    return run, folder


@pytest.fixture
def site(made: tuple[Finished, Path], tmp_path: Path) -> Path:
    """A copy of one hospital's directory."""
    return Path(shutil.copytree(made[0].site("east"), tmp_path / "east"))


@pytest.fixture
def folder(made: tuple[Finished, Path], tmp_path: Path) -> Path:
    """A copy of the release, which nobody but the coordinator has signed."""
    return Path(shutil.copytree(made[1], tmp_path / "release"))


def refused(site: Path, folder: Path) -> str:
    """The code under which the site refuses; nothing of it is in the folder then."""
    before = set(folder.rglob("*"))
    with pytest.raises(CohortiumError) as caught:
        endorse(check_release(site, folder), folder)
    assert set(folder.rglob("*")) == before
    return caught.value.code


def test_a_site_signs_what_it_knows(site: Path, folder: Path) -> None:
    before = file_digests(site), file_digests(folder)
    signed = endorse(check_release(site, folder), folder)
    assert (signed.site, signed.run) == ("east", RUN) and len(signed.checks) == 6
    envelope = Envelope.read((folder / signature_file("east")).read_bytes())
    assert envelope.signed_by(key("east").public_key())
    assert envelope.payload == Envelope.read((folder / ENVELOPE).read_bytes()).payload
    assert (file_digests(site), file_digests(folder)) == before  # one file more in signatures/, and nothing else
    assert [path.name for path in (folder / "signatures").iterdir()] == ["east.json"]
    assert json.loads(json.dumps(signed.to_json()))["release"] == signed.release


def test_a_hospitals_directory_does_as_well_as_a_simulations(site: Path, folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    site.rename(whole / "guard")
    endorse(check_release(whole, folder), folder, tmp_path / "east.signature.json")
    assert Envelope.read((tmp_path / "east.signature.json").read_bytes()).signed_by(key("east").public_key())
    assert list((folder / "signatures").iterdir()) == []


def test_another_coordinator(site: Path, folder: Path) -> None:
    manifest = Manifest.read(Envelope.read((folder / ENVELOPE).read_bytes()).payload)
    (folder / ENVELOPE).write_bytes(sign_release(manifest, key("a stranger")).to_bytes())
    assert refused(site, folder) == "RELEASE-COORDINATOR"
    (folder / ENVELOPE).write_bytes(b"{}")
    assert refused(site, folder) == "RELEASE-FORM"
    (folder / ENVELOPE).unlink()
    assert refused(site, folder) == "RELEASE-FOLDER"


@pytest.mark.parametrize("name", ["synthetic.csv", "result.json", "run/ledgers/west.jsonl", "hipaa-annex.md"])
def test_a_file_that_changed_on_the_way(site: Path, folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert refused(site, folder) == "RELEASE-FILE"


def test_a_file_that_is_missing_or_too_many(site: Path, folder: Path) -> None:
    (folder / "more.csv").write_text("x")
    assert refused(site, folder) == "RELEASE-FILE"
    (folder / "more.csv").unlink()
    (folder / "report.html").unlink()
    assert refused(site, folder) == "RELEASE-FILE"


def test_a_run_that_was_not_approved_here(site: Path, folder: Path) -> None:
    shutil.rmtree(site / "approved")
    assert refused(site, folder) == "RELEASE-APPROVAL"
    resigned(folder, lambda p: p.update(run="../../x"))
    assert refused(site, folder) == "RELEASE-APPROVAL"


LIES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("another plan", lambda p: p["plan"].update(sha256="0" * 64), "RELEASE-PLAN"),
    ("no plan", lambda p: p.pop("plan"), "RELEASE-PLAN"),
    ("another dictionary", lambda p: p["dictionary"].update(sha256="0" * 64), "RELEASE-PLAN"),
    ("an invented site", lambda p: p["keys"].update(ghost="1" * 64), "RELEASE-PLAN"),
    ("another site's key", lambda p: p["keys"].update(west="1" * 64), "RELEASE-PLAN"),
    ("fewer signatures", lambda p: p.update(sites_needed=1), "RELEASE-PLAN"),
    ("another head", lambda p: p["ledgers"]["east"].update(hash="0" * 64), "RELEASE-LEDGER"),
    ("a shorter ledger", lambda p: p["ledgers"]["west"].update(size=3), "RELEASE-LEDGER"),
    ("a ledger left out", lambda p: p["ledgers"].pop("west"), "RELEASE-LEDGER"),
    ("this site called silent", lambda p: (p["ledgers"].pop("east"), p.update(silent=["east"])), "RELEASE-LEDGER"),
    ("a file outside", lambda p: p["ledgers"]["west"].update(file="../x"), "RELEASE-LEDGER"),
    ("no ledgers", lambda p: p.update(ledgers=5), "RELEASE-LEDGER"),
    ("smaller epsilon", lambda p: p["statement"]["terms"].update(epsilon=(0.5).hex()), "RELEASE-STATEMENT"),
    ("another unit", lambda p: p["statement"]["terms"].update(unit="row"), "RELEASE-STATEMENT"),
    ("better words", lambda p: p["statement"].update(sentence="Nobody can be harmed."), "RELEASE-STATEMENT"),
    (
        "words before it",
        lambda p: p["statement"].update(sentence="Safe. " + p["statement"]["sentence"]),
        "RELEASE-STATEMENT",
    ),
    ("called a rehearsal", lambda p: p["statement"].update(rehearsal=True), "RELEASE-STATEMENT"),
    ("no statement", lambda p: p.pop("statement"), "RELEASE-STATEMENT"),
]


@pytest.mark.parametrize(("what", "lie", "code"), LIES, ids=[what for what, _, _ in LIES])
def test_a_lie_of_the_coordinator(
    site: Path, folder: Path, what: str, lie: Callable[[dict[str, Any]], object], code: str
) -> None:
    """Everything is signed by the coordinator, and still the site does not sign."""
    resigned(folder, lie)
    assert refused(site, folder) == code


def test_rows_that_the_studys_ledger_does_not_name(site: Path, folder: Path) -> None:
    path = folder / "synthetic.csv"
    path.write_text(path.read_text().replace("F", "M", 1))
    resigned(folder)
    assert refused(site, folder) == "RELEASE-ROWS"


def test_a_broken_ledger_of_another_site(site: Path, folder: Path) -> None:
    path = folder / "run" / "ledgers" / "north.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"count":1', b'"count":0', 1))
    resigned(folder)
    assert refused(site, folder) == "RELEASE-LEDGER"


def test_a_ledger_that_was_put_back(made: tuple[Finished, Path], site: Path, folder: Path) -> None:
    """The site's own ledger is another one than in the release: a copy that charged less, signed by the same key."""
    plan = made[0].plan
    for path in site.glob("ledger.db*"):
        path.unlink()
    charge(site / "ledger.db", "east", plan, releases=plan.releases - 1)
    assert refused(site, folder) == "RELEASE-LEDGER"


def test_a_charge_that_came_after(made: tuple[Finished, Path], site: Path, folder: Path) -> None:
    """The release shows a ledger that is true and too short. Charges of other runs are no matter."""
    plan = made[0].plan
    with Ledger.open(site / "ledger.db", key("east")) as ledger:
        reserve(ledger, plan, 0, run="another-run")
    check_release(site, folder)
    with Ledger.open(site / "ledger.db", key("east")) as ledger:
        reserve(ledger, plan, plan.releases - 1, release_id="77")
    assert refused(site, folder) == "RELEASE-LEDGER"


def test_a_rehearsal_that_is_not_called_one(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", rehearsal=True)
    folder = tmp_path / "out"
    release(run.root, folder, rehearsal=True)
    assert check_release(run.site("east"), folder).rehearsal

    def private(predicate: dict[str, Any]) -> None:
        words = predicate["statement"]["sentence"].partition("it would be: ")[2]
        predicate["statement"].update(sentence=words, rehearsal=False)

    resigned(folder, private)
    assert refused(run.site("east"), folder) == "RELEASE-STATEMENT"


def test_another_key_than_the_approved_one(site: Path, folder: Path) -> None:
    (site / "site.key").unlink()
    save_private(key("east, after a change of keys"), site / "site.key")
    assert refused(site, folder) == "RELEASE-KEY"


def test_a_key_that_others_may_read(site: Path, folder: Path) -> None:
    os.chmod(site / "site.key", 0o644)
    assert refused(site, folder) in ("KEY-MODE", "MODE-OPEN")


def test_another_study_in_the_release(made: tuple[Finished, Path], site: Path, folder: Path) -> None:
    """The plan's file is exchanged, and the manifest still names the approved one."""
    edit_json(folder / "plan.json", lambda plan: plan.update(epsilon=(9.0).hex()))
    resigned(folder)
    assert refused(site, folder) == "RELEASE-PLAN"


def test_a_note_of_a_rehearsal_in_one_ledger_is_enough(made: tuple[Finished, Path], site: Path, folder: Path) -> None:
    """Another site rehearsed, and the release calls itself private."""
    path = folder / "run" / "ledgers" / "west.jsonl"
    place = folder.parent / "west.db"
    charge(place, "west", made[0].plan)
    with Ledger.open(place, key("west")) as ledger:
        ledger.note(REHEARSAL, run=RUN)
        ledger.export(path)
        head = ledger.head()
    resigned(folder, lambda p: p["ledgers"]["west"].update(size=head.size, hash=head.hash))
    assert refused(site, folder) == "RELEASE-STATEMENT"


def test_the_command(site: Path, folder: Path) -> None:
    def command(*words: str | Path) -> Any:
        return CliRunner().invoke(site_app, ["sign", str(site), str(folder), *map(str, words)])

    assert command().exit_code == 2 and not (folder / signature_file("east")).exists()  # nobody is there to be asked
    done = command("--yes", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["site"] == "east"
    shown = command("--yes")
    assert shown.exit_code == 0 and "differential privacy" in shown.output and "Signed by east" in shown.output
    with (folder / "synthetic.csv").open("a") as file:
        file.write("\n")
    assert command("--yes", "--json").exit_code == 1

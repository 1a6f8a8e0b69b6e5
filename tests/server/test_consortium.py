"""A consortium's folder: made whole or not at all, closed to others, and proposals that a hospital can read."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from conducting import PORTS, SITES, make, study_of
from consortium import PASSPHRASE
from cryptography import x509

from cohortium.common.errors import CohortiumError, Refused, StudyError, UsageError
from cohortium.common.proposals import proposal_message, read_proposal
from cohortium.common.protocol import certificates
from cohortium.common.protocol.messages import seal, unseal
from cohortium.server import consortium as module
from cohortium.server.consortium import Addresses, Consortium, Limits
from cohortium.server.register import Register
from cohortium.server.runs import RunFolder

HERE = Addresses(host="127.0.0.1", listen="127.0.0.1", **PORTS)


def code_of(caught: pytest.ExceptionInfo[CohortiumError]) -> str:
    return caught.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return make(tmp_path_factory.mktemp("made") / "consortium")


# ---- the folder ----------------------------------------------------------------------------------------------


def test_what_init_makes_is_closed(made: Consortium) -> None:
    for path in (made.root, *(p for p in made.root.rglob("*") if not p.name.endswith(".pem"))):
        if not path.is_relative_to(made.runs):
            assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path
    assert Consortium(made.root).name == "rare-tumours" and Consortium(made.root).addresses == HERE
    assert {path.name for path in made.secrets()} >= {"root.key", "issuer.key", "server.key", "coordinator.key"}


def test_the_leaf_names_what_sites_dial(made: Consortium) -> None:
    leaf = certificates.load_chain(made.chain.read_bytes())[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1"}
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert Addresses(host="coordinator.example.org").certified() == ("coordinator.example.org",)
    assert Addresses(host="2001:db8::7").service == "[2001:db8::7]:7441"


def test_a_new_leaf_fits_its_key(made: Consortium) -> None:
    before = made.chain.read_bytes()
    made.renew_leaf()
    assert made.chain.read_bytes() != before
    assert certificates.fits(made.chain.read_bytes(), made.chain_key.read_bytes())


def test_a_new_issuer_keeps_the_root(made: Consortium) -> None:
    root, before = made.root_pem(), made.issuer().certificate
    made.renew_issuer(made.root / "root", passphrase=PASSPHRASE)
    assert made.root_pem() == root and made.issuer().certificate != before
    with pytest.raises(UsageError, match="KEY-PASSPHRASE"):
        made.renew_issuer(made.root / "root", passphrase="another passphrase")


def test_a_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError) as caught:
        Consortium.create(tmp_path, name="c", addresses=HERE, passphrase=PASSPHRASE)
    assert code_of(caught) == "CONSORTIUM-EXISTS" and (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize("step", ["create_root", "create_issuer", "generate", "Register", "save_server_leaf"])
def test_nothing_is_left_of_half_a_consortium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="No space"):
        Consortium.create(tmp_path / "c", name="c", addresses=HERE, passphrase=PASSPHRASE)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a/b", "é", "a" * 64])
def test_a_name_that_no_certificate_can_carry(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="CONSORTIUM-NAME"):
        Consortium.create(tmp_path / "c", name=name, addresses=HERE, passphrase=PASSPHRASE)


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ROOT-PASSPHRASE"):
        Consortium.create(tmp_path / "c", name="c", addresses=HERE, passphrase="short")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("host", ["", "a b", "http://x", "x:1", "*", "a_b"])
def test_a_host_that_nobody_can_dial(host: str) -> None:
    with pytest.raises(UsageError, match="CONSORTIUM-HOST"):
        Addresses(host=host)


@pytest.mark.parametrize("ports", [{"service_port": 0}, {"enrol_port": 70000}, {"service_port": 7442}])
def test_ports_are_four_different_ones(ports: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="CONSORTIUM-PORTS"):
        Addresses(host="x", **ports)


def test_limits_are_read_and_checked(tmp_path: Path, made: Consortium) -> None:
    text = (made.root / "consortium.toml").read_text()
    (tmp_path / "consortium.toml").write_text(text.replace("patience_hours = 72", "patience_hours = 5"))
    assert Consortium(tmp_path).limits == Limits(patience_hours=5)
    (tmp_path / "consortium.toml").write_text(text.replace("patience_hours", "patience_hour"))
    with pytest.raises(CohortiumError):
        Consortium(tmp_path)
    (tmp_path / "consortium.toml").unlink()
    with pytest.raises(UsageError, match="CONSORTIUM-MISSING"):
        Consortium(tmp_path)


def test_a_full_disk_is_refused(made: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    made.refuse_full_disk()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9e8}))
    with pytest.raises(Refused, match="DISK-FULL"):
        made.refuse_full_disk()


# ---- proposals -----------------------------------------------------------------------------------------------


def test_a_hospital_reads_the_proposal(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"))
    key = made.key().public_key()
    folder = RunFolder(root=made.runs / run)
    proposal = read_proposal((folder.root / "proposal.bin").read_bytes(), key)
    assert proposal.run == run and proposal.plan == folder.plan()
    assert {site: public.public_bytes_raw().hex() for site, public in proposal.identities.items()} == (
        folder.facts()["public_keys"]
    )
    study = folder.study()
    theirs = proposal_message(
        run=run,
        plan=folder.plan(),
        identities=folder.facts()["public_keys"],
        schema=study.schema,
        exclude=study.exclude,
    )
    ours = unseal((folder.root / "proposal.bin").read_bytes(), key, sender="coordinator")
    assert ours == unseal(seal(theirs, made.key()), key, sender="coordinator"), "client and server write the same"
    assert made.register().proposals(SITES[0])[-1][0] == run
    assert made.register().run_row(run).state == "proposed"


def test_a_rehearsal_is_one_everywhere(made: Consortium, tmp_path: Path) -> None:
    run = made.propose(study_of(tmp_path / "study"), seed=11)
    facts = json.loads((made.runs / run / "run.json").read_text())
    assert run == "small-0000000b" and facts["seed"] == 11 and facts["rehearsal"] is True
    with pytest.raises(UsageError, match="RUN-EXISTS"):
        made.propose(tmp_path / "study" / "study.toml", seed=11)
    real = made.propose(tmp_path / "study" / "study.toml")
    assert json.loads((made.runs / real / "run.json").read_text())["rehearsal"] is False


@pytest.mark.parametrize("step", [(Consortium, "_write_run"), (Register, "propose")])
def test_a_proposal_that_was_killed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[type, str]
) -> None:
    """Until the register has it nobody has seen it: the same seed may be proposed again."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    made, study = make(tmp_path / "c"), study_of(tmp_path / "study")
    with monkeypatch.context() as patch:
        patch.setattr(*step, die)
        with pytest.raises(KeyboardInterrupt):
            made.propose(study, seed=77)
    assert made.register().runs() == []
    assert made.propose(study, seed=77) == "small-0000004d"
    assert made.folder("small-0000004d").plan().sites == SITES


def test_a_study_names_its_sites(made: Consortium, tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    text = study.read_text()
    study.write_text(text + '\n[sites]\nnames = ["site-1", "site-3", "south"]\n')
    with pytest.raises(UsageError) as caught:
        made.propose(study)
    assert code_of(caught) == "CONSORTIUM-SITES" and "south" in str(caught.value) and "invite" in caught.value.hint


def test_nobody_is_enrolled_yet(tmp_path: Path) -> None:
    empty = Consortium.create(tmp_path / "c", name="c", addresses=HERE, passphrase=PASSPHRASE)
    with pytest.raises(UsageError, match="no site is enrolled"):
        empty.propose(study_of(tmp_path / "study"))


def test_a_revoked_site_is_in_no_new_plan(tmp_path: Path) -> None:
    made = make(tmp_path / "c")
    made.register().revoke(SITES[2])
    with pytest.raises(StudyError, match="STUDY-SITES"):  # secure sum wants three
        made.propose(study_of(tmp_path / "study"))


def test_guessed_ranges_are_refused_and_marked(made: Consortium, tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    path = study.parent / "dictionary.json"
    dictionary = json.loads(path.read_text())
    dictionary["fields"][1]["x-guessed"] = True
    path.write_text(json.dumps(dictionary))
    with pytest.raises(StudyError, match="STUDY-GUESSED"):
        made.propose(study)
    run = made.propose(study, accept_guessed_ranges=True)
    assert made.folder(run).facts()["guessed_ranges"] is True


def test_an_unknown_transport(made: Consortium, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TRANSPORT"):
        made.propose(study_of(tmp_path / "study"), transport="pigeon")


@pytest.mark.parametrize("run", ["nothing", "../x", "", "a/b", ".."])
def test_a_folder_of_no_run(made: Consortium, run: str) -> None:
    with pytest.raises(UsageError, match="RUN-UNKNOWN"):
        made.folder(run)
